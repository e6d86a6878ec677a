"""The SFT arm on the fake model: off it leaves no trace, on it leaves DPO's bytes alone; inputs, tables, statistics."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.benchmarks import write_files
from support.runs import read_jsonl

from cai import errors
from cai.commands import status
from cai.commands.verify import verify
from cai.errors import CaiError
from cai.evaluate import arms as second
from cai.evaluate import measure
from cai.evaluate.scores import Evaluation
from cai.metrics.figure import Figure
from cai.models.fake import FakeModel
from cai.recipe.load import read, resolve
from cai.recipe.settings import DpoSection, LoraSection, ModelSection
from cai.recipe.settings_sft import SftSection
from cai.report import publication
from cai.report.snapshot import read_story
from cai.run import budget, rates
from cai.training import arms as sft
from cai.training.token_rows import PairRow, PairRows, revisions_only
from tests.conftest import ROOT

Runner = Callable[..., tuple[int, Path]]
SMALL = ("--milestone", "m1", "--set", "items=3", "--set", "rounds=1", "--set", "heldout.items=4")
QUICK = (*SMALL, "--set", "evaluation.neutral_passages=6", "--set", "evaluation.kl_passages=0")
ON = ("--set", "sft.enabled=true")
KEPT = ("records.jsonl", "eval/scores.jsonl", "eval/measured.json", "dataset/pairs/train.jsonl", "train/result.json",
        "adapter/adapter_model.safetensors", "adapter/adapter_config.json")  # fmt: skip


@pytest.fixture
def run_fake(run_paper):
    return run_paper


def same(name: str, one: Path, two: Path) -> bool:
    """Equal bytes; a training's result but for the seconds it took and the digest that counts them in."""
    a, b = ((run / name).read_bytes() for run in (one, two))
    if not name.endswith("result.json"):
        return a == b
    return {**json.loads(a), "seconds": 0, "seal": ""} == {**json.loads(b), "seconds": 0, "seal": ""}


def kinds(run: Path) -> list[str]:
    return [row["kind"] for row in read_jsonl(run / "events.jsonl") if row["kind"] != "heartbeat"]


def steps_of_arm(run: Path) -> list[int]:
    return [e["step"] for e in read_jsonl(run / "events.jsonl") if e["kind"] == "train_step" and e.get("arm") == "sft"]


@pytest.mark.runs
def test_off_not_a_byte_differs(run_fake: Runner) -> None:
    _, plain = run_fake(*QUICK)
    _, off = run_fake(*QUICK, "--set", "sft.enabled=false", "--set", "sft.learning_rate=0.5", "--set", "sft.epochs=2.0")
    assert [name for name in (*KEPT, "eval/gates.json") if not same(name, plain, off)] == []
    assert kinds(plain) == kinds(off)
    names = [sorted(str(p.relative_to(run)) for p in run.rglob("*")) for run in (plain, off)]
    assert names[0] == names[1] and not [name for name in names[0] if "sft" in name]
    assert "DPO adds" not in (off / "report.md").read_text() + (off / "report.html").read_text()


