"""Clients whose model is an encoder: which engine they default to, and that they compute sequences whole.

A part of the schema, called by the section of a client. Attention in both directions needs a sequence at once, so a
policy that cuts sequences into chunks is refused, and so are memories for KV caches. It never looks at the pipeline or
at other clients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from mist.engine import EngineProfile
from mist.errors import Problem
from mist.model import ModelSpec
from mist.scenario import catalogue
from mist.scenario.named import Located, Spec

#: where a client with an encoder names no engine
ENCODER_ENGINE = "tei-0.6"
#: batching policies that cut sequences, and what takes their place where nobody asked for one
CUTTING = {"chunked": "continuous", "sglang": "continuous"}


def engine_of(model: ModelSpec, default: EngineProfile) -> EngineProfile:
    """The engine of a client that names none: of an encoder one that embeds, else `default`."""
    if not model.is_encoder:
        return default
    profile, _ = catalogue.read("engines", ENCODER_ENGINE, Path())
    assert isinstance(profile, EngineProfile)
    return profile


def default_batching(engine: EngineProfile, model: ModelSpec) -> str:
    """The policy of a client that names none: the engine's, or for an encoder the nearest that cuts no sequence."""
    return CUTTING.get(engine.batching, engine.batching) if model.is_encoder else engine.batching


def cuts(batching: Spec) -> bool:
    """Whether the policy may cut a sequence into chunks."""
    return batching.name in CUTTING or bool(batching.params.get("enable_chunked_context"))


def cut_sequences(model: ModelSpec, batching: Spec) -> Iterator[Located]:
    """A policy that would cut an encoder's sequences into chunks, as a problem at `batching`."""
    if model.is_encoder and cuts(batching):
        message = f"{model.name} is an encoder: every token attends to all others, so no sequence can be cut"
        hint = f"take {CUTTING.get(batching.name, 'continuous')}, or leave batching out"
        yield ("batching", batching.name), Problem(message, hint=hint)


def kept_caches(model: ModelSpec, tiers: Sequence[str], prefix_tier: str) -> Iterator[Located]:
    """Memories for the KV caches of an encoder, as a problem where they are named."""
    if model.is_encoder and (tiers or prefix_tier != "hbm"):
        message = f"{model.name} is an encoder: an encoder keeps no KV cache"
        key = "tiers" if tiers else "prefix_tier"
        yield ("kv_cache", key), Problem(message, hint=f"leave {key} out")
