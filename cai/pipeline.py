"""The steps of a run in the order of `runner.milestone`. Each computes what is left and returns at once if nothing is.

Owns what a step says on screen and which faults end a run; the work is in the modules it calls. Invariant: a step whose
result stands on disk neither loads the model nor changes a byte.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from cai import errors
from cai.data import guarding
from cai.data.pairs import PairSet
from cai.data.slots import slots
from cai.data.sound import candidates, shown_beside
from cai.errors import CaiError
from cai.evaluate import advice, external, gates
from cai.evaluate.doors import recipe_key
from cai.evaluate.gates import Verdict
from cai.inputs import Inputs, locate
from cai.metrics.figure import Figure
from cai.models import checks
from cai.recipe.intake.pairfile import PairIntake
from cai.recipe.intake.told import pool_cure
from cai.recipe.load import Recipe
from cai.run import lines, tracker
from cai.run.context import Context
from cai.store.files import holds, json_bytes, write_json_atomic
from cai.store.row_types import Pair
from cai.terminal import columns, printable, say, usd, word
from cai.world import world


def require_pairs(context: Context, inputs: Inputs, pairs: PairSet) -> None:
    """What the guard dropped and how many pairs are missing, said. No pair at all ends with exit 6 and the reasons."""
    if inputs.pairs is not None:
        return  # `own_pairs` has said it
    guarded(context)
    wanted = len(slots(context.recipe))
    reasons = ", ".join(f"{reason} {count}" for reason, count in pairs.reasons.items())
    if not pairs.kept:
        asked = context.log.by_stage("instructions")
        cure = (
            pool_cure(pairs.reasons, asked, inputs.given is not None) + "change prompts, or raise pairs.replacements."
        )
        for stage, what in (("answers", "requests"), ("critiques", "examples"), ("revisions", "examples")):
            rows = context.log.by_stage(stage)
            too_long = sum(str(row["reason"]).startswith("prompt_too_long") for row in rows)
            if 2 * too_long > len(rows):
                told = f"{too_long} of {stage} leave no room (prompt_too_long)"
                cure = f"shorten the {what} or raise model.max_seq_length: {told}."
        if "guard" in pairs.reasons:
            cure = "change guard.model or guard.threshold, or set guard.enabled=false, in a --fork of this run."
        raise CaiError(
            f"{context.run.path}: no pair came through, rejected: {reasons or 'no instruction was accepted'}. "
            f"Read the rejected rows in records.jsonl, then {cure}",
            errors.QUALITY,
        )
    if len(pairs.kept) < wanted:
        lines = f"; instructions.file has {len(inputs.given.requests)} lines" if inputs.given else ""
        rejected = f" Rejected: {reasons}" if reasons else ""
        say(f"pairs: {len(pairs.kept)} of {wanted} wanted; the bound of tries is reached{lines}.{rejected}")


def own_pairs(context: Context, intake: PairIntake) -> PairSet:
    """The pairs of the user's file, less what the guard refuses. Errors: none is left (exit 6)."""
    from cai.data import own_pairs as own

    def built() -> PairSet:
        return own.build(intake.rows, context.recipe, own.guarded(context.log.by_stage("guard")))

    pairs = built()
    while context.recipe.guard.enabled and guarding.run_guard(context, pairs.examples):
        pairs = built()  # others take the place of what was refused
    guarded(context)
    if not pairs.train:
        reasons = ", ".join(f"{reason} {count}" for reason, count in pairs.reasons.items()) or "every row is held out"
        raise CaiError(f"{context.run.path}: pairs.file: no pair to train on: {reasons}. Add pairs.", errors.QUALITY)
    return pairs


def check_at_hand(inputs: Inputs, args: argparse.Namespace) -> None:
    """Guard, files, judges and lm_eval tasks of the milestone's own benchmarks, before there is a run folder."""
    recipe = inputs.recipe
    tracker.require(recipe.report.tracker)
    if args.resume and (locate(args, args.resume) / "train" / "result.json").exists():
        return
    guarding.require(recipe.guard)
    external.require(recipe.evaluation)
    if recipe.benchmarks.run:
        from cai.evaluate.benchmarks.suite import require

        require(recipe.benchmarks, inputs.folder)
    if recipe.evaluation.lm_eval:
        from cai.evaluate.lm_eval import tasks as harness

        harness.require(recipe.evaluation, inputs.folder)


