"""The agentic traces of kv-cache-tester: a coding session per line, with the turns of its agent and sub-agents.

One trace format, read into a `RequestTable` before the run: what each prompt has in common with earlier ones becomes
prefix keys, and the times between turns what each waits for. It never shares a block between sessions: the trace
numbers each session's blocks anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mist.registry import register
from mist.units import NS_PER_S
from mist.workload import RequestTable
from mist.workload.column_map import MAX_TOKENS
from mist.workload.rows import Rows, json_object, read_rows
from mist.workload.sessions import Stretches, by_arrival

_TIME, _INPUT, _OUTPUT, _AGENT, _BLOCKS, _HIT, _API, _THINK = "t", "i", "o", "agent", "nb", "hit", "api", "think"
_MAIN = "0"
_MAX_S = 2**32
_COLUMNS = ("block_size", "requests")


@dataclass(slots=True, eq=False)
class _Turn:
    """A request of a session; `before` is the turn after whose end it comes. Times in seconds, units of keys."""

    agent: str
    time_s: float
    input_tokens: int
    output_tokens: int
    num_units: int
    num_shared: int
    api_s: float | None
    think_s: float | None
    before: _Turn | None = None
    row: int = -1
    keys: tuple[range, ...] = field(default=(), repr=False)

    @property
    def end_s(self) -> float:
        """When it ended, as far as the trace tells."""
        return self.time_s + (self.api_s or 0.0)

    @property
    def waits_s(self) -> float:
        """From the end of the turn before to this one; from its start where the trace doesn't tell how long it took."""
        if self.before is None:
            return 0.0
        if self.think_s is not None and self.before.api_s is not None and self.agent == self.before.agent:
            return self.think_s
        return max(0.0, self.time_s - self.before.end_s)


@register("trace", "kv_cache_tester")
@dataclass(frozen=True, slots=True)
class KVCacheTester:
    """Sessions of `id`, `block_size` and `requests`, one a line.

    Each request has `agent` ("0", and "0/3" for its sub-agents), `t` (s from the session's begin), `i` and `o` (input
    and output tokens), `nb` (full blocks of the prompt), `hit` (of these, at its front, seen before in the session),
    `api` and `think` (s; null where unknown). `replay`: "sessions" sends a turn its think time after the end of its
    agent's turn before; "times" at its time in the trace. `hash_block_size`: tokens per prefix key, a multiple of the
    trace's blocks; left out, one key a block. `num_sessions`: only the first so many.
    Source: callanjfox/kv-cache-tester, one session per line.
    """

    replay: Literal["sessions", "times"] = "sessions"
    hash_block_size: int | None = None
    num_sessions: int | None = None

    def __post_init__(self) -> None:
        for name in ("hash_block_size", "num_sessions"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}: give at least 1, or leave it out")

    def matches(self, path: Path, first_line: bytes) -> bool:
        """Whether the first object is a session with the sizes of its requests' blocks."""
        found = json_object(first_line)
        return {"id", "block_size", "requests"} <= set(found)

    def read(self, path: Path) -> RequestTable:
        """The whole trace; ScenarioError tells every request that can't be used, by the line of its session."""
        rows = read_rows(path, _COLUMNS)
        for name in _COLUMNS:
            if name not in rows.columns:
                rows.problems.add(f"no key {name!r}", line=1, hint="a session has id, block_size and requests")
        rows.problems.raise_any()
        unit_tokens = self._unit_tokens(rows)
        sessions = [list(_turns(rows, row, unit_tokens)) for row in range(len(rows.lines))[: self.num_sessions]]
        rows.problems.raise_any()
        if not any(sessions):
            rows.problems.fail("no requests in it", hint="a session has a list of requests")
        num_keys = 0
        for turns in sessions:
            _follow(turns)
            num_keys = _share(turns, num_keys)
        return self._table(sessions, unit_tokens, num_keys)

    def _unit_tokens(self, rows: Rows) -> int:
        """Tokens per prefix key."""
        first = rows.columns["block_size"][0]
        for row, size in enumerate(rows.columns["block_size"]):
            if type(size) is not int or size < 1 or size != first:
                rows.complain(row, "block_size", f"block_size is {str(size)[:60]}", "give all sessions one, such as 64")
        rows.problems.raise_any()
        unit_tokens = self.hash_block_size or first
        if unit_tokens % first:
            hint = "leave hash_block_size out, or give a multiple"
            rows.problems.fail(f"hash_block_size is {unit_tokens}, and the blocks have {first} tokens", hint=hint)
        return int(unit_tokens)

    def _table(self, sessions: Sequence[Sequence[_Turn]], unit_tokens: int, num_keys: int) -> RequestTable:
        turns = [turn for each in sessions for turn in each]
        for row, turn in enumerate(turns):
            turn.row = row
        table = RequestTable(
            arrival_ns=_ns([turn.time_s for turn in turns]),
            input_tokens=np.array([turn.input_tokens for turn in turns], np.int64),
            output_tokens=np.array([turn.output_tokens for turn in turns], np.int64),
            block_keys=Stretches([turn.keys for turn in turns], num_keys),
            hash_block_size=unit_tokens,
            notes=(_note(turns, unit_tokens),),
            sessions=np.repeat(np.arange(len(sessions)), [len(each) for each in sessions]),
        )
        if self.replay == "sessions":
            table.after = np.array([-1 if turn.before is None else turn.before.row for turn in turns], np.int64)
            table.think_ns = _ns([turn.waits_s for turn in turns])
        return by_arrival(table)


