"""--review --blind: fresh answers beside each other, sides by chance, marks in the log, people and judge compared."""

from __future__ import annotations

import re

import orjson
import pytest
from support.pages import make_run, recipe, records
from support.runs import read_jsonl

from cai.commands import review, review_blind
from cai.commands.review_blind import BlindTask, Side
from cai.commands.review_session import Session, opened
from cai.data.marks import filter_pairs, of_texts, refused, whole
from cai.errors import DONE, USAGE, CaiError
from cai.metrics.stats import kappa, kappa_interval, kappa_of
from cai.recipe.settings import HeldoutSection
from cai.report.fresh import read_fresh
from cai.report.notes import notes
from cai.report.pages import write_pages
from cai.report.people import agreed, people
from cai.report.snapshot import read_story

ITEMS = range(500_000, 500_008)
SAME = 500_007  # base and tuned answer it alike


def write_rows(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))


def answer(arm, item):
    return "A plain word." if item == SAME and arm in ("base", "tuned") else f"Said by {ord(arm[0])} of {item}."


def fresh_row(item, tuned="tuned"):
    arms = {"base": answer("base", item), "tuned": answer(tuned, item)}
    return {"metric": "preference.fresh", "item": item, "round": 0, "prompt": f"Question {item}?", **arms}


def p3(item, win, metric="preference.p3"):
    return {"metric": metric, "item": item, "round": 0, "j4": win, "log_odds": win - 0.5}


def fill(path, wins=None):
    """Fresh answers of base, tuned, SFT and the base with examples, and P3 where `wins` says how it went."""
    rows = [fresh_row(item) for item in ITEMS]
    rows += [{"metric": "prompted.few_shot", "item": i, "round": 0, "text": answer("few", i)} for i in ITEMS]
    rows += [p3(item, win) for item, win in (wins or {}).items()]
    write_rows(path / "eval" / "scores.jsonl", rows)
    write_rows(path / "eval" / "sft-answers.jsonl", [fresh_row(item, "sft") for item in ITEMS])


@pytest.fixture
def path(tmp_path):
    rows = records(4, heldout=8, rejects=False)
    made = make_run(tmp_path, rows, recipe=recipe(items=4, heldout=HeldoutSection(items=8)))
    fill(made)
    return made


def asked(path, rater="ann", arms="base,tuned"):
    story, fresh = read_story(path), read_fresh(path)
    return review_blind.tasks(story, fresh, review_blind.compared(story, fresh, arms), rater)


def mark_by(path, rater, choose, arms="base,tuned"):
    """`choose`: item -> the arm that is better, or another mark."""
    with review_blind.reading(read_story(path), rater, arms) as session:
        for task in session.pending:
            wanted = choose(task)
            side = {task.left.arm: "left", task.right.arm: "right"}.get(wanted, wanted)
            assert session.mark(session.ticket(task), side)


# --- what is asked


def test_every_rater_has_the_same_pairs_with_sides_and_order_of_ones_own(path):
    one, two = asked(path, "ann"), asked(path, "ben")
    assert sorted(t.key for t in one) == sorted(t.key for t in two)
    assert [t.key for t in one] != [t.key for t in two]
    assert [(t.key, t.left) for t in one] == [(t.key, t.left) for t in asked(path, "ann")]
    sides = {rater: {t.item: t.left.arm for t in asked(path, rater)} for rater in "abcdefgh"}
    assert all({found[item] for found in sides.values()} == {"base", "tuned"} for item in ITEMS if item != SAME)
    assert all(set(found.values()) == {"base", "tuned"} for found in sides.values())


def test_equal_answers_are_not_asked_and_are_told(path):
    assert {t.item for t in asked(path)} == set(ITEMS) - {SAME}
    said = []
    with review_blind.reading(read_story(path), "ann", "base,tuned", said.append):
        pass
    assert said == [
        "blind: answers of tuned and base, sides and order by chance",
        "1 prompts are answered alike by tuned and base: not asked",
    ]


def test_tuned_is_compared_with_every_arm_or_the_named_ones_with_each_other(path):
    def pairs(arms=""):
        return {tuple(sorted((t.left.arm, t.right.arm))) for t in asked(path, arms=arms)}

    assert pairs() == {("base", "tuned"), ("sft", "tuned"), ("few_shot", "tuned")}
    assert pairs("sft, base,few_shot") == {("base", "sft"), ("few_shot", "sft"), ("base", "few_shot")}


def test_no_more_than_a_hundred_in_all(path, monkeypatch):
    monkeypatch.setattr(review_blind, "MOST", 9)
    assert len(asked(path, arms="")) == 9


