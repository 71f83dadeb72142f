"""Derives the roofline's efficiencies and launch times per operator class and device from measured operator tables.

    MIST_DATA=... python studies/roofline_efficiency.py

Reads the tables of the PyPI package aiconfigurator-core where it is installed (GEMM, attention, all-reduce on H100,
H200, A100, L40S) and the profiles of Vidur and InferSim in the folders of MIST_DATA; prints the figures that the device
catalogue quotes, then how far the roofline with that catalogue is from measured steps. It never writes a file.
"""

from __future__ import annotations

import csv
import gzip
import importlib.util
import io
import os
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from mist.engine import EngineProfile
from mist.hardware import Device, Platform
from mist.model import ModelSpec
from mist.perf import Deployment
from mist.perf.roofline import Roofline
from mist.request import Step

Table = dict[str, npt.NDArray[Any]]
OPERATOR_PACKAGE = "aiconfigurator_core"
SYSTEMS = {"h100-sxm": "h100_sxm", "h200-sxm": "h200_sxm", "a100-sxm-80gb": "a100_sxm", "l40s": "l40s"}

#: Device time of a step in bf16 on H100 SXM, ms: prefill of 512 / 2,048 / 8,192 tokens, decode of 1 / 32 / 128
#: sequences of 2,048 tokens.
H100_STEPS: dict[tuple[str, int], tuple[tuple[float, ...], tuple[float, ...]]] = {
    ("llama-3.1-70b", 4): ((37.0, 130.0, 577.0), (15.0, 18.4, 26.1)),
    ("llama-3.1-8b", 1): ((12.0, 43.5, 200.0), (6.2, 9.6, 18.1)),
}


def main() -> None:
    catalogue = {name: device(name) for name in SYSTEMS}
    print("Fractions of data-sheet peak, and launch times (us)\n")
    root = _operator_tables()
    if root is None:
        print(f"  {OPERATOR_PACKAGE} isn't installed: no GEMM, attention and all-reduce figures")
    else:
        for name, system in SYSTEMS.items():
            _report(name, _gemm(root / system, catalogue[name]))
            _report(name, _prefill_attention(root / system, catalogue[name]))
            _report(name, _decode_attention(root / system, catalogue[name]))
            _report(name, _all_reduce(root / system, catalogue[name]))
    for name in ("h100-sxm", "a100-sxm-80gb"):
        _report(name, _elementwise(name, catalogue[name]))
    for name in ("h20", "h800-sxm"):
        _report(name, _infersim(name, device(name)))
    _check_h100_steps()
    _check_splitwise()
    _check_vllm_records()
    _engine_overheads()
    _check_mi300x()


def _gemm(system: Path, dev: Device) -> dict[str, float]:
    """Large matrices only; compute-bound rows for `gemm`, at most 64 rows of over 64 M weights for `gemm_memory`."""
    table = _parquet(system / "gemm" / "vllm", "gemm_perf.parquet")
    found = {}
    for dtype, width, suffix in (("bfloat16", 2, ""), ("fp8", 1, "_fp8")):
        if dev.compute_dtype("fp8") != "fp8" and suffix:
            continue
        t = _where(table, table["gemm_dtype"] == dtype)
        m, n, k, seconds = (t[c].astype(float) for c in ("m", "n", "k", "latency"))
        seconds = seconds * 1e-3
        compute = 2 * m * n * k / dev.peak(suffix[1:] or "bf16")
        memory = (width * k * (m + n) + 2 * m * n) / dev.memory_bytes_per_s
        launch = float(np.median(seconds[np.maximum(compute, memory) < 0.5e-6]))
        usual = (np.minimum(n, k) >= 1024) & (np.maximum(n, k) <= 32768)
        large = usual & (m >= 512) & (compute > 50e-6) & (compute > 1.5 * memory)
        thin = usual & (m <= 64) & (n * k >= 64e6)
        found[f"gemm{suffix}"] = _median(compute[large] / (seconds[large] - launch))
        found[f"gemm_memory{suffix}"] = _median(memory[thin] / (seconds[thin] - launch))
        found[f"launch gemm{suffix}"] = launch * 1e6
    return found


