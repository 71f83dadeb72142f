"""A whole model as a value: layers between an embedding and a classifier, and what its shards hold in bytes.

Memory rules, performance models and catalogues read it. It never splits anything unevenly without saying so, and takes
its shape from a Hugging Face config by `mist.model.hf_config`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any

from mist.model.dtypes import ACTIVATION_BYTES, dtype_bytes
from mist.model.hf_config import read_config
from mist.model.layers import LayerGroup


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A transformer as groups of layers, from bottom to top, between an embedding and a classifier.

    `is_encoder`: attention is bidirectional and nothing is cached or generated; `has_classifier`: a projection onto the
    vocabulary follows the last layer. `num_positions`: rows of learned position and type embeddings; `num_extra`: other
    elements outside the layers (an embedding norm, a pooler, a classifier's bias).
    `checkpoint_dtype`: that of the published weights' matrices; `quantizes_experts_only`: dtypes narrower than 16 bits
    are those of the routed experts alone, the rest of the checkpoint is in 16 bits.
    """

    name: str
    layers: tuple[LayerGroup, ...]
    vocab_size: int
    tied_embeddings: bool
    max_context: int
    is_encoder: bool = False
    has_classifier: bool = True
    num_positions: int = 0
    num_extra: int = 0
    checkpoint_dtype: str = "bf16"
    quantizes_experts_only: bool = False

    @property
    def num_layers(self) -> int:
        return sum(group.num_layers for group in self.layers)

    @property
    def hidden_size(self) -> int:
        return self.layers[0].hidden_size

    @property
    def num_parameters(self) -> int:
        """All trained elements; a tied embedding counts once."""
        return self._num_end_parameters(tied=self.tied_embeddings) + sum(
            g.num_layers * (g.num_matrix_parameters() + g.num_router_parameters() + g.num_vector_parameters())
            for g in self.layers
        )

    @property
    def num_active_parameters(self) -> int:
        """Elements that one token uses: all but the routed experts that it isn't sent to."""
        idle = (
            g.num_layers * (g.experts.num_experts - g.experts.top_k) * g.num_expert_parameters()
            for g in self.layers
            if g.experts
        )
        return self.num_parameters - sum(idle)

    def matrix_dtypes(self, dtype: str) -> tuple[str, str]:
        """The dtypes of (dense matrices, routed experts) where the weights are said to be in `dtype`."""
        narrow = dtype_bytes(dtype) < ACTIVATION_BYTES
        return ("bf16" if narrow and self.quantizes_experts_only else dtype), dtype

    def merged_layers(self) -> tuple[LayerGroup, ...]:
        """One group for each kind of layer, wherever in the model its layers are."""
        counts: dict[LayerGroup, int] = {}
        for g in self.layers:
            kind = g.repeated(1)
            counts[kind] = counts.get(kind, 0) + g.num_layers
        return tuple(kind.repeated(n) for kind, n in counts.items())

    def stages(self, pp: int) -> list[tuple[LayerGroup, ...]]:
        """The layers of each of `pp` pipeline stages: as many in each, what is left over from the last but one down.

        Raises ValueError where there are fewer layers than stages.
        """
        if pp > self.num_layers:
            raise ValueError(f"{self.name} has {self.num_layers} layers, too few for pp = {pp}")
        return list(_stages(self.layers, pp))

    def weight_bytes(self, dtype: str, tp: int = 1, *, pp: int = 1, ep: int = 1, attn_dp: int = 1) -> int:
        """Bytes of the weights on a device of the pipeline stage that holds most; see `stage_weight_bytes`."""
        return max(self.stage_weight_bytes(dtype, tp, pp=pp, ep=ep, attn_dp=attn_dp))

    def stage_weight_bytes(self, dtype: str, tp: int, *, pp: int, ep: int = 1, attn_dp: int = 1) -> list[int]:
        """Bytes of the weights on one device of each of `pp` stages.

        `dtype` is that of the layers' matrices; norms, router, embedding and classifier have at least 16 bits. KV
        projections are replicated once `tp` exceeds the KV heads. Routed experts are split over all tp x attn_dp ranks
        of a stage: `ep` ways by expert, the rest within each; everything else over `tp` alone. The first stage holds
        the embedding, the last the classifier (with tied embeddings both hold it). ValueError for an unknown dtype.
        """
        dense, routed = (dtype_bytes(d) for d in self.matrix_dtypes(dtype))
        wide = max(dtype_bytes(dtype), ACTIVATION_BYTES)
        table = wide * self.vocab_size * self.hidden_size / tp
        totals = []
        for i, layers in enumerate(self.stages(pp)):
            ends = table * ((i == 0) + (i == pp - 1) * self.has_classifier)
            if pp == 1 and self.tied_embeddings and self.has_classifier:
                ends -= table
            if i == 0:
                ends += wide * (self.num_positions * self.hidden_size + self.num_extra)
            if i == pp - 1:
                ends += wide * self.hidden_size
            total = ends + sum(g.num_layers * _layer_bytes(g, dense, routed, wide, tp, ep, attn_dp) for g in layers)
            totals.append(round(total))
        return totals

    def kv_bytes_per_token(self, kv_dtype: str) -> int:
        """Bytes of what one token caches over all layers: 2 · layers · KV heads · head size · element, if not latent.

        Layers with a window count like the others: they hold less only for contexts longer than the window.
        """
        return self.kv_bytes_per_token_per_device(kv_dtype)

    def kv_bytes_per_token_per_device(self, kv_dtype: str, tp: int = 1, pp: int = 1) -> int:
        """What a rank stores per token in the stage with most: the whole divided by min(tp, KV heads), then copies.

        The latent vectors of multi-head latent attention are copied on every rank.
        """
        return max(self.stage_kv_bytes_per_token(kv_dtype, tp, pp))

    def stage_kv_bytes_per_token(self, kv_dtype: str, tp: int, pp: int, *, frees_windows: bool = False) -> list[int]:
        """Bytes that one of `tp` ranks stores per token in each of `pp` stages.

        With `frees_windows` what lies behind an attention window isn't kept: of a long context only the layers without
        a window count, where a stage has any.
        """
        if self.is_encoder:
            return [0] * pp
        element = dtype_bytes(kv_dtype)
        found = []
        for layers in self.stages(pp):
            kept = [g for g in layers if g.num_heads and not g.window] if frees_windows else []
            found.append(round(element * sum(g.num_layers * g.kv_elements(tp) for g in kept or layers)))
        return found

    def stage_window_bytes(self, kv_dtype: str, tp: int, pp: int) -> list[int]:
        """Bytes that one of `tp` ranks stores of a long sequence in each of `pp` stages in layers with a window."""
        element = dtype_bytes(kv_dtype)
        return [
            round(element * sum(g.num_layers * g.kv_elements(tp) * min(g.window, self.max_context) for g in layers))
            for layers in self.stages(pp)
        ]

    def tp_problem(self, tp: int) -> str | None:
        """Why the model can't be split over `tp` ranks, or None if it can."""
        return next((f"{self.name} has {reason}" for g in self.layers for reason in _tp_problems(g, tp)), None)

    def parallel_problem(self, tp: int, pp: int, ep: int, attn_dp: int) -> str | None:
        """Why the model can't be split like this, or None if it can; `ep` 1 splits experts within themselves."""
        if reason := self.tp_problem(tp):
            return reason
        if pp > self.num_layers:
            return f"{self.name} has {self.num_layers} layers, too few for pp = {pp}"
        ranks = tp * attn_dp
        mixtures = [g.experts for g in self.layers if g.experts]
        if (ep > 1 or attn_dp > 1) and not mixtures:
            return f"{self.name} has no experts to split: ep = {ep} and attn_dp = {attn_dp} need a mixture of experts"
        if ranks % ep:
            return f"ep = {ep} doesn't divide the tp x attn_dp = {ranks} ranks of a stage"
        for experts in mixtures:
            if experts.num_experts % ep:
                return f"{self.name} has {experts.num_experts} experts, which don't divide over ep = {ep}"
            if experts.ffn_size % (ranks // ep):
                return f"{self.name} has experts of size {experts.ffn_size}, which don't divide over {ranks // ep}"
        return None

    def _num_end_parameters(self, *, tied: bool) -> int:
        """Elements outside the layers: embeddings, classifier, last norm and extras."""
        rows = self.vocab_size * (1 + (self.has_classifier and not tied)) + self.num_positions
        return (rows + 1) * self.hidden_size + self.num_extra

    @classmethod
    def from_hf_config(cls, name: str, config: Mapping[str, Any]) -> ModelSpec:
        """The shape in a Hugging Face `config.json`; of a multimodal model, that of its text part.

        ValueError names every key that is missing, malformed or describes something that a `ModelSpec` can't
        represent (state-space layers, encoder-decoders, layers that share a KV cache, ...).
        """
        return cls(name=name, **read_config(name, config))


@lru_cache(maxsize=256)
def _stages(layers: tuple[LayerGroup, ...], pp: int) -> tuple[tuple[LayerGroup, ...], ...]:
    # asked for again by every replica that is built
    each = [g.repeated(1) for g in layers for _ in range(g.num_layers)]
    size, rest = divmod(len(each), pp)
    stages, start = [], 0
    for i in range(pp):
        end = start + size + (pp - 1 - rest <= i < pp - 1)
        runs = groupby(each[start:end])
        stages.append(tuple(kind.repeated(len(list(run))) for kind, run in runs))
        start = end
    return tuple(stages)


def _layer_bytes(g: LayerGroup, dense: float, routed: float, wide: float, tp: int, ep: int, attn_dp: int) -> float:
    """Bytes of one layer on one rank; an expert count that `ep` doesn't divide is rounded up."""
    total = dense * (g.num_attention_parameters(tp) + g.num_dense_parameters(tp))
    total += wide * (g.num_vector_parameters() + g.num_router_parameters())
    if g.experts:
        local = -(-g.experts.num_experts // ep)
        total += routed * local * g.num_expert_parameters() / (tp * attn_dp / ep)
    return total


def _tp_problems(g: LayerGroup, tp: int) -> Iterator[str]:
    if g.num_heads % tp:
        yield f"{g.num_heads} attention heads, which don't divide over tp = {tp}"
    if g.num_heads and g.latent is None and max(tp, g.num_kv_heads) % min(tp, g.num_kv_heads):
        yield f"{g.num_kv_heads} KV heads, which don't divide over tp = {tp}"
    if g.ffn_size % tp:
        yield f"an FFN size of {g.ffn_size}, which doesn't divide over tp = {tp}"
    if g.experts and g.experts.shared_ffn_size % tp:
        yield f"shared experts of size {g.experts.shared_ffn_size}, which don't divide over tp = {tp}"
