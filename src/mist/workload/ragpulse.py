"""The traces of RAGPulse: JSON lines whose prompts are told as components, with the components' lengths beside them.

One trace format, read into a `RequestTable` before the run: components become block ids and sizes, and a `ColumnMap`
reads the rest. It never takes two blocks for the same unless all components before them are the same too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mist.registry import register
from mist.workload import RequestTable
from mist.workload.column_map import ColumnMap, whole_tokens
from mist.workload.rows import Problems, Rows, json_object, read_rows

_INPUT, _OUTPUT, _TIME, _IDS = "input_length", "output_length", "timestamp", "hash_ids"
_LENGTH = "token_length"


@dataclass(frozen=True, slots=True)
class _Component:
    """`file`: where its lengths are, by the column `id_name`; `size`: what its tokens are called in the table."""

    file: str
    id_name: str
    size: str


COMPONENTS: Mapping[str, _Component] = {
    "sys_prompt": _Component("1_sys_prompt.jsonl", "sys_prompt_id", "system_tokens"),
    "passages_ids": _Component("2_passages.jsonl", "passage_id", "passage_tokens"),
    "history": _Component("3_history.jsonl", "history_id", "history_tokens"),
    "web_search": _Component("5_web_search.jsonl", "web_search_id", "web_tokens"),
    "user_input": _Component("4_user_input.jsonl", "user_input_id", "query_tokens"),
}
_SIZES = (*(component.size for component in COMPONENTS.values()), "num_passages")

#: (component, id), tokens
Segment = tuple[tuple[str, int], int]


@register("trace", "ragpulse")
@dataclass(frozen=True, slots=True)
class RagPulse:
    """Objects of `timestamp` (s), `input_length`, `output_length` and `hash_ids` by component, one a line.

    The components' lengths are in the files `1_sys_prompt.jsonl` to `5_web_search.jsonl` beside the trace. `order` is
    how a prompt is put together; left out, it is the one in which the trace lists the components. Prompts are cut into
    blocks of `hash_block_size` tokens. Tokens of `input_length` beyond the components (the chat template's) stand at
    the prompt's end and are nobody else's.
    Source: flashserve/RAGPulse (Wang et al., arXiv 2511.12979).
    """

    hash_block_size: int = 16
    order: tuple[str, ...] = tuple(COMPONENTS)

    def __post_init__(self) -> None:
        if self.hash_block_size < 1:
            raise ValueError(
                f"hash_block_size is {self.hash_block_size}: give the tokens per block, such as the engine's 16"
            )
        if sorted(self.order) != sorted(COMPONENTS):
            raise ValueError(f"order is {', '.join(self.order)}: name each of {', '.join(COMPONENTS)} once")

    def matches(self, path: Path, first_line: bytes) -> bool:
        """Whether the first object tells its prompt's components."""
        ids = json_object(first_line).get(_IDS)
        return isinstance(ids, dict) and set(ids) <= set(COMPONENTS)

    def read(self, path: Path) -> RequestTable:
        """The whole trace with sizes by component; ScenarioError tells every bad record, id, length or missing file."""
        rows = read_rows(path, [_TIME, _INPUT, _OUTPUT, _IDS])
        columns = ColumnMap(_TIME, _INPUT, _OUTPUT, "s", hash_ids=_IDS, hash_block_size=self.hash_block_size)
        columns.require_columns(rows)
        lengths = {name: _read_lengths(path.parent, component) for name, component in COMPONENTS.items()}
        prompts = [self._segments(rows, row, lengths) for row in range(len(rows.lines))]
        unknown = _beyond_components(rows, prompts)
        ids = _block_ids(prompts, unknown, self.hash_block_size)
        rows = replace(rows, columns={**rows.columns, _IDS: ids, **_sizes(prompts)})
        table = replace(columns, sizes=_SIZES).table(rows)
        return replace(table, notes=(*table.notes, *_notes(unknown, rows)))

    def _segments(self, rows: Rows, row: int, lengths: Mapping[str, Mapping[int, int]]) -> list[Segment]:
        """The components of one prompt in their order; what can't be used is a problem of the row and left out."""
        ids = rows.columns[_IDS][row]
        if not isinstance(ids, dict) or set(ids) != set(COMPONENTS):
            given = ", ".join(map(str, ids)) if isinstance(ids, dict) else type(ids).__name__
            rows.complain(row, _IDS, f"{_IDS} is of {given or 'nothing'}", f"give lists of {', '.join(COMPONENTS)}")
            return []
        found: list[Segment] = []
        for name in self.order:
            if not isinstance(ids[name], list):
                rows.complain(row, _IDS, f"{name} is {str(ids[name])[:60]!r}", "give a list of ids")
                continue
            for each in ids[name]:
                length = lengths[name].get(each) if type(each) is int else None
                if length is None:
                    hint = f"{COMPONENTS[name].file} gives the {_LENGTH} of each {COMPONENTS[name].id_name}"
                    rows.complain(row, _IDS, f"{name} {str(each)[:60]!r} has no length", hint)
                else:
                    found.append(((name, each), length))
        return found


def _read_lengths(folder: Path, component: _Component) -> dict[int, int]:
    """Tokens by id; ScenarioError with file:line where the file is missing or a row of it can't be used."""
    path = next((p for end in ("", ".gz") if (p := folder / f"{component.file}{end}").is_file()), None)
    if path is None:
        hint = f"0_trace.jsonl needs the lengths in {component.file} beside it, gzipped or not"
        Problems(str(folder / component.file)).fail("is missing", hint=hint)
    rows = read_rows(path, [component.id_name, _LENGTH])
    for name in (component.id_name, _LENGTH):
        if name not in rows.columns:
            rows.problems.add(f"no column {name!r}", line=1, hint=f"its objects have {component.id_name} and {_LENGTH}")
    rows.problems.raise_any()
    tokens = whole_tokens(rows, _LENGTH, minimum=1).tolist()
    lengths: dict[int, int] = {}
    for row, (each, length) in enumerate(zip(rows.columns[component.id_name], tokens, strict=True)):
        if type(each) is not int:
            rows.complain(row, component.id_name, f"{component.id_name} is {str(each)[:60]!r}", "give a whole number")
        elif lengths.setdefault(each, length) != length:
            message = f"{component.id_name} {each} has {length} tokens here and {lengths[each]} before"
            rows.complain(row, component.id_name, message, "give each id one length")
    rows.problems.raise_any()
    return lengths


def _beyond_components(rows: Rows, prompts: Sequence[Sequence[Segment]]) -> list[int]:
    """Tokens of each prompt that no component tells; a problem where the components have more than the prompt."""
    beyond = []
    for row, (segments, given) in enumerate(zip(prompts, rows.columns[_INPUT], strict=True)):
        known = sum(length for _, length in segments)
        beyond.append(given - known if type(given) is int else 0)
        if beyond[-1] < 0:
            message = f"{_INPUT} is {given}, and its components have {known} tokens"
            rows.complain(row, _INPUT, message, "give the tokens of the whole prompt")
    return beyond


def _block_ids(prompts: Sequence[Sequence[Segment]], beyond: Sequence[int], block_size: int) -> list[list[int]]:
    """An id for each block of each prompt, the same for the same tokens of the same components; the last in part."""
    interned: dict[tuple[Any, ...], int] = {}
    found = []
    for row, (segments, rest) in enumerate(zip(prompts, beyond, strict=True)):
        pieces = _blocks([*segments, (("", row), rest)], block_size) if rest >= 0 else ()  # below 0 is a problem
        found.append([interned.setdefault(each, len(interned)) for each in pieces])
    return found


def _blocks(segments: Sequence[Segment], block_size: int) -> Iterator[tuple[Any, ...]]:
    """The content of each block: which tokens of which components follow each other in it."""
    pieces: tuple[Any, ...] = ()
    room = block_size
    for each, length in segments:
        start = 0
        while start < length:
            end = min(length, start + room)
            pieces += (each, start, end)
            room -= end - start
            start = end
            if not room:
                yield pieces
                pieces, room = (), block_size
    if pieces:
        yield pieces


def _sizes(prompts: Sequence[Sequence[Segment]]) -> dict[str, list[int]]:
    """Columns of each component's tokens, and of the number of passages."""
    columns: dict[str, list[int]] = {name: [0] * len(prompts) for name in _SIZES}
    for row, segments in enumerate(prompts):
        for (name, _), length in segments:
            columns[COMPONENTS[name].size][row] += length
            columns["num_passages"][row] += name == "passages_ids"
    return columns


def _notes(beyond: Sequence[int], rows: Rows) -> Iterator[str]:
    if any(beyond):
        least, mean, most = min(beyond), sum(beyond) / len(beyond), max(beyond)
        yield (
            f"{_INPUT} is {least} to {most} tokens (mean {mean:.1f}) more than its components: it counts, and these "
            "tokens are at the prompt's end, shared with no other"
        )
    times = [float(time) for time in rows.columns[_TIME]]
    for row in range(1, len(times)):
        if times[row] < times[row - 1] - max(times) / 2:
            yield f"the trace's clock starts anew at line {rows.lines[row]}: what follows is laid over what came before"
