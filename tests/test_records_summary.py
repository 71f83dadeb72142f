"""Runs that keep a summary and no tables: the same figures, whatever the blocks that they are counted in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import mist
from mist.cli import main
from mist.coordinator import Coordinator
from mist.metrics import tally
from mist.records import StepTable

EXAMPLES = Path(__file__).parent.parent / "examples"
GPU: dict[str, Any] = {"device": "h100-sxm", "model": "llama-3.1-8b", "engine": "vllm-0.10"}
WORKLOAD: dict[str, Any] = {
    "arrivals": {"poisson": {"rate_per_s": 40}}, "num_requests": 60,
    "input_tokens": {"lognormal": {"mean": 600, "cv": 1}}, "output_tokens": {"lognormal": {"mean": 60, "cv": 1}},
}  # fmt: skip


def count_often(patch: pytest.MonkeyPatch) -> None:
    """Count whenever three requests have left."""
    leave = Coordinator._leave

    def leave_and_tell(self: Coordinator, *arguments: Any, **more: Any) -> None:
        leave(self, *arguments, **more)
        assert self.on_progress is not None
        if self.num_left % 3 == 0:
            self.on_progress(self.num_left)

    patch.setattr(tally, "BLOCK_ROWS", 1)
    patch.setattr(Coordinator, "_leave", leave_and_tell)


def both(scenario: Any, **overrides: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The summaries of a run counted at once, and of one counted as requests leave, without tables."""
    whole = mist.run(scenario, **overrides)
    with pytest.MonkeyPatch.context() as patch:
        count_often(patch)
        parts = mist.run(scenario, records="summary", **overrides)
    assert not len(parts.records.tasks)
    assert not len(parts.records.steps)
    assert whole.simulator == parts.simulator
    return whole.metrics, parts.metrics


#: sums of floating-point numbers: they depend on their order by some 1e-15
FLOATING = ("usage", "cost", "energy")


def agree(whole: dict[str, Any], parts: dict[str, Any]) -> None:
    assert list(whole) == list(parts)
    for key in whole:
        if key in FLOATING:
            near(whole[key], parts[key])
        else:
            assert whole[key] == parts[key], key


