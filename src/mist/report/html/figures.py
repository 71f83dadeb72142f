"""Figures as a reader wants them: times, sizes, rates, shares and counts with three digits and a unit.

Under everything that shows a number; `report.js` says the same of the values under a pointer. It computes nothing.
"""

from __future__ import annotations

from math import floor, log10

from mist.metrics.words import share

NOTHING = "-"
_TIMES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
_SI = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))

#: units that `shown` knows: seconds, fractions, bytes, bytes per second, requests per second, numbers
SECONDS, FRACTION, BYTES, BYTES_PER_S, PER_S, NUMBER = "s", "%", "B", "B/s", "1/s", ""


def shown(value: float | None, unit: str) -> str:
    """A value of one of the units above as text: "1.23 s", "45 %", "12.3 GB/s"."""
    if value is None:
        return NOTHING
    if unit == SECONDS:
        return seconds(value)
    if unit == FRACTION:
        return percent(value)
    if unit in (BYTES, BYTES_PER_S):
        return size(value) + unit[1:]
    return digits(value) + ("/s" if unit == PER_S else "")


def seconds(value: float | None) -> str:
    """ "1.23 s", "45.6 ms"; whole seconds from a thousand on."""
    if value is None:
        return NOTHING
    if not value:
        return "0 s"
    factor, unit = next((scale for scale in _TIMES if abs(value) >= 0.9995 * scale[0]), _TIMES[-1])
    return f"{digits(value / factor)} {unit}"


def slowdown(factor: float | None) -> str:
    """ "1.23 x": a request's time over that of it alone."""
    return NOTHING if factor is None else f"{digits(factor)} x"


def size(num_bytes: float | None) -> str:
    """ "1.23 GB", in powers of ten."""
    if num_bytes is None:
        return NOTHING
    factor, prefix = next((scale for scale in _SI if num_bytes >= 0.9995 * scale[0]), (1.0, ""))
    return f"{digits(num_bytes / factor)} {prefix}B"


def percent(fraction: float | None) -> str:
    """Says 0 % and 100 % of nothing but exactly these."""
    return NOTHING if fraction is None else share(fraction).replace("%", " %")


def digits(value: float | None) -> str:
    """Three digits, and all of a whole number before the point; no zeros at the end of a fraction."""
    if value is None:
        return NOTHING
    if not value:
        return "0"
    decimals = max(0, 2 - floor(log10(abs(value)) + 1e-9))
    if decimals > 9:
        return f"{value:.2e}"
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
