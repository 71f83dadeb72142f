"""What the shipped pipelines share: the names of stage kinds, the sizes of what is handed on, and pieces of pipelines.

Each piece is a generator of its own that a pipeline yields from. None of them registers anything or keeps a state.
"""

from __future__ import annotations

from collections.abc import Generator

from mist.request import DECODE, PREFILL, All, Request, Stage, StageResult

TOKENIZE = "tokenize"
DETOKENIZE = "detokenize"
EMBED = "embed"
RETRIEVE = "retrieve"
RERANK = "rerank"
KV_RETRIEVE = "kv_retrieve"
GUARD_INPUT = "guard_input"
GUARD_OUTPUT = "guard_output"

#: of English text, about; also of a token's number
BYTES_PER_TOKEN = 4
#: of a passage
BYTES_PER_ID = 8
#: FP32, of each dimension of an embedding
BYTES_PER_DIM = 4

Answer = Generator[Stage | All, StageResult, StageResult]
Tokens = Generator[Stage | All, StageResult, int]


def answer(request: Request, prompt_tokens: int, *, found_tokens: int = 0, visible: bool = True) -> Answer:
    """Prefill of a prompt, then decode of the request's output; the result of the last of them.

    The prompt is sent as text to where it is computed.
    """
    result = yield Stage(
        PREFILL,
        input_tokens=prompt_tokens,
        found_tokens=found_tokens,
        visible=visible,
        input_bytes=prompt_tokens * BYTES_PER_TOKEN,
    )
    if request.oracle_output_tokens:
        result = yield Stage(DECODE, oracle_output_tokens=request.oracle_output_tokens, visible=visible)
    return result


def find_kv(request: Request, kind: str, prompt_tokens: int) -> Tokens:
    """Ask a KV store for the front of a prompt; how many tokens of it are found, all but one at most.

    It is asked for the request's `hit_tokens` where the workload states them, else by block keys for all of the
    request's own input, else not at all.
    """
    wanted = request.hit_tokens or (request.input_tokens if request.block_keys else 0)
    if not wanted:
        return 0
    result = yield Stage(kind, input_tokens=wanted, input_bytes=prompt_tokens * BYTES_PER_TOKEN)
    return min(result.found_tokens, prompt_tokens - 1)


def require_names(**kinds: str) -> None:
    """ValueError, which names the parameter, for a kind that can't be one of a stage beside prefill and decode."""
    for parameter, kind in kinds.items():
        if not kind or kind in (PREFILL, DECODE):
            raise ValueError(f"{parameter} is {kind!r}: give the stage a name of its own")
