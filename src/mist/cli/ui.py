"""The command `mist ui`: the local page.

A few lines around `mist.ui`, which is imported only to be used. It prints the page's address and nothing else.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), default=".", metavar="[FOLDER]")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="The port; left out, any free one.")
@click.option("--open/--no-open", "is_opened", default=None, help="Open a browser; left out, only from a terminal.")
@click.option("--runs", type=click.Path(path_type=Path), metavar="DIR",
              help="Where results go; left out, out/ui in FOLDER.")  # fmt: skip
@click.option("--workers", type=click.IntRange(1, 64), default=1, show_default=True, metavar="N",
              help="Simulations at a time; others wait.")  # fmt: skip
@click.option("--plugin", "plugins", multiple=True, metavar="FILE", help="A Python file that registers policies.")
def ui(
    folder: Path, port: int, is_opened: bool | None, runs: Path | None, workers: int, plugins: tuple[str, ...]
) -> None:
    """Edit and run the scenarios of FOLDER, the current one if left out, on a page in your browser.

    The page is served to this machine only, at an address with a secret in it. Results are folders as `mist run --out`
    makes them. Ctrl-C ends the page and the simulations that it started; results stay.

    \b
    Examples:
        mist ui
        mist ui examples --runs out/ui --workers 2
        mist ui --port 8600 --no-open     # from another machine: ssh -L 8600:127.0.0.1:8600 HOST
    """
    from mist.ui.server import serve

    def ready(address: str) -> None:
        click.echo(address)
        click.echo("Ctrl-C ends it.", err=True)
        if sys.stdout.isatty() if is_opened is None else is_opened:
            import webbrowser

            webbrowser.open(address)

    serve(folder, runs=runs, port=port, workers=workers, plugins=plugins, ready=ready)
