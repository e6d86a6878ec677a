"""--attribute: what each principle bought and cost, and what is lost where its pairs are left out."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from support.experiments import kill_in, lay_out
from support.runs import FAKE, PAPERS_WAY, read_jsonl

import runner
from cai import errors
from cai.data.hygiene import clean
from cai.evaluate import attribution
from cai.models.fake import FakeEngine
from cai.recipe.constitution import Principle
from cai.recipe.settings_evaluation import HygieneSection
from cai.report.attribution import shade
from cai.report.snapshot import read_story

SMALL = (
    *("--milestone", "m1", "--set", "items=6", "--set", "heldout.items=4", "--set", "evaluation.probes="),
    *(
        "--set",
        "evaluation.likelihood_items=2",
        "--set",
        "evaluation.judge_items=0",
        "--set",
        "evaluation.critic_items=0",
    ),
)


@pytest.fixture(autouse=True, scope="module")
def told_apart() -> Iterator[None]:
    """The fake's adapters all say the same; here the whole run's says a better thing than a fork's."""
    real = FakeEngine._complete

    def complete(self: FakeEngine, request: Any) -> Any:
        done = real(self, request)
        folder = self.model.attached
        if not (self.model.tuned and folder):
            return done
        whole = "without_principles = []" in (folder.parent / "recipe.resolved.toml").read_text()
        return type(done)(done.id, done.token_ids, f"{done.text} mended" if whole else done.text, done.finish)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeEngine, "_complete", complete)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run, and one principle of its training pairs tried without."""
    folder = tmp_path_factory.mktemp("attribute")
    lay_out(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert runner.main(["cai.toml", *FAKE, *PAPERS_WAY, *SMALL]) == errors.DONE
        run = (folder / "runs" / "latest").resolve()
        command = ["cai.toml", "--attribute", str(run), "--without", some_principle(run)]
        assert runner.main(command) == errors.DONE
    return folder


def some_principle(run: Path) -> str:
    """A principle that some training pair is about, and not all."""
    story = read_story(run)
    drawn = story.pairs.drawn
    return drawn[story.cleaned.kept[0]["item"]][0]


@pytest.fixture
def project(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(whole, tmp_path / "copy", symlinks=True)
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def run_of(project: Path) -> Path:
    return min(path for path in (project / "runs").iterdir() if path.is_dir() and not path.is_symlink())


def written(run: Path) -> dict[str, bytes]:
    """The page's three forms and the logs under it."""
    folder = run / "eval" / "attribution"
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".sum"}


@pytest.mark.runs
def test_each_principle_has_its_judged_gain_and_its_place_in_two_heat_maps(project) -> None:
    content = orjson.loads(written(run_of(project))["principles.json"])
    assert content["prompts"] == 4 and len(content["ranking"]) == 18
    assert content["overall"]["wins"]["value"] == 1.0  # `mended` is what the fake judge likes
    assert all(row["verdict"] == "bought" and row["log_odds"]["low"] > 0 for row in content["ranking"])
    assert set(content["heat"]) == {"pool", "topic"}
    for name in ("pool", "topic"):
        for row in content["heat"][name]:
            assert sum(cell["n"] for cell in row["cells"].values()) == 4


def test_a_fork_without_a_principle_trains_on_none_of_its_pairs_and_shares_all_text(project) -> None:
    run = run_of(project)
    principle = some_principle(run)
    (fork,) = (p for p in (project / "runs").iterdir() if p.is_dir() and not p.is_symlink() and p != run)
    shared = [(r / "records.jsonl").read_bytes() for r in (run, fork)]
    assert shared[0] == shared[1]
    train = [{row["item"] for row in read_story(r).cleaned.kept} for r in (run, fork)]
    about = {item for item, ids in read_story(run).pairs.drawn.items() if principle in ids}
    assert train[1] == train[0] - about and train[0] & about
    assert {row["prompt"] for row in read_jsonl(fork / "dataset" / "pairs" / "train.jsonl")} < {
        row["prompt"] for row in read_jsonl(run / "dataset" / "pairs" / "train.jsonl")
    }
    (one,) = orjson.loads(written(run)["principles.json"])["without"]
    assert one["run"] == fork.name and one["left_out"] == [principle]
    assert [row["id"] for row in one["own"]] == [principle] and one["own"][0]["verdict"] == "bought"
    assert one["others_verdict"] == "bought" and one["others"]["n"] == 4  # a value a prompt, not a principle


