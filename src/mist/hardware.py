"""Hardware as values: a `Device` with its data-sheet peaks and measured efficiencies, and a `Platform` of several.

Performance models divide the work of a step by these rates; the KV capacity rule reads the memory. Nothing here opens a
file or knows of models and requests: catalogues and users' own devices arrive as mappings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from mist.errors import Problem, ScenarioError, nearest
from mist.model import DTYPE_BYTES
from mist.units import GB, parse_bytes, parse_bytes_per_s, parse_time_ns

#: a number of bytes, or one for each of many messages
Size = TypeVar("Size", float, npt.NDArray[np.float64])

#: Fractions of peak for a device of which nothing is measured: rounded medians over H100, H200, A100 and L40S.
GENERIC_EFFICIENCY = {
    "gemm": 0.8, "gemm_fp8": 0.5, "gemm_memory": 0.8, "attention_prefill": 0.6, "attention_decode": 0.85,
    "elementwise": 0.5, "allreduce": 0.6,
}  # fmt: skip
GENERIC_LAUNCH_NS = {
    "gemm": 3_100, "gemm_fp8": 6_800, "attention_prefill": 14_500, "attention_decode": 12_000, "elementwise": 2_000,
    "allreduce": 2_100,
}  # fmt: skip
GENERIC_RAMP_TOKENS = 360.0
GENERIC_LINK_LATENCY_NS = 2_000
GENERIC_LINK_BYTES_PER_S = 32.0 * GB  # PCIe 4.0 x16, one direction
#: Between nodes, where nothing is given: a 400 Gbit/s NIC per device and a message's time through it (unverified).
GENERIC_INTER_NODE_BYTES_PER_S = 50.0 * GB
GENERIC_INTER_NODE_LATENCY_NS = 8_000
#: To host memory, where nothing is given: PCIe 4.0 x16 at the 0.82 of its 32 GB/s that an A100 reaches
#: (nvbandwidth, Azure/AI-benchmarking-guide), and the start of a copy (unverified).
GENERIC_HOST_LINK_BYTES_PER_S = 26.0 * GB
GENERIC_HOST_LINK_LATENCY_NS = 10_000
#: Share of its TDP that a busy device draws whatever its clock: the least that a B200 drew under any kernel of the vLLM
#: 0.22.0 tables of aiconfigurator-core 0.12.0, 243 of 1,000 W (unverified for other devices).
BASE_POWER = 0.24
#: Share of its TDP that a device draws while it waits, where nothing is given (unverified).
IDLE_POWER = 0.15


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator or CPU socket. Rates are data-sheet peaks per device; `efficiency` says what kernels reach.

    `vendor`: who makes it, in lower case; empty where that isn't said.
    `peak_flop_per_s`: dense FLOP/s by dtype (`bf16` always there; it stands for `fp16` too).
    `link_bytes_per_s`: scale-up link in total, per direction; `scale_up_domain`: devices that it joins; `switched`:
    every pair talks at full rate (NVSwitch, full mesh), so that small all-reduces need no ring.
    `inter_node_bytes_per_s`, `inter_node_latency_ns`: a device's share of the network between such domains.
    `host_link_bytes_per_s`, `host_link_latency_ns`: large copies from host memory, as measured and not the link's peak.
    `idle_w`: power of a device that waits for work, its memory filled; left out, `IDLE_POWER` of the TDP.
    `num_cores`: cores of a CPU; 0 for an accelerator.
    `efficiency`: fraction of peak by operator class; a key with a suffix (`gemm_fp8`, `attention_decode_fp8`,
    `allreduce_8` for eight ranks) overrides its class there. `kernel_launch_ns`: fixed time of a kernel, same keys.
    `attention_ramp_tokens`: context tokens that every new token costs in prefill attention on top of its true context
    (tiles that are filled in vain, reading the query, writing the output).
    `sources`: where each figure comes from; `unverified` where only one weak source gives it.
    """

    name: str
    peak_flop_per_s: Mapping[str, float]
    memory_bytes: int
    memory_bytes_per_s: float
    aliases: tuple[str, ...] = ()
    vendor: str = ""
    link_bytes_per_s: float = GENERIC_LINK_BYTES_PER_S
    link_latency_ns: int = GENERIC_LINK_LATENCY_NS
    scale_up_domain: int = 8
    switched: bool = False
    inter_node_bytes_per_s: float = GENERIC_INTER_NODE_BYTES_PER_S
    inter_node_latency_ns: int = GENERIC_INTER_NODE_LATENCY_NS
    host_link_bytes_per_s: float = GENERIC_HOST_LINK_BYTES_PER_S
    host_link_latency_ns: int = GENERIC_HOST_LINK_LATENCY_NS
    tdp_w: float | None = None
    idle_w: float | None = None
    num_cores: int = 0
    efficiency: Mapping[str, float] = field(default_factory=dict)
    kernel_launch_ns: Mapping[str, float] = field(default_factory=dict)
    attention_ramp_tokens: float = GENERIC_RAMP_TOKENS
    sources: Mapping[str, str] = field(default_factory=dict)

    def compute_dtype(self, weights_dtype: str) -> str:
        """The dtype in which GEMMs with such weights run: their own where the device has it, else bf16.

        Beside `mxfp4` weights activations have 8 bits on devices that take such operands, which have units for fp4.
        """
        if weights_dtype == "mxfp4" and {"fp4", "fp8"} <= self.peak_flop_per_s.keys():
            return "fp8"
        return weights_dtype if weights_dtype in self.peak_flop_per_s else "bf16"

    def peak(self, dtype: str) -> float:
        """Data-sheet FLOP/s in `dtype`, or in bf16 where the device has no such units."""
        return self.peak_flop_per_s.get(dtype, self.peak_flop_per_s["bf16"])

    def efficiency_of(self, operator_class: str, variant: str | int = "") -> float:
        """Fraction of peak that `operator_class` reaches, for a dtype or a number of ranks as `variant`."""
        return _most_specific(operator_class, variant, self.efficiency, GENERIC_EFFICIENCY)

    def launch_ns(self, operator_class: str, variant: str | int = "") -> float:
        """Fixed time of one kernel of `operator_class`, ns."""
        return _most_specific(operator_class, variant, self.kernel_launch_ns, GENERIC_LAUNCH_NS)

    @property
    def idle_watts(self) -> float | None:
        """Power while it waits for work, W, at most its TDP; None where no TDP is known."""
        if self.tdp_w is None:
            return None
        return IDLE_POWER * self.tdp_w if self.idle_w is None else min(self.idle_w, self.tdp_w)

    def clock_under(self, power_cap_w: float | None) -> float:
        """Share of its clock that a device keeps in kernels bound by compute, which alone would draw its TDP.

        ((cap - base) / (TDP - base))^(1/3), 1.0 without a cap: beyond `BASE_POWER` power goes as the clock times the
        voltage squared, which falls with the clock (textbook; unverified). What kernels draw is measured: prompts of
        2,048 and more tokens 0.95 to 1.0 of the TDP and decodes 0.43 on A100 (Splitwise, arXiv 2311.18677, its
        profiles), prefill attention 0.94 and decode attention 0.58 on B200 (medians, aiconfigurator-core 0.12.0).
        ValueError for a cap that isn't above the base and at most the TDP, or where no TDP is known.
        """
        if power_cap_w is None:
            return 1.0
        if self.tdp_w is None:
            raise ValueError(f"no TDP is known of {self.name}")
        base_w = BASE_POWER * self.tdp_w
        if not base_w < power_cap_w <= self.tdp_w:
            raise ValueError(f"{self.name} is capped above {base_w:g} W, up to its TDP of {self.tdp_w:g} W")
        return float(((power_cap_w - base_w) / (self.tdp_w - base_w)) ** (1 / 3))

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any]) -> Device:
        """A device from a catalogue file or a user's YAML.

        Four keys suffice (`name`, `peak_tflops: {bf16: 500}`, `memory_bytes: 64 GiB`, `memory_bytes_per_s: 2 TB/s`),
        a fifth (`link_bytes_per_s`) makes tensor parallelism right; the rest defaults to generic values.
        ScenarioError lists every key that is unknown, missing or out of range.
        """
        known = {f.name for f in fields(cls)} - {"peak_flop_per_s"} | {"peak_tflops"}
        reader = MappingReader(data, known, required=("name", "peak_tflops", "memory_bytes", "memory_bytes_per_s"))
        values: dict[str, Any] = {
            key: reader.quantity(key, minimum) for key, minimum in _QUANTITIES.items() if key in data
        }
        if "peak_tflops" in data:
            tflops = reader.numbers("peak_tflops", data["peak_tflops"], 0.0, 1e9, DTYPE_BYTES)
            values["peak_flop_per_s"] = {dtype: tera * 1e12 for dtype, tera in tflops.items()}
            if isinstance(data["peak_tflops"], Mapping) and "bf16" not in data["peak_tflops"]:
                reader.problem("peak_tflops.bf16", "is missing")
        if "efficiency" in data:
            values["efficiency"] = reader.numbers("efficiency", data["efficiency"], 0.0, 1.0, GENERIC_EFFICIENCY)
        launch = data.get("kernel_launch_ns", {})
        if not isinstance(launch, Mapping):
            launch = dict.fromkeys(GENERIC_LAUNCH_NS, launch)
        values["kernel_launch_ns"] = reader.numbers("kernel_launch_ns", launch, -1.0, 1e9, GENERIC_LAUNCH_NS)
        values["name"], values["vendor"] = (str(data.get(key, "")) for key in ("name", "vendor"))
        values["aliases"] = tuple(str(alias) for alias in data.get("aliases") or ())
        values["switched"] = bool(data.get("switched", False))
        values["sources"] = {str(k): str(v) for k, v in (data.get("sources") or {}).items()}
        reader.finish()
        return cls(**values)


