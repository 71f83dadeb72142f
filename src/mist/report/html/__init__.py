"""A result as one HTML file that explains itself: what came out, where the time went, and what was busy meanwhile.

It reads a `Result` and puts sections into a page; the page opens without a network and without a program of its own.
It computes no figure of the summary anew, and it never runs a simulation.
"""

from __future__ import annotations

from pathlib import Path

from mist.report.html.page import page, write_page
from mist.report.html.sections.anatomy import anatomy
from mist.report.html.sections.availability import availability
from mist.report.html.sections.cluster import cluster
from mist.report.html.sections.headline import headline
from mist.report.html.sections.latency import latency
from mist.report.html.sections.origin import cost_and_energy, provenance, scenario
from mist.report.html.sections.over_time import over_time
from mist.report.html.sections.slowest import slowest
from mist.report.html.sections.stages import stages
from mist.report.html.view import View
from mist.scenario.result import Result

__all__ = ["SECTIONS", "report_html", "write_report"]

#: the sections of a report in their order; one that has nothing to say is left out
SECTIONS = (
    headline, latency, stages, over_time, availability, anatomy, cluster, slowest, cost_and_energy, provenance, scenario
)  # fmt: skip


def report_html(result: Result) -> str:
    """The report of `result` as one HTML document; the same text for the same records, summary and scenario."""
    view = View(result)
    sections = [made for section in SECTIONS if (made := section(view)) is not None]
    version = result.simulator.get("version", "")
    return page(result.name, "Simulated run", sections, footer=f"Simulated by MIST {version}.")


def write_report(result: Result, path: str | Path) -> Path:
    """Write the report of `result` to `path`; the file appears when it is whole."""
    return write_page(report_html(result), path)
