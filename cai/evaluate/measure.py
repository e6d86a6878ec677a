"""The measurement of one run, start to end: what is scored, in which order, and the figures that come out.

Owns the list of measurements and eval/measured.json; each metric lives in its module, resuming in `evaluation`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from cai.data.pairs import PairSet
from cai.engine import Request, Sampling
from cai.evaluate import (
    critic_stage,
    critiques,
    data_checks,
    dpo_health,
    forgetting,
    judge,
    likelihood,
    preference,
    prompted,
    revisions,
)
from cai.evaluate.cases import FALLBACK, Case, from_examples, nearby
from cai.evaluate.lm_eval import tasks
from cai.evaluate.scores import Evaluation, Key, Row, every_example, fingerprint, load_judge, open_scores
from cai.metrics.figure import Figure, count, finite_rows, indicator, rate, sample, shuffled, unmeasured
from cai.metrics.text import words
from cai.recipe.ends import cut, signs_of
from cai.run.context import Context
from cai.store.files import holds, json_bytes, write_json_atomic
from cai.store.row_types import Pair, PairScore

Figures = dict[str, Figure]
SURFACE_PAIRS = 20  # fewer hold less than one pair of n-grams that matters
SLICE = 8  # items scored between two writes: what a kill loses


def measure(context: Context, pairs: PairSet, training_pairs: Sequence[Pair], adapter: Path, folder: Path) -> Figures:
    """Every figure of a run by metric name; rows go to eval/scores.jsonl, figures to eval/measured.json.

    `folder`: where recipe paths are resolved. Resumes from its rows; with none missing, no model is loaded.
    """
    figures = _counts(pairs) | data_checks.measure(pairs, context.log.rows, context.prompts, context.constitution)
    if not context.recipe.evaluation.enabled:
        return figures
    prompts = load_judge(context)
    log = open_scores(context, fingerprint(context, pairs, adapter, prompts))
    try:
        evaluation = Evaluation(context, log, adapter, prompts)
        figures |= critic_stage.measure(context)
        figures |= _critiques_and_revisions(evaluation, pairs)
        figures |= preference_figures(evaluation, pairs, training_pairs)
        figures |= surface_figures(pairs, training_pairs)
        figures |= _fresh(evaluation, pairs, training_pairs)
        figures |= forgetting_figures(evaluation)
        figures |= tasks.figures(tasks.measure(evaluation, folder))
        figures |= _training(context, adapter)
    finally:
        log.close()
    warnings = dpo_health.warnings(figures, context.recipe.health)
    content = {"warnings": warnings, "figures": {name: figure.as_dict() for name, figure in figures.items()}}
    _write(context, content)
    return figures


def _write(context: Context, content: Row) -> None:
    """eval/measured.json, and an event with the warnings; an unchanged file is left alone (a resume of a done run)."""
    path = context.run.eval / "measured.json"
    if holds(path, json_bytes(content)):
        return
    write_json_atomic(path, content)
    context.run.event("measured", figures=len(content["figures"]), warnings=content["warnings"])


def _counts(pairs: PairSet) -> Figures:
    total = len(pairs.kept) + len(pairs.rejects)
    figures = [
        count("pairs.kept", len(pairs.kept), total, facts={"rejected": pairs.reasons}),
        count("pairs.yield", len(pairs.kept) / total if total else 0.0, total),
    ]
    return {figure.metric: figure for figure in figures}


def _critiques_and_revisions(evaluation: Evaluation, pairs: PairSet) -> Figures:
    """All complete items, kept or not; likelihood and judge on nested seeded samples of them."""
    section = evaluation.section
    cases = from_examples(every_example(pairs))
    by_key = {case.key: case for case in cases}
    keys = list(by_key)
    revised = [key for key in keys if by_key[key].revision]
    requests = sorted({p.critique_request for p in evaluation.context.constitution.principles})
    shown = [example.assistant for example in evaluation.context.prompts["critiques"].examples]
    idf = critiques.weights(cases)

    def chosen(part: Sequence[Key]) -> list[Case]:
        return [by_key[key] for key in part]

    ring = [by_key[key] for key in shuffled(keys, 0, "ring")]

    def gates(part: Sequence[Key]) -> list[Row]:
        return [critiques.gate_row(c, nearby(c, ring), requests, section, idf, shown) for c in chosen(part)]

    gate_c = evaluation.fill("critiques.gates", keys, 64, gates)
    gate_r = evaluation.fill(
        "revisions.gates", revised, 64, lambda p: [revisions.check_row(c, section) for c in chosen(p)]
    )
    scored = sample(keys, section.likelihood_items)
    pool = chosen(scored)

    generic = _generic(evaluation, scored, by_key)

    def csi(part: list[Key]) -> list[Row]:
        with evaluation.base() as scorer:
            return critiques.specificity_rows(likelihood.specificity(scorer, chosen(part), pool, generic))

    def cri(part: list[Key]) -> list[Row]:
        with evaluation.base() as scorer:
            return revisions.responsiveness_rows(likelihood.responsiveness(scorer, chosen(part), pool))

    csi_rows, cri_rows = (
        evaluation.fill("critiques.csi", scored, SLICE, csi),
        evaluation.fill("revisions.cri", [k for k in scored if by_key[k].revision], SLICE, cri),
    )
    judged_c, judged_r = _judged(evaluation, scored, by_key)
    name = evaluation.judge_name
    figures = critiques.summarise(gate_c, csi_rows, judged_c, section, name)
    figures |= revisions.summarise(gate_r, cri_rows, judged_r, section, name)
    figures["critiques.meaningful"].facts["of"] = len(scored)
    figures["revisions.addresses"].facts["of"] = sum(bool(by_key[key].revision) for key in scored)
    _note_kept(figures, pairs, (gate_c, csi_rows, judged_c), (gate_r, cri_rows, judged_r), evaluation)
    return figures


def _generic(evaluation: Evaluation, scored: Sequence[Key], by_key: dict[Key, Case]) -> dict[Key, float]:
    """The generic control's log-probs, one a context; the shipped contexts stand in for missing neighbours."""
    contexts = dict(by_key) | {case.key: case for case in FALLBACK}

    def compute(part: list[Key]) -> list[Row]:
        with evaluation.base() as scorer:
            found = likelihood.generic_lps(scorer, [contexts[key] for key in part])
        return [{"metric": "critiques.generic_lp", "item": i, "round": r, "lp": lp} for (i, r), lp in found.items()]

    keys = [*scored, *(case.key for case in FALLBACK)] if scored else []
    rows = finite_rows(evaluation.fill("critiques.generic_lp", keys, 16, compute), "lp")
    return {(row["item"], row["round"]): row["lp"] for row in rows}


