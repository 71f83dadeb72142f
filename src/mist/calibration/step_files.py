"""Readers of profiled steps: any CSV, JSON-lines or Parquet file of steps, and two published formats by name.

The first step of calibration: a file to a `StepTable`. A reader knows its file's units and traps; it never averages
repeats or judges a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mist.calibration.step_table import FloatArray, IntArray, StepTable
from mist.errors import Problem, ScenarioError, nearest
from mist.scenario import catalogue
from mist.units import NS_PER_MS, NS_PER_S, NS_PER_US
from mist.workload.rows import Rows, read_rows

_TIMES = {"time_ns": 1, "time_us": NS_PER_US, "time_ms": NS_PER_MS, "time_s": NS_PER_S}
_COUNTS = ("num_decodes", "decode_context", "num_prefills", "prefill_tokens", "prefill_context", "prefill_attention")
_COLUMNS = (*_TIMES, *_COUNTS, "group")
_CSV_HINT = (
    "columns: num_decodes, decode_context (sum of attended contexts), num_prefills, prefill_tokens, "
    "prefill_context (sum of cached tokens), prefill_attention (sum of c*(s + c/2)), "
    "one of time_ns, time_us, time_ms, time_s, and perhaps group"
)

_SPLITWISE = ("model", "hardware", "tensor_parallel", "batch_size", "prompt_size", "token_size",
              "prompt_time", "token_time")  # fmt: skip
_BLIS = ("step.id", "step.ts_start_ns", "batch.num_prefill_reqs", "batch.num_decode_reqs", "batch.prefill_tokens",
         "kv.usage_gpu_ratio", "kv.blocks_total_gpu")  # fmt: skip
#: Names of splitwise-sim that the catalogue of devices has not.
_DEVICES = {"h100-80gb": "h100-sxm", "a100-80gb": "a100-sxm-80gb"}
#: Neighbouring records whose distance counts; further apart the batch may have changed between.
_MAX_STEPS_BETWEEN = 3
_VLLM_BLOCK_SIZE = 16


def read_steps(path: Path, file_format: str, only: Mapping[str, str | int]) -> StepTable:
    """The steps in `path`; `only`: model, device and tp as the file may name them, to choose among several.

    `file_format` is one of `FORMATS`, or "auto" for what the columns tell. ScenarioError says all that can't be read.
    """
    if not path.is_file():
        raise ScenarioError(Problem("there is no such file", str(path), hint="give a CSV or Parquet file of steps"))
    wanted = sorted({*_COLUMNS, *_SPLITWISE, *_BLIS, "model", "tp"})
    rows = read_rows(path, wanted)
    table = FORMATS[_detected(rows) if file_format == "auto" else file_format](rows, only)
    rows.problems.raise_any()
    if not len(table):
        rows.problems.fail("no step is left of this file", hint=_CSV_HINT)
    return table


def _detected(rows: Rows) -> str:
    if set(_SPLITWISE) <= set(rows.names):
        return "splitwise"
    return "blis" if set(_BLIS) <= set(rows.names) else "csv"


def _csv(rows: Rows, only: Mapping[str, str | int]) -> StepTable:
    """Any file with MIST's own names of columns; those left out are 0, but for what follows from others."""
    times = [name for name in _TIMES if name in rows.names]
    for name in rows.names:
        if name not in _COLUMNS:
            rows.problems.add(f"there is no column {name!r}", line=1, hint=nearest(name, _COLUMNS))
    if len(times) != 1:
        found = f"has {' and '.join(times)}" if times else "has no time"
        rows.problems.add(f"the file {found}", line=1, hint=_CSV_HINT)
        rows.problems.raise_any()
    rows.problems.raise_any()
    given = {name: _numbers(rows, name) for name in _COUNTS if name in rows.names}
    ns = _numbers(rows, times[0], above=True) * _TIMES[times[0]]
    zeros = np.zeros(len(ns))
    tokens = given.get("prefill_tokens", zeros)
    chunks = given.get("num_prefills", (tokens > 0).astype(np.float64))
    context = given.get("prefill_context", zeros)
    equal = tokens * (context + tokens / 2) / np.maximum(chunks, 1)
    decodes = given.get("num_decodes", zeros)
    group = _labels(rows.columns["group"]) if "group" in rows.names else None
    table = StepTable(
        decodes, given.get("decode_context", zeros), chunks, tokens, context,
        given.get("prefill_attention", equal), ns, group,
    )  # fmt: skip
    _check_work(rows, table)
    return table