@pytest.mark.slow
def test_on_the_arm_stands_beside_an_untouched_run(run_fake: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    _, off = run_fake(*QUICK)
    code, run = run_fake(*QUICK, *ON)
    assert code == errors.DONE and off != run
    assert [name for name in KEPT if not same(name, off, run)] == []
    assert (run / "adapter-sft/adapter_model.safetensors").is_file() and (run / "train/sft/result.json").is_file()
    figures = json.loads((run / "eval/sft.json").read_text())["figures"]
    assert {f"{name}.sft" for name in second.KEPT} <= set(figures)
    assert {f"dpo_over_sft.{series.metric}" for series in second.SERIES} <= set(figures)
    assert figures["dpo_over_sft.preference.p1"]["n"] == figures["preference.p1.sft"]["n"] == 4
    assert figures["dpo_over_sft.forgetting.nll_delta"]["facts"]["test"] == "Wilcoxon signed-rank"
    assert steps_of_arm(run) == list(range(1, 11))
    monkeypatch.setattr("cai.session.load", lambda *a, **k: pytest.fail("the model was loaded"))
    before = (run / "eval/sft-scores.jsonl").read_bytes()
    assert run_fake("--resume", run.name, fake=())[0] == errors.DONE
    assert (run / "eval/sft-scores.jsonl").read_bytes() == before
    assert all(check.verdict != "FAIL" for check in verify(run))


@pytest.mark.runs
def test_the_report_says_what_dpo_adds_and_the_table_has_the_column(run_fake: Runner) -> None:
    _, run = run_fake(*QUICK, *ON)
    text, page = (run / "report.md").read_text(), (run / "report.html").read_text()
    assert "## What DPO adds" in text and 'id="added"' in page
    lines = text.split("## What DPO adds")[1].split("##")[0].strip().splitlines()
    assert len(lines) == 4 + len(second.SERIES) and lines[2].count("|") == lines[3].count("|") == lines[4].count("|")
    rows = {row[0]: row for row in publication.main_rows(read_story(run).figures)}
    assert not [name for name in rows if name.endswith(".sft") or name.startswith("dpo_over")]
    assert rows["preference.p1"][2] != publication.NONE and rows["forgetting.nll_delta"][2] != publication.NONE
    assert "What DPO adds to SFT" in (run / "eval/table.md").read_text() + (run / "eval/table.tex").read_text()


@pytest.mark.runs
def test_each_log_is_scored_with_its_own_adapter(run_fake: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, set[str]] = {}
    real = measure.Evaluation.write

    def write(self, metric, part, rows):  # type: ignore[no-untyped-def]
        seen.setdefault(self.log.path.name, set()).add(self.context.model().attached.name)
        real(self, metric, part, rows)

    monkeypatch.setattr(measure.Evaluation, "write", write)
    run_fake(*QUICK, *ON)
    assert seen == {"scores.jsonl": {"adapter"}, "sft-scores.jsonl": {"adapter-sft"}}


def test_a_fresh_lora_of_the_preflight_is_never_measured(tmp_path: Path) -> None:
    """On a GPU the preflight wraps the weights; a resume that only measures must still load the trained adapter."""
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x")
    model = FakeModel(ModelSection(name="fake"))
    model.to_lora(LoraSection())
    context = SimpleNamespace(model=lambda: model, recipe=SimpleNamespace(lora=LoraSection()))
    Evaluation(context, None, tmp_path, None).model()  # type: ignore[arg-type]
    assert model.attached == tmp_path


@pytest.mark.runs
def test_the_arm_never_stands_in_the_place_of_dpo(run_fake: Runner) -> None:
    """Status line, measured rates, curves and estimate are DPO's; `--verify` looks at both adapters."""
    _, run = run_fake(*QUICK, *ON, "--set", "sft.max_steps=3")
    events = read_jsonl(run / "events.jsonl")
    assert len(steps_of_arm(run)) == 3 and status._training(events).startswith("10 steps done")
    rate = rates.from_events(run.name, json.loads((run / "manifest.json").read_text()), events)
    assert rate is not None and rate.pairs_seen == 10
    recipe = resolve(read(ROOT / "cai.toml"), milestone="m1", sets=["sft.enabled=true"])
    plain = resolve(read(ROOT / "cai.toml"), milestone="m1")
    assert budget.training_pairs_seen(recipe) == 1.5 * budget.training_pairs_seen(plain)
    (run / "train/result.json").unlink()
    assert len(log := read_story(run).log) == 10 and not [entry for entry in log if "arm" in entry]
    path = run / "adapter-sft/adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\x00\x00\xc0\x7f")
    faults = [c.found for c in verify(run) if c.verdict == "FAIL"]
    changed, broken = [found for found in faults if found.startswith("adapter-sft: ")]
    assert changed.startswith("adapter-sft: adapter_model.safetensors changed after it was saved")
    assert broken == "adapter-sft: 1 tensors hold NaN or infinity, first base_model.model.fake.lora_B.weight"


@pytest.mark.runs
def test_a_finished_run_takes_the_arm_later(run_fake: Runner) -> None:
    _, run = run_fake(*QUICK)
    before = {name: (run / name).read_bytes() for name in KEPT}
    code, again = run_fake("--resume", run.name, *ON, fake=())
    assert (code, again) == (errors.DONE, run) and steps_of_arm(run)
    assert {name: (run / name).read_bytes() for name in KEPT} == before


