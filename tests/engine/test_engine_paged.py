"""Rows of several prefixes over small blocks and a small store, at random: no row lost or changed, nothing leaks."""

from __future__ import annotations

import dataclasses
import random
import weakref
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

from paged import BLOCK, paged, whole  # noqa: E402
from test_engine import VOCAB, Letters, complete, tiny  # noqa: E402
from test_engine_parts import Blocks, row, scheduler  # noqa: E402

from cai.engine import Request, Sampling, ScoreRequest  # noqa: E402
from cai.engine.native import prefixes  # noqa: E402
from cai.engine.native import scheduler as scheduling  # noqa: E402
from cai.engine.native.cache import KVShape, PrefixStore  # noqa: E402
from cai.engine.native.engine import NativeEngine  # noqa: E402
from cai.engine.native.nesting import NOWHERE, Nested  # noqa: E402
from cai.engine.native.scheduler import Scheduler  # noqa: E402
from cai.engine.oracle import ReferenceEngine  # noqa: E402
from cai.errors import CaiError  # noqa: E402

ROOMY = {"rows": 6, "blocks": 80, "store": 400, "prefill": 64}
NARROW = {"rows": 8, "blocks": 19, "store": 100, "prefill": 32}


def numbers(draw, count):
    return tuple(draw.randrange(VOCAB) for _ in range(count))


def some(draw, count):
    """Requests of up to five prefixes, some too short for one."""
    shared = [numbers(draw, draw.choice([0, 10, 16, 20, 40, 80])) for _ in range(draw.randrange(1, 6))]
    made = []
    for i in range(count):
        prefix = draw.choice(shared)
        ids = prefix + numbers(draw, draw.randrange(1, 40))
        made.append(Request(i, ids, Sampling(0.7, draw.randrange(1, 25)), draw.getrandbits(64), len(prefix)))
    return made


