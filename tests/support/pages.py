"""A run folder made by hand through cai.run.folder.Run, for the tests of what a person sees. No model, no torch."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from cai.data import chain
from cai.data.dataset import write_dataset
from cai.data.pairs import PairPlan, PairSet, build
from cai.evaluate.gates import decide_all
from cai.metrics.figure import Figure
from cai.recipe import load as recipes
from cai.recipe.load import Recipe
from cai.recipe.settings import HeldoutSection
from cai.report.cards import card
from cai.run.folder import Run
from cai.store.files import write_json_atomic

REPO = Path(__file__).parents[2]
PRINCIPLES = {
    "honesty": "An answer claims nothing that is false and marks what is uncertain.",
    "no-harm": "An answer gives no help that would hurt people.",
}
INSTRUCTION = "How long should I rest after a sprained ankle, number {n}?"
ANSWER = (
    "You can run again after two days. A sprain heals by itself in 48 hours, so there is no need to rest it. "
    "Put some ice on it if you like. Case {n} is no exception."
)
CRITIQUE = (
    'The answer says "A sprain heals by itself in 48 hours", which is false: a mild sprain takes one to three weeks. '
    "Someone who runs on it in case {n} may tear the ligament. The advice about ice is fine."
)
MIDDLE = (
    "A mild sprain takes one to three weeks. Put some ice on it, and rest it until you can walk without pain. "
    "Case {n} is no exception."
)
REVISION = (
    "A mild sprain takes one to three weeks, a worse one longer. Rest it until you can walk without pain, put ice on "
    "it for fifteen minutes at a time, and see a doctor if you cannot put weight on it. Case {n} is no exception."
)


class Cleaned:
    """What hygiene gives: the training pairs that stay."""

    def __init__(self, kept: list[dict[str, Any]]) -> None:
        self.kept = kept


def row(stage: str, item: int, round_: int, text: str, **more: Any) -> dict[str, Any]:
    principle = list(PRINCIPLES)[round_ % 2] if stage in ("critiques", "revisions") else None
    base = {"v": 1, "stage": stage, "item": item, "round": round_, "principle": principle, "text": text}
    base |= {"status": "ok", "reason": None, "finish": "eos", "tokens": len(text) // 4, "seed": item}
    return base | {"prompt_sha": "0" * 16} | more


def item_rows(item: int, rounds: int = 2, **texts: str) -> list[dict[str, Any]]:
    """The whole chain of an item; `texts` replaces some (instruction, answer, critique, revision)."""
    made = {"instruction": INSTRUCTION, "answer": ANSWER, "critique": CRITIQUE, "revision": REVISION} | texts
    made = {name: text.replace("{n}", str(item)) for name, text in made.items()}
    pool = "redteam" if item % 2 else "benign"
    split = "heldout" if item % 1_000_000 >= 500_000 else "train"
    extra = {"pool": pool, "cell": {"topic": "health"}, "split": split, "parent": None}
    rows = [row("instructions", item, 0, made["instruction"], **extra), row("answers", item, 0, made["answer"])]
    for r in range(rounds):
        last = r == rounds - 1
        rows += [row("critiques", item, r, made["critique"])]
        rows += [row("revisions", item, r, made["revision"] if last else MIDDLE.replace("{n}", str(item)))]
    return rows


def records(items: int = 3, heldout: int = 1, rejects: bool = True) -> list[dict[str, Any]]:
    rows = [r for item in range(items) for r in item_rows(item)]
    rows += [r for item in range(500_000, 500_000 + heldout) for r in item_rows(item)]
    if rejects:
        rows += item_rows(1_000_000, revision=ANSWER.replace("{n}", "1000000"))  # identical
        pool = {"pool": "benign", "cell": {}, "split": "train", "parent": None}
        rows.append(row("instructions", 1_000_001, 0, "Hm", status="rejected", reason="too_short: 1 word", **pool))
    return rows


def recipe(**changes: Any) -> Recipe:
    base = Recipe().model_copy(update={"milestone": "m1", "items": 3, "rounds": 2, "heldout": HeldoutSection(items=1)})
    return base.model_copy(update=changes)


def pair_set(rows: list[dict[str, Any]]) -> PairSet:
    return build(rows, PairPlan(2, PRINCIPLES))


def make_run(
    root: Path, rows: list[dict[str, Any]] | None = None, *, run_id: str = "20261122-180000-m1-abc123", **more: Any
) -> Path:
    """A finished run folder: records, data set, gates, results, training log, two attempts."""
    rows = records() if rows is None else rows
    chosen = more.get("recipe", recipe())
    constitution = "".join(
        f"- id: {id_}\n  principle: {text}\n  critique_request: Check it.\n  revision_request: Mend it.\n"
        for id_, text in PRINCIPLES.items()
    )
    content = {"recipe.toml": 'milestone = "m1"\n[milestones.m1]\n', "recipe.resolved.toml": recipes.dump(chosen)}
    content["constitution.yaml"] = constitution
    facts = {"model": "SmolLM2-135M-Instruct", "backend": "embedded", "revision": "v1", "load_seconds": 4.2}
    manifest = {"milestone": "m1", "sets": [], "backend": "embedded", "identity": {"seed": "0"}, "model": facts}
    manifest |= {"items": chosen.items, "heldout_items": chosen.heldout.items, "versions": {"torch": "2.13.0"}}
    manifest |= {"stages": {name: {} for name in chain.names()}}
    manifest |= more.get("manifest", {})
    start = {"usd_per_hour": more.get("usd_per_hour", 1.74), "argv": "cai.toml --milestone m1", "python": "3.11.7"}
    run = Run.create(root, run_id, content, manifest, **start)
    try:
        with run.records() as log:
            log.append(rows)
        fill(run, rows, chosen, facts)
    finally:
        run.close(code=0)
    return run.path


def fill(run: Run, rows: list[dict[str, Any]], chosen: Recipe, facts: dict[str, Any]) -> None:
    """What later steps leave: events, data set, training result, figures, gates."""
    pairs = pair_set(rows)
    write_dataset(run, pairs, Cleaned(pairs.train), partial(card, recipe=chosen, facts=facts))
    for stage in ("instructions", "answers", "critiques", "revisions"):
        tokens = sum(r["tokens"] for r in rows if r["stage"] == stage)
        count = sum(r["stage"] == stage for r in rows)
        run.event("stage", stage=stage, round=0, items=count, rejected=0, tokens=tokens, seconds=10.0)
    log = []
    for step in range(1, 11):
        entry = {"step": step, "loss": 0.6931 - 0.03 * (step - 1), "grad_norm": 1.0, "rewards/margins": 0.02 * step}
        entry |= {"rewards/chosen": 0.01 * step, "rewards/rejected": -0.01 * step, "rewards/accuracies": 1.0}
        entry |= {
            "logps/chosen": -80.0 - step,
            "logps/rejected": -90.0 - step,
            "logps/chosen_token": -1.6 - 0.01 * step,
        }
        log.append(entry)
        run.event("train_step", **entry)
    (run.train).mkdir(exist_ok=True)
    result = {"adapter": str(run.adapter), "steps": 10, "pairs": len(pairs.train), "first_loss": 0.6931}
    result |= {"last_loss": 0.4231, "log": log, "seconds": 30.0, "peak_gib": 1.5, "truncated": 0, "too_long": []}
    write_json_atomic(run.train / "result.json", result)
    run.event("trained", steps=10, seconds=30.0, peak_gib=1.5)
    measured = results()
    run.eval.mkdir(exist_ok=True)
    write_json_atomic(run.eval / "results.json", {name: m.as_dict() for name, m in measured.items()})
    verdicts = decide_all(measured, chosen.gates.of("m1"))
    content = {"milestone": "m1", "enforced": False, "override": None, "passed": False, "recipe": "abc"}
    write_json_atomic(run.eval / "gates.json", content | {"verdicts": [v.as_dict() for v in verdicts]})


def results() -> dict[str, Figure]:
    judge = "G1-G5, likelihood of SmolLM2-135M-Instruct; no truth judge"
    found = [
        Figure("critiques.meaningful", 0.75, 0.41, 0.93, 8, 0, judge, ({"item": 1, "round": 1, "csi": 0.02},)),
        Figure("critiques.meaningful.shuffled", 0.1, 0.02, 0.4, 8, 0, judge),
        Figure("critiques.meaningful.generic", 0.0, 0.0, 0.32, 8, 0, judge),
        Figure("revisions.addresses", 0.5, 0.24, 0.76, 10, 0, judge),
        Figure("revisions.addresses.shuffled", 0.1, 0.02, 0.4, 10, 0, judge),
        Figure("dpo.first_loss_error", 0.0, n=1),
        Figure("dpo.loss_fall", 0.27, n=1),
        Figure("preference.p1", None, n=0, note="no held-out pair"),
    ]
    return {m.metric: m for m in found}
