"""How far off the checked points are, by engine profile and device: the bands that every result of that kind carries.

Made from the comparisons of a validation, for `mist/data/bands.yaml`, which scenarios read. Only values that are
trusted, not saturated, and that nothing was fitted to, count. It never smooths: a band of one point says so.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

from mist.scenario.bands import KINDS
from mist.validation.evaluate import Comparison
from mist.validation.score import TRUSTED, kind_of, named, statistics
from mist.validation.split import is_checking_name

#: kinds of metrics that a result's band stands for; a makespan is a throughput turned over
_KIND_OF = {"makespan": "throughput", **{kind: kind for kind in KINDS}}


def bands(comparisons: Iterable[Comparison]) -> dict[str, dict[str, Any]]:
    """{engine profile: {device: {perf, points, models, kind: {n, median_ape, p90_ape}}}}, sorted; errors in percent.

    Of a pair whose points were priced by several performance models, the one of most of them counts.
    """
    groups: dict[tuple[str, str], list[Comparison]] = defaultdict(list)
    for c in comparisons:
        if c.trust in TRUSTED and not c.saturated and is_checking_name(c.point) and kind_of(c.metric) in _KIND_OF:
            groups[c.profile, named("devices", c.device)].append(c)
    found: dict[str, dict[str, Any]] = {}
    for (profile, device), group in sorted(groups.items()):
        found.setdefault(profile, {})[device] = _band(group)
    return found


def _band(group: list[Comparison]) -> dict[str, Any]:
    perf = Counter(c.perf for c in group).most_common(1)[0][0]
    counted = [c for c in group if c.perf == perf]
    by_kind: dict[str, list[float]] = defaultdict(list)
    for c in counted:
        by_kind[_KIND_OF[kind_of(c.metric)]].append(c.error)
    errors = {}
    for kind in KINDS:
        if kind in by_kind:
            figures = statistics(by_kind[kind])
            errors[kind] = {"n": figures["n"], **{k: round(figures[k], 1) for k in ("median_ape", "p90_ape")}}
    points = len({(c.source, c.point) for c in counted})
    return {"perf": perf, "points": points, "models": sorted({named("models", c.model) for c in counted}), **errors}
