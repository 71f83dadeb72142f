"""Room at a client for decodes that come with a KV cache: blocks are reserved before it is sent.

Beside the residents, who admit what is computed here. It never sends anything and chooses no client.
"""

from __future__ import annotations

from mist.request import Task
from mist.residents import Residents


class Reservations:
    """`blocks`: by the task that will decode (or by its prefill, while that isn't over), what is kept for it.

    That is room for the context and for the next token, so that whoever has it waits for a place among
    `max_num_seqs` at most. Several decodes of one context have room for that; the others wait for that of their copies.
    """

    __slots__ = ("_promised", "_residents", "blocks", "num_promised")

    def __init__(self, residents: Residents) -> None:
        self._residents = residents
        self.blocks: dict[Task, int] = {}
        #: prompts under way elsewhere whose decodes are to come here
        self.num_promised = 0
        #: of the blocks, what engines that reserve the output keep free for it besides
        self._promised: dict[Task, int] = {}

    def has_room_ever(self, task: Task, num_tokens: int) -> bool:
        """Whether a context of `num_tokens` and what `make` would keep besides fit here at all, alone."""
        who = self._residents
        needed = self._blocks_for(num_tokens)
        if who.reserves_output:
            needed = max(needed, who.promise(task))
        return needed + who.kv.watermark_blocks <= who.kv.num_blocks

    def make(self, task: Task, num_tokens: int) -> bool:
        """Reserve room for a context of `num_tokens`; False, and nothing has changed, where there is none now.

        As in any admission, those that decode already grow first, and so does whoever was preempted or waits for the
        copy of a context that is here.
        """
        who = self._residents
        kv, cohort = who.kv, who.cohort
        if who.waiting and self._goes_first(who.waiting[0], task):
            return False
        if any(each not in self.blocks for each in who.handed_over):
            return False
        needed = self._blocks_for(num_tokens)
        if cohort.num_new_blocks() + needed + kv.watermark_blocks > kv.available or not who.keeps_promises(task):
            return False
        kv.take(needed)
        self.blocks[task] = needed
        if who.reserves_output:
            self._promised[task] = promise = who.promise(task)
            who.promised += promise
        return True

    def pass_on(self, task: Task, following: Task) -> None:
        """What was reserved for `task` is kept for the decode that follows it."""
        self.blocks[following] = self.blocks.pop(task)
        if task in self._promised:
            self._promised[following] = self._promised.pop(task)

    def give_back(self, task: Task) -> bool:
        """Nobody comes: the room of `task` is free again. False where it has none."""
        if task not in self.blocks:
            return False
        self._residents.kv.free += self._end(task)
        return True

    def clear(self) -> None:
        """Nobody has room here any more."""
        self.blocks.clear()
        self._promised.clear()

    def take_over(self, max_num_seqs: int) -> Task | None:
        """Admit the first decode whose context is here and that has room, its own or what is free; None: there is none.

        One without a reservation waits until those that decode already and it fit with their next tokens, and for
        whoever was preempted or came before.
        """
        who = self._residents
        if not who.handed_over or len(who.running) >= max_num_seqs:
            return None
        task = who.handed_over[0]
        if task not in self.blocks and not self._fits(task):
            others = [each for each in who.handed_over if each in self.blocks] if self.blocks else ()
            if not others:
                return None
            task = others[0]
        if task is who.handed_over[0]:
            who.handed_over.popleft()
        else:
            who.handed_over.remove(task)
        kv, shared = who.kv, task.shared
        needed = kv.blocks_for(task.target_tokens)
        if shared is not None and shared.is_held:
            needed -= shared.num_blocks
        if task in self.blocks:
            kv.free += self._end(task) - needed
        else:
            kv.take(needed)
        if shared is not None:
            shared.is_held = True
            shared.num_running += 1
            who.prefixes[shared] = None
        who.let_in(task)
        return task

    @property
    def are_here(self) -> bool:
        """Whether a decode waits that has room."""
        return bool(self.blocks) and any(task in self.blocks for task in self._residents.handed_over)

    def _blocks_for(self, num_tokens: int) -> int:
        return self._residents.kv.blocks_for(num_tokens + self._residents.cohort.tokens_per_decode)

    def _end(self, task: Task) -> int:
        self._residents.promised -= self._promised.pop(task, 0)
        return self.blocks.pop(task)

    def _fits(self, task: Task) -> bool:
        who, shared = self._residents, task.shared
        holds = shared is not None and shared.is_held  # it would keep others out while it waits
        if not holds and who.waiting and who.comes_before(who.waiting[0], task):
            return False
        kv, cohort = who.kv, who.cohort
        needed = cohort.num_new_blocks() + kv.blocks_for(task.target_tokens + cohort.tokens_per_decode)
        if shared is not None and holds:
            needed -= shared.num_blocks
        return needed + kv.watermark_blocks <= kv.available and who.keeps_promises(task)

    def _goes_first(self, waiting: Task, task: Task) -> bool:
        ranks = self._residents.ranks
        return waiting.request.num_preemptions > 0 if ranks is None else waiting.rank[:-1] <= ranks.order.key(task)