def _judged(evaluation: Evaluation, scored: Sequence[Key], by_key: dict[Key, Case]) -> tuple[list[Row], list[Row]]:
    section, prompts = evaluation.section, evaluation.judge
    if section.judge == "off" or prompts is None:
        return [], []
    keys = sample(scored, section.judge_items)
    pool = [by_key[key] for key in scored]

    def j12(part: list[Key]) -> list[Row]:
        with evaluation.base() as scorer:
            return judge.judge_critiques(scorer, prompts, [by_key[key] for key in part], pool)

    def j34(part: list[Key]) -> list[Row]:
        with evaluation.base() as scorer:
            return judge.judge_revisions(scorer, prompts, [by_key[key] for key in part])

    return evaluation.fill("critiques.judge", keys, SLICE, j12), evaluation.fill(
        "revisions.judge", [k for k in keys if by_key[k].revision], SLICE, j34
    )


def _note_kept(
    figures: Figures,
    pairs: PairSet,
    of_critiques: Sequence[Sequence[Row]],
    of_revisions: Sequence[Sequence[Row]],
    evaluation: Evaluation,
) -> None:
    """Beside the two headlines, the same rate over kept pairs only, as a fact."""
    kept = {example["item"] for example in pairs.examples}
    for metric, rows, summarise in (
        ("critiques.meaningful", of_critiques, critiques.summarise),
        ("revisions.addresses", of_revisions, revisions.summarise),
    ):
        only = [[row for row in part if row["item"] in kept] for part in rows]
        found = summarise(only[0], only[1], only[2], evaluation.section, evaluation.judge_name)[metric]
        figures[metric].facts.update({"kept_only": found.value, "kept_n": found.n})


