"""`mist report`: the page of a result that is in a folder.

A few lines around `mist.scenario.stored` and `mist.report.html`, like every command. It simulates nothing.
"""

from __future__ import annotations

from pathlib import Path

import click

from mist.cli.scenario import load_plugins


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--report", "page", type=click.Path(path_type=Path), metavar="FILE",
              help="Write it here; left out, to report.html in DIR.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace a report that is there.")
@click.option("--plugin", "plugins", multiple=True, metavar="FILE", help="A Python file that registers policies.")
def report(folder: Path, page: Path | None, overwrite: bool, plugins: tuple[str, ...]) -> None:
    """Write the report of the result in DIR, which `mist run SCENARIO --out DIR` left there, as one HTML file.

    \b
    Examples:
        mist report out/first
        mist report out/first --report first.html --overwrite
    """
    load_plugins(plugins)
    from mist.report.html import write_report
    from mist.scenario.outputs import check_file
    from mist.scenario.result import RESULT_FILES
    from mist.scenario.stored import read_result

    result = read_result(folder)
    target = page if page is not None else folder / "report.html"
    check_file(target, overwrite=overwrite, inputs=[folder / name for name in RESULT_FILES])
    write_report(result, target)
    click.echo(f"The report is {target}: open it in a browser", err=True)
