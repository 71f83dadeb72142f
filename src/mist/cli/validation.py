"""`mist validate`: measured points against simulated ones, as tables of errors.

A few lines around `mist.validation`, like every command. It computes nothing.
"""

from __future__ import annotations

from pathlib import Path

import click

from mist.cli.output import perf_models, print_json, progress_of, table


@click.command()
@click.argument("points", type=click.Path(path_type=Path))
@click.option("--source", "sources", multiple=True, metavar="S", help="Only this source; may be repeated.")
@click.option("--trust", "trusts", multiple=True, type=click.Choice(["A", "B", "C"]), help="Only rows of this trust.")
@click.option("--sample", type=click.IntRange(min=1), metavar="N", help="N points of each source, evenly spaced.")
@click.option("--perf", default="", metavar="MODELS", help="Performance models, such as roofline or kernels,roofline.")
@click.option("--workers", type=click.IntRange(min=0), default=0, help="Processes; 0 is one per core.")
@click.option("--time-limit", type=click.FloatRange(min=0, min_open=True), default=120.0, show_default=True,
              metavar="S", help="Seconds that a point may take.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON document.")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR",
              help="Keep the report, the comparisons and a journal here.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Let --out replace what is there.")
def validate(
    points: Path, sources: tuple[str, ...], trusts: tuple[str, ...], sample: int | None, perf: str, workers: int,
    time_limit: float, as_json: bool, out: Path | None, overwrite: bool,
) -> None:  # fmt: skip
    """Simulate every measured point in the CSV file POINTS and say how far off each value is.

    A row is one measured value: the columns point, id, source, metric and value; engine, model, device and load;
    and whatever else describes the run, such as tp, concurrency, isl, osl. What can't be simulated is counted with
    its reason. Errors are absolute percentage errors; saturated runs stand apart. With --out, the same command
    continues a validation that was cut.

    \b
    Examples:
        mist validate points.csv
        mist validate points.csv --source my_h100_runs --trust A --json > report.json
        mist validate points.csv --sample 5 --perf roofline
        mist validate points.csv --out out/validation
    """
    from mist.validation.evaluate import evaluate
    from mist.validation.points import read_points, request_lists, sampled
    from mist.validation.score import report
    from mist.validation.tables import COMPARISONS, JOURNAL, REPORT, assumed, check_folder, covered, sections, write

    models = perf_models(perf)
    file = read_points(points, sources=sources, trusts=trusts)
    if out is not None and check_folder(out, overwrite=overwrite, inputs=[points, *request_lists(file)]):
        click.echo(f"Points that {out / JOURNAL} has already are not run again.", err=True)
    if sample is not None:
        file = sampled(file, sample)
    with progress_of("points") as progress:
        evaluated = evaluate(
            file.points, points.parent, perf=models, workers=workers, journal=out / JOURNAL if out else None,
            progress=progress, limit_s=time_limit,
        )  # fmt: skip
    document = report(file, evaluated)
    if out is not None:
        write(document, out)
    if as_json:
        print_json(document)
    else:
        for title, rows in sections(document):
            click.echo(f"{title}\n\n{table(rows)}\n")
        for line in assumed(document):
            click.echo(line)
        click.echo(covered(document))
    if out is not None:
        click.echo(f"Results are in {out}: {REPORT}, {COMPARISONS}", err=True)
