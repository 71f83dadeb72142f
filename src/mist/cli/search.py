"""`mist search` and `mist sensitivity`: the deployments that are worth having, and what would change one of them.

A few lines around `mist.search`, like every command. It computes nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mist.cli.output import print_json, progress_of, progresses_of, table
from mist.cli.report import check_page, report_option, write
from mist.cli.scenario import load_plugins, load_scenario, scenario_options

if TYPE_CHECKING:
    from mist.search.outcome import Found

_STRATEGIES = ("halving", "bounded", "exhaustive", "nsga2", "nsga3", "tpe")


@click.command()
@click.argument("space", type=click.Path(path_type=Path))
@click.option("--strategy", type=click.Choice(_STRATEGIES), default="halving", show_default=True,
              help="How to look; the last three sample spaces too large to enumerate.")  # fmt: skip
@click.option("--trials", type=click.IntRange(min=1), default=256, show_default=True, metavar="N",
              help="Legal configurations that nsga2, nsga3 or tpe may run.")  # fmt: skip
@click.option("--seeds", type=click.IntRange(min=1), default=5, show_default=True, metavar="N",
              help="Seeds of the last round: the scenario's and those after it.")  # fmt: skip
@click.option("--executor", metavar="NAME", help="Where runs take place, such as serial or processes.")
@click.option("--workers", type=click.IntRange(min=0), default=0, metavar="N", help="How many; 0 is one per core.")
@click.option("--ray-address", metavar="ADDRESS", help="The Ray cluster of --executor ray.")
@click.option("--store", metavar="URL", help="Keep runs in this database, such as postgresql://user@host/mist.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON document.")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR",
              help="Write the result, its report, a scenario for each of the front, and the runs.")  # fmt: skip
@click.option("--plugin", "plugins", multiple=True, metavar="FILE", help="A Python file that registers policies.")
def search(
    space: Path, strategy: str, trials: int, seeds: int, executor: str | None, workers: int, ray_address: str | None,
    store: str | None, as_json: bool, out: Path | None, plugins: tuple[str, ...],
) -> None:  # fmt: skip
    """Search SPACE, a scenario with alternatives, for the deployments that nothing else in it beats.

    What can't be run is left out first, with counted reasons. Then all configurations run on a short prefix of the
    workload, the promising ones on longer ones, and the best on all of it with several seeds. With --out, the same
    command goes on where it was cut.

    \b
    A space is one YAML file:
        scenario: chat.yaml                      # or the scenario itself
        space:                                   # a list is a choice
          clients.gpu.device: [h100-sxm, mi300x]
          clients.gpu.tp: [1, 2, 4]
          clients.gpu.count: rest                # what the budget leaves
        budget: {devices: 8}                     # or {devices: {at_most: 8}}
        objectives: [output_tokens_per_usd, ttft_s.p99]
        constraints: {usd_per_hour: 30}          # besides the scenario's SLOs
        baseline: {clients: {gpu: {device: h100-sxm, model: llama-3.1-8b}}}

    \b
    Examples:
        mist search space.yaml
        mist search space.yaml --out out/search --workers 2
        mist run out/search/front-1.yaml
        mist report out/search --overwrite
        mist search space.yaml --strategy nsga2 --trials 512 --json > found.json
    """
    load_plugins(plugins)
    from mist.report.html.page import write_page
    from mist.report.html.search import search_html
    from mist.search.executors import DEFAULT, executor_named
    from mist.search.outcome import PAGE, STORE, read_found
    from mist.search.run import search as run_search

    if out is not None:
        _check(out)
    where: Path | str | None = store or (out / STORE if out is not None else None)
    options = {"num_workers": workers, "address": ray_address}
    whats = ("configurations", "runs")
    with executor_named(executor or DEFAULT, **options) as runs_here, progresses_of(*whats) as (examined, progress):
        found = run_search(
            space, runs_here, strategy=strategy, num_seeds=seeds, num_trials=trials, store=where, progress=progress,
            examined=examined,
        )  # fmt: skip
    if out is not None:
        found.write(out)
        write_page(search_html(*read_found(out)), out / PAGE)
    _print(found, as_json)
    if out is not None:
        click.echo(f"Results are in {out}: result.json, front-*.yaml, {PAGE}, {STORE}", err=True)


def _check(out: Path) -> None:
    """A new folder, an empty one, or one of a search that is gone on with."""
    from mist.scenario.result import check_output_folder
    from mist.search.outcome import STORE

    if not (out / STORE).is_file():
        check_output_folder(out)
        out.mkdir(parents=True, exist_ok=True)
    else:
        click.echo(f"Runs that {out / STORE} has already are not run again.", err=True)


def _print(found: Found, as_json: bool) -> None:
    if as_json:
        click.echo(found.to_json(), nl=False)
        return
    from rich.console import Console

    from mist.search.page import render

    Console(width=None if sys.stdout.isatty() else 120).print(render(found.document))


@click.command()
@scenario_options
@click.option("--objective", "objectives", multiple=True, metavar="NAME",
              help="What is looked at, such as ttft_s.p99; may be repeated.")  # fmt: skip
@click.option("--step", type=click.FloatRange(0, 1, min_open=True), default=0.1, show_default=True, metavar="X",
              help="How far each parameter moves, as a share of it.")  # fmt: skip
@click.option("--seeds", type=click.IntRange(min=1), default=5, show_default=True, metavar="N",
              help="Seeds: the scenario's and those after it.")  # fmt: skip
@click.option("--executor", metavar="NAME", help="Where runs take place, such as serial or processes.")
@click.option("--workers", type=click.IntRange(min=0), default=0, metavar="N", help="How many; 0 is one per core.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@report_option
def sensitivity(
    objectives: tuple[str, ...], step: float, seeds: int, executor: str | None, workers: int, as_json: bool,
    page: Path | None, overwrite: bool, **options: Any,
) -> None:  # fmt: skip
    """Say what would change the results of SCENARIO: by how many percent for 1 % more of each parameter.

    Load, prices, limits of batching, KV capacity, replicas, and the figures of the devices: FLOP/s, HBM bandwidth,
    links. Each moves alone, up and down, under the same requests. Devices move under the roofline.

    \b
    Examples:
        mist sensitivity scenario.yaml
        mist sensitivity scenario.yaml --report out.html
        mist sensitivity scenario.yaml --objective e2e_s.p90 --objective output_tokens_per_usd --seeds 10
    """
    check_page(page, overwrite, [options["scenario"], *options["plugins"]])
    scenario = load_scenario(**options)
    from mist.search.executors import DEFAULT, executor_named
    from mist.search.sensitivity import DEFAULT_OBJECTIVES
    from mist.search.sensitivity import sensitivity as measured

    with executor_named(executor or DEFAULT, num_workers=workers) as runs_here, progress_of("runs") as progress:
        document = measured(
            scenario, runs_here, objectives=objectives or DEFAULT_OBJECTIVES, step=step, num_seeds=seeds,
            progress=progress,
        )  # fmt: skip
    if page is not None:
        from mist.report.html.tornado import sensitivity_html

        write(sensitivity_html(document), page)
    if as_json:
        print_json(document)
        return
    click.echo(f"{document['name']}: change in % for 1 % more, over {len(document['seeds'])} seeds\n")
    click.echo(table([_elasticities(row, objectives or DEFAULT_OBJECTIVES) for row in document["parameters"]]))
    click.echo("\nfrom, to: x is times what the scenario or the device has; KV capacity is in blocks.")
    for row in document["parameters"]:
        if row["error"]:
            click.echo(f"No figures of {row['parameter']}: {row['error']}")
    for remark in document["remarks"]:
        click.echo(f"\nNote: {remark}")


def _elasticities(row: dict[str, Any], objectives: Sequence[str]) -> dict[str, Any]:
    low, high = (f"x{value:.3g}" if row["is_factor"] else f"{value:,}" for value in row["values"])
    cells: dict[str, Any] = {"parameter": row["parameter"], "from": low, "to": high}
    for name in objectives:
        mean, low = row["elasticities"][name]["mean"], row["elasticities"][name]["low"]
        half = "" if low is None else f" ±{mean - low:.2f}"
        cells[name] = "-" if mean is None else f"{_signed(mean)}{half}"
    return cells


def _signed(mean: float) -> str:
    return f"{mean:+.2f}" if abs(mean) >= 0.005 else "0.00"
