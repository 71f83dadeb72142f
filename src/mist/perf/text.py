"""Text work on the cores of a host: tokenising, detokenising, guards of regular expressions, or any stage with a rate.

A `HostModel` for clients without a neural network; a stage kind has a time per token and a time per task, and one task
runs on one core. It knows nothing of queues or of who else uses the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mist.perf import Demand, HostDeployment, OperatorTime
from mist.registry import register
from mist.request import Step

#: Rates of one core of an AMD EPYC of family Zen 4 (studies/tokenizer_rates.py): encoding with `tokenizers` 0.23.3,
#: decoding with it token by token as a server streams, and searching for 16 patterns; tiktoken encodes at 250 and
#: decodes at 40.
TOKENIZE = {"ns_per_token": 1_400.0, "ns_per_request": 2_000.0}
DETOKENIZE = {"ns_per_token": 800.0, "ns_per_request": 2_000.0}
REGEX_GUARD = {"ns_per_token": 1_400.0, "ns_per_request": 2_000.0}
#: What a token takes in memory at least: four characters and a number of 32 bits.
BYTES_PER_TOKEN = 8
#: An hour, for a rate that is mistaken for one in another unit.
MAX_NS = 3.6e12


@register("perf", "cpu_text")
@dataclass(slots=True)
class CpuText:
    """Text stages by `ns_per_token` and `ns_per_request`, of one core; one that is left out of a given pair is 0.

    `stages`: the same for stage kinds of other names. A task takes ns_per_request + tokens · ns_per_token on one core;
    tasks of a step share c cores, which takes max(longest, sum / c), the optimum with preemption (McNaughton,
    Management Science 6(1), 1959). ValueError for a rate that isn't from 0 ns to an hour, and for other keys.
    """

    tokenize: Mapping[str, float] = field(default_factory=TOKENIZE.copy)
    detokenize: Mapping[str, float] = field(default_factory=DETOKENIZE.copy)
    regex_guard: Mapping[str, float] = field(default_factory=REGEX_GUARD.copy)
    stages: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    _rates: dict[str, tuple[float, float]] = field(init=False, repr=False)
    _num_cores: int = field(init=False, repr=False)
    _bytes_per_ns: float = field(init=False, repr=False)

    def __post_init__(self) -> None:
        own = {"tokenize": self.tokenize, "detokenize": self.detokenize, "regex_guard": self.regex_guard}
        if twice := own.keys() & self.stages.keys():
            raise ValueError(f"stages has {min(twice)}, which is a key of its own")
        checked = [_checked(kind, rate) for kind, rate in own.items()]
        checked += [_checked(f"stages: {kind}", rate) for kind, rate in self.stages.items()]
        self._rates = dict(zip((*own, *self.stages), checked, strict=True))

    @property
    def kinds(self) -> tuple[str, ...]:
        """The stage kinds that have a rate."""
        return tuple(self._rates)

    def supports(self, deployment: HostDeployment) -> str | None:
        """None, or that there are no cores to work on, as where a model's steps are to be priced."""
        if not isinstance(deployment, HostDeployment):
            return "it prices text work on a host, not the steps of a model"
        return None if deployment.num_cores >= 1 else f"{deployment.device.name} has no cores: take a CPU"

    def prepare(self, deployment: HostDeployment) -> None:
        """Remember the cores and the memory's bandwidth."""
        self._num_cores = deployment.num_cores
        self._bytes_per_ns = deployment.device.memory_bytes_per_s / 1e9

    def memory_bytes(self) -> int:
        """Nothing worth counting: a vocabulary has a few MB."""
        return 0

    def step_time(self, step: Step) -> int:
        """max(longest task, all tasks / cores), ns, rounded up; at least 1 and at least the floor."""
        times = self._task_times(step)
        spread = -(-sum(times) // self._num_cores)
        return max(1, max(times), spread, self.floor_time(step))

    def floor_time(self, step: Step) -> int:
        """The bytes of text and tokens over the memory's bandwidth, ns, rounded down."""
        return int(self._num_bytes(step) / self._bytes_per_ns)

    def demand(self, step: Step) -> Demand:
        """The work of all tasks, on a core each at most, and the bytes of text and tokens."""
        times = self._task_times(step)
        return Demand(sum(times), self._num_bytes(step))

    def explain(self, step: Step) -> list[OperatorTime]:
        """The step's time shared out among its stage kinds as their work is."""
        times, time_ns = self._task_times(step), self.step_time(step)
        work = sum(times)
        found = []
        for kind in dict.fromkeys(step.kinds):
            own = [i for i, name in enumerate(step.kinds) if name == kind]
            share = sum(times[i] for i in own) / work if work else len(own) / len(times)
            moved = BYTES_PER_TOKEN * sum(step.chunks[i][0] for i in own)
            floor = moved / self._bytes_per_ns
            found.append(OperatorTime(kind, len(own), 0, moved, share * time_ns, "compute", "extrapolated", floor))
        return found

    def provenance(self) -> dict[str, float]:
        """All of the time follows from rates that were measured elsewhere."""
        return {"extrapolated": 1.0}

    def _task_times(self, step: Step) -> list[int]:
        """What each task takes of one core, ns, rounded to the nearest."""
        rates = self._rates
        return [
            round(rates[kind][1] + tokens * rates[kind][0])
            for (tokens, _), kind in zip(step.chunks, step.kinds, strict=True)
        ]

    def _num_bytes(self, step: Step) -> int:
        return BYTES_PER_TOKEN * sum(tokens for tokens, _ in step.chunks)


def _checked(words: str, rate: Mapping[str, float]) -> tuple[float, float]:
    """(ns per token, ns per request) of `rate`; ValueError, which begins with `words`, for anything else in it."""
    known = ("ns_per_token", "ns_per_request")
    for key, value in rate.items():
        if key not in known:
            raise ValueError(f"{words} has no {key!r}; known: {', '.join(known)}")
        if not 0 <= value <= MAX_NS:
            raise ValueError(f"{words} has {key}: {value!r}, where 0 to {MAX_NS:g} would do")
    return rate.get(known[0], 0.0), rate.get(known[1], 0.0)
