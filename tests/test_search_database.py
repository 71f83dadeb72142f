"""Searches that share a PostgreSQL database: two at once make its tables, keep the same runs and give the same result.

Needs a server: MIST_POSTGRESQL is the URL of a database whose tables these tests may make, such as
postgresql://postgres@127.0.0.1/mist.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import yaml

from mist.errors import ScenarioError
from mist.search.store import open_store

URL = os.environ.get("MIST_POSTGRESQL", "")
needs_server = pytest.mark.skipif(not URL, reason="MIST_POSTGRESQL names no PostgreSQL database")

SEARCH = "from mist.cli import main; main()"
SPACE = {
    "scenario": {
        "seed": 3,
        "workload": {"arrivals": {"poisson": {"rate_per_s": 20}}, "num_requests": 100, "input_tokens": 800,
                     "output_tokens": 20},
        "clients": {"gpu": {"device": "h100-sxm", "model": "llama-3.1-8b", "perf": "roofline"}},
        "slo": {"ttft_s": {"p99": 0.4}},
    },
    "space": {"clients.gpu": {"device": ["h100-sxm", "l40s"], "tp": [1, 2]}},
    "objectives": ["devices", "ttft_s.p99"],
}  # fmt: skip


def begun(path: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SEARCH, "search", str(path), "--seeds", "2", "--executor", "serial", "--json"]
    return subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str]) -> dict[str, object]:
    printed, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    return {key: value for key, value in json.loads(printed).items() if key != "timing"}


@needs_server
def test_two_searches_at_once_share_a_database(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    name = f"test {uuid.uuid4()}"
    path.write_text(yaml.safe_dump({"name": name, **SPACE}))
    one, two, alone = begun(path, "--store", URL), begun(path, "--store", URL), begun(path)
    expected = ended(alone)
    assert ended(one) == ended(two) == expected
    runs = open_store(URL, name, SPACE["objectives"]).runs
    assert len(runs) == sum(each["runs"] for each in expected["runs"])
    assert ended(begun(path, "--store", URL)) == expected


def test_a_database_that_is_not_there_is_told() -> None:
    with pytest.raises(ScenarioError, match="the store can't be opened"):
        open_store("postgresql://nobody@127.0.0.1:9/none", "none", ["devices"])
