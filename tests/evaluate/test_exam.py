"""The metric's own exam on the labelled set of this repository, and the reading of a user's labelled file."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import orjson
import pytest
import yaml
from support.scores import scorer, shared_words

from cai.errors import CaiError
from cai.evaluate.exam import TRUTH_KINDS, read_exam, run_exam
from cai.recipe.settings_evaluation import EvaluationSection
from tests.conftest import ROOT

FILE = Path(__file__).parents[1] / "exam.jsonl"
SECTION = EvaluationSection()
BAD_CRITIQUES = ("generic", "praise", "echo", "copy", "shuffled", "empty", "misquoted")
GOOD = ("good", "unquoted", "addressing", "nothing")
BAD_REVISIONS = ("unchanged", "disclaimer", "refusal", "empty_revision")


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return read_exam(FILE)


def test_the_labelled_set_is_what_it_should_be(rows):
    answers = {row["prompt"]: row["theme"] for row in rows}
    flawed = {row["prompt"] for row in rows if row["kind"] == "good"}
    assert len(flawed) >= 24
    assert len(answers) - len(flawed) >= 8
    kinds = Counter(row["kind"] for row in rows)
    assert set(kinds) == {*BAD_CRITIQUES, *BAD_REVISIONS, *TRUTH_KINDS, *GOOD}
    assert min(kinds.values()) >= 8
    principles = {entry["id"] for entry in yaml.safe_load((ROOT / "constitution.yaml").read_text())}
    assert {row["theme"] for row in rows} <= principles
    assert len({row["theme"] for row in rows}) >= 15
    assert len({(row["prompt"], row["kind"], row["critique"], row.get("revision")) for row in rows}) == len(rows)


@pytest.mark.runs
def test_trap_04_the_deterministic_part_refuses_what_it_can_and_nothing_more(rows):
    """At least 80% of the good, at most 10% of every bad kind; invented issues and cosmetic revisions pass it."""
    exam = run_exam(rows, SECTION)
    assert exam.failures("deterministic") == []
    for kind in (*BAD_CRITIQUES, *BAD_REVISIONS):
        line = exam.line(kind, "deterministic")
        assert line.accepted <= 0.1 * line.n, kind
    for kind in GOOD:
        line = exam.line(kind, "deterministic")
        assert line.accepted >= 0.8 * line.n, kind
    for kind in TRUTH_KINDS:
        line = exam.line(kind, "deterministic")
        assert line.accepted > 0.5 * line.n, f"{kind}: the table must not claim what only a truth judge can do"


@pytest.mark.runs
def test_only_the_check_of_quotations_refuses_most_misquoting_critiques(rows):
    """They speak of the prompt in their own words, so the other gates let them through."""
    exam = run_exam(rows, SECTION.model_copy(update={"max_misquoted": 1.0}))
    line = exam.line("misquoted", "deterministic")
    assert line.accepted > 0.8 * line.n


def test_likelihood_joins_the_deterministic_part(rows):
    few = [row for row in rows if row["prompt"] in {r["prompt"] for r in rows[:70]}]
    exam = run_exam(few, SECTION, scorer(shared_words))
    both = exam.line("good", "both")
    assert both.n == exam.line("good", "likelihood").n
    assert both.accepted == sum(
        row["accepted"]["deterministic"] and row["accepted"]["likelihood"] for row in exam.rows if row["kind"] == "good"
    )
    assert "good" in exam.table
    assert "likelihood" in exam.table.splitlines()[0]
    assert all(orjson.loads(orjson.dumps(row)) == row for row in exam.rows)


@pytest.mark.runs
def test_a_failed_bar_is_named(rows):
    harsh = SECTION.model_copy(update={"min_grounding": 0.9})
    assert any(text.startswith("good") for text in run_exam(rows, harsh).failures("deterministic"))


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"", "no labelled row"),
        (b"{}\n", "line 1: prompt"),
        (b"[1]\n", "no JSON object"),
        (b'{"prompt": 1\n', "line 1: no JSON"),
        (b'{"prompt":"p","answer":"a","critique":"c","kind":"good","good":1}\n', "good"),
        (b'{"prompt":"p","answer":"a","critique":"c","kind":"good","good":true,"revision":3}\n', "revision"),
        (b'{"prompt":"p","answer":"a","critique":"c","kind":"good","good":true,"revison":"r"}\n', "mean revision?"),
        (b'{"prompt":" ","answer":"a","critique":"c","kind":"good","good":true}\n', "prompt: empty"),
        (b'{"prompt":"p","answer":"a","critique":"c","kind":"","good":true}\n', "kind"),
        (b'{"prompt":"p","answer":"a","critique":"c","kind":"a\\nb","good":true}\n', "kind"),
        (b'{"prompt":"p","answer":"a","critique":"c","kind":"k","good":true,"pool":"red-team"}\n', "redteam"),
        (b'{"prompt":"p","answer":"a","critique":"c","kind":"k","good":true}\n' * 2, "line 2: the same row as line 1"),
        (
            b'{"prompt":"p","answer":"a","critique":"c","kind":"k","good":true}\n\n'
            b'{"prompt":"p","answer":"a","critique":"c","kind":"k","good":false}\n',
            "line 3: good: the same row as line 1 with the other label",
        ),
    ],
)
def test_a_bad_file_is_one_clear_line(tmp_path, content, wanted):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(content)
    with pytest.raises(CaiError) as caught:
        read_exam(path)
    assert wanted in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_one_clear_line(tmp_path):
    with pytest.raises(CaiError, match="--exam: cannot read it"):
        read_exam(tmp_path / "none.jsonl")


def test_a_device_and_a_pipe_that_gives_nothing_are_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr("cai.store.reading.PIPE_SECONDS", 0.1)
    os.mkfifo(tmp_path / "pipe")
    for path, why in (("/dev/zero", "is a device"), (tmp_path / "pipe", "a pipe that gives nothing")):
        with pytest.raises(CaiError, match=why):
            read_exam(Path(path))


def test_a_users_own_small_file_works(tmp_path):
    row = {
        "prompt": "p",
        "answer": "the tin roof leaks",
        "critique": "the tin roof is fine",
        "kind": "mine",
        "good": False,
    }
    path = tmp_path / "mine.jsonl"
    path.write_bytes(orjson.dumps(row) + b"\n\n" + orjson.dumps(row | {"revision": "x"}))
    exam = run_exam(read_exam(path), SECTION, scorer(shared_words))
    assert len(exam.rows) == 2
    assert exam.line("mine", "both").n == 2


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    row = {"prompt": "p", "answer": "a", "critique": "c", "kind": "k", "good": True, "id": 7}
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + orjson.dumps(row) + b"\r\n" + orjson.dumps(row | {"kind": "l"}) + b"\r\n")
    assert [row["kind"] for row in read_exam(path)] == ["k", "l"]


def test_a_kind_with_both_labels_shows_each_ones_own_figures():
    """The bad rows' line of the table held the good rows' counts."""
    good = {"prompt": "Does tin rust?", "answer": "Tin rusts away within a day when the rain falls on it."}
    good |= {"critique": 'It is false that tin "rusts away within a day", since only iron rusts and tin resists rain.'}
    rows = [good | {"kind": "roofing, by an expert", "good": True}]
    rows += [rows[0] | {"critique": "Bad answer.", "good": False}] * 2
    lines = run_exam(rows, SECTION).table.splitlines()
    assert [line.split()[4:6] for line in lines[1:]] == [["good", "1/1"], ["bad", "0/2"]]


@pytest.mark.long
def test_exam_on_the_embedded_model(rows):
    """Deterministic part and CSI/CRI together: at least 80% of good, at most 10% of each bad kind. Half an hour."""
    from cai.engine.asks import Scorer
    from cai.models.policy import load
    from cai.recipe.settings import EngineSection, ModelSection

    model = load(ModelSection(format="chat", quantization="fp32"), "embedded")
    model.mode("generate")
    engine = model.engine(EngineSection(backend="static"))
    exam = run_exam(rows, SECTION, Scorer(engine, model.tokenizer, "chat", SECTION.max_text_tokens))
    print(exam.table)
    assert exam.failures("both") == []
