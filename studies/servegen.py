"""ServeGen's reasoning workload as requests: one day of DeepSeek-R1 on Alibaba Cloud, drawn from published figures.

Published are, for each of 73 clients, rates by ten minutes and distributions of lengths by six hours, no requests. It
is read by quantile_tables.py and nothing else; arrivals are left out.
"""

from __future__ import annotations

import ast
import csv
import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mist.workload import RequestTable

#: of the rates, and of the distributions
RATE_S, WINDOW_S = 600, 21_600


@dataclass(frozen=True)
class ServeGen:
    """As many requests as the rates make, each with an input, an output and a reasoning share of its client's own.

    The share (`reason_ratio`, reasoning over all generated tokens) is published apart from the output's length, and
    taken to be independent of it.
    """

    seed: int = 0

    def matches(self, path: Path, first_line: bytes) -> bool:
        """It is only ever named."""
        return False

    def read(self, path: Path) -> RequestTable:
        """All clients whose files lie in the folder of `path`, the first one's rates; answers are `output_tokens`."""
        rng = np.random.default_rng(self.seed)
        drawn: list[list[npt.NDArray[Any]]] = [[], [], []]
        for client in range(len(list(path.parent.glob("chunk-*-trace.csv")))):
            numbers = _numbers(path.parent / f"chunk-{client}-trace.csv")
            for window, lengths in _distributions(path.parent / f"chunk-{client}-dataset.json").items():
                for column, name in zip(drawn, ("input_tokens", "output_tokens", "reason_ratio"), strict=True):
                    column.append(_draw(ast.literal_eval(lengths[name]), numbers.get(int(window), 0), rng))
        inputs, outputs, share = (np.concatenate(column) for column in drawn)
        thoughts = np.rint(outputs * share).astype(np.int64)
        return RequestTable(
            arrival_ns=np.zeros(len(inputs), np.int64),
            input_tokens=inputs.astype(np.int64),
            output_tokens=outputs.astype(np.int64) - thoughts,
            sizes={"reasoning_tokens": thoughts},
        )


def _numbers(path: Path) -> dict[int, int]:
    """Requests of a client in each window, by its first second."""
    numbers: dict[int, float] = {}
    with path.open(newline="") as rows:
        for start, rate, *_ in csv.reader(rows):
            window = int(float(start)) // WINDOW_S * WINDOW_S
            numbers[window] = numbers.get(window, 0.0) + float(rate) * RATE_S
    return {window: round(number) for window, number in numbers.items()}


def _distributions(path: Path) -> dict[str, dict[str, str]]:
    text = path.read_text() if path.exists() else gzip.decompress(path.with_name(f"{path.name}.gz").read_bytes())
    found: dict[str, dict[str, str]] = json.loads(text)
    return found


def _draw(probabilities: dict[float, float], number: int, rng: np.random.Generator) -> npt.NDArray[Any]:
    if not number:
        return np.zeros(0)
    p = np.array(list(probabilities.values()))
    return rng.choice(np.array(list(probabilities)), number, p=p / p.sum())
