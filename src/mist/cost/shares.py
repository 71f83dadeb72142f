"""Whose the cost or the energy of a run is: shared out by what it was busy for, its idle part in proportion.

Between the usage of a run and its bill; both kinds of sums, by tenant and by stage, are of the same parts. It knows no
price and no power.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

#: amounts by (tenant, stage)
Parts = dict[tuple[str, str], float]


def shared_out(
    usage: Mapping[str, Any], amounts: Iterable[tuple[Sequence[str], float]], by: Literal["busy_s", "energy_j"]
) -> Parts | None:
    """Each of `amounts`, (pools that it served, amount), in proportion to what these pools were busy `by`.

    What served no pool that was busy goes to all in proportion. The parts add up to the amounts, to rounding; None
    where nobody was busy.
    """
    rows = [share for share in usage["shares"] if share[by] > 0]
    if not rows:
        return None
    parts: Parts = dict.fromkeys(((row["tenant"], row["stage"]) for row in rows), 0.0)
    for pools, amount in amounts:
        mine = [row for row in rows if row["pool"] in pools] or rows
        total = sum(row[by] for row in mine)
        for row in mine:
            parts[row["tenant"], row["stage"]] += amount * (row[by] / total)
    return parts


def sums(parts: Parts | None, at: Literal[0, 1]) -> dict[str, float]:
    """The parts added up by tenant (0) or stage (1); tenants without a name, hence the only one, aren't listed."""
    found: dict[str, float] = {}
    for key, part in (parts or {}).items():
        if key[at]:
            found[key[at]] = found.get(key[at], 0.0) + part
    return found


def over(amount: float | None, whole: float | None) -> float | None:
    """`amount` / `whole`, None where either is unknown or there is no whole."""
    return None if amount is None or not whole else amount / whole


def counted(rates: Mapping[str, float | None], span_s: float) -> tuple[float, float, float]:
    """Output tokens, all tokens and requests of a span, of their rates."""
    per_s = [rates[f"{what}_per_s"] or 0.0 for what in ("output_tokens", "total_tokens", "requests")]
    return per_s[0] * span_s, per_s[1] * span_s, per_s[2] * span_s