@pytest.mark.slow
def test_a_stop_in_the_arm_resumes_to_the_same_adapter(run_fake: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    from cai.training import fake_training

    _, alone = run_fake(*QUICK, *ON)
    real, calls = fake_training.run, []

    def stops(folder, *args, **kwargs):  # type: ignore[no-untyped-def]
        if folder.name == "sft" and not calls:
            count = iter(range(100))
            kwargs["stopped"] = lambda: next(count) == 4
            calls.append(1)
        return real(folder, *args, **kwargs)

    monkeypatch.setattr(fake_training, "run", stops)
    code, run = run_fake(*QUICK, *ON)
    assert code == errors.RESUMABLE and not (run / "adapter-sft").exists() and (run / "adapter").exists()
    assert run_fake("--resume", run.name, fake=())[0] == errors.DONE
    assert steps_of_arm(run) == list(range(1, 11))
    assert all(same(n, alone, run) for n in ("adapter-sft/adapter_model.safetensors", *KEPT))


@pytest.mark.runs
def test_other_inputs_are_drift(run_fake: Runner, capfd: pytest.CaptureFixture[str]) -> None:
    _, run = run_fake(*QUICK, *ON)
    code, _ = run_fake("--resume", run.name, "--set", "sft.learning_rate=0.001", fake=())
    assert code == errors.DRIFT
    assert "sft.learning_rate: 0.0001 then, 0.001 now" in capfd.readouterr().err
    (run / "train/sft/inputs.json").write_text("{")
    code, _ = run_fake("--resume", run.name, fake=())
    assert code == errors.CORRUPT and "Remove" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("sets", "told"),
    [
        (["sft.enabled=1"], "sft.enabled: input should be a valid boolean (found 1)"),
        (["sft.learning_rate=0.0"], "sft.learning_rate: input should be greater than 0 (found 0.0)"),
        (["sft.epochs=-1.0"], "sft.epochs: input should be greater than or equal to 0 (found -1.0)"),
        (["sft.max_steps=3", "sft={max_steps=3, epochs=1.0}"], "set at most one of sft.max_steps and sft.epochs"),
        (["sft.learning_rat=0.1"], "sft.learning_rat: unknown key. Did you mean sft.learning_rate?"),
    ],
)
def test_a_bad_value_is_one_clear_line(sets: list[str], told: str) -> None:
    with pytest.raises(CaiError) as caught:
        resolve(read(ROOT / "cai.toml"), milestone="m1", sets=sets)
    assert told in str(caught.value) and len(str(caught.value).splitlines()) == 1 and caught.value.code == errors.USAGE


def test_the_arm_has_its_own_length_or_that_of_dpo() -> None:
    dpo = DpoSection(max_steps=7, loss_type=("sigmoid", "sft"), loss_weights=(1.0, 0.5))
    like, own = SftSection().recipe(dpo), SftSection(epochs=2.0, learning_rate=0.01).recipe(dpo)
    assert (like.max_steps, like.epochs, like.loss_type, like.loss_weights) == (7, 0.0, ("sft",), ())
    assert (own.max_steps, own.epochs, own.learning_rate, own.seeds) == (0, 2.0, 0.01, dpo.seeds)
    weighted = DpoSection(max_steps=7, loss_type=("sigmoid", "sft"), end_weight=2.0)
    assert [SftSection(end_weight=w).recipe(weighted).end_weight for w in (1.0, 5.0)] == [1.0, 5.0]


def test_revisions_only_drops_the_rejected_and_what_only_they_cut() -> None:
    cut = PairRow(1, (1,), (3, 3), (4,), truncated=True, chosen_cut=True)
    rows = [PairRow(0, (1, 2), (3, 9), (4, 5, 6), truncated=True), cut]
    found = revisions_only(PairRows(rows, [9]))
    assert [(r.rejected_ids, r.truncated, r.tokens) for r in found.rows] == [((), False, 4), ((), True, 3)]
    assert found.too_long == [9] and rows[0].tokens == 2 * 2 + 2 + 3


def test_paired_by_hand() -> None:
    """Ten held-out pairs, DPO right on all, SFT on four: six discordant one way, exact p = 2 / 2^6."""
    p1 = second.SERIES[0]
    found = second.paired(p1, [1.0] * 4 + [0.0] * 6, [1.0] * 10, lost=1)
    assert (found.metric, found.n, found.unscored, found.value) == ("dpo_over_sft.preference.p1", 10, 1, 0.6)
    assert found.facts == {"sft": 0.4, "dpo": 1.0, "p": 2 / 2**6, "test": "exact McNemar"}
    assert found.low is not None and 0 < found.low < 0.6 < (found.high or 0)
    assert second.paired(p1, [], []).value is None