@pytest.mark.parametrize(
    ("arms", "told"),
    [
        ("base,tunde", "--arms: tunde: gave no fresh answer in this run. It has: base, tuned, few_shot, sft"),
        ("base", "--arms: base: is one arm"),
    ],
)
def test_arms_that_are_not_there_are_one_line_with_those_that_are(path, arms, told):
    with pytest.raises(CaiError, match=re.escape(told)):
        asked(path, arms=arms)


def test_a_run_without_fresh_answers_or_with_all_alike_says_so(tmp_path, path):
    empty = make_run(tmp_path / "other", records(2, heldout=0))
    with pytest.raises(CaiError, match=r"no fresh answers of two arms.*evaluation\.fresh_items=20"):
        asked(empty)
    write_rows(path / "eval" / "scores.jsonl", [fresh_row(SAME)])
    with pytest.raises(CaiError, match="all answers are alike"):
        asked(path)


# --- blind


def test_nothing_on_the_page_names_an_arm_or_depends_on_which_is_which(path):
    names = ("base", "tuned", "sft", "few_shot", "few-shot", "dpo", "50000")
    with review_blind.reading(read_story(path), "ann", "") as session:
        while session.pending:
            task = session.pending[0]
            text = review.page(session, nonce="x")
            shown = re.sub(r"<style>.*?</style>", "", text, flags=re.S)
            for part in (task.prompt, task.left.text, task.right.text):
                assert part in shown
                shown = shown.replace(part, "")
            assert not [name for name in names if name in shown.lower()] and task.key not in text
            session.mark(session.ticket(task), "skip")


def test_the_page_is_the_same_bytes_with_the_arms_exchanged(path):
    def page(left, right):
        task = BlindTask(1, "Why?", Side(left, "One."), Side(right, "Two."), f"answers/{left}/{right}/1/ab")
        session = Session([task], "ann", Log())
        session._salt = b"salt"
        return review.page(session, nonce="x").replace(session.ticket(task), "TICKET")

    assert page("base", "tuned") == page("tuned", "base")


class Log:
    """A log without a mark."""

    def get(self, *key):
        return None


def test_the_form_has_three_choices_by_key_and_undo(path):
    with review_blind.reading(read_story(path), "ann") as session:
        text = review.page(session, nonce="x")
        labels = re.findall(r'value="(\w+)"[^>]*> <kbd>(\d)</kbd> ([^<]+)<', text)
        assert labels == [
            ("left", "1", "left better"),
            ("right", "2", "right better"),
            ("equal", "3", "about equal"),
            ("skip", "4", "I can&#39;t tell") if "&#39;" in text else ("skip", "4", "I can't tell"),
        ]
        first = session.pending[0]
        assert not session.mark(session.ticket(first), "meaningful")
        assert session.mark(session.ticket(first), "left") and session.undo()
        assert session.pending[0] == first


# --- the log


def test_a_mark_says_which_arm_stood_where_and_is_not_asked_again(path):
    with review_blind.reading(read_story(path), "ann") as session:
        first = session.pending[0]
        assert session.mark(session.ticket(first), "right", "it answers")
        left = len(session.pending)
    (row,) = read_jsonl(path / "reviews.jsonl")
    assert (row["rater"], row["what"], row["mark"], row["item"]) == ("ann", "answers", "right", first.item)
    assert (row["left"], row["right"], row["key"]) == (first.left.arm, first.right.arm, first.key)
    with review_blind.reading(read_story(path), "ann") as session:
        assert len(session.pending) == left and first.key not in [task.key for task in session.pending]
    (note,) = notes(read_story(path).reviews)
    assert note.mark == f"{first.right.arm} better"


def test_a_mark_of_other_texts_does_not_count_and_is_asked_again(path):
    mark_by(path, "ann", lambda task: "tuned")
    before = len(asked(path))
    rows = read_jsonl(path / "eval" / "scores.jsonl")
    rows[0]["tuned"] = "Another adapter said this."
    write_rows(path / "eval" / "scores.jsonl", rows)
    found = people(read_story(path))
    assert found["stale"] == 1 and found["wins"][0]["n"] == before - 1
    with review_blind.reading(read_story(path), "ann", "base,tuned") as session:
        assert [task.item for task in session.pending] == [rows[0]["item"]]


def test_marks_of_answers_refuse_no_pair_and_are_whole_marks(path):
    mark_by(path, "ann", lambda task: "base")
    story = read_story(path)
    assert len(whole(story.reviews)) == len(story.reviews) == 7 and not of_texts(story.reviews)
    assert refused(story.reviews) == {} and filter_pairs(story.pairs.kept, story.reviews) == story.pairs.kept
    for odd in ({"left": 5}, {"right": story.reviews[0]["left"], "left": story.reviews[0]["left"]}, {"mark": "best"}):
        assert whole([{**story.reviews[0], **odd}]) == []


