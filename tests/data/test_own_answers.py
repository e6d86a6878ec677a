"""Further requests that the model answers itself, for SFT alone: drawn behind the slots, which they leave alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.benchmarks import write_files
from support.runs import read_jsonl

from cai import errors
from cai.commands.status import just_made, screen
from cai.commands.verify import verify
from cai.data import instructions, own_answers
from cai.data.sound import shown_beside
from tests.conftest import ROOT

Runner = Callable[..., tuple[int, Path]]
SMALL = ("--milestone", "m1", "--set", "items=3", "--set", "rounds=1", "--set", "heldout.items=2")
SFT = (*SMALL, "--set", 'dpo.start="sft"', "--set", "evaluation.enabled=false", "--set", 'evaluation.probes=""')


def answers(count: int) -> tuple[str, ...]:
    return (*SFT, "--set", f"sft.answers={count}")


def lines(run: Path, *stages: str) -> list[dict[str, Any]]:
    return [row for row in read_jsonl(run / "records.jsonl") if row["stage"] in stages]


def shown(run: Path) -> int:
    return int(json.loads((run / "train" / "sft" / "result.json").read_bytes())["pairs"])


@pytest.fixture
def run_fake(run_paper: Runner) -> Runner:
    return run_paper


@pytest.mark.runs
def test_they_are_drawn_behind_the_slots_and_shown_to_sft(run_fake: Runner) -> None:
    code, before = run_fake(*SFT)
    assert code == errors.DONE and not lines(before, *own_answers.STAGES)
    code, run = run_fake(*answers(5))
    assert code == errors.DONE
    rows = read_jsonl(run / "records.jsonl")
    own = [row for row in rows if row["stage"] in own_answers.STAGES]
    assert [row for row in rows if row not in own] == read_jsonl(before / "records.jsonl")
    assert [row["stage"] for row in own] == ["sft_instructions"] * 5 + ["sft_answers"] * 5
    assert {row["pool"] for row in own if row["stage"] == "sft_instructions"} == {"benign"}
    cells = [str(row["cell"]) for row in rows if row["stage"] in ("instructions", "sft_instructions")]
    assert len(set(cells)) == len(cells)
    assert shown(run) == shown(before) + 5
    pairs = (run / "dataset" / "pairs" / "train.jsonl").read_bytes()
    assert pairs == (before / "dataset" / "pairs" / "train.jsonl").read_bytes()


@pytest.mark.runs
def test_every_seeds_own_sft_stage_is_shown_them(run_fake: Runner) -> None:
    few = ("fresh_items", "neutral_passages", "kl_passages", "likelihood_items", "judge_items")
    sets = [word for name in few for word in ("--set", f"evaluation.{name}=2")]
    code, run = run_fake(*answers(4), "--set", "evaluation.enabled=true", "--set", "dpo.seeds=[0,1]", *sets)
    other = json.loads((run / "train" / "seed-1" / "sft" / "result.json").read_bytes())
    assert code == errors.DONE and int(other["pairs"]) == shown(run) == 3 + 4


@pytest.mark.runs
def test_more_of_them_renumber_none_and_a_fork_takes_them_along(run_fake: Runner) -> None:
    _, few = run_fake(*answers(3), "--until", "pairs")
    code, run = run_fake(*answers(5), "--resume", str(few), "--until", "pairs")
    assert code == errors.DONE
    by_item = {(row["stage"], row["item"]): row["text"] for row in lines(run, *own_answers.STAGES)}
    assert len(by_item) == 10
    before = {path.name for path in run.parent.iterdir()}
    code, _ = run_fake(*answers(5), "--set", "sft.learning_rate=3e-4", "--fork", str(run))
    fork = next(path for path in run.parent.iterdir() if path.name not in before and path.is_dir())
    assert code == errors.DONE and len(lines(fork, *own_answers.STAGES)) == 10


@pytest.mark.runs
def test_a_run_that_had_none_keeps_all_its_rows_in_a_fork_that_has(run_fake: Runner) -> None:
    """The tries of a slot, too: nothing that they depend on has changed."""
    _, source = run_fake(*SFT, "--until", "pairs")
    before = {path.name for path in source.parent.iterdir()}
    run_fake(*answers(4), "--fork", str(source))
    fork = next(path for path in source.parent.iterdir() if path.name not in before and path.is_dir())
    assert read_jsonl(fork / "records.jsonl") == read_jsonl(source / "records.jsonl")
    forked = next(row for row in read_jsonl(fork / "events.jsonl") if row["kind"] == "forked")
    assert forked["changed"] == {}


def forked(run_fake: Runner, source: Path, *argv: str) -> Path:
    """The fork of a run, drawn to its end."""
    before = {path.name for path in source.parent.iterdir()}
    run_fake(*argv, "--fork", str(source))
    made = next(path for path in source.parent.iterdir() if path.name not in before and path.is_dir())
    run_fake(*argv, "--resume", str(made), "--until", "pairs")
    return made


@pytest.mark.runs
@pytest.mark.parametrize("key", ["sampling.critiques.temperature=0.9", "sampling.answers.temperature=0.3"])
def test_a_fork_that_changes_the_slots_has_the_bytes_of_a_run_from_nothing(run_fake: Runner, key: str) -> None:
    """Where own answers came late, too: the source began without them, so its manifest told of none."""
    _, source = run_fake(*SFT, "--until", "pairs")
    run_fake(*answers(4), "--resume", str(source), "--until", "pairs")
    assert len(lines(source, *own_answers.STAGES)) == 8
    fork = forked(run_fake, source, *answers(4), "--set", key)
    _, anew = run_fake(*answers(4), "--set", key, "--until", "pairs")
    assert (fork / "records.jsonl").read_bytes() == (anew / "records.jsonl").read_bytes()


def test_every_row_of_a_slot_stays_where_they_are_switched_off_or_on() -> None:
    """Nothing that a later try of a slot depends on has changed, and a fork drops those where anything has."""
    from cai.commands.fork import changed_stages, stays
    from cai.data import chain
    from cai.recipe.load import read, resolve

    def identities(*sets: str) -> dict[str, dict[str, str]]:
        recipe = resolve(read(ROOT / "cai.toml"), milestone="m2", sets=sets)
        return {name: chain.stage_identity(recipe, name, {}) for name in chain.names()}

    on, off = identities('dpo.start="sft"'), identities("sft.answers=0")
    before = {name: {} if name in own_answers.STAGES else found for name, found in off.items()}  # by older versions
    assert changed_stages(on, off) == changed_stages(off, on) == changed_stages(before, on) == {}
    for changed in ({"pairs": []}, {"guard": []}, {"labels": []}, {"answers": []}):
        assert not any(stays(name, 0, changed) for name in own_answers.STAGES)
    assert all(stays(name, 0, {}) for name in own_answers.STAGES)


def test_they_are_no_rows_of_the_items_that_have_their_numbers() -> None:
    """An item without an instruction (a file with too few lines) stays one that was never tried."""
    from cai.data.pairs import PairPlan, build

    found = build(pair_of(0, "Stretch a little, and drink water."), PairPlan(1, {}))
    assert not found.rejects and not found.sizes


@pytest.mark.runs
def test_no_later_line_of_a_file_is_one_of_their_requests(run_fake: Runner, tmp_path: Path) -> None:
    """It could be held out."""
    file = tmp_path / "mine.txt"
    file.write_text("How do I fix a bicycle tyre?\nWhat is a good soup for winter?\nHow does a tide work?\n")
    sets = (*answers(4), "--set", f"instructions.file={file}", "--set", "items=2", "--set", "heldout.items=2")
    _, run = run_fake(*sets, "--until", "pairs")
    shown = lines(run, "sft_instructions")[0]["text"]
    with file.open("a") as more:
        more.write(f"{shown}\nHow do I paint a fence in one day?\n")
    code, _ = run_fake(*sets, "--resume", str(run), "--until", "pairs")
    texts = [row["text"] for row in lines(run, "instructions")]
    assert code == errors.DONE and shown not in texts and texts[-1].startswith("How do I paint")


@pytest.mark.runs
def test_a_stop_among_them_resumes_to_the_same_rows(run_fake: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    _, whole = run_fake(*answers(6), "--until", "pairs")
    _, part = run_fake(*answers(6), "--until", "sft_instructions")
    assert not lines(part, "sft_answers") and len(lines(part, "sft_instructions")) == 6
    code, part = run_fake(*answers(6), "--resume", str(part), "--until", "pairs")
    assert code == errors.DONE
    assert (part / "records.jsonl").read_bytes() == (whole / "records.jsonl").read_bytes()
    events = read_jsonl(part / "events.jsonl")
    assert [row["stage"] for row in events if row["kind"] == "stage"].count("sft_answers") == 1  # not with the slots'


@pytest.mark.runs
def test_what_runs_until_them_has_tried_every_slot(run_fake: Runner) -> None:
    _, run = run_fake(*answers(2), "--set", "pairs.max_similarity=0.05", "--until", "sft_instructions")
    tries = {row["item"] // 1_000_000 for row in lines(run, "revisions")}
    assert len(tries) > 1 and len(lines(run, "sft_instructions")) == 2


@pytest.mark.runs
def test_a_request_that_is_near_to_a_slots_is_drawn_again(
    run_fake: Runner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Held-out prompts among them: no near-duplicate of one is trained on."""
    _, source = run_fake(*SFT, "--until", "pairs")
    taken = next(row["text"] for row in lines(source, "instructions") if row["split"] == "heldout")
    parse, first = own_answers.asking, []

    def asking(stage: Any, grid: Any) -> Any:
        made = parse(stage, grid)

        def repeated(text: str, unit: Any) -> Any:
            found = made.parse(text, unit)
            if unit.item == 1 and unit.round == 0:
                first.append(text)
                return type(found)(taken, ())
            return found

        return own_answers.replace(made, parse=repeated)

    monkeypatch.setattr(own_answers, "asking", asking)
    _, run = run_fake(*answers(3), "--until", "pairs")
    first_try, second = [line for line in capsys.readouterr().err.splitlines() if "further requests, for SFT" in line]
    place, words = first_try.split(", ", 1)
    assert place.startswith("step ") and words.startswith("further requests, for SFT: 3/3 (1 rejected)")
    assert second.startswith(f"{place}, further requests, for SFT, try 2: 1/1")
    rows = [row for row in lines(run, "sft_instructions") if row["item"] == 1]
    assert first and [row["status"] for row in rows] == ["rejected", "ok"]
    assert rows[0]["reason"].startswith("near_duplicate")
    checks = {check.promise: check for check in verify(run)}
    assert checks["chain complete"].verdict == "ok", checks["chain complete"].found
    assert "3 accepted, 1 rejected (near_duplicate 1)" in next(
        line for line in screen(run).splitlines() if line.startswith("sft_instructions ")
    )


