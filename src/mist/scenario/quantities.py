"""Quantities with units as a user writes them: bandwidths, latencies and sizes, kept as text and checked when read.

A part of the schema, below its sections. It never converts: a section's properties do, where the run is built.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from mist.scenario.named import problem, short
from mist.units import NS_PER_S, parse_bytes, parse_bytes_per_s, parse_time_ns

#: a third of a century, well within the simulator's clock
MAX_SECONDS = 1e9
MAX_BYTES_PER_S = 1e18
MAX_BYTES = 1e18


def _bandwidth(value: str) -> str:
    try:
        rate = parse_bytes_per_s(value)
    except (ValueError, OverflowError) as error:
        raise problem(str(error), "such as 50 GB/s") from None
    if not 1 <= rate <= MAX_BYTES_PER_S:
        raise problem(f"a bandwidth of {short(value)} is out of range", "such as 50 GB/s")
    return value


def _latency(value: str) -> str:
    try:
        time_ns = parse_time_ns(value)
    except (ValueError, OverflowError) as error:
        raise problem(str(error), "such as 1 ms") from None
    if time_ns > MAX_SECONDS * NS_PER_S:
        raise problem(f"a latency of {short(value)} is out of range", "such as 1 ms")
    return value


def _size(value: str) -> str:
    try:
        num_bytes = parse_bytes(value)
    except (ValueError, OverflowError) as error:
        raise problem(str(error), "such as 512 GiB") from None
    if not 1 <= num_bytes <= MAX_BYTES:
        raise problem(f"a size of {short(value)} is out of range", "such as 512 GiB")
    return value


Seconds = Annotated[float, Field(ge=0, le=MAX_SECONDS)]
Bandwidth = Annotated[str, AfterValidator(_bandwidth)]
Latency = Annotated[str, AfterValidator(_latency)]
Size = Annotated[str, AfterValidator(_size)]
