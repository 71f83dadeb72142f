"""What a point says of its load, as the workload of a scenario: arrivals, lengths, request lists, prefix hits.

The first half of making a point runnable, before its clients. What the columns leave empty is the schema's default, and
what they say is used or a `Skip`: nothing that is stated is left out in silence. It knows no engine and no device.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mist.validation.points import Point, Skip, parse_stages, read_text, request_list

#: requests of a steady state, where the point doesn't say how many were sent: rounds of the concurrency, and the least
STEADY_ROUNDS = 6
STEADY_REQUESTS = 400
#: coefficient of variation of lengths of which only the mean is known; saturated throughput hangs on it
MEAN_ONLY_CV = 0.5


@dataclass(slots=True)
class Draft:
    """What is known of a point before it becomes a scenario.

    `longest`: tokens of the longest request, its answer included; `trace_rate_per_s`: of a request list's own arrivals.
    """

    point: Point
    folder: Path
    profile: dict[str, Any]
    pool: dict[str, Any] = field(default_factory=dict)
    workload: dict[str, Any] = field(default_factory=dict)
    warmup_requests: int = 0
    longest: int = 0
    trace_rate_per_s: float | None = None


def add_load(draft: Draft) -> None:
    """Fill the draft's workload, and limits of its profile that a static batch lifts; Skip says what is wrong."""
    point = draft.point
    known = _LOADS.get(point["load"])
    if known is None:
        raise Skip(f"the load is {point['load']!r}")
    add, arrivals, what = known
    if point["arrival"] not in arrivals:
        raise Skip(f"{what} with arrivals {point['arrival']!r}")
    add(draft)


def _static_batch(draft: Draft) -> None:
    size = draft.point.positive("batch_size")
    if not size:
        raise Skip("batch_size is empty")
    if draft.point["workload_file"]:
        raise Skip("a static batch with a request list")
    draft.workload |= {"arrivals": "all_at_once", "num_requests": size}
    draft.profile["max_num_seqs"] = max(size, int(draft.profile.get("max_num_seqs", 256)))
    draft.profile["large_device_max_num_seqs"] = max(size, int(draft.profile.get("large_device_max_num_seqs", 0)))
    _lengths(draft)


def _offline(draft: Draft) -> None:
    draft.workload["arrivals"] = "all_at_once"
    _requests(draft, 1000)


def _closed_loop(draft: Draft) -> None:
    concurrency = draft.point.positive("concurrency")
    if not concurrency:
        raise Skip("concurrency is empty")
    draft.workload["concurrency"] = concurrency
    if not draft.point["num_requests"] and not draft.point["workload_file"]:
        draft.warmup_requests = concurrency
    _requests(draft, concurrency + max(STEADY_ROUNDS * concurrency, min(STEADY_REQUESTS, 20 * concurrency)))


def _open_loop(draft: Draft) -> None:
    point = draft.point
    process = point["arrival"] or "poisson"
    if point["stages"]:
        stages = parse_stages(point["stages"])
        draft.workload["arrivals"] = {"staged": {"stages": [list(s) for s in stages], "process": process}}
        sent = round(sum(rate * seconds for rate, seconds in stages))
    else:
        rate = point.number("rate_per_s")
        if not rate:
            raise Skip("rate_per_s is 0" if point["rate_per_s"] else "rate_per_s and stages are empty")
        draft.workload["arrivals"] = {process: {"rate_per_s": rate}}
        sent = STEADY_REQUESTS * 2
    _requests(draft, sent)


def _trace(draft: Draft) -> None:
    if not draft.point["workload_file"]:
        raise Skip("workload_file is empty")
    _from_file(draft)
    if draft.workload["columns"]["arrival"] is None:
        raise Skip(f"the request list {draft.point['workload_file']} lacks arrival times, and the load is its trace")