def test_one_review_of_a_run_at_a_time_of_either_kind(path):
    with review_blind.reading(read_story(path), "ann"), pytest.raises(CaiError, match="another review"):  # noqa: SIM117
        with opened(path, "ben", []):
            pass


# --- who won, and who agrees


def test_people_and_judge_by_hand(path):
    """Seven prompts. ann: tuned 4, equal 1, base 2. ben: as ann but for two. The judge: as ann but for one."""
    ann = dict(zip(ITEMS, ("tuned", "tuned", "tuned", "tuned", "equal", "base", "base"), strict=False))
    ben = ann | {500_003: "equal", 500_006: "skip"}
    judge = {"tuned": 1.0, "equal": 0.5, "base": 0.0}
    wins = {item: judge[mark] for item, mark in ann.items()} | {500_000: 0.0, SAME: 0.5}
    fill(path, wins)
    mark_by(path, "ann", lambda task: ann[task.item])
    mark_by(path, "ben", lambda task: ben[task.item])
    found = people(read_story(path))
    one, two = found["wins"]
    assert (one["rater"], one["what"]) == ("ann", "tuned over base")
    assert (one["better"], one["equal"], one["worse"], one["n"], one["alike"]) == (4, 1, 2, 7, 1)
    assert one["value"] == pytest.approx(4.5 / 7) and one["low"] < 4.5 / 7 < one["high"]
    assert (two["n"], two["skipped"], two["better"], two["sided"]) == (6, 1, 3, 4)
    rows = {row["who"]: row for row in found["agreement"]}
    assert list(rows) == ["judge and ann", "judge and ben", "ann and ben"]
    assert (rows["judge and ann"]["n"], rows["judge and ann"]["decided"]) == (7, (5, 6))  # 500_000 is the one
    assert rows["judge and ann"]["raw"] == pytest.approx(6 / 7)
    # ann 4 1 2, judge 3 1 3 of 7: by chance (12 + 1 + 6) / 49; kappa (42 - 19) / (49 - 19)
    assert rows["judge and ann"]["kappa"] == pytest.approx(23 / 30)
    # on six ann 4 1 1, ben 3 2 1: by chance 15 / 36, agreed 5 / 6; kappa (30 - 15) / (36 - 15)
    assert rows["ann and ben"]["n"] == 6 and rows["ann and ben"]["kappa"] == pytest.approx(15 / 21)
    assert rows["ann and ben"]["low"] <= 15 / 21 <= rows["ann and ben"]["high"]


def test_a_judge_that_calls_all_equal_has_no_kappa_and_its_side_is_its_log_odds(path):
    """Six of seven marks take a side; the log-odds lean to tuned on all but one of these six, on which ann did not."""
    fill(path)
    rows = read_jsonl(path / "eval" / "scores.jsonl")
    leaning = {item: 0.2 for item in ITEMS} | {500_005: -0.1, 500_004: -0.3}
    rows += [{**p3(item, 0.5), "log_odds": odds} for item, odds in leaning.items()]
    write_rows(path / "eval" / "scores.jsonl", rows)
    mark_by(path, "ann", lambda task: "equal" if task.item == 500_004 else "tuned")
    (row,) = people(read_story(path))["agreement"]
    assert (row["n"], row["kappa"], row["low"], row["decided"]) == (7, None, None, (5, 6))
    assert "kappa" not in agreed(row) and agreed(row).endswith("where both took a side 5 of 6")


def test_the_report_and_the_screen_have_it_and_without_marks_neither(path, monkeypatch):
    fill(path, {item: 1.0 for item in ITEMS})
    write_pages(path)
    for page in ("report.html", "report.md"):
        assert "resh answers that people" not in (path / page).read_text()
        assert "Fresh answers, by people" not in (path / page).read_text()
    assert people(read_story(path)) == {}
    mark_by(path, "ann", lambda task: "tuned" if task.item % 2 else "base")
    mark_by(path, "ben", lambda task: "tuned" if task.item % 2 else "equal")
    said = []
    review.finish(path, said.append)
    assert any(line.startswith("ann, tuned over base: 3 better, 0 equal, 4 worse of 7, wins 43%") for line in said)
    assert any(re.match(r"ann and ben, tuned over base: n=7, 43%, kappa 0\.\d+ \[", line) for line in said)
    assert any(line.startswith("judge and ann, tuned over base: n=7") for line in said)
    assert not (path / "dataset" / "reviewed.jsonl").exists() and not any("training pairs" in line for line in said)
    html, text = (path / "report.html").read_text(), (path / "report.md").read_text()
    assert "judge and ben" in html and "tuned over base" in html and "Fresh answers, by people" in text
    assert "ann and ben, tuned over base" in text


