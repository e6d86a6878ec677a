"""`cai.open_run`: a run as plain tables, the same with pandas and without, and what is no run is one line."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest
from support.runs import CALIBRATED, FAKE

import cai
import runner
from cai.errors import CaiError
from cai.report.opened import COLUMNS, OpenedRun

Runner = Callable[..., tuple[int, Path]]
ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--set", "items=6", "--set", "heldout.items=2", "--set", "dpo.eval_steps=5", "--set", "dpo.max_steps=10")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole m2 on the fake model in the shipped recipe's way, where a round may find nothing."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("cai.toml", "constitution.yaml"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "prompts", folder / "prompts")
    runner.main([str(folder / "cai.toml"), *FAKE, "--milestone", "m2", *SMALL])
    return (folder / "runs" / "latest").resolve()


def data_set(run: Path, split: str) -> list[dict]:
    return [orjson.loads(line) for line in (run / "dataset/pairs" / f"{split}.jsonl").read_bytes().splitlines()]


@pytest.mark.runs
def test_an_opened_run_has_the_pairs_that_the_run_wrote_and_the_report_counts_no_others(run_fake: Runner) -> None:
    more = ("--set", "items=12", "--set", "heldout.items=4", "--until", "pairs", *CALIBRATED)
    run = run_fake("--milestone", "m2", *more)[1]
    opened = cai.open_run(run, pandas=False)
    for split, used in (("train", True), ("heldout", False)):
        pairs = [row for row in opened.pairs if row["split"] == split]
        written = [(row["prompt"], row["chosen"], row["rejected"]) for row in data_set(run, split)]
        assert [(row["prompt"], row["chosen"], row["rejected"]) for row in pairs if row["used"] is used] == written
        assert written
    assert len(opened.pairs) == len(opened.examples) == 16, opened.rejects  # a round that found nothing rejects none
    assert any(example["rounds"] < 2 for example in _rounds_of(opened)), "no item of one round: nothing was tested"


def _rounds_of(opened: OpenedRun) -> list[dict]:
    counts: dict[int, int] = {}
    for row in opened.rounds:
        counts[row["item"]] = counts.get(row["item"], 0) + 1
    return [{"item": item, "rounds": count} for item, count in counts.items()]


@pytest.mark.runs
def test_every_table_has_the_columns_of_its_page_with_pandas_and_without(run: Path) -> None:
    pandas = pytest.importorskip("pandas")
    frames, plain = cai.open_run(run), cai.open_run(run, pandas=False)
    page = (ROOT / "docs" / "api.md").read_text()
    for name, columns in COLUMNS.items():
        frame, rows = getattr(frames, name), getattr(plain, name)
        assert isinstance(frame, pandas.DataFrame) and list(frame.columns) == list(columns)
        assert len(frame) == len(rows) and all(list(row) == list(columns) for row in rows)
        line = next(line for line in page.splitlines() if line.startswith(f"| `{name}`"))
        assert [column for column in columns if f"`{column}`" not in line] == [], name


def test_the_text_before_a_round_is_the_text_after_the_one_before(run: Path) -> None:
    opened = cai.open_run(run, pandas=False)
    answers = {row["item"]: row["initial_answer"] for row in opened.examples}
    for row in opened.rounds:
        assert row["before"] == answers[row["item"]]
        answers[row["item"]] = row["after"]
    assert answers == {row["item"]: row["revised_answer"] for row in opened.examples}


def test_figures_gates_and_curves_are_those_of_the_files(run: Path) -> None:
    opened = cai.open_run(run, pandas=False)
    gates = orjson.loads((run / "eval/gates.json").read_bytes())
    assert [(g["metric"], g["status"]) for g in opened.gates] == [(v["metric"], v["status"]) for v in gates["verdicts"]]
    measured = orjson.loads((run / "eval/measured.json").read_bytes())
    known = {name: m["value"] for name, m in measured.get("figures", measured).items() if isinstance(m, dict)}
    shown = {row["metric"]: row["value"] for row in opened.figures}
    assert known.items() <= shown.items() and known
    assert opened.facts["passed"] is gates["passed"] and opened.facts["milestone"] == "m2"
    train = [row for row in opened.curves if row["split"] == "train"]
    heldout = [row for row in opened.curves if row["split"] == "heldout"]
    assert [row["step"] for row in train] == list(range(1, 11)) and [row["step"] for row in heldout] == [5, 10]
    assert train[0]["loss"] == pytest.approx(0.6931, abs=1e-4) and heldout[0]["accuracy"] is not None


def test_a_run_that_has_only_begun_opens_with_empty_tables_and_says_what_is_missing(run_fake: Runner) -> None:
    _, run = run_fake("--milestone", "m1", "--until", "instructions")
    opened = cai.open_run(run, pandas=False)
    assert opened.figures == opened.gates == opened.curves == opened.examples == []
    assert opened.facts["passed"] is None and any("evaluated" in gap for gap in opened.gaps)


def test_what_is_no_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CaiError, match=r"is no run folder .*Give runs/<id>"):
        cai.open_run(tmp_path)


def test_pandas_that_is_absent_is_passed_over_and_where_asked_for_one_line(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert isinstance(cai.open_run(run).pairs, list)
    with pytest.raises(CaiError, match="pandas is not installed"):
        cai.open_run(run, pandas=True)


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import cai, sys; print([m for m in ('numpy', 'torch', 'pandas', 'pydantic') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.runs
def test_an_item_in_which_nothing_was_found_is_shown_with_its_answer_and_its_reason(
    run_fake: Runner, project: Path
) -> None:
    """A constitution of three sentences, of which many answers break none: the report is whole all the same."""
    (project / "constitution.yaml").write_text("An answer admits doubt.\nAn answer gives reasons.\nIt declines harm.\n")
    code, run = run_fake(
        "--milestone", "m1", "--until", "pairs", "--set", "pairs.replacements=0", *CALIBRATED
    )  # 20 are shown
    assert code == 0
    rejects = [row for row in cai.open_run(run, pandas=False).snapshot.pairs.rejects if row["reason"] == "no_issue"]
    bare = [row["example"]["initial_answer"] for row in rejects if not row["example"]["rounds"]]
    assert bare, "no item without a find: nothing was tested"
    shown = {page: (run / page).read_text() for page in ("report.html", "report.md")}
    assert all(answer in text for answer in bare for text in shown.values())