def guarded(context: Context) -> None:
    """What the guard dropped, on screen and in eval/guard.json; more than the alarm's share is said aloud."""
    section, rows = context.recipe.guard, context.log.by_stage("guard")
    if not section.enabled or not rows:
        return
    from cai.models.guard import summary

    check = checks.stored(context.run.eval, "guard", section.model)
    figures = summary(rows, section, check)
    dropped = figures["guard.dropped"]
    context.run.eval.mkdir(exist_ok=True)
    told = {name: figure.as_dict() for name, figure in figures.items()}
    write_json_atomic(context.run.eval / "guard.json", {"figures": told})
    say(f"guard: {dropped.judge} dropped {dropped.text}")
    if dropped.facts["alarm"]:
        say(f"guard: ALARM, more than {section.alarm:.0%} dropped; look at the guard rows before trusting the data")
    checks.enforce(context.recipe.checks, "guard", section.model, check)


def write_dataset(context: Context, inputs: Inputs, pairs: PairSet) -> list[Pair]:
    """Marks, hygiene, contamination, then dataset/; gives the pairs to train on."""
    from cai.data import dataset, hygiene, marks_refused
    from cai.evaluate.benchmarks.overlaps import without_overlaps
    from cai.report import cards

    refused = marks_refused.of_run(context, pairs)
    cleaned = hygiene.clean(pairs.train, context.recipe.hygiene, refused, pairs.drawn)
    if not cleaned.kept and context.recipe.hygiene.without_principles:
        raise CaiError(f"{context.run.path}: hygiene.without_principles: no pair is left. Name fewer.", errors.QUALITY)
    if context.recipe.benchmarks.contamination:
        answers = candidates(context, pairs, len(cleaned.kept))
        cleaned = replace(cleaned, kept=without_overlaps(context, inputs.folder, cleaned.kept, answers))
    if "model" not in context.run.manifest and inputs.pairs is None:
        # every row was taken over from a run that did not note its model
        context.model()
    facts = context.run.manifest.get("model", {})
    described = partial(cards.card, recipe=context.recipe, facts=facts, policy=context.prompts["policy"])
    dataset.write_dataset(context.run, pairs, cleaned, described)
    kept = cleaned.kept
    for line in hygiene.held_back(cleaned.facts):
        say(line)
    tried, reasons = len(pairs.kept) + len(pairs.rejects), ", ".join(f"{why} {n}" for why, n in pairs.reasons.items())
    lost = f"; {len(pairs.rejects)} of {tried} tries made no pair ({reasons})" if pairs.rejects else ""
    context.run.event("dataset", pairs=len(kept), heldout=len(pairs.heldout), tried=tried, reasons=dict(pairs.reasons))
    say(f"dataset: {len(kept)} training pairs, {len(pairs.heldout)} held out{lost}")
    return kept


def train(context: Context, inputs: Inputs, collected: PairSet, pairs: Sequence[Pair]) -> Path:
    """The adapter of these pairs: trained, resumed, or found finished; from the base, or from SFT on the revisions."""
    from cai.training import arms

    arm = arms.dpo_arm(context, pairs, collected.heldout, shown_beside(context, collected, len(pairs)))
    if not arms.done(arm) and "training_identity" not in context.run.manifest:
        context.run.update_manifest(training_identity=inputs.identity(training=True))
    return arms.trained(context, arm)


def evaluate(
    context: Context, inputs: Inputs, pairs: PairSet, training_pairs: Sequence[Pair], adapter: Path
) -> dict[str, Figure]:
    """Every figure of the milestone, benchmarks included; base = adapter off, tuned = adapter on."""
    from cai.evaluate import agreement, chain_figures, critic_stage, evasions, measure, preference, probes, prompted
    from cai.evaluate import arms as beside
    from cai.evaluate.benchmarks import suite
    from cai.evaluate.lm_eval import tasks

    results = measure.of_data(context, pairs)
    if context.recipe.evaluation.enabled:
        with measure.opened(context, pairs, adapter) as evaluation:
            if context.recipe.pairs.revised:
                results |= critic_stage.measure(context)
                cases = chain_figures.cases_of(evaluation, pairs)
                checked, scored = chain_figures.gates(evaluation, cases), chain_figures.likelihoods(evaluation, cases)
                judged = chain_figures.verdicts(evaluation, cases)
                results |= chain_figures.figures(evaluation, pairs, cases, checked, scored, judged)
                results |= agreement.of_texts(evaluation, cases)
            results |= measure.preference_figures(evaluation, pairs, training_pairs)
            results |= measure.surface_figures(pairs, training_pairs)
            wanted, fresh = measure.fresh(evaluation, pairs)
            results |= measure.fresh_figures(fresh, wanted) | evasions.measure(context, wanted, fresh)
            for arm in evaluation.section.prompted if evaluation.judges else ():
                results |= prompted.measure(evaluation, arm, wanted, fresh, training_pairs)
            p3 = prompted.judged(evaluation, "preference.p3", measure.of_p3(evaluation, wanted, fresh))
            results |= preference.summarise_fresh(p3, evaluation.judge_name)
            results |= agreement.of_answers(evaluation, wanted, fresh)
            results |= measure.forgetting_figures(evaluation)
            results |= tasks.figures(tasks.measure(evaluation, inputs.folder))
            results |= measure.training_figures(context)
        measure.write(context, results)
    probes.ask(context, inputs.probes, adapter)
    for name, trained, figures in beside.run_arms(context, pairs, training_pairs):
        if context.recipe.evaluation.enabled:
            figures |= beside.measure(context, pairs, training_pairs, name, trained, inputs.folder)
            figures |= beside.answered(context, pairs, name, trained) | beside.gains(context, name)
    if context.recipe.evaluation.enabled and context.recipe.dpo.start == "sft":  # the stage has answered now
        results |= evasions.measure(context, wanted, fresh)
        measure.write(context, results)
    if context.recipe.benchmarks.run:
        suite.measure_all(context, context.recipe.benchmarks.run, inputs.folder)
    if len(context.recipe.dpo.seeds) > 1:
        from cai.training import arms

        arms.train_seeds(context, training_pairs, pairs.heldout, shown_beside(context, pairs, len(training_pairs)))
    return {**stored_figures(context.run.eval), **results}


