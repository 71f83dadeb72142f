"""What tests of validation share: small files of measured points, and runs of the command."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from click.testing import CliRunner, Result

from mist.cli import main

HEAD = "point,id,source,metric,value,engine,model,device,load"
_REST = "vllm,meta-llama/Llama-3.1-8B,h100-sxm,static_batch"

#: what every load needs; small, so that a run is quick
STATIC = {"load": "static_batch", "batch_size": "4", "isl": "128", "osl": "16"}
OFFLINE = {"load": "offline", "num_requests": "12", "isl": "128", "osl": "16"}
CLOSED = {"load": "closed_loop", "concurrency": "4", "num_requests": "12", "isl": "128", "osl": "16"}
OPEN = {"load": "open_loop", "rate_per_s": "4", "num_requests": "12", "isl": "128", "osl": "16"}
STAGED = {"load": "open_loop", "stages": "2:3s;6:2s", "isl": "128", "osl": "16"}
TRACE = {"load": "trace", "arrival": "trace", "workload_file": "list.csv", "isl": "100", "osl": "6"}


def lines(*rows: str) -> list[str]:
    """A file of rows that say point, id, source, metric and value."""
    return [HEAD, *(f"{row},{_REST}" for row in rows)]


def point_file(folder: Path, rows: Iterable[str]) -> Path:
    path = folder / "points.csv"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def write_points(folder: Path, *points: Mapping[str, str], name: str = "points.csv") -> Path:
    """A file with these points: columns, and measured values under their metric's name as `metric=`.

    A point's `measured` is "metric=value metric=value"; what it leaves out is empty, or a common default.
    """
    default = {"source": "made", "engine": "vllm", "engine_version": "0.10.0", "model": "meta-llama/Llama-3.1-8B",
               "device": "h100-sxm", "num_devices": "1", "tp": "1", "trust": "A"}  # fmt: skip
    rows = []
    for i, point in enumerate(points):
        whole = {"point": f"p{i}", **default, **point}
        for j, pair in enumerate(whole.pop("measured", "output_tokens_per_s=1000").split()):
            metric, _, value = pair.partition("=")
            rows.append({**whole, "id": f"{whole['point']}-{j}", "metric": metric, "value": value})
    columns = sorted({key for row in rows for key in row})
    text = [",".join(columns), *(",".join(row.get(key, "") for key in columns) for row in rows)]
    path = folder / name
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return path


def write_request_list(folder: Path) -> Path:
    """workloads/list.csv: five requests with arrival times."""
    (folder / "workloads").mkdir(exist_ok=True)
    path = folder / "workloads" / "list.csv"
    rows = "".join(f"{0.5 * i},{80 + 10 * i},{4 + i}\n" for i in range(5))
    path.write_text(f"arrival_s,input_tokens,output_tokens\n{rows}")
    return path


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])
