"""The seed tree of a scenario: every purpose that draws at random has a generator of its own.

Used wherever a run is built. Draws of one purpose never shift those of another.
"""

from __future__ import annotations

import zlib

import numpy as np


def random_of(seed: int, purpose: str, *index: int) -> np.random.Generator:
    """The generator of one named purpose in the scenario's seed tree; draws of one don't shift those of another."""
    return np.random.default_rng(seed_of(seed, purpose, *index))


def seed_of(seed: int, purpose: str, *index: int) -> np.random.SeedSequence:
    return np.random.SeedSequence(seed, spawn_key=(zlib.crc32(purpose.encode()), *index))