def _prefill_attention(system: Path, dev: Device) -> dict[str, float]:
    """Fits time = launch + FLOP/(eta·peak)·(1 + ramp/(c/2)) to medians per prompt length c, heads of 128."""
    table = _parquet(system / "attention" / "vllm", "context_attention_perf.parquet")
    found = {}
    for kv_dtype, suffix in (("bfloat16", ""), ("fp8", "_fp8")):
        t = _full_attention(table, kv_dtype)
        if not len(t["isl"]):
            continue
        batch, length, heads, seconds = (t[c].astype(float) for c in ("batch_size", "isl", "num_heads", "latency"))
        seconds = seconds * 1e-3
        ideal = 2 * batch * length**2 * heads * 128 / dev.peak("bf16")
        launch = float(np.median(seconds[ideal < 0.5e-6]))
        lengths = np.array([512, 1024, 2048, 4096, 8192, 16384])
        large = [(length == c) & (ideal > 50e-6) for c in lengths]
        slowdown = np.array([np.median((seconds[i] - launch) / ideal[i]) for i in large])
        slope, base = np.polyfit(2 / lengths, slowdown, 1)
        found[f"attention_prefill{suffix}"] = 1 / base
        found[f"ramp tokens{suffix}"] = slope / base
        found[f"launch attention_prefill{suffix}"] = launch * 1e6
    return found


def _decode_attention(system: Path, dev: Device) -> dict[str, float]:
    """KV caches over 200 MB (none fits an L2), four to eight query heads a KV head, at most 256 sequences."""
    table = _parquet(system / "attention" / "vllm", "generation_attention_perf.parquet")
    found = {}
    for kv_dtype, width, suffix in (("bfloat16", 2, ""), ("fp8", 1, "_fp8")):
        t = _full_attention(table, kv_dtype)
        if not len(t["step"]):
            continue
        batch, context, heads, seconds = (t[c].astype(float) for c in ("batch_size", "step", "num_heads", "latency"))
        kv_heads = np.where(t["num_key_value_heads"] == 0, heads, t["num_key_value_heads"])
        seconds = seconds * 1e-3
        kv_bytes = 2 * batch * (context + 1) * kv_heads * 128 * width
        ideal = kv_bytes / dev.memory_bytes_per_s
        grouped = (heads / kv_heads >= 4) & (heads / kv_heads <= 8) & (batch <= 256)
        launch = float(np.median(seconds[(ideal < 0.3e-6) & (batch <= 16)]))
        large = grouped & (kv_bytes > 200e6)
        found[f"attention_decode{suffix}"] = _median(ideal[large] / (seconds[large] - launch))
        found[f"launch attention_decode{suffix}"] = launch * 1e6
    return found


def _all_reduce(system: Path, dev: Device) -> dict[str, float]:
    """vLLM's all-reduce in a CUDA graph: bus bandwidth of 16 to 128 MB, and the time of the smallest message."""
    t = _parquet(system / "comm" / "vllm", "custom_allreduce_perf.parquet")
    t = _where(t, t["backend"] == "vllm_graph")
    found = {}
    for ranks in (2, 4, 8):
        mine = _where(t, t["num_gpus"] == ranks)
        message = 2.0 * mine["message_size"]  # the table counts 16-bit elements
        seconds = mine["latency"] * 1e-3
        smallest = seconds[message.argmin()]
        bulk = (message >= 16e6) & (message <= 140e6)
        wire = 2 * (ranks - 1) / ranks * message[bulk] / dev.link_bytes_per_s
        found[f"allreduce_{ranks}"] = _median(wire / (seconds[bulk] - smallest))
        found[f"launch + hops, {ranks} ranks"] = smallest * 1e6
    return found


