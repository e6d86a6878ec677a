"""Weights written ahead: a buffer is overwritten only behind its last product, and read only behind its writing."""

from __future__ import annotations

import random

import pytest

from cai.training.ahead import Turns


class Clock:
    """Both streams, in which nothing runs before what it was told to wait for; a mark is a place in the main one."""

    def __init__(self):
        self.launched = 0  # products, and what stands between them
        self.waited = set()
        self.written = 0

    def reached(self):
        return self.launched

    def write(self, after, run):
        self.after = after
        run()
        self.written += 1
        return self.written

    def wait(self, mark):
        self.waited.add(mark)


class Buffers:
    """Says at each writing and reading whether it may be."""

    def __init__(self, count):
        self.clock = Clock()
        self.holds, self.mark, self.last_read = [None] * count, [0] * count, [0] * count
        self.turns = Turns(count, self.fill, self.clock)

    def fill(self, at, key):
        assert self.clock.after >= self.last_read[at], "overwritten before its product has ended"
        self.holds[at], self.mark[at] = key, self.clock.written + 1

    def product(self, key, following=None):
        at = self.turns.take(key, following)
        assert self.holds[at] == key, "another weight"
        assert self.mark[at] in self.clock.waited, "read before it was written"
        self.clock.launched += 1
        self.last_read[at] = self.clock.launched
        return at


def passes(layers):
    """(key, what follows) of a forward and a backward pass."""
    forward = [((i, False), (i + 1, False) if i + 1 < layers else None) for i in range(layers)]
    return forward + [((i, True), (i - 1, True) if i else None) for i in reversed(range(layers))]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("seed", range(20))
def test_buffers_are_written_and_read_in_order_whatever_is_asked(count, seed):
    draw, buffers = random.Random(seed), Buffers(count)
    for _ in range(30):
        if draw.random() < 0.2:
            buffers.turns.forget()
        key = draw.randrange(5)
        buffers.product(key, draw.choice([None, key, draw.randrange(5)]))


def test_with_two_buffers_each_weight_but_the_first_of_a_pass_is_written_ahead():
    buffers = Buffers(2)
    for key, following in passes(6):
        ahead = key in buffers.holds
        buffers.product(key, following)
        assert ahead == (key not in ((0, False), (5, True)))
    assert buffers.clock.written == 12  # each once


def test_what_was_forgotten_is_written_again():
    buffers = Buffers(2)
    buffers.product("a", "b")
    buffers.turns.forget()
    buffers.product("a", "b")
    assert buffers.clock.written == 4


def test_a_writing_that_failed_is_not_held():
    buffers = Buffers(2)

    def fails(at, key):
        raise MemoryError

    buffers.product("a")
    whole, buffers.turns._fill = buffers.turns._fill, fails
    with pytest.raises(MemoryError):
        buffers.product("b")
    buffers.turns._fill = whole
    buffers.product("b")
