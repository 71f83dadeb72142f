"""Which engine profile stands for the engine and version of a measured point.

Between points and their settings; a file of points names releases, the catalogue has a profile per era. It changes
nothing in a profile.
"""

from __future__ import annotations

import re
from typing import Any

from mist.scenario import catalogue
from mist.validation.points import Point, Skip

#: engines that are another one inside
ENGINE_ALIASES = {"nim": "trtllm", "llmboost": "vllm", "optimum-habana": "gaudi", "": "static"}


def engine_profile(point: Point) -> dict[str, Any]:
    """The catalogue's profile for the point's engine, version and date, as its mapping; Skip where there is none.

    Of the engine's profiles the newest that isn't newer than the version, without a version than the date, and without
    both the newest; an engine that is another one inside has versions of its own, so that its date counts. A harness of
    static batches has a profile of its own where there is one, and stands for no server.
    """
    engine = ENGINE_ALIASES.get(point["engine"], point["engine"])
    if engine == "unknown":
        engine = "gaudi" if point["device"].startswith("gaudi") else "static"
    found = [dict(e.source.data()) for e in catalogue.entries("engines")]
    known = [p for p in found if p.get("engine") == engine]
    if not known:
        raise Skip(f"there is no profile of the engine {point['engine']!r}")
    harness = "static_batch" if point["load"] == "static_batch" else ""
    mine = [p for p in known if p.get("harness", "") == harness]
    if not mine and not harness:
        raise Skip(f"there is no profile of a server of the engine {point['engine']!r}")
    mine = mine or known
    version, date = own_version(point), point["date"]
    if version:
        mine.sort(key=lambda p: version_of(str(p.get("first_version", ""))))
        not_newer = [p for p in mine if version_of(str(p.get("first_version", ""))) <= version]
    else:
        mine.sort(key=lambda p: str(p.get("first_date", "")))
        not_newer = [p for p in mine if not date or str(p.get("first_date", "")) <= date]
    return (not_newer or mine[:1])[-1]


def own_version(point: Point) -> tuple[int, ...]:
    """The version of the engine itself; () where none is stated, or only that of what is around it."""
    return () if point["engine"] in ENGINE_ALIASES else version_of(point["engine_version"])


def version_of(text: str) -> tuple[int, ...]:
    """The numbers of a release such as 0.6.3.post2 or v1.2.0rc5; () for a commit or nothing."""
    if match := re.match(r"v?(\d+)\.(\d+)(?:\.(\d+))?", text):
        return tuple(int(part) for part in match.groups() if part)
    return ()