def test_rows_are_paired_by_item_and_only_held_out_ones_count() -> None:
    def row(item: int, margin: float, split: str = "heldout") -> dict[str, object]:
        pair = {"metric": "preference.pairs", "item": item, "split": split, "chosen": margin, "rejected": 0.0}
        return pair | {"ref_chosen": 0.0, "ref_rejected": 0.0, "chosen_tokens": 1, "rejected_tokens": 1}

    sft_rows = [row(1, -1.0), row(2, 1.0), row(3, 1.0), row(4, 1.0, "train")]
    dpo_rows = [row(3, -1.0), row(2, 1.0), row(1, 1.0), row(5, 1.0), {**row(6, 1.0), "skipped": "too long"}]
    found = second.added(sft_rows, dpo_rows)["dpo_over_sft.preference.p1"]
    assert (found.n, found.unscored, found.value) == (3, 1, 0.0)
    assert (found.facts["sft"], found.facts["dpo"]) == (2 / 3, 2 / 3)


def test_holm_runs_over_all_that_dpo_adds_and_a_drop_is_turned() -> None:
    def figure(name: str, p: float, **facts: float) -> dict[str, object]:
        arms = {"sft": 0.5, "dpo": 0.3, "p": p} | facts
        return Figure(name, 0.2, 0.1, 0.4, 60, facts=arms).as_dict()

    names = ("dpo_over_sft.harmbench.asr_drop", "dpo_over_sft.preference.p1")
    figures = {names[0]: figure(names[0], 0.01), names[1]: figure(names[1], 0.04, sft=0.3, dpo=0.5)}
    rows = [dict(zip(publication.ADDED_HEAD, row, strict=True)) for row in publication.added_rows(figures)]
    assert [row["metric"] for row in rows] == ["HarmBench attack success", "preference.p1"]
    assert [row["p (Holm)"] for row in rows] == ["0.02", "0.04"]
    assert rows[0]["95% interval"].replace("−", "-") == "-0.4 to -0.1" and rows[1]["95% interval"] == "0.1 to 0.4"


@pytest.mark.slow
def test_benchmarks_measure_the_arm_too(run_fake: Runner, project: Path) -> None:
    files = write_files(project)
    _, run = run_fake(*QUICK, *ON)
    asked = ("--benchmark", "harmbench,xstest,mtbench", "--resume", "runs/latest", *files)
    more = ("--set", "benchmarks.judge=stand-in", "--set", "benchmarks.max_new_tokens=40")
    assert run_fake(*asked, *more, fake=())[0] == errors.DONE
    figures = json.loads((run / "eval/benchmarks.json").read_text())["figures"]
    for name in ("harmbench.asr.sft", "harmbench.asr_drop.sft", "mtbench.score.sft", "harmbench.empty.sft"):
        assert name in figures
    assert "harmbench.asr.base.sft" not in figures and "harmbench.asr.base" in figures
    gain = figures["dpo_over_sft.mtbench.delta"]
    assert {"sft", "dpo", "p"} <= set(gain["facts"]) and "base" not in gain["facts"]
    rows = [
        row["arm"]
        for row in read_jsonl(run / "eval/benchmarks/harmbench.sft.jsonl")
        if "fingerprint" not in row.values()
    ]
    assert set(rows) == {"tuned"}
    main = {row[0]: row for row in publication.main_rows(read_story(run).figures)}
    assert (
        main["HarmBench attack success"][2] != publication.NONE
        and main["MT-Bench rating, all questions"][2] != publication.NONE
    )
    before = (run / "eval/benchmarks.json").read_bytes()
    assert run_fake(*asked, *more, fake=())[0] == errors.DONE
    assert (run / "eval/benchmarks.json").read_bytes() == before
    assert run_fake(*asked, *more, "--set", "sft.enabled=false", fake=())[0] == errors.DONE
    left = json.loads((run / "eval/benchmarks.json").read_text())["figures"]
    assert not [name for name in left if "sft" in name] and "harmbench.asr.tuned" in left


def test_inputs_are_written_before_training(tmp_path: Path) -> None:
    folder = tmp_path / "train" / "sft"
    sft.settle_inputs(folder, tmp_path / "adapter-sft", {"a": "1"})
    kept = json.loads((folder / "inputs.json").read_text())
    assert kept["inputs"] == {"a": "1"} and len(kept["sha256"]) == 64
    sft.settle_inputs(folder, tmp_path / "adapter-sft", {"a": "1"})
    with pytest.raises(CaiError, match="a: 1 then, 2 now") as caught:
        sft.settle_inputs(folder, tmp_path / "adapter-sft", {"a": "2"})
    assert caught.value.code == errors.DRIFT
