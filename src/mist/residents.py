"""Who is on a client: its waiting and running tasks, its decode cohort, and the KV blocks that they hold.

It is the `Queue` and the `Budget` that batching policies see, and the one place where tasks are admitted and preempted.
It never chooses what runs next and knows no durations.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from mist.batching.orders import Order
from mist.cohort import Cohort
from mist.memory.kv_cache import KVCache
from mist.ranks import RankedQueue, Ranks
from mist.request import SharedPrefix, Task


class Residents:
    """Tasks of one client: `waiting` (first come first, preempted in front), `running` in order of admission.

    With an `order` those that wait stand by their `ranks`, and whoever has the largest is preempted, not the tail.
    A running task is `prefilling` (tokens left to compute) or in the cohort. A running task holds
    `kv.blocks_for(reserved tokens)` blocks: what it has computed, plus what this step computes for it. A task that is
    `sending` is done here and keeps its blocks until its KV cache has reached the client that decodes on (one that
    `generates`). With `reserves_output` a task is admitted only where all that run could be served to their last token
    without preemption.
    """

    __slots__ = (
        "_admissions", "_fetches_since_ns", "_first_to_fetch", "_generates", "_grown", "_hand_over", "_has_preempted",
        "_promises", "_scheduled", "cohort", "handed_over", "kv", "num_preemptions", "on_loss", "on_preempt",
        "pending_tokens", "prefilling_tasks", "prefixes", "promised", "ranks", "reserves_output", "running", "sending",
        "waiting",
    )  # fmt: skip

    def __init__(
        self,
        kv: KVCache,
        on_preempt: Callable[[Task], None],
        cohort: Cohort | None = None,
        *,
        reserves_output: bool = False,
        generates: bool = True,
        order: Order | None = None,
    ) -> None:
        self.kv = kv
        self.reserves_output = reserves_output
        self._generates = generates
        #: blocks that each running task may come to hold, by admission, and all together
        self._promises: dict[int, int] = {}
        self.promised = 0
        self.cohort = cohort or Cohort(kv.block_size)
        self.ranks = Ranks(order) if order is not None else None
        self.waiting: deque[Task] | RankedQueue = self.ranks.queue() if self.ranks else deque()
        self.running: dict[int, Task] = {}
        self.prefilling_tasks: dict[int, Task] = {}
        self.sending: dict[int, Task] = {}
        #: blocks that decodes of one context hold together
        self.prefixes: dict[SharedPrefix, None] = {}
        self.on_preempt = on_preempt
        #: decodes that wait with a context that was computed elsewhere: nothing for a policy to schedule
        self.handed_over: deque[Task] | RankedQueue = self.ranks.queue() if self.ranks else deque()
        #: tokens still to be computed for waiting and prefilling tasks
        self.pending_tokens = 0
        self.num_preemptions = 0
        self._admissions = 0
        #: told of a task that is next and of whose prefix the device has less than when memories were asked: whether it
        #: fetches that, and isn't here any more
        self.on_loss: Callable[[Task], bool] | None = None
        self._first_to_fetch: Task | None = None
        self._fetches_since_ns = -1
        #: since when, and with which key, the first KV cache waits elsewhere for room here
        self._hand_over: tuple[int, tuple[int, ...]] | None = None
        self._grown = False
        self._has_preempted = False
        self._scheduled: dict[int, int] = {}

    # --- the queue and the budget, as batching policies see them ---

    def __len__(self) -> int:
        return len(self.waiting)

    @property
    def prefilling(self) -> list[Task]:
        return list(self.prefilling_tasks.values())

    @property
    def num_waiting(self) -> int:
        """Tasks that aren't admitted, those included that no policy sees."""
        return len(self.waiting) + len(self.handed_over)

    @property
    def num_running(self) -> int:
        return len(self.running)

    @property
    def num_available_blocks(self) -> int:
        return self.kv.available

    def grow_decodes(self) -> int:
        """Reserve the tokens of a step for every decode; the number of tasks preempted for it."""
        kv = self.kv
        needed = self.cohort.num_new_blocks()
        if needed <= kv.free:
            kv.free -= needed
        elif needed <= kv.available:
            kv.take(needed)
        else:
            return self._grow_one_by_one()
        self._grown = True
        return 0

    def grow(self, task: Task, num_tokens: int) -> bool:
        """Reserve `num_tokens` more for a prefilling task; False if it had to be preempted itself."""
        if task.admission < 0:
            return False
        kv = self.kv
        reserved = task.computed_tokens + num_tokens
        needed = kv.blocks_for(reserved) - kv.blocks_for(task.computed_tokens)
        if not self._make_room(task, needed):
            return False
        kv.take(needed)
        kv.index(task, reserved)
        self._scheduled[task.admission] = num_tokens
        return True

    def admit(self, task: Task, max_tokens: int, *, whole: bool = False) -> int:
        """Admit a waiting task with its first chunk; the chunk's tokens, or 0 and nothing has changed."""
        if self._has_preempted or (self._first_to_fetch is not None and self.comes_after_a_fetch(task)):
            return 0
        if self._hand_over is not None and self._comes_after(task, *self._hand_over):
            return 0
        if self.ranks is not None and self.running and self.handed_over and self.handed_over[0].rank < task.rank:
            return 0  # the room that comes back is for that one
        kv = self.kv
        hit = kv.match(task)
        found = max(hit.num_tokens, kv.stated_hit(task))
        if task.found_tokens > found and hit.num_tokens >= task.found_from:
            found = max(found, min(task.found_tokens, task.target_tokens - 1))
        remaining = task.target_tokens - found
        chunk = remaining if remaining < max_tokens else max_tokens
        if chunk <= 0 or (whole and chunk < remaining):
            return 0
        reserved = found + chunk
        needed = kv.blocks_for(reserved) - kv.blocks_for(hit.num_tokens)
        if needed + hit.num_unreferenced + kv.watermark_blocks > kv.available:
            return 0
        if self.reserves_output and not self.keeps_promises(task):
            return 0
        if hit.num_tokens < task.found_from and self.on_loss is not None and self.on_loss(task):
            return 0
        if task is self.waiting[0]:
            self.waiting.popleft()
        else:
            self.waiting.remove(task)
        if hit.num_tokens:
            kv.refer(task, hit)
        if found:
            task.computed_tokens = task.cached_tokens = found
            if not (task.request.num_preemptions or task.request.num_losses):
                task.request.cached_tokens += found
            self.pending_tokens -= found
        kv.take(needed)
        kv.index(task, reserved)
        self.let_in(task)
        self.prefilling_tasks[task.admission] = task
        self._scheduled[task.admission] = chunk
        return chunk

    # --- changes made by the client ---

    def begin(self) -> None:
        """The policy is about to be asked for the next step."""
        self._has_preempted = False

    def enqueue(self, task: Task) -> None:
        """A task arrives: it waits behind the others."""
        remaining = task.target_tokens - task.computed_tokens
        if remaining:
            self.waiting.append(task)
            self.pending_tokens += remaining
        else:
            self.handed_over.append(task)

    def put_back(self, task: Task) -> None:
        """A task that was first in the queue, and left it for its prefix to be fetched, comes back to the front."""
        self.waiting.appendleft(task)
        self.pending_tokens += task.remaining_tokens

    def fetch_waits(self, task: Task | None, *, is_back: bool = False) -> None:
        """The first task that can't be fetched for until blocks come back; None: all can.

        `is_back`: it was the first in the queue, so that all others in it come after it.
        """
        self._first_to_fetch = task
        self._fetches_since_ns = -1 if task is None or is_back else task.queued_ns

    def comes_after_a_fetch(self, task: Task) -> bool:
        """Whether `task` would take the blocks that an earlier one waits for; nobody has to while nothing runs."""
        first = self._first_to_fetch
        if first is None or task.found_tokens or not self.running:
            return False
        if self.ranks is not None:
            return self.ranks.of(first) < task.rank
        return task.queued_ns > self._fetches_since_ns and not task.request.num_preemptions

    def hand_over_waits(self, first: tuple[int, tuple[int, ...]] | None) -> None:
        """Since when, and with which key, the first KV cache waits elsewhere for room here; None: none does."""
        self._hand_over = first

    def _comes_after(self, task: Task, since_ns: int, key: tuple[int, ...]) -> bool:
        """Whether `task` would take the room that an earlier one waits for; nobody has to while nothing runs."""
        if not self.running:
            return False
        if self.ranks is not None:
            return key < task.rank[:-1]
        return task.queued_ns > since_ns and not task.request.num_preemptions

    def comes_before(self, waiting: Task, handed_over: Task) -> bool:
        """Whether `waiting` is to be admitted before a decode that was handed over."""
        if self.ranks is not None:
            return waiting.rank < handed_over.rank
        return waiting.request.num_preemptions > 0 or waiting.queued_ns <= handed_over.queued_ns

    def computed(self, task: Task, num_tokens: int) -> bool:
        """A chunk of `task` is done; True if that was its last."""
        task.computed_tokens += num_tokens
        self.pending_tokens -= num_tokens
        if task.computed_tokens < task.target_tokens:
            return False
        del self.prefilling_tasks[task.admission]
        return True

    def decodes_grown(self) -> None:
        """All decodes have blocks for the step that begins."""
        self._grown = True

    def decode_step_done(self) -> list[Task] | None:
        """Everybody in the cohort has one token more; the tasks that have generated their last one, or None."""
        self._grown = False
        return self.cohort.advance()

    def chunks_done(self) -> None:
        """This step's chunks are computed."""
        self._scheduled.clear()

    def follow(self, done: Task, following: Task) -> None:
        """`following` takes over the place, the KV blocks and the computed tokens of `done`."""
        following.admission = done.admission
        following.computed_tokens = following.inherited_tokens = following.target_tokens = done.computed_tokens
        following.num_indexed = done.num_indexed
        following.rank = done.rank
        self.running[done.admission] = following

    def fork(self, done: Task, followings: Sequence[Task], max_num_seqs: int) -> list[Task]:
        """`followings` go on with the context of `done` and share its full blocks; those that there is no room for now.

        The first inherits the block that isn't full, the others take copies of it.
        """
        num_tokens, kv = done.computed_tokens, self.kv
        for task in followings:
            task.computed_tokens = task.inherited_tokens = task.target_tokens = num_tokens
        if self.ranks is not None:
            self.ranks.pass_on(done, followings)
        shared = share_prefix(followings, num_tokens // kv.block_size, done)
        self.prefixes[shared] = None
        first, *others = followings
        first.admission = done.admission
        self.running[done.admission] = first
        shared.num_running = 1
        num_tail = kv.blocks_for(num_tokens) - shared.num_blocks
        waiting: list[Task] = []
        for task in others:
            has_room = num_tail + kv.watermark_blocks <= kv.available and len(self.running) < max_num_seqs
            if waiting or not has_room or not self.keeps_promises(task):
                waiting.append(task)
                continue
            kv.take(num_tail)
            shared.num_running += 1
            self.let_in(task)
        return waiting

    def surrender(self) -> bool:
        """Give back a prefix of which no user runs, whose users then compute it again; False where there is none."""
        users = [each.shared for each in self.handed_over if each.shared and not each.shared.num_running]
        waiting = dict.fromkeys(users)
        last_first = reversed(waiting) if self.ranks is not None else reversed(self.prefixes)
        shared = next((s for s in last_first if s in waiting and s in self.prefixes and s.num_blocks), None)
        if shared is None:
            return False
        self._has_preempted = True
        for task in [each for each in reversed(self.handed_over) if each.shared is shared]:
            self.handed_over.remove(task)
            self.on_preempt(task)
            self._unshare(task)
            task.found_from = task.computed_tokens
            task.computed_tokens = 0
            self.pending_tokens += task.target_tokens
            self.num_preemptions += 1
            task.request.num_preemptions += 1
            self.waiting.appendleft(task)
        return True

    def leave(self, task: Task, num_tokens: int, reserved_tokens: int) -> None:
        """`task` stops running and releases its blocks, for `reserved_tokens`, of which it has filled `num_tokens`."""
        if task.stage.is_resumed and task.context_keys:
            self.kv.index(task, num_tokens)
        self._release(task, num_tokens, reserved_tokens, resumes=task.stage.is_resumed)

    def drop(self, task: Task) -> None:
        """`task` is wanted no more: it leaves wherever it is and releases its blocks. It is in no step in flight."""
        if task.admission < 0:
            if task in self.handed_over:
                self.handed_over.remove(task)
                self._unshare(task)
            else:
                self.waiting.remove(task)
                self.pending_tokens -= task.remaining_tokens
        elif task.admission in self.prefilling_tasks:
            del self.prefilling_tasks[task.admission]
            self.pending_tokens -= task.remaining_tokens
            self._release(task, task.computed_tokens, task.computed_tokens, resumes=False)
        elif task.join_step < 0:
            self._release(task, task.computed_tokens, task.computed_tokens, resumes=False)
        else:
            context, reserved = self.cohort.context(task), self.cohort.reserved_tokens(task, self._grown)
            self.cohort.leave(task)
            self._release(task, context, reserved, resumes=False)

    def hold(self, task: Task) -> None:
        """`task` is done and stops running; its blocks stay until `sent`."""
        self.sending[task.admission] = self.running.pop(task.admission)

    def sent(self, task: Task) -> None:
        """The KV cache of `task` is where it is needed: release its blocks here."""
        num_tokens = self.sending.pop(task.admission).computed_tokens
        self.promised -= self._promises.pop(task.admission, 0)
        self.kv.release(task, num_tokens, self.kv.blocks_for(num_tokens), resumes=False)

    @property
    def shared_context(self) -> int:
        """Tokens that `cohort.sum_context` counts again for each decode but the first of those that share a prefix."""
        again = sum((each.num_running - 1) * each.num_blocks for each in self.prefixes if each.num_running > 1)
        return again * self.kv.block_size

    def held_blocks(self, task: Task) -> int:
        """KV blocks that a running task holds now, what this step computes for it included."""
        if task.admission in self.prefilling_tasks:
            return self.kv.blocks_for(task.computed_tokens + self._scheduled.get(task.admission, 0))
        shared = task.shared.num_blocks if task.shared else 0
        return self.kv.blocks_for(self.cohort.reserved_tokens(task, self._grown)) - shared

    def let_in(self, task: Task) -> None:
        self._admissions += 1
        task.admission = self._admissions
        self.running[task.admission] = task
        if self.reserves_output:
            self._promises[task.admission] = promise = self.promise(task)
            self.promised += promise

    def succeed(self, before: Residents) -> None:
        """All that were there are gone, with what they held; what `before` has elsewhere is taken on."""
        self.on_loss = before.on_loss

    # --- scarcity ---

    def promise(self, task: Task) -> int:
        """Blocks that `task` holds at its last token: the engine knows max_tokens, which its request uses up."""
        request, stage = task.request, task.stage
        output = stage.oracle_output_tokens or (request.oracle_output_tokens if self._generates else 0)
        to_generate = output - 1 + self.cohort.tokens_per_decode - 1 if output > 1 else 0
        return self.kv.blocks_for((stage.input_tokens or request.input_tokens) + to_generate)

    def keeps_promises(self, task: Task) -> bool:
        """Whether `task` may come in and all that run still have room to their last token."""
        if not self.reserves_output:
            return True
        return self.promised + self.promise(task) + self.kv.watermark_blocks <= self.kv.num_blocks

    def _grow_one_by_one(self) -> int:
        """The step on which blocks run out: serve decodes in order of admission, or of rank, preempting the last."""
        before = self.num_preemptions
        cohort, kv = self.cohort, self.kv
        tasks = list(self.running.values())
        if self.ranks is not None:
            tasks.sort(key=self.ranks.of)  # nobody who has grown has to go: those left rank behind
        for task in tasks:
            if task.admission < 0 or task.admission in self.prefilling_tasks:
                continue  # preempted meanwhile, or not a decode
            held = kv.blocks_for(cohort.reserved_tokens(task, False))
            needed = kv.blocks_for(cohort.reserved_tokens(task, True)) - held
            if needed and self._make_room(task, needed):
                kv.take(needed)
        self._grown = cohort.count > 0
        return self.num_preemptions - before

    def _make_room(self, task: Task, num_blocks: int) -> bool:
        """Preempt the last of the running tasks until `num_blocks` are available; False if `task` itself had to go."""
        while self.kv.available < num_blocks:
            if self.prefixes and self.surrender():
                continue
            victim = self._last()
            self.preempt(victim)
            if victim is task:
                return False
        return True

    def _last(self) -> Task:
        if self.ranks is not None:
            return self.ranks.last(self.running.values())
        return self.running[next(reversed(self.running))]

    def preempt(self, task: Task) -> None:
        """Preemption by recompute: `task` waits again, in front; what it generated becomes part of its target."""
        self.on_preempt(task)
        if task.admission in self.prefilling_tasks:
            del self.prefilling_tasks[task.admission]
            tokens = task.computed_tokens
            self.pending_tokens += tokens
            scheduled = self._scheduled.pop(task.admission, 0)
            lost = self.kv.unindex(task, tokens) if scheduled else 0
            self._release(task, 0 if lost else tokens, tokens + scheduled, resumes=True, lost_blocks=lost)
        else:
            tokens = self.cohort.context(task)
            reserved = self.cohort.reserved_tokens(task, self._grown)
            self.cohort.leave(task)
            self._grown = self._grown and self.cohort.count > 0  # a step without decodes won't say that it is over
            task.generated_tokens += self.cohort.generated(task)
            self._release(task, tokens, reserved, resumes=True)
            task.target_tokens = tokens + 1  # the token sampled last isn't in the cache yet
            self.pending_tokens += task.target_tokens
        task.admission = task.join_step = task.finish_step = -1
        task.found_from = tokens
        task.computed_tokens = 0
        self.num_preemptions += 1
        self._has_preempted = True
        task.request.num_preemptions += 1
        self.waiting.appendleft(task)

    def _release(
        self, task: Task, num_tokens: int, reserved_tokens: int, *, resumes: bool, lost_blocks: int = 0
    ) -> None:
        num_blocks = self.kv.blocks_for(reserved_tokens) - lost_blocks
        if task.shared is None:
            # a run is found by its request and context
            is_alone = task.stage.context is not None or task.branch is None or task.branch.joins is None
            self.kv.release(task, num_tokens, num_blocks, resumes=resumes and is_alone)
        else:
            self.kv.release(task, num_tokens, num_blocks - task.shared.num_blocks, resumes=False)
            task.shared.num_running -= 1
            self._unshare(task)
        del self.running[task.admission]
        self.promised -= self._promises.pop(task.admission, 0)

    def _unshare(self, task: Task) -> None:
        """`task` needs the blocks no more that it shares: the last one gives them back."""
        shared, task.shared = task.shared, None
        if shared is None:
            return
        shared.num_users -= 1
        if not shared.num_users and shared.is_held:
            del self.prefixes[shared]
            num_tokens = shared.num_blocks * self.kv.block_size
            self.kv.release(shared.holder, num_tokens, shared.num_blocks, resumes=False)


def share_prefix(tasks: Sequence[Task], num_blocks: int, holder: Task | None = None) -> SharedPrefix:
    """Let decodes of one context share its `num_blocks` full blocks; without a `holder` nobody holds them yet."""
    first = tasks[0]
    stand_in = Task(first.request, first.stage, -1, first.target_tokens, first.queued_ns)  # it has no units in an index
    shared = SharedPrefix(holder or stand_in, num_blocks, len(tasks), is_held=holder is not None)
    if len(tasks) > 1:
        for task in tasks:
            task.shared = shared
    return shared