def test_no_later_slot_has_one_of_their_requests() -> None:
    """Items that are added when they stand already; a held-out slot's would be trained on."""
    row = {"item": 7, "round": 0, "status": "ok", "text": "How do I keep a fern alive in a dark room?"}
    logged = {"instructions": [], "sft_instructions": [row]}
    recipe = SimpleNamespace(instructions=SimpleNamespace(similarity_threshold=0.8))
    context: Any = SimpleNamespace(recipe=recipe, log=SimpleNamespace(by_stage=logged.get, has=lambda *key: False))
    other = row | {"item": 8, "text": "Which river is the longest one in Asia?"}
    found = instructions.drop_near_duplicates(context)([{**row, "item": 500_000}, other])  # type: ignore[list-item]
    assert [one["status"] for one in found] == ["rejected", "ok"]


@pytest.mark.runs
def test_fewer_requests_than_were_asked_for_are_told(run_fake: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    alike = ("--set", "instructions.similarity_threshold=0.7", "--set", "instructions.max_tries=1")
    _, run = run_fake(*answers(20), *alike, "--until", "pairs")
    accepted = sum(row["status"] == "ok" for row in lines(run, "sft_instructions"))
    told = f"sft.answers: {accepted} of 20 requests came through"
    assert 0 < accepted < 20 and told in capsys.readouterr().err
    run_fake(*answers(20), *alike, "--resume", str(run), "--until", "pairs")
    assert told not in capsys.readouterr().err


@pytest.mark.runs
def test_one_that_overlaps_a_benchmark_is_not_shown(
    run_fake: Runner, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asking = own_answers.asking

    def asked(stage: Any, grid: Any) -> Any:
        made = asking(stage, grid)

        def parse(text: str, unit: Any) -> Any:
            found = made.parse(text, unit)
            return type(found)("How do I kill a process?", ()) if unit.item == 1 else found

        return own_answers.replace(made, parse=parse)

    monkeypatch.setattr(own_answers, "asking", asked)
    on = (*answers(4), "--set", "benchmarks.contamination=true", *write_files(project))
    code, run = run_fake(*on, "--until", "pairs")
    found = json.loads((run / "eval" / "contamination.json").read_text())["answers"]
    assert code == errors.DONE and [(row["part"], row["benchmark"]) for row in found] == [("prompt", "xstest")]
    assert "process" not in json.dumps(found)
    code, run = run_fake(*on, "--resume", str(run))
    assert code == errors.DONE and json.loads((run / "eval" / "contamination.json").read_text())["answers"] == found
    texts = len(read_jsonl(run / "dataset" / "pairs" / "train.jsonl"))
    assert shown(run) == texts + 3


def context_of(rows: list[dict[str, Any]], count: int = 9, start: str = "sft") -> Any:
    log = {(row["stage"], row["item"], row["round"]): row for row in rows}
    recipe = SimpleNamespace(
        dpo=SimpleNamespace(start=start), sft=SimpleNamespace(answers=count, select="clean"), items=0,
        instructions=SimpleNamespace(max_tries=2), pairs=SimpleNamespace(file=""),
        benchmarks=SimpleNamespace(contamination=False),
    )  # fmt: skip
    found = SimpleNamespace(get=lambda *key: log.get(key))

    def ok(stage: str, item: int, round_: int = 0) -> Any:
        row = log.get((stage, item, round_))
        return row if row and row["status"] == "ok" else None

    return SimpleNamespace(recipe=recipe, log=found, ok=ok)


def pair_of(item: int, text: str, finish: str = "stop", status: str = "ok", attempt: int = 0) -> list[dict[str, Any]]:
    refused = [{"stage": "sft_instructions", "item": item, "round": a, "status": "rejected"} for a in range(attempt)]
    request = {"stage": "sft_instructions", "item": item, "round": attempt, "status": "ok", "text": f"request {item}"}
    answer = {"stage": "sft_answers", "item": item, "round": 0, "status": status, "finish": finish, "text": text}
    return [*refused, request, answer]


PLAIN = "Take the plant out of its pot, cut the dead roots off and set it into dry soil for a week."
LOOP = " ".join(["I will check if the time is right and if the place is right for us all."] * 4)


def imitated(context: Any) -> list[dict[str, Any]]:
    from cai.data.pairs import PairSet

    return list(shown_beside(context, PairSet([], [], []), 0))


def test_what_is_whole_is_imitated() -> None:
    rows = [*pair_of(0, PLAIN), *pair_of(1, PLAIN, "eos", attempt=1)]
    expected = [{"item": item, "prompt": f"request {item}", "chosen": PLAIN} for item in (0, 1)]
    assert imitated(context_of(rows)) == expected
    assert imitated(context_of(rows, start="base")) == [] and imitated(context_of(rows, count=1)) == expected[:1]


@pytest.mark.parametrize(
    ("text", "finish", "status"),
    [
        (PLAIN, "length", "ok"),
        (PLAIN, "stop", "rejected"),
        (LOOP, "stop", "ok"),
        (" ", "stop", "ok"),
        ("I'm sorry, but I can't help with that.", "eos", "ok"),
        (f"Here is the revised answer: {PLAIN}", "eos", "ok"),
    ],
)
def test_no_other_one_is(text: str, finish: str, status: str) -> None:
    assert [row["item"] for row in imitated(context_of([*pair_of(0, text, finish, status), *pair_of(1, PLAIN)]))] == [1]


def test_the_estimate_counts_them_once_and_trains_on_them() -> None:
    from cai.data.chain import limit_tokens
    from cai.recipe.arm_costs import costs
    from cai.recipe.load import read, resolve
    from cai.run.budget import training_pairs_seen

    source = read(ROOT / "cai.toml")

    def recipe(*sets: str) -> Any:
        return resolve(source, milestone="m2", sets=['dpo.start="sft"', "sft.epochs=2.0", *sets])

    none, some = recipe("sft.answers=0"), recipe("sft.answers=10")
    own = [cost for cost in costs(some) if cost.label == "sft_answers"]
    assert [(cost.answers, cost.tokens) for cost in own] == [(10, 10 * (120 + 500))]
    assert [cost for cost in costs(some) if cost not in own] == costs(none)
    assert limit_tokens(none) == limit_tokens(some)
    assert training_pairs_seen(some) - training_pairs_seen(none) == 0.5 * 2 * 10
    for none_asked in ('dpo.start="base"', 'pairs.file="mine.jsonl"'):
        assert not [c for c in costs(recipe("sft.answers=10", none_asked)) if c.label == "sft_answers"]


def test_the_later_keys_are_no_part_of_a_run_that_does_without_them() -> None:
    """So that a run made before they came resumes; where they do something, another value is another adapter."""
    from cai.recipe.identity import identity
    from cai.recipe.load import read, resolve

    later = {"sft.answers", "sft.end_weight", "dpo.end_weight"}

    def keys(*sets: str, training: bool = True) -> set[str]:
        recipe = resolve(read(ROOT / "cai.toml"), milestone="m1", sets=['dpo.start="sft"', *sets])
        return later & identity(recipe, {}, training=training).keys()

    assert keys() == set() and keys("sft.answers=3", training=False) == set()
    mixed = 'dpo.loss_type=["sigmoid", "sft"]'  # without an "sft" term an end's weight there would be refused
    assert all(keys(mixed, f"{key}=3") == {key} for key in later)


@pytest.mark.runs
def test_a_finished_run_s_rate_is_that_of_its_slots(run_fake: Runner) -> None:
    from cai.run.rates import from_events

    speeds = []
    for sets in (SFT, answers(7)):
        _, run = run_fake(*sets, "--until", "pairs")
        events = [
            row | ({"seconds": 1.0} if row["kind"] == "stage" else {}) for row in read_jsonl(run / "events.jsonl")
        ]
        speeds.append(from_events(run.name, json.loads((run / "manifest.json").read_bytes()), events))
    assert speeds[0] is not None and speeds[1] is not None
    assert (speeds[0].tokens, speeds[0].rounds) == (speeds[1].tokens, speeds[1].rounds)
    assert speeds[1].own_answers == 7 and "sft_answers" not in speeds[1].labels


def test_the_newest_text_of_a_run_is_its_own_whatever_pool_the_slot_of_its_number_has() -> None:
    slot = {"stage": "instructions", "item": 3, "round": 0, "pool": "redteam", "text": "How to?", "tokens": 4}
    own = {"stage": "sft_answers", "item": 3, "round": 0, "text": PLAIN, "tokens": 20}
    told = just_made([slot, own])
    assert "item 3 of its own" in told and "Take the plant" in told
    assert "folded" in just_made([own, slot])
