"""Performance models: how long a step takes on a client's hardware. One contract, whatever the source of the numbers.

A model is prepared once per client (it tabulates there), then answers `step_time` with a few array reads per step.
It knows nothing of queues, policies or time of day; engine host overheads are added by the client.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from mist.hardware import Device, Platform
from mist.model import ACTIVATION_BYTES, DTYPE_BYTES, ModelSpec
from mist.request import Step

#: where a step time may come from
ORIGINS = ("measured", "interpolated", "extrapolated", "roofline", "clamped")


#: what an operator's time may follow from
BOUNDS = ("compute", "memory", "network", "launch")

#: the classes of operators that an engine version may run slower or faster than those that are known, by kind
OPERATOR_CLASSES = {
    "gemm": "gemm", "grouped_gemm": "experts", "attention_prefill": "attention_prefill",
    "attention_decode": "attention_decode", "attention_encoder": "attention_prefill", "elementwise": "elementwise",
    "allreduce": "network", "allgather": "network", "alltoall": "network", "message": "network",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Deployment:
    """What a performance model is prepared for: a model in given dtypes on a platform, with the engine's limits.

    With `cuda_graph` the device replays a captured step; without, the host launches every kernel of it. `engine` is
    whose kernels run ("" any); `time_factors` by class of operator (`OPERATOR_CLASSES`) is how long its version of them
    takes, over those that a performance model knows; `tables_version`: the release whose measured kernels are nearest
    to it, "" the newest.
    `tokens_per_decode`: of all its steps, what a decode computes there; more than one where it verifies drafts.
    `clock`: share of its full clock that the device keeps in operators bound by compute; less than 1 under a power cap.
    """

    model: ModelSpec
    platform: Platform
    weights_dtype: str
    kv_dtype: str
    max_num_batched_tokens: int
    max_num_seqs: int
    cuda_graph: bool = True
    tokens_per_decode: int = 1
    engine: str = ""
    time_factors: Mapping[str, float] = field(default_factory=dict)
    clock: float = 1.0
    tables_version: str = ""

    def time_factor(self, kind: str, dtype: str = "") -> float:
        """What the known time of an operator of this kind, computed in `dtype`, is multiplied by.

        Some have kernels of their own, with a factor of the class where they have none: matrices of 8 bits
        (`gemm_8bit`), experts of 4 bits (`experts_4bit`), decode attention over KV caches of 8 bits
        (`attention_decode_kv8`) and for queries that share keys and values (`attention_decode_gqa`).
        """
        name = OPERATOR_CLASSES[kind]
        for special, applies in self._special_kernels(name, dtype):
            if applies and special in self.time_factors:
                return self.time_factors[special]
        return self.time_factors.get(name, 1.0)

    def clock_of(self, kind: str) -> float:
        """The clock at which operators of this kind seem to run where compute binds them.

        Lower than `clock` by a factor `gemm_compute`, or `experts_compute_4bit` of weights of 4 bits: kernels that read
        as fast as the known ones and multiply more slowly, such as those that unpack the weights first.
        """
        name = OPERATOR_CLASSES[kind]
        if name == "experts":
            return self.clock / (self.time_factors.get("experts_compute_4bit", 1.0) if self._has_4bit_experts else 1.0)
        return self.clock / (self.time_factors.get("gemm_compute", 1.0) if name == "gemm" else 1.0)

    @property
    def _has_4bit_experts(self) -> bool:
        return DTYPE_BYTES[self.model.matrix_dtypes(self.weights_dtype)[1]] < 1

    def _special_kernels(self, name: str, dtype: str) -> tuple[tuple[str, bool], ...]:
        if name == "gemm":
            return (("gemm_8bit", DTYPE_BYTES.get(dtype) == 1),)
        if name == "experts":
            return (("experts_4bit", self._has_4bit_experts),)
        if name != "attention_decode":
            return ()
        return (
            ("attention_decode_kv8", DTYPE_BYTES[self.kv_dtype] < ACTIVATION_BYTES),
            ("attention_decode_gqa", all(g.num_kv_heads < g.num_heads for g in self.model.layers)),
        )


@dataclass(frozen=True, slots=True)
class OperatorTime:
    """One operator's share of a step: all `count` launches of it together.

    `flop` and `bytes`: its work on one device (of a collective, the message); `time_ns` and what it is `bound_by` (one
    of `BOUNDS`); `origin` of the time (one of `ORIGINS`); `floor_ns`: FLOP over peak, compulsory bytes over bandwidth
    or received bytes over the link, whichever is more.
    """

    name: str
    count: int
    flop: float
    bytes: float
    time_ns: float
    bound_by: str
    origin: str
    floor_ns: float

    @property
    def efficiency(self) -> float | None:
        """Floor over time; None where it took none."""
        return self.floor_ns / self.time_ns if self.time_ns else None


@dataclass(frozen=True, slots=True)
class HostDeployment:
    """What a host-side model is prepared for: `num_cores` cores of a CPU `device`, batches of `max_num_seqs` tasks.

    Its memory is the device's, at its data-sheet bandwidth; `num_cores` is at most the device's own.
    """

    device: Device
    num_cores: int
    max_num_seqs: int


@dataclass(frozen=True, slots=True)
class Demand:
    """What a step asks of a host that others share: time of its cores, all together, and DRAM traffic."""

    core_ns: int = 0
    dram_bytes: int = 0


class HostModel(Protocol):
    """A performance model of work that needs no neural network: a vector index, a tokeniser. Kind `perf`, as others.

    A step is a batch of tasks: a chunk (input tokens, 0) for each of its sequences, its stage's kind in `Step.kinds`. A
    sequence is a text to work on, or a query of a search.
    """

    @property
    def kinds(self) -> tuple[str, ...] | None:
        """The stage kinds that it can price; None for any."""
        ...

    def supports(self, deployment: HostDeployment) -> str | None:
        """None if it can price this deployment's steps, else the reason why not."""
        ...

    def prepare(self, deployment: HostDeployment) -> None:
        """Build what `step_time` needs; called once, before any step."""
        ...

    def memory_bytes(self) -> int:
        """What it keeps in the host's memory, such as an index."""
        ...

    def step_time(self, step: Step) -> int:
        """Time of `step` in ns where nothing else uses the host; at least `floor_time(step)`."""
        ...

    def floor_time(self, step: Step) -> int:
        """What no host of these data-sheet peaks can beat, in ns."""
        ...

    def demand(self, step: Step) -> Demand:
        """What `step` takes of the host's cores and DRAM channels while it runs."""
        ...

    def explain(self, step: Step) -> list[OperatorTime]:
        """The parts of `step` in order; their times sum to `step_time` within its rounding to 1 ns."""
        ...

    def provenance(self) -> dict[str, float]:
        """Share of the answered time by origin; the keys are among `ORIGINS`."""
        ...


