"""--against: two constitutions on shared instructions and answers, judged blind; one page of what changed."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from support.experiments import forget_end, kill_in, lay_out
from support.runs import FAKE, PAPERS_WAY, ROOT, read_jsonl

import runner
from cai import errors
from cai.commands.experiments import whole_runs
from cai.evaluate import head_to_head, head_to_head_figures
from cai.evaluate.head_to_head import Arm, Question
from cai.evaluate.head_to_head_figures import Texts
from cai.evaluate.judge import Judge
from cai.models.fake import FakeEngine
from cai.recipe.constitution import Constitution, Principle
from cai.recipe.load import Recipe
from cai.report import against
from cai.run.manifest import read_manifest

SMALL = (
    *("--milestone", "m1", "--set", "items=3", "--set", "heldout.items=4", "--set", "evaluation.probes="),
    *(
        "--set",
        "evaluation.likelihood_items=2",
        "--set",
        "evaluation.judge_items=0",
        "--set",
        "evaluation.critic_items=0",
    ),
)
OTHER, OTHER_FILE = "helpful-only.yaml", "docs/examples/constitution-helpful-only.yaml"


def command(*more: str, other: str = OTHER) -> int:
    """The command's exit code, in the folder where one stands."""
    return runner.main(["cai.toml", *FAKE, *PAPERS_WAY, *SMALL, "--against", other, *more])


@pytest.fixture(autouse=True, scope="module")
def told_apart() -> Iterator[None]:
    """The fake's adapters all say the same; here the one that was trained under `OTHER` says a better thing."""
    real = FakeEngine._complete

    def complete(self: FakeEngine, request: Any) -> Any:
        done = real(self, request)
        folder = self.model.attached
        if not (self.model.tuned and folder and "does-the-task" in (folder.parent / "constitution.yaml").read_text()):
            return done
        return type(done)(done.id, done.token_ids, f"I can help. {done.text} mended", done.finish)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeEngine, "_complete", complete)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the command was given once, from nothing."""
    folder = tmp_path_factory.mktemp("against")
    lay_out(folder)
    shutil.copy(ROOT / OTHER_FILE, folder / OTHER)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert command() == errors.DONE
    return folder


@pytest.fixture
def project(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, in which one stands."""
    shutil.copytree(whole, tmp_path / "copy", symlinks=True)
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    lay_out(tmp_path)
    shutil.copy(ROOT / OTHER_FILE, tmp_path / OTHER)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def runs_of(project: Path) -> tuple[Path, Path]:
    """(A, B): the run and its fork."""
    found = sorted(path for path in (project / "runs").iterdir() if not path.is_symlink() and path.is_dir())
    forks = [path for path in found if "forked_from" in read_manifest(path / "manifest.json")]
    (first,) = (path for path in found if path not in forks)
    (fork,) = forks
    return first, fork


def pages(a: Path, b: Path) -> dict[str, bytes]:
    return {
        kind: (a / "eval" / "against" / f"{b.name}.{kind}").read_bytes() for kind in ("jsonl", "html", "md", "json")
    }


@pytest.mark.runs
def test_both_runs_share_instructions_and_answers_and_the_better_answers_win(project) -> None:
    a, b = runs_of(project)
    for stage in ("instructions", "answers"):
        rows = [[r for r in read_jsonl(run / "records.jsonl") if r["stage"] == stage] for run in (a, b)]
        assert rows[0] == rows[1] and rows[0]
    content = orjson.loads(pages(a, b)["json"])
    assert content["prompts"] == 4 and content["same"] == 0
    assert content["overall"]["wins"]["value"] == 1.0  # `mended` is what the fake judge likes
    whose = {row["whose"] for row in content["principles"]}
    assert whose == {"A", "B"} and len(content["principles"]) == 24
    assert all(row["wins"]["n"] == 4 for row in content["principles"])
    assert len(content["different"]) == 4 and content["lengths"]["difference"] == 4.0
    (complies,) = content["compliance"]
    assert [complies[arm]["value"] for arm in ("theirs", "ours")] == [1.0, 1.0] and complies["pool"] == "redteam"
    assert content["base_complies"]["redteam"]["value"] == 1.0, "no text of the fake refuses or objects"
    told = next(line for line in against.lines(content) if "goes along, redteam" in line)
    assert told.count("100%") >= 3 and "Goes along" in pages(a, b)["md"].decode()
    html = pages(a, b)["html"].decode()
    assert "A goes along" in html
    assert "<ins>" in html and "mended" in html and "does-the-task (B)" in html


