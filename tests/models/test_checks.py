"""Check sets: balanced, kappa by hand, judges that are and are not proven, records, resume, the switch that stops."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.benchmarks import PROMPTS, write_files
from support.runs import read_jsonl

from cai import errors
from cai.evaluate.benchmarks import check_cases, loaders, verdicts
from cai.evaluate.benchmarks.sources import Found
from cai.models import checks
from cai.models.auxiliary import Auxiliary
from cai.models.checks import JudgeCheck, judged, label, rows_of
from cai.recipe.settings_benchmarks import STAND_IN, ChecksSection

Runner = Callable[..., tuple[int, Path]]
GUARD = ("--set", "guard.enabled=true", "--set", "guard.model=stand-in")
STRICT = ("--set", "checks.require_proven=true")
JUDGE = ("--set", "benchmarks.judge=stand-in", "--set", "benchmarks.max_new_tokens=40")
BENCHMARKS = ("harmbench", "xstest", "mtbench")


# --- the sets


@pytest.mark.parametrize("use", checks.SETS)
def test_labels_are_balanced_and_alternate_so_that_a_limit_keeps_them_balanced(use: str) -> None:
    rows = rows_of(use)
    assert [row["label"] for row in rows] == [row["item"] % 2 == 0 for row in rows]
    assert len(rows) == (24 if use == "mtbench" else 40)
    assert [row["item"] for row in rows_of(use, 5)] == [0, 1, 2, 3, 4]
    texts = [row[key] for row in rows for key in (("a", "b") if use == "mtbench" else ("prompt", "reply"))]
    assert all(text.strip() for text in texts)


def test_the_same_requests_stand_on_both_sides() -> None:
    """A judge that looks at the request alone is not proven by the set."""
    rows = rows_of("guard")
    harmful = {row["prompt"] for row in rows if row["label"]}
    assert len([row for row in rows if not row["label"] and row["prompt"] in harmful]) == 8
    refused = {row["prompt"] for row in rows_of("xstest") if row["label"]}
    assert len([row for row in rows_of("xstest") if not row["label"] and row["prompt"] in refused]) >= 16


def test_neither_length_nor_place_tells_the_better_answer() -> None:
    rows = rows_of("mtbench")
    longer = [(len(row["a"]) > len(row["b"])) == row["label"] for row in rows]
    assert 0.4 <= sum(longer) / len(rows) <= 0.6
    assert sum("reference" in row for row in rows) == 9


# --- figures


def answers(use: str, said: Callable[[dict[str, Any]], bool | None]) -> list[dict[str, Any]]:
    return [{"label": row["label"], "said": said(row)} for row in rows_of(use)]


def verdict(said: Callable[[dict[str, Any]], bool | None], use: str = "guard", **more: Any) -> JudgeCheck:
    return judged(use, "j", answers(use, said), ChecksSection(**more))[0]


def test_kappa_sensitivity_and_intervals_by_hand() -> None:
    """36 of 40 right, all misses among the harmful: agreement 0.9, kappa 2 * 0.9 - 1, sensitivity 16/20."""
    check, figures = judged("guard", "j", answers("guard", lambda r: r["label"] and r["item"] >= 8), ChecksSection())
    assert check.kappa == pytest.approx(0.8) and (check.sensitivity, check.specificity) == (0.8, 1.0)
    assert not check.proven and check.words == "unproven (kappa 0.80, sensitivity 0.80, n=40)"
    kappa, found = figures["checks.guard.kappa"], figures["checks.guard.sensitivity"]
    assert (kappa.n, found.n) == (40, 20) and kappa.low == pytest.approx(2 * 0.769 - 1, abs=0.01)
    assert found.low == pytest.approx(0.584, abs=0.001) and found.high == pytest.approx(0.919, abs=0.001)


@pytest.mark.parametrize("use", checks.SETS)
@pytest.mark.parametrize("answer", [True, False, None])
def test_a_judge_with_one_answer_for_everything_is_unproven(use: str, answer: bool | None) -> None:
    check = verdict(lambda row: answer, use)
    assert not check.proven and check.kappa is not None and check.kappa <= 0.0
    assert check.undecided == (check.n if answer is None else 0)


def test_a_judge_that_is_right_is_proven_on_enough_rows_only() -> None:
    assert verdict(lambda row: row["label"]).words == "proven (kappa 1.00, sensitivity 1.00, n=40)"
    few = [{"label": row["label"], "said": row["label"]} for row in rows_of("guard", 12)]
    assert not judged("guard", "j", few, ChecksSection(limit=12))[0].proven
    assert not verdict(lambda row: row["label"] or row["item"] < 14).proven  # cries wolf: kappa 0.65
    assert verdict(lambda row: row["label"] or row["item"] < 10).proven  # kappa 0.75


def test_a_row_that_could_not_be_judged_counts_as_wrong() -> None:
    check = verdict(lambda row: None if row["item"] == 0 else row["label"])
    assert check.kappa == pytest.approx(0.95) and check.sensitivity == 0.95
    assert check.words == "proven (kappa 0.95, sensitivity 0.95, n=40, 1 undecided)"


def test_names() -> None:
    good = verdict(lambda row: row["label"])
    assert label("org/judge", good) == "org/judge, proven (kappa 1.00, sensitivity 1.00, n=40)"
    assert label("org/judge", None) == "org/judge, unproven (not checked)"
    assert label(STAND_IN, good).startswith("STAND-IN (the base model: measures nothing)")


def test_what_is_required_must_be_checked() -> None:
    with pytest.raises(ValueError, match=r"checks\.require_proven"):
        ChecksSection(enabled=False, require_proven=True)


# --- the judges' own code on the rows


class Scripted:
    """A judge's engine: `knows(prompt)` says what it thinks of the text; words are scored by it."""

    name, streams = "scripted", False

    def __init__(self, knows: Callable[[str], bool], words: tuple[str, str], write: Callable[[str], str]) -> None:
        from cai.engine.tokenizers import ByteTokenizer

        self.knows, self.words, self.write, self.queue = knows, words, write, []
        self.tokenizer = ByteTokenizer()

    def submit(self, request: Any) -> None:
        self.queue.append(request)

    def completions(self, stopped: Any = None) -> Any:
        from cai.engine import Completion

        while self.queue:
            request = self.queue.pop(0)
            yield Completion(request.id, (1,), self.write(self.tokenizer.decode(request.token_ids)), "eos")

    def score(self, requests: Sequence[Any], stopped: Any = None) -> Any:
        from cai.engine import Score

        for request in requests:
            context = self.tokenizer.decode(request.context_ids)
            word = self.tokenizer.decode(request.continuation_ids)
            yield Score(request.id, (0.0 if word == self.words[0 if self.knows(context) else 1] else -9.0,))


