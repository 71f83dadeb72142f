"""`mist report`: the page of a result that is in a folder, or its timeline; `--report` and `--trace` of other commands.

A few lines around `mist.scenario.stored` and `mist.report`, like every command. It simulates nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mist.cli.scenario import load_plugins

if TYPE_CHECKING:
    from mist.scenario.result import Result

#: seconds after the first arrival, from and to; None: to the end
Span = tuple[float, float | None]


def report_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a command `--report FILE` (as `page`) and `--overwrite`."""
    command = click.option("--overwrite", is_flag=True, help="Let --report replace a file that is there.")(command)
    kind = click.Path(path_type=Path)
    told = "Write a page to open in a browser, such as out.html."
    return click.option("--report", "page", type=kind, metavar="FILE", help=told)(command)


def check_page(page: Path | None, overwrite: bool, inputs: Iterable[str | Path]) -> None:
    """ScenarioError where a page, if one is asked for, can't be written, before anything runs."""
    from mist.scenario.outputs import check_file

    if page is not None:
        check_file(page, overwrite=overwrite, inputs=map(Path, inputs))


def write(text: str, page: Path) -> None:
    """Write a page and say where it is."""
    from mist.report.html.page import write_page

    write_page(text, page)
    click.echo(f"The report is {page}: open it in a browser", err=True)


def _span(_: click.Context, __: click.Parameter, value: str | None) -> Span | None:
    if value is None:
        return None
    start, colon, end = value.partition(":")
    try:
        first, last = float(start or 0), float(end) if end.strip() else None
    except ValueError:
        first, last = math.nan, None
    if last is not None and first >= last >= 0:
        raise click.BadParameter(f"{value!r} is a span of time without length: it has to end after it begins")
    if not colon or not 0 <= first < math.inf or not (last is None or first < last < math.inf):
        raise click.BadParameter(f"{value!r} is no span of time: write 60:120 (from 60 s to 120 s), or 60: to the end")
    return first, last


def trace_span_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a command `--trace-span A:B`."""
    told = "Of the timeline only what overlaps A to B seconds after the first arrival."
    return click.option("--trace-span", metavar="A:B", callback=_span, help=told)(command)


def check_trace_span(trace: Path | None, span: Span | None) -> None:
    if span is not None and trace is None:
        raise click.UsageError("--trace-span is for --trace FILE")


def write_trace(result: Result, trace: Path, span: Span | None) -> None:
    """Write a timeline; one that viewers will hardly open is said to be so before."""
    from mist.report.timeline import MANY_EVENTS, num_events, write_timeline

    events = num_events(result.records, span)
    if events > MANY_EVENTS:
        told = f"The timeline has about {events / 1e6:.0f} million events, and Perfetto needs 0.4 GB for each million"
        click.echo(f"{told} of the 4 GB that it has in a browser: --trace-span 0:60 takes the first minute", err=True)
    write_timeline(result, trace, span)


def tell_trace(trace: Path, span: Span | None) -> None:
    taken = "" if span is None else f" from {span[0]:g} s " + ("on" if span[1] is None else f"to {span[1]:g} s")
    click.echo(f"The timeline{taken} is {trace}: open it at ui.perfetto.dev", err=True)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--report", "page", type=click.Path(path_type=Path), metavar="FILE",
              help="Write it here; left out, to report.html in DIR.")  # fmt: skip
@click.option("--trace", type=click.Path(path_type=Path), metavar="FILE",
              help="Write a timeline for ui.perfetto.dev instead, or with --report as well.")  # fmt: skip
@trace_span_option
@click.option("--overwrite", is_flag=True, help="Replace files that are there.")
@click.option("--plugin", "plugins", multiple=True, metavar="FILE", help="A Python file that registers policies.")
def report(
    folder: Path, page: Path | None, trace: Path | None, trace_span: Span | None, overwrite: bool,
    plugins: tuple[str, ...],
) -> None:  # fmt: skip
    """Write the report of the result in DIR, left there by `mist run --out` or `mist search --out`, as one HTML file,
    or the timeline of a run.

    \b
    Examples:
        mist report out/first
        mist report out/first --report first.html --overwrite
        mist report out/first --trace minute.json.gz --trace-span 60:120
    """
    check_trace_span(trace, trace_span)
    if page is not None and trace is not None and page.resolve() == trace.resolve():
        raise click.UsageError(f"{page} would be written twice: name another file")
    load_plugins(plugins)
    from mist.report.html import report_html
    from mist.report.html.search import search_html
    from mist.scenario.result import RESULT_FILES
    from mist.scenario.stored import read_result
    from mist.search.outcome import PAGE, RESULT, read_found

    is_search = (folder / RESULT).is_file()
    if is_search and trace is not None:
        raise click.UsageError(f"{folder} holds a search, and a timeline is of one run")
    target = page if page is not None or trace is not None else folder / PAGE
    read = (RESULT, *(path.name for path in folder.glob("front-*.yaml"))) if is_search else RESULT_FILES
    found = read_found(folder) if is_search else read_result(folder)
    check_page(target, overwrite, [folder / name for name in read])
    check_page(trace, overwrite, [folder / name for name in read])
    if trace is not None and not isinstance(found, tuple):
        write_trace(found, trace, trace_span)
        tell_trace(trace, trace_span)
    if target is not None:
        write(search_html(*found) if isinstance(found, tuple) else report_html(found), target)
