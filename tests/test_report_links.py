"""Lending and the use of single links over time in a report: against the summary's figures, and what is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mist
from mist.report.html import report_html
from mist.report.html.sections.over_time import over_time
from mist.report.html.view import View
from mist.report.link_use import link_uses
from mist.scenario.result import Result
from mist.scenario.stored import read_result
from mist.units import NS_PER_S

GPU = {"device": "h100-sxm", "count": 2, "model": "llama-3.1-8b", "perf": "roofline"}


def apart(**changes: Any) -> Result:
    workload = {"arrivals": {"poisson": {"rate_per_s": 60}}, "num_requests": 150, "input_tokens": 3000,
                "output_tokens": 20}  # fmt: skip
    prefill, decode = (GPU | {"serves": [stage]} for stage in ("prefill", "decode"))
    clients = {"prefill": prefill, "decode": decode | {"lending": {"threshold_tokens": 6000}}}
    return mist.run({"workload": workload, "network": {"preset": "h100-nvl8"}, "clients": clients} | changes)


@pytest.fixture(scope="module")
def result() -> Result:
    return apart()


def test_links_carry_what_the_summary_says(result: Result) -> None:
    links = {link["name"]: link for link in result.metrics["links"]}
    uses = link_uses(result)
    assert {use.name for use in uses} == {name for name, link in links.items() if link["carried_bytes"]}
    for use in uses:
        seconds = (use.ends_ns - use.starts_ns) / NS_PER_S
        carried = float(np.sum(use.shares * seconds)) * links[use.name]["capacity_bytes_per_s"]
        assert carried == pytest.approx(links[use.name]["carried_bytes"], rel=1e-6)
        assert (use.shares > 0).all()
    busy = [links[use.name]["utilisation"] for use in uses]
    assert busy == sorted(busy, reverse=True)


def test_what_transfers_do_not_account_for_is_left_out() -> None:
    """A search reads its host's memory, which no transfer tells."""
    found = mist.run(Path(__file__).parents[1] / "examples" / "news-search.yaml")
    carried = {link["name"] for link in found.metrics["links"] if link["carried_bytes"]}
    assert carried - {use.name for use in link_uses(found)} == {"cpu.dram"}


def test_a_report_shows_links_and_loans(result: Result, tmp_path: Any) -> None:
    text = report_html(result)
    lending = result.metrics["lending"]
    assert lending["loans"]
    assert f"they took {lending['prompts']:,} prompts" in text
    for title in ("Bandwidth in use, by link", "Clients lent to prompts, by pool"):
        assert title in text
    assert report_html(read_result(result.write(tmp_path / "out"))) == text


def test_without_nodes_or_loans_there_is_neither() -> None:
    plain = apart(network={"kv_transfer": {"bandwidth": "10 GB/s"}}, clients={"gpu": GPU})
    text = str(over_time(View(plain)))
    assert link_uses(plain) == []
    assert "Bandwidth in use" not in text
    assert "lent to prompts" not in text
    assert "of clients to prompts" not in report_html(plain)
