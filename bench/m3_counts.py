"""What an M3 asks of each phase, and how long that takes at measured rates: counts, arithmetic and the table.

Counts come from the program: slots, tries and token limits from `cai.run.budget`, stages from `cai.data.chain`, what is
scored from bench/m3_asks.py. A range is that of the estimate: one try a slot to `budget.TRIES`; where an answer's
length is not known, `SHORT` of its limit to the limit. No model, no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from m3_asks import ROOT, evaluation_tokens, m3

from cai.data import chain, principles
from cai.evaluate.benchmarks.suite import JUDGE_TOKENS
from cai.inputs import Inputs
from cai.recipe.arm_costs import BENCHMARK_ANSWERS
from cai.run import budget
from cai.run.arm_rates import SHORT
from cai.run.rates import Range, scored_seconds, table_rates

Row = dict[str, Any]
ESTIMATED = "the estimate: the whole training, about 1,160 tokens a pair"
NOWHERE = ROOT / "no runs are here"  # no earlier run: the estimate is the table's
KNOWN = 40  # rows of a check set, all of them (`checks.limit`)


@dataclass(frozen=True)
class Phase:
    """`rate`: the path of a measured figure in the session's steps, in seconds a unit; `estimate`: seconds."""

    name: str
    count: Range
    unit: str
    rate: str
    estimate: Range | None = None
    note: str = ""


def drawn_stages(inputs: Inputs) -> Iterator[Phase]:
    """What the chain draws: rows, and the estimate's time for as many tokens."""
    recipe, slots = inputs.recipe, budget.slot_count(inputs.recipe)
    every = [stage for stage, _ in chain.ordered(recipe.rounds, recipe) if stage.drawn and not stage.aside]
    for name in dict.fromkeys(stage.name for stage in every):
        same = [stage for stage in every if stage.name == name]
        limit = sum(getattr(recipe.sampling, str(stage.drawn)).max_new_tokens for stage in same)
        whole, scored = (budget.estimate(recipe, "cuda", NOWHERE, tokens).generation for tokens in (limit, 0))
        time = whole.plus(scored.times(-1.0)) if whole and scored else None
        count = Range(float(slots * len(same)), slots * len(same) * budget.TRIES)
        yield Phase(name, count, "rows", f"generation.stages.{name}.seconds_a_request", time)


def scored_stages(inputs: Inputs) -> Iterator[Phase]:
    recipe, slots = inputs.recipe, budget.slot_count(inputs.recipe)
    names = [stage.name for stage, _ in chain.ordered(recipe.rounds, recipe)]
    each = scored_seconds(recipe, table_rates("cuda"))
    times = {name: Range(slots * one, slots * one * budget.TRIES) for name, one in each.items()}
    if rounds := names.count("relevance"):
        first = float(len(principles.known_answers()) + principles.OWN)  # what scores are compared with
        count = Range(slots * rounds + first, slots * rounds * budget.TRIES + first)
        yield Phase("relevance", count, "answers", "scoring.relevance.seconds_a_unit", times.get("relevance"))
    if "labels" in names:
        first = float(len(principles.cases()))
        count = Range(slots + first, slots * budget.TRIES + first)
        yield Phase("labels", count, "pairs", "scoring.labels.seconds_a_unit", times.get("labels"))
    if recipe.guard.enabled:
        count = Range(2.0 * slots + KNOWN, 2 * slots * budget.TRIES + KNOWN)
        yield Phase("guard", count, "exchanges", "guard.seconds_an_exchange")


