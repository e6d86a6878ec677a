"""Who runs: requests waiting by shared prefix, rows in slots, blocks for their tokens. Pure host logic, no torch.

Owns admission, growth, preemption and slots. Rows of several prefixes run together where `several` says so (a GPU);
else, on a CPU, whose bytes hang on the rows beside a row, one prefix at a time. Invariants: a row's blocks cover every
token that a launched step may write; a preempted row starts again from its prompt and what it has drawn, and draws the
same text (the draw depends on seed and position only).
"""

from __future__ import annotations

import itertools
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from cai.engine.native.nesting import MIN_PREFIX, NOWHERE, Part
from cai.engine.stopping import Row

GROW_TOKENS = 64  # blocks are taken ahead for this many new tokens


class Blocks(Protocol):
    """What the scheduler needs of the cache."""

    free: list[int]
    by_slot: bool  # one block a row, as long as the longest row: nothing to keep in reserve

    def blocks_for(self, tokens: int) -> int: ...
    def take(self, count: int, slot: int) -> list[int]: ...
    def give_back(self, blocks: list[int]) -> None: ...


@dataclass(eq=False, slots=True)
class Running:
    """A row on the device. `tokens`: own tokens in the cache (prompt without prefix, then drawn ones fed back)."""

    row: Row
    slot: int
    blocks: list[int]
    tokens: int
    part: Part = NOWHERE
    launched: int = 0  # draws launched; one more than `len(row.ids)` while a step is in flight
    alive: bool = True

    @property
    def exhausted(self) -> bool:
        """Every draw it may make is launched."""
        return self.launched >= self.row.request.sampling.max_new_tokens


Place = Callable[[tuple[int, ...]], Part | None]
Holds = Callable[[tuple[int, ...]], bool]


def anywhere(prefix: tuple[int, ...]) -> Part | None:
    return Part(0, len(prefix))


def nowhere(prefix: tuple[int, ...]) -> bool:
    return False


