"""What commands with many runs share: the options that say where these take place.

Under the commands. It starts nothing by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from mist.cli.output import clean_up_when_terminated

if TYPE_CHECKING:
    from mist.search.evaluate import Executor


def executor_options(command: Callable[..., Any]) -> Callable[..., Any]:
    options = (
        click.option(
            "--executor",
            default="processes",
            show_default=True,
            metavar="NAME",
            help="Where runs take place: processes, serial, ray, or a plug-in's.",
        ),
        click.option("--workers", type=click.IntRange(min=0), default=0, help="Processes; 0 is one per core."),
        click.option("--ray-address", default="", metavar="HOST:PORT", help="A Ray cluster; left out, one is started."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def chosen_executor(executor: str, workers: int, ray_address: str) -> Executor:
    """The executor of these options; ScenarioError where there is no such one, or it hasn't one of them.

    What it starts ends with the process, however that is ended.
    """
    from mist.search.executors import executor_named

    clean_up_when_terminated()
    if ray_address and executor == "processes":
        executor = "ray"
    return executor_named(executor, num_workers=workers, address=ray_address)
