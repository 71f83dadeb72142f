"""The command `mist interference`: what the tenants of a scenario lose to each other.

A few lines around the library; the table goes to stdout, progress to stderr. It computes no figure.
"""

from __future__ import annotations

from typing import Any

import click

from mist.cli.output import print_json, progress_of, table
from mist.cli.scenario import load_scenario, scenario_options


@click.command()
@scenario_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--check", is_flag=True, help="Recount the conservation laws in every run (slower).")
def interference(as_json: bool, check: bool, **options: Any) -> None:
    """Run SCENARIO with all its tenants, and with each of them alone on the same clients, and compare.

    Every tenant has the same requests in both, so that they are compared one by one.

    \b
    Examples:
        mist interference scenario.yaml
        mist interference scenario.yaml --set clients.gpu.batching.chunked.order=priority
        mist interference scenario.yaml --json > interference.json
    """
    scenario = load_scenario(**options)
    from mist.scenario.interference import interference as compare

    with progress_of("runs") as progress:
        found = compare(scenario, check=check, progress=progress)
    document = found.as_json()
    if as_json:
        print_json(document)
        return
    click.echo(f"{document['name']}: latencies in ms, each tenant alone and together with the others\n")
    click.echo(table(list(found.rows())))
    click.echo("")
    for name, tenant in document["tenants"].items():
        slowdown = tenant["slowdown"]
        if slowdown is not None:
            at_p99 = f"{slowdown['p99']:.2f} at the 99th percentile"
            click.echo(f"{name}: requests take {slowdown['mean']:.2f} times as long on average, {at_p99}.")
        finished, arrived = (tenant["together"]["requests"][key] for key in ("finished", "arrived"))
        before = tenant["alone"]["requests"]["finished"]
        if min(before, finished) < arrived:
            ended = f"{before:,} of {arrived:,} finished alone, {finished:,} together"
            click.echo(f"{name}: {ended}; the {tenant['num_compared']:,} that did in both are compared.")
    if document["jain_speed"] is not None:
        click.echo(f"Jain's fairness index of the tenants' speeds: {document['jain_speed']:.3f}.")