class PerfModel(Protocol):
    """Registered under the kind `perf`; a dataclass whose fields are its parameters.

    A step is what one lane of one attention group runs. With pipeline stages its time is that of the batch through all
    of them, stage after stage, with the messages between, as if no other lane were there. With attention data
    parallelism it is one group's part of a common step: what the groups share (experts, and how tokens reach them)
    takes what `shared_tokens` per group take, everything else what the group's own tokens do. So the longest part is
    the common step. Without `shared_tokens` the others have as many tokens.

    Most steps are decodes alone that follow each other, so one may price them at once by
    `decode_times(num_decodes, decode_context, num_steps, host_ns)`: a list of `host_ns` + `step_time` of `num_steps`
    such steps at most, which attend to `decode_context` tokens in all and then `num_decodes` more in each; or None,
    where they must be asked for one by one. By `decoded(num_decodes, decode_context, num_steps)` it is told how many
    were run.
    """

    def supports(self, deployment: Deployment) -> str | None:
        """None if it can price this deployment's steps, else the reason why not."""
        ...

    def prepare(self, deployment: Deployment) -> None:
        """Build the tables for `deployment`; called once, before any step."""
        ...

    def step_time(self, step: Step) -> int:
        """Device time of `step` in ns; at least `floor_time(step)`."""
        ...

    def floor_time(self, step: Step) -> int:
        """max(FLOP / peak, bytes / bandwidth) of the step's work in ns, from data-sheet peaks: nothing can beat it."""
        ...

    def explain(self, step: Step) -> list[OperatorTime]:
        """The operators of `step` in order; their times sum to `step_time` within its rounding to 1 ns."""
        ...

    def provenance(self) -> dict[str, float]:
        """Share of the answered device time by origin; the keys are among `ORIGINS`."""
        ...
