"""What a run says in the words of the measurements: each metric of the points' schema, from a run's records.

Between a run and its comparison. Only requests that finished count, those of a warm-up left out of latencies, but not
of the gaps between tokens (ITL), which a run keeps as a whole; a metric that a run can't answer is a `Skip`. It never
compares.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from mist.scenario.result import Result
from mist.validation.points import Point, Skip
from mist.validation.setting import Setting

FloatArray = npt.NDArray[np.float64]

#: metrics that need no answer
_OF_PROMPTS = ("ttft_", "batch_prefill_ms", "prefill_tokens_per_s", "kv_transfer_")


class Outcome:
    """One run, asked by metric name."""

    def __init__(self, point: Point, setting: Setting, result: Result) -> None:
        rows = result.requests
        done = rows["status"] == "finished"
        if not done.any():
            reasons = [str(reason) for reason in np.unique(rows["reason"][~done].astype(str))]
            raise Skip(f"no request finished: {'; '.join(reasons)}")
        self._point, self._result = point, result
        self._settled = done & (np.arange(len(done)) >= setting.warmup_requests)
        if setting.warmup_requests and not self._settled.any():
            self._settled = done
        self._rows, self._done = rows, done
        self._num_devices = setting.num_devices
        start = rows["arrival_s"][self._settled].min() if setting.warmup_requests else rows["arrival_s"].min()
        self._span_s = float(np.nanmax(rows["end_s"]) - start)

    def value(self, metric: str) -> float:
        """The metric in the unit of its name; Skip where there is none such, or this run has none."""
        if self._point.number("osl") == 0 and not metric.startswith(_OF_PROMPTS):
            raise Skip("osl is 0")
        if match := re.fullmatch(r"(ttft|tpot|itl|e2e)_(mean|p\d{1,2})_ms", metric):
            found = self._latency_s(match[1], match[2]) * 1e3
        elif metric in _METRICS:
            found = _METRICS[metric](self)
        else:
            raise Skip(f"there is no metric {metric!r}")
        if not 0 < found < float("inf"):
            raise Skip(f"the run has no {metric}")
        return found

    def _latency_s(self, name: str, statistic: str) -> float:
        if name == "itl":
            found = self._result.metrics["itl_s"].get(statistic)
            return float(found) if found is not None else float("nan")
        if name == "tpot" and self._point["load"] == "static_batch":
            return self._step_s()
        values: FloatArray = self._rows[f"{name}_s"][self._settled]
        values = values[np.isfinite(values)]
        if not len(values):
            return float("nan")
        return float(values.mean() if statistic == "mean" else np.percentile(values, float(statistic[1:])))

    def _tokens(self, *columns: str) -> float:
        return float(sum(self._rows[column][self._settled].sum() for column in columns))

    def _makespan_s(self) -> float:
        return self._span_s

    def _output_rate(self) -> float:
        return self._tokens("output_tokens") / self._span_s

    def _total_rate(self) -> float:
        # a prompt of which the row says nothing (an empty context) is no work that was counted
        columns = ("input_tokens", "output_tokens") if self._point["isl"] != "0" else ("output_tokens",)
        return self._tokens(*columns) / self._span_s

    def _request_rate(self) -> float:
        return float(self._settled.sum()) / self._span_s

    def _prefill_s(self) -> float:
        return float(np.nanmax(self._rows["ttft_s"][self._done]))

    def _step_s(self) -> float:
        steps = (self._point.number("osl") or 0) - 1
        return (self._span_s - self._prefill_s()) / steps if steps > 0 else float("nan")

    def _prefill_rate(self) -> float:
        return self._tokens("input_tokens") / self._prefill_s()

    def _decode_rate(self) -> float:
        return float(self._done.sum()) / self._step_s()

    def _transfer_s(self) -> float:
        found = self._result.metrics.get("kv_transfer")
        return float(found["time_s"]["mean"]) if found else float("nan")

    def _transfer_rate(self) -> float:
        found = self._result.metrics.get("kv_transfer")
        return float(found["mean_bytes"]) / 1e9 / self._transfer_s() if found else float("nan")


_METRICS: dict[str, Callable[[Outcome], float]] = {
    "output_tokens_per_s": Outcome._output_rate,
    "output_tokens_per_s_per_device": lambda o: o._output_rate() / o._num_devices,
    "total_tokens_per_s": Outcome._total_rate,
    "total_or_output_tokens_per_s": Outcome._output_rate,
    "requests_per_s": Outcome._request_rate,
    "makespan_s": Outcome._makespan_s,
    "batch_e2e_s": Outcome._makespan_s,
    "batch_prefill_ms": lambda o: o._prefill_s() * 1e3,
    "prefill_tokens_per_s_per_device": lambda o: o._prefill_rate() / o._num_devices,
    "decode_tokens_per_s_per_device": lambda o: o._decode_rate() / o._num_devices,
    "kv_transfer_ms": lambda o: o._transfer_s() * 1e3,
    "kv_transfer_gb_per_s": Outcome._transfer_rate,
}
