"""Arms beside base and tuned on the fake model: SFT, DPO from the base, the base prompted well."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.benchmarks import write_files
from support.pages import recipe
from support.runs import ROOT, read_jsonl

from cai import errors
from cai.errors import CaiError
from cai.evaluate import measure
from cai.evaluate.benchmarks import answers, plans
from cai.metrics import names
from cai.recipe import identity
from cai.recipe.arm_costs import costs
from cai.recipe.load import read, resolve
from cai.run import arm_rates
from cai.run.rates import Speed

Runner = Callable[..., tuple[int, Path]]
PROMPTED = ("few_shot", "constitution", "best_of_n")


def sets(*texts: str) -> tuple[str, ...]:
    return tuple(part for text in texts for part in ("--set", text))


SMALL = (
    *("--milestone", "m2"),
    *sets("items=3", "rounds=1", "heldout.items=3", "evaluation.fresh_items=3", "dpo.max_steps=2"),
    *sets("evaluation.neutral_passages=2", "evaluation.prompted=[]", "evaluation.critic_items=0"),
)


def figures_of(run: Path, name: str) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = json.loads((run / "eval" / f"{name}.json").read_text())["figures"]
    return found


@pytest.mark.runs
def test_sft_and_dpo_from_the_base_stand_beside_both(run_paper: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each answers the fresh prompts with its own adapter, is judged, and DPO alone is the adapter of a plain run."""
    code, plain = run_paper(*SMALL)
    weights = (plain / "adapter/adapter_model.safetensors").read_bytes()
    seen: dict[str, set[str]] = {}
    real = measure.Evaluation.write

    def write(self, metric, part, rows):  # type: ignore[no-untyped-def]
        seen.setdefault(self.log.path.name, set()).add(self.context.model().attached.name)
        real(self, metric, part, rows)

    monkeypatch.setattr(measure.Evaluation, "write", write)
    code, run = run_paper(*SMALL, *sets("dpo.start=sft", "dpo.also_from_base=true"))
    assert code == errors.DONE
    assert (run / "adapter-from-base/adapter_model.safetensors").read_bytes() == weights
    assert (run / "adapter/adapter_model.safetensors").read_bytes() != weights
    assert seen["sft-answers.jsonl"] == {"adapter-sft"} and seen["from_base-answers.jsonl"] == {"adapter-from-base"}
    given = {r["item"]: r for r in read_jsonl(run / "eval/scores.jsonl") if r.get("metric") == "preference.fresh"}
    for arm in ("sft", "from_base"):
        mine = {
            r["item"]: r for r in read_jsonl(run / f"eval/{arm}-answers.jsonl") if r["metric"] == "preference.fresh"
        }
        assert mine.keys() == given.keys() and len(mine) == 3
        assert all(mine[item]["base"] == given[item]["base"] for item in given)
        figures = figures_of(run, arm)
        known = {f"fresh.{arm}.{name}" for name in ("stops", "refused", "words", "goes_along")} | {
            f"preference.over.{arm}"
        }
        assert known | {f"preference.p3.{arm}", f"preference.p1.{arm}", f"dpo_over_{arm}.preference.p1"} <= set(figures)
        assert [name for name in figures if names.fault(name)] == []
    assert {"fresh.tuned.loops", "preference.p1.over_base"} <= set(figures_of(run, "measured"))
    gates = json.loads((run / "eval/gates.json").read_text())["verdicts"]
    assert [v["criterion"]["at_least"] for v in gates if v["metric"] == "fresh.tuned.stops"] == [0.9]
    table = (run / "eval/table.md").read_text()
    assert "| base | SFT | DPO | SFT+DPO | n |" in table and "SFT+DPO" in (run / "eval/table.tex").read_text()
    assert (
        "## The arms beside each other" in (run / "report.md").read_text()
        and 'id="arms"' in (run / "report.html").read_text()
    )
    assert "SFT+DPO" not in (plain / "eval/table.md").read_text()
    monkeypatch.setattr("cai.session.load", lambda *a, **k: pytest.fail("the model was loaded"))
    kept = {name: (run / f"eval/{name}-answers.jsonl").read_bytes() for name in ("sft", "from_base")}
    assert run_paper("--resume", run.name, fake=())[0] == errors.DONE
    assert kept == {name: (run / f"eval/{name}-answers.jsonl").read_bytes() for name in kept}