def training(inputs: Inputs) -> Iterator[Phase]:
    """DPO with its reference and its checkpoints."""
    recipe, dpo = inputs.recipe, inputs.recipe.dpo
    seen = budget.training_pairs_seen(recipe)
    time = budget.estimate(recipe, "cuda", NOWHERE, inputs.limit_tokens).training
    once = lambda count: Range(count, count)  # noqa: E731
    yield Phase("train: the steps", once(seen), "pairs", "dpo.seconds_a_pair", time, ESTIMATED)
    steps = seen / (dpo.batch_size * dpo.gradient_accumulation)
    if not dpo.save_minutes:
        yield Phase("train: checkpoints", once(float(-(-steps // dpo.save_steps))), "saves", "dpo.save_seconds")
    yield Phase("train: the reference", once(float(recipe.items)), "pairs", "dpo.reference_seconds_a_pair")
    yield Phase("train: up to the first step", once(1.0), "once", "dpo.set_up_seconds")


def evaluation(inputs: Inputs) -> Iterator[Phase]:
    recipe, section = inputs.recipe, inputs.recipe.evaluation
    once = lambda count: Range(float(count), float(count))  # noqa: E731
    pairs = recipe.heldout.items + max(recipe.heldout.items, section.train_pairs)
    yield Phase("P1, P2: pairs, adapter on and off", once(2 * pairs), "pairs", "dpo.reference_seconds_a_pair")
    for name, tokens in evaluation_tokens(inputs).items():
        yield Phase(name, once(round(tokens)), "prompt tokens", "scoring.labels.seconds_a_token")
    for name in ("critiques", "revisions"):
        rate = f"generation.stages.{name}.seconds_a_request"
        yield Phase(f"critic's exam: {name}", once(section.critic_items), "rows", rate)
    asked = min(section.fresh_items, recipe.heldout.items)
    yield _answers("fresh answers, both arms", 2 * asked, section.fresh_max_new_tokens)
    yield _answers("probes, both arms", 2 * len(inputs.probes), section.probe_tokens)


def _answers(name: str, count: int, limit: int) -> Phase:
    """Answers of a length that is not known, at the rate of the stage of answers."""
    tokens = Range(count * limit * SHORT, float(count * limit))
    return Phase(name, tokens, "tokens", "generation.stages.answers.seconds_a_token")


def benchmarks(inputs: Inputs) -> Iterator[Phase]:
    section = inputs.recipe.benchmarks
    for name in section.run:
        rows = 2 * BENCHMARK_ANSWERS[name]
        limit = section.mtbench_max_new_tokens if name == "mtbench" else section.max_new_tokens
        yield _answers(f"{name}: answers, both arms", rows, limit)
        if section.judge_of(name) == "regex":
            continue
        if name != "mtbench":
            exchanges = Range(float(rows + KNOWN), float(rows + KNOWN))
            yield Phase(f"{name}: judge of 13B", exchanges, "exchanges", "judge.seconds_an_exchange")
            continue
        judge = _answers("mtbench: judge", rows, JUDGE_TOKENS)
        yield Phase("mtbench: judge of 32B", judge.count, "tokens", judge.rate, note="at the policy's rate of answers")


def phases(inputs: Inputs) -> list[Phase]:
    set_up = Phase("engine's set-up", Range(1.0, 1.0), "once", "generation.set_up_s")
    parts = (drawn_stages, scored_stages, training, evaluation, benchmarks)
    return [set_up, *(phase for part in parts for phase in part(inputs))]


NO_RATE = "the estimate has no rate for it either"
ASIDE = ("start and preflight", "loading policy, guard and judges", "contamination and data set", "report")


# --- the table


def rate_of(steps: Mapping[str, Any], path: str) -> float | None:
    """Seconds a unit; None where the step was cut, failed or has not been."""
    found: Any = steps
    for part in path.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return float(found) if isinstance(found, int | float) and not isinstance(found, bool) else None


def why_missing(steps: Mapping[str, Any], path: str) -> str:
    step = steps.get(path.partition(".")[0])
    return "not measured: " + (str(step.get("error", "it was not reached")) if step else "the step was not run")


def rows(found: Sequence[Phase], steps: Mapping[str, Any], rest: Range | None) -> list[Row]:
    """A row a phase, the total last. `rest`: the estimate of what nothing here measures, None where it has none."""
    made, without = [], []
    total, estimated = rest or Range(0.0, 0.0), rest or Range(0.0, 0.0)
    for phase in found:
        rate = rate_of(steps, phase.rate)
        seconds = phase.count.times(rate) if rate is not None else None
        notes = ["" if seconds else why_missing(steps, phase.rate), phase.note]
        made.append(row(phase.name, seconds, phase.estimate, "; ".join(filter(None, notes)), phase, rate))
        without += [] if seconds else [phase.name]
        total, estimated = total.plus(seconds or Range(0.0, 0.0)), estimated.plus(phase.estimate or Range(0.0, 0.0))
    made += [
        row(name, None, None, "not measured here; " + ("in the estimate's rest" if rest else NO_RATE)) for name in ASIDE
    ]
    made += [row("rest", rest, rest, f"by the estimate: {', '.join(ASIDE)}")] if rest else []
    left = [*without, *(() if rest else ASIDE)]
    made.append(row("total", total, estimated, f"WITHOUT {'; '.join(left)}" if left else ""))
    return made


def row(
    name: str,
    seconds: Range | None,
    estimate: Range | None,
    note: str,
    phase: Phase | None = None,
    rate: float | None = None,
) -> Row:
    counted = {"count": list(phase.count), "unit": phase.unit} if phase else {"count": None, "unit": ""}
    both = {"minutes": minutes(seconds), "estimate_minutes": minutes(estimate)}
    return {"phase": name, **counted, "seconds_a_unit": rate, **both, "note": note}


def table(session: Mapping[str, Any]) -> list[Row]:
    """The table of a session's steps, with the counts of M3."""
    inputs = m3()
    rest = budget.estimate(inputs.recipe, "cuda", NOWHERE, inputs.limit_tokens, inputs.once_tokens).rest
    return rows(phases(inputs), session.get("steps", {}), rest)


def minutes(seconds: Range | None) -> list[float] | None:
    return [round(seconds.low / 60, 2), round(seconds.high / 60, 2)] if seconds else None


def shown(made: Sequence[Row], session: Mapping[str, Any]) -> str:
    where = f"{session.get('machine', 'an unnamed machine')}, {session.get('shape', 'no shape')}"
    lines = [
        f"M3 on {where}, {session.get('layers', 'no')} layers; from one try a slot to {budget.TRIES:g}, as `--dry-run`",
        "| phase | rows or tokens | measured rate | minutes by it | minutes by the estimate | |",
        "| --- " * 6 + "|",
    ]
    for one in made:
        cells = [one["phase"], f"{between(one['count'], 0)} {one['unit']}".strip(), per_second(one)]
        cells += [between(one["minutes"], 1), between(one["estimate_minutes"], 1), one["note"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def per_second(one: Row) -> str:
    """The rate as one reads it: seconds of what happens seldom, else how many a second."""
    rate, unit = one["seconds_a_unit"], one["unit"]
    if rate is None:
        return ""
    return f"{rate:.3g} s" if unit in ("once", "saves") else f"{1 / max(rate, 1e-12):,.4g} {unit}/s"


def between(values: Sequence[float] | None, digits: int) -> str:
    if values is None:
        return ""
    low, high = (f"{value:,.{digits}f}" for value in values)
    return low if low == high else f"{low} to {high}"
