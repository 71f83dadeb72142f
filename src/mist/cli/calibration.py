"""`mist calibrate`: fit profiles to a user's own measurements, a subcommand for each kind of them.

A few lines around `mist.calibration`, like every command. It computes nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mist.cli.output import perf_models, print_json, table


@click.group()
def calibrate() -> None:
    """Fit profiles to what was measured on your own engine."""


@calibrate.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--format", "file_format", type=click.Choice(["auto", "csv", "splitwise", "blis"]), default="auto",
              help="What the file is; auto tells by its columns.")  # fmt: skip
@click.option("--model", default="", help="The model, by name or path, unless the file says.")
@click.option("--device", default="", help="The device, by name or path, unless the file says.")
@click.option("--tp", type=click.IntRange(1, 1024), help="Ranks of tensor parallelism; 1 unless the file says.")
@click.option("--weights-dtype", default="auto", help="Dtype of the weights; auto is the checkpoint's.")
@click.option("--kv-dtype", default="auto", help="Dtype of the KV cache; auto is 16 bits.")
@click.option("--name", default="", help="What the profile is called.")
@click.option("--engine", default="", help="The engine and its version, for the record.")
@click.option("--source", default="", help="Where the steps come from, for the record.")
@click.option("--licence", default="", help="Their licence, for the record.")
@click.option("--date", default="", help="The date of the profile; today's unless given.")
@click.option("--device-time-only", is_flag=True, help="The times hold no host time of the engine.")
@click.option("--out", type=click.Path(path_type=Path), metavar="PROFILE", help="Write the profile here.")
@click.option("--overwrite", is_flag=True, help="Let --out replace what is there.")
@click.option("--json", "as_json", is_flag=True, help="Print the error table and the profile as one JSON document.")
def steps(file: Path, out: Path | None, overwrite: bool, as_json: bool, **options: Any) -> None:
    """Learn step times from the profiled steps in FILE, and say how well on operating points held out.

    \b
    Columns of a CSV, JSON-lines or Parquet file, a step a row:
        time_ns, time_us, time_ms or time_s
        num_decodes, decode_context        sequences, and their attended tokens in all
        num_prefills, prefill_tokens       chunks, and their new tokens in all
        prefill_context                    tokens in the KV cache before the chunks, in all
        prefill_attention                  sum of c*(s + c/2); left out, chunks are equal
        group                              operating point, held out as a whole

    \b
    Examples:
        mist calibrate steps steps.csv --model llama-3.1-8b --device h100-sxm --out profile.yaml
        mist run scenario.yaml --set 'perf={steps: profile.yaml}'
    """
    from mist.calibration.steps import calibrate_steps, write_profile
    from mist.metrics import SCHEMA_VERSION
    from mist.scenario.outputs import check_file

    if out is not None:
        check_file(out, overwrite=overwrite, inputs=[file, Path(options["model"]), Path(options["device"])])
    found = calibrate_steps(file, **options)
    if out is not None:
        write_profile(found, out, overwrite=overwrite)
    if as_json:
        print_json({"schema_version": SCHEMA_VERSION, "errors": found.rows(), "profile": found.profile.as_mapping()})
        return
    click.echo(table(found.rows()))
    for remark in found.remarks:
        click.echo(remark, err=True)
    if out is not None:
        click.echo(f"The profile is {out}: name it in a scenario as perf: {{steps: {out}}}", err=True)


@calibrate.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--engine", required=True, metavar="PROFILE", help="The engine profile to start from, by name or path.")
@click.option("--fit", "constants", required=True, multiple=True, metavar="A,B", help="The constants to fit.")
@click.option("--source", "sources", multiple=True, metavar="S", help="Only points of this source; may be repeated.")
@click.option(
    "--device", default="", help="Only points on this device of the catalogue, whose constants may be fitted too."
)
@click.option("--fitting-part", is_flag=True, help="Leave out the points that the shipped figures are checked with.")
@click.option("--perf", default="", metavar="MODELS", help="Performance models, such as roofline or kernels,roofline.")
@click.option("--workers", type=click.IntRange(min=0), default=0, help="Processes; 0 is one per core.")
@click.option("--date", default="", help="The date of the profile; today's unless given.")
@click.option("--out", type=click.Path(path_type=Path), metavar="PROFILE", help="Write the profile here.")
@click.option("--out-device", type=click.Path(path_type=Path), metavar="DEVICE", help="Write the device here.")
@click.option("--overwrite", is_flag=True, help="Let --out and --out-device replace what is there.")
@click.option("--json", "as_json", is_flag=True, help="Print the fit and the profile as one JSON document.")
def points(
    file: Path, engine: str, constants: tuple[str, ...], sources: tuple[str, ...], device: str, fitting_part: bool,
    perf: str, workers: int, date: str, out: Path | None, out_device: Path | None, overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    """Fit constants of an engine profile to the measured points in FILE, and say how well they are known.

    FILE is as for `mist validate`; used are its points of trust A and B whose engine and version the profile stands
    for. Fit few constants at a time: those that the points can't tell apart are named.

    \b
    Constants:
        step_overhead_ns, prefill_overhead_ns     host time per step, and more per step with prefills
        token_overhead_ns, request_overhead_ns    host time per sampled token, and per request
        time_factors.gemm and other classes       device time over that of the known kernels
        overhead_bytes                            memory that is neither weights nor activations nor KV
        device.efficiency.gemm_memory and others  share of the data sheet's rate, with --device

    \b
    Examples:
        mist calibrate points points.csv --engine vllm-0.10 --fit step_overhead_ns,time_factors.gemm
        mist calibrate points points.csv --engine vllm-0.10 --fit request_overhead_ns --out profile.yaml
        mist calibrate points points.csv --engine vllm-0.6-static --device mi300x \\
            --fit device.efficiency.gemm_memory --out-device mi300x.yaml
        mist run scenario.yaml --set clients.gpu.engine=./profile.yaml
    """
    from mist.calibration import profiles
    from mist.calibration.points import fit_points
    from mist.metrics import SCHEMA_VERSION
    from mist.scenario import catalogue
    from mist.scenario.outputs import check_file, check_not_read
    from mist.validation.points import read_points
    from mist.validation.score import TRUSTED

    named = list(dict.fromkeys(name.strip() for name in ",".join(constants).split(",") if name.strip()))
    if not named:
        raise click.UsageError("--fit names no constant; such as --fit step_overhead_ns")
    outputs = [path for path in (out, out_device) if path is not None]
    if len({path.resolve() for path in outputs}) < len(outputs):
        raise click.UsageError("--out and --out-device are one file")
    for path in outputs:
        check_file(path, overwrite=overwrite, inputs=[file, Path(engine), Path(device)])
    models, profile = perf_models(perf), profiles.read_profile(engine)
    hardware = catalogue.mapping("devices", catalogue.read("devices", device, Path())[1]) if device else None
    if out_device is not None and hardware is None:
        raise click.UsageError("--out-device needs a --device to start from")
    read = read_points(file, sources=sources, trusts=TRUSTED)
    check_not_read(outputs, profiles.request_lists(read))
    on = str(hardware["name"]) if hardware else ""
    found = fit_points(
        profiles.points_of(read, str(profile["name"]), device=on, only_fitting=fitting_part), file.parent, profile,
        named, device=hardware, perf=models, workers=workers,
        progress=lambda runs, misfit: click.echo(f"run {runs}: median misfit {100 * misfit:.1f} %", err=True),
    )  # fmt: skip
    fitted = profiles.fitted_profile(profile, found, read, date)
    if out is not None:
        profiles.write_profile(fitted, out)
    if out_device is not None and hardware is not None:
        profiles.write_profile(profiles.fitted_device(hardware, found, read, date), out_device)
    if as_json:
        print_json({"schema_version": SCHEMA_VERSION, **profiles.document(found), "profile": fitted})
        return
    click.echo(f"{table(profiles.rows(found))}\n\n{profiles.sentences(found)}")
    for warning in found.warnings:
        click.echo(warning, err=True)
    if out is not None:
        click.echo(f"The profile is {out}: name it in a scenario as engine: {_as_path(out)}", err=True)


def _as_path(path: Path) -> str:
    """As a scenario beside it would write it."""
    return str(path) if path.is_absolute() else f"./{path}"
