"""The measurements of the tuned policy against its base, and the score log that a run's measurements share.

Owns eval/measured.json; which measurements a run makes, in which order, is `pipeline.evaluate`'s, each metric lives in
its module, resuming in `scores`'s `Evaluation`. Critiques and revisions are measured in `chain_figures`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from cai.data import labels as known_labels
from cai.data.kinds import one_a_prompt
from cai.data.pairs import PairSet
from cai.engine import Sampling
from cai.engine.asks import score
from cai.evaluate import data_checks, dpo_health, forgetting, kinds, preference, started, taken
from cai.evaluate.answering import drawn
from cai.evaluate.external import closing, external_of
from cai.evaluate.prompted import Compared
from cai.evaluate.scores import Evaluation, Row, fingerprint, load_judge, open_scores
from cai.metrics.figure import Figures, by_metric, count, sample, unmeasured
from cai.run import loop
from cai.run.context import Context
from cai.store.files import holds, json_bytes, write_json_atomic
from cai.store.row_types import Pair, PairScore

SURFACE_PAIRS = 20  # fewer hold less than one pair of n-grams that matters
SLICE = 8  # items scored between two writes: what a kill loses


@contextmanager
def opened(context: Context, pairs: PairSet, adapter: Path) -> Iterator[Evaluation]:
    """What every measurement takes, on the score log of these pairs and this adapter."""
    prompts, external = load_judge(context), external_of(context)
    with closing(external), open_scores(context, fingerprint(context, pairs, adapter, prompts)) as log:
        taken.settle(context, log, taken.mark(context, pairs, prompts))
        yield Evaluation(context, log, adapter, prompts, external)


def write(context: Context, figures: Figures) -> None:
    """eval/measured.json, and an event with the warnings; an unchanged file is left alone (a resume of a done run)."""
    known = started.stage_words(context) | figures
    warnings = dpo_health.warnings(known, context.recipe.health, context.recipe.dpo.start)
    content = {"warnings": warnings, "figures": {name: figure.as_dict() for name, figure in figures.items()}}
    path = context.run.eval / "measured.json"
    if holds(path, json_bytes(content)):
        return
    write_json_atomic(path, content)
    context.run.event("measured", figures=len(content["figures"]), warnings=content["warnings"])


def of_data(context: Context, pairs: PairSet) -> Figures:
    """What is counted in the pairs and the records, without a model."""
    total = len(pairs.kept) + len(pairs.rejects)
    figures = [
        count("pairs.kept", len(pairs.kept), total, facts={"rejected": pairs.reasons}),
        count("pairs.yield", len(pairs.kept) / total if total else 0.0, total),
    ]
    counted = by_metric(*figures)
    if context.recipe.pairs.file:  # pairs of the user's own have no critique, and their texts need not be ours
        return counted
    counted |= kinds.of_data(pairs, context.recipe.pairs.kinds)
    counted |= data_checks.measure(pairs, context.log.rows, context.prompts, context.constitution)
    return counted | data_checks.labels_known(known_labels.rows_of(context), known_labels.bar_of(context))


def preference_figures(
    evaluation: Evaluation,
    pairs: PairSet,
    training_pairs: Sequence[Pair],
    *,
    own: bool = True,
    known: Mapping[int, Row] | None = None,
) -> Figures:
    """Per-pair log-probs of held-out pairs and of (a sample of) the training pairs, adapter on and off.

    `own`: of the run's adapter, whose reference is what DPO began from; an arm beside it is held against the base.
    `known`: item -> its row, where the same adapter scored it before.
    """
    dpo = evaluation.context.recipe.dpo
    limit = max(len(pairs.heldout), evaluation.section.train_pairs)
    by_item = {pair["item"]: pair for pair in (*sample_rows(training_pairs, limit), *pairs.heldout)}

    keys = [(item, 0) for item in by_item]
    start = started.scored(evaluation, by_item, SLICE) if own else {}
    for part in evaluation.left("preference.pairs", keys, SLICE):
        rows = [cast(PairScore, known[item]) for item, _ in part if known and item in known]
        if len(rows) < len(part):
            model = evaluation.model()
            wanted = [by_item[item] for item, _ in part]
            policy, stopped = evaluation.context.prompts["policy"], evaluation.context.stopped
            rows = preference.pair_rows(model, wanted, policy, dpo.max_length, evaluation.engine(), stopped)
        missing = {item for item, _ in part} - {row["item"] for row in rows}
        skipped: list[Row] = [
            {"metric": "preference.pairs", "item": item, "round": 0, "skipped": "prompt too long"}
            for item in sorted(missing)
        ]
        evaluation.write("preference.pairs", part, [*map(dict, rows), *skipped])
    rows = cast(list[PairScore], evaluation.rows("preference.pairs", keys))
    too_long = len(pairs.heldout) - sum(row["split"] == "heldout" for row in rows)
    figures = preference.summarise(rows, too_long)
    if start:
        rows = started.against(rows, start)
        figures = started.named(preference.summarise(rows, too_long), figures)
    figures |= kinds.of_preference(rows, evaluation.context.recipe.pairs.kinds)
    figures["preference.p1"].facts["by_pool"] = preference.by_group(
        rows, {p["item"]: [p["pool"]] for p in pairs.heldout}
    )
    figures["preference.p1"].facts["by_principle"] = preference.by_group(rows, pairs.drawn)
    for split in ("train", "heldout"):
        judge = started.JUDGE if start else preference.POLICY
        figures |= dpo_health.from_pairs([row for row in rows if row["split"] == split], dpo.beta, split, judge)
    return figures


def surface_figures(pairs: PairSet, training_pairs: Sequence[Pair]) -> Figures:
    """What characters and length alone tell of chosen and rejected: P1 must be ahead of it."""
    from cai.evaluate.surface import fit_and_test

    if len(training_pairs) < SURFACE_PAIRS:
        why = f"{len(training_pairs)} pairs are too few to fit a classifier on: {SURFACE_PAIRS} are wanted"
        return {"preference.surface": unmeasured("preference.surface", why)}
    return by_metric(fit_and_test(training_pairs, pairs.heldout).as_measured())


def sample_rows(rows: Sequence[Pair], size: int) -> list[Pair]:
    by_item = {row["item"]: row for row in rows}
    return [by_item[item] for item in sample(list(by_item), size)]


def fresh(evaluation: Evaluation, pairs: PairSet) -> tuple[dict[int, Pair], list[Row]]:
    """Held-out pairs by item, and the greedy answers of base and tuned to their prompts."""
    wanted = {pair["item"]: pair for pair in sample_rows(one_a_prompt(pairs.heldout), evaluation.section.fresh_items)}
    keys = [(item, 0) for item in wanted]
    for part in evaluation.left("preference.fresh", keys, loop.together(evaluation.context, 16, len(keys))):
        evaluation.write("preference.fresh", part, answers(evaluation, [wanted[item] for item, _ in part]))
    return wanted, evaluation.rows("preference.fresh", keys)


def fresh_figures(rows: Sequence[Row], wanted: Mapping[int, Pair]) -> Figures:
    """How the fresh answers of either arm degenerate, and end; which red-team requests they go along with."""
    figures: Figures = {}
    redteam = [row for row in rows if wanted[row["item"]]["pool"] == "redteam"]
    for arm in ("base", "tuned"):
        figures |= forgetting.of_answers([row[arm] for row in rows], [row[f"{arm}_finish"] for row in rows], arm)
        figures |= forgetting.compliance([row[arm] for row in redteam], arm)
    if rows:
        figures["fresh.tuned.same_as_base"] = preference.same_answers(rows)
    return figures


def of_p3(evaluation: Evaluation, wanted: Mapping[int, Pair], answers: Sequence[Row]) -> dict[int, Compared]:
    """P3: the fresh answers of tuned and base between which the judge is asked to prefer; none where it is off."""
    texts_of = {row["item"]: row for row in answers}
    items = sample(wanted, evaluation.section.fresh_items) if evaluation.judges else []
    return {item: (wanted[item], texts_of[item]["tuned"], texts_of[item]["base"]) for item in items}


BOTH = (("base", False), ("tuned", True))  # arms, and whether the adapter is on


def answers(evaluation: Evaluation, prompts: Sequence[Pair], arms: Sequence[tuple[str, bool]] = BOTH) -> list[Row]:
    """Greedy answers of these arms under the policy prompt."""
    model, context = evaluation.model(), evaluation.context
    asked = {index: {"instruction": pair["prompt"]} for index, pair in enumerate(prompts)}
    greedy, where = Sampling(0.0, evaluation.section.fresh_max_new_tokens), "while answering held-out prompts"
    rows: list[Row] = [
        {"metric": "preference.fresh", "item": p["item"], "round": 0, "prompt": p["prompt"]} for p in prompts
    ]
    for arm, on in arms:
        with model.adapter(on):
            for index, found in drawn(context, context.prompts["policy"], asked, greedy, where).items():
                rows[index] |= {arm: found["text"], f"{arm}_finish": found["finish"]}
    return rows


def forgetting_figures(evaluation: Evaluation) -> Figures:
    section = evaluation.section
    chosen = sample(range(len(forgetting.passages())), section.neutral_passages)
    keys = [(index, 0) for index in chosen]
    for part in evaluation.left("forgetting.nll", keys, 20):
        scorer, model, passages = evaluation.scorer(), evaluation.model(), [index for index, _ in part]
        asks, scores = forgetting.nll_asks(scorer, passages), {}
        for on in (False, True):
            with model.adapter(on):
                scores[on] = score(scorer, asks)
        evaluation.write("forgetting.nll", part, forgetting.nll_rows(scores, passages))
    figures = forgetting.summarise_nll(evaluation.rows("forgetting.nll", keys))
    of_kl = sample(keys, section.kl_passages)
    for part in evaluation.left("forgetting.kl", of_kl, 10):
        if evaluation.model().hf is None:
            why = "the fake model has no distributions"
            found = [{"metric": "forgetting.kl", "item": index, "round": 0, "skipped": why} for index, _ in part]
        else:
            found = forgetting.kl_rows(evaluation.model(), [index for index, _ in part])
        evaluation.write("forgetting.kl", part, found)
    return figures | forgetting.summarise_kl(evaluation.rows("forgetting.kl", of_kl))


def training_figures(context: Context) -> Figures:
    from cai.training.train import load_result

    result = load_result(context.run.train)
    if result is None:
        return {"dpo.first_loss_error": unmeasured("dpo.first_loss_error", "there is no training result")}
    return dpo_health.from_log(
        result.log, truncated=result.truncated, pairs=result.pairs, expected=result.expected_first_loss
    )