def _turns(rows: Rows, row: int, unit_tokens: int) -> Iterator[_Turn]:
    """The requests of one session by time; what can't be used is a problem of the row."""
    block_tokens, requests = rows.columns["block_size"][row], rows.columns["requests"][row]
    if not isinstance(requests, list):
        rows.complain(row, "requests", f"requests is {str(requests)[:60]!r}", "give a list of them")
        return
    per_unit = unit_tokens // block_tokens
    found = []
    for place, each in enumerate(requests):
        reason = _reason_against(each, block_tokens)
        if reason:
            rows.complain(row, "requests", f"request {place}: {reason}", "times in s, tokens and blocks whole numbers")
            continue
        found.append(_Turn(each[_AGENT], each[_TIME], each[_INPUT], each[_OUTPUT], each[_BLOCKS] // per_unit,
                           each[_HIT] // per_unit, each.get(_API), each.get(_THINK)))  # fmt: skip
    yield from sorted(found, key=lambda turn: turn.time_s)


def _reason_against(request: Any, block_tokens: int) -> str:
    """Why a request can't be used, "" if it can."""
    if not isinstance(request, dict):
        return f"{str(request)[:60]!r} is no object"
    for name, least in ((_INPUT, 1), (_OUTPUT, 0), (_BLOCKS, 0), (_HIT, 0)):
        value = request.get(name)
        if type(value) is not int or not least <= value < MAX_TOKENS:
            return f"{name} is {str(value)[:60]!r}"
    if request[_BLOCKS] > -(-request[_INPUT] // block_tokens) or request[_HIT] > request[_BLOCKS]:
        return f"{request[_HIT]} blocks hit of {request[_BLOCKS]} in {request[_INPUT]} tokens"
    if not isinstance(request.get(_AGENT), str):
        return f"{_AGENT} is {str(request.get(_AGENT))[:60]!r}"
    for name in (_TIME, _API, _THINK):
        seconds = request.get(name)
        if (name == _TIME or seconds is not None) and not _is_time(seconds):
            return f"{name} is {str(seconds)[:60]!r}"
    return ""


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < _MAX_S


def _follow(turns: Sequence[_Turn]) -> None:
    """Let each turn come after its agent's turn before, and a sub-agent's first after what its agent had done by then.

    A turn with no such turn comes at its own time.
    """
    last: dict[str, _Turn] = {}
    done: dict[str, list[_Turn]] = {}
    for turn in turns:
        parent = turn.agent.rpartition("/")[0]
        turn.before = last.get(turn.agent) or max(
            (each for each in done.get(parent, ()) if each.end_s <= turn.time_s),
            key=lambda each: each.end_s,
            default=None,
        )
        last[turn.agent] = turn
        done.setdefault(turn.agent, []).append(turn)


def _share(turns: Sequence[_Turn], num_keys: int) -> int:
    """Give each prompt its keys, of which the first are those of an earlier one; the keys in use after that.

    The trace tells how many blocks were seen before, not where: they are taken to be of the same agent's last prompt,
    else of a sub-agent's, else of the session's latest that has as many.
    """
    for place, turn in enumerate(turns):
        head: tuple[range, ...] = ()
        num_new = turn.num_units
        if turn.num_shared:
            earlier = turns[:place][::-1]
            own = next((each for each in earlier if each.agent == turn.agent), None)
            alike = sorted(earlier, key=lambda each: (each.agent == _MAIN) != (turn.agent == _MAIN))
            order = [own, *alike] if own else alike
            source = next((each for each in order if each.num_units >= turn.num_shared), None)
            if source is not None:
                head = tuple(_front(source.keys, turn.num_shared))
                num_new -= turn.num_shared
        turn.keys = (*head, range(num_keys, num_keys + num_new)) if num_new else head
        num_keys += num_new
    return num_keys


def _front(stretches: Sequence[range], num_keys: int) -> Iterator[range]:
    """The first `num_keys` numbers of `stretches`."""
    for each in stretches:
        if not num_keys:
            return
        yield each[:num_keys]
        num_keys -= min(num_keys, len(each))


def _note(turns: Sequence[_Turn], unit_tokens: int) -> str:
    """What the trace itself found in a cache, to compare hit rates with."""
    shared = sum(turn.num_shared for turn in turns) * unit_tokens / sum(turn.input_tokens for turn in turns)
    return f"In the trace {shared:.2%} of the prompt tokens had been seen before in their session."


def _ns(seconds: Sequence[float]) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.rint(np.array(seconds, np.float64) * NS_PER_S).astype(np.int64)
