"""The command `mist advise`: what a scenario's latency and cost come from, and what would change them.

A few lines around `mist.advice`, which has the figures and the words. It computes nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mist.cli.output import print_json
from mist.cli.scenario import load_scenario, scenario_options

if TYPE_CHECKING:
    from mist.advice import Advice


@click.command()
@scenario_options
@click.option("--metric", "metrics", multiple=True, type=click.Choice(["ttft", "tpot", "e2e"]),
              help="Explain this P99; may be repeated. Left out: TTFT, TPOT, and those with a target.")  # fmt: skip
@click.option("--what-ifs", type=click.IntRange(0, 10), default=2, show_default=True, metavar="N",
              help="Run up to N changes against each reason; 0 runs none.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def advise(metrics: tuple[str, ...], what_ifs: int, as_json: bool, **options: Any) -> None:
    """Say why SCENARIO is as slow and as dear as it is, and what would help.

    SCENARIO is a file, or the folder that `mist run --out` wrote, whose scenario is run again. The requests around the
    P99 of a latency are followed through the records: every part of their time goes to one reason. The three largest
    are told, and the three largest of the cost, each with changes that were run with the same seed, and what they did.

    \b
    Examples:
        mist advise scenario.yaml
        mist advise out/first --metric ttft --what-ifs 1
        mist advise scenario.yaml --set clients.gpu.count=2 --json > advice.json
    """
    from mist.advice import advise as find
    from mist.advice.words import lines

    given: Path = options["scenario"]
    is_earlier_run = given.is_dir()
    if is_earlier_run:
        options["scenario"] = _scenario_in(given)
    scenario = load_scenario(**options)
    tell = lambda number: click.echo(f"{number} run{'s' if number > 1 else ''} done", err=True)  # noqa: E731
    found = find(scenario, what_ifs=what_ifs, metrics=[f"{name}_s" for name in metrics], progress=tell)
    if is_earlier_run:
        _compare(given, found)
    if as_json:
        print_json(found.as_json())
    else:
        click.echo("\n".join(lines(found)))


def _scenario_in(folder: Path) -> Path:
    from mist.errors import Problem, ScenarioError

    path = folder / "scenario.yaml"
    if not path.is_file():
        hint = "name a folder that `mist run --out` wrote, or a scenario's file"
        raise ScenarioError(Problem("there is no scenario.yaml in this folder", str(folder), hint=hint))
    return path


def _compare(folder: Path, found: Advice) -> None:
    """Tell where the run isn't the one that the folder is of: other options, or another version."""
    import json

    from mist.advice.trials import figures_of

    path = folder / "summary.json"
    if path.is_file() and figures_of(json.loads(path.read_text(encoding="utf-8"))) != found.figures:
        click.echo(f"The figures aren't those of {path}: options or another version of MIST changed them.", err=True)
