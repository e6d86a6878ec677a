"""Memory and time that do not grow with the items: rows stay on disk, comparisons are bounded. Sizes, not seconds."""

from __future__ import annotations

import gc
import random
import tracemalloc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rapidfuzz import fuzz

from cai.data import collect, hygiene, instructions
from cai.data.pairs import PairPlan, PairSet, build
from cai.errors import CORRUPT, CaiError
from cai.evaluate import critiques
from cai.evaluate.cases import NEARBY, Case, nearby
from cai.metrics.text import words
from cai.recipe.settings_evaluation import HygieneSection
from cai.report import tables
from cai.store.records import RecordLog, look
from cai.store.rows import Latest

MIB = 2**20


def row(item: int, stage: str = "answers", text: str = "x" * 1000) -> dict[str, Any]:
    return {"stage": stage, "item": item, "round": 0, "status": "ok", "text": text}


def held(make: Callable[[], Any]) -> tuple[Any, float]:
    """What `make` gives, and the MiB that live on with it."""
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    made = make()
    after = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return made, (after - before) / MIB


def fill(path: Path, count: int) -> RecordLog:
    log = RecordLog.open(path, path.parent / "quarantine", durable=False)
    for start in range(0, count, 500):
        log.append([row(item, text=f"{item} " + "x" * 1000) for item in range(start, start + 500)])
    return log


@pytest.mark.slow
def test_a_log_keeps_no_row_in_memory(tmp_path: Path) -> None:
    """10,000 rows of 1 KB: 10 MiB on disk, under 3 in memory, also after opening again and reading without a lock."""
    path = tmp_path / "records.jsonl"
    log, grown = held(lambda: fill(path, 10_000))
    assert path.stat().st_size > 10 * MIB and grown < 3.0, grown
    assert log.get("answers", 9_999)["text"].startswith("9999 ") and len(log.by_stage("answers")) == 10_000  # type: ignore[index]
    log.close()
    assert log.rows[5]["item"] == 5, "readable after closing"
    again, grown = held(lambda: RecordLog.open(path, tmp_path / "quarantine"))
    assert grown < 3.0 and len(again.rows) == 10_000, grown
    again.close()
    seen, grown = held(lambda: look(path))
    assert grown < 3.0 and seen[-1]["item"] == 9_999, grown


@pytest.mark.slow
def test_pairs_hold_each_text_once(tmp_path: Path) -> None:
    """1,000 items of one round, four texts of 1 KB each, read from disk: no row is held beside the examples."""
    stages = ("instructions", "answers", "critiques", "revisions")
    with RecordLog.open(tmp_path / "records.jsonl", tmp_path / "q", durable=False) as log:
        log.append(
            [
                row(item, stage, f"{stage} {item} " + " ".join(random.Random(f"{stage}{item}").choices(WORDS, k=150)))
                | {"principle": "p", "reason": None, "finish": "eos"}
                for item in range(1000)
                for stage in stages
            ]
        )
        size = (tmp_path / "records.jsonl").stat().st_size / MIB

        words.cache_clear()
        tracemalloc.start()
        found = build(log.rows, PairPlan(1, {"p": "Be kind."}))
        words.cache_clear()
        peak = tracemalloc.get_traced_memory()[1] / MIB
        tracemalloc.stop()
    assert len(found.examples) == 1000 and peak < 2.3 * size, (peak, size)  # with all rows read first: 2.6


WORDS = ("harbour lantern orchard compass glacier violin market tunnel garden archive the a of and to in is it").split()


def test_a_line_that_changes_under_a_running_log_is_told(tmp_path: Path) -> None:
    log = fill(tmp_path / "records.jsonl", 500)
    with (tmp_path / "records.jsonl").open("r+b") as file:
        file.write(b"#")
    with pytest.raises(CaiError, match="line 1, byte 0: changed while the run was going") as caught:
        log.get("answers", 0)
    assert caught.value.code == CORRUPT


def test_the_last_row_of_a_key_wins(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    with RecordLog.open(path, tmp_path / "q", durable=False) as log:
        log.append([row(1, text="first"), row(1, text="second") | {"round": 1}, row(2)])
    latest = Latest(look(path), 2)  # type: ignore[arg-type]
    assert latest["answers", 1]["text"] == "second" and len(latest) == 2 and ("answers", 3) not in latest


def test_nearness_is_the_token_sort_ratio() -> None:
    draw = random.Random(5)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(1, 12))) for _ in range(60)]
    for text in texts:
        seen = instructions.NearDuplicates([other for other in texts if other is not text], 0.6)
        best = max(fuzz.token_sort_ratio(text, other) for other in texts if other is not text) / 100
        assert seen.nearest(text) == pytest.approx(best if best >= 0.6 else 0.0)


