"""A saved prefix behind a saved head: the same scores, the head computed once, memory counted by the tokens saved."""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
from support.runs import ROOT

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

from test_engine import Letters, complete, requests, tiny  # noqa: E402
from test_engine_families import checkpoint  # noqa: E402
from test_nesting import ASKS, CASE, CASES, HEAD, OWN, asked  # noqa: E402

from cai.commands.cli import parse  # noqa: E402
from cai.data import rounds  # noqa: E402
from cai.engine.native import prefixes  # noqa: E402
from cai.engine.native.engine import NativeEngine  # noqa: E402
from cai.engine.native.nesting import Nested  # noqa: E402
from cai.engine.oracle import ReferenceEngine  # noqa: E402
from cai.errors import CaiError  # noqa: E402
from cai.inputs import read_inputs  # noqa: E402
from cai.models.tokenizer_file import ByteCounter  # noqa: E402

WITHIN = 1e-5  # nats; the same products over other numbers of rows


def small(wanted):
    """The same requests in ids of the tiny decoder."""
    return [dataclasses.replace(r, context_ids=tuple(i * 37 % 299 for i in r.context_ids)) for r in wanted]


NESTED, FLAT = small(asked()), small(asked(head=0))
OTHER_CASES = [
    dataclasses.replace(r, context_ids=(*r.context_ids[:HEAD], *(7,) * 3, *r.context_ids[HEAD:])) for r in NESTED
]
OTHER_CASES = [dataclasses.replace(r, prefix_len=HEAD + CASE + 3) for r in OTHER_CASES]


def totals(engine, wanted):
    return [score.total for score in sorted(engine.score(wanted), key=lambda score: score.id)]


def computed(engine, wanted):
    """(totals, prompt tokens computed for them)."""
    before = engine.stats.prompt_tokens_computed
    return totals(engine, wanted), engine.stats.prompt_tokens_computed - before


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_scores_are_the_same_and_the_head_is_computed_once(kind):
    model = tiny(kind)
    engine, own = NativeEngine(model, Letters(), batch_size=4), CASES * ASKS * OWN
    (flat, before), (nested, after) = (
        computed(NativeEngine(model, Letters(), batch_size=4), FLAT),
        computed(engine, NESTED),
    )
    assert nested == pytest.approx(flat, abs=WITHIN)
    assert nested == pytest.approx(totals(ReferenceEngine(model, Letters()), FLAT), abs=1e-4)
    assert before == CASES * (HEAD + CASE) + own
    assert after == HEAD + CASES * CASE + own == before - (CASES - 1) * HEAD
    again, tokens = computed(engine, NESTED)  # a resume, a retry wave: everything is saved
    assert again == nested and tokens == own
    assert computed(engine, OTHER_CASES)[1] == CASES * (CASE + 3) + own  # the head was kept
    assert totals(engine, NESTED) == nested


@pytest.mark.parametrize("kind", ["mistral with a window", "qwen2 with windows", "olmo3", "gemma3"])
def test_windows_that_end_within_the_case_see_the_same(kind):
    """Windows of 24 tokens, parts of 100 and 30."""
    model = checkpoint(kind)
    nested, flat = (totals(NativeEngine(model, Letters(), batch_size=4), wanted) for wanted in (NESTED, FLAT))
    assert nested == pytest.approx(flat, abs=1e-4)
    assert nested == pytest.approx(totals(ReferenceEngine(model, Letters()), FLAT), abs=1e-3)


def test_drawing_behind_the_head_finds_it_saved():
    engine = NativeEngine(tiny(), Letters(), batch_size=4)
    totals(engine, NESTED)
    drawn = [
        dataclasses.replace(r, token_ids=(*NESTED[0].context_ids[:HEAD], r.id), prefix_len=HEAD) for r in requests(6)
    ]
    before = engine.stats.extra["prefix_tokens_computed"]
    found = complete(engine, drawn)
    assert engine.stats.extra["prefix_tokens_computed"] == before
    assert found == complete(ReferenceEngine(tiny(), Letters()), drawn)


@pytest.mark.parametrize("room", [HEAD + 2 * CASE, HEAD + CASE, HEAD, CASE, 1])
def test_what_is_saved_keeps_to_its_tokens_and_the_head_stays(room, monkeypatch):
    expected = totals(NativeEngine(tiny(), Letters(), batch_size=4), NESTED)
    monkeypatch.setattr(prefixes, "SAVED_TOKENS", room)
    engine = NativeEngine(tiny(), Letters(), batch_size=4)
    found, tokens = computed(engine, NESTED)
    assert found == expected
    grown = HEAD + CASE + prefixes.GROWN_BY  # what a case needs, where that is more
    assert sum(part.length for part in engine.store.parts.values()) <= engine.store.capacity <= max(room, grown)
    if room >= HEAD + CASE:
        assert tokens == HEAD + CASES * CASE + CASES * ASKS * OWN
        assert Nested(NESTED[0].context_ids[:HEAD]) in [prefix for prefix, _ in engine.store.parts]