def near(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            near(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            near(*pair)
    else:
        assert one == (pytest.approx(other, rel=1e-9) if isinstance(other, float) else other)


SMALL = {
    "agents": 20, "cascade": 40, "chat-support": 40, "code-generation": 40, "demo": 40,
    "guarded-qa": 40, "news-search": 3, "prefill-decode": 60, "question-answering": 40, "reasoning-math": 15,
    "research-agent": 8, "shared-host": 40,
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(SMALL))
def test_examples_have_the_same_figures_in_blocks(name: str) -> None:
    agree(*both(EXAMPLES / f"{name}.yaml", **{"workload.limit": SMALL[name]}))


DEVICES = {
    "one": {"gpu": GPU},
    "several": {"gpu": {**GPU, "count": 3}},
    "little room": {"gpu": {**GPU, "kv_cache": {"num_blocks": 260}, "batching": {"chunked": {"max_num_seqs": 16}}}},
    "lanes": {"gpu": {**GPU, "pp": 2}},
    "apart": {"first": {**GPU, "serves": ["prefill"]}, "then": {**GPU, "serves": ["decode"], "count": 2}},
    "two kinds": {"gpu": GPU, "slow": {**GPU, "device": "a100-sxm-80gb"}},
    "speculating": {"gpu": {**GPU, "speculation": {"num_draft_tokens": 3, "acceptance": 0.6, "method": "ngram"}}},
}
LOADS: dict[str, dict[str, Any]] = {
    "poisson": {},
    "impatient": {"timeout_s": 0.7},
    "leaving": {"cancellation": {"probability": 0.5, "after_ms": 200}},
    "too much": {"arrivals": {"poisson": {"rate_per_s": 400}}},
    "closed": {"arrivals": {"closed_loop": {"concurrency": 7}}},
    "at once": {"arrivals": "all_at_once"},
}
ENDS: dict[str, dict[str, Any]] = {
    "all": {},
    "cut": {"max_time_s": 0.8},
    "window": {"window_s": "0.2:0.9"},
    "late": {"warmup_s": 0.5},
    "slo": {"slo": {"ttft_s": {"p99": 0.2}, "itl_s": {"p90": 0.05}, "e2e_s": {"mean": 1}}},
    "down": {"events": [{"at_s": 0.3, "client_down": "gpu-0", "for_s": 0.4}]},
}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@example("several", "impatient", "all", 5)  # what is cancelled within a step is written after its request has left
@example("little room", "impatient", "all", 5)
@given(st.sampled_from(list(DEVICES)), st.sampled_from(list(LOADS)), st.sampled_from(list(ENDS)), st.integers(0, 99))
def test_random_scenarios_have_the_same_figures_in_blocks(devices: str, load: str, end: str, seed: int) -> None:
    clients = DEVICES[devices]
    if load in ("too much", "at once") and end in ("window", "late"):
        end = "all"  # nobody arrives then
    if end == "down" and "gpu" not in clients:
        end = "all"
    if end == "down" and clients["gpu"].get("count", 1) == 1 and len(clients) == 1:
        clients = {"gpu": {**clients["gpu"], "count": 2}}
    agree(*both({"seed": seed, "workload": {**WORKLOAD, **LOADS[load]}, "clients": clients, **ENDS[end]}))


def test_tenants_have_the_same_figures_in_blocks() -> None:
    agree(*both({
        "seed": 3, "clients": {"gpu": {**GPU, "count": 2}},
        "tenants": {
            "chat": {"workload": {**WORKLOAD, "timeout_s": 1.5}, "slo": {"itl_s": {"p99": 0.1}}},
            "batch": {"workload": {**WORKLOAD, "arrivals": {"closed_loop": {"concurrency": 9}}}},
        },
    }))  # fmt: skip


def test_blocks_are_counted_while_the_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more rows than a few blocks are there at any time, and none of an earlier request."""
    most, add = [0], tally.Tally.add

    def watched(self: tally.Tally, settled_ns: int, needed_ns: int) -> None:
        most[0] = max(most[0], len(self.records.tasks) + len(self._tasks.get("request", ())))
        add(self, settled_ns, needed_ns)

    monkeypatch.setattr(tally.Tally, "add", watched)
    count_often(monkeypatch)
    mist.run({"workload": {**WORKLOAD, "num_requests": 400}, "clients": {"gpu": GPU}}, records="summary")
    assert 0 < most[0] < 200


def test_a_table_gives_what_was_written_since() -> None:
    """Steps one by one, those of spans among them, whenever it was asked before, and whether it forgets them."""
    rows = [(0, 10 * i, 10 * i + 10, 1, 8, 2, 40 + 2 * i, 5, 0) for i in range(9)]
    for forgetful in (False, True):
        table, found = StepTable(), []
        mark = table.mark()
        for first in range(0, 9, 3):
            table.append(rows[first])
            last = [(0, 10 * i, 10 * i + 10, 0, 0, 2, 40 + 2 * i, 6 + i, 1) for i in (first + 1, first + 2)]
            table.append_span(0, 2, last[0][6], 1, last[0][1], [each[2] for each in last], [each[7] for each in last])
            rows[first + 1 : first + 3] = last
            found += list(zip(*(column.tolist() for column in table.since(mark).values()), strict=True))
            if forgetful:
                table.forget()
                assert len(table) == 0
            mark = table.mark()
        assert found == rows
        assert len(table) == (0 if forgetful else 9)


# --- what isn't there is said ---


def test_a_summary_has_no_tables(tmp_path: Path) -> None:
    scenario = {"workload": WORKLOAD, "clients": {"gpu": GPU}}
    result = mist.run(scenario, records="summary")
    for name in ("requests", "steps", "tasks", "transfers", "changes"):
        with pytest.raises(mist.ScenarioError, match="kept its summary, and no tables"):
            getattr(result, name)
    mist.run(scenario).write(tmp_path / "out")
    result.write(tmp_path / "out", overwrite=True)
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == ["scenario.yaml", "summary.json"]
    assert "finished" in str(result)


@pytest.mark.parametrize(
    ("options", "told"),
    [({"records": "none"}, "known: full, summary"), ({"records": "summary", "check": True}, "no tables to check")],
)
def test_what_a_summary_cannot_do_is_an_error(options: dict[str, Any], told: str) -> None:
    with pytest.raises(mist.ScenarioError, match=told):
        mist.run({"workload": WORKLOAD, "clients": {"gpu": GPU}}, **options)


def test_the_command_line_has_both(tmp_path: Path) -> None:
    path = tmp_path / "scenario.yaml"
    path.write_text(json.dumps({"workload": WORKLOAD, "clients": {"gpu": GPU}}))
    shown = [json.loads(CliRunner().invoke(main, ["run", str(path), "--json", *more]).stdout)
             for more in ([], ["--records", "summary"])]  # fmt: skip
    for each in shown:
        del each["simulator"]["timing"]
    assert shown[0] == shown[1]
    for option in (["--check"], ["--trace", str(tmp_path / "t.json")]):
        found = CliRunner().invoke(main, ["run", str(path), "--records", "summary", *option])
        assert found.exit_code == 2
        assert "need all records" in found.stderr
    found = CliRunner().invoke(main, ["run", str(path), "--records", "summary", "--out", str(tmp_path / "out")])
    assert found.stderr.endswith("summary.json, scenario.yaml\n")
