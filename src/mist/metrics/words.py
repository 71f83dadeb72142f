"""Figures in sentences: a number with its noun, for the notes and verdicts that a summary carries.

The last station of a figure that is told rather than tabulated. It never computes one, and never rounds a count.
"""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """ "1 request", "1,200 requests"; nouns whose plural is their singular and an s."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def share(fraction: float) -> str:
    """A fraction 0-1 as a percentage that says 0 % and 100 % of nothing but exactly these."""
    if 0 < fraction < 0.0005:
        return "<0.1%"
    if fraction < 0.0995:
        return f"{fraction:.1%}" if fraction else "0%"
    if fraction < 0.9895:
        return f"{fraction:.0%}"
    return f"{fraction:.1%}" if fraction < 0.9995 else ">99.9%" if fraction < 1 else f"{fraction:.0%}"
