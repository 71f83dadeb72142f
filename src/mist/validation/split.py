"""Which measured points constants are fitted to, and which only check them: one rule, by the operating point's name.

Between the points and whoever fits or judges. A point goes to one part with all its rows, whatever file it comes from
and whatever else is in it. It never looks at a measured value.
"""

from __future__ import annotations

import zlib

from mist.validation.points import Point


def is_checking(point: Point) -> bool:
    """Whether `point` is of the checking part (two of five), which fits of shipped constants leave out."""
    return is_checking_name(point.name)


def is_checking_name(name: str) -> bool:
    """The same of a point's name, as comparisons carry it."""
    return zlib.crc32(name.encode()) % 5 < 2
