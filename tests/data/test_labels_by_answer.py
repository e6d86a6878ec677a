"""Labels that ask about each text by itself (`pairs.by = "answer"`): what is asked, whole runs, forks, what stays."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.runs import FAKE, ROOT, read_jsonl

from cai import errors
from cai.commands import cli
from cai.commands.verify import verify
from cai.data import chain, labels
from cai.data.comparisons import ANSWER_FIELDS, answer_asks, orders, pair_log_odds
from cai.engine import Score
from cai.engine.asks import Ask, Scorer
from cai.engine.tokenizers import ByteTokenizer
from cai.errors import CaiError
from cai.inputs import read_inputs
from cai.recipe.load import Recipe
from cai.recipe.prompts import load_prompt
from cai.recipe.settings import PairsSection

Runner = Callable[..., tuple[int, Path]]
PROMPT = load_prompt(ROOT / "prompts" / "judge_answer.yaml", ANSWER_FIELDS)
SCORER: Any = Scorer(SimpleNamespace(), ByteTokenizer(eos_ids=(256,)), "base", 640)
KEYS = (
    "items=3", "heldout.items=1", "rounds=1", "dpo.max_steps=1", "evaluation.critic_items=3",
    "evaluation.fresh_items=1", "evaluation.neutral_passages=2", 'evaluation.probes=""',
)  # fmt: skip
FEW = ("--milestone", "m1", *(word for key in KEYS for word in ("--set", key)))
ALONE = ("--set", "pairs.by=answer")


def asks(rule: str = "It is kind.", place: int = 0) -> list[Ask]:
    return answer_asks(SCORER, PROMPT, (place,), "How do I dry figs?", rule, "In the sun.", "In the rain.")


def test_each_text_is_asked_about_once_and_all_rules_share_what_stands_before() -> None:
    four = asks()
    assert [ask.name[1:] for ask in four] == [("j4", 0, "A"), ("j4", 0, "B"), ("j4", 1, "A"), ("j4", 1, "B")]
    said = [SCORER.tokenizer.decode(ask.continuation).strip() for ask in four]
    assert said == ["Yes", "No", "Yes", "No"]
    first, second = (SCORER.tokenizer.decode(four[i].context) for i in (0, 2))
    assert "In the sun." in first and "In the rain." not in first and "In the rain." in second
    other = asks("It names no brand.")[0]
    assert four[0].context[: four[0].shared] == other.context[: other.shared], "one pass for all rules of a text"
    assert four[0].shared > four[0].head > 0 and "In the sun." in SCORER.tokenizer.decode(other.context[: other.shared])
    assert PROMPT.name == labels.BY_ANSWER and "An answer is helpful, honest and harmless." in str(
        SCORER.tokenizer.decode(asks("")[0].context)
    )


def test_a_long_request_and_a_long_answer_are_cut_to_what_a_reader_is_given() -> None:
    four = answer_asks(SCORER, PROMPT, (0,), "How long? " * 900, "It is kind.", "Word by word. " * 900, "In the rain.")
    case = SCORER.tokenizer.decode(four[0].context).rpartition("Instruction:\n")[2]
    assert (case.count("How long?"), case.count("Word by word.")) == (640 // 10, 640 // 14)


def test_the_margin_is_half_the_difference_of_both_yeses_and_swapping_the_texts_negates_it() -> None:
    def scores(ours: float, theirs: float) -> dict[tuple[Any, ...], Score]:
        odds = {0: ours, 1: theirs}
        return {ask.name: Score(0, (odds[ask.name[2]] if ask.name[3] == "A" else 0.0,)) for ask in asks()}

    assert orders(scores(2.0, -1.0), (0,)) == (2.0, -1.0)
    assert pair_log_odds(scores(2.0, -1.0), (0,)) == 1.5 == -pair_log_odds(scores(-1.0, 2.0), (0,))
    assert pair_log_odds(scores(3.0, 3.0), (0,)) == 0.0, "a liking for Yes cancels"


def pairs(**keys: Any) -> Any:
    recipe = Recipe().model_copy(update={"pairs": PairsSection(**keys)})
    return SimpleNamespace(recipe=recipe, log=SimpleNamespace(by_stage=lambda name: []))


def test_without_a_share_of_false_labels_the_chosen_text_must_only_be_more_of_a_yes() -> None:
    assert labels.bar_of(pairs(label="judge", by="answer", false_labels=0.0)) == 0.0
    assert labels.bar_of(pairs(label="judge", by="comparison", false_labels=0.0)) is None, "both orders must agree"
    assert labels.bar_of(pairs(label="always", by="comparison", false_labels=0.2)) is None
    assert labels.bar_of(pairs(label="judge", by="answer", false_labels=0.2)) == math.inf, "no known revision scored"


def test_comparisons_that_a_fork_keeps_are_read_by_the_bar_that_they_were_made_with() -> None:
    """Turned from "always" to "judge", a fork kept rows without a bar, and read two answers' Yes as two orders."""
    always, judge = (pairs(kind="sampled", label=label, by="answer") for label in ("always", "judge"))
    assert labels.bar_of(always) == labels.bar_of(judge) == 0.0
    of = [chain.stage_identity(context.recipe, "comparisons", FILES) for context in (always, judge)]
    assert of[0] == of[1] and "pairs.by" in of[0]