def _elementwise(name: str, dev: Device) -> dict[str, float]:
    """Norms, residual sums, rotary embedding and activation of Vidur's tables against the bytes that MIST counts."""
    short = name.split("-")[0]
    ratios, launches = [], []
    for path in _data_files("profiles/vidur", f"*compute__{short}__*lama*mlp.csv.gz"):
        for row in _csv_rows(path):
            tokens, ranks = int(row["num_tokens"]), int(row["num_tensor_parallel_workers"])
            parts = {op: float(row[f"time_stats.{op}.median"] or "nan") * 1e-3 for op in _VIDUR_ELEMENTWISE}
            if ranks == 1 and tokens >= 2048:
                hidden, ffn = int(row["n_embd"]), int(row["n_expanded_embd"])
                head = hidden // int(row["n_head"])
                rotary = 2 * 2 * head * (int(row["n_head"]) + int(row["n_kv_head"]))
                ideal = tokens * (2 * 4 * 2 * hidden + rotary + 3 * 2 * ffn) / dev.memory_bytes_per_s
                ratios.append(ideal / (sum(parts.values()) + parts["add"]))
            elif tokens <= 16:
                launches += [t for op, t in parts.items() if op in ("add", "mlp_act", "attn_rope")]
    if not ratios:
        return {}
    return {"elementwise": _median(np.array(ratios)), "launch elementwise": _median(np.array(launches)) * 1e6}


_VIDUR_ELEMENTWISE = ("input_layernorm", "post_attention_layernorm", "add", "attn_rope", "mlp_act")


def _infersim(name: str, dev: Device) -> dict[str, float]:
    """InferSim's FP8 GEMMs and bf16 attention on H20 and H800."""
    short = name.split("-")[0]
    found: dict[str, float] = {}
    for path in _data_files(f"profiles/infersim/gemm/{short}", "data.csv"):
        t = np.array([[float(r[c]) for c in ("m", "n", "k", "latency_us")] for r in _csv_rows(path)]).T
        m, n, k, seconds = t[0], t[1], t[2], t[3] * 1e-6
        compute = 2 * m * n * k / dev.peak("fp8")
        memory = (k * (m + n) + 2 * m * n) / dev.memory_bytes_per_s
        large, thin = (compute > 50e-6) & (compute > 1.5 * memory) & (m >= 512), (m <= 64) & (n * k > 64e6)
        found["gemm_fp8"] = _median(compute[large] / seconds[large])
        found["gemm_memory_fp8"] = _median(memory[thin] / seconds[thin])
    prefill, decode = [], []
    for path in _data_files(f"profiles/infersim/mha/prefill/{short}", "*-128.csv"):
        heads = int(path.stem.split("-")[0])
        rows = [r for r in _csv_rows(path) if r["dtype"] == "bf16" and int(r["seq_len"]) >= 4096]
        prefill += [
            2 * int(r["seq_len"]) ** 2 * heads * 128 / dev.peak("bf16") / float(r["latency_us"]) * 1e6 for r in rows
        ]
    for path in _data_files(f"profiles/infersim/mha/decode/{short}", "*-128.csv"):
        kv_heads = int(path.stem.split("-")[1])
        rows = [r for r in _csv_rows(path) if r.get("kv_dtype", r.get("dtype")) == "bf16"]
        kv = [4.0 * int(r["batch_size"]) * int(r["kv_len"]) * kv_heads * 128 for r in rows]
        times = [float(r["latency_us"]) * 1e-6 for r in rows]
        decode += [b / dev.memory_bytes_per_s / t for b, t in zip(kv, times, strict=True) if b > 200e6]
    if prefill:
        found["attention_prefill, 4,096 tokens and more"] = _median(np.array(prefill))
    if decode:
        found["attention_decode"] = _median(np.array(decode))
    return found