def _check_work(rows: Rows, table: StepTable) -> None:
    """Steps without work, and sums that can't be."""
    for bad, name, message, hint in (
        ((table.num_decodes == 0) & (table.chunk_tokens == 0), "", "a step without any work", "leave idle steps out"),
        (table.decode_context < table.num_decodes, "decode_context", "fewer tokens of context than decodes",
         "a decode attends to its own new token too: give the sum over sequences"),
        (table.chunk_tokens < table.num_chunks, "prefill_tokens", "fewer tokens than prefills", "give the sum"),
        ((table.num_chunks == 0) & (table.chunk_tokens > 0), "num_prefills", "tokens of no prefill", "count it"),
    ):  # fmt: skip
        for row in np.flatnonzero(bad).tolist():
            if name in rows.names:
                rows.complain(row, name, message, hint)
            else:
                rows.problems.add(message, line=rows.lines[row], hint=hint)


def _splitwise(rows: Rows, only: Mapping[str, str | int]) -> StepTable:
    """The table of splitwise-sim: a run of a batch of equal prompts a row, times of its prefill and mean decode, ms.

    Decode steps attend to the prompt and on average half of the output. `e2e_time` stops early in many rows and isn't
    read; rows that repeat an earlier one to the last digit (the common point of several sweeps) count once.
    """
    _require(rows, _SPLITWISE)
    facts, chosen = _chosen(rows, only)
    values = [rows.columns["model"], rows.columns["hardware"]]
    numbers = np.stack([_numbers(rows, name, above=True) for name in _SPLITWISE[2:]], axis=1)
    rows.problems.raise_any()
    first: dict[tuple[Any, ...], int] = {}
    for i in chosen:
        first.setdefault((*(column[i] for column in values), *numbers[i].tolist()), i)
    kept = list(first.values())
    _, batch, prompt, output, prompt_ms, token_ms = numbers[kept].T
    none = np.zeros(len(kept))
    group = np.unique(np.stack([batch, prompt], axis=1), axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)
    tokens = batch * prompt
    return StepTable(
        num_decodes=np.concatenate([none, batch]),
        decode_context=np.concatenate([none, batch * (prompt + output / 2)]),
        num_chunks=np.concatenate([batch, none]),
        chunk_tokens=np.concatenate([tokens, none]),
        chunk_context=np.concatenate([none, none]),
        chunk_attention=np.concatenate([tokens * prompt / 2, none]),
        time_ns=np.concatenate([prompt_ms, token_ms]) * NS_PER_MS,
        group=np.concatenate([group, group]),
        facts=facts,
        notes=(f"{len(kept)} distinct runs of {len(chosen)} rows; decode times are means over each run's steps",),
    )


def _chosen(rows: Rows, only: Mapping[str, str | int]) -> tuple[dict[str, str | int], list[int]]:
    """The one (model, device, tp) of the file that `only` leaves, in the catalogue's names, and its rows."""
    models = [_canonical("models", str(name)) for name in rows.columns["model"]]
    devices = [_canonical("devices", _DEVICES.get(str(name), str(name))) for name in rows.columns["hardware"]]
    every = list(zip(models, devices, map(str, rows.columns["tensor_parallel"]), strict=True))
    wanted = [str(only.get(key, "")) for key in ("model", "device", "tp")]
    left = sorted({key for key in every if all(w in ("", k) for w, k in zip(wanted, key, strict=True))})
    if len(left) != 1:
        what = "; ".join(f"--model {m} --device {d} --tp {t}" for m, d, t in left or sorted(set(every)))
        rows.problems.fail(f"{len(left) or 'none'} of its deployments match", hint=f"choose one: {what}")
    model, device, tp = left[0]
    return {"model": model, "device": device, "tp": int(tp)}, [i for i, key in enumerate(every) if key == left[0]]


