"""Rewrites the serving measurements that the operator package ships (systems/silicon_sample.csv) as validation points.

    python studies/silicon_points.py --out FILE [--part fit|report|all] [--csv silicon_sample.csv]

Reads the file of the PyPI package aiconfigurator-core (or --csv), writes the columns that `mist validate` reads and
prints a summary; it never simulates, and what no column can say has `runnable` = false and a reason. Part `fit` is
Llama, Qwen3-32B and gpt-oss on H100 and H200; `report` is all the rest, to be scored once and not tuned on.

What the file states, what its numbers show, and what is assumed:

- Two origins. `inferencex`: exports of 2026-03-25, 2026-04-06 and db-dump, and *-gap-analysis.csv (rounded copies);
  `gap`: one file per device, engine, version and model. Exports overlap: equal (TTFT, TPOT) are one measurement.
- Closed loop of `silicon_concurrency` (stated). `batch_size` is that per attention data parallel rank; where it is
  smaller for no such reason, there were replicas whose number isn't stated.
- TTFT is a mean: of `gap`, ns x (20 x concurrency, at most 2,000; Qwen3-32B on vLLM 10 x) are whole numbers; of
  `inferencex`, s x 5 are binary fractions, one bit longer per doubled concurrency, as sums over 10 x concurrency clock
  readings are. Hence `num_requests`. TPOT of `gap` likewise; TPOT of `inferencex` is assumed to be the mean.
- Lengths' distribution isn't stated. Assumed: `gap` fixed; `inferencex` uniform from 0.8 of the named length up to it,
  the `--random-range-ratio 0.8` of its public harness.
- 2026-04-06 and db-dump give `tp_size` as tp x ep (64 devices for 8): ids and copies in 2026-03-25 show the rule.
- No precision: 16 bits, as TPOT is 1.3 to 1.6 x the time to read such weights. KV dtype: not stated; for Llama-70B of
  `inferencex` the number of 8k + 1k requests from which on they queue shows it: 45 to 50 on one H200, < 32 on two H100.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib.util
import itertools
import re
import statistics
from collections import Counter, defaultdict
from pathlib import Path

from mist.scenario import catalogue

Row = dict[str, str]
_COLUMNS = """point id source citation date trust engine engine_version model checkpoint weights_dtype kv_dtype device
power_cap_w num_devices tp pp ep dp attn_dp topology prefill_pool decode_pool num_nodes interconnect load arrival
rate_per_s stages concurrency batch_size num_requests isl isl_dist osl osl_dist workload_file prefix_cached_tokens
prefix_tier kv_offload spec_decode max_num_seqs max_num_batched_tokens chunked_prefill num_scheduler_steps
gpu_memory_utilization metric value runnable why_not note"""
COLUMNS = _COLUMNS.split()
#: what makes an operating point: the source and everything from the engine to its limits
CONFIGURATION = ["source", *COLUMNS[COLUMNS.index("engine") : COLUMNS.index("metric")]]
PACKAGE = "aiconfigurator_core"
CITATION = "PyPI aiconfigurator-core 0.12.0:systems/silicon_sample.csv"
#: checkpoints, and a name that isn't the one on Hugging Face, with the architecture that the catalogue knows
MODELS = {
    "nvidia/Llama-3.1-8B-Instruct-FP8": "meta-llama/Llama-3.1-8B-Instruct",
    "nvidia/DeepSeek-R1-NVFP4": "deepseek-ai/DeepSeek-R1",
    "nvidia/DeepSeek-V3.1-NVFP4": "deepseek-ai/DeepSeek-V3",
    "nvidia/Qwen3-32B-NVFP4": "Qwen/Qwen3-32B",
    "Qwen/Qwen3-235B-A22B-FP8": "Qwen/Qwen3-235B-A22B",
    "zhipuai/GLM-5": "zai-org/GLM-5",
}
LLAMA_70B_KV = {"h200-sxm": "fp8", "h100-sxm": "bf16"}
#: requests per unit of concurrency and their limit in those files of `gap` of which the values show it
NUM_REQUESTS = {
    "h100_sxm/trtllm/1.0.0rc3/": (20, 2000),
    "h100_sxm/sglang/0.5.1.post1/": (20, 2000),
    "h100_sxm/sglang/0.5.8.post1/": (20, 2000),
    "h100_sxm/vllm/0.12.0/Qwen_Qwen3-32B": (10, 10**9),
}
#: limit of a step's tokens where it isn't stated and the engine's default can't be: with 8,192 the prompts of 8 to 32
#: clients would run together and TTFT be half as long again; at 2,048 it is within 6 %
STEP_TOKENS = {"h100_sxm/vllm/0.12.0/Qwen_Qwen3-32B": "2048"}
#: why some runs can't be what their columns say
UNLIMITED = "the limit of running requests isn't stated: 512 clients, but TPOT of 4 to 64 running"
REUSED = "prompts were reused to an unstated extent: without prefix hits up to 1.0 of peak FLOP/s would be needed"
STREAMED = "first token came with the 20th: TTFT is 16 to 20 TPOT above that of the same prompts with 8,192 to generate"


def main() -> None:
    """Write the points of a part and print the summary."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", choices=("fit", "report", "all"), default="all")
    parser.add_argument("--csv", type=Path, help="silicon_sample.csv, where the package isn't installed")
    args = parser.parse_args()
    spec = importlib.util.find_spec(PACKAGE)
    if args.csv is None and (spec is None or spec.origin is None):
        parser.error(f"{PACKAGE} isn't installed: give --csv silicon_sample.csv")
    path = args.csv or Path(str(spec and spec.origin)).parent / "systems" / "silicon_sample.csv"
    runs = merged(list(csv.DictReader(path.read_text().splitlines())))
    rows = [row for run, copies in runs for row in points(run, copies) if args.part in ("all", part(row))]
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    summarise(rows)


