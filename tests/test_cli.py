"""The command `mist`: exit codes, what goes to stdout and stderr, files that are never overwritten, and its speed."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import mist
from mist.cli import main
from mist.errors import InvariantError
from mist.scenario import load

ROOT = Path(__file__).parent.parent

SCENARIO = """\
name: tiny
seed: 3
workload:
  arrivals: {poisson: {rate_per_s: 4}}
  num_requests: 40
  input_tokens: 300
  output_tokens: {uniform: {low: 1, high: 20}}
clients:
  gpu: {device: h100-sxm, count: 2, model: llama-3.1-8b}
"""


@pytest.fixture
def scenario(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(SCENARIO)
    return path


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def in_a_process(*arguments: object, **options: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", "from mist.cli import main; main(prog_name='mist')", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    return subprocess.Popen(command, env=environment, **options)


# run


def test_run_prints_a_table_to_stdout_only(scenario: Path) -> None:
    result = invoke("run", scenario)
    assert result.exit_code == 0, result.output
    assert "TTFT" in result.stdout
    assert "tiny" in result.stdout
    assert "\x1b" not in result.stdout
    assert result.stderr == ""


def test_run_prints_one_json_document(scenario: Path) -> None:
    result = invoke("run", scenario, "--json", "--check")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout, parse_constant=pytest.fail)
    assert document["requests"]["arrived"] == document["requests"]["finished"] == 40
    assert result.stdout.startswith('{\n  "')


def test_the_command_and_python_agree(scenario: Path) -> None:
    def untimed(document: dict[str, Any]) -> dict[str, Any]:
        document["simulator"].pop("timing")
        return document

    told = invoke("run", scenario, "--json", "--set", "clients.gpu.count=1", "--seed", 5)
    result = mist.run(scenario, seed=5, **{"clients.gpu.count": 1})
    assert untimed(json.loads(told.stdout)) == untimed(json.loads(json.dumps(result.summary())))
    assert isinstance(result, mist.Result)


def test_options_are_overrides(scenario: Path) -> None:
    options = [
        "--seed",
        9,
        "--warmup",
        1.5,
        "--window",
        "2:8",
        "--limit",
        7,
        "--rate-scale",
        2,
        "--set",
        "clients.gpu.tp=2",
    ]
    result = invoke("check", scenario, *options, "--resolved")
    assert result.exit_code == 0, result.output
    Path("resolved.yaml").write_text(result.stdout)
    found = load("resolved.yaml")
    assert (found.seed, found.warmup_s, found.window_s) == (9, 1.5, (2, 8))
    workload = found.tenants[""].workload
    assert (workload.limit, workload.rate_scale, found.clients["gpu"].tp) == (7, 2, 2)
    assert json.loads(invoke("run", scenario, "--json", "--limit", 7).stdout)["requests"]["arrived"] == 7


def test_out_holds_a_scenario_that_gives_the_same_bytes(scenario: Path) -> None:
    assert invoke("run", scenario, "--out", "a").exit_code == 0
    assert invoke("run", "a/scenario.yaml", "--out", "b").exit_code == 0
    names = sorted(path.name for path in Path("a").iterdir())
    assert names == [
        "changes.parquet",
        "loans.parquet",
        "requests.parquet",
        "scenario.yaml",
        "steps.parquet",
        "summary.json",
        "tasks.parquet",
        "transfers.parquet",
    ]
    for name in names:
        if name != "summary.json":
            assert Path("a", name).read_bytes() == Path("b", name).read_bytes(), name


def test_results_are_never_overwritten_unasked(scenario: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full, file = Path("full"), Path("file")
    full.mkdir()
    (full / "precious.txt").write_text("x")
    file.write_text("y")
    monkeypatch.setattr("mist.scenario.build.run", lambda *_, **__: pytest.fail("ran before it looked"))
    for option, path in (
        ("--out", full),
        ("--out", file),
        ("--trace", file),
        ("--trace", full),
        ("--trace", "no/t.json"),
    ):
        result = invoke("run", scenario, option, path)
        assert result.exit_code == 2
        assert str(path).split("/")[0] in result.stderr
        assert result.stdout == ""
    assert ((full / "precious.txt").read_text(), file.read_text()) == ("x", "y")


def test_overwrite_replaces_results(scenario: Path) -> None:
    assert invoke("run", scenario, "--out", "a").exit_code == 0
    assert invoke("run", scenario, "--out", "a").exit_code == 2
    assert invoke("run", scenario, "--out", "a", "--overwrite", "--limit", 3).exit_code == 0
    assert json.loads(Path("a/summary.json").read_text())["requests"]["arrived"] == 3


def test_a_timeline_is_written(scenario: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mist.scenario.result import Result as RunResult

    def write_timeline(self: RunResult, path: Path) -> None:
        Path(path).write_text("{}")

    if not hasattr(RunResult, "write_timeline"):
        monkeypatch.setattr(RunResult, "write_timeline", write_timeline, raising=False)
    assert invoke("run", scenario, "--trace", "t.json").exit_code == 0
    assert isinstance(json.loads(Path("t.json").read_text()), dict | list)


def test_plugins(scenario: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mist import registry

    registry.names("routing")
    monkeypatch.setitem(registry._registered, "routing", dict(registry._registered["routing"]))
    Path("first.py").write_text(
        "from dataclasses import dataclass\n"
        "from mist.registry import register\n"
        "@register('routing', 'first_of_all')\n"
        "@dataclass\n"
        "class First:\n"
        '    """Always the first."""\n'
        "    def choose(self, task, views, now):\n"
        "        return views[0]\n"
    )
    ran = invoke("run", scenario, "--plugin", "first.py", "--set", "routing=first_of_all", "--json")
    assert ran.exit_code == 0, ran.output
    assert "Always the first." in invoke("list", "policies").stdout
    Path("broken.py").write_text("1 / 0")
    for bad in ("broken.py", "missing.py"):
        told = invoke("run", scenario, "--plugin", bad)
        assert (told.exit_code, told.stdout) == (2, "")
        assert bad in told.stderr
    told = invoke("run", scenario, "--plugin", "a.py", "--plugin", "b.py", "--warmup", -1, "--set", "clients.gpu.tp=3")
    assert all(text in told.stderr for text in ("a.py", "b.py", "warmup_s=-1.0: must be", "--set clients.gpu.tp=3: "))


def test_a_failed_plugin_is_told_of_a_good_scenario_too(scenario: Path) -> None:
    told = invoke("check", scenario, "--plugin", "missing.py")
    assert (told.exit_code, told.stdout) == (2, "")
    assert "missing.py" in told.stderr


def test_an_option_is_named_once(scenario: Path) -> None:
    told = invoke("run", scenario, "--limit", 0).stderr
    assert told.startswith("workload.limit=0: must be at least 1, not 0\n")
    assert "at least 1e-06" in invoke("check", scenario, "--rate-scale", "1e-300").stderr


def test_a_window_may_be_a_length(scenario: Path) -> None:
    assert "window_s: [0.0, 540.0]" in invoke("check", scenario, "--window", 540, "--resolved").stdout
    assert "not a window" in invoke("check", scenario, "--window", "x").stderr


def test_what_is_no_scenario_is_told(tmp_path: Path) -> None:
    with pytest.raises(mist.ScenarioError, match="can't be 5"):
        mist.run(5)  # type: ignore[arg-type]
    assert f"{tmp_path} holds no YAML file" in invoke("run", tmp_path / "gone.yaml").stderr


# errors


def test_problems_go_to_stderr_with_places(scenario: Path) -> None:
    scenario.write_text(SCENARIO.replace("seed: 3", "sede: 3").replace("h100-sxm", "h100-smx"))
    for command in ("run", "check"):
        result = invoke(command, scenario, "--set", "clients.gpu.tp=0")
        assert (result.exit_code, result.stdout) == (2, "")
        assert f"{scenario}:2:1: " in result.stderr
        assert f"{scenario}:9:17: " in result.stderr
        assert "--set clients.gpu.tp=0: " in result.stderr
        assert "did you mean 'seed'?" in result.stderr
        assert "\x1b" not in result.stderr
        assert "Traceback" not in result.stderr


def test_files_that_cannot_be_read(scenario: Path) -> None:
    for path in ("missing.yaml", ".", "tiny.yaml/x", "a" * 300):
        result = invoke("run", path)
        assert (result.exit_code, result.stdout) == (2, ""), path
        assert result.stderr.startswith(path)
    assert "tiny.yaml" in invoke("run", "tny.yaml").stderr


def test_unknown_options_and_commands_exit_with_2(scenario: Path) -> None:
    for arguments in (["rum", scenario], ["run"], ["run", scenario, "--sed", "1"], ["list", "things"]):
        assert invoke(*arguments).exit_code == 2


def wrapped(cause: BaseException) -> RuntimeError:
    """What Python 3.11 makes of an interrupt while a class is being made."""
    error = RuntimeError("Error calling __set_name__ on 'Field' instance")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (InvariantError("busy 3 + idle 4 != elapsed 8"), 3, "busy 3 + idle 4"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (wrapped(KeyboardInterrupt()), 130, "interrupted"),
        (PermissionError(13, "Permission denied", "/out"), 2, "/out: Permission denied"),
        (OSError(28, "No space left on device"), 2, "No space left"),
    ],
)
def test_exit_codes(
    scenario: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, says: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("mist.scenario.build.run", fail)
    result = invoke("run", scenario)
    assert (result.exit_code, result.stdout) == (code, "")
    assert says in result.stderr


def test_other_errors_are_bugs_and_keep_their_traceback(scenario: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("mist.scenario.build.run", fail)
    assert isinstance(invoke("run", scenario).exception, ZeroDivisionError)


TELLS = """\
from mist.registry import register
from mist.routing.round_robin import RoundRobin