def _blis(rows: Rows, only: Mapping[str, str | int]) -> StepTable:
    """vLLM's step records with sampled ids: a step lasts from its start to the next record's, over the ids between.

    A record counts where the next step was recorded too; decodes alone also where the next record, up to 3 steps on,
    has as many decodes and nothing else. Contexts are known in total only, by the KV blocks in use: every sequence of
    a step gets an equal share. Steps that did no work are left out.
    """
    _require(rows, _BLIS)
    ids, starts, prefills, decodes, tokens, usage, blocks = (_numbers(rows, name) for name in _BLIS)
    rows.problems.raise_any()
    if len(ids) < 2 or (np.diff(ids) <= 0).any():
        rows.problems.fail("step.id doesn't rise from row to row", hint="sort the records of one run by step.id")
    between, ns = np.diff(ids), np.diff(starts) / np.diff(ids)
    alone = (prefills[:-1] == 0) & (prefills[1:] == 0) & (decodes[1:] == decodes[:-1])
    kept = (between == 1) | (alone & (between <= _MAX_STEPS_BETWEEN))
    kept &= decodes[:-1] + tokens[:-1] > 0
    n, k, c, used = (x[:-1][kept] for x in (decodes, prefills, tokens, usage * blocks * _VLLM_BLOCK_SIZE))
    per_sequence = used / (n + k)
    cached = np.maximum(per_sequence * k - c, 0.0)
    facts = {key: rows.columns[key][0] for key in ("model", "tp") if key in rows.names}
    return StepTable(
        num_decodes=n, decode_context=np.maximum(per_sequence * n, n), num_chunks=k, chunk_tokens=c,
        chunk_context=cached, chunk_attention=c * (cached + c / 2) / np.maximum(k, 1), time_ns=ns[kept],
        facts={"model": str(facts.get("model", "")), "tp": int(facts.get("tp", 1))},
        notes=(f"{int(kept.sum())} of {len(ids)} records have a neighbour that tells their time; contexts are equal "
               "shares of the KV blocks in use",),
    )  # fmt: skip


FORMATS: dict[str, Callable[[Rows, Mapping[str, str | int]], StepTable]] = {
    "csv": _csv, "splitwise": _splitwise, "blis": _blis,
}  # fmt: skip


def _require(rows: Rows, names: Sequence[str]) -> None:
    for name in names:
        if name not in rows.names:
            rows.problems.add(f"the column {name!r} is missing", line=1, hint=nearest(name, rows.names))
    rows.problems.raise_any()


def _numbers(rows: Rows, name: str, *, above: bool = False) -> FloatArray:
    """A column as numbers of at least (or `above`) 0; what isn't one is told at its place."""
    values = rows.columns[name]
    try:
        found = np.array(values, dtype=np.float64)
    except (TypeError, ValueError):
        found = np.array([_number(value) for value in values], dtype=np.float64)
    with np.errstate(invalid="ignore"):
        bad = ~np.isfinite(found) | (found <= 0 if above else found < 0)
    for row in np.flatnonzero(bad).tolist():
        hint = f"give a number {'above' if above else 'of at least'} 0"
        rows.complain(row, name, f"{name} can't be {str(values[row])[:40]!r}", hint)
    return found


def _canonical(kind: str, name: str) -> str:
    """The catalogue's own name of what is called `name`; `name` itself where it has none."""
    try:
        return str(catalogue.read(kind, name, Path())[1])
    except ScenarioError:
        return name


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")


def _labels(values: Iterable[Any]) -> IntArray:
    found: IntArray = (
        np.unique(np.array([str(value) for value in values]), return_inverse=True)[1].reshape(-1).astype(np.int64)
    )
    return found
