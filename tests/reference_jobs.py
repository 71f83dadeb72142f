"""What the naive scheduler in `reference.py` serves: jobs, and the sequences that requests for them consist of.

Numbers only; nothing here is shared with the client.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from reference_blocks import Holder


@dataclass
class Job:
    """A prompt and its answer; or the `branches`, answers of so many tokens, of which `k` are waited for (0: all).

    They go on from one prefill, or each has its own. `after` them come tokens to compute and to generate.
    """

    index: int
    arrival: int
    prompt: int
    output: int
    keys: tuple[int, ...] = ()
    branches: tuple[int, ...] = ()
    k: int = 0
    cancels: bool = True
    prefills: bool = False
    after: tuple[int, int] = (0, 0)
    priority: int = 0


@dataclass(eq=False)
class Request:
    job: Job
    branches: list[Sequence] = field(default_factory=list)
    ended: int = 0  # branches
    tasks: int = 0  # sequences that are here and wanted
    stages: int = 0
    first_token: int = -1
    tokens: int = 0
    preemptions: int = 0
    is_answered: bool = False
    is_rejected: bool = False


@dataclass(eq=False, kw_only=True)
class Sequence(Holder):
    request: Request
    target: int
    output: int
    forks: bool = False  # branches go on where it ends
    branch: bool = False
    shares: bool = False  # full blocks of the prompt with other branches
    cancelled: bool = False
    over: bool = False
    number: int = -1  # among those that came to the client
    stage: int = -1  # number of its decode among the stages of the request
    computed: int = 0
    generated: int = 0
    scheduled: int = 0
    decoding: bool = False
    pace: int = 0  # tokens per step in 2^-32, once drawn
    path: int = 0  # how far it is since it joined, in the same unit
    since_join: int = 0

    @property
    def rank(self) -> tuple[int, int, int]:
        """By priority, the smallest first."""
        return self.request.job.priority, self.request.job.arrival, self.number