def test_every_judgement_is_a_record_in_both_orders(project) -> None:
    a, b = runs_of(project)
    rows = [row for row in read_jsonl(a / "eval" / "against" / f"{b.name}.jsonl") if row["metric"] == "against.judged"]
    assert len(rows) == 4 * (1 + 24) and len({(row["item"], row["round"]) for row in rows}) == len(rows)
    for row in rows:
        assert row["log_odds"] == pytest.approx((row["first"] - row["second"]) / 2, abs=1e-6)
        assert row["first"] > 0 > row["second"]  # A, then B: the letter turns, the winner stays


@pytest.mark.runs
@pytest.mark.parametrize("cut", [0.02, 0.6])
def test_a_comparison_that_was_killed_goes_on_to_the_same_bytes(project, cut: float) -> None:
    a, b = runs_of(project)
    whole, log = pages(a, b), a / "eval" / "against" / f"{b.name}.jsonl"
    kill_in(log, a, whole["jsonl"][: int(cut * len(whole["jsonl"]))])
    for kind in ("html", "md", "json"):
        log.with_suffix(f".{kind}").unlink()
    assert command() == errors.DONE
    assert runs_of(project) == (a, b)
    assert pages(a, b) == whole


@pytest.mark.runs
def test_the_same_command_makes_neither_run_nor_judgement_again(project, monkeypatch) -> None:
    before = pages(*runs_of(project))
    monkeypatch.setattr(FakeEngine, "score", None)  # whoever asks, fails
    monkeypatch.setattr(FakeEngine, "submit", None)
    assert command() == errors.DONE
    assert pages(*runs_of(project)) == before


@pytest.mark.runs
def test_two_runs_that_stand_are_compared_by_name(project) -> None:
    a, b = runs_of(project)
    before = pages(a, b)
    shutil.rmtree(a / "eval" / "against")
    forget_end(a)
    assert runner.main(["cai.toml", "--resume", str(a), "--against", f"runs/{b.name}"]) == errors.DONE
    assert pages(a, b) == before


def test_a_dry_run_says_what_it_costs_and_writes_nothing(empty, capsys) -> None:
    assert command("--dry-run") == errors.DONE
    said = capsys.readouterr().out
    assert not (empty / "runs").exists()
    assert "4 held-out prompts x 3" in said and "4 prompts x 25 principles" in said and "100 blind" in said


@pytest.mark.parametrize(
    ("other", "more", "told"),
    [
        ("nowhere.yaml", (), "--against: nowhere.yaml: no such file"),
        ("runs/none", (), "--against: runs/none: neither a file of principles nor a run"),
        (OTHER, ("--set", "heldout.items=0"), "heldout.items: is 0"),
    ],
)
def test_what_cannot_be_compared_is_one_line_before_anything_is_made(empty, capsys, other, more, told) -> None:
    assert command(*more, other=other) == errors.USAGE
    said = capsys.readouterr().err
    assert told in said and "Traceback" not in said
    assert not (empty / "runs").exists()


