"""Where DPO goes on from an SFT stage, its implicit reward is against that stage, not against the base."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.runs import read_jsonl

from cai.evaluate import dpo_health, measure, preference, started
from cai.recipe.settings import HealthSection


def row(item: int, chosen: float, rejected: float, tokens: tuple[int, int], split: str = "heldout") -> dict:
    """Log-probs of the tuned model; the base's are -1 a token."""
    return {
        "metric": "preference.pairs", "item": item, "round": 0, "split": split, "chosen": chosen, "rejected": rejected,
        "ref_chosen": -1.0 * tokens[0], "ref_rejected": -1.0 * tokens[1], "chosen_tokens": tokens[0],
        "rejected_tokens": tokens[1], "chosen_words": tokens[0], "rejected_words": tokens[1],
        "chosen_refuses": False, "rejected_refuses": False,
    }  # fmt: skip


def test_a_stage_that_unlearns_all_texts_no_longer_makes_the_longer_one_lose() -> None:
    """SFT costs 0.6 nats a token; DPO then moves 2 nats to each chosen text, of 150 tokens against 100."""
    rows = [row(i, -1.6 * 150 + 1.0, -1.6 * 100 - 1.0, (150, 100)) for i in range(10)]
    start = {i: {"item": i, "chosen": -1.6 * 150, "rejected": -1.6 * 100} for i in range(10)}
    base = preference.summarise(rows)
    own = started.named(preference.summarise(started.against(rows, start)), base)
    assert base["preference.p1"].value == 0.0
    assert own["preference.p1"].value == 1.0 and own["preference.p1"].judge == started.JUDGE
    assert own[started.OVER_BASE].value == 0.0 and own[started.OVER_BASE].judge == preference.POLICY
    assert own["preference.p2.before"].value == base["preference.p2.before"].value  # still the base's
    assert own["preference.p2.after"].value == base["preference.p2.after"].value
    loss = dpo_health.from_pairs(started.against(rows, start), 0.1, "heldout", started.JUDGE)["dpo.margin.heldout"]
    assert loss.value == pytest.approx(0.2) and loss.judge == started.JUDGE


def test_warnings_of_a_real_run_do_not_ask_for_both() -> None:
    """Of 55 pairs and 100 steps: it said that the adapter barely moved, and that it moved too far."""
    from cai.metrics.figure import Figure

    values = {"dpo.margin": 11.8, "dpo.margin.heldout": -1.724, "forgetting.kl": 0.356, "dpo.loss_fall": 0.686,
              "fresh.tuned.same_as_base": 0.0, "dpo.chosen_fall.heldout": 0.576}  # fmt: skip
    figures = {name: Figure(name, value, n=44) for name, value in values.items()}
    lines = dpo_health.warnings(figures, HealthSection())
    assert len(lines) == 2 and "learnt by heart" in lines[0] and "moved too far" in lines[1]


@pytest.mark.runs
def test_the_stage_scores_the_pairs_once_and_a_cut_log_goes_on(run_paper, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Rows `preference.start` are drawn with the stage's adapter; a run from the base has none."""
    seen: set[str] = set()
    real = measure.Evaluation.write

    def write(self, metric, part, rows):  # type: ignore[no-untyped-def]
        if metric == started.METRIC:
            seen.add(self.context.model().attached.name)
        real(self, metric, part, rows)

    monkeypatch.setattr(measure.Evaluation, "write", write)
    small = ("--milestone", "m2", *(t for s in ("items=3", "rounds=1", "heldout.items=3", "dpo.max_steps=2",
             "evaluation.fresh_items=1", "evaluation.neutral_passages=2", "evaluation.prompted=[]",
             "evaluation.critic_items=0") for t in ("--set", s)))  # fmt: skip
    _, run = run_paper(*small, "--set", "dpo.start=sft")
    rows = [r for r in read_jsonl(run / "eval/scores.jsonl") if r.get("metric") == started.METRIC]
    pairs = [r for r in read_jsonl(run / "eval/scores.jsonl") if r.get("metric") == "preference.pairs"]
    assert seen == {"adapter-sft"} and {r["item"] for r in rows} == {r["item"] for r in pairs}
    figures = json.loads((run / "eval/measured.json").read_text())["figures"]
    assert figures["preference.p1"]["judge"] == started.JUDGE == figures["dpo.margin.heldout"]["judge"]
    assert Path(run / "eval/sft.json").is_file()
    _, plain = run_paper(*small)
    assert started.METRIC not in (plain / "eval/scores.jsonl").read_text()
    assert started.OVER_BASE not in (plain / "eval/measured.json").read_text()


@pytest.mark.runs
def test_the_sft_arm_is_not_scored_again_and_its_rows_are_what_that_would_give(run_paper, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    asked: list[tuple[str, bool]] = []
    real = preference.pair_rows

    def counted(model, pairs, *args, reference=True, **kwargs):  # type: ignore[no-untyped-def]
        asked.append((model.attached.name, reference))
        return real(model, pairs, *args, reference=reference, **kwargs)

    monkeypatch.setattr(preference, "pair_rows", counted)
    small = ("--milestone", "m2", *(t for s in ("items=3", "rounds=1", "heldout.items=3", "dpo.max_steps=2",
             "evaluation.fresh_items=1", "evaluation.neutral_passages=2", "evaluation.prompted=[]",
             "evaluation.critic_items=0", "dpo.start=sft") for t in ("--set", s)))  # fmt: skip
    _, run = run_paper(*small)
    assert asked == [("adapter-sft", False), ("adapter", True)]  # neither the stage nor the base twice
    monkeypatch.setattr(started, "known", lambda context: {})
    _, other = run_paper(*small)
    assert asked[2:] == [("adapter-sft", False), ("adapter", True), ("adapter-sft", True)]
    scores = [(path / "eval/sft-scores.jsonl").read_bytes() for path in (run, other)]
    assert scores[0] == scores[1] and scores[0].count(b'"preference.pairs"') == 6


def test_a_pair_that_either_could_not_score_is_scored(tmp_path: Path) -> None:
    context = SimpleNamespace(
        recipe=SimpleNamespace(dpo=SimpleNamespace(start="sft")), run=SimpleNamespace(eval=tmp_path)
    )
    rows = [
        row(1, -9.0, -8.0, (9, 8)),
        row(2, -9.0, -8.0, (9, 8)),
        {"metric": started.METRIC, "item": 1, "round": 0, "chosen": -5.0, "rejected": -6.0},
        {"metric": started.METRIC, "item": 2, "round": 0, "skipped": "too long"},
    ]
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    assert started.known(context) == {1: row(1, -5.0, -6.0, (9, 8))}
    context.recipe.dpo.start = "base"
    assert started.known(context) == {}
