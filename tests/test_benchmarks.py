"""The benchmarks: every scenario loads and has counts, the smallest one runs as told, a start reads only its files.

Counts are compared where the run is quick; no time is ever judged here. The rest is `make bench`.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

from mist.errors import ScenarioError
from mist.scenario import catalogue, load

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SCENARIOS = sorted((BENCHMARKS / "scenarios").glob("*.yaml"))
COUNTS = yaml.safe_load((BENCHMARKS / "counts.yaml").read_text())
TRACES = ("agentic", "azure-conversation", "mooncake-conversation")
#: names that a scenario may use although no file is called so
OFTEN = ("meta-llama/Llama-3.1-70B-Instruct", "meta-llama/Llama-3.1-8B-Instruct", "H100-SXM")


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_every_scenario_loads_and_has_counts(path: Path) -> None:
    assert list(COUNTS[path.stem]) == ["requests", "steps", "events"]
    try:
        scenario = load(path)
    except ScenarioError as error:
        if path.stem in TRACES and all("is not there" in problem.message for problem in error.problems):
            pytest.skip("needs the public traces of MIST_DATA")
        raise
    assert scenario.name == path.stem.replace("all-pipelines", "all pipelines")
    assert "seed" in yaml.safe_load(path.read_text())
    drawn = [t.workload.sessions or t.workload.trace or t.workload.num_requests for t in scenario.tenants.values()]
    if all(isinstance(number, int) for number in drawn):
        assert COUNTS[path.stem]["requests"] == sum(drawn)


def test_counts_are_of_scenarios_that_are_there() -> None:
    assert set(COUNTS) == {path.stem for path in SCENARIOS}


def bench(*arguments: str, folder: Path = BENCHMARKS) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(folder / "run.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent / "src")}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def copy_of_the_smallest(folder: Path) -> Path:
    """A folder like `benchmarks` with one scenario, whose counts say one event more."""
    (folder / "scenarios").mkdir()
    for name in ("run.py", "scenarios/start-up.yaml"):
        (folder / name).write_text((BENCHMARKS / name).read_text())
    wrong = COUNTS["start-up"] | {"events": COUNTS["start-up"]["events"] + 1}
    (folder / "counts.yaml").write_text(yaml.safe_dump({"start-up": wrong}))
    return folder


def test_the_smallest_scenario_runs_with_its_counts() -> None:
    done = bench("start-up", "--json")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)
    assert {key: row[key] for key in COUNTS["start-up"]} == COUNTS["start-up"]
    assert row["steps_per_request"] == COUNTS["start-up"]["steps"]
    assert all(row[key] > 0 for key in ("run_s", "requests_per_s", "steps_per_s", "cpu_s", "peak_mib"))
    assert "1/1 start-up" in done.stderr


def test_other_counts_are_told_and_can_be_updated(tmp_path: Path) -> None:
    folder = copy_of_the_smallest(tmp_path)
    done = bench("start-up", folder=folder)
    events = COUNTS["start-up"]["events"]
    assert done.returncode == 1
    assert f"start-up: {events} events instead of {events + 1}\n" in done.stderr
    assert "--update" in done.stderr
    assert bench("start-up", "--update", folder=folder).returncode == 0
    assert yaml.safe_load((folder / "counts.yaml").read_text()) == {"start-up": COUNTS["start-up"]}


def test_what_is_not_here_is_skipped_and_what_is_wrong_is_not(tmp_path: Path) -> None:
    folder = copy_of_the_smallest(tmp_path)
    scenario = folder / "scenarios" / "start-up.yaml"
    text = scenario.read_text()
    scenario.write_text(text.replace("workload: {", "workload: {trace: no/such/trace.csv} #"))
    done = bench(folder=folder)
    assert done.returncode == 0, done.stderr
    assert "skipped" in done.stdout
    assert "MIST_DATA" in done.stdout
    scenario.write_text(text.replace("num_requests", "num_request"))
    assert bench(folder=folder).returncode != 0


@pytest.mark.parametrize(
    "kind", ["acceptance", "devices", "engines", "memories", "models", "networks", "steps", "workloads"]
)
def test_a_catalogue_file_is_called_by_a_name_of_its_entry(kind: str) -> None:
    for entry in catalogue.entries(kind):
        stem = Path(entry.source.root.place.file).stem
        assert catalogue._index(kind)[stem] is entry
        assert catalogue._entry(kind, stem.upper()) is entry


def test_a_start_reads_only_the_catalogue_files_that_are_named(parsed_files: Counter[str]) -> None:
    load(BENCHMARKS / "scenarios" / "start-up.yaml")
    named = {"devices/h100-sxm", "models/llama-3.1-70b", "engines/vllm-0.10", "prices/reference"}
    assert parsed_files == Counter({f"mist/data/{name}.yaml": 1 for name in named})


@pytest.mark.parametrize("name", OFTEN)
def test_other_names_are_found_too(name: str) -> None:
    kind = "models" if "/" in name else "devices"
    assert catalogue.read(kind, name, Path())[0] == catalogue.read(kind, name.lower(), Path())[0]


def test_help_and_a_run_import_nothing_that_they_do_not_need() -> None:
    heavy = ("numpy", "pydantic", "yaml", "rich", "scipy", "pyarrow", "mist.scenario")
    program = f"""
import sys
from mist.cli import main
main(sys.argv[1:], standalone_mode=False)
print("imported", [name for name in {heavy} if name in sys.modules])
"""
    run = ("run", str(BENCHMARKS / "scenarios" / "start-up.yaml"))
    for arguments, needed in ((("--help",), []), (run, ["numpy", "pydantic", "yaml", "rich", "mist.scenario"])):
        environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent / "src")}
        command = [sys.executable, "-c", program, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        assert done.stdout.splitlines()[-1] == f"imported {needed}"