def preference_figures(evaluation: Evaluation, pairs: PairSet, training_pairs: Sequence[Pair]) -> Figures:
    """Per-pair log-probs of held-out pairs and of (a sample of) the training pairs, adapter on and off."""
    dpo = evaluation.context.recipe.dpo
    limit = max(len(pairs.heldout), evaluation.section.train_pairs)
    by_item = {pair["item"]: pair for pair in (*sample_rows(training_pairs, limit), *pairs.heldout)}

    def logps(part: list[Key]) -> list[Row]:
        model = evaluation.model()
        wanted = [by_item[item] for item, _ in part]
        policy, stopped = evaluation.context.prompts["policy"], evaluation.context.stopped
        rows = preference.pair_rows(model, wanted, policy, dpo.max_length, evaluation.engine(), stopped)
        missing = {item for item, _ in part} - {row["item"] for row in rows}
        skipped: list[Row] = [
            {"metric": "preference.pairs", "item": item, "round": 0, "skipped": "prompt too long"}
            for item in sorted(missing)
        ]
        return [*map(dict, rows), *skipped]

    found = evaluation.fill("preference.pairs", [(item, 0) for item in by_item], SLICE, logps)
    rows = cast(list[PairScore], found)
    too_long = len(pairs.heldout) - sum(row["split"] == "heldout" for row in rows)
    figures = preference.summarise(rows, too_long)
    for split in ("train", "heldout"):
        figures |= dpo_health.from_pairs([row for row in rows if row["split"] == split], dpo.beta, split)
    return figures


def surface_figures(pairs: PairSet, training_pairs: Sequence[Pair]) -> Figures:
    """What characters and length alone tell of chosen and rejected: P1 must be ahead of it."""
    from cai.evaluate.surface import fit_and_test

    if len(training_pairs) < SURFACE_PAIRS:
        why = f"{len(training_pairs)} pairs are too few to fit a classifier on: {SURFACE_PAIRS} are wanted"
        return {"preference.surface": unmeasured("preference.surface", why)}
    figure = fit_and_test(training_pairs, pairs.heldout).as_measured("preference.surface")
    return {figure.metric: figure}


def sample_rows(rows: Sequence[Pair], size: int) -> list[Pair]:
    by_item = {row["item"]: row for row in rows}
    return [by_item[item] for item in sample(list(by_item), size)]


def _fresh(evaluation: Evaluation, pairs: PairSet, training_pairs: Sequence[Pair]) -> Figures:
    """Greedy answers of base and tuned to held-out prompts: degeneration figures, and P3 by the judge."""
    section = evaluation.section
    wanted = {pair["item"]: pair for pair in sample_rows(pairs.heldout, section.fresh_items)}
    keys = [(item, 0) for item in wanted]
    fresh = evaluation.fill(
        "preference.fresh", keys, 16, lambda part: _answers(evaluation, [wanted[item] for item, _ in part])
    )
    figures: Figures = {}
    for arm in ("base", "tuned"):
        texts, limited = [row[arm] for row in fresh], [row[f"{arm}_finish"] == "length" for row in fresh]
        figures |= forgetting.degeneration(texts, limited, arm)
        ended = rate(f"fresh.{arm}.stops", [indicator(row[f"{arm}_finish"] == "eos") for row in fresh])
        figures[ended.metric] = ended
    prompts = evaluation.judge
    if section.judge == "off" or prompts is None:
        return figures | preference.summarise_fresh([], evaluation.judge_name)
    figures |= prompted.measure(evaluation, wanted, fresh, training_pairs)
    texts_of = {row["item"]: row for row in fresh}

    def p3(part: list[Key]) -> list[Row]:
        with evaluation.base() as scorer:
            return _compare(scorer, prompts, [(wanted[item], texts_of[item]) for item, _ in part])

    judged = evaluation.fill("preference.p3", sample(keys, section.fresh_items), SLICE, p3)
    return figures | preference.summarise_fresh(judged, evaluation.judge_name)