def test_near_duplicates_read_each_logged_row_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The verdicts are those of comparing with the whole log; its rows are normalised once, not at every batch."""
    log = RecordLog.open(tmp_path / "records.jsonl", tmp_path / "q", durable=False)
    settings = SimpleNamespace(similarity_threshold=0.8)
    recipe = SimpleNamespace(instructions=settings)
    context: Any = SimpleNamespace(log=log, recipe=recipe)

    def asked(seed: int) -> str:
        return " ".join(f"word{number}" for number in random.Random(seed).sample(range(900), 12))

    log.append([row(item, "instructions", asked(item)) for item in range(300)])
    normalised = []
    real = instructions.normalise
    monkeypatch.setattr(instructions, "normalise", lambda text: normalised.append(text) or real(text))
    accept = instructions.drop_near_duplicates(context)
    verdicts = []
    for start in range(300, 420, 4):
        batch = [row(item, "instructions", asked(item % 380)) for item in range(start, start + 4)]
        kept = accept(batch)
        fresh = instructions.drop_near_duplicates(context)(batch)
        assert [r["status"] for r in kept] == [r["status"] for r in fresh]
        verdicts += [r["status"] for r in kept]
        log.append(kept)
    assert {"ok", "rejected"} == set(verdicts)
    normalised.clear()
    accept([row(999, "instructions", "one more")])
    assert len(normalised) < 20
    log.close()


def test_a_case_is_compared_with_a_bounded_part_of_a_large_run() -> None:
    cases = [Case(i, 0, f"instruction {i}", "answer", "", f"critique {i}") for i in range(1000)]
    parts = [nearby(case, cases) for case in cases]
    assert all(len(part) == NEARBY == len({case.key for case in part}) for part in parts)
    assert len({part[0].key for part in parts}) > 500, "each begins at a place of its own"
    assert nearby(cases[0], cases[:NEARBY]) == cases[:NEARBY], "a small run is compared whole"
    assert len(critiques.peers(cases[7], parts[7])) == critiques.MAX_PEERS


def test_leaks_are_those_of_counting_every_phrase() -> None:
    draw = random.Random(3)
    texts = [("as a careful helper " if i % 2 else "") + " ".join(draw.choices(WORDS, k=20)) for i in range(80)]
    others = [" ".join(draw.choices(WORDS, k=20)) for _ in texts]
    pairs = [{"item": i, "chosen": c, "rejected": r} for i, (c, r) in enumerate(zip(texts, others, strict=True))]
    chosen, rejected = (Counter(e for text in side for e in hygiene.phrases(text)) for side in (texts, others))
    often = {e: n for e, n in chosen.items() if n >= 8 and (n + 0.5) / (rejected[e] + 0.5) >= 5.0}
    found = hygiene.find_leaks(pairs, HygieneSection())
    assert {(leak.place, leak.phrase) for leak in found} <= set(often) and any(e[0] == "opener" for e in often)
    assert all(
        (leak.chosen, leak.rejected) == (chosen[e], rejected[e]) for leak in found for e in [(leak.place, leak.phrase)]
    )
    assert {e[1] for e in often if e[0] == "opener"} == {leak.phrase for leak in found if leak.place == "opener"}


@pytest.mark.slow
def test_phrases_of_rare_words_are_not_counted() -> None:
    """300 texts of 200 words that stand nowhere else: 240,000 phrases, of which none is held."""
    rare = [{"item": i, "chosen": " ".join(f"w{i}x{n}" for n in range(200)), "rejected": "x"} for i in range(300)]
    tracemalloc.start()
    assert hygiene.find_leaks(rare, HygieneSection()) == []
    peak = tracemalloc.get_traced_memory()[1] / MIB
    tracemalloc.stop()
    words.cache_clear()
    assert peak < 25, peak


@pytest.mark.slow
def test_phrases_of_words_that_seldom_meet_are_not_counted() -> None:
    """3,000 texts of 45 words out of 100: every word is common, no two of them meet often. With all counted: 79 MiB."""
    draw = random.Random(2)
    few = [f"w{n}" for n in range(100)]
    pairs = [{"item": i, "chosen": " ".join(draw.choices(few, k=45)), "rejected": "x"} for i in range(3000)]
    tracemalloc.start()
    assert hygiene.find_leaks(pairs, HygieneSection()) == []
    peak = tracemalloc.get_traced_memory()[1] / MIB
    tracemalloc.stop()
    words.cache_clear()
    assert peak < 40, peak


class Weak(dict[str, Any]):
    """A row of which can be told whether somebody holds it."""


def test_the_funnel_holds_one_row_at_a_time() -> None:
    seen: list[weakref.ref[Weak]] = []
    most = 0

    def rows() -> Iterator[Weak]:
        nonlocal most
        for item in range(50):
            status, reason = ("ok", None) if item % 5 else ("rejected", "looping: x")
            one = Weak(stage="answers", item=item, round=0, status=status, reason=reason, tokens=2)
            seen.append(weakref.ref(one))
            yield one
            del one
            most = max(most, sum(ref() is not None for ref in seen))

    snapshot: Any = SimpleNamespace(rows=rows(), recipe=SimpleNamespace(guard=SimpleNamespace(model="")))
    found = tables.funnel(snapshot)
    assert most <= 1
    assert [(row["rows"], row["ok"], row["rejected"], row["errors"], row["tokens"]) for row in found] == [
        (50, 40, 10, 0, 100)
    ]
    assert found[0]["reasons"] == [("looping", 10)]


@pytest.mark.runs
def test_examples_are_held_once_while_collecting_and_not_beside_those_of_the_report(
    run_fake: Callable[..., tuple[int, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = collect.build
    twice: list[int] = []

    def build(*given: Any, **more: Any) -> PairSet:
        found = real(*given, **more)
        gc.collect()
        held = [o["item"] for o in gc.get_objects() if type(o) is dict and {"preference_pair", "rounds"} <= o.keys()]
        assert held
        twice.append(len(held) - len(set(held)))
        return found

    monkeypatch.setattr(collect, "build", build)
    monkeypatch.setattr("cai.report.snapshot.build", build)
    sets = ("guard.enabled=true", "guard.model=stand-in", "checks.enabled=false", "evaluation.enabled=false")
    run_fake("--milestone", "m0", *(arg for key in sets for arg in ("--set", key)))
    assert len(twice) >= 3 and not any(twice), twice  # before and after the guard, and for the report and its tables
