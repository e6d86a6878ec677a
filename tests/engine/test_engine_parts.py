"""Draws, stop rules and the scheduler, without a model."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.slow

from cai.engine import Request, Sampling, sampling  # noqa: E402
from cai.engine.native.cache import KVShape, PrefixStore  # noqa: E402
from cai.engine.native.nesting import Part  # noqa: E402
from cai.engine.native.scheduler import Scheduler  # noqa: E402
from cai.engine.stopping import Pieces, Row  # noqa: E402

# -- draws


def test_noise_is_a_pure_function_of_seed_position_and_token():
    seeds = sampling.seed_tensor([1, 2**64 - 1, 7])
    positions = torch.tensor([0, 5, 9])
    noise = sampling.gumbel_noise(seeds, positions, 1000)
    again = sampling.gumbel_noise(seeds[1:2], positions[1:2], 1000)
    assert torch.equal(noise[1:2], again)
    assert torch.equal(noise[:, :10], sampling.gumbel_noise(seeds, positions, 10))
    assert torch.isfinite(noise).all()


def test_the_bits_never_change():
    """splitmix64 of the counter, then lowbias32 with a second key; worked out in plain Python."""
    mask64, mask32 = (1 << 64) - 1, (1 << 32) - 1

    def bits(seed, position, token):
        z = (seed + (position + 1) * 0x9E3779B97F4A7C15) & mask64
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask64
        z ^= z >> 31
        x = (token * 0x9E3779B1 & mask32) ^ (z & mask32)
        x = ((x ^ x >> 16) * 0x7FEB352D) & mask32
        x = ((x ^ x >> 15) + (z >> 32)) & mask32
        x = (x * 0x846CA68B) & mask32
        return (x ^ x >> 16) & 0x7FFFFFFF

    cases = [(0, 0, 0), (2**63 + 11, 499, 152063), (123456789, 3, 65536)]
    for seed, position, token in cases:
        key0, key1 = sampling.row_keys(sampling.seed_tensor([seed]), torch.tensor([position]))
        assert sampling.hash_BV(key0, key1, torch.tensor([token])).item() == bits(seed, position, token)


def test_draw_frequencies_are_the_softmax():
    """20,000 draws at T = 0.7: each frequency within 4 standard errors."""
    logits, count = torch.tensor([0.0, 1.0, 2.0, -1.0]), 20000
    drawn = sampling.pick(
        logits.expand(count, 4), torch.full((count,), 0.7), sampling.seed_tensor([9] * count), torch.arange(count)
    )
    for probability, hits in zip((logits / 0.7).softmax(-1).tolist(), torch.bincount(drawn).tolist(), strict=True):
        assert abs(hits / count - probability) < 4 * math.sqrt(probability * (1 - probability) / count)


def test_temperature_zero_is_argmax_also_beside_drawn_rows():
    logits = torch.randn(3, 500)
    drawn = sampling.pick(logits, torch.tensor([0.0, 0.0, 0.9]), sampling.seed_tensor([1, 2, 3]), torch.arange(3))
    assert drawn[:2].tolist() == logits[:2].argmax(-1).tolist()


# -- stop rules


class Bytes:
    """Token i is byte i; 256 is an end."""

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode(errors="replace")


def drawn(text, stop=(), eos=(256,), limit=100):
    row = Row(Request(0, (1,), Sampling(0.0, limit, stop, eos)), Pieces(Bytes()))
    for token in [*text.encode(), 256]:
        if row.feed(token) is not None:
            break
    return row.completion()


@pytest.mark.parametrize(
    "text,stop,expected,finish",
    [
        ("hello", (), "hello", "eos"),
        ("hello\n\nHuman: x", ("\n\nHuman:",), "hello", "stop"),
        ("a  b", ("  ",), "a", "stop"),
        ("das ist schön 氷!", ("氷",), "das ist schön ", "stop"),
        ("xaab", ("aab", "ab"), "x", "stop"),
        ("", ("x",), "", "eos"),
    ],
)
def test_text_is_cut_before_eos_or_stop(text, stop, expected, finish):
    done = drawn(text, stop)
    assert (done.text, done.finish) == (expected, finish)


def test_the_limit_ends_a_row_and_eos_is_kept_among_the_ids():
    assert drawn("hello", limit=3).finish == "length"
    assert drawn("hello", limit=3).text == "hel"
    assert drawn("hi").token_ids == (104, 105, 256)


# -- scheduler


class Blocks:
    by_slot = False

    def __init__(self, count, size=4):
        self.free, self.size = list(range(count, 0, -1)), size

    def blocks_for(self, tokens):
        return -(-tokens // self.size)

    def take(self, count, slot):
        return [self.free.pop() for _ in range(count)]

    def give_back(self, blocks):
        self.free.extend(blocks)


def row(id, tokens=8, new=20, prefix=0):
    return Row(Request(id, tuple(range(tokens)), Sampling(0.0, new), prefix_len=prefix), Pieces(Bytes()))


def scheduler(blocks=1000, rows=4, prefill=64):
    return Scheduler(Blocks(blocks), rows, prefill)


def test_rows_enter_free_slots_up_to_the_prefill_budget():
    s = scheduler(rows=8, prefill=20)
    for i in range(5):
        s.add(row(i))
    assert [r.slot for r in s.admit()] == [0, 1]
    assert [r.slot for r in s.admit()] == [2, 3]
    s.release(s.active[1])
    assert [r.slot for r in s.admit()] == [1]
    assert s.admit() == []


def test_a_cache_of_one_block_a_row_fills_every_slot():
    """Such a block never grows: nothing is kept in reserve for the rows that run."""
    blocks = Blocks(16, size=10_000)
    blocks.by_slot = True
    s = Scheduler(blocks, 16, 20)
    for i in range(16):
        s.add(row(i))
    while s.admit():
        pass
    assert len(s.active) == 16


def ids(running):
    return [r.row.request.id for r in running]


def test_groups_by_prefix_run_one_after_another_and_a_lone_prefix_is_not_set_up():
    s = scheduler()
    s.add(row(0, tokens=40, prefix=20))
    s.add(row(1, tokens=41, prefix=30))
    s.add(row(2, tokens=42, prefix=20))
    admitted = s.admit()
    assert ids(admitted) == [0, 2] and {r.part.length for r in admitted} == {20}
    assert s.admit() == []  # they run
    for running in admitted:
        s.release(running)
    assert [(r.tokens, r.part.length) for r in s.admit()] == [(41, 0)]


def rows_of_prefixes(s, each):
    """`each` rows of three prefixes of 20, 30 and 40 tokens, by turns."""
    for i in range(3 * each):
        s.add(row(i, tokens=60, prefix=20 + 10 * (i % 3)))


def test_rows_of_several_prefixes_enter_together_one_prefix_after_another():
    s = scheduler(rows=64, prefill=10_000)
    s.several = True
    rows_of_prefixes(s, 4)
    assert ids(s.admit()) == [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]
    assert s.admit() == [] and not s.waiting
    again = row(99, tokens=60, prefix=30)
    s.add(row(98, tokens=60, prefix=20))
    s.add(again, first=True)  # a redraw: before all that wait, with the prefix that is there
    admitted = s.admit(holds=lambda prefix: True)
    assert ids(admitted) == [99, 98] and [r.part.length for r in admitted] == [30, 20]


def test_among_several_a_lone_row_has_its_prefix_where_that_is_there_or_draws_are_rounded():
    for holds, lone, length in ((False, False, 0), (True, False, 30), (False, True, 30)):
        s = scheduler(rows=64, prefill=10_000)
        s.several, s.lone_prefixes = True, lone
        s.add(row(0, tokens=60, prefix=30))
        assert [r.part.length for r in s.admit(holds=lambda prefix, holds=holds: holds)] == [length]


def test_a_prefix_for_which_there_is_no_room_waits_until_rows_leave():
    s, room = scheduler(rows=64, prefill=10_000), {20: Part(0, 20), 30: None, 40: Part(50, 40)}
    s.several = True
    rows_of_prefixes(s, 2)
    assert ids(s.admit(lambda prefix: room[len(prefix)])) == [0, 3]
    assert s.admit(lambda prefix: room[len(prefix)]) == []
    room[30] = Part(20, 30)
    assert ids(s.admit(lambda prefix: room[len(prefix)])) == [1, 4, 2, 5]


def test_the_store_gives_way_to_what_is_new_but_never_what_rows_read():
    store = PrefixStore(KVShape(1, 1, 1, torch.float32), 100, torch.device("cpu"))
    a, b, c = (store.take(name, length, ()) for name, length in (("a", 30), ("b", 30), ("c", 30)))
    assert [a, b, c] == [(0, 30), (30, 30), (60, 30)]
    assert store.find("a") == a and list(store.parts) == ["b", "c", "a"]  # used last
    assert store.take("d", 40, {b}) == (60, 40)  # c gave way, b is read
    assert list(store.parts) == ["b", "a", "d"]
    assert store.take("e", 41, {a, b}) is None
    assert store.take("f", 101, ()) is None and list(store.parts) == ["b", "a", "d"]  # nothing gave way in vain
    assert store.take("g", 100, ()) == (0, 100) and list(store.parts) == ["g"]


def test_growth_preempts_the_row_that_has_drawn_least():
    s = scheduler(blocks=12, rows=2)
    s.add(row(0, tokens=10, new=12))
    s.add(row(1, tokens=10, new=12))
    first, second = [*s.admit(), *s.admit()]
    first.launched, second.launched = 9, 2
    s.blocks.free.clear()
    first.tokens = len(first.blocks) * s.blocks.size
    changed, preempted = s.grow()
    assert preempted == [second]
    assert changed
    assert not second.alive
    assert len(first.blocks) * s.blocks.size > first.tokens
    assert s.preemptions == 1


def test_blocks_come_back_and_holes_close():
    s = scheduler(blocks=50, rows=8)
    for i in range(6):
        s.add(row(i))
    s.admit()
    for slot in (0, 3):
        s.release(s.active[slot])
    assert sorted(s.compact()) == [(4, 3), (5, 0)]
    assert sorted(s.active) == [0, 1, 2, 3]
    s.clear()
    assert len(s.blocks.free) == 50
    assert s.idle
