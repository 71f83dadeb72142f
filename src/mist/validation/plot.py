"""Measured against simulated values as a picture: a log-log scatter with its diagonal, in SVG.

For the documentation. A point on the diagonal is right, the shaded band is 10 % to either side. It draws what it is
given and leaves nothing out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

#: of Okabe and Ito, which the colour-blind can tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_SIZE, _LEFT, _TOP, _BELOW, _LEGEND = 360, 64, 34, 46, 130
_BAND = math.log10(1.1)

Pairs = Sequence[tuple[float, float]]


def scatter(title: str, series: Mapping[str, Pairs], unit: str) -> str:
    """An SVG document of (measured, simulated) pairs, all above 0; a colour for each of the series."""
    values = [math.log10(v) for pairs in series.values() for pair in pairs for v in pair]
    low, high = math.floor(min(values, default=0)), math.ceil(max(values, default=1))
    high = max(high, low + 1)

    def at(x: float, y: float) -> tuple[float, float]:
        """Where decimal logarithms are drawn."""
        scale = _SIZE / (high - low)
        return _LEFT + (x - low) * scale, _TOP + _SIZE - (y - low) * scale

    width, height = _LEFT + _SIZE + _LEGEND, _TOP + _SIZE + _BELOW
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{_LEFT}" y="20" font-size="14">{escape(title)}</text>',
        f'<clipPath id="c"><rect x="{_LEFT}" y="{_TOP}" width="{_SIZE}" height="{_SIZE}"/></clipPath>',
    ]
    corners = [(low, low - _BAND), (high, high - _BAND), (high, high + _BAND), (low, low + _BAND)]
    band = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*corner) for corner in corners))
    (x0, y0), (x1, y1) = at(low, low), at(high, high)
    parts.append(f'<polygon points="{band}" fill="#eeeeee" clip-path="url(#c)"/>')
    parts.append(f'<line x1="{x0}" y1="{y0}" x2="{x1}" y2="{y1}" stroke="#888888"/>')
    for decade in range(low, high + 1):
        (x, y), label = at(decade, decade), f"{10.0**decade:g}"
        parts.append(f'<path d="M{x:.1f} {y0}V{y1}M{x0} {y:.1f}H{x1}" stroke="#dddddd" fill="none"/>')
        parts.append(f'<text x="{x:.1f}" y="{y0 + 15}" text-anchor="middle">{label}</text>')
        parts.append(f'<text x="{x0 - 5}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    parts += _axes(unit)
    for i, (name, pairs) in enumerate(series.items()):
        colour, row = COLOURS[i % len(COLOURS)], _TOP + 14 * (i + 1)
        for measured, simulated in pairs:
            x, y = at(math.log10(measured), math.log10(simulated))
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}" fill-opacity="0.6"/>')
        parts.append(f'<circle cx="{x1 + 14}" cy="{row - 4}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{x1 + 24}" y="{row}">{escape(name)} ({len(pairs)})</text>')
    return "\n".join([*parts, "</svg>", ""])


def _axes(unit: str) -> list[str]:
    middle, bottom = _LEFT + _SIZE / 2, _TOP + _SIZE + 34
    up = _TOP + _SIZE / 2
    return [
        f'<text x="{middle}" y="{bottom}" text-anchor="middle">measured ({escape(unit)})</text>',
        f'<text x="14" y="{up}" text-anchor="middle" transform="rotate(-90 14 {up})">simulated ({escape(unit)})</text>',
    ]