def part(row: Row) -> str:
    """Where a row may be used."""
    is_hopper = row["device"] in ("h100-sxm", "h200-sxm")
    return "fit" if is_hopper and re.search("Llama|Qwen3-32B|gpt-oss", row["model"]) else "report"


def origin(run: Row) -> str:
    """The export that a run came from, or device/engine/version/model.csv of `gap`: only these have a slash."""
    name = run["silicon_data_source"].split(";")[0].removeprefix("source_file=")
    return "/".join(name.split("/")[-4:]) if "/data/" in name else name.split("/")[0]


def stated(run: Row, key: str) -> str:
    """A value of the free text `key=value; ...`, or nothing."""
    found = re.search(rf"\b{key}=([^;]*)", run["silicon_data_source"])
    return found[1] if found else ""


def merged(runs: list[Row]) -> list[tuple[Row, int]]:
    """Every measurement once, from the export that says most about it, and how many copies there are."""
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for run in runs:
        values = [f"{float(run[key]):.2f}" for key in ("silicon_ttft_ms", "silicon_tpot_ms")]
        same = (run["backend"], run["system"], run["isl"], run["osl"], stated(run, "silicon_concurrency"))
        groups[(*same, *values)].append(run)
    says = ("prefill_num_workers", "backend_version")
    return [(max(g, key=lambda r: (*(bool(r[k]) for k in says), len(r["silicon_ttft_ms"]))), len(g))
            for g in groups.values()]  # fmt: skip


