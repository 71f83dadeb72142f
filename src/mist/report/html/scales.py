"""Axes: where a value stands between the ends of a chart, and which round values are marked on the way.

Between figures and charts. `report.js` marks a zoomed time axis by the same rule. It draws nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor, log10

import numpy as np

from mist.metrics.distribution import FloatColumn
from mist.report.html.figures import digits, shown


@dataclass(frozen=True, slots=True)
class Scale:
    """An axis from `low` to `high` > `low`, in one of the units of `figures`; `log`: equal ratios are equally long."""

    low: float
    high: float
    unit: str = ""
    log: bool = False

    @classmethod
    def over(cls, values: FloatColumn, unit: str = "", *, log: bool = False, least: float | None = None) -> Scale:
        """An axis that holds all `values`; from `least` on where that is given. Log axes hold those above 0."""
        values = values[np.isfinite(values) & ((values > 0) | (not log))]
        low, high = (float(values.min()), float(values.max())) if len(values) else (1.0, 2.0)
        low = low if least is None else least
        if log:
            return cls(low / 1.02, max(high, low * 1.01) * 1.02, unit, log)
        return cls(low, high if high > low else low + (abs(low) or 1.0), unit)

    def at(self, values: FloatColumn) -> FloatColumn:
        """Fractions of the way from `low` to `high`, at most 0 to 1."""
        low, high = (log10(self.low), log10(self.high)) if self.log else (self.low, self.high)
        values = np.log10(np.maximum(values, self.low)) if self.log else values
        placed: FloatColumn = np.clip((values - low) / (high - low), 0.0, 1.0)
        return placed

    def ticks(self, most: int = 6) -> list[tuple[float, str]]:
        """Round values, as (fraction of the way, text)."""
        values = self._log_ticks(most) if self.log else self._ticks(most)
        texts = [self._text(value) for value in values]
        return [(float(place), text) for place, text in zip(self.at(np.array(values)), texts, strict=True)]

    def _text(self, value: float) -> str:
        if self.unit == "%":
            return f"{digits(value * 100)} %"
        if self.unit == "s" and not self.log and self.high >= 1:  # one unit along the axis
            return f"{digits(value)} s"
        return shown(value, self.unit)

    def _ticks(self, most: int) -> list[float]:
        rough = (self.high - self.low) / most
        power = 10.0 ** floor(log10(rough))
        step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
        first, last = ceil(self.low / step - 1e-9), floor(self.high / step + 1e-9)
        return [round(i * step, 12) for i in range(first, last + 1)]

    def _log_ticks(self, most: int) -> list[float]:
        for factors in ((1, 2, 5), (1, 3), (1,)):
            powers = range(floor(log10(self.low)), ceil(log10(self.high)) + 1)
            found = [f * 10.0**p for p in powers for f in factors if self.low <= f * 10.0**p <= self.high]
            if len(found) <= most + 2:
                return found if len(found) > 2 else self._ticks(most)
        return found[:: ceil(len(found) / (most + 2))]