def test_a_place_that_is_too_small_grows_with_both_parts():
    engine = NativeEngine(tiny(), Letters(), batch_size=4)
    expected = totals(engine, NESTED)
    engine.store = prefixes.PrefixStore(engine.shape, HEAD + 5, engine.device)
    assert totals(engine, NESTED) == expected
    assert engine.store.capacity >= HEAD + CASE


@pytest.mark.parametrize("at", [1, 2, 4])
def test_memory_that_runs_out_over_a_part_is_given_back_and_all_parts_are_put_anew(at, monkeypatch):
    engine = NativeEngine(tiny(), Letters(), batch_size=4)
    expected = totals(engine, NESTED)
    engine.store.parts.clear()
    calls, real = [], prefixes._compute

    def tight(engine, new, parts):
        calls.append(prefixes._length(new[0]))
        if len(calls) == at:
            raise torch.OutOfMemoryError("injected")
        return real(engine, new, parts)

    monkeypatch.setattr(prefixes, "_compute", tight)
    assert totals(engine, NESTED) == expected
    assert engine.stats.out_of_memory == 1 and calls[at] == calls[at - 1]  # it had its place in vain, and has it again
    assert len(engine.cache.free) == engine.cache.blocks


def test_parts_of_an_adapter_are_never_those_of_another():
    peft = pytest.importorskip("peft")
    from test_engine_adapters import ADAPTERS, tuned

    assert peft
    model = tuned(ADAPTERS["v and down"])
    engine, flat = (NativeEngine(model, Letters(), batch_size=4) for _ in range(2))
    on, off = totals(engine, NESTED), None
    with model.disable_adapter():
        off, tokens = computed(engine, NESTED)
        assert tokens == HEAD + CASES * CASE + CASES * ASKS * OWN  # nothing of what the adapter computed
        assert off == pytest.approx(totals(flat, FLAT), abs=WITHIN)
    assert on == pytest.approx(totals(flat, FLAT), abs=WITHIN) and on != pytest.approx(off, abs=1e-2)
    again, tokens = computed(engine, NESTED)
    assert again == on and tokens == CASES * ASKS * OWN


def test_every_prefix_of_a_stage_has_a_place():
    """A stage runs one order of its examples after another, and a retry wave comes back to each."""
    inputs = read_inputs(parse([str(ROOT / "cai.toml"), "--milestone", "m3", "--set", "model.backend=cuda"]))
    context = SimpleNamespace(recipe=inputs.recipe, prompts=inputs.prompts)
    orders = {
        "instructions": set(range(len(inputs.prompts["instructions"].examples))),
        "answers": set(rounds.ROTATIONS),
    }
    for stage in ("critiques", "revisions"):
        asked = itertools.product(range(6), inputs.constitution.principles, ("benign", "redteam"))
        orders[stage] = {rounds.review_shots(context, stage, *one) for one in asked}
    for stage, shifts in orders.items():
        prompt = inputs.prompts[stage]
        fields = dict.fromkeys(prompt.fields, "")
        found = [prompt.render(fields, format="base", tokenizer=ByteCounter(), shift=shift) for shift in shifts]
        tokens = sum(one.prefix_len for one in found) / 4  # bytes a token, as `--dry-run` has it
        assert len(shifts) > 1 and tokens <= prefixes.SAVED_TOKENS, stage


def test_after_a_kill_the_rest_has_the_same_bits():
    whole, resumed = (NativeEngine(tiny(), Letters(), batch_size=4) for _ in range(2))
    totals(whole, NESTED[: 2 * ASKS])
    rest = NESTED[2 * ASKS : -1]  # the last case has fewer asks than the others
    assert totals(whole, rest) == totals(resumed, rest)
    alone = NESTED[::ASKS]  # a slice with one ask of each case
    assert totals(whole, alone) == totals(NativeEngine(tiny(), Letters(), batch_size=4), alone)


def test_what_could_not_be_put_is_not_taken_for_the_prefix_before(monkeypatch):
    engine = NativeEngine(tiny(), Letters(), batch_size=4)
    last = NESTED[-ASKS:]
    expected = totals(engine, last)
    with monkeypatch.context() as patched:
        patched.setattr(prefixes, "_compute", lambda *a: (_ for _ in ()).throw(torch.OutOfMemoryError("always")))
        with pytest.raises(CaiError, match="for the prefix of a stage"):
            totals(engine, NESTED[:ASKS])
    assert totals(engine, last) == expected