def points(run: Row, copies: int) -> list[Row]:
    """The two rows of a run: mean TTFT and mean TPOT."""
    row = dict.fromkeys(COLUMNS, "") | system(run) | workload(run)
    row |= pools(run) if run["mode"] == "disagg" else degrees(run)
    why_not = row["why_not"] or obstacle(run, row)
    late = is_streamed_late(run)
    notes = [f"{copies} copies in the file"] if copies > 1 else []
    notes += ["marked as work in progress"] if stated(run, "wip") == "True" else []
    notes += ["streamed 20 tokens at a time, so TPOT is about 2 % low"] if late else []
    row["point"] = "p" + hashlib.sha256("|".join(row[key] for key in CONFIGURATION).encode()).hexdigest()[:10]
    rows = []
    for metric in ("ttft", "tpot"):
        reason = why_not or (STREAMED if late and metric == "ttft" else "")
        key = hashlib.sha256(f"{run['id']} {metric}".encode()).hexdigest()[:8]
        rows.append(row | {"id": f"{row['source']}-{key}", "metric": f"{metric}_mean_ms", "why_not": reason,
                           "value": run[f"silicon_{metric}_ms"], "runnable": "false" if reason else "true",
                           "note": "; ".join(notes)})  # fmt: skip
    return rows


def system(run: Row) -> Row:
    """Source, engine, model, dtypes and device."""
    given = "deepseek-ai/DeepSeek-R1" if run["id"].startswith("dsr1_") else run["model_path"]
    model, device = MODELS.get(given, given), run["system"].replace("_", "-")
    source = "gap" if "/" in origin(run) else "inferencex"
    return {
        "source": f"silicon_{source}_{run['backend']}",
        "citation": f"{CITATION}#{run['id']}",
        "date": stated(run, "measured")[:10],
        "trust": "B",
        "engine": run["backend"],
        "engine_version": run["backend_version"],
        "model": model,
        "checkpoint": given if model != given and "GLM" not in model else "",
        "weights_dtype": "mxfp4" if "gpt-oss" in model else run["precision"] or "bf16",
        "kv_dtype": LLAMA_70B_KV.get(device, "") if source == "inferencex" and "70B" in model else "",
        "device": device,
    }


def workload(run: Row) -> Row:
    """The closed loop and its lengths."""
    clients = stated(run, "silicon_concurrency")
    row = {"load": "closed_loop", "concurrency": clients}
    shown = (n for name, n in NUM_REQUESTS.items() if origin(run).startswith(name))
    each, limit = next(shown, (0, 0)) if "/" in origin(run) else (10, 10**9)
    row["max_num_batched_tokens"] = next((n for name, n in STEP_TOKENS.items() if origin(run).startswith(name)), "")
    row["num_requests"] = str(min(each * int(clients), limit)) if clients and each else ""
    for key in ("isl", "osl"):
        high = int(run[key])
        low = high if "/" in origin(run) else int(0.8 * high)
        row |= {key: f"{(low + high) / 2:g}", f"{key}_dist": f"uniform:{low}:{high}" if low < high else "fixed"}
    return row