def _check_h100_steps() -> None:
    print("\nRoofline against measured device time of H100 SXM, bf16 (ms)")
    for (name, tp), (prefills, decodes) in H100_STEPS.items():
        roofline = prepared(name, "h100-sxm", tp)
        for tokens, measured in zip((512, 2048, 8192), prefills, strict=True):
            _compare(f"{name} tp{tp} prefill {tokens}", roofline.step_time(prefill_step(tokens)), measured)
        for batch, measured in zip((1, 32, 128), decodes, strict=True):
            _compare(f"{name} tp{tp} decode {batch} x 2048", roofline.step_time(decode_step(batch, 2048)), measured)


def _check_splitwise() -> None:
    """Engine steps of 2023, without CUDA graphs: what they exceed the device time by is the host's."""
    paths = _data_files("profiles/splitwise_sim", "*.csv")
    print("\nRoofline against engine steps, Llama-2-70B fp16 tp8, Splitwise's table (ms; host time included)")
    for path in paths:
        rows = _csv_rows(path)
        for hardware, name in (("h100-80gb", "h100-sxm"), ("a100-80gb", "a100-sxm-80gb")):
            mine = [r for r in rows if r["hardware"] == hardware and r["model"] == "llama2-70b"]
            roofline = prepared("llama-2-70b", name, 8)
            for tokens in (512, 1024, 2048, 4096, 8192):
                times = [float(r["prompt_time"]) for r in mine if _is(r, prompt_size=tokens, batch_size=1)]
                _compare(f"{name} prefill {tokens}", roofline.step_time(prefill_step(tokens)), _median(np.array(times)))
            for batch in (1, 16, 32):
                times = [float(r["token_time"]) for r in mine if _is(r, prompt_size=512, batch_size=batch)]
                _compare(
                    f"{name} decode {batch} x 512",
                    roofline.step_time(decode_step(batch, 576)),
                    _median(np.array(times)),
                )


def _check_vllm_records() -> None:
    """Decode steps of vLLM: what the engine adds to the device time, and its real number of KV blocks."""
    paths = _data_files("profiles/blis", "enriched_steps.parquet")
    if not paths:
        return
    t = _where(*_sorted_steps(_parquet(paths[0].parent, paths[0].name)))
    roofline = prepared("codellama-34b", "h100-sxm", 2)
    context = t["kv.usage_gpu_ratio"] * t["kv.blocks_total_gpu"] * 16
    decodes = t["batch.num_decode_reqs"].astype(int)
    steps = zip(decodes.tolist(), context.astype(int).tolist(), strict=True)
    ours = np.array([roofline.step_time(decode_step(n, 0, context)) for n, context in steps]) / 1e6
    excess = t["ms"] - ours
    per_row, base = np.polyfit(decodes, excess, 1)
    print(f"\nvLLM step records, CodeLlama-34B bf16 tp2 H100: {len(ours)} decode steps; measured - roofline = "
          f"{base:.2f} ms + {per_row * 1e3:.1f} us per sequence (median {np.median(excess):.2f} ms, "
          f"{np.median(excess / t['ms']):.1%} of a step)")  # fmt: skip
    engine = EngineProfile.from_mapping(catalogue_entry("engines", "vllm-0.10"))
    capacity = engine.kv_blocks(model("codellama-34b"), Platform(device("h100-sxm"), tp=2), "bf16", "bf16", 8192, 1024)
    real = int(t["kv.blocks_total_gpu"][0])
    print(f"KV blocks: {capacity.num_blocks} by the rule, {real} in the engine ({capacity.num_blocks / real - 1:+.1%})")