def test_the_gate_on_answers_that_end_is_asked_where_dpo_starts_from_sft_only() -> None:
    for start, wanted in (("base", 0), ("sft", 1)):
        chosen = resolve(read(ROOT / "cai.toml"), milestone="m2", sets=[f"dpo.start={start}"])
        found = [gate for gate in chosen.gates.of_recipe(chosen) if gate.metric == "fresh.tuned.stops"]
        assert len(found) == wanted and all(gate.at_least == 0.9 for gate in found)


@pytest.mark.runs
def test_the_base_prompted_well_answers_a_benchmark_that_is_there(
    run_paper: Runner, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of their own: an arm that is asked for later leaves what stands; the adapter is off; one of n is kept."""
    base = (*SMALL, *sets("evaluation.enabled=false", "checks.enabled=false", "benchmarks.run=['mtbench','xstest']"))
    base += sets("benchmarks.mtbench_judge=stand-in", "benchmarks.max_new_tokens=24", "evaluation.best_of=3")
    base += sets("benchmarks.mtbench_max_new_tokens=24")
    code, run = run_paper(*base, *write_files(project))
    assert code == errors.DONE
    folder = run / "eval" / "benchmarks"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    later = sets(f"benchmarks.prompted={list(PROMPTED)}")
    assert run_paper("--resume", run.name, *later, fake=())[0] == errors.DONE
    assert {name: (folder / name).read_bytes() for name in before} == before
    stems = {path.name.partition(".")[2] for path in folder.iterdir() if path.name.startswith("xstest")}
    assert {"few_shot.jsonl", "constitution.jsonl", "best_of_n_3.jsonl", "best_of_n_3.verdicts.jsonl"} <= stems
    best = [row for row in read_jsonl(folder / "mtbench.best_of_n_3.jsonl") if row["arm"] == "tuned"]
    assert len(best) == 6 and {row["draws"] for row in best} == {3} and {row["draw"] for row in best} <= {0, 1, 2}
    figures = figures_of(run, "benchmarks")
    for arm in PROMPTED:
        assert {f"xstest.over_refusal.{arm}", f"mtbench.score.{arm}", f"xstest.stops.{arm}"} <= set(figures)
        assert figures[f"dpo_over_{arm}.mtbench.delta"]["n"] == 3
    assert {"xstest.stops.base", "xstest.stops.tuned"} <= set(figures)
    assert [name for name in figures if names.fault(name)] == []
    monkeypatch.setattr("cai.session.load", lambda *a, **k: pytest.fail("the model was loaded"))
    assert run_paper("--resume", run.name, fake=())[0] == errors.DONE
    assert figures_of(run, "benchmarks") == figures


def test_best_of_n_without_its_judge_is_one_line(tmp_path: Path) -> None:
    chosen = resolve(
        read(ROOT / "cai.toml"), milestone="m2", sets=["benchmarks.prompted=['best_of_n']", "evaluation.judge=off"]
    )
    run = SimpleNamespace(adapter=tmp_path, sft_adapter=tmp_path, path=tmp_path)
    with pytest.raises(CaiError, match=r'benchmarks.prompted: "best_of_n" is chosen by the judge'):
        plans.policies(SimpleNamespace(recipe=chosen, run=run))  # type: ignore[arg-type]


def test_a_prompted_arm_is_the_base_under_its_own_prompt(tmp_path: Path) -> None:
    chosen = resolve(read(ROOT / "cai.toml"), milestone="m2", sets=["benchmarks.prompted=['constitution']"])
    run = SimpleNamespace(adapter=tmp_path, sft_adapter=tmp_path, path=tmp_path)
    switched: list[bool] = []

    class Model:
        def attach(self, *args: object) -> None: ...

        def mode(self, name: str) -> None: ...

        def adapter(self, on: bool):  # type: ignore[no-untyped-def]
            from contextlib import nullcontext

            switched.append(on)
            return nullcontext()

    policy = SimpleNamespace(preamble="", sha="0")
    context = SimpleNamespace(recipe=chosen, run=run, model=Model, prompts={"policy": policy})
    own, prompted = plans.policies(context)  # type: ignore[arg-type]
    for who in (own, prompted):
        for arm in answers.ARMS:
            with who.arm(arm):
                pass
    assert switched == [False, True, False, False]
    assert own.asked(10) is policy and prompted.prompt is not None


def test_the_first_answer_of_a_benchmark_has_the_seed_that_it_had() -> None:
    """Draw 0 is the draw of before: answers of base and tuned keep their bytes."""
    from cai.data.slots import seed_of

    assert seed_of(7, "xstest", 3, 0, 0) == seed_of(7, "xstest", 3, 0) != seed_of(7, "xstest", 3, 0, 1)


def test_dpo_from_the_base_goes_with_a_start_from_sft_and_is_no_part_of_the_identity() -> None:
    with pytest.raises(CaiError, match=r"dpo.also_from_base: DPO starts from the base already. It goes with dpo.start"):
        resolve(read(ROOT / "cai.toml"), milestone="m2", sets=["dpo.also_from_base=true"])
    with_it, without = (
        resolve(read(ROOT / "cai.toml"), milestone="m2", sets=["dpo.start=sft", f"dpo.also_from_base={value}"])
        for value in ("true", "false")
    )
    for training in (False, True):
        assert identity.identity(with_it, {}, training=training) == identity.identity(without, {}, training=training)
    assert with_it.dpo.deciding() == without.dpo.deciding()


def test_what_an_arm_costs_is_counted_from_the_recipe() -> None:
    asked = ["dpo.start=sft", "dpo.also_from_base=true", "evaluation.prompted=['few_shot','best_of_n']"]
    asked += [
        "evaluation.fresh_items=50",
        "evaluation.fresh_max_new_tokens=100",
        "heldout.items=40",
        "evaluation.best_of=5",
    ]
    asked += ["benchmarks.run=['xstest','mtbench']", "benchmarks.prompted=['constitution']", "benchmarks.limit=20"]
    chosen = resolve(read(ROOT / "cai.toml"), milestone="m1", sets=asked)
    found = {(cost.title, cost.where): (cost.answers, cost.tokens) for cost in costs(chosen)}
    assert found == {
        ("base with pairs shown", "fresh answers"): (40, 4000),
        ("base, best of 5", "fresh answers"): (200, 20000),
        ("SFT", "fresh answers"): (40, 4000),
        ("DPO from the base", "fresh answers"): (40, 4000),
        ("DPO from the base", "xstest"): (20, 20 * 512),
        ("base with the principles", "xstest"): (20, 20 * 512),
        ("DPO from the base", "mtbench"): (40, 40 * 1024),
        ("base with the principles", "mtbench"): (40, 40 * 1024),
    }
    assert costs(recipe()) == []  # base and tuned alone


def test_what_an_earlier_run_measured_is_not_counted_twice() -> None:
    chosen = resolve(read(ROOT / "cai.toml"), milestone="m2", sets=["evaluation.prompted=['few_shot','constitution']"])
    earlier = Speed("x", "cuda", 1, 1, 100, 10.0, 0.0, 0.0, 20.0, labels=frozenset({"evaluate prompted.few_shot"}))
    (only,) = arm_rates.left(chosen, "cuda", earlier)
    assert only.cost.title == "base with the principles"
    assert only.seconds is not None and only.seconds.high == only.cost.tokens / 10.0
    assert len(arm_rates.left(chosen, "cuda", None)) == 2