def degrees(run: Row) -> Row:
    """Parallel degrees of one engine; a data parallel attention rank has one device wherever there are several."""
    keys = ("tp_size", "moe_tp_size", "moe_ep_size", "attention_dp_size")
    tp, moe_tp, ep, attn_dp = (max(int(run[key] or 1), 1) for key in keys)
    devices, why_not, slots = tp * attn_dp, "", int(run["batch_size"])
    if origin(run) in ("2026-04-06.csv", "db-dump"):
        devices = moe_tp if moe_tp > 1 else tp
        ep, attn_dp = min(ep, devices), devices if attn_dp > 1 else 1
    elif "/" in origin(run) and int(stated(run, "silicon_concurrency") or 0) > slots * attn_dp:
        why_not = "several replicas, as concurrency exceeds batch_size; how many isn't stated"
    elif moe_tp > devices:
        why_not = f"tensor parallel degrees {tp} and (experts) {moe_tp} contradict each other"
    return {"topology": "aggregated", "num_devices": str(devices), "tp": str(devices // attn_dp), "pp": run["pp_size"],
            "dp": "1", "attn_dp": str(attn_dp), "ep": str(ep) if ep > 1 else "", "why_not": why_not}  # fmt: skip


def pools(run: Row) -> Row:
    """Prefill and decode workers; the columns for both pools are filled only where the two agree."""
    row = {"topology": "pd", "pp": "1"}
    if not run["prefill_num_workers"]:
        return row | {"why_not": "numbers of prefill and decode workers aren't stated"}
    layouts, total = [], 0
    for pool in ("prefill", "decode"):
        keys = ("num_workers", "tp_size", "pp_size", "attention_dp_size", "moe_ep_size")
        workers, tp, pp, attn_dp, ep = (max(int(run[f"{pool}_{key}"] or 1), 1) for key in keys)
        row[f"{pool}_pool"] = f"{workers}xTP{tp * pp * attn_dp}"
        total += workers * tp * pp * attn_dp
        layouts.append({"attn_dp": str(attn_dp), "ep": str(ep) if ep > 1 else ""})
    row["num_devices"] = str(total)
    return row | (layouts[0] if layouts[0] == layouts[1] else {"why_not": f"no columns for unlike pools: {layouts}"})


def obstacle(run: Row, row: Row) -> str:
    """Why a run with known degrees still can't be simulated, if so."""
    names = {name.lower() for entry in catalogue.entries("models") for name in (entry.name, *entry.aliases)}
    if not row["concurrency"]:
        return "concurrency isn't stated"
    if row["model"].lower() not in names:
        return f"{row['model']} isn't in the catalogue of models"
    if (row["device"], row["engine"], row["model"], row["concurrency"]) == (
        "h100-sxm", "vllm", "openai/gpt-oss-120b", "512",
    ):  # fmt: skip
        return UNLIMITED
    return REUSED if origin(run) == "h200_sxm/vllm/0.12.0/nvidia_Llama-3.1-8B-Instruct-FP8.csv" else ""


def is_streamed_late(run: Row) -> bool:
    """Whether TTFT holds the time of 20 tokens: on H200 with TensorRT-LLM, 1,024 to generate and tp up to 4."""
    shape = (run["system"], run["backend"], run["isl"], run["osl"])
    is_shape = shape == ("h200_sxm", "trtllm", "1024", "1024") and "70B" in run["model_path"]
    return is_shape and int(run["tp_size"]) < 8


def summarise(rows: list[Row]) -> None:
    """Print counts, the spread of repeats, and runs in which TPOT falls as concurrency grows."""
    runnable = [row for row in rows if row["runnable"] == "true"]
    for name, some in (("all", rows), ("runnable", runnable)):
        print(f"{name}: {len(some)} rows, {len({row['point'] for row in some})} points")
    for reason, n in Counter(row["why_not"].split(": [")[0] for row in rows if row["why_not"]).most_common():
        print(f"  not runnable {n:5d}  {reason}")
    for keys in ("model device engine engine_version topology", "concurrency", "isl osl"):
        counts = Counter(tuple(row[key] for key in keys.split()) for row in runnable)
        print(f"runnable rows by {keys}")
        for values, n in sorted(counts.items(), key=lambda item: [(len(v), v) for v in item[0]]):
            print(f"  {n:5d}  {' '.join(value or '-' for value in values)}")
    for metric in ("ttft_mean_ms", "tpot_mean_ms"):
        repeats: dict[str, list[float]] = defaultdict(list)
        for row in runnable:
            if row["metric"] == metric:
                repeats[row["point"]].append(float(row["value"]))
        spread = [100 * (max(v) / min(v) - 1) for v in repeats.values() if len(v) > 1] or [0.0]
        n = sum(len(v) > 1 for v in repeats.values())
        print(f"{metric}: {n} points repeated, spread {statistics.median(spread):.1f} % (most {max(spread):.0f} %)")
    series: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in runnable:
        if row["metric"] == "tpot_mean_ms":
            same = (row[key] for key in CONFIGURATION if row[key] and key not in ("concurrency", "num_requests"))
            series[" ".join(same)].append((int(row["concurrency"]), float(row["value"])))
    for name, curve in series.items():
        for (low, before), (high, after) in itertools.pairwise(sorted(curve)):
            if low < high and after < 0.9 * before:
                print(f"TPOT falls from {before:.1f} ms at {low} to {after:.1f} at {high}: {name}")


if __name__ == "__main__":
    main()