def _engine_overheads() -> None:
    """What vLLM adds to a decode step: measured mean TPOT less the roofline's step at the mean batch and context.

    Steady runs at one rate with no queue; the mean batch is by Little's law rate x output tokens x TPOT.
    """
    found: dict[str, list[tuple[float, float, float]]] = {}
    for path in _data_files("validation", "points.csv"):
        points: dict[str, dict[str, str]] = {}
        for row in _csv_rows(path):
            points.setdefault(row["point"], row)[row["metric"]] = row["value"]
        for row in points.values():
            name = _MODELS_OF_POINTS.get(row["model"])
            steady = row["source"] in _STEADY_SOURCES and row["rate_per_s"] and row["dp"] in ("", "1")
            if not (name and steady and "tpot_mean_ms" in row and row["device"] == "h100-sxm"):
                continue
            tpot, output = float(row["tpot_mean_ms"]), float(row["osl"])
            batch = max(1, round(float(row["rate_per_s"]) * output * tpot * 1e-3))
            context = round(float(row["isl"]) + output / 2)
            ours = prepared(name, "h100-sxm", int(row["tp"])).step_time(decode_step(batch, context)) / 1e6
            front_end = float(row["ttft_mean_ms"]) - 2.5 * tpot
            found.setdefault(f"{row['source']} {row['engine_version']}", []).append((batch, tpot - ours, front_end))
    print("\nMeasured TPOT less the roofline's decode step, 16-bit models on H100")
    for version, rows in found.items():
        batch, excess, front_end = np.array(rows).T
        slope = np.polyfit(batch, excess, 1)[0] * 1e3 if np.ptp(batch) > 20 else float("nan")
        low, middle, high = np.percentile(excess, [10, 50, 90])
        print(f"  {version:26s} {len(rows):3d} runs, 10/50/90 % {low:.2f} / {middle:.2f} / {high:.2f} ms; "
              f"{slope:.1f} us per sequence; TTFT - 2.5 TPOT {np.median(front_end):.1f} ms")  # fmt: skip


_STEADY_SOURCES = ("apex_plus", "blis_training_vllm", "blis_sim2real_vllm")
_MODELS_OF_POINTS = {
    "meta-llama/Llama-3.1-70B-Instruct": "llama-3.1-70b", "meta-llama/Llama-3.1-8B-Instruct": "llama-3.1-8b",
    "meta-llama/Llama-2-7b-hf": "llama-2-7b", "codellama/CodeLlama-34b-Instruct-hf": "codellama-34b",
}  # fmt: skip