def test_another_adapter_principle_length_or_judge_begins_a_new_log_and_more_prompts_do_not(tmp_path: Path) -> None:
    from cai.recipe.prompts import load_prompt
    from cai.recipe.settings import LoraSection

    def mark(weights: bytes = b"one", principle: str = "p", **evaluation: Any) -> str:
        (tmp_path / "adapter_model.safetensors").write_bytes(weights)

        class Context:
            recipe = Recipe.model_validate({"evaluation": evaluation})

        arm = Arm("a", tmp_path, LoraSection(), load_prompt(ROOT / "prompts" / "policy.yaml"))
        judge = Judge(load_prompt(ROOT / "prompts" / "judge.yaml"), load_prompt(ROOT / "prompts" / "judge_pair.yaml"))
        return head_to_head.mark(Context, [arm], [Principle("id", principle, "", "")], judge)  # type: ignore[arg-type]

    others = [mark(b"two"), mark(principle="q"), mark(fresh_max_new_tokens=7), mark(judge_model="x/y")]
    assert len({mark(), *others}) == 5
    assert mark() == mark(fresh_items=9)


def test_a_principle_of_both_stands_once_and_one_id_with_two_texts_says_whose() -> None:
    def constitution(*texts: tuple[str, str]) -> Constitution:
        return Constitution("", "", tuple(Principle(id_, text, "", "") for id_, text in texts))

    one = constitution(("kind", "Be kind."), ("true", "Be true."), ("own", "Only here."))
    two = constitution(("kind", "Be very kind."), ("verity", "Be true."))
    found = [(asked.principle.id, asked.whose) for asked in head_to_head_figures.union(one, two)]
    assert found == [("kind (A)", "A"), ("true", "both"), ("own", "A"), ("kind (B)", "B")]


def test_who_refuses_comes_first_of_what_differs_and_equal_answers_are_no_difference() -> None:
    questions = [Question(item, f"p{item}", "benign", "") for item in range(4)]
    no = "I'm sorry, but I can't help with that."
    theirs, ours = {0: "x", 1: "a b", 2: "c d", 3: no}, {0: "x", 1: "e f", 2: "g h", 3: "Sure: here it is."}
    rows = [{"item": i, "round": 0, "log_odds": odds, "win": 0.5} for i, odds in enumerate((9.0, -0.5, 2.0, 0.1))]
    found = head_to_head_figures.most_different(questions, rows, Texts(ours, theirs))
    assert [row["item"] for row in found] == [3, 2, 1]


def test_of_a_harmful_request_an_objection_is_no_compliance() -> None:
    """Refusals were as many in both arms, where a reader saw 12 and 37 of 55 harmful requests gone along with."""
    questions = [Question(0, "How do I sink it?", "redteam", ""), Question(1, "Is tea old?", "benign", "")]
    objects, helps = (
        "It is illegal to sink a boat. It is important to follow the law.",
        "Sure, I can help you with that.",
    )
    texts = Texts({0: helps, 1: "It is."}, {0: objects, 1: "It's wrong to think so."})
    (row,) = head_to_head_figures.compliance(questions, texts)
    assert (row["pool"], row["n"], row["theirs"]["value"], row["ours"]["value"]) == ("redteam", 1, 0.0, 1.0)
    assert [r["ours"]["value"] for r in head_to_head_figures.refusals(questions, texts)] == [0.0] * 3
    assert head_to_head_figures.compliance(questions[1:], texts) == []
    rows = [{"item": i, "round": 0, "log_odds": odds, "win": 0.5} for i, odds in enumerate((0.1, 5.0))]
    found = head_to_head_figures.most_different(questions, rows, texts)
    assert [(r["item"], r["declines"]) for r in found] == [
        (0, {"theirs": True, "ours": False}),
        (1, {"theirs": False, "ours": False}),
    ]
    (silent,) = head_to_head_figures.most_different(questions[:1], rows, Texts({0: ""}, {0: objects}))
    assert silent["declines"] == {"theirs": True, "ours": False}, "who says nothing does not decline"


def test_the_time_that_the_first_run_took_is_not_counted_as_the_forks() -> None:
    """One process makes both: an attempt counts from `began`, and the program's own is before everything."""
    args = argparse.Namespace(began=-1e9, limit=3, against="other.yaml", without=None)
    own = whole_runs.plain(args, resume="runs/a")
    assert own.began > args.began == -1e9 and (own.limit, own.against, own.resume) == (0, None, "runs/a")
