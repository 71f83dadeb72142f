"""The values that move: Request -> Stage -> Task -> Step, and what policies and routers may see of them.

A request follows its pipeline stage by stage; a stage placed on a client is a task; a client runs its tasks in
steps. These objects hold numbers only: they never schedule, route or look at a clock.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mist.units import NS_PER_MS

PREFILL = "prefill"
DECODE = "decode"
TOOL = "tool"


@dataclass(frozen=True, slots=True)
class Context:
    """What a request's model has read and said, in a row: `num_tokens` so far, of the one with this `number`.

    Number 0 begins with the request's prompt, the others with nothing that any other has. Stages that work on one and
    the same follow each other.
    """

    number: int
    num_tokens: int


#: sizes that tell what orders go by
ORDER_SIZES = ("priority", "deadline_ms", "predicted_output_tokens")
#: the deadline of a request that has none, ns
NO_DEADLINE = 1 << 62


@dataclass(slots=True)
class Stage:
    """One piece of a request's work.

    `input_tokens`: tokens of context that must be in the KV cache when the stage ends (prefill), or of the text that it
    works on or searches with. `oracle_output_tokens`: tokens that it generates, the one sampled
    by its prefill included; only the client that generates may read it. A decode has no input of its own: it goes on
    where the stage before left the KV cache. Any other stage with both computes its input and generates on one client.
    `visible`: whether its tokens are streamed to the user (they make the TTFT).
    `num_sequences`: equal sequences that the input is spread over, which don't attend to each other: the candidates
    that a re-ranker reads. `found_tokens`: tokens at the front of the input whose KV cache the stage before has found:
    it is sent along and not computed. `input_bytes`: what else is sent from the client of the stage before.
    `gates`: nothing of the request is shown to the user before it has ended.
    `hidden_tokens`: of what it generates, the tokens at the front that the user doesn't see: a thought. `shown_tokens`:
    tokens that were generated unseen and are shown to the user now, by a stage without work of its own. `is_resumed`:
    the request goes on from the context that this decode leaves, whose full blocks stay in the prefix cache, for this
    request alone, until they are evicted. `reads_prompt`: its input begins with the request's prompt, as that of a
    prefill always does: the workload tells its content and hits. `context`: which of the request's contexts it works
    on, and how long that is then; only the one numbered 0 begins with the prompt.
    """

    kind: str
    input_tokens: int = 0
    oracle_output_tokens: int = 0
    visible: bool = True
    num_sequences: int = 1
    found_tokens: int = 0
    input_bytes: int = 0
    gates: bool = False
    hidden_tokens: int = 0
    shown_tokens: int = 0
    is_resumed: bool = False
    reads_prompt: bool = False
    context: Context | None = None

    def seen_by_user(self, num_tokens: int) -> int:
        """Of the first `num_tokens` that it generates, those that the user sees."""
        return num_tokens - self.hidden_tokens if self.visible and num_tokens > self.hidden_tokens else 0

    @property
    def has_work(self) -> bool:
        """Whether it is a stage at all: one without any work is passed over."""
        return self.input_tokens > 0 or self.oracle_output_tokens > 0


@dataclass(slots=True, init=False)
class Delay(Stage):
    """A stage that no client serves: its request waits for `duration_ns` outside of them, for a tool say, and goes on.

    What goes on after it begins with an input of its own: no KV cache is at hand then, and nothing is sent to it.
    """

    duration_ns: int = 0

    def __init__(self, duration_ns: int, kind: str = TOOL) -> None:
        Stage.__init__(self, kind, visible=False)
        self.duration_ns = duration_ns

    @property
    def has_work(self) -> bool:
        """Whether it takes any time."""
        return self.duration_ns > 0


@dataclass(slots=True)
class StageResult:
    """What a pipeline gets back from a stage: when it began and ended (ns) and the tokens it generated.

    `found_tokens`: tokens at the front of the prompt whose KV cache a KV store has. `parts`: the results of an `All`,
    branch by branch; its own are the earliest start, the latest end and all tokens.
    """

    start_ns: int
    end_ns: int
    output_tokens: int = 0
    found_tokens: int = 0
    parts: tuple[StageResult, ...] = ()


#: what a pipeline returns for a request that it turned away in the end: it has left, and isn't counted as served
TURNED_AWAY = object()


@dataclass(slots=True)
class All:
    """Branches of a pipeline that run side by side: stages, or pipelines of their own; it goes on when all have ended.

    A branch's result is what its generator returns, or that of its last stage. Branches that begin with a decode all go
    on with the KV cache of the stage before, whose blocks they share.
    """

    branches: Sequence[Stage | Pipeline]


@dataclass(slots=True)
class FirstOf:
    """Branches that run side by side until `k` of them have ended; the pipeline goes on with the results of these.

    With `cancel_rest` what the others still wait for or compute is given up, and they free what they hold; without,
    they run to their ends, and nobody waits for them but the request's own end.
    """

    k: int
    branches: Sequence[Stage | Pipeline]
    cancel_rest: bool = True


Fork = All | FirstOf
Pipeline = Generator[Stage | All | FirstOf, StageResult, Any]


@dataclass(slots=True, eq=False)
class Branch:
    """A pipeline as far as a request has followed it; `joins` is the branch point that waits for it, if any.

    It is at `task` on `client` (its index), or waits for the branches of `fork`.
    """

    request: Request
    pipeline: Pipeline
    start_ns: int
    joins: Join | None = None
    place: int = 0
    last: StageResult | None = None
    task: Task | None = None
    client: int = -1
    fork: Join | None = None
    #: branches that run on though nobody waits for them
    left_behind: list[Branch] = field(default_factory=list)
    is_over: bool = False
    is_cancelled: bool = False


@dataclass(slots=True, eq=False)
class Join:
    """Branches that run side by side; `branch` goes on with the results once `num_needed` more have ended."""

    branch: Branch
    num_needed: int
    cancels_rest: bool = False
    branches: list[Branch] = field(default_factory=list)
    results: dict[int, StageResult] = field(default_factory=dict)


@dataclass(slots=True)
class Request:
    """One user's request. Times are integer ns, -1 while unknown.

    `block_keys` are the prompt's prefix hashes, each chained through its parent, one per `hash_block_size` tokens
    of the workload; empty where the content is unknown (nothing is then shared with other requests). `hit_tokens`:
    tokens at the front of the prompt that the workload says are in the prefix cache, whatever their content.
    `sizes`: what else the workload tells of this request, by name, such as `query_tokens` or `passage_tokens`.
    `session`: the number of the session that it is a turn of, -1 if it is of none. `tenant`: the place of its tenant.
    Orders go by `priority` (lower first), `deadline_ns` (an instant) and `predicted_output_tokens` (what a predictor
    says, never the truth); `sizes` called `priority`, `deadline_ms` (after its arrival) and `predicted_output_tokens`
    are these.
    """

    index: int
    arrival_ns: int
    input_tokens: int
    oracle_output_tokens: int
    block_keys: tuple[int, ...] = ()
    hit_tokens: int = 0
    sizes: Mapping[str, int] = field(default_factory=dict)
    session: int = -1
    tenant: int = 0
    priority: int = 0
    deadline_ns: int = NO_DEADLINE
    predicted_output_tokens: int = 0
    # progress
    first_token_ns: int = -1
    output_tokens: int = 0
    cached_tokens: int = 0
    num_preemptions: int = 0
    #: tasks of it that were lost with their clients and began anew
    num_losses: int = 0
    num_stages: int = 0
    #: of the prompt that it was answered from, what was found for it included
    prompt_tokens: int = 0
    #: its tasks that are placed and not over
    num_tasks: int = 0
    #: when its last gate so far opened: nothing is shown before
    gate_ns: int = -1
    #: the KV store that it asked for its prefix, as transfers name it; 0: none
    store: int = 0
    #: why it can't be served; it leaves when its other tasks are over
    rejected_for: str = ""
    #: its pipeline is over; it leaves when its other tasks are
    is_answered: bool = False
    #: its pipeline turned it away
    is_refused: bool = False

    def __post_init__(self) -> None:
        if self.sizes:
            self.priority = self.sizes.get("priority", self.priority)
            self.predicted_output_tokens = self.sizes.get("predicted_output_tokens", self.predicted_output_tokens)
            if "deadline_ms" in self.sizes:
                self.deadline_ns = self.arrival_ns + self.sizes["deadline_ms"] * NS_PER_MS

    def keys_of(self, context: Context, unit_tokens: int) -> tuple[int, ...]:
        """Prefix hashes of a context's whole units: those of the prompt, if they are known, and behind it its own.

        Its own are below 0, where no workload has any: up to 2**16 contexts of up to 2**24 units.
        """
        if not unit_tokens:
            return ()
        num_units = context.num_tokens // unit_tokens
        prompt = self.block_keys[: min(num_units, self.input_tokens // unit_tokens)] if not context.number else ()
        first = -1 - ((self.index << 16 | context.number) << 24)  # within 2**61 their hashes differ
        return prompt + tuple(range(first - len(prompt), first - num_units, -1))

    def show(self, now: int) -> None:
        """The user sees a token of it at `now`."""
        if self.first_token_ns < 0:
            self.first_token_ns = now


@dataclass(slots=True, eq=False)
class SharedPrefix:
    """Full KV blocks at the front of several decodes that go on with one context; `holder` is the task that they were.

    `num_users` decodes need them, of which `num_running` are admitted. Blocks of a context that came from elsewhere
    aren't held until the first of these is.
    """

    holder: Task
    num_blocks: int
    num_users: int
    num_running: int = 0
    is_held: bool = True


@dataclass(slots=True, eq=False)
class Task:
    """A stage placed on one client: waiting or running there.

    It is computed up to `computed_tokens` of `target_tokens` (vLLM's idea: computed tokens and a target); a prefill
    ends there, one that generates joins the client's cohort there. After a preemption the target grows by what was
    generated.
    """

    request: Request
    stage: Stage
    stage_index: int
    target_tokens: int
    queued_ns: int
    branch: Branch | None = None
    shared: SharedPrefix | None = None
    computed_tokens: int = 0
    generated_tokens: int = 0
    #: of the computed tokens of this segment: found in the prefix cache, and taken over from the task it follows
    cached_tokens: int = 0
    inherited_tokens: int = 0
    #: place in the client's running order; -1 while waiting
    admission: int = -1
    #: its key in the client's order, and a number that no other task there has; empty where first come is first served
    rank: tuple[int, ...] = ()
    started_ns: int = -1
    joined_ns: int = -1
    #: the cohort's step counter when this decode joined, and after the step of its last token; -1 before the join
    join_step: int = -1
    finish_step: int = -1
    #: tokens per step where its client speculates, in 2^-32; 0 until drawn
    pace: int = 0
    #: tokens at the front of the target whose KV cache came from elsewhere, but for the first `found_from` of them,
    #: which the prefix cache had when memories were asked (or it was preempted), and must still have
    found_tokens: int = 0
    found_from: int = 0
    #: hashed units at the front of its prompt that it refers to in the prefix cache
    num_indexed: int = 0
    #: prefix hashes of its stage's `context`, in whole units
    context_keys: tuple[int, ...] = ()

    def anew(self, now: int) -> Task:
        """This task without anything computed, to be placed again: what it generated is part of its target."""
        target = self.target_tokens + (not self.remaining_tokens and self.generated_tokens > 0)
        return Task(
            self.request,
            self.stage,
            self.stage_index,
            target,
            now,
            self.branch,
            generated_tokens=self.generated_tokens,
            context_keys=self.context_keys,
        )

    def following_decode(self, now: int) -> Task:
        """The decode that would come next, if this prefill were over."""
        tokens = self.target_tokens
        return Task(self.request, Stage(DECODE), self.stage_index + 1, tokens, now, computed_tokens=tokens)

    @property
    def remaining_tokens(self) -> int:
        """Tokens still to be computed before the task generates or ends."""
        return self.target_tokens - self.computed_tokens

    def sequences(self, num_tokens: int) -> list[tuple[int, int]]:
        """Its next `num_tokens` as (new tokens, context) in each of the sequences that they belong to."""
        length = -(-self.stage.input_tokens // self.stage.num_sequences)
        first, last = self.computed_tokens, self.computed_tokens + num_tokens
        parts: list[tuple[int, int]] = []
        if not first % length:
            num_whole = num_tokens // length
            parts = [(length, 0)] * num_whole
            first += num_whole * length
        while first < last:
            context = first % length
            new = min(length - context, last - first)
            parts.append((new, context))
            first += new
        return parts

    @property
    def reads_prompt(self) -> bool:
        """Whether its context begins with the request's prompt, of which the workload tells content and hits."""
        if self.stage.context is not None and self.stage.context.number:
            return False
        return self.stage.reads_prompt or self.stage.kind in (PREFILL, DECODE)

    @property
    def is_known(self) -> bool:
        """Whether its context may be found somewhere."""
        return bool(self.context_keys) or self.reads_prompt

    @property
    def prompt_keys(self) -> tuple[int, ...]:
        """The prefix hashes of its context."""
        return self.context_keys or (self.request.block_keys if self.reads_prompt else ())

    @property
    def keyed_tokens(self) -> int:
        """Tokens at the front of its context whose content `prompt_keys` are of."""
        context = self.stage.context
        return context.num_tokens if self.context_keys and context is not None else self.request.input_tokens

    @property
    def run(self) -> tuple[int, int]:
        """What blocks of its own are kept under, behind those whose content is known: only its context finds them."""
        context = self.stage.context
        number = 0 if self.reads_prompt else -1 - self.stage_index
        return self.request.index, number if context is None else context.number

    @property
    def generates(self) -> bool:
        """Whether it generates tokens once its target is computed."""
        return self.stage.oracle_output_tokens > 0


@dataclass(slots=True)
class Batch:
    """A batching policy's decision: prefill chunks as (task, tokens), and whether the decode cohort takes part."""

    chunks: list[tuple[Task, int]]
    decode: bool


@dataclass(frozen=True, slots=True)
class Wait:
    """A batching policy's decision to start no step now; `until_ns` None means until something changes."""

    until_ns: int | None = None


@dataclass(slots=True)
class Step:
    """The work of one iteration of a client, as performance models see it.

    `num_decodes` sequences each compute `tokens_per_decode` tokens (one, and the drafts that it verifies);
    `decode_context` is the sum of their attended contexts in tokens, the new ones included. `chunks` are prefill chunks
    as (new tokens c, context s already in the KV cache). `num_sampled` rows go through the classifier: every token of a
    decode, and one of each prefill that ends in this step.
    `shared_tokens`: where attention groups share the experts, the mean of all groups' tokens in this common step,
    rounded up; 0 stands for this group's own number. `kinds`: where no model is run, the stage kind of each chunk.
    """

    num_decodes: int = 0
    decode_context: int = 0
    chunks: list[tuple[int, int]] = field(default_factory=list)
    num_prefill_tokens: int = 0
    num_sampled: int = 0
    tokens_per_decode: int = 1
    shared_tokens: int = 0
    kinds: list[str] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens that pass through the dense layers: prefill chunks and decodes."""
        return self.num_prefill_tokens + self.num_decodes * self.tokens_per_decode


@dataclass(slots=True)
class ClientView:
    """What a router may know of a client: counts of tasks and tokens, never the true output lengths.

    Those after `kv_blocks` are told to policies that say in their `needs` that they read them: `num_decodes`, running,
    waiting or under way; `longest_decode`, the most steps that any task still decodes, as predicted (`oracle_`: in
    truth, for policies that say so in their names); `chunk_ns`, a step with a chunk of `chunk_tokens` beside
    these decodes; `decode_ns`, a step with one decode more,
    0 where prefills are all that is served.
    """

    index: int
    name: str
    num_outstanding: int = 0
    num_waiting: int = 0
    num_running: int = 0
    pending_prefill_tokens: int = 0
    decode_context: int = 0
    kv_blocks_used: int = 0
    kv_blocks: int = 0
    num_decodes: int = 0
    longest_decode: int = 0
    oracle_longest_decode: int = 0
    chunk_tokens: int = 0
    chunk_ns: int = 0
    decode_ns: int = 0
