"""Alternatives in a tree: every way to choose, or the one that a chooser picks.

Under the space, which reads the tree from a user's file. Choices inside an alternative are made only where it is taken.
It never knows what a key means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

#: called with the name of a choice and its labels; gives the index of one
Chooser = Callable[[str, tuple[str, ...]], int]


@dataclass(frozen=True, slots=True)
class Choice:
    """Alternatives by label, of which one is taken; `name` tells it from all other choices of the tree.

    `is_load`: they are numbers, each of which is harder to serve than those before it.
    """

    name: str
    options: Mapping[str, Any]
    is_load: bool = False


def resolve(tree: Any, choose: Chooser) -> Any:
    """`tree` as plain data: mappings of trees, choices and values, with an option in the place of each choice."""
    if isinstance(tree, Choice):
        labels = tuple(tree.options)
        return resolve(tree.options[labels[choose(tree.name, labels)]], choose)
    if isinstance(tree, dict):
        return {key: resolve(inner, choose) for key, inner in tree.items()}
    return tree


def every(tree: Any) -> Iterator[tuple[dict[str, str], Any]]:
    """Every way to choose, as the labels by choice and the plain data; the last choice changes fastest."""
    script: list[int] = []
    while True:
        taken = _Script(script)
        resolved = resolve(tree, taken)
        yield taken.made, resolved
        trail = taken.trail
        while trail and trail[-1][0] + 1 == trail[-1][1]:
            trail.pop()
        if not trail:
            return
        script = [index for index, _ in trail]
        script[-1] += 1


@dataclass(slots=True)
class _Script:
    """A chooser that takes the options of a script in turn, and the first where it has ended.

    `trail`: the index taken and the number of options, of each choice; `made`: the labels taken.
    """

    indices: list[int]
    trail: list[tuple[int, int]] = field(default_factory=list)
    made: dict[str, str] = field(default_factory=dict)

    def __call__(self, name: str, labels: tuple[str, ...]) -> int:
        at = len(self.trail)
        index = self.indices[at] if at < len(self.indices) else 0
        self.trail.append((index, len(labels)))
        self.made[name] = labels[index]
        return index


def count(tree: Any) -> int:
    """How many ways to choose there are."""
    if isinstance(tree, Choice):
        return sum(count(option) for option in tree.options.values())
    if isinstance(tree, dict):
        product = 1
        for inner in tree.values():
            product *= count(inner)
        return product
    return 1
