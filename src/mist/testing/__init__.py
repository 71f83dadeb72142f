"""For tests, of MIST and of what plugs into it: contract suites to inherit, and a small cluster to play workloads on.

The one package that may import all others; nothing imports it, and it never imports a test framework.
"""

from mist.testing.admission import AdmissionContract
from mist.testing.cluster import (
    LinearSteps,
    Run,
    SmallScenario,
    engine,
    play,
    random_scenario,
    record_bytes,
    table,
    with_hints,
)
from mist.testing.contracts import (
    BatchingContract,
    EvictionContract,
    PerfModelContract,
    PipelineContract,
    RoutingContract,
    small_deployment,
)
from mist.testing.orders import OrderContract

__all__ = [
    "AdmissionContract",
    "BatchingContract",
    "EvictionContract",
    "LinearSteps",
    "OrderContract",
    "PerfModelContract",
    "PipelineContract",
    "RoutingContract",
    "Run",
    "SmallScenario",
    "engine",
    "play",
    "random_scenario",
    "record_bytes",
    "small_deployment",
    "table",
    "with_hints",
]