class Going:
    @staticmethod
    def stopped() -> bool:
        return False


def said_of(name: str, knows: Callable[[str], bool]) -> JudgeCheck:
    words = {"harmbench": ("yes", "no"), "xstest": ("2", "1"), "mtbench": ("9", "2")}[name]
    engine = Scripted(knows, words, lambda prompt: "Rating: [[1]]")
    judge = Auxiliary("scripted", engine, engine.tokenizer, None, 100_000, {})  # type: ignore[arg-type]
    rows = rows_of(name)
    cases = check_cases.cases(name, rows)
    if name == "harmbench":
        found = verdicts.harm(judge, cases, Going)  # type: ignore[arg-type]
    elif name == "xstest":
        found = verdicts.refusals(judge, cases, verdicts.OWN_REFUSAL, Going)  # type: ignore[arg-type]
    else:
        prompts = loaders.judge_prompts(Found("mtbench_prompts", Path("p"), PROMPTS.encode(), "", "unchecked"))
        found = verdicts.ratings(judge, cases, prompts, 20, Going)  # type: ignore[arg-type]
    recorded = [
        {"label": row["label"], "said": word}
        for row, word in zip(rows, check_cases.verdicts_of(name, rows, found), strict=True)
    ]
    return judged(name, "scripted", recorded, ChecksSection())[0]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_judge_that_knows_is_proven_and_one_that_does_not_look_is_not(name: str) -> None:
    rows = rows_of(name)
    if name == "mtbench":
        good = [row["a" if row["label"] else "b"] for row in rows]
    else:
        good = [row["reply"] for row in rows if row["label"]]
    assert said_of(name, lambda prompt: any(text in prompt for text in good)).proven
    for always in (True, False):
        assert not said_of(name, lambda prompt, always=always: always).proven


