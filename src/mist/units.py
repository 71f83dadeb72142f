"""Integer-nanosecond time, SI and IEC constants, and the parsing of "80 GiB", "450 GB/s", "1.5 ms".

Inside the simulator time is an `int` of nanoseconds and sizes are `int` bytes; seconds and gigabytes
appear only at the edges. GB is 1e9, GiB is 2**30, and the name says which.
"""

from __future__ import annotations

import re

NS_PER_US = 1_000
NS_PER_MS = 1_000_000
NS_PER_S = 1_000_000_000

KB, MB, GB, TB = 10**3, 10**6, 10**9, 10**12
KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40

_TIME_NS = {"ns": 1, "us": NS_PER_US, "µs": NS_PER_US, "ms": NS_PER_MS, "s": NS_PER_S,
            "min": 60 * NS_PER_S, "h": 3600 * NS_PER_S}  # fmt: skip
_BYTES = {"B": 1, "kB": KB, "KB": KB, "MB": MB, "GB": GB, "TB": TB,
          "KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": TIB}  # fmt: skip
_QUANTITY = re.compile(r"\s*([0-9][0-9_]*(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?)\s*([A-Za-zµ/]+)\s*")


def seconds_to_ns(seconds: float) -> int:
    """`seconds` as the nearest whole number of nanoseconds."""
    return round(seconds * NS_PER_S)


def parse_time_ns(text: str) -> int:
    """Nanoseconds of a quantity like "1.5 ms"; ValueError names the units that are known."""
    value, unit = _split(text, _TIME_NS)
    return round(value * _TIME_NS[unit])


def parse_bytes(text: str) -> int:
    """Bytes of a quantity like "80 GiB" or "80 GB"; ValueError names the units that are known."""
    value, unit = _split(text, _BYTES)
    return round(value * _BYTES[unit])


def parse_bytes_per_s(text: str) -> float:
    """Bytes per second of a quantity like "450 GB/s"; ValueError names the units that are known."""
    value, unit = _split(text, {f"{u}/s": b for u, b in _BYTES.items()})
    return value * _BYTES[unit.removesuffix("/s")]


def _split(text: str, units: dict[str, int]) -> tuple[float, str]:
    match = _QUANTITY.fullmatch(text)
    if match is None or match[2] not in units:
        raise ValueError(f"{text!r} is not a number with a unit of {', '.join(units)}")
    return float(match[1]), match[2]
