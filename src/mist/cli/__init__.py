"""The command `mist`: run, check, explain-step, schema and list, each a few lines around the library.

The outermost layer (other commands are beside it): options become overrides of the scenario, errors become
exit codes (2 the user's files, 3 a broken law, 130 interrupted). It computes nothing, prints results to stdout only,
and imports the simulator only to use it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mist import __version__
from mist.cli.advice import advise
from mist.cli.calibration import calibrate
from mist.cli.capacity import capacity
from mist.cli.compare import compare
from mist.cli.interference import interference
from mist.cli.output import clean_up_when_terminated, folded, print_json, table
from mist.cli.report import Span, check_trace_span, report, tell_trace, trace_span_option, write_trace
from mist.cli.scenario import inputs, load_plugins, load_scenario, scenario_options
from mist.cli.search import search, sensitivity
from mist.cli.ui import ui
from mist.cli.validation import validate

if TYPE_CHECKING:
    from mist.errors import Problem
    from mist.scenario.result import Result

Progress = Callable[[int, int], None]


class _Commands(click.Group):
    """Turns errors into messages on stderr and exit codes."""

    def invoke(self, ctx: click.Context) -> Any:
        from mist.errors import InvariantError, ScenarioError

        try:
            return super().invoke(ctx)
        except ScenarioError as error:
            _tell(error.problems)
            raise click.exceptions.Exit(2) from None
        except BrokenPipeError:
            raise
        except OSError as error:
            click.secho(f"{error.filename or 'mist'}: {error.strerror or error}", fg="red", err=True)
            raise click.exceptions.Exit(2) from None
        except InvariantError as error:
            click.secho(f"a law of the simulation broke, which is a bug: {error}", fg="red", err=True)
            raise click.exceptions.Exit(3) from None
        except KeyboardInterrupt:
            raise _interrupted() from None
        except RuntimeError as error:  # Python 3.11 wraps whatever comes while a class is made, as when modules load
            if isinstance(error.__cause__, KeyboardInterrupt):
                raise _interrupted() from None
            raise


def _interrupted() -> click.exceptions.Exit:
    click.echo("interrupted", err=True)
    return click.exceptions.Exit(130)


@click.group("mist", cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="mist")
def main() -> None:
    """Simulate an LLM deployment: what would it do under this load?

    \b
    A scenario is one YAML file:
        workload:
          arrivals: {poisson: {rate_per_s: 4}}
          num_requests: 2000
          lengths: azure-conversation
        clients:
          gpu: {device: h100-sxm, model: llama-3.1-8b, engine: vllm-0.10}

    \b
    Then
        mist run scenario.yaml                          latencies, throughput, load
        mist run scenario.yaml --set clients.gpu.tp=2   the same on two devices each
        mist advise scenario.yaml                       why so slow and dear, and what helps?
        mist check scenario.yaml                        is it right, and does it fit?
        mist capacity scenario.yaml                     the highest rate within its SLO
        mist compare a.yaml b.yaml                      request by request, with confidence
        mist list devices                               what can be named
        mist ui                                         all that on a page in your browser
    """


@main.command()
@scenario_options
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON document.")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Write summary, tables and scenario here.")
@click.option("--overwrite", is_flag=True, help="Let --out, --trace and --report replace what is there.")
@click.option("--trace", type=click.Path(path_type=Path), metavar="FILE",
              help="Write a timeline for ui.perfetto.dev, such as out.json.gz.")  # fmt: skip
@trace_span_option
@click.option("--report", "page", type=click.Path(path_type=Path), metavar="FILE",
              help="Write a report to open in a browser, such as out.html.")  # fmt: skip
@click.option("--check", is_flag=True, help="Recount the conservation laws while running and at the end (slower).")
@click.option("--records", type=click.Choice(["full", "summary"]), default="full",
              help="summary: the same figures in less memory; no tables, timeline, report or --check.")  # fmt: skip
def run(
    as_json: bool, out: Path | None, overwrite: bool, trace: Path | None, trace_span: Span | None, page: Path | None,
    check: bool, records: str, **options: Any,
) -> None:  # fmt: skip
    """Simulate SCENARIO and print what came out.

    \b
    Examples:
        mist run scenario.yaml
        mist run scenario.yaml --rate-scale 2 --json > summary.json
        mist run scenario.yaml --set clients.gpu.count=4 --set routing=round_robin
        mist run scenario.yaml --set 'workload.input_tokens={lognormal: {mean: 1155, cv: 0.9}}'
        mist run scenario.yaml --report out.html
        mist run scenario.yaml --out out/first --trace out/first.json.gz
        mist run scenario.yaml --trace minute.json.gz --trace-span 60:120
        mist run scenario.yaml --set workload.num_requests=10000000 --records summary
    """
    if records != "full" and (trace is not None or page is not None or check):
        raise click.UsageError("--trace, --report and --check need all records: leave them out, or --records summary")
    check_trace_span(trace, trace_span)
    from mist.errors import ScenarioError

    clean_up_when_terminated()
    scenario = load_scenario(**options)
    _check_outputs(
        out, {"timeline": trace, "report": page}, overwrite, inputs(scenario, options["scenario"], options["plugins"])
    )
    from mist.scenario.build import run as run_scenario

    with _progress_bar() as progress:
        result = run_scenario(scenario, check=check, progress=progress, records=records)
    missed: ScenarioError | None = None
    if trace is not None:  # the slow ones first: until they are whole, nothing that was there has changed
        try:
            write_trace(result, trace, trace_span)
        except ScenarioError as error:  # the results of a long run aren't lost for a span that it has not
            missed = error
    if page is not None:
        from mist.report.html import write_report

        write_report(result, page)
    if out is not None:
        result.write(out, overwrite=overwrite or trace is not None or page is not None)
    _print_result(result, as_json)
    if out is not None:
        from mist.scenario.result import RESULT_FILES, SUMMARY_FILES

        files = RESULT_FILES if records == "full" else SUMMARY_FILES
        click.echo(f"Results are in {out}: {', '.join(files)}", err=True)
    if trace is not None and missed is None:
        tell_trace(trace, trace_span)
    if page is not None:
        click.echo(f"The report is {page}: open it in a browser", err=True)
    if missed is not None:
        raise missed


@main.command()
@scenario_options
@click.option("--resolved", is_flag=True, help="Print the whole scenario as YAML, with every default.")
def check(resolved: bool, **options: Any) -> None:
    """Validate SCENARIO without running it, and print what it comes to.

    All problems are listed at once, each with its line and a remedy. Traces are read.

    \b
    Examples:
        mist check scenario.yaml
        mist check scenario.yaml --set clients.gpu.weights_dtype=fp8
        mist check scenario.yaml --resolved > whole.yaml
    """
    scenario = load_scenario(**options)
    if resolved:
        click.echo(scenario.to_yaml(), nl=False)
        return
    from mist.scenario.account import account

    for line in account(scenario):
        click.echo(line)


@main.command("explain-step")
@click.argument("model")
@click.argument("device")
@click.option("--prefill", metavar="TOKENS[@CONTEXT]", help="A prefill, such as 2048 or 512@1024; +512 for another.")
@click.option("--decode", metavar="NxCONTEXT", help="Decodes, such as 32x2048.")
@click.option("--mixed", metavar="STEP", help="Both, such as 512@0+64x2048.")
@click.option("--tp", type=click.IntRange(1, 1024), default=1, help="Ranks of tensor parallelism.")
@click.option("--pp", type=click.IntRange(1, 1024), default=1, help="Pipeline stages.")
@click.option("--ep", type=click.IntRange(1, 4096), default=1, help="Ways to spread experts over ranks.")
@click.option("--attn-dp", type=click.IntRange(1, 4096), default=1, help="Attention groups; sizes are those of one.")
@click.option(
    "--engine",
    help="The serving engine, for its host time, kernels and limits; left out, the release of the operator tables.",
)
@click.option("--weights-dtype", default="auto", help="Dtype of the weights; auto is the checkpoint's.")
@click.option("--kv-dtype", default="auto", help="Dtype of the KV cache; auto is 16 bits.")
@click.option("--perf", default="", help="A performance model: kernels, roofline or 'steps: FILE'.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--plugin", "plugins", multiple=True, metavar="FILE", help="A Python file that registers policies.")
def explain_step(
    model: str, device: str, prefill: str | None, decode: str | None, mixed: str | None, engine: str | None,
    as_json: bool, plugins: tuple[str, ...], **options: Any,
) -> None:  # fmt: skip
    """Say which operators one step of MODEL on DEVICE runs, how long each takes, and what bounds it.

    \b
    Examples:
        mist explain-step llama-3.1-70b h100-sxm --tp 4 --prefill 2048
        mist explain-step llama-3.1-70b h100-sxm --tp 4 --decode 32x2048 --json
        mist explain-step deepseek-v3 h200-sxm --tp 8 --mixed 512@0+64x2048
    """
    load_plugins(plugins)
    from mist.scenario.explain import explain_step as explain
    from mist.scenario.explain import parse_step

    for text, only in ((prefill, "tokens"), (decode, "count")):
        if text is not None:
            parse_step(text, only)
    given = [text for text in (prefill, decode, mixed) if text is not None]
    if not given:
        raise click.UsageError("give a step: --prefill 2048, --decode 32x2048 or --mixed 512@0+64x2048")
    if engine is not None:
        options["engine"] = engine
    found = explain(model, device, parse_step("+".join(given)), **options)
    if as_json:
        print_json(found.as_json())
        return
    click.echo(f"{found}\n\n{table(found.rows())}")
    for remark in found.remarks:
        click.echo(remark, err=True)


@main.command()
@click.option("--plugin", "plugins", multiple=True, metavar="FILE", help="A Python file that registers policies.")
def schema(plugins: tuple[str, ...]) -> None:
    """Print the JSON Schema of scenarios, for editors.

    \b
    Examples:
        mist schema > mist.schema.json
        # and as the first line of a scenario, for the YAML language server:
        # yaml-language-server: $schema=mist.schema.json
    """
    load_plugins(plugins)
    from mist.scenario.schema import json_schema

    print_json(json_schema())


_LISTED = (
    "devices", "models", "engines", "steps", "memories", "acceptance", "policies", "perf", "workloads", "networks",
    "pipelines", "prices",
)  # fmt: skip


@main.command("list")
@click.argument("what", type=click.Choice(_LISTED), metavar="WHAT")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
@click.option("--plugin", "plugins", multiple=True, metavar="FILE", help="A Python file that registers policies.")
def list_names(what: str, name: str | None, as_json: bool, plugins: tuple[str, ...]) -> None:
    """List the names that a scenario can use, or what the list of prices NAME asks for each device.

    \b
    WHAT is one of:
        devices, models, engines    what clients are made of
        steps, perf                 learned step times, performance models
        policies, pipelines         with their parameters and what they do
        acceptance                  measured acceptance of speculation
        workloads                   lengths of requests, traces
        memories, networks          stores of KV caches, topologies
        prices                      lists of prices

    \b
    Examples:
        mist list devices
        mist list prices nebius
        mist list policies --json
    """
    if name is not None and what != "prices":
        raise click.UsageError(f"a name is for prices: mist list {what}, or mist list prices {name}")
    load_plugins(plugins)
    from mist.scenario.listing import price_rows, rows

    found = rows(what) if name is None else price_rows(name)
    if as_json:
        print_json(found)
    else:
        click.echo(table(folded(found) if what in ("policies", "pipelines", "perf") else found))


def _check_outputs(
    out: Path | None, files: dict[str, Path | None], overwrite: bool, inputs: Iterable[Path]
) -> None:  # fmt: skip
    """Refuse, before anything runs, to write where results can't go, or over what the run reads."""
    from mist.errors import Problem, ScenarioError
    from mist.scenario.outputs import check_not_read
    from mist.scenario.result import RESULT_FILES, check_output_folder

    outputs = [out / name for name in RESULT_FILES] if out is not None else []
    asked = {what: path for what, path in files.items() if path is not None}
    outputs += asked.values()
    check_not_read(outputs, inputs)
    if lost := [path for path in outputs if [each.resolve() for each in outputs].count(path.resolve()) > 1]:
        raise ScenarioError(Problem(f"{lost[0]} would be written twice", hint="name another file"))
    if out is not None:
        check_output_folder(out, overwrite=overwrite)
    for what, path in asked.items():
        if path.exists() and not (overwrite and path.is_file()):
            raise ScenarioError(Problem(f"{path} is there already", hint="name another file, or give --overwrite"))
        if not path.parent.is_dir() and path.parent != out:
            raise ScenarioError(Problem(f"there is no folder {path.parent} for the {what}", hint="make it first"))


@contextmanager
def _progress_bar() -> Iterator[Progress | None]:
    """A bar of finished requests on stderr while the run lasts; None unless stderr is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("simulating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("requests", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _print_result(result: Result, as_json: bool) -> None:
    if as_json:
        click.echo(result.to_json(), nl=False)
    elif sys.stdout.isatty():
        from rich.console import Console

        Console().print(result)
    else:
        click.echo(str(result))


def _tell(problems: Iterable[Problem]) -> None:
    for problem in problems:
        message, _, hint = str(problem).partition("\n")
        click.secho(message, fg="red", err=True)
        if hint:
            click.echo(hint, err=True)


main.add_command(advise)
main.add_command(capacity)
main.add_command(compare)
main.add_command(interference)
main.add_command(report)
main.add_command(calibrate)
main.add_command(validate)
main.add_command(search)
main.add_command(sensitivity)
main.add_command(ui)