def test_the_context_of_a_row_reaches_the_classifier() -> None:
    contextual = [case for case in check_cases.cases("harmbench", rows_of("harmbench")) if case.task.context]
    assert len(contextual) == 2 and {case.task.kind for case in contextual} == {"contextual"}


# --- within a run, on the fake model


@pytest.mark.runs
def test_the_guard_is_checked_once_before_it_decides_and_its_label_says_so(run_fake: Runner) -> None:
    code, run = run_fake("--milestone", "m1", *GUARD)
    assert code == errors.DONE
    rows = [row for row in read_jsonl(run / "eval/checks/guard.jsonl") if row["arm"] == "check"]
    assert len(rows) == 40
    content = json.loads((run / "eval/checks.json").read_text())
    figure = json.loads((run / "eval/guard.json").read_text())["figures"]["guard.dropped"]
    assert re.search(r"^STAND-IN .*, unproven \(kappa -?0\.\d\d, sensitivity 0\.\d\d, n=40\)$", figure["judge"])
    assert figure["facts"]["proven"] is content["checks"]["guard"]["proven"] is False
    assert "checks.guard.kappa" in (run / "report.md").read_text()
    kinds = [row["kind"] for row in read_jsonl(run / "events.jsonl")]
    assert kinds.count("checked") == 1


@pytest.mark.slow
def test_checks_off_leave_the_records_as_they_are_and_no_file(run_fake: Runner) -> None:
    _, on = run_fake("--milestone", "m1", *GUARD)
    _, off = run_fake("--milestone", "m1", *GUARD, "--set", "checks.enabled=false")
    assert on != off and not (off / "eval/checks").exists() and not (off / "eval/checks.json").exists()
    for name in ("records.jsonl", "dataset/examples.jsonl"):
        assert (on / name).read_bytes() == (off / name).read_bytes()
    figure = json.loads((off / "eval/guard.json").read_text())["figures"]["guard.dropped"]
    assert figure["judge"].endswith("unproven (not checked)")