@dataclass
class Scheduler:
    """Slots 0..max_rows-1; `active` maps slot to row."""

    blocks: Blocks
    max_rows: int
    prefill_tokens: int  # the most prompt tokens computed at a time (a single longer row is allowed)
    lone_prefixes: bool = False  # also what a single row has is set up: where a row's own tokens are computed otherwise
    several: bool = False  # rows of several prefixes run together
    waiting: OrderedDict[tuple[int, ...], deque[Row]] = field(default_factory=OrderedDict)
    active: dict[int, Running] = field(default_factory=dict)
    prefix: tuple[int, ...] = ()  # of the rows that were admitted last
    preemptions: int = 0

    def add(self, row: Row, first: bool = False) -> None:
        """Queue a row under the prefix it shares; `first`: before all that wait."""
        prefix = shared_prefix(row)
        group = self.waiting.setdefault(prefix, deque())
        group.appendleft(row) if first else group.append(row)
        if first and self.several:
            self.waiting.move_to_end(prefix, last=False)

    @property
    def idle(self) -> bool:
        return not self.active and not self.waiting

    def clear(self) -> None:
        for running in list(self.active.values()):
            self.release(running)
        self.waiting.clear()

    def _turns(self, holds: Holds) -> list[tuple[int, ...]]:
        """The prefixes whose rows may enter now, in their order: one where rows of one run at a time.

        That is the present one while rows wait for it or run, else the longest-waiting group's. A prefix that a single
        row has is not set up (but see `lone_prefixes`) unless it is there: that row joins those without a prefix.
        """
        if not self.several and (self.active or self.prefix in self.waiting):
            return [self.prefix] if self.prefix in self.waiting else []
        alone = [prefix for prefix, group in self.waiting.items() if prefix and len(group) == 1 and not holds(prefix)]
        if alone and not self.lone_prefixes:
            self._without_prefix(alone)
        return list(self.waiting) if self.several else list(self.waiting)[:1]

    def _without_prefix(self, alone: list[tuple[int, ...]]) -> None:
        """These rows join those without a prefix; among several prefixes at the place where the first of them stands,
        since a redraw goes before all that wait."""
        if self.several:
            groups, self.waiting = self.waiting, OrderedDict()
            for prefix, group in groups.items():
                self.waiting.setdefault(() if prefix in alone else prefix, deque()).extend(group)
            return
        for prefix in alone:
            self.waiting.setdefault((), deque()).extend(self.waiting.pop(prefix))

    def admit(self, place: Place = anywhere, holds: Holds = nowhere) -> list[Running]:
        """Rows to prefill now, in slots; empty if it is better to decode on, or nothing waits or fits.

        `place(prefix)`: where it stands, computed if need be; None where rows that run have to leave first.
        """
        turns, admitted = self._turns(holds), []  # type: ignore[var-annotated]
        if not self._worth_it(turns):
            return []
        slots = iter([slot for slot in range(self.max_rows) if slot not in self.active])
        budget = self.prefill_tokens
        # half of what the running rows may still grow by: most end before their limit, and a row that is preempted pays
        # its prompt twice
        reserve = 0 if self.blocks.by_slot else len(self.active) * self.blocks.blocks_for(GROW_TOKENS) // 2
        for prefix in turns:
            group, part = self.waiting[prefix], None
            while group:
                tokens = own_tokens(group[0], len(prefix))
                need = self.blocks.blocks_for(tokens + self._ahead(group[0]))
                full = need > len(self.blocks.free) - (reserve if self.active else 0)
                # the first row always fits the budget: one longer than a whole piece would else wait for ever
                if full or (admitted and tokens > budget) or len(self.active) >= self.max_rows:
                    return admitted
                if part is None and (part := place(prefix)) is None:  # not before a row of it has room
                    return admitted
                self.prefix, slot = prefix, next(slots)
                admitted.append(Running(group.popleft(), slot, self.blocks.take(need, slot), tokens, part))
                self.active[slot] = admitted[-1]
                budget -= tokens
            del self.waiting[prefix]
        return admitted

    def _worth_it(self, turns: list[tuple[int, ...]]) -> bool:
        """Prefill in large pieces: a sixteenth of the slots free, or as many prompt tokens as one piece holds."""
        room = self.max_rows - len(self.active)
        if not turns or room == 0:
            return False
        if not self.active or room >= max(1, self.max_rows // 16):
            return True
        if room >= sum(len(self.waiting[prefix]) for prefix in turns):
            return True
        rows = ((row, len(prefix)) for prefix in turns for row in self.waiting[prefix])
        return sum(own_tokens(row, shared) for row, shared in itertools.islice(rows, room)) >= self.prefill_tokens

    def _ahead(self, row: Row) -> int:
        return min(GROW_TOKENS, row.request.sampling.max_new_tokens - len(row.ids)) + 1

    def grow(self) -> tuple[bool, list[Running]]:
        """Blocks for one more token of every row. (any table changed, rows preempted to make room)."""
        changed, preempted = False, []
        for running in list(self.active.values()):
            if not running.alive:
                continue
            while self.blocks.blocks_for(running.tokens + 1) > len(running.blocks):
                if not self.blocks.free:  # another row gives way; where it is this one, it needs no block any more
                    victim = self._victim()
                    preempted.append(victim)
                    if victim is running:
                        break
                    continue
                running.blocks += self.blocks.take(1, running.slot)
                changed = True
        return changed, preempted

    def _victim(self) -> Running:
        """The row that has drawn least goes back to the front of its queue."""
        victim = min(self.active.values(), key=lambda running: running.launched)  # the least work to do again
        self.release(victim)
        self.preemptions += 1
        return victim

    def release(self, running: Running) -> None:
        """The row leaves its slot; its blocks are free (later writes are ordered behind the steps in flight)."""
        running.alive = False
        del self.active[running.slot]
        self.blocks.give_back(running.blocks)
        running.blocks = []

    def compact(self) -> list[tuple[int, int]]:
        """Move rows from the highest slots into free lower ones; (from, to) pairs. After it rows fill 0..n-1."""
        moves = []
        holes = [slot for slot in range(len(self.active)) if slot not in self.active]
        for hole, slot in zip(holes, sorted(self.active, reverse=True), strict=False):
            running = self.active.pop(slot)
            running.slot = hole
            self.active[hole] = running
            moves.append((slot, hole))
        return moves


def shared_prefix(row: Row) -> tuple[int, ...]:
    """The tokens shared with the stage's other prompts; at least one token stays the row's own."""
    request = row.request
    length = min(request.prefix_len, len(request.token_ids) - 1)
    return request.token_ids[:length] if length >= MIN_PREFIX else ()


def own_tokens(row: Row, shared: int) -> int:
    """How many tokens a row computes by itself behind the `shared` ones of its prefix."""
    return len(row.request.token_ids) - shared + len(row.ids)


def prompt_tokens(row: Row, shared: int) -> list[int]:
    """What a row has to feed: its prompt behind the prefix, and what it had drawn before a preemption."""
    return [*row.request.token_ids[shared:], *row.ids]