@dataclass(frozen=True, slots=True)
class Platform:
    """The devices of one client, and what it costs them to talk.

    `pp` pipeline stages of `attn_dp` attention groups of `tp` ranks; the attention groups hold copies of the attention
    and take their own sequences. `ep`: ways in which a stage's tp x attn_dp ranks split the experts of a layer by
    expert (1: each expert is split like a dense layer). Ranks are numbered tp first and fill one node after the other.
    Every collective runs at the efficiency that was measured for all-reduces.
    """

    device: Device
    tp: int = 1
    pp: int = 1
    ep: int = 1
    attn_dp: int = 1

    @property
    def num_stage_devices(self) -> int:
        """Devices of one pipeline stage; routed experts are spread over all of them."""
        return self.tp * self.attn_dp

    @property
    def num_devices(self) -> int:
        return self.num_stage_devices * self.pp

    def problem(self) -> str | None:
        """Why the devices can't be arranged like this, or None: a group must fill whole domains or fit into one."""
        domain, name = self.device.scale_up_domain, self.device.name
        for degree, ranks in (("tp", self.tp), ("tp x attn_dp", self.num_stage_devices)):
            if ranks > domain and ranks % domain:
                return f"{degree} = {ranks} doesn't fill whole groups of the {domain} devices that {name} links"
        return None

    def all_reduce_ns(self, message_bytes: Size) -> Size:
        """Time of an all-reduce of `message_bytes` (the full tensor) over the `tp` ranks, ns; 0 for one rank.

        A ring takes 2(N-1)·l + 2(N-1)/N·M/B (Patarasuk and Yuan, JPDC 2009). Where all pairs are joined directly the
        better of one shot (every rank reads all others: l + (N-1)·M/B) and two shots (reduce-scatter, all-gather:
        2·l + 2(N-1)/N·M/B). B is the link's peak times the efficiency measured for N ranks; a launch comes on top.
        Over several domains: two shots within each, and between them a ring of each device's share.
        """
        n, device = self.tp, self.device
        if n == 1:
            return 0.0 * message_bytes
        local = min(n, device.scale_up_domain)
        hop = device.link_latency_ns
        wire = message_bytes * 1e9 / (device.link_bytes_per_s * device.efficiency_of("allreduce", local))
        two_shots = 2 * (local - 1) / local * wire + 2 * hop * (1 if device.switched else local - 1)
        if n > local:
            between = self._between_ns(n // local, message_bytes / local)
            return device.launch_ns("allreduce", local) + two_shots + 2 * between
        best: Size = np.minimum(two_shots, (n - 1) * wire + hop) if device.switched else two_shots
        return device.launch_ns("allreduce", n) + best

    def all_gather_ns(self, message_bytes: Size, ranks: int) -> Size:
        """Time of an all-gather or a reduce-scatter of `message_bytes` (the full tensor) over `ranks`, ns.

        (N-1)·l + (N-1)/N·M/B, l once where all pairs are joined directly; over several domains each gathers what its
        devices brought in from the others.
        """
        if ranks == 1:
            return 0.0 * message_bytes
        device, local = self.device, min(ranks, self.device.scale_up_domain)
        wire = message_bytes * 1e9 / (device.link_bytes_per_s * device.efficiency_of("allreduce", local))
        within = (local - 1) / local * wire + device.link_latency_ns * (1 if device.switched else local - 1)
        total: Size = device.launch_ns("allreduce", local) + (within if local > 1 else 0.0 * message_bytes)
        return total + self._between_ns(ranks // local, message_bytes / local) if ranks > local else total

    def all_to_all_ns(self, sent_bytes: Size, ranks: int) -> Size:
        """Time of an all-to-all in which each of `ranks` sends `sent_bytes`, spread evenly over all ranks, ns.

        (N-1)·l + (N-1)/N·M/B, l once where all pairs are joined directly. Traffic within and between domains overlaps:
        the slower counts.
        """
        if ranks == 1:
            return 0.0 * sent_bytes
        device, local = self.device, min(ranks, self.device.scale_up_domain)
        efficiency = device.efficiency_of("allreduce", local)
        hops = 1 if device.switched else local - 1
        within = (local - 1) / ranks * sent_bytes * 1e9 / (device.link_bytes_per_s * efficiency)
        slower: Size = within + hops * device.link_latency_ns if local > 1 else 0.0 * sent_bytes
        if ranks > local:
            far = (ranks - local) / ranks * sent_bytes * 1e9 / (device.inter_node_bytes_per_s * efficiency)
            slower = np.maximum(slower, far + (ranks // local - 1) * device.inter_node_latency_ns)
        return device.launch_ns("allreduce", local) + slower

    def crosses_domains(self, boundary: int) -> bool:
        """Whether messages from stage `boundary` (0 is the first) to the next leave a scale-up domain."""
        size, domain = self.num_stage_devices, self.device.scale_up_domain
        first, last = boundary * size, (boundary + 1) * size - 1
        return any(rank // domain != (rank + size) // domain for rank in (first, last))

    def message_ns(self, message_bytes: Size, *, crosses_domains: bool) -> Size:
        """Time of a message between two devices, ns: l + M/B of the link that joins them."""
        device = self.device
        latency, peak = device.link_latency_ns, device.link_bytes_per_s
        if crosses_domains:
            latency, peak = device.inter_node_latency_ns, device.inter_node_bytes_per_s
        return latency + message_bytes * 1e9 / (peak * device.efficiency_of("allreduce", 2))

    def _between_ns(self, domains: int, share_bytes: Size) -> Size:
        """Ring of `domains` that each device joins with its share, one way round: (N-1)·l + (N-1)/N·M/B."""
        device = self.device
        wire = share_bytes * 1e9 / (device.inter_node_bytes_per_s * device.efficiency_of("allreduce"))
        return (domains - 1) * device.inter_node_latency_ns + (domains - 1) / domains * wire


class MappingReader:
    """Reads a flat mapping of a user's, collecting all problems until `finish` raises them at once."""

    def __init__(self, data: Mapping[str, Any], known: set[str], required: tuple[str, ...] = ()) -> None:
        self.data = data
        self.title = str(data.get("name", "unnamed"))
        self.problems: list[Problem] = []
        for key in data:
            if key not in known:
                self.problem(str(key), "is not a known key", nearest(str(key), known))
        for key in required:
            if data.get(key) in (None, ""):
                self.problem(key, "is missing")

    def problem(self, key: str, message: str, hint: str = "") -> None:
        self.problems.append(Problem(f"{self.title}: {key} {message}", hint=hint))

    def quantity(self, key: str, minimum: float = 0.0) -> float | int | None:
        """The value of `key`: a plain number, or text with the unit that the key's ending asks for.

        `_ns` takes "2 us", `_bytes` "80 GiB", `_bytes_per_s` "3350 GB/s"; whole numbers for the first two.
        """
        value = self.data[key]
        whole, parse = _parser(key)
        try:
            number = parse(value) if isinstance(value, str) and parse else float(value)
        except OverflowError:
            self.problem(key, f"can't be {str(value)[:40]}", "give a finite number")
            return None
        except (TypeError, ValueError) as error:
            self.problem(key, f"can't be {value!r}", str(error))
            return None
        if isinstance(value, bool) or not minimum <= number < float("inf"):
            self.problem(key, f"must be a number of at least {minimum:g}, not {value!r}")
            return None
        return round(number) if whole else number

    def numbers(
        self, key: str, values: Any, above: float, at_most: float, classes: Mapping[str, float] | None = None
    ) -> dict[str, float]:
        """A mapping of numbers in (`above`, `at_most`]; its keys are `classes`, perhaps with a variant, if given."""
        if not isinstance(values, Mapping):
            self.problem(key, f"must be a mapping, not {values!r}")
            return {}
        good = {}
        for name, value in values.items():
            if classes is not None and not _is_class(str(name), classes):
                self.problem(f"{key}.{name}", "is not known", nearest(str(name), classes))
            elif isinstance(value, bool) or not isinstance(value, int | float) or not above < value <= at_most:
                bounds = f"above {above:g} and at most {at_most:g}"
                self.problem(f"{key}.{name}", f"must be a number {bounds}, not {value!r}")
            else:
                good[str(name)] = float(value)
        return good

    def finish(self) -> None:
        if self.problems:
            raise ScenarioError(self.problems)


_QUANTITIES = {
    "memory_bytes": 1, "memory_bytes_per_s": 1, "link_bytes_per_s": 1, "link_latency_ns": 0, "scale_up_domain": 1,
    "inter_node_bytes_per_s": 1, "inter_node_latency_ns": 0, "host_link_bytes_per_s": 1, "host_link_latency_ns": 0,
    "tdp_w": 1, "idle_w": 0, "attention_ramp_tokens": 0, "num_cores": 0,
}  # fmt: skip


def _parser(key: str) -> tuple[bool, Callable[[str], float] | None]:
    if key.endswith("bytes_per_s"):
        return False, parse_bytes_per_s
    if key.endswith("_bytes"):
        return True, parse_bytes
    if key.endswith("_ns"):
        return True, parse_time_ns
    return "max_num" in key or key in ("scale_up_domain", "block_size", "num_cores"), None


def _is_class(name: str, classes: Mapping[str, float]) -> bool:
    if name in classes:
        return True
    stem, _, variant = name.rpartition("_")
    return stem in classes and (variant in DTYPE_BYTES or variant.isdigit())


def _most_specific(name: str, variant: str | int, measured: Mapping[str, float], generic: Mapping[str, float]) -> float:
    specific = f"{name}_{variant}"
    for table, key in ((measured, specific), (measured, name), (generic, specific)):
        if key in table:
            return table[key]
    return generic[name]
