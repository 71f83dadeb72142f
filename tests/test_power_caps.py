"""Power caps: the clock that a device keeps, what that does to steps, and what a user may write.

Guards that a cap at the TDP is none, that lower caps never make a step faster, and that only compute slows down.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mist import Scenario, run
from mist.errors import ScenarioError
from mist.hardware import BASE_POWER
from mist.perf import Deployment, PerfModel
from mist.perf.kernels import Kernels
from mist.perf.roofline import Roofline
from mist.request import Step
from mist.testing import small_deployment
from test_hardware import device
from test_kernels_tables import write_system

CLOCKS = (1.0, 0.9, 0.7, 0.4)
PREFILL = Step(0, 0, [(2048, 0)], 2048, 1)
DECODE = Step(4, 8192, [], 0, 4)
Prepared = Callable[[Deployment], PerfModel]


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_system(tmp_path_factory.mktemp("tables"))


@pytest.fixture(params=["roofline", "kernels"])
def prepared(
    request: pytest.FixtureRequest, made_up: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Prepared:
    monkeypatch.setenv("MIST_CACHE", str(tmp_path))

    def prepare(deployment: Deployment) -> PerfModel:
        kernels = Kernels(system="made_up", tables=str(made_up), fallback=Roofline())
        perf: PerfModel = kernels if request.param == "kernels" else Roofline()
        assert perf.supports(deployment) is None
        perf.prepare(deployment)
        return perf

    return prepare


def test_the_clock_follows_the_cube_root_above_the_base() -> None:
    one = device("h100-sxm")
    assert one.clock_under(None) == one.clock_under(700) == 1.0
    assert one.clock_under(350) == pytest.approx(((350 - 168) / (700 - 168)) ** (1 / 3))
    clocks = [one.clock_under(w) for w in range(200, 701, 50)]
    assert clocks == sorted(set(clocks))
    for cap in (701, BASE_POWER * 700, 0):
        with pytest.raises(ValueError, match="capped above 168 W"):
            one.clock_under(cap)
    with pytest.raises(ValueError, match="no TDP"):
        replace(one, tdp_w=None).clock_under(300)


def test_compute_slows_down_with_the_clock_and_memory_does_not(prepared: Prepared) -> None:
    models = [prepared(replace(small_deployment(), clock=clock)) for clock in CLOCKS]
    for step in (PREFILL, DECODE, Step(4, 8192, [(512, 0)], 512, 5), Step(0, 0, [(64, 4096)], 64, 1)):
        times = [m.step_time(step) for m in models]
        assert times == sorted(times)
        assert times[-1] <= times[0] / CLOCKS[-1] + 1
        for m in models:
            assert sum(o.time_ns for o in m.explain(step)) == pytest.approx(m.step_time(step), abs=2)
    assert models[-1].step_time(PREFILL) > 1.1 * models[0].step_time(PREFILL)
    assert models[-1].step_time(DECODE) == pytest.approx(models[0].step_time(DECODE), rel=1e-3)
    by_name = [{o.name: o for o in m.explain(PREFILL)} for m in (models[0], models[2])]
    for name, full in by_name[0].items():
        ratio = by_name[1][name].time_ns / full.time_ns
        assert 1 - 1e-9 <= ratio <= 1 / CLOCKS[2] + 1e-9, name
        if full.bound_by != "compute":
            assert ratio < 1.2, name


def scenario(**pool: Any) -> Scenario:
    return Scenario.from_mapping(
        {
            "workload": {
                "arrivals": {"poisson": {"rate_per_s": 5}}, "num_requests": 20,
                "input_tokens": 3000, "output_tokens": 20,
            },
            "clients": {"gpu": {"device": "h100-sxm", "model": "llama-3.1-8b", "perf": "roofline", **pool}},
        }
    )  # fmt: skip


def test_a_cap_at_the_tdp_is_none_and_lower_ones_delay_first_tokens() -> None:
    records = {cap: run(scenario(power_cap_w=cap)).records for cap in (None, 700, 500, 300)}
    for name in ("requests", "tasks", "steps"):
        tables = [getattr(records[cap], name).as_columns() for cap in (None, 700)]
        assert {k: v.tolist() for k, v in tables[0].items()} == {k: v.tolist() for k, v in tables[1].items()}
    first = [r.requests.as_columns()["first_token_ns"].sum() for r in (records[700], records[500], records[300])]
    assert first == sorted(set(first))


@pytest.mark.parametrize("cap", [0, 100, 701, "much"])
def test_other_caps_are_refused(cap: Any) -> None:
    with pytest.raises(ScenarioError) as caught:
        scenario(power_cap_w=cap)
    assert "power_cap_w" in str(caught.value)
    assert ("701 W is above the TDP of 700 W" in str(caught.value)) == (cap == 701)
