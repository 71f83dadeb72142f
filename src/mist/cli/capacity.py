"""The command `mist capacity`: how much load a deployment takes within its SLO, or how few clients a load needs.

A few lines around the library; the table goes to stdout, progress to stderr. It computes no figure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from mist.cli.executors import chosen_executor, executor_options
from mist.cli.output import print_json, progress_of, table
from mist.cli.scenario import load_scenario, scenario_options

if TYPE_CHECKING:
    from mist.search.capacity import Capacity

#: exit code where no value holds for every seed
NOTHING_HOLDS = 1


@click.command()
@scenario_options
@click.option("--vary", default="rate", show_default=True, metavar="WHAT",
              help="rate, workload.concurrency, or the count of a pool, such as clients.gpu.count.")  # fmt: skip
@click.option("--seeds", type=click.IntRange(min=1), default=1, show_default=True, metavar="N",
              help="Bisect for N seeds, from the scenario's on.")  # fmt: skip
@click.option("--tolerance", type=click.FloatRange(min=1e-4, max=1), default=0.02, show_default=True, metavar="X",
              help="Stop where the rate that holds and the one that fails are so close, as a share.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@executor_options
def capacity(
    vary: str, seeds: int, tolerance: float, as_json: bool, executor: str, workers: int, ray_address: str,
    **options: Any,
) -> None:  # fmt: skip
    """Find the highest rate at which SCENARIO meets its SLO, or the fewest clients that meet it.

    A run holds where every target of the SLO is met and it isn't saturated. A rate is told as a factor of the
    scenario's own; each seed has the same requests at every rate. What is found holds for all seeds. Exit code: 0
    where something holds, 1 where nothing does, 130 for a search that was interrupted, which tells what it knows.

    \b
    Examples:
        mist capacity scenario.yaml
        mist capacity scenario.yaml --set slo.ttft_s.p99=1.5 --seeds 5
        mist capacity scenario.yaml --vary clients.gpu.count --rate-scale 10
        mist capacity scenario.yaml --set slo.ttft_slowdown='{p50: 2, p90: 3, p99: 6}' --json
    """
    scenario = load_scenario(**options)
    from mist.search.capacity import Interrupted
    from mist.search.capacity import capacity as find

    numbers = [scenario.seed + i for i in range(seeds)]
    try:
        with chosen_executor(executor, workers, ray_address) as where, progress_of("runs") as progress:
            found = find(scenario, vary=vary, seeds=numbers, tolerance=tolerance, executor=where, progress=progress)
    except Interrupted as cut:
        _show(cut.known, as_json)
        raise
    _show(found, as_json)
    if found.value is None:
        raise click.exceptions.Exit(NOTHING_HOLDS)


def _show(found: Capacity, as_json: bool) -> None:
    if as_json:
        print_json(found.as_json())
    else:
        _print(found)


def _print(found: Capacity) -> None:
    document = found.as_json()
    click.echo(f"{found.name}: {_headline(found)}\n")
    rows = []
    for seed in document["seeds"]:
        rate = seed["requests_per_s"]
        rows.append(
            {
                "seed": seed["seed"],
                "holds at": "-" if seed["value"] is None else found.shown(seed["value"]),
                "requests/s": "-" if rate is None else f"{rate:.4g}",
                "fails at": "-" if seed["fails_at"] is None else found.shown(seed["fails_at"]),
                "because": seed["because"] or "-",
            }
        )
    click.echo(f"{table(rows)}\n")
    if (served := _served(document["found"])) is not None:
        click.echo(f"{served}\n")
    if (text := _confidence(found)) is not None:
        click.echo(text)
    for note in document["notes"]:
        click.echo(note)


def _headline(found: Capacity) -> str:
    document = found.as_json()
    answer = document["found"]
    if not found.is_whole:
        return "interrupted; so far each seed holds and fails at"
    if answer is None:
        return "no value holds for every seed."
    rate, devices = answer["requests_per_s"], answer["devices"]
    load = f", {rate:.4g} requests/s" if rate is not None else ""
    hardware = f" ({devices} device{'s' * (devices != 1)})" if devices else ""
    return f"holds {'up to' if found.knob.rises else 'from'} {found.shown(answer['value'])}{hardware}{load}."


def _served(answer: Mapping[str, Any] | None) -> str | None:
    """What the runs at the value found served, how fast and at what cost."""
    shown = {
        "requests_per_s": "{:,.4g} requests/s offered",
        "throughput_requests_per_s": "{:,.4g} served",
        "output_tokens_per_s": "{:,.0f} output tokens/s",
        "ttft_p99_s": "TTFT P99 {:.4g} s",
        "tpot_p99_s": "TPOT P99 {:.4g} s",
        "usd_per_hour": "${:,.4g}/h",
        "usd_per_million_output_tokens": "${:,.4g} per million output tokens",
    }
    known = answer or {}
    told = [text.format(known[name]) for name, text in shown.items() if known.get(name) is not None]
    return f"There: {', '.join(told)}." if told else None


def _confidence(found: Capacity) -> str | None:
    told = found.as_json()["confidence"]
    if told["share_at_least"] is None or found.is_same_for_all_seeds:  # which a note says
        return None
    if told["num_seeds"] == 1:
        return "One seed says nothing of the spread: --seeds 5 does, where load is drawn and not replayed."
    text = f"{told['num_hold']} of {told['num_seeds']} seeds hold there"
    text += f": with {told['level']:.0%} confidence at least {told['share_at_least']:.0%} of all would."
    if told["low"] is not None:
        spread = f"{found.shown(told['mean'])} on average, {told['level']:.0%} interval {told['low']:.4g} to"
        text += f" Each by itself: {spread} {told['high']:.4g}."
    return text