def _check_mi300x() -> None:
    """AMD's static batches of Llama-3.1-70B in FP8 on eight MI300X: what vLLM 0.6.6 adds to each of 2,048 steps."""
    rows = [r for path in _data_files("validation", "points.csv") for r in _csv_rows(path)]
    rows = [r for r in rows if r["source"] == "amd_vllm_docker" and r["batch_size"] in ("1", "32", "128")]
    if rows:
        print("\nMI300X tp8 FP8, static batches of 2,048 output tokens (s), and the excess per step (ms)")
    roofline = Roofline()
    platform = Platform(device("mi300x"), tp=8)
    roofline.prepare(Deployment(model("llama-3.1-70b"), platform, "fp8", "bf16", 131072, 256))
    for row in rows:
        batch, prompt, output = int(row["batch_size"]), int(row["isl"]), int(row["osl"])
        together = min(batch, 131072 // prompt)
        chunks = Step(chunks=[(prompt, 0)] * together, num_prefill_tokens=together * prompt, num_sampled=together)
        ns = roofline.step_time(chunks) * batch / together
        ns += sum(roofline.step_time(decode_step(batch, prompt + t)) for t in range(1, output))
        excess = (float(row["value"]) * 1e3 - ns / 1e6) / output
        print(f"  {batch:3d} x {prompt:4d}: {ns / 1e9:5.1f} roofline, {row['value']:.5s} measured; {excess:.2f} ms")


def _sorted_steps(t: Table) -> tuple[Table, npt.NDArray[Any]]:
    """Step times between neighbouring records (at most 3 steps apart), and which of them are decode-only."""
    order = np.argsort(t["step.id"])
    t = {name: column[order] for name, column in t.items()}
    apart = np.diff(t["step.id"])
    ms = np.diff(t["step.ts_start_ns"]) / apart / 1e6
    tokens = t["batch.prefill_tokens"]
    usable = (apart <= 3) & (tokens[:-1] == 0) & (tokens[1:] == 0) & (ms < 100)
    return {**{name: column[:-1] for name, column in t.items()}, "ms": ms}, usable & (
        t["batch.num_decode_reqs"][:-1] > 0
    )


def prepared(model_name: str, device_name: str, tp: int) -> Roofline:
    """A roofline of a catalogue model in 16 bits on a catalogue device."""
    roofline = Roofline()
    roofline.prepare(Deployment(model(model_name), Platform(device(device_name), tp), "bf16", "bf16", 8192, 256))
    return roofline


def prefill_step(tokens: int) -> Step:
    return Step(chunks=[(tokens, 0)], num_prefill_tokens=tokens, num_sampled=1)


def decode_step(batch: int, context: int, total_context: int = 0) -> Step:
    return Step(num_decodes=batch, decode_context=total_context or batch * context, num_sampled=batch)


def device(name: str) -> Device:
    return Device.from_mapping(catalogue_entry("devices", name))


def model(name: str) -> ModelSpec:
    entry = catalogue_entry("models", name)
    return ModelSpec.from_hf_config(entry["id"], entry["config"])


def catalogue_entry(kind: str, name: str) -> dict[str, Any]:
    """A catalogue file of the installed package as a mapping."""
    text = resources.files("mist").joinpath("data", kind, f"{name}.yaml").read_text(encoding="utf-8")
    entry: dict[str, Any] = yaml.safe_load(text)
    return entry


def _operator_tables() -> Path | None:
    spec = importlib.util.find_spec(OPERATOR_PACKAGE)
    return Path(spec.origin).parent / "systems" / "data" if spec and spec.origin else None


def _data_files(folder: str, pattern: str) -> list[Path]:
    roots = [Path(p) for p in os.environ.get("MIST_DATA", "").split(os.pathsep) if p]
    return sorted(path for root in roots for path in (root / folder).glob(pattern))


def _parquet(folder: Path, name: str) -> Table:
    """The table `name` of the newest version below `folder` (or in it)."""
    import pyarrow.parquet as pq

    versions = sorted(folder.glob(f"*/{name}"), key=lambda p: [int(x) for x in p.parent.name.split(".") if x.isdigit()])
    table = pq.read_table(versions[-1] if versions else folder / name)
    return {column: table[column].to_numpy(zero_copy_only=False) for column in table.column_names}


def _csv_rows(path: Path) -> list[dict[str, str]]:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return list(csv.DictReader(io.StringIO(data.decode())))


def _where(table: Table, chosen: npt.NDArray[Any]) -> Table:
    return {name: column[chosen] for name, column in table.items()}


def _full_attention(table: Table, kv_dtype: str) -> Table:
    no_window = table["window_size"] == 0 if "window_size" in table else np.True_
    return _where(table, (table["head_dim"] == 128) & (table["kv_cache_dtype"] == kv_dtype) & no_window)


def _is(row: dict[str, str], **sizes: int) -> bool:
    return all(int(row[name]) == size for name, size in sizes.items())


def _median(values: npt.NDArray[Any]) -> float:
    return float(np.nanmedian(values)) if len(values) else float("nan")


def _report(name: str, figures: dict[str, float]) -> None:
    for line in _lines(figures):
        print(f"  {name:14s} {line}")


def _lines(figures: dict[str, float]) -> Iterator[str]:
    for key, value in figures.items():
        yield f"{key:44s} {value:8.2f}"


def _compare(what: str, ns: int, measured_ms: float) -> None:
    print(f"  {what:34s} {ns / 1e6:8.1f} {measured_ms:8.1f} {ns / 1e6 / measured_ms - 1:+7.1%}")


if __name__ == "__main__":
    main()
