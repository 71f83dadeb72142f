"""A small scenario on a client and on the naive scheduler of `reference.py`: the same steps and times, bit for bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kit import LinearSteps, play, table
from mist.batching.chunked import Chunked
from mist.batching.continuous import Continuous
from mist.batching.mixed import Mixed
from mist.batching.orders.fcfs import FCFS
from mist.batching.orders.priority import Priority
from mist.batching.static import Static
from mist.pipeline import RequestRandom
from mist.request import DECODE, PREFILL, FirstOf, Pipeline, Request, Stage
from mist.speculation import Speculation
from reference import Job, Reference

POLICIES: dict[str, Any] = {"chunked": Chunked, "continuous": Continuous, "static": Static, "mixed": Mixed}


@dataclass
class Branches:
    """What the pipelines of `jobs` are."""

    jobs: Sequence[Job]
    kinds: tuple[str, ...] = field(default=(PREFILL, DECODE), init=False)
    is_fixed: bool = field(default=False, init=False)

    def __call__(self, request: Request, rng: RequestRandom) -> Pipeline:
        job = self.jobs[request.index]
        if not job.branches:
            return (yield from answer(job.prompt, job.output))
        if not job.prefills:
            yield Stage(PREFILL, input_tokens=job.prompt)
        branches = [answer(job.prompt if job.prefills else 0, length) for length in job.branches]
        yield FirstOf(job.k or len(branches), branches, cancel_rest=job.cancels)
        return (yield from answer(*job.after))


def answer(tokens: int, output: int) -> Pipeline:
    yield Stage(PREFILL, input_tokens=tokens)
    return (yield Stage(DECODE, oracle_output_tokens=output))


def same(
    jobs: Sequence[Job],
    limits: Mapping[str, int],
    policy: str,
    caching: bool = False,
    speculation: Speculation | None = None,
    merges_shared_reads: bool = False,
    by_priority: bool = False,
) -> Reference:
    """Play `jobs` on both, assert that they do the same, and return the reference."""
    drafts = speculation.num_draft_tokens if speculation else 0
    sizes = {name: limits[name] for name in ("max_num_seqs", "max_num_batched_tokens")}
    sizes["max_num_batched_tokens"] += drafts * sizes["max_num_seqs"]
    longest = limits.get("long_prefill_token_threshold", 0)

    def steps_for(index: int, stage: int, tokens: int) -> int:
        return speculation.num_steps(tokens, speculation.rng_of(index, stage)) if speculation else tokens

    perf = LinearSteps()
    reference = Reference(
        policy,
        sizes["max_num_batched_tokens"],
        sizes["max_num_seqs"],
        limits["num_blocks"],
        limits["block_size"],
        perf.of,
        unit_tokens=limits["unit_tokens"],
        caching=caching,
        watermark=limits["watermark"],
        drafts=drafts,
        steps_for=steps_for,
        merges=merges_shared_reads,
        by_priority=by_priority,
        longest=longest,
    )
    if longest:
        sizes["long_prefill_token_threshold"] = longest
    reference.run(list(jobs))
    columns = ([getattr(job, name) for job in jobs] for name in ("arrival", "prompt", "output", "priority"))
    arrivals, prompts, outputs, priorities = columns
    workload = table(arrivals, prompts, outputs, [job.keys for job in jobs])
    workload.sizes = {"priority": np.asarray(priorities, dtype=np.int64)}
    run = play(
        workload,
        pipeline=Branches(jobs) if any(job.branches for job in jobs) else None,
        policy=lambda: POLICIES[policy](**sizes, order=Priority() if by_priority else FCFS()),
        perf=perf,
        num_blocks=limits["num_blocks"],
        block_size=limits["block_size"],
        caching=caching,
        unit_tokens=limits["unit_tokens"],
        watermark=limits["watermark"],
        speculation=speculation,
        merges_shared_reads=merges_shared_reads,
    )
    steps = run.records.steps.as_columns()
    got = [tuple(int(steps[name][i]) for name in run.records.steps.columns[1:]) for i in range(len(run.records.steps))]
    assert got == reference.steps
    rows = run.records.requests.as_columns()
    names = ("first_token_ns", "end_ns", "output_tokens", "num_preemptions")
    assert len(run.records.requests) == len(reference.done)
    for i in range(len(run.records.requests)):
        assert tuple(int(rows[n][i]) for n in names) == reference.done[int(rows["request"][i])]
    return reference


def campaign(
    compare: Callable[..., Counter[str]], seeds: range, often: Mapping[str, float], *case: Any
) -> Counter[str]:
    """`compare(seed, *case)` for all `seeds`: what happened, of which each in `often` must so often in 100 of them."""
    events: Counter[str] = Counter()
    for seed in seeds:
        try:
            events += compare(seed, *case)
        except BaseException:
            print(f"reproduce: compare({', '.join(map(repr, (seed, *case)))})")
            raise
    rare = {each: events[each] for each, least in often.items() if events[each] * 100 < least * len(seeds)}
    assert not rare, f"these hardly happen, so this proves little: {rare}"
    return events