@register("routing", "tells")
class Tells(RoundRobin):
    is_told = False

    def choose(self, *given):
        if not self.is_told:
            self.is_told = True
            print("ready", flush=True)
        return super().choose(*given)
"""


def test_an_interrupt_ends_a_run_cleanly(scenario: Path) -> None:
    Path("tells.py").write_text(TELLS)
    options = ["--plugin", "tells.py", "--set", "workload.num_requests=3000000", "--set", "routing=tells"]
    options += ["--out", "never"]
    # whoever runs the tests in the background may have had interrupts ignored, which a process inherits
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = in_a_process("run", scenario, *options, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    finally:
        signal.signal(signal.SIGINT, heard)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, b"")
    assert err.strip().endswith(b"interrupted")
    assert b"Traceback" not in err
    assert not list(scenario.parent.glob("*never*"))


def test_a_closed_pipe_is_no_traceback(scenario: Path) -> None:
    process = in_a_process("list", "policies", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert b"Traceback" not in process.stderr.read()
    process.wait(timeout=30)
    process.stderr.close()


def test_colour_and_progress_are_for_terminals(scenario: Path) -> None:
    try:
        leader, follower = pty.openpty()
    except OSError:
        pytest.skip("this machine has no pseudo-terminals")
    bad = in_a_process("run", scenario, "--set", "seed=x", stdout=subprocess.PIPE, stderr=follower)
    assert bad.wait(timeout=30) == 2
    assert b"\x1b[31m" in os.read(leader, 65536)
    good = in_a_process("run", scenario, "--json", stdout=subprocess.PIPE, stderr=follower)
    out, _ = good.communicate(timeout=60)
    assert json.loads(out)["requests"]["finished"] == 40
    assert b"simulating" in os.read(leader, 65536)
    os.close(leader)
    os.close(follower)


# check, schema, list


def test_check_prints_the_essentials(scenario: Path) -> None:
    result = invoke("check", scenario)
    assert result.exit_code == 0, result.output
    for text in ("prefill -> decode", "2 x 1 h100-sxm", "meta-llama/Llama-3.1-8B", "weights 14.96", "tokens of KV"):
        assert text in result.stdout
    told = invoke("check", scenario, "--set", "clients.gpu.kv_cache.num_blocks=123").stdout
    assert "123 blocks of 16 as given" in told


def test_check_reads_traces(scenario: Path) -> None:
    Path("mine.csv").write_text("at_ms,prompt,answer\n0,100,10\n1500,301,20\n")
    columns = "{arrival: at_ms, input_tokens: prompt, output_tokens: answer}"
    trace = ("--set", f"workload={{trace: mine.csv, columns: {columns}}}")
    told = invoke("check", scenario, *trace).stdout
    assert "  mine.csv: 2 requests over 1.5 s, 200 tokens in and 15 out in the mean\n" in told
    wrong = invoke("check", scenario, *trace, "--set", "workload.columns.output_tokens=reply")
    assert wrong.exit_code == 2
    assert "mine.csv:1: no column 'reply'" in wrong.stderr
    assert wrong.stdout == ""


def test_schema_is_json(scenario: Path) -> None:
    result = invoke("schema")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["properties"]["clients"]["description"]


@pytest.mark.parametrize(
    "what",
    ["devices", "models", "engines", "steps", "memories", "policies", "perf", "workloads", "networks", "pipelines"],
)
def test_lists(what: str) -> None:
    rows = json.loads(invoke("list", what, "--json").stdout)
    text = invoke("list", what).stdout
    assert rows
    assert "Undefined" not in text
    if what in ("policies", "pipelines", "perf"):
        assert max(map(len, text.splitlines())) <= 100
        assert all(word in text for row in rows for word in row["description"].split())
    else:
        assert len(text.splitlines()) == len(rows) + 1
    assert all(row["name"] in text for row in rows)
    assert len({tuple(row) for row in rows}) == 1


def test_the_prices_of_a_list(scenario: Path) -> None:
    rows = {row["device"]: row for row in json.loads(invoke("list", "prices", "reference", "--json").stdout)}
    assert rows["h100-sxm"]["on_demand"] == 2.95
    assert rows["h100-sxm"]["spot"] == 1.25
    assert all(row["source"] and row["date"] for row in rows.values())
    text = invoke("list", "prices", "rental").stdout
    assert "h100-sxm" in text
    assert "three-year rental" in text
    Path("ours.yaml").write_text("devices: {h100-sxm: 2.2}")
    assert "2.2" in invoke("list", "prices", "ours.yaml").stdout
    unknown = invoke("list", "prices", "nebis")
    assert (unknown.exit_code, "did you mean 'nebius'" in unknown.stderr) == (2, True)
    assert invoke("list", "devices", "h100-sxm").exit_code == 2


def test_performance_models_are_listed_with_the_defaults_that_are_made_for_them() -> None:
    rows = {row["name"]: row for row in json.loads(invoke("list", "perf", "--json").stdout)}
    assert {row["kind"] for row in rows.values()} == {"perf"}
    assert {"kernels", "roofline", "ivf_pq", "cpu_text"} <= set(rows)
    assert "tokenize={ns_per_token: 1400.0, " in rows["cpu_text"]["parameters"]


def test_lists_name_what_the_first_release_promises() -> None:
    def names(what: str) -> str:
        return json.dumps(
            [[row["name"], row.get("aliases")] for row in json.loads(invoke("list", what, "--json").stdout)]
        )

    for device in ("h100-sxm", "a100-sxm-80gb", "h200-sxm", "l40s", "mi300x"):
        assert device in names("devices")
    for model in ("Llama-3.1-70B-Instruct", "Llama-2-7b", "Mistral-7B", "Qwen3-8B", "Qwen3-32B"):
        assert model in names("models")
    for policy in ("chunked", "continuous", "static", "round_robin", "least_outstanding", "roofline", "poisson"):
        assert policy in names("policies")


def test_version_and_help() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert mist.__version__ == declared
    assert declared in invoke("--version").stdout
    for command in ([], ["run"], ["check"], ["schema"], ["list"]):
        result = invoke(*command, "--help")
        assert result.exit_code == 0
        assert "mist " in result.stdout
        assert max(map(len, result.stdout.splitlines())) <= 100
    assert re.search(r"mist run scenario\.yaml --set", invoke("run", "--help").stdout)


def test_help_of_list_says_each_choice_in_one_piece() -> None:
    text = invoke("list", "--help").stdout
    assert text.splitlines()[0] == "Usage: mist list [OPTIONS] WHAT [NAME]"
    known = next(param for param in main.commands["list"].params if param.name == "what").type.choices
    assert set(known) <= set(re.findall(r"[a-z]+", text.partition("Examples:")[0]))
    wrong = invoke("list", "things")
    assert wrong.exit_code == 2
    assert "WHAT" in wrong.stderr
    assert "policies" in re.findall(r"[a-z]+", wrong.stderr)


def test_the_scenario_in_the_help_is_valid(tmp_path: Path) -> None:
    text = invoke("--help").stdout
    block = text[text.index("A scenario is") : text.index("Then")].split("\n", 1)[1]
    path = tmp_path / "help.yaml"
    path.write_text(block)
    assert load(path).clients["gpu"].device.name == "h100-sxm"


def test_help_and_import_load_nothing_heavy() -> None:
    loaded = (
        "import sys, mist, mist.cli; print(sorted(set(sys.modules) & {'numpy', 'pydantic', 'pyarrow', 'rich', 'yaml'}))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    assert subprocess.run([sys.executable, "-c", loaded], env=environment, capture_output=True).stdout == b"[]\n"


def test_unknown_names_of_the_package() -> None:
    with pytest.raises(AttributeError, match="nothing"):
        mist.nothing  # noqa: B018
