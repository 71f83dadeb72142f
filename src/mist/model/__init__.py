"""Model shapes: layer groups, heads, experts and vocabulary, and from them parameters, weight bytes and KV bytes.

The bottom of the pipeline: performance models, KV capacity and hand-over sizes are all computed from a `ModelSpec`.
It never opens a file (the scenario loader passes mappings) and never guesses: a config that it can't represent raises.
"""

from mist.model.dtypes import ACTIVATION_BYTES, DTYPE_BYTES, dtype_bytes
from mist.model.layers import Experts, LatentAttention, LayerGroup
from mist.model.spec import ModelSpec

__all__ = [
    "ACTIVATION_BYTES", "DTYPE_BYTES", "Experts", "LatentAttention", "LayerGroup", "ModelSpec", "dtype_bytes",
]  # fmt: skip
