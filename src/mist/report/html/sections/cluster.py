"""The cluster and what flowed through it: pools in the order of their stages, requests and bytes between them.

A section of a report. Arrows are counted off the segments of requests and the rows of transfers; nothing is estimated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mist.metrics.words import counted
from mist.records import NO_CLIENT, IntColumn
from mist.report.html.charts import colour
from mist.report.html.figures import percent, size
from mist.report.html.markup import Child, Markup, el, note, section, table
from mist.report.html.sections.headline import transfers_text
from mist.report.html.view import View

#: where requests come from, and where answers go, beside the pools' numbers; memories follow below
USERS, ANSWERS = "requests", "answers"
_BOX, _GAP, _TALL, _LOW, _APART = 152, 56, 96, 38, 26
_MOST_LINKS = 16
#: of a column that a way goes past: where it enters, where it leaves, at what height
Passage = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Flow:
    """What went from one end to another: hand-overs of requests, and bytes over the network."""

    sender: str
    receiver: str
    requests: int = 0
    bytes: int = 0


def cluster(view: View) -> Markup | None:
    if not len(view.tasks["request"]):
        return None
    found = flows(view)
    rows = [
        (f.sender, f.receiver, f"{f.requests:,}" if f.requests else "-", size(f.bytes) if f.bytes else "-")
        for f in found
    ]
    lead = (
        "Pools with their devices, and the ways of requests between them: the wider a way, the more requests; "
        "on dashed ones bytes were moved."
    )
    return section(
        "cluster", "Cluster and flows", lead,
        el("div", _drawing(view, found), class_="scroll drawing", tabindex=0, role="region",
           aria_label="Drawing of the cluster"),
        el("details", el("summary", counted(len(rows), "flow")),
           table(["from", "to", "hand-overs", "bytes"], rows, label="Flows"), open=len(rows) < 12),
        _moved(view), _lent(view), _clients(view), _memories(view), _links(view),
    )  # fmt: skip


def flows(view: View) -> list[Flow]:
    """Every way that requests or bytes took between pools and memories, in order of the pools.

    A request's segments one after the other are a way, from its arrival to its end; delays and stages that were
    cancelled are passed over. Stages side by side are counted in the order in which they ended.
    """
    tasks = view.tasks
    shown = tasks["client"] != NO_CLIENT
    request, pool = tasks["request"][shown], view.pool_of[tasks["client"][shown]]
    first = np.append(True, request[1:] != request[:-1])
    last = np.append(first[1:], True) if len(first) else first
    names = [USERS, *view.pools]
    before = np.where(first, 0, np.append(0, pool[:-1] + 1)) if len(pool) else pool
    ways = _sums(before, pool + 1, np.ones(len(pool), np.int64))
    found = {(names[a], names[b]): [n, 0] for (a, b), n in ways.items() if a != b}
    for number, n in zip(*np.unique(pool[last], return_counts=True), strict=True):
        found[names[int(number) + 1], ANSWERS] = [int(n), 0]
    moved = view.transfers
    ended = moved["end_ns"] >= 0
    ends = [
        np.where(moved[way] >= 0, view.pool_of[np.maximum(moved[way], 0)], moved[way])[ended]
        for way in ("sender", "receiver")
    ]
    for (a, b), total in _sums(ends[0], ends[1], moved["bytes"][ended]).items():
        pair = (_name(view, a), _name(view, b))
        found.setdefault(pair, [0, 0])[1] += total
    # a KV store and its memory have one name
    place = {name: i for i, name in reversed(list(enumerate([*names, ANSWERS, *view.records.memory_names])))}
    return [
        Flow(a, b, n, total)
        for (a, b), (n, total) in sorted(found.items(), key=lambda f: (place[f[0][0]], place[f[0][1]]))
    ]


def _sums(senders: IntColumn, receivers: IntColumn, amounts: IntColumn) -> dict[tuple[int, int], int]:
    pairs, place = np.unique(np.column_stack((senders, receivers)), axis=0, return_inverse=True)
    sums = np.zeros(len(pairs), np.int64)
    np.add.at(sums, place.ravel(), amounts)
    return {(int(a), int(b)): int(total) for (a, b), total in zip(pairs.tolist(), sums.tolist(), strict=True)}


def _name(view: View, end: int) -> str:
    return list(view.pools)[end] if end >= 0 else view.records.memory_names[-1 - end]


def _drawing(view: View, found: list[Flow]) -> Markup:
    boxes = _places(view, found)
    width = max(x for x, _ in boxes.values()) + _BOX + 8
    height = max(y for _, y in boxes.values()) + _TALL + 8
    most = max((flow.requests for flow in found), default=1) or 1
    arrows = [_arrow(flow, boxes, most) for flow in found if flow.sender != flow.receiver]
    drawn = [_box(view, name, *place) for name, place in boxes.items()]
    told = "; ".join(f"{f.sender} to {f.receiver}: {_amount(f)}" for f in found)
    return el("svg", arrows, drawn, viewBox=f"0 {-_APART} {width} {height + 2 * _APART}", width=width,
              height=height + 2 * _APART, role="img",
              style=f"--natural:{width}px", aria_label=f"The cluster. {told}.")  # fmt: skip


def _places(view: View, found: list[Flow]) -> dict[str, tuple[int, int]]:
    """Corners of the boxes: columns from left to right along the ways of requests, memories below the last row."""
    columns = _columns(view, found)
    order = sorted(set(columns.values()))
    by_column: list[list[str]] = [
        [USERS],
        *([p for p, c in columns.items() if c == column] for column in order),
        [ANSWERS],
    ]
    tallest = max(map(len, by_column))
    places = {}
    for c, names in enumerate(by_column):
        for r, name in enumerate(names):
            down = (tallest - len(names)) * (_TALL + _APART) // 2 + r * (_TALL + _APART)
            places[name] = (8 + c * (_BOX + _GAP), 8 + down)
    memories = [
        name for name in dict.fromkeys(end for f in found for end in (f.sender, f.receiver)) if name not in places
    ]
    for m, name in enumerate(memories):
        places[name] = (8 + (m + 1) * (_BOX + _GAP), 8 + tallest * (_TALL + _APART) + 10)
    return places


def _columns(view: View, found: list[Flow]) -> dict[str, int]:
    """A column for each pool, behind those that hand to it, but for ways back to one that is earlier on average."""
    tasks = view.tasks
    shown = tasks["client"] != NO_CLIENT
    request, pool = tasks["request"][shown], view.pool_of[tasks["client"][shown]]
    place = np.arange(len(request)) - np.searchsorted(request, request)
    total, num = (np.bincount(pool, weights, len(view.pools)) for weights in (place, None))
    mean = {name: float(total[i] / num[i]) if num[i] else 0.0 for i, name in enumerate(view.pools)}
    columns = dict.fromkeys(view.pools, 0)
    for name in sorted(mean, key=mean.__getitem__):
        before = [f.sender for f in found if f.receiver == name and f.requests and mean.get(f.sender, 9e9) < mean[name]]
        columns[name] = max((columns[sender] + 1 for sender in before), default=0)
    return columns


def _box(view: View, name: str, x: int, y: int) -> Markup:
    lines: list[Child]
    is_pool, tall = name in view.pools, _TALL
    if is_pool:
        pool, settings = view.summary["clients"][name], view.settings(name)
        replicas, busy = len(pool["replicas"]), pool["utilisation"]
        model = settings.get("model", "")
        model = model if isinstance(model, str) else model.get("name", "")
        lines = [
            _cut(_hardware(settings, replicas)),
            _cut(model.rpartition("/")[2] or _perf(settings)),
            f"busy {percent(busy)}",
        ]
    else:
        lines, busy = [] if name in (USERS, ANSWERS) else ["memory"], None
        tall = _LOW + 12 * len(lines)
        y += (_TALL - tall) // 2
    parts: list[Child] = [
        el("rect", x=x, y=y, width=_BOX, height=tall, rx=10, class_="box" if is_pool else "box end"),
        el("text", _cut(name, 17), x=x + 12, y=y + 24, class_="name"),
        [el("text", line, x=x + 12, y=y + 41 + 15 * i, class_="small") for i, line in enumerate(lines)],
    ]
    if busy is not None:
        parts += [
            el("rect", x=x + 12, y=y + 83, width=_BOX - 24, height=5, rx=2.5, class_="gauge"),
            el("rect", x=x + 12, y=y + 83, width=f"{(_BOX - 24) * busy:.1f}", height=5, rx=2.5, class_="filled"),
        ]
    return el("g", el("title", name), parts)


def _hardware(settings: Mapping[str, Any], replicas: int) -> str:
    device = settings.get("device", "")
    device = device if isinstance(device, str) else device.get("name", "")
    per = 1
    for degree in ("tp", "pp", "attn_dp"):
        per *= int(settings.get(degree, 1))
    return f"{replicas} × {f'{per} × ' if per > 1 else ''}{device or 'store'}"


def _perf(settings: Mapping[str, Any]) -> str:
    perf = settings.get("perf", "")
    return next(iter(perf), "") if isinstance(perf, Mapping) else str(perf)


def _cut(text: str, most: int = 20) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _arrow(flow: Flow, boxes: Mapping[str, tuple[int, int]], most: int) -> Markup:
    width = 1.5 + 12.5 * flow.requests / most
    tip = f"{flow.sender} → {flow.receiver}\n{_amount(flow)}"
    look = "flow bytes" if flow.bytes else "flow"
    return el("path", el("title", tip), d=_way(flow, boxes), class_=look,
              style=f"stroke-width:{width:.1f};{colour(0)}", data_tip=tip)  # fmt: skip


def _way(flow: Flow, boxes: Mapping[str, tuple[int, int]]) -> str:
    """A curve from side to side; where boxes of columns between are in its way, through the gaps beside them."""
    (x0, y0), (x1, y1) = boxes[flow.sender], boxes[flow.receiver]
    forward = x1 > x0
    start, end = (x0 + _BOX, x1) if forward else (x0, x1 + _BOX) if x1 < x0 else (x0 + _BOX, x1 + _BOX)
    lift = _TALL // 2 + (0 if forward else 18)
    y0, y1 = y0 + lift, y1 + lift
    if x1 == x0:
        return f"M{start} {y0}C{start + 40} {y0} {end + 40} {y1} {end} {y1}"
    path, x, y = f"M{start} {y0}", start, y0
    for enter, leave, past in _past((start, y0), (end, y1), boxes):
        path += f"{_curve(x, y, enter, past)}H{leave}"
        x, y = leave, past
    return path + _curve(x, y, end, y1)


def _curve(x: int, y: int, to_x: int, to_y: int) -> str:
    bend = (to_x - x) // 2
    return f"C{x + bend} {y} {to_x - bend} {to_y} {to_x} {to_y}"


def _past(start: tuple[int, int], end: tuple[int, int], boxes: Mapping[str, tuple[int, int]]) -> list[Passage]:
    """Where a way enters and leaves each column between, and at what height; none if it meets no box in any."""
    (x0, y0), (x1, y1) = start, end
    found, meets = [], False
    for column in sorted({x for x, _ in boxes.values() if min(x0, x1) < x < max(x0, x1) - _BOX}, reverse=x1 < x0):
        tops = [y for x, y in boxes.values() if x == column]
        part = (column + _BOX // 2 - x0) / (x1 - x0)
        straight = round(y0 + (y1 - y0) * part * part * (3 - 2 * part))
        free = [straight, *(y - _APART // 2 for y in tops), *(y + _TALL + _APART // 2 for y in tops)]
        free = [y for y in free if not any(top - _APART // 2 < y < top + _TALL + _APART // 2 for top in tops)]
        past = min(free, key=lambda y: (abs(y - straight), y))
        meets = meets or past != straight
        found.append((column, column + _BOX, past) if x1 > x0 else (column + _BOX, column, past))
    return found if meets else []


def _amount(flow: Flow) -> str:
    parts = [counted(flow.requests, "hand-over")] if flow.requests else []
    return ", ".join([*parts, *([size(flow.bytes)] if flow.bytes else [])])


def _channel(view: View, name: str) -> str:
    """A channel's name; links of clients without a node begin with the client's number."""
    owner, dot, way = name.partition(".")
    return f"{view.records.client_names[int(owner)]}{dot}{way}" if owner.isdigit() else name


def _moved(view: View) -> Child:
    rows = transfers_text(view.summary)
    if not rows:
        return None
    return table(["transfers", "number", "mean size", "time, P50 · P99"], rows, label="Transfers of measured requests")


def _lent(view: View) -> Child:
    lending = view.summary.get("lending")
    if lending is None:
        return None
    return note(
        f"{counted(lending['loans'], 'loan')} of clients to prompts, {percent(lending['share_of_time'])} of the "
        f"lenders' time; they took {counted(lending['prompts'], 'prompt')}."
    )


def _clients(view: View) -> Markup:
    rows = [
        (replica["name"], percent(replica["utilisation"]), f"{replica['mean_batch'] or 0:,.1f}",
         f"{replica['steps']:,}", percent(replica["kv_peak"]), percent(replica["kv_mean"]),
         percent(replica["prefix_hit_rate"]), f"{replica['max_waiting']:,}", f"{replica['preemptions']:,}")
        for pool in view.summary["clients"].values() for replica in pool["replicas"]
    ]  # fmt: skip
    heads = [
        "client",
        "busy",
        "mean batch",
        "steps",
        "KV peak",
        "KV mean",
        "prefix hits",
        "most waiting",
        "preemptions",
    ]
    return el(
        "details",
        el("summary", counted(len(rows), "client")),
        table(heads, rows, label="Clients"),
        open=len(rows) <= 16,
    )


def _memories(view: View) -> Child:
    rows = [
        (name, f"{each['instances']:,}", f"{each['hits']:,}", f"{each['misses']:,}", percent(each["hit_rate"]),
         *(size(each[f"{what}_bytes"]) for what in ("held", "fetched", "written", "evicted")))
        for name, each in view.summary["memories"].items()
    ]  # fmt: skip
    heads = ["memory", "instances", "hits", "misses", "hit rate", "held", "fetched", "written", "evicted"]
    return el("details", el("summary", "Memories"), table(heads, rows, label="Memories"), open=True) if rows else None


def _links(view: View) -> Child:
    """What is shared, busiest first."""
    summary = view.summary
    rows = [
        (
            _channel(view, each["name"]),
            percent(each["utilisation"]),
            f"{size(each['capacity_bytes_per_s'])}/s",
            size(each["carried_bytes"]),
        )
        for each in sorted(summary.get("links", ()), key=lambda each: -(each["utilisation"] or 0))[:_MOST_LINKS]
    ]
    rows += [
        (
            each["name"],
            percent(each["utilisation"]),
            f"{each['num_cores']:,} cores",
            f"{each['core_s']:,.1f} core-seconds",
        )
        for each in summary.get("cores", ())
    ]
    if not rows:
        return None
    more = len(summary.get("links", ())) - _MOST_LINKS
    said = note(f"The busiest {_MOST_LINKS} links; {more:,} more carried less of what they can.") if more > 0 else None
    shared = table(["shared", "busy", "capacity", "carried"], rows, label="Links and cores")
    return el("details", el("summary", "Links and cores, busiest first"), shared, said, open=True)
