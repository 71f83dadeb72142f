"""Mutated scenarios: valid, or a ScenarioError with place and remedy; never anything else."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mist.errors import ScenarioError
from mist.scenario import load
from scenarios import LARGE, SMALL, TRACED

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 3, 2.5, -0.5, 1e9, 10**30, 1e300, "", " ", "x", "1", "h100-sxm", "llama-3.1-8b",
    "chunked", "round_robin", "prefill", "10:20", "../", "/", "~", "~nobody/x", "\x7f", "é" * 300, [], [1],
    ["prefill"], [[]], {}, {"x": 1}, {"chunked": {}}, {"poisson": {"rate_per_s": "x"}}, {"": {}}, {"roofline": 3},
    {"a": {"b": {"c": []}}},
]  # fmt: skip
RAW = [".nan", "-.inf", "1e999", "!!python/none x", "*gone", "&a [*a]", "{", "'", "%", "@x", "`x", "\tx", "a: b: c"]


def nodes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from nodes(inner, (*path, key))


def parent(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        tree = tree[key]
    return tree


def drop(tree: Any, path: tuple[Any, ...], rng: random.Random) -> str:
    del parent(tree, path)[path[-1]]
    return yaml.safe_dump(tree, sort_keys=False)


def replace(tree: Any, path: tuple[Any, ...], rng: random.Random) -> str:
    parent(tree, path)[path[-1]] = rng.choice(VALUES)
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def misspell(tree: Any, path: tuple[Any, ...], rng: random.Random) -> str:
    holder = parent(tree, path)
    if isinstance(holder, dict):
        name = str(path[-1])
        at = rng.randrange(len(name))
        holder[name[:at] + name[at + 1 :]] = holder.pop(name)
    elif isinstance(holder[path[-1]], str):
        holder[path[-1]] += "x"
    return yaml.safe_dump(tree, sort_keys=False)


def misname(tree: Any, path: tuple[Any, ...], rng: random.Random) -> str:
    holder = parent(tree, path)
    value = holder[path[-1]]
    if isinstance(value, str):
        at = rng.randrange(len(value))
        holder[path[-1]] = value[:at] + rng.choice("xyz-./") + value[at + 1 :]
    elif isinstance(value, int | float) and not isinstance(value, bool):
        holder[path[-1]] = rng.choice([-value, 0, value * 10**6, value + 0.5, str(value)])
    return yaml.safe_dump(tree, sort_keys=False)


def negate(tree: Any, path: tuple[Any, ...], rng: random.Random) -> str:
    for leaf in nodes(tree):
        holder = parent(tree, leaf)
        if isinstance(holder[leaf[-1]], int | float):
            holder[leaf[-1]] = -1 - holder[leaf[-1]]
    return yaml.safe_dump(tree, sort_keys=False)


def unreadable(tree: Any, path: tuple[Any, ...], rng: random.Random) -> str:
    parent(tree, path)[path[-1]] = "MARK"
    return yaml.safe_dump(tree, sort_keys=False).replace("MARK", rng.choice(RAW))


def double(tree: Any, path: tuple[Any, ...], rng: random.Random) -> str:
    rows = yaml.safe_dump(tree, sort_keys=False).splitlines(keepends=True)
    at = rng.randrange(len(rows))
    return "".join([*rows[: at + 1], *rows[at:]])


def truncate(tree: Any, path: tuple[Any, ...], rng: random.Random) -> str:
    text = yaml.safe_dump(tree, sort_keys=False)
    return text[: rng.randrange(len(text))]


def scramble(tree: Any, path: tuple[Any, ...], rng: random.Random) -> str:
    text = list(yaml.safe_dump(tree, sort_keys=False))
    for _ in range(rng.randrange(1, 6)):
        text[rng.randrange(len(text))] = rng.choice("\t\n :{}[]&*'\"#-,x9\x00\x85\u2028é")
    return "".join(text)


def bomb(tree: Any, path: tuple[Any, ...], rng: random.Random) -> str:
    levels = "".join(f"b{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 9)}]\n" for i in range(1, 9))
    return f"b0: &b0 [1, 2]\n{levels}" + yaml.safe_dump(tree, sort_keys=False)


MUTATIONS: list[tuple[Callable[[Any, tuple[Any, ...], random.Random], str], int]] = [
    (drop, 60), (replace, 250), (misspell, 60), (misname, 100), (negate, 3), (unreadable, 40), (double, 40),
    (truncate, 40), (scramble, 100), (bomb, 3),
]  # fmt: skip


@pytest.mark.parametrize(("mutate", "count"), MUTATIONS, ids=lambda value: getattr(value, "__name__", ""))
def test_mutations(folder: Path, mutate: Any, count: int) -> None:
    bases = [yaml.safe_load(text) for text in (SMALL, LARGE, TRACED)]
    refused = 0
    for index in range(count):
        rng = random.Random(f"{mutate.__name__} {index}")
        tree = copy.deepcopy(bases[index % len(bases)])
        refused += settle(folder, mutate(tree, rng.choice(list(nodes(tree))), rng).encode("utf-8"))
    assert refused >= count // 3


def test_mutated_bytes(folder: Path) -> None:
    for index in range(60):
        rng = random.Random(index)
        raw = bytearray([SMALL, LARGE, TRACED][index % 3].encode())
        for _ in range(3):
            raw[rng.randrange(len(raw))] = rng.randrange(128, 256)
        assert settle(folder, bytes(raw))


def settle(folder: Path, raw: bytes) -> bool:
    """Whether the scenario is refused, as it must be if it isn't valid; the resolved form of a valid one reads back."""
    path = folder / "case.yaml"
    path.write_bytes(raw)
    try:
        scenario = load(path)
    except ScenarioError as error:
        found = error.problems
    else:
        found = ()
    if found:
        for problem in found:
            assert problem.file, str(problem)
            assert problem.hint, str(problem)
            assert problem.line or "empty" in problem.message or "no such file" in problem.message, str(problem)
            assert not re.search(r"Traceback|pydantic|Error\(|<class|object at", str(problem)), str(problem)
        return True
    (folder / "again.yaml").write_text(scenario.to_yaml(), encoding="utf-8")
    assert load(folder / "again.yaml").resolved() == scenario.resolved()
    return False
