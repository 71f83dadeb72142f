"""Figures in sentences: a number with its noun, for the notes and verdicts that a summary carries.

The last station of a figure that is told rather than tabulated. It never computes one, and never rounds a count.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


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


def load_verdict(deployment: Mapping[str, Any]) -> str:
    """Whether the load was too much in the runs of a deployment, as a comparison counts them."""
    verdicts = [
        f"{word} in {deployment[key]} of {deployment['num_runs']} runs" if deployment["num_runs"] > 1 else word
        for key, word in (("num_saturated", "saturated"), ("num_near_capacity", "near capacity"))
        if deployment[key]
    ]
    return ", ".join(verdicts) or "not saturated"


def slo_verdict(deployment: Mapping[str, Any]) -> str:
    """Whether all targets were met in the runs of a deployment, as a comparison counts them."""
    num_met, num_runs = deployment["num_slo_met"], deployment["num_runs"]
    if num_met is None:
        return "none"
    return f"met in {num_met} of {num_runs} runs" if num_met not in (0, num_runs) else "met" if num_met else "missed"
