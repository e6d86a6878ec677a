"""The pairs under the adapter that DPO went on from: its reference, where `dpo.start = "sft"`.

Owns the rows `preference.start` of eval/scores.jsonl and how they stand in for the base's log-probabilities. The
implicit reward is beta * log(policy / reference) (Rafailov et al. 2023). Taken against the base it would hold what SFT
did, too: where every held-out text became 0.6 nats a token less likely, longer ones lost more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

from cai.evaluate import preference
from cai.evaluate.scores import KEY, Evaluation, Key
from cai.metrics.figure import Figure, Figures, by_metric, count, is_finite
from cai.run.context import Context
from cai.store import records
from cai.store.jsonl import Row, read_object
from cai.store.row_types import Pair, PairScore

METRIC = "preference.start"
JUDGE = "policy against its SFT stage"
OVER_BASE = "preference.p1.over_base"
WORDS = "fresh.sft.words"


def scored(evaluation: Evaluation, by_item: Mapping[int, Pair], chunk: int) -> dict[int, Row]:
    """Item -> log-prob sums under the SFT stage's adapter; nothing where DPO began from the base."""
    context = evaluation.context
    if context.recipe.dpo.start != "sft":
        return {}
    stage = replace(evaluation, adapter=context.run.sft_adapter)
    keys: list[Key] = [(item, 0) for item in by_item]
    for part in evaluation.left(METRIC, keys, chunk):
        wanted, dpo = [by_item[item] for item, _ in part], context.recipe.dpo
        policy = context.prompts["policy"]
        found = preference.pair_rows(
            stage.model(), wanted, policy, dpo.max_length, stage.engine(), context.stopped, reference=False
        )
        rows = {row["item"]: {"chosen": row["chosen"], "rejected": row["rejected"]} for row in found}
        skipped = {"skipped": "prompt too long"}
        evaluation.write(
            METRIC, part, [{"metric": METRIC, "item": i, "round": 0} | rows.get(i, skipped) for i, _ in part]
        )
    return {row["item"]: row for row in evaluation.rows(METRIC, keys)}


def known(context: Context) -> dict[int, Row]:
    """Item -> row that the SFT arm needs: the stage's log-probabilities, beside the base's of the run's own."""
    if context.recipe.dpo.start != "sft":
        return {}
    rows = records.read(context.run.eval / "scores.jsonl", KEY)
    start, own = ({r["item"]: r for r in rows if r["metric"] == name} for name in (METRIC, "preference.pairs"))
    both = {item: (own[item], at) for item, at in start.items() if item in own}
    return {
        item: row | {"chosen": at["chosen"], "rejected": at["rejected"]}
        for item, (row, at) in both.items()
        if "skipped" not in row and "skipped" not in at
    }


def stage_words(context: Context) -> Figures:
    """How long the stage's own fresh answers are, once its arm was measured; nothing where DPO began from the base."""
    figures = read_object(context.run.eval / "sft.json").get("figures") if context.recipe.dpo.start == "sft" else None
    row = figures.get(WORDS) if isinstance(figures, dict) else None
    value = row.get("value") if isinstance(row, dict) else None
    return by_metric(count(WORDS, value, 0)) if is_finite(value) else {}


def against(rows: Sequence[PairScore], start: Mapping[int, Row]) -> list[PairScore]:
    """The rows with the stage's log-probabilities as the reference's; a pair that has none of them is left out."""
    return [
        cast(PairScore, {**row, "ref_chosen": at["chosen"], "ref_rejected": at["rejected"]})
        for row in rows
        if (at := start.get(row["item"]))
    ]


def named(own: Mapping[str, Figure], base: Mapping[str, Figure]) -> dict[str, Figure]:
    """The figures against the stage, with P2 and one P1 that are against the base."""
    found = {name: replace(f, judge=JUDGE) if f.judge == preference.POLICY else f for name, f in own.items()}
    p2 = {name: figure for name, figure in base.items() if name.startswith("preference.p2.")}
    return (
        found | p2 | {OVER_BASE: replace(base["preference.p1"], metric=OVER_BASE)} if "preference.p1" in base else found
    )
