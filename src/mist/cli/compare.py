"""The command `mist compare`: deployments side by side under one workload, request by request.

A few lines around the library; the tables go to stdout, progress to stderr. It computes no figure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click

from mist.cli.executors import chosen_executor, executor_options
from mist.cli.output import print_json, table
from mist.cli.report import check_page, report_option, write
from mist.cli.scenario import change_options, load_plugins, load_scenario


@click.command()
@click.argument("deployments", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="A B [C ...]")
@click.option("--seeds", type=click.IntRange(min=1), default=1, show_default=True, metavar="N",
              help="Run each with N seeds, from its own on; intervals are then over seeds.")  # fmt: skip
@change_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@report_option
@executor_options
def compare(
    deployments: tuple[Path, ...], seeds: int, as_json: bool, plugins: tuple[str, ...],
    page: Path | None, overwrite: bool, executor: str, workers: int, ray_address: str, **options: Any,
) -> None:  # fmt: skip
    """Compare B, C, ... with A, all under one workload: scenario files, or folders that `mist run --out` wrote.

    Requests are paired by number, so that what all have in common cancels: a difference is told with the interval that
    holds it with 95 % confidence. Different workloads are refused. Options that change a scenario change all files.

    \b
    Examples:
        mist compare today.yaml larger.yaml
        mist compare out/today out/larger out/other --json
        mist compare today.yaml larger.yaml --seeds 5
        mist compare today.yaml larger.yaml --report out.html
        mist compare today.yaml larger.yaml --rate-scale 2 --set slo.ttft_s.p99=1
    """
    from mist.errors import Problem, ScenarioError
    from mist.search.compare import compare as compared
    from mist.search.compare import deployments_of, paired

    if len(deployments) < 2:
        raise ScenarioError(Problem("one deployment can't be compared", hint="name two: mist compare A B"))
    check_page(page, overwrite, [*deployments, *plugins])
    load_plugins(plugins)
    changed = any(value not in (None, ()) for value in options.values())
    load = partial(load_scenario, plugins=(), **options) if changed else None
    with chosen_executor(executor, workers, ray_address) as where:
        sides = deployments_of(deployments, seeds=seeds, executor=where, load=load)
    document = compared(sides)
    if page is not None:
        from mist.report.html.compare import compare_html

        write(compare_html(document, [paired(sides[0], other) for other in sides[1:]]), page)
    if as_json:
        print_json(document)
        return
    click.echo(f"{table([*_served(document['deployments'])])}\n")
    by = f"{document['num_seeds']} seeds" if document["num_seeds"] > 1 else document["interval"]["by"]
    for against in document["against"]:
        click.echo(f"{against['label']} against {document['baseline']}: {against['num_pairs']:,} requests in pairs\n")
        click.echo(table([*_requests(against["requests"])]))
        click.echo("")
        click.echo(table([*_runs(against["runs"])]))
        click.echo("")
        if set(against["num_finished"]) != {against["num_pairs"]}:
            one, two = against["num_finished"]
            click.echo(f"Of {one:,} that finished in the one and {two:,} in the other; all others are left out.")
    for note in document["notes"]:
        click.echo(note)
    if any(_has_interval(against) for against in document["against"]):
        click.echo(f"Intervals hold the difference with {document['interval']['level']:.0%} confidence, by {by}.")
    else:
        click.echo("There are no intervals: too few requests finished in both for one.")


def _has_interval(against: Mapping[str, Any]) -> bool:
    latencies = [
        each[statistic] for each in against["requests"].values() if each for statistic in ("mean", "p50", "p99")
    ]
    known = [each["low_s"] for each in latencies] + [each["low"] for each in against["runs"].values()]
    return any(low is not None for low in known)


def _served(deployments: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row for each deployment: what became of its requests, whether they were too many, and its SLO."""
    from mist.metrics.words import load_verdict, slo_verdict

    has_slo = any(each["num_slo_met"] is not None for each in deployments)
    for each in deployments:
        counts = {key: each[key] for key in ("arrived", "finished", "rejected", "lost")}
        row = {"deployment": each["label"], **counts, "load": load_verdict(each)}
        yield {**row, "SLO": slo_verdict(each)} if has_slo else row


def _requests(requests: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A row for each metric and statistic, in milliseconds."""
    from mist.metrics.words import share

    for metric, found in requests.items():
        shares = f"{share(found['share_faster'])}, {share(found['share_slower'])}" if found else ""
        for statistic in ("mean", "p50", "p99") if found else ():
            each = found[statistic]
            ms = {key: None if each[key] is None else each[key] * 1e3 for key in each}
            yield {
                "latency": f"{metric[:-2].upper()} {statistic.replace('p', 'P')}",
                "A, ms": f"{ms['baseline_s']:,.1f}",
                "B, ms": f"{ms['value_s']:,.1f}",
                "difference": f"{ms['difference_s']:+,.1f}",
                "interval": _interval(ms["low_s"], ms["high_s"], "+,.1f"),
                "": _relative(each["baseline_s"], each["difference_s"]),
                "faster, slower": shares if statistic == "mean" else "",
            }


def _runs(runs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for name, each in runs.items():
        yield {
            "figure": name.replace("_per_", "/").replace("_", " "),
            "A": f"{each['baseline']:,.4g}",
            "B": f"{each['value']:,.4g}",
            "difference": f"{each['difference']:+,.4g}",
            "interval": _interval(each["low"], each["high"], "+,.4g"),
            "": _relative(each["baseline"], each["difference"]),
        }


def _interval(low: float | None, high: float | None, form: str) -> str:
    return "-" if low is None or high is None else f"{low:{form}} to {high:{form}}"


def _relative(baseline: float, difference: float) -> str:
    return f"{difference / baseline:+.1%}" if baseline else ""