@pytest.mark.runs
@pytest.mark.parametrize(("log", "cut"), [("principles", 0.5), ("without", 0.7)])
def test_an_attribution_that_was_killed_goes_on_to_the_same_bytes(project, log: str, cut: float) -> None:
    run = run_of(project)
    before, folder = written(run), run / "eval" / "attribution"
    (path,) = folder.glob(f"{log}*.jsonl")
    kill_in(path, run, before[path.name][: int(cut * len(before[path.name]))])
    for kind in ("html", "md", "json"):
        (folder / f"principles.{kind}").unlink()
    assert runner.main(["cai.toml", "--attribute", str(run)]) == errors.DONE
    assert written(run) == before


def test_a_dry_run_counts_prompts_judgements_and_pairs(project, capsys) -> None:
    run = run_of(project)
    before = written(run)
    assert runner.main(["cai.toml", "--attribute", str(run), "--without", some_principle(run), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "4 held-out prompts" in said and f"a fork without {some_principle(run)}" in said and "of 6 training" in said
    assert written(run) == before


@pytest.mark.parametrize(("name", "told"), [("honesti", "Did you mean honesty?"), ("zzz", "It has: helpful-accurate")])
def test_a_principle_that_is_none_is_told_with_the_one_that_was_meant(project, capsys, name: str, told: str) -> None:
    assert runner.main(["cai.toml", "--attribute", str(run_of(project)), "--without", name]) == errors.USAGE
    assert told in capsys.readouterr().err


def test_without_alone_says_what_it_goes_with(project, capsys) -> None:
    assert runner.main(["cai.toml", "--without", "honesty"]) == errors.USAGE
    assert "--without: goes with --attribute" in capsys.readouterr().err


# --- by hand


def row(item: int, place: int, odds: float | None) -> dict[str, Any]:
    win = None if odds is None else 1.0 if odds > 0 else 0.0
    return {"item": item, "round": place, "log_odds": odds, "win": win}


def test_the_others_are_averaged_within_a_prompt_before_prompts_are_counted() -> None:
    """Prompt 1 under two others: 1 and 3, so 2; prompt 2: 4 and none, so 4; the mean of both is 3, n is 2."""
    principles = [Principle(id_, id_, "", "") for id_ in ("own", "x", "y")]
    rows = [row(1, 1, 5.0), row(1, 2, 1.0), row(1, 3, 3.0), row(2, 1, 5.0), row(2, 2, 4.0), row(2, 3, None)]
    texts = attribution.Texts({1: "a b", 2: "a"}, {1: "a", 2: "b"})
    found = attribution.without(rows, principles, ["own"], texts, "judge")
    assert (found["others"]["value"], found["others"]["n"]) == (3.0, 2)
    assert found["own"][0]["log_odds"]["value"] == 5.0


def test_an_unscored_judgement_is_no_tie_in_a_heat_map() -> None:
    principles = [Principle("one", "one", "", "")]
    (found,) = attribution.heat([row(1, 1, 1.0), row(2, 1, None), row(3, 1, None)], principles, {"a": [1, 2], "b": [3]})
    assert found["cells"] == {"a": {"wins": 1.0, "n": 1}, "b": {"wins": None, "n": 0}}


def test_an_interval_that_holds_zero_shows_nothing() -> None:
    assert attribution.verdict({"low": 0.1, "high": 0.4}) == "bought"
    assert attribution.verdict({"low": -0.4, "high": -0.1}) == "cost"
    assert attribution.verdict({"low": -0.1, "high": 0.4}) == attribution.verdict({"low": None, "high": None})


def test_shades_are_even_on_both_sides_of_one_half() -> None:
    assert [shade(x) for x in (0.5, None, 0.51, 1.0, 0.49, 0.0)] == ["", "", "up1", "up4", "down1", "down4"]


def test_pairs_of_a_principle_go_before_every_other_rule_and_are_counted() -> None:
    pairs: Any = [{"item": i, "prompt": "p", "chosen": f"yes {i}", "rejected": f"no {i}", "pool": "benign",
                   "split": "train"} for i in range(3)]  # fmt: skip
    drawn = {0: ["honesty"], 1: ["privacy", "honesty"], 2: ["privacy"]}
    found = clean(pairs, HygieneSection(without_principles=("honesty",)), None, drawn)
    assert [pair["item"] for pair in found.kept] == [2]
    assert {row["rule"] for row in found.removed} == {"without_principles"}
    assert found.facts["rules"]["without_principles"]["removed"] == 2
    assert "without_principles" not in clean(pairs, HygieneSection(), None, drawn).facts["rules"]