#: by load: what makes its workload, the arrivals that agree with it, and its name in a sentence
_LOADS: dict[str, tuple[Callable[[Draft], None], tuple[str, ...], str]] = {
    "static_batch": (_static_batch, ("", "all_at_once"), "a static batch"),
    "offline": (_offline, ("", "all_at_once"), "an offline load"),
    "closed_loop": (_closed_loop, ("", "all_at_once"), "a closed loop"),
    "open_loop": (_open_loop, ("", "poisson", "constant"), "an open loop"),
    "trace": (_trace, ("", "trace"), "a trace"),
}


# --- requests ---


def _requests(draft: Draft, if_not_stated: int) -> None:
    """Those of the request list, or as many as the point or else the caller says."""
    if draft.point["workload_file"]:
        _from_file(draft)
    else:
        draft.workload["num_requests"] = draft.point.positive("num_requests") or if_not_stated
        _lengths(draft)


def _from_file(draft: Draft) -> None:
    name, number = draft.point["workload_file"], draft.point.positive("num_requests")
    path = request_list(draft.folder, name)
    if path is None:
        raise Skip(f"there is no request list {name}")
    rows = _read(draft.folder / path)
    if number > len(rows):
        raise Skip(f"num_requests is {number}, and the request list {name} has {len(rows)}")
    draft.longest = max(inputs + outputs for _, inputs, outputs in rows)
    columns: dict[str, str | None] = {key: key for key in ("input_tokens", "output_tokens")}
    arrivals_s = sorted(arrival for arrival, _, _ in rows if arrival is not None)[: number or None]
    timed = all(arrival is not None for arrival, _, _ in rows)
    if timed and arrivals_s[-1] > arrivals_s[0]:
        draft.trace_rate_per_s = len(arrivals_s) / (arrivals_s[-1] - arrivals_s[0])
    columns |= {"arrival": "arrival_s", "time_unit": "s"} if timed else {"arrival": None}
    draft.workload |= {"trace": str(path), "columns": columns}
    if 0 < number < len(rows):
        draft.workload["limit"] = number
    _prefix_hits(draft)


def _read(path: Path) -> list[tuple[float | None, int, int]]:
    """(arrival in s or None, input tokens, output tokens) of each request of a list."""
    try:
        found = [
            (float(row["arrival_s"]) if row.get("arrival_s") else None, int(row["input_tokens"]),
             int(row["output_tokens"]))
            for row in csv.DictReader(io.StringIO(read_text(path)))
        ]  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise Skip(f"the request list {path.name} can't be used: {error}") from None
    if not found:
        raise Skip(f"the request list {path.name} is empty")
    return found


def _lengths(draft: Draft) -> None:
    for side, key in (("isl", "input_tokens"), ("osl", "output_tokens")):
        draft.workload[key] = _length(draft.point, side)
        draft.longest += _longest(draft.workload[key])
    _prefix_hits(draft)


def _prefix_hits(draft: Draft) -> None:
    cached, isl = draft.point.count("prefix_cached_tokens"), draft.point.number("isl")
    if isl is not None and cached > isl + 0.5:
        raise Skip(f"prefix_cached_tokens is {cached}, and a prompt has {isl:g} tokens")
    if cached:
        draft.workload["cached_tokens"] = cached


def _longest(length: Any) -> int:
    return (
        length if isinstance(length, int) else int(next(iter(length.values())).get("max") or length["uniform"]["high"])
    )


def _length(point: Point, side: str) -> Any:
    mean = point.number(side)
    if mean is None:
        raise Skip(f"{side} is empty")
    kind = point[f"{side}_dist"] or "fixed"
    if kind.startswith("uniform:"):
        try:
            low, high = (int(float(part)) for part in kind.split(":")[1:])
        except (ValueError, OverflowError):
            raise Skip(f"{side}_dist is {kind!r}") from None
        return {"uniform": {"low": low, "high": high}}
    # a prompt with a given cached part has but its few own tokens to vary
    if kind == "mean" and mean > 1 and not point["prefix_cached_tokens"].strip("0"):
        return {"lognormal": {"mean": mean, "cv": MEAN_ONLY_CV, "max": round(8 * mean)}}
    if kind in ("fixed", "mean", "file"):
        return max(1, round(mean))
    raise Skip(f"{side}_dist is {kind!r}")