def drawn(engine, wanted, draw, redraws=6):
    """Half of them first, the others and redraws while rows run; each as the oracle's."""
    expected, found = complete(ReferenceEngine(tiny(), Letters()), wanted), {}
    turns, left = iter(range(2000)), wanted[len(wanted) // 2 :]
    for request in wanted[: len(wanted) // 2]:
        engine.submit(request)
    while left or not engine.scheduler.idle:
        for done in engine.completions(lambda: next(turns) is None):
            assert done.id not in found
            found[done.id] = done.token_ids
            if left:
                engine.submit(left.pop(0))
            if redraws and draw.random() < 0.4:
                again = draw.choice(wanted)
                engine.submit(dataclasses.replace(again, id=100 * redraws + again.id, first=draw.random() < 0.7))
                redraws -= 1
            reading = {running.part for running in engine.scheduler.active.values()} - {NOWHERE}
            assert reading <= set(engine.store.parts.values())
        while left:
            engine.submit(left.pop())
    assert {i: expected[i % 100].token_ids for i in found} == found and {r.id for r in wanted} <= set(found)
    whole(engine)


@pytest.mark.parametrize("options", [ROOMY, NARROW, NARROW | {"apart": 19, "lone": True}], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_random_rows_draw_what_the_oracle_draws(options, seed, monkeypatch):
    monkeypatch.setattr(scheduling, "GROW_TOKENS", 3)  # so that rows have to give way
    draw = random.Random(seed)
    drawn(paged(**options), some(draw, 12), draw)


@pytest.mark.parametrize("seed", range(3))
def test_memory_that_runs_out_anywhere_over_several_rows_loses_none(seed):
    engine, draw = paged(**ROOMY), random.Random(seed)
    real, before = engine.decoder.forward, [True]

    def tight(ids, step, *rest):
        several = len(step.lens) > 1 if step.prefill else len(engine.scheduler.active) > 1
        before[0] = several and not before[0] and draw.random() < 0.2
        if before[0]:
            raise torch.OutOfMemoryError("injected")
        return real(ids, step, *rest)

    engine.decoder.forward = tight
    drawn(engine, some(draw, 12), draw)
    assert engine.stats.out_of_memory > 0


@pytest.mark.parametrize("seed", range(60))
def test_the_scheduler_and_the_store_alone_lose_no_row(seed):
    """Blocks and places are numbers; rows end after so many draws."""
    draw = random.Random(seed)
    store = PrefixStore(KVShape(1, 1, 1, torch.float32), draw.choice([60, 90, 200]), torch.device("cpu"))
    s = Scheduler(Blocks(draw.choice([30, 60, 200])), draw.choice([1, 3, 8]), 64, draw.random() < 0.3, several=True)
    ends, left, total = [], [row(i, 70, draw.randrange(1, 25), draw.choice([0, 20, 30, 45, 60])) for i in range(40)], 40

    def place(prefix):
        held = {running.part for running in s.active.values()}
        if not prefix:
            return NOWHERE
        part = store.find(prefix) or store.take(prefix, len(prefix), held)
        assert part is not None or held
        return part

    for _ in range(3000):
        while left and draw.random() < 0.3:
            s.add(left.pop(), first=draw.random() < 0.2)
        if not (fresh := s.admit(place, store.parts.__contains__)):
            for running in s.grow()[1]:
                s.add(running.row, first=True)
        for running in fresh or list(s.active.values()):
            running.row.ids.append(0)
            running.tokens, running.launched = running.tokens + (not fresh), len(running.row.ids)
            assert len(running.blocks) * s.blocks.size >= running.tokens
            if running.exhausted:
                s.release(running)
                ends.append(running.row.request.id)
        assert {r.part for r in s.active.values()} - {NOWHERE} <= set(store.parts.values())
        if s.idle and not left:
            break
    assert sorted(ends) == list(range(total)) and len(set(s.blocks.free)) == len(s.blocks.free)


# -- admission


def test_a_lone_redraw_is_before_all_that_wait_also_without_its_prefix():
    s = scheduler(rows=2, prefill=10_000)
    s.several = True
    for i in range(6):
        s.add(row(i, tokens=60, prefix=20))
    s.add(row(7, tokens=60))
    s.add(row(9, tokens=60, prefix=30), first=True)
    first = s.admit()
    assert [(r.row.request.id, r.part.length) for r in first] == [(9, 0), (7, 0)]


@pytest.mark.parametrize("rows, blocks, prefill", [(4, 1000, 1000), (8, 70, 1000), (8, 1000, 160)])
def test_a_prefix_is_not_placed_before_a_row_of_it_has_room(rows, blocks, prefill):
    """Else it is computed for nothing, and what gave way for it has to be computed again."""
    s, placed = scheduler(blocks=blocks, rows=rows, prefill=prefill), []
    s.several = True
    for i in range(8):
        s.add(row(i, tokens=60, prefix=20 + 10 * (i // 4)))
    s.admit(lambda prefix: placed.append(len(prefix)) or scheduling.anywhere(prefix))
    assert placed == [20] and len(s.active) == 4


def test_a_few_rows_of_several_prefixes_wait_for_a_larger_piece():
    """One slot of 32 is free: not worth a prefill while two rows wait, each alone with its prefix."""
    s = scheduler(rows=32, prefill=10_000)
    s.several = True
    for i in range(31):
        s.add(row(i))
    assert len(s.admit()) == 31
    for i in range(2):
        s.add(row(40 + i, tokens=60, prefix=20 + 10 * i))
    assert s.admit(holds=lambda prefix: True) == []
    s.release(s.active[0])
    assert len(s.admit(holds=lambda prefix: True)) == 2


def test_half_of_what_running_rows_may_grow_by_is_kept_for_them():
    s = scheduler(blocks=45)  # 19 a row now; 8 of the 26 left belong to the first
    s.add(row(0, new=200))
    assert len(s.admit()) == 1
    s.add(row(1, new=200))
    assert s.admit() == []
    s.blocks.free.append(99)
    assert len(s.admit()) == 1


def test_nothing_gives_way_for_a_prefix_that_has_no_blocks():
    engine = paged(blocks=12, store=60)
    old, new = (Nested(numbers(random.Random(i), 40)) for i in range(2))
    assert prefixes.placed(engine, [old])
    engine.cache.free = engine.cache.free[:4]
    assert prefixes.placed(engine, [new], {NOWHERE}) is None
    assert [name[0] for name in engine.store.parts] == [old]


# -- scores


def cases(count=4, asks=3, text=40):
    draw = random.Random(1)
    made, head = [], numbers(draw, 30)
    for _ in range(count):
        shared = (*head, *numbers(draw, text))
        made += [ScoreRequest(0, (*shared, *numbers(draw, 1 + i)), (7, 9), len(shared), 30) for i in range(asks)]
    return [dataclasses.replace(request, id=i) for i, request in enumerate(made)]


def totals(engine, wanted):
    return [score.total for score in sorted(engine.score(wanted), key=lambda score: score.id)]


@pytest.mark.parametrize("apart", [0, 10])
def test_memory_that_runs_out_over_several_prefixes_is_tried_over_fewer(apart):
    """As long as one of them fits: together they are only faster."""
    engine, wanted = paged(rows=16, blocks=60, prefill=1000, apart=apart), cases()
    real, sizes = engine.decoder.forward, []

    def tight(ids, *rest):
        sizes.append(len(ids))
        if len(ids) > 45:
            raise torch.OutOfMemoryError("injected")
        return real(ids, *rest)

    engine.decoder.forward = tight
    plain = totals(NativeEngine(tiny(), Letters(), batch_size=4), wanted)
    assert totals(engine, wanted) == pytest.approx(plain, abs=1e-4)
    assert max(sizes) > 45 and engine.stats.extra["prefix_tokens_computed"] == 30 + 4 * 40
    assert not apart or not engine.cache.keys.any()  # what is drawn in 8 bits has no part in it
    whole(engine)


def test_the_same_question_after_two_cases_is_two_rows():
    """Within one case an answer shares the row of another answer to the same question; across cases it may not."""
    draw = random.Random(2)
    texts, questions = [numbers(draw, 40) for _ in range(2)], [numbers(draw, 5) for _ in range(2)]
    order = [(texts[0], questions[0]), (texts[0], questions[1]), (texts[1], questions[1]), (texts[1], questions[0])]
    wanted = [ScoreRequest(i, text + question, (7, 9), 40) for i, (text, question) in enumerate(order)]
    plain = totals(NativeEngine(tiny(), Letters(), batch_size=4), wanted)
    assert totals(paged(rows=16, prefill=1000), wanted) == pytest.approx(plain, abs=1e-4)


def test_a_score_longer_than_the_exact_cache_is_refused_and_many_of_one_token_are_not():
    engine = paged(rows=32, blocks=60, prefill=1000, apart=4)
    with pytest.raises(
        CaiError, match=rf"score request 5 needs {4 * BLOCK} tokens, memory has room for {4 * BLOCK - 1}"
    ):
        list(engine.score([ScoreRequest(5, (1,) * (4 * BLOCK - 1), (2,))]))
    short = [ScoreRequest(i, (i,), (2,)) for i in range(20)]
    assert totals(engine, short) == pytest.approx(totals(NativeEngine(tiny(), Letters()), short), abs=1e-4)
    whole(engine)


def test_a_store_that_grows_lets_the_old_one_go_before(monkeypatch):
    engine, alive = paged(store=20), []
    old, real = weakref.ref(engine.store), prefixes.PrefixStore

    def made(shape, capacity, device):
        alive.append((capacity > 1, old() is None))
        return real(shape, capacity, device)

    monkeypatch.setattr(prefixes, "PrefixStore", made)
    assert prefixes.placed(engine, [Nested(numbers(random.Random(0), 40))])
    assert alive[-1] == (True, True) and engine.graphs.cleared == 1


def test_a_held_part_and_one_placed_together_with_it_stay():
    """Of what is wanted in one call none gives way to another, even where the store has room for one only."""
    engine = paged(store=64)
    a, b = (Nested(numbers(random.Random(i), 40)) for i in range(2))
    parts = prefixes.placed(engine, [a, b])
    assert parts is not None and len({part for each in parts for part in each}) == 2 and engine.store.capacity >= 80
    assert SimpleNamespace(**engine.stats.extra).prefix_tokens_computed in (80, 120)