def test_kappa_of_many_answers_is_that_of_two_and_none_where_all_say_one_thing():
    one, two = [True] * 9 + [False] * 11, [True] * 7 + [False] * 10 + [True] * 3
    assert kappa_of(one, two) == pytest.approx(kappa(one, two))
    assert kappa_of(["a", "a"], ["a", "a"]) is None
    assert kappa_of(["a", "b", "c"], ["a", "b", "c"]) == 1.0
    assert kappa_interval([("a", "b")], kappa_of) == (None, None)
    low, high = kappa_interval([("a", "a"), ("b", "b"), ("a", "b"), ("c", "c")] * 5, kappa_of)
    assert 0 < low < kappa_of(["a", "b", "a", "c"], ["a", "b", "b", "c"]) < high <= 1


# --- which answers a run has


def test_verdicts_of_arms_are_read_either_way_round(path):
    rows = read_jsonl(path / "eval" / "sft-answers.jsonl")
    rows += [p3(500_000, 1.0), p3(500_001, 0.0, "over.sft")]
    write_rows(path / "eval" / "sft-answers.jsonl", rows)
    fresh = read_fresh(path)
    assert fresh.judged("sft", "base") == {500_000: 1.0} and fresh.judged("base", "sft") == {500_000: 0.0}
    assert fresh.judged("tuned", "sft") == {500_001: 0.0}


def test_a_comparison_with_another_run_adds_its_arm_and_only_verdicts_on_the_shown_texts(path):
    other, name = "20261129-010203-m2-abcdef", "against"
    rows = []
    for item in (500_000, 500_001):
        said = (("base", answer("base", item)), ("a", answer("tuned", item)), ("b", f"B on {item}."))
        rows += [{"metric": f"{name}.answers.{arm}", "item": item, "round": 0, "text": text} for arm, text in said]
    rows[1]["text"] = "Tuned said it otherwise there."  # of item 500_000
    rows += [
        {"metric": f"{name}.judged", "item": i, "round": r, "win": 1.0} for i in (500_000, 500_001) for r in (0, 1)
    ]
    write_rows(path / "eval" / name / f"{other}.jsonl", rows)
    write_rows(path / "eval" / name / f"{other}-0123456789abcdef.jsonl", rows)  # set aside
    fresh = read_fresh(path)
    assert fresh.arms == ["base", "tuned", other, "few_shot", "sft"]
    assert fresh.texts["tuned"][500_000] == answer("tuned", 500_000)
    assert fresh.judged(other, "tuned") == {500_001: 1.0}
    assert fresh.both("tuned", other) == [500_000, 500_001]


def test_damaged_logs_have_no_answers(path):
    (path / "eval" / "scores.jsonl").write_bytes(b"\x00\x01\n{}\n")
    assert read_fresh(path).arms == ["base", "sft"] or read_fresh(path).arms == ["sft"]


@pytest.mark.runs
def test_a_whole_run_with_arms_is_read_marked_and_forked(run_paper, monkeypatch, capsys):
    keys = ("items=4", "heldout.items=3", "evaluation.fresh_items=3", "sft.enabled=true", "evaluation.probes=")
    keys += ('evaluation.prompted=["few_shot"]', "evaluation.critic_items=0", "evaluation.judge_items=1")
    code, path = run_paper("--milestone", "m1", *(word for key in keys for word in ("--set", key)))
    assert code == DONE
    fresh = read_fresh(path)
    assert fresh.arms == ["base", "tuned", "few_shot", "sft"]
    for arm in ("base", "few_shot", "sft"):
        assert len(fresh.both("tuned", arm)) == 3 and len(fresh.judged("tuned", arm)) == 3
    answers = iter(["2", "u", "1 it stops", "2", "s"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(answers))
    capsys.readouterr()
    blind = ("--review", path.name, "--blind", "--arms", "base,tuned", "--terminal", "--rater", "Ann")
    assert run_paper(*blind, fake=())[0] == DONE
    said = capsys.readouterr().out
    assert "Left answer: " in said and "Right answer: " in said and "ann, tuned over base: " in said
    assert [row["mark"] for row in read_jsonl(path / "reviews.jsonl")] == ["left", "right", "skip"]
    code, fork = run_paper("--fork", path.name, "--set", "dpo.beta=0.3", fake=())
    assert code == DONE and not (fork / "reviews.jsonl").exists()
    assert run_paper("--resume", fork.name, "--set", "hygiene.reviews=true", fake=())[0] == DONE
    assert run_paper("--verify", path.name, fake=())[0] == DONE
    assert run_paper("--arms", "base,tuned", fake=())[0] == USAGE
    assert "--arms: goes with --blind" in capsys.readouterr().err