def stored_figures(folder: Path) -> dict[str, Figure]:
    """What stands in eval/*.json: measured figures, benchmarks, guard, contamination."""
    from cai.evaluate.benchmarks.suite import read

    found: dict[str, Figure] = {}
    for name in ("measured", "benchmarks", "contamination", "guard", "checks", "seeds", "sft", "from_base"):
        found |= read(folder / f"{name}.json")
    return found


def decide(context: Context, results: Mapping[str, Figure], override: str) -> list[Verdict]:
    """PASS / FAIL / UNDERPOWERED / UNMEASURED of each criterion, written to eval/gates.json and said on screen."""
    recipe, run = context.recipe, context.run
    verdicts = gates.decide_all(results, recipe.gates.of_recipe(recipe))
    for verdict in verdicts:
        say("\n".join([f"gate {verdict.line}", *advice.lines(verdict)]))
    run.tell("figures", {name: figure.value for name, figure in results.items()})
    content = {
        "milestone": recipe.milestone,
        "enforced": enforced(context),
        "override": override or None,
        "passed": gates.passed(verdicts),
        "recipe": recipe_key(dict(run.manifest.get("identity", {}))),
        "verdicts": [verdict.as_dict() for verdict in verdicts],
    }
    path = run.eval / "gates.json"
    if not holds(path, json_bytes(content)):
        run.eval.mkdir(exist_ok=True)
        write_json_atomic(path, content)
        run.event("gates", passed=content["passed"], override=content["override"])
    return verdicts


def report(context: Context, verdicts: Sequence[Verdict]) -> None:
    """Peak memory by phase into the manifest, then report.html and report.md; before and after on screen."""
    if not world().first:
        return
    from cai.engine import memory
    from cai.report import before_after
    from cai.report.pages import write_report

    found = memory.by_phase(context.run.events())
    if found != context.run.manifest.get("memory", {}):
        context.run.update_manifest(memory=found)
    write_report(context.run)
    probed, page = before_after.probed(context.log.by_stage("probes")), lines.near(context.run.report_html)
    for line in before_after.lines(probed, page, columns()):
        say(line)


def enforced(context: Context) -> bool:
    """A failed gate stops the recipe's own model; on the embedded and the fake one it advises unless told."""
    return context.recipe.gates.enforce or context.run.manifest.get("backend") in ("cuda", "cpu")


def exit_code(context: Context, recipe: Recipe, verdicts: Sequence[Verdict], override: str) -> int:
    """The last line on screen: verdict and report. 7 where a gate that counts did not pass."""
    passed = gates.passed(verdicts)
    failed = [v.gate.metric for v in verdicts if not gates.passed([v])]
    verdict = "PASS" if passed else f"not passed: {', '.join(failed)}"
    if advised := [v.gate.metric for v in verdicts if v.status != "PASS" and not v.blocks]:
        verdict += f" (advisory and not met: {', '.join(advised)})"
    if not verdicts:
        verdict = "done, the recipe sets no gate for it"
    if not passed and not enforced(context):
        verdict += " (advisory on this model)"
    elif not passed and override:
        verdict += f" (overridden: {printable(override, one_line=True)})"
    cost = f", {usd(context.run.spent()['usd'])}" if recipe.budget.usd_per_hour else ""
    say(f"{recipe.milestone}: {verdict}. Report: {word(lines.near(context.run.report_html))}{cost}")
    counts = enforced(context) and world().first  # one that says 7 is enough, and torchrun then ends the others
    return errors.GATE if counts and not passed and not override else errors.DONE
