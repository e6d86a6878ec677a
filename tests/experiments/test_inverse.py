"""--inverse: rules proposed from pairs alone, matched to the constitution above a measured bar."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import orjson
import pytest
from support.experiments import forget_end, kill_in, lay_out
from support.runs import FAKE, PAPERS_WAY, ROOT, read_jsonl

import runner
from cai import errors
from cai.evaluate import inverse
from cai.recipe.constitution import Principle
from cai.recipe.prompts import load_prompt

SMALL = (
    *("--milestone", "m1", "--set", "items=6", "--set", "heldout.items=2", "--set", "evaluation.probes="),
    *(
        "--set",
        "evaluation.likelihood_items=2",
        "--set",
        "evaluation.judge_items=0",
        "--set",
        "evaluation.critic_items=0",
    ),
)
NONSENSE = "An answer mentions zebras whenever violins hum."


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run and its rules: labelled pairs give a principle, swapped ones none."""
    folder = tmp_path_factory.mktemp("inverse")
    lay_out(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert runner.main(["cai.toml", *FAKE, *PAPERS_WAY, *SMALL]) == errors.DONE
        patch.setattr(inverse, "_drawn", drawn)
        assert runner.main(["cai.toml", "--inverse", "runs/latest"]) == errors.DONE
    return folder


def drawn(evaluation: Any, prompt: Any, texts: Any, part: Any) -> list[str]:
    about = {id_ for ids in draws_of(evaluation) for id_ in ids}
    told = sorted(p.principle for p in evaluation.context.constitution.principles if p.id in about)
    return [told[0] if arm == inverse.LABELS else NONSENSE for _, arm in part]


def draws_of(evaluation: Any) -> list[list[str]]:
    from cai.report.snapshot import read_story

    story = read_story(evaluation.context.run.path)
    return [story.pairs.drawn[pair["item"]] for pair in story.cleaned.kept]


@pytest.fixture
def project(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(whole, tmp_path / "copy", symlinks=True)
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def written(project: Path) -> dict[str, bytes]:
    folder = (project / "runs" / "latest").resolve() / "eval" / "inverse"
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".sum"}


@pytest.mark.runs
def test_a_rule_that_states_a_principle_recovers_it_and_nonsense_is_invented(project: Path) -> None:
    content = orjson.loads(written(project)["rules.json"])
    labels, swapped = content["arms"]["labels"], content["arms"]["swapped"]
    about = len(content["principles"])
    assert labels["recovered"]["value"] == 1 / about and labels["recovered"]["n"] == about
    assert (labels["invented"]["value"], swapped["invented"]["value"]) == (0.0, 1.0)
    assert swapped["recovered"]["value"] == 0.0 and [r["rule"] for r in swapped["rules"]] == [NONSENSE]
    assert [row["back"] for row in content["principles"]].count(True) == 1
    (rule,) = labels["rules"]  # equal proposals count once
    assert rule["explains"]["n"] == content["tried"] == 2  # on held-out pairs, where there are any
    assert rule["explains"]["value"] == 1.0  # the fake judge prefers what was mended more often


@pytest.mark.runs
def test_the_log_holds_every_match_and_a_cut_log_goes_on_to_the_same_bytes(project: Path, monkeypatch: Any) -> None:
    before, run = written(project), (project / "runs" / "latest").resolve()
    rows = read_jsonl(run / "eval" / "inverse" / "rules.jsonl")
    assert sum(row["metric"] == "inverse.calibration" for row in rows) == 18 * 18
    assert sum(row["metric"] == "inverse.match" for row in rows) == 2 * 18
    monkeypatch.setattr(inverse, "_drawn", drawn)
    log = run / "eval" / "inverse" / "rules.jsonl"
    for cut in (0.01, 0.5):
        kill_in(log, run, before[log.name][: int(cut * len(before[log.name]))])
        assert runner.main(["cai.toml", "--inverse", str(run)]) == errors.DONE
        assert written(project) == before


def test_the_fake_model_itself_proposes_something_behind_the_beginning(project: Path) -> None:
    """Without a stand-in for the drawing: the completions end at their line and begin as the prompt begins."""
    run = (project / "runs" / "latest").resolve()
    shutil.rmtree(run / "eval" / "inverse")
    forget_end(run)
    assert runner.main(["cai.toml", "--inverse", str(run)]) == errors.DONE
    rows = [r for r in read_jsonl(run / "eval" / "inverse" / "rules.jsonl") if r["metric"] == "inverse.proposals"]
    assert len(rows) == 2 * 3 and all(r["text"].startswith("An answer ") and "\n" not in r["text"] for r in rows)


def test_a_dry_run_counts_and_writes_nothing(project: Path, capsys: Any) -> None:
    before = written(project)
    assert runner.main(["cai.toml", "--inverse", "runs/latest", "--dry-run"]) == errors.DONE
    said = capsys.readouterr().out
    assert "6 training pairs, at most 6 rules" in said and "432 matches" in said and "at most 6 blind" in said
    assert written(project) == before


# --- by hand


def pair(item: int) -> Any:
    return {"item": item, "prompt": f"p{item}", "chosen": f"c{item}", "rejected": f"r{item}"}


def test_the_bar_is_above_what_any_request_reaches_under_another_principle() -> None:
    """Under others at most 0.4, 0.2 and 0.3: the bar is 0.4. Own: 0.9 passes, 0.3 does not, 0.5 does."""
    above, sensitivity = inverse.bar([[0.9, 0.4, 0.1], [0.2, 0.3, 0.2], [0.3, 0.1, 0.5]])
    assert above == 0.4 and sensitivity.value == pytest.approx(2 / 3)
    assert inverse.bar([[0.9]])[0] == math.inf  # nothing to hold it against


def test_a_likelihood_that_is_no_number_matches_nothing() -> None:
    principles = [Principle("one", "one", "", ""), Principle("two", "two", "", "")]
    found = inverse.summary(["x", "y"], [[None, None], [None, 0.7]], 0.5, principles, ["one", "two"])
    assert [r["nearest"] for r in found["rules"]] == [None, "two"] and found["recovered"]["value"] == 0.5
    assert found["invented"]["value"] == 0.5


def test_proposals_that_say_nothing_or_the_same_are_left_out() -> None:
    rows = [
        {"text": t} for t in ("An answer", "An answer is", "An answer is kind to all.", "An answer is kind to all!")
    ]
    prompt = load_prompt(ROOT / "prompts" / "inverse.yaml", inverse.FIELDS)
    assert inverse.distinct(rows, prompt) == (["An answer is kind to all."], 0)


def test_a_rule_that_is_copied_from_an_example_says_nothing_of_the_pairs() -> None:
    prompt = load_prompt(ROOT / "prompts" / "inverse.yaml", inverse.FIELDS)
    rows = [{"text": prompt.examples[-1].assistant}, {"text": prompt.examples[0].assistant.upper()}]
    assert inverse.distinct(rows, prompt) == ([], 2)


def test_swapped_labels_swap_the_texts_that_are_shown_and_nothing_else() -> None:
    class Plain:
        cut = staticmethod(str)

    as_is, swapped = (inverse.cases(Plain, [pair(1)], way) for way in (False, True))  # type: ignore[arg-type]
    assert as_is == "Instruction: p1\nOther: r1\nPreferred: c1"
    assert swapped == "Instruction: p1\nOther: c1\nPreferred: r1"


def test_every_pair_is_shown_once() -> None:
    found = inverse.groups([pair(i) for i in range(7)])
    assert sorted(p["item"] for group in found for p in group) == list(range(7))
    assert [len(group) for group in found] == [2, 2, 2, 1]


def test_the_shipped_prompt_begins_the_rule_and_each_example_ends_one() -> None:
    prompt = load_prompt(ROOT / "prompts" / "inverse.yaml", inverse.FIELDS)
    assert prompt.prefill == "An answer"
    assert all(e.assistant.startswith("An answer ") and e.assistant.endswith(".") for e in prompt.examples)
