"""`mist report`: the page of a result that is in a folder; and `--report` of commands that compare.

A few lines around `mist.scenario.stored` and `mist.report.html`, like every command. It simulates nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from mist.cli.scenario import load_plugins


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


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--report", "page", type=click.Path(path_type=Path), metavar="FILE",
              help="Write it here; left out, to report.html in DIR.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace a report that is there.")
@click.option("--plugin", "plugins", multiple=True, metavar="FILE", help="A Python file that registers policies.")
def report(folder: Path, page: Path | None, overwrite: bool, plugins: tuple[str, ...]) -> None:
    """Write the report of the result in DIR, left there by `mist run --out` or `mist search --out`, as one HTML file.

    \b
    Examples:
        mist report out/first
        mist report out/first --report first.html --overwrite
    """
    load_plugins(plugins)
    from mist.report.html import report_html
    from mist.report.html.search import search_html
    from mist.scenario.result import RESULT_FILES
    from mist.scenario.stored import read_result
    from mist.search.outcome import PAGE, RESULT, read_found

    target = page if page is not None else folder / PAGE
    is_search = (folder / RESULT).is_file()
    read = (RESULT, *(path.name for path in folder.glob("front-*.yaml"))) if is_search else RESULT_FILES
    found = read_found(folder) if is_search else read_result(folder)
    check_page(target, overwrite, [folder / name for name in read])
    write(search_html(*found) if isinstance(found, tuple) else report_html(found), target)
