"""What a scenario can name, as rows of plain data: devices, models, engines, step profiles, policies and more.

Behind `mist list`, beside the schema: it reads the catalogues and the registry. It never prints.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mist import registry
from mist.cost import PURCHASES
from mist.scenario import catalogue
from mist.scenario.named import parameters
from mist.units import GB, GIB

#: the kinds of policies, in the order in which a scenario names them
POLICIES = ("trace", "arrivals", "lengths", "batching", "order", "routing", "admission", "perf", "eviction")

Row = dict[str, Any]


def rows(what: str) -> list[Row]:
    """One row per name of what `mist list` takes; all rows have the same keys."""
    if what == "policies":
        return [row for kind in POLICIES for row in _registered(kind)]
    if what in ("pipelines", "perf"):
        return _registered(what.removesuffix("s"))
    describe = _DESCRIBED[what]
    return [
        {
            "name": entry.name,
            **describe(catalogue.read(what, entry.name, Path())[0]),
            "aliases": ", ".join(entry.aliases),
        }
        for entry in catalogue.entries(what)
    ]


def price_rows(name: str) -> list[Row]:
    """One row per device of a list of prices (a name, or a file): USD per device-hour, its date and source.

    ScenarioError where there is no such list.
    """
    prices = catalogue.read("prices", name, Path())[0]
    sources = {device.strip(): said for key, said in prices.sources.items() for device in key.split(",")}
    return [
        {"device": device, **asdict(price), "date": prices.date, "source": sources.get(device, "")}
        for device, price in sorted(prices.devices.items())
    ]


def _registered(kind: str) -> list[Row]:
    found = []
    for name in registry.names(kind):
        model = parameters(kind, name)
        doc = inspect.getdoc(registry.lookup(kind, name)) or ""
        defaults = {
            key: None if field.is_required() else field.get_default(call_default_factory=True)
            for key, field in model.model_fields.items()
        }
        fields = ", ".join(
            key if default is None else f"{key}={_written(default)}" for key, default in defaults.items()
        )
        found.append({"kind": kind, "name": name, "parameters": fields, "description": doc.partition("\n")[0]})
    return found


def _written(default: Any) -> str:
    """A default as a scenario would have it."""
    if isinstance(default, Mapping):
        return f"{{{', '.join(f'{key}: {_written(value)}' for key, value in default.items())}}}"
    return f"[{', '.join(map(_written, default))}]" if isinstance(default, tuple | list) else str(default)


def _device(device: Any) -> Row:
    peak = device.peak_flop_per_s
    return {
        "memory_gib": round(device.memory_bytes / GIB, 1),
        "memory_gb_per_s": round(device.memory_bytes_per_s / GB),
        "bf16_tflops": round(peak["bf16"] / 1e12),
        "fp8_tflops": round(peak["fp8"] / 1e12) if "fp8" in peak else None,
        "link_gb_per_s": round(device.link_bytes_per_s / GB),
    }


def _model(model: Any) -> Row:
    return {
        "parameters_billions": round(model.num_parameters / 1e9, 2),
        "num_layers": model.num_layers,
        "max_context": model.max_context,
        "kv_bytes_per_token_bf16": model.kv_bytes_per_token("bf16"),
    }


def _engine(engine: Any) -> Row:
    return {
        "engine": engine.engine,
        "era": engine.era,
        "batching": engine.batching,
        "max_num_seqs": engine.max_num_seqs,
        "max_num_batched_tokens": engine.max_num_batched_tokens,
        "step_overhead_us": round(engine.step_overhead_ns / 1e3, 1),
    }


def _steps(profile: Any) -> Row:
    return {
        "model": profile.model,
        "device": profile.device,
        "tp": profile.tp,
        "weights_dtype": profile.weights_dtype,
        "kinds": ", ".join(profile.regimes),
        "engine": profile.engine,
        "calibrated": profile.calibrated,
    }


def _memory(memory: Any) -> Row:
    return {
        "capacity_gb": round(memory.capacity_bytes / GB),
        "gb_per_s": round(memory.bytes_per_s / GB, 1),
        "latency_us": memory.latency_ns / 1e3,
        "link_gb_per_s": memory.link_bytes_per_s and round(memory.link_bytes_per_s / GB, 1),
        "link_latency_us": memory.link_latency_ns / 1e3,
        "shared_by": memory.shared_by,
    }


def _acceptance(measured: Any) -> Row:
    return {
        "model": measured.model,
        "method": measured.method,
        "accepted_lengths": ", ".join(f"{length:.2f}" for length in measured.accepted_lengths),
    }


def _prices(prices: Any) -> Row:
    return {
        "provider": prices.provider,
        "date": prices.date,
        **{purchase: sum(purchase in p.offers() for p in prices.devices.values()) for purchase in PURCHASES},
        "devices": ", ".join(sorted(prices.devices)),
    }


def _workload(table: Any) -> Row:
    return {
        "num_requests": table["num_requests"],
        "mean_input_tokens": table["input_tokens"]["mean"],
        "mean_output_tokens": table["output_tokens"]["mean"],
        "description": table["description"],
    }


def _network(preset: Any) -> Row:
    return {
        "devices_per_node": preset["devices_per_node"],
        "nodes_per_rack": preset["nodes_per_rack"],
        **{tier: ", ".join(map(str, preset[tier].values())) for tier in ("node", "rack", "pod")},
    }


_DESCRIBED: dict[str, Callable[[Any], Row]] = {
    "devices": _device, "models": _model, "engines": _engine, "steps": _steps, "workloads": _workload,
    "networks": _network, "memories": _memory, "acceptance": _acceptance,
    "prices": _prices,
}  # fmt: skip