@pytest.mark.runs
def test_an_unproven_guard_stops_the_run_before_it_filters_where_that_is_asked_for(
    run_fake: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    code, run = run_fake("--milestone", "m1", *GUARD, *STRICT)
    assert code == errors.GATE
    assert not [row for row in read_jsonl(run / "records.jsonl") if row["stage"] == "guard"]
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "guard.model: STAND-IN" in last and "unproven (kappa" in last and "checks.require_proven = false" in last
    code, _ = run_fake("--resume", "runs/latest", "--set", "checks.require_proven=false")
    assert code == errors.DONE


@pytest.mark.runs
def test_a_run_whose_guard_was_filtered_before_is_stopped_too(run_fake: Runner) -> None:
    run_fake("--milestone", "m1", *GUARD, "--set", "checks.enabled=false")
    code, _ = run_fake("--resume", "runs/latest", "--set", "checks.enabled=true", *STRICT)
    assert code == errors.GATE


@pytest.mark.runs
def test_a_cut_check_is_completed_to_the_same_rows_and_a_whole_one_is_not_made_again(
    run_fake: Runner, project: Path
) -> None:
    files = write_files(project)
    _, run = run_fake("--milestone", "m0")
    asked = ("--benchmark", ",".join(BENCHMARKS), "--resume", "runs/latest", *files, *JUDGE)
    assert run_fake(*asked)[0] == errors.DONE
    paths = [run / "eval/checks" / f"{name}.jsonl" for name in BENCHMARKS]
    before = {path: path.read_bytes() for path in (*paths, run / "eval/checks.json", run / "eval/benchmarks.json")}
    assert run_fake(*asked)[0] == errors.DONE
    assert {path: path.read_bytes() for path in before} == before
    for path in paths:
        lines = before[path].splitlines(keepends=True)
        path.write_bytes(b"".join(lines[:9]) + lines[9][:7])
        path.with_suffix(".sum").unlink()
    assert run_fake(*asked)[0] == errors.DONE
    for path, data in before.items():
        assert sorted(path.read_bytes().splitlines()) == sorted(data.splitlines())
    assert len([row for row in read_jsonl(run / "events.jsonl") if row["kind"] == "checked"]) == 6


@pytest.mark.runs
def test_the_attempt_that_began_a_run_and_a_later_one_check_once(run_fake: Runner, project: Path) -> None:
    files = write_files(project)
    within = ("--set", 'benchmarks.run=["xstest"]', "--set", "checks.limit=4")
    _, run = run_fake("--milestone", "m0", *GUARD, *files, *JUDGE, *within)
    before = {path: path.read_bytes() for path in (run / "eval/checks").iterdir()}
    assert len(before) == 4 and run_fake("--resume", "runs/latest")[0] == errors.DONE
    assert {path: path.read_bytes() for path in (run / "eval/checks").iterdir()} == before
    kinds = [row["kind"] for row in read_jsonl(run / "events.jsonl")]
    assert kinds.count("checked") == 2 and kinds.count("model_loaded") == 1


@pytest.mark.runs
def test_an_unproven_judge_stops_before_its_verdicts_and_a_limit_is_stated(
    run_fake: Runner, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = write_files(project)
    _, run = run_fake("--milestone", "m0")
    asked = ("--benchmark", "harmbench", "--resume", "runs/latest", *files, *JUDGE, "--set", "checks.limit=10")
    assert run_fake(*asked, *STRICT)[0] == errors.GATE
    assert "benchmarks.harmbench_judge: STAND-IN" in capsys.readouterr().err
    assert len(read_jsonl(run / "eval/benchmarks/harmbench.verdicts.jsonl")) == 1  # the fingerprint alone
    assert len(read_jsonl(run / "eval/benchmarks/harmbench.jsonl")) == 1 + 2 * 3  # the answers stay
    lax = ("--set", "checks.require_proven=false")  # what a resume sets holds on
    assert run_fake(*asked, *lax)[0] == errors.DONE
    figures = json.loads((run / "eval/benchmarks.json").read_text())["figures"]
    assert "n=10)" in figures["harmbench.asr_drop"]["judge"]
    assert figures["harmbench.asr_drop"]["facts"]["proven"] is False
    table = (run / "eval/table.md").read_text()
    assert "n=10)" in table and "checks." not in table
    row = next(line for line in table.splitlines() if line.startswith("| harmbench | STAND-IN"))
    assert row.split(" | ")[2] == "10" and row.endswith("| unproven |")


@pytest.mark.runs
def test_the_regular_expression_is_checked_as_any_judge(run_fake: Runner, project: Path) -> None:
    files = write_files(project)
    _, run = run_fake("--milestone", "m0")
    run_fake("--benchmark", "xstest", "--resume", "runs/latest", *files)
    check = json.loads((run / "eval/checks.json").read_text())["checks"]["xstest"]
    rows = rows_of("xstest")
    right = [(verdicts.refusal_class(row["reply"]) == "full_refusal") == row["label"] for row in rows]
    assert check["judge"] == "regular expression" and check["kappa"] == pytest.approx(2 * sum(right) / len(rows) - 1)
