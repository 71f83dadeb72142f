"""What tests of the engine share: the cluster from parts of `mist.testing`, strategies for hypothesis, tasks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import strategies as st

from mist.batching import BatchingPolicy
from mist.batching.chunked import Chunked
from mist.batching.continuous import Continuous
from mist.batching.mixed import Mixed
from mist.batching.sglang import SGLang
from mist.batching.static import Static
from mist.batching.tensorrt_llm import TensorRTLLM
from mist.memory.kv_cache import KVCache
from mist.records import Records
from mist.request import Request, Stage, Task
from mist.residents import Residents
from mist.testing import LinearSteps, Run, SmallScenario, engine, play, table

__all__ = [
    "POLICIES",
    "LinearSteps",
    "Run",
    "SmallScenario",
    "decode",
    "engine",
    "play",
    "residents",
    "rows",
    "sampled",
    "small_scenarios",
    "table",
    "task",
]

POLICIES: tuple[type[BatchingPolicy], ...] = (Chunked, Continuous, Static, Mixed, SGLang, TensorRTLLM)


def sampled(values: Iterable[Any], few: int) -> list[Any]:
    """`values` to parametrize by: the first `few` in every run, the others in `make test-long` only."""
    return [pytest.param(each, marks=() if i < few else pytest.mark.long) for i, each in enumerate(values)]


#: columns that hold instants
TIMES = {"arrival_ns", "first_token_ns", "end_ns", "queued_ns", "started_ns", "joined_ns", "start_ns"}


def rows(records: Records, *, shift: int = 0, scale: int = 1) -> dict[str, list[tuple[int, ...]]]:
    """The tables of a run as sorted rows, all instants (but not "never") times `scale` plus `shift`."""
    names = ("requests", "tasks", "steps", "transfers")
    tables = {name: getattr(records, name) for name in names}
    result = {}
    for name, t in tables.items():
        columns = [
            [x if x < 0 else x * scale + shift for x in column.tolist()] if key in TIMES else column.tolist()
            for key, column in t.as_columns().items()
        ]
        result[name] = sorted(zip(*columns, strict=True))
    return result


@st.composite
def small_scenarios(
    draw: st.DrawFn, *, roomy: bool = False, caching: bool | None = None, shared: bool = True, gap_ns: int = 4000
) -> SmallScenario:
    """Small scenarios with ties, lengths around the block size and, unless `roomy`, preemptions.

    `shared`: prompts begin with one of two prefixes; else no two have content in common.
    """
    block = draw(st.sampled_from([1, 2, 4, 8]))
    cached = draw(st.booleans()) if caching is None else caching
    unit = block * draw(st.sampled_from([1, 2])) if cached else 0
    length = st.sampled_from([1, max(1, block - 1), block, block + 1]) | st.integers(1, 40)
    gap = st.sampled_from([0, 500, 1000, 2000]) | st.integers(0, 300) | st.integers(0, gap_ns)
    request = st.tuples(gap, length, st.just(0) | length, st.integers(0, 1))
    size = draw(st.integers(1, 10))
    now, requests = 0, []
    for i, (wait, prompt, output, prefix) in enumerate(draw(st.lists(request, min_size=size, max_size=size))):
        now += wait
        own = 1000 * (i + 1)
        keys = [100 * prefix + k if shared and k < 2 else own + k for k in range(-(-prompt // unit))] if unit else []
        requests.append((now, prompt, output, tuple(keys)))
    seqs = draw(st.integers(1, 6))
    longest = max(-(-(prompt + output) // block) for _, prompt, output, _ in requests)
    return SmallScenario(
        tuple(requests),
        max_num_seqs=seqs,
        max_num_batched_tokens=seqs + draw(st.integers(0, 30)),
        num_blocks=1000 if roomy else max(1, longest + draw(st.integers(-1, 4))),
        block_size=block,
        unit_tokens=unit,
        caching=cached,
        watermark=draw(st.sampled_from([0, 0, 1])),
    )


def task(index: int = 0, tokens: int = 8, output: int = 5, keys: tuple[int, ...] = ()) -> Task:
    """A prefill of `tokens` whose request generates `output` afterwards."""
    return Task(Request(index, 0, tokens, output, keys), Stage("prefill", tokens), 0, tokens, 0)


def decode(index: int, context: int, output: int) -> Task:
    """A decode of `output` tokens with `context` tokens computed, admitted as number `index`."""
    made = task(index, context, output)
    made.stage = Stage("decode", oracle_output_tokens=output)
    made.admission = index
    return made


def residents(kv: KVCache, *waiting: Task) -> Residents:
    """These tasks, waiting for blocks of `kv`."""
    made = Residents(kv, lambda task: None)
    for one in waiting:
        made.enqueue(one)
    return made