def test_it_changes_the_labels_and_no_stage_before_them() -> None:
    of = {by: {n: chain.stage_identity(pairs(label="judge", false_labels=0.2, by=by).recipe, n, FILES)
               for n in chain.names()} for by in ("comparison", "answer")}  # fmt: skip
    changed = {name for name in of["answer"] if of["answer"][name] != of["comparison"][name]}
    assert changed == {"labels", "label_bar"} == {name for name in of["answer"] if "pairs.by" in of["answer"][name]}
    assert "sha256(prompts/judge_answer.yaml)" in of["answer"]["labels"]
    assert "sha256(prompts/judge_pair.yaml)" not in of["answer"]["labels"], "what is not asked decides nothing"
    assert not any("pairs.by" in key for keys in of["comparison"].values() for key in keys), "runs of before resume"


FILES = {"prompts/judge_answer.yaml": "a", "prompts/judge_pair.yaml": "b", "constitution.yaml": "c"}


def test_a_fork_by_a_run_s_own_recipe_finds_the_prompt_that_the_run_did_not_ask_with(project: Path) -> None:
    """The run's folder holds what it read; what its fork asks beside that is the project's."""
    own = project / "runs" / "one"
    (own / "prompts").mkdir(parents=True)
    for name in ("cai.toml", "constitution.yaml"):
        (own / name.replace("cai", "recipe")).write_bytes((project / name).read_bytes())
    for path in (project / "prompts").glob("*.yaml"):
        if path.stem not in ("judge_answer", "policy"):
            (own / "prompts" / path.name).write_bytes(path.read_bytes())
    (own / "manifest.json").write_text('{"schema": 1, "home": "../.."}')
    asked = cli.parse([str(own / "recipe.toml"), *FAKE, *ALONE, "--set", "pairs.label=judge"])
    files = read_inputs(asked).files
    at = {name: files[f"prompts/{name}.yaml"].path.resolve() for name in ("judge_answer", "policy", "answers", "judge")}
    assert {name for name, path in at.items() if path.parent == project / "prompts"} == {"judge_answer", "policy"}
    (project / "prompts" / "judge_answer.yaml").unlink()
    with pytest.raises(CaiError, match=r"judge_answer\.yaml: prompts: cannot read it .* Give an existing file") as told:
        read_inputs(asked)
    assert "runs/one/prompts" not in str(told.value), "where it is to be put"


@pytest.mark.runs
def test_a_whole_run_a_fork_of_one_that_compared_and_a_resume(run_fake: Runner) -> None:
    code, compared = run_fake(*FEW, "--set", "pairs.label=judge")
    assert code == errors.DONE and not (compared / "prompts" / "judge_answer.yaml").exists()
    known = set(compared.parent.iterdir())
    assert run_fake(*FEW, "--set", "pairs.label=judge", *ALONE, "--fork", str(compared))[0] == errors.DONE
    fork = next(path for path in compared.parent.iterdir() if path not in known and path.is_dir())
    import runner

    assert runner.main([str(fork / "recipe.toml"), "--resume", str(fork)]) == errors.DONE
    before, after = (
        {stage: [row for row in read_jsonl(run / "records.jsonl") if row["stage"] == stage] for stage in chain.names()}
        for run in (compared, fork)
    )
    kept = [stage for stage in before if before[stage] and before[stage] == after[stage]]
    assert {"instructions", "answers", "relevance", "critiques", "revisions"} <= set(kept)
    assert before["labels"] != after["labels"] and before["label_bar"] != after["label_bar"]
    assert all(row["bar"] is not None and row["margin"] > row["bar"] for row in after["labels"])
    assert {row["prompt_sha"] for row in after["labels"]} == {PROMPT.sha}
    assert (fork / "prompts" / "judge_answer.yaml").read_bytes() == (ROOT / "prompts/judge_answer.yaml").read_bytes()
    assert not [check for check in verify(fork) if check.verdict == "FAIL"]


@pytest.mark.runs
@pytest.mark.parametrize("more", [("pairs.label=always",), ("pairs.kind=sampled", "model.name=fake:choosing")])
def test_a_run_without_that_check_ends_as_well(run_fake: Runner, more: tuple[str, ...]) -> None:
    """The critic's exam asked for a prompt that a run with `pairs.label = "always"` has not read."""
    code, run = run_fake(*FEW, *ALONE, *(word for key in more for word in ("--set", key)))
    assert code == errors.DONE and (run / "eval" / "critic.jsonl").is_file() == ("sampled" not in more[0])


def test_a_prompt_folder_without_the_file_is_told_of_in_one_line(project: Path) -> None:
    (project / "prompts" / "judge_answer.yaml").unlink()
    read_inputs(cli.parse([str(project / "cai.toml"), *FAKE]))
    with pytest.raises(CaiError, match=r"judge_answer\.yaml: prompts: cannot read it .* Give an existing file") as told:
        read_inputs(cli.parse([str(project / "cai.toml"), *FAKE, *ALONE, "--set", "pairs.label=judge"]))
    assert "\n" not in str(told.value)


@pytest.mark.runs
def test_a_fork_tells_which_settings_it_has_of_the_run_that_it_began_from(
    run_fake: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fork that was to check labels checked none: the run had been begun with `pairs.label = "always"`."""
    _, run = run_fake(*FEW, "--set", 'pairs.label="always"', "--until", "pairs")
    capsys.readouterr()
    held = [word for key in KEYS for word in ("--set", key)]
    assert run_fake("--milestone", "m1", *held, *ALONE, "--fork", str(run), "--dry-run")[0] == errors.DONE
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "as that run was begun" in line]
    assert line.strip() == (
        "as that run was begun: --set 'pairs.label=\"always\"' (give it again with another value to change it)"
    )
    assert run_fake(*FEW, "--set", "pairs.label=judge", "--fork", str(run), "--dry-run")[0] == errors.DONE
    assert "as that run was begun" not in capsys.readouterr().out
