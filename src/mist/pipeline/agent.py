"""Agents: a model that calls a tool, reads what it says and goes on, and at times sends out others that report to it.

One request is one run of an agent, from the user's task to the final answer. It never says what a tool or a sub-agent
finds, only how much there is to read and how long it took.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import ClassVar, NamedTuple

import numpy as np

from mist.pipeline import RequestRandom
from mist.pipeline.parts import BYTES_PER_TOKEN, Answer, require_names
from mist.registry import register
from mist.request import DECODE, PREFILL, TOOL, All, Context, Delay, Pipeline, Request, Stage
from mist.units import NS_PER_MS
from mist.workload import Lengths
from mist.workload.synthetic import Fixed


class _Call(NamedTuple):
    """What a turn writes to call a tool, how long that runs, and what it says."""

    tokens: int
    tool_ms: int
    output_tokens: int


@register("pipeline", "agent")
@dataclass
class Agent:
    """`turns` of prefill, decode and a tool that runs, the last of which writes the answer, the request's output.

    A turn writes `call_tokens` to call its tool, which runs for `tool_ms` outside all clients and says
    `tool_output_tokens`; with `tool_stage` a client serves it in a stage of that name instead, with the call as its
    input. The next turn's prompt is everything so far. With `sub_agents` a turn, each with probability `fan_out` or
    those of `fan_out_turns`, counted from 1, calls so many of them in place of the tool: side by side, each goes
    through `sub_agent_turns` in a context of its own, from `sub_agent_prompt_tokens` to a report of
    `sub_agent_output_tokens`, and all reports are the next turn's to read. The user sees the answer only.
    What a turn leaves in the prefix cache is found by the next; also elsewhere, in units of `hash_block_size` tokens,
    or those of the workload. Lengths and times are numbers, or distributions to draw from for each turn.
    ValueError for values out of range.
    """

    sizes: ClassVar[tuple[str, ...]] = ()
    turns: Lengths = 5
    call_tokens: Lengths = 128
    tool_ms: Lengths = 1000
    tool_output_tokens: Lengths = 1000
    tool_stage: str = ""
    sub_agents: int = 0
    fan_out: float = 0.25
    fan_out_turns: tuple[int, ...] = ()
    sub_agent_turns: Lengths = 3
    sub_agent_prompt_tokens: Lengths = 2000
    sub_agent_output_tokens: Lengths = 500
    hash_block_size: int = 64

    def __post_init__(self) -> None:
        for name in ("turns", "call_tokens", "tool_ms", "tool_output_tokens", "sub_agent_turns",
                     "sub_agent_prompt_tokens", "sub_agent_output_tokens", "hash_block_size"):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{name} is {value}: give a number of at least 1")
        if not 0 <= self.sub_agents <= 1000:
            raise ValueError(f"sub_agents is {self.sub_agents}: give how many run side by side, from 0 to 1000")
        if not 0 <= self.fan_out <= 1:
            raise ValueError(f"fan_out is {self.fan_out:g}: give the probability that a turn calls sub-agents")
        if self.fan_out_turns and (min(self.fan_out_turns) < 1 or not self.sub_agents):
            raise ValueError("fan_out_turns are turns, counted from 1, that call sub_agents: give at least 1 of both")
        turns = self.turns.tokens if isinstance(self.turns, Fixed) else self.turns
        if isinstance(turns, int) and max(self.fan_out_turns, default=0) >= turns:
            last = f"turn {turns}, the last, answers"
            raise ValueError(f"fan_out_turns has {max(self.fan_out_turns)}, and {last}: give turns below {turns}")
        if self.tool_stage:
            require_names(tool_stage=self.tool_stage)

    @property
    def kinds(self) -> tuple[str, ...]:
        return (PREFILL, DECODE, self.tool_stage or TOOL)

    @property
    def delays(self) -> tuple[str, ...]:
        """The kinds that no client serves."""
        return () if self.tool_stage else (TOOL,)

    @property
    def is_fixed(self) -> bool:
        return False

    def __call__(self, request: Request, rng: RequestRandom) -> Pipeline:
        draws, numbers = rng(), count(1)
        calls = self._calls(self.turns, draws)
        fans_out = draws.random(len(calls)) < self.fan_out
        prompt = request.input_tokens
        for turn, call in enumerate(calls, 1):
            calls_agents = turn in self.fan_out_turns if self.fan_out_turns else fans_out[turn - 1]
            if not self.sub_agents or not calls_agents:
                yield from self._call(0, prompt, call)
                prompt += call.tokens + call.output_tokens
                continue
            yield from _turn(0, prompt, call.tokens)
            reports = yield All([self._sub_agent(next(numbers), draws) for _ in range(self.sub_agents)])
            prompt += call.tokens + reports.output_tokens
        yield from _turn(0, prompt, request.oracle_output_tokens, is_last=True, visible=True)

    def _sub_agent(self, number: int, draws: np.random.Generator) -> Answer:
        """A run of its own, all drawn before it begins, whatever runs beside it; its result is its report."""
        prompt, report = (_draw(each, 1, draws)[0] for each in (self.sub_agent_prompt_tokens,
                                                                self.sub_agent_output_tokens))  # fmt: skip
        return self._report(number, prompt, report, self._calls(self.sub_agent_turns, draws))

    def _report(self, number: int, prompt: int, report: int, calls: list[_Call]) -> Answer:
        for call in calls:
            yield from self._call(number, prompt, call)
            prompt += call.tokens + call.output_tokens
        return (yield from _turn(number, prompt, report, is_last=True))

    def _calls(self, turns: Lengths, draws: np.random.Generator) -> list[_Call]:
        """What all turns but the last do."""
        num = _draw(turns, 1, draws)[0] - 1
        lengths = (_draw(each, num, draws) for each in (self.call_tokens, self.tool_ms, self.tool_output_tokens))
        return [_Call(*each) for each in zip(*lengths, strict=True)]

    def _call(self, number: int, prompt: int, call: _Call) -> Answer:
        """A turn that calls a tool, and the tool."""
        yield from _turn(number, prompt, call.tokens)
        if not self.tool_stage:
            return (yield Delay(call.tool_ms * NS_PER_MS))
        return (yield Stage(self.tool_stage, call.tokens, visible=False, input_bytes=call.tokens * BYTES_PER_TOKEN))


def _turn(number: int, prompt: int, output: int, *, is_last: bool = False, visible: bool = False) -> Answer:
    """The model reads all of a context and writes; the context is gone on from, unless this is its last turn."""
    result = yield Stage(PREFILL, input_tokens=prompt, visible=visible, input_bytes=prompt * BYTES_PER_TOKEN,
                         context=Context(number, prompt))  # fmt: skip
    if output:
        result = yield Stage(DECODE, oracle_output_tokens=output, visible=visible, is_resumed=not is_last,
                             context=Context(number, prompt + output))  # fmt: skip
    return result


def _draw(lengths: Lengths, num: int, draws: np.random.Generator) -> list[int]:
    return [lengths] * num if isinstance(lengths, int) else lengths.sample(num, draws).tolist()