def _answers(evaluation: Evaluation, prompts: Sequence[Pair]) -> list[Row]:
    """Both arms' greedy answers under the policy prompt."""
    model, policy = evaluation.model(), evaluation.context.prompts["policy"]
    signs = signs_of(policy)
    rows: list[Row] = [
        {"metric": "preference.fresh", "item": p["item"], "round": 0, "prompt": p["prompt"]} for p in prompts
    ]
    for arm, on in (("base", False), ("tuned", True)):
        with model.adapter(on):
            engine = evaluation.engine()
            for index, pair in enumerate(prompts):
                r = policy.render({"instruction": pair["prompt"]}, format=model.format, tokenizer=model.tokenizer)
                sampling = Sampling(
                    0.0, evaluation.section.fresh_max_new_tokens, r.stop, tuple(model.tokenizer.eos_ids)
                )
                engine.submit(Request(index, tuple(r.token_ids), sampling, prefix_len=r.prefix_len))
            for done in engine.completions(evaluation.context.stopped):
                found = cut(done.text, signs)
                finish = "stop" if found.marker else done.finish
                rows[done.id] |= {arm: found.text.strip(), f"{arm}_finish": finish}
        evaluation.context.check_stop("while answering held-out prompts")
    return rows


def _compare(scorer: likelihood.Scorer, prompts: judge.Judge, both: Sequence[tuple[Pair, Row]]) -> list[Row]:
    asks = []
    for pair, row in both:
        case = Case(pair["item"], 0, pair["prompt"], row["base"], "", "", row["tuned"], pair["pool"])
        asks += judge.pair_asks(scorer, prompts, (pair["item"],), case, row["tuned"], row["base"])
    scores = likelihood.score(scorer, asks)
    return [
        {
            "metric": "preference.p3",
            "item": pair["item"],
            "round": 0,
            "j4": judge.finite(judge.pair_win(scores, (pair["item"],))),
            "log_odds": judge.finite(judge.pair_log_odds(scores, (pair["item"],))),
            "base_words": len(words(row["base"])),
            "tuned_words": len(words(row["tuned"])),
            "base": row["base"][:400],
            "tuned": row["tuned"][:400],
        }
        for pair, row in both
    ]


def forgetting_figures(evaluation: Evaluation) -> Figures:
    section = evaluation.section
    chosen = sample(range(len(forgetting.passages())), section.neutral_passages)
    keys = [(index, 0) for index in chosen]
    nll = evaluation.fill(
        "forgetting.nll",
        keys,
        20,
        lambda part: forgetting.nll_rows(evaluation.scorer(), evaluation.model(), [index for index, _ in part]),
    )
    figures = forgetting.summarise_nll(nll)

    def kl(part: list[Key]) -> list[Row]:
        if evaluation.model().hf is None:
            why = "the fake model has no distributions"
            return [{"metric": "forgetting.kl", "item": index, "round": 0, "skipped": why} for index, _ in part]
        return forgetting.kl_rows(evaluation.model(), [index for index, _ in part])

    rows = evaluation.fill("forgetting.kl", sample(keys, section.kl_passages), 10, kl)
    return figures | forgetting.summarise_kl(rows)


def _training(context: Context, adapter: Path) -> Figures:
    from cai.training.train import load_result

    result = load_result(context.run.train)
    if result is None:
        return {"dpo.first_loss_error": unmeasured("dpo.first_loss_error", "there is no training result")}
    return dpo_health.from_log(result.log, truncated=result.truncated, pairs=result.pairs)
