"""Names of figures: whatever a run writes can be gated, and a misspelt name is refused with the nearest one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import orjson
import pytest
from support.benchmarks import write_files

from cai import errors
from cai.metrics import names as metrics
from cai.recipe.settings_evaluation import GatesSection

Runner = Callable[..., tuple[int, Path]]


def figures_under(folder: Path) -> set[str]:
    contents = [orjson.loads(path.read_bytes()) for path in folder.glob("*.json")]
    return {name for content in contents for name in content.get("figures", {})}


@pytest.mark.runs
def test_every_figure_that_a_run_writes_has_its_name_in_the_list(run_fake: Runner, project: Path) -> None:
    """With a second arm, two seeds, held-out pairs, fresh answers, guard and benchmarks, judged by stand-ins."""
    sets = ["sft.enabled=true", "dpo.seeds=[0,1]", "heldout.items=2", "evaluation.fresh_items=2", "rounds=1"]
    sets += ["benchmarks.run=['harmbench','xstest','mtbench']", "benchmarks.contamination=true", "guard.enabled=true"]
    sets += ["guard.model=stand-in", "benchmarks.judge=stand-in", "items=2", "dpo.max_steps=2", "checks.limit=4"]
    sets += ["evaluation.neutral_passages=2", "evaluation.judge_items=2"]
    options = [part for text in sets for part in ("--set", text)]
    code, run = run_fake("--milestone", "m1", *options, *write_files(project))
    found = figures_under(run / "eval")
    assert code == errors.DONE
    assert {"guard.dropped", "mtbench.delta.turn_1", "preference.p1.sft", "dpo_over_sft.preference.p1"} <= found
    assert [fault for name in sorted(found) if (fault := metrics.fault(name))] == []


@pytest.mark.parametrize(
    "name",
    ["forgetting.mmlu_delta", "forgetting.my-task_2_delta", "harmbench.asr.tuned.sft", "dpo.last_loss.seed_12"],
)
def test_names_with_a_part_of_their_own(name: str) -> None:
    assert metrics.fault(name) == ""


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("critiques.meaningfull", "critiques.meaningful?"),
        ("preference.p1.trian", "preference.p1.train?"),
        ("harmbench.improvment", "harmbench.improvement?"),
        ("dpo_over_sft.preference.p11", "preference.p1?"),
        ("critiques.meaningful\n", "critiques.meaningful?"),
        ("accuracy", "eval/measured.json"),
        ("", "eval/measured.json"),
    ],
)
def test_a_name_that_no_run_measures_is_refused_with_the_nearest(name: str, near: str) -> None:
    assert near in metrics.fault(name)


def test_every_default_gate_names_figures() -> None:
    gates = [gate for milestone in ("m0", "m1", "m2", "m3") for gate in GatesSection().of(milestone)]
    assert gates and not [name for gate in gates for name in (gate.metric, *gate.beats) if metrics.fault(name)]


def test_the_report_says_what_each_figure_is():
    """Every name that a run can measure has a meaning of its own family, and only those of the run are shown."""
    unexplained = [name for name in metrics.NAMES if not any(name.startswith(begin) for begin, _ in metrics.MEANINGS)]
    assert unexplained == []
    shown = dict(metrics.meanings(["critiques.csi", "critiques.csi.shuffled", "fresh.base.empty"]))
    assert list(shown) == ["critiques.csi", "fresh.…", "….shuffled"]
