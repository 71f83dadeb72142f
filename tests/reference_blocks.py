"""KV blocks to compare with: every block an object, every prefix looked for unit by unit.

The memory of the naive scheduler in `reference.py`. It shares no code with the client and decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(eq=False)
class Block:
    users: int = 0  # sequences that hold it, its unit's apart
    unit: int | None = None  # hash key of the unit it belongs to
    own: int | None = None  # index of the job whose private content it holds
    position: int = -1  # place among the private blocks left behind


@dataclass(eq=False)
class Holder:
    """What a sequence of job `index` has in memory: `blocks`, of which the first ones are those of `units`."""

    index: int
    prompt: int
    keys: tuple[int, ...]
    blocks: list[Block] = field(default_factory=list)
    units: int = 0
    left_start: int = -1  # the token at which what it left behind begins
    left_full: int = 0


@dataclass
class Blocks:
    num_blocks: int
    block_size: int
    unit_tokens: int = 0
    caching: bool = False

    def __post_init__(self) -> None:
        self.pool = [Block() for _ in range(self.num_blocks)]  # what can be taken, first to go first
        self.held: dict[int, int] = {}  # unit -> sequences that refer to it
        self.unit_blocks: dict[int, list[Block]] = {}
        self.per_unit = self.unit_tokens // self.block_size

    def count_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def take(self, holder: Holder, count: int) -> None:
        for _ in range(count):
            block = self.pool.pop(0)
            if block.unit is not None:
                for other in self.unit_blocks.pop(block.unit):
                    other.unit = None
            block.own, block.position, block.users = None, -1, 1
            holder.blocks.append(block)

    def share(self, holder: Holder, other: Holder, tokens: int) -> None:
        """`other` holds the full blocks of `holder`'s first `tokens` too."""
        other.blocks = holder.blocks[: tokens // self.block_size]
        other.units = holder.units
        for block in other.blocks:
            block.users += 1
        for key in other.keys[: other.units]:
            self.held[key] += 1

    def release(self, holder: Holder, computed: int, resumes: bool) -> None:
        for block in self.pool:
            if block.own == holder.index:
                block.own = None  # what an earlier preemption left is forgotten
        private = holder.blocks[holder.units * self.per_unit :]
        for block in holder.blocks:
            block.users -= 1
        for position, block in reversed(list(enumerate(private))):
            if not block.users:
                block.own = holder.index if resumes and self.caching else None
                block.position = position
                self.pool.append(block)
        holder.left_start = holder.units * self.unit_tokens if resumes else -1
        holder.left_full = (computed - holder.units * self.unit_tokens) // self.block_size
        for key in reversed(holder.keys[: holder.units]):
            self.held[key] -= 1
            if not self.held[key]:
                del self.held[key]
                self.pool.extend(reversed(self.unit_blocks[key]))
        holder.blocks = []
        holder.units = 0

    def lookup(self, holder: Holder, most: int) -> tuple[list[int], list[Block]]:
        """Units, and blocks that it left behind itself, with its first tokens: `most` at most."""
        units: list[int] = []
        own: list[Block] = []
        if not self.caching:
            return units, own
        if self.unit_tokens:
            for key in holder.keys[: min(most, holder.prompt) // self.unit_tokens]:
                if key not in self.unit_blocks:
                    break
                units.append(key)
        start = len(units) * self.unit_tokens
        if holder.left_start == start:
            left = {b.position: b for b in self.pool if b.own == holder.index}
            while len(own) < min(holder.left_full, (most - start) // self.block_size) and len(own) in left:
                own.append(left[len(own)])
        return units, own

    def refer(self, holder: Holder, units: list[int], own: list[Block]) -> None:
        """Hold what a look-up has found."""
        for key in units:
            for block in self.unit_blocks[key]:
                if key not in self.held:
                    self.pool.remove(block)
                block.users += 1
                holder.blocks.append(block)
            self.held[key] = self.held.get(key, 0) + 1
        holder.units = len(units)
        for block in own:
            self.pool.remove(block)
            block.own, block.users = None, 1
            holder.blocks.append(block)
        if own:
            for block in self.pool:
                if block.own == holder.index:
                    block.own = None

    def index(self, holder: Holder, tokens: int) -> None:
        """Its first `tokens` are scheduled: the units that they fill can be found."""
        if not (self.caching and self.unit_tokens):
            return
        while holder.units < min(len(holder.keys), min(tokens, holder.prompt) // self.unit_tokens):
            key = holder.keys[holder.units]
            place = slice(holder.units * self.per_unit, (holder.units + 1) * self.per_unit)
            mine = holder.blocks[place]
            if key in self.unit_blocks:
                if key not in self.held:
                    for block in self.unit_blocks[key]:
                        self.pool.remove(block)
                for block in mine:
                    block.users = 0
                for block in self.unit_blocks[key]:
                    block.users += 1
                holder.blocks[place] = self.unit_blocks[key]
                self.pool[:0] = mine
            else:
                self.unit_blocks[key] = mine
                for block in mine:
                    block.unit = key
            self.held[key] = self.held.get(key, 0) + 1
            holder.units += 1

    def unindex(self, holder: Holder, computed: int) -> bool:
        """What it has scheduled behind its first `computed` tokens won't be; whether others keep blocks of that."""
        lost = False
        while self.unit_tokens and holder.units > computed // self.unit_tokens:
            holder.units -= 1
            key = holder.keys[holder.units]
            place = slice(holder.units * self.per_unit, (holder.units + 1) * self.per_unit)
            self.held[key] -= 1
            if self.held[key]:
                lost = True
                for block in holder.blocks[place]:
                    block.users -= 1
                del holder.blocks[place]
            else:
                del self.held[key]
                for block in self.unit_blocks.pop(key):
                    block.unit = None
        return lost
