"""Money and time: what a milestone will take, whether it fits, and the stop at a limit.

Owns the estimate (a range, with where its rates come from), the refusal to start what cannot fit, and the stop at
`budget.max_usd` and `budget.max_hours` over all attempts. Doesn't own the clock (run.spent) nor how a stage stops (the
context's `stopped` and `check_stop`, which this module extends). Nothing here is a measurement of its own: rates come
from earlier runs' events, else from the table of measured rates in cai.run.rates.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from cai.errors import CaiError, Stopped
from cai.recipe.arm_costs import answers_further_requests
from cai.recipe.load import Recipe
from cai.recipe.settings import BudgetSection, DpoSection
from cai.run import arm_rates, lines, standing
from cai.run.arm_rates import SHORT
from cai.run.folder import Run
from cai.run.rates import HIGH, LOW, Range, Speed, measured_before, scored_seconds, table_rates
from cai.run.standing import Standing
from cai.store.jsonl import Row
from cai.terminal import duration, printable, usd, usd_fine
from cai.world import world

if TYPE_CHECKING:
    import argparse

    from cai.run.context import Context

SIDE_BY_SIDE = 8  # rows of what is generated once a run
TRIES = 1.5  # items tried a slot at the upper end, where no run says better


@dataclass(frozen=True)
class Estimate:
    """`tokens`: generated ones. Seconds of generation, training and the rest; None where no rate is known."""

    tokens: Range
    generation: Range | None
    training: Range | None
    rest: Range | None
    source: str
    usd_per_hour: float

    @property
    def seconds(self) -> Range | None:
        """The sum of what is known; None if not even generation is."""
        if self.generation is None:
            return None
        known = [part for part in (self.generation, self.training, self.rest) if part is not None]
        return Range(sum(part.low for part in known), sum(part.high for part in known))

    @property
    def usd(self) -> Range | None:
        seconds = self.seconds
        if seconds is None or not self.usd_per_hour:
            return None
        return Range(seconds.low / 3600 * self.usd_per_hour, seconds.high / 3600 * self.usd_per_hour)

    @property
    def missing(self) -> list[str]:
        """Which parts have no measured rate."""
        parts = {"generation": self.generation, "training": self.training, "loading and evaluation": self.rest}
        return [name for name, value in parts.items() if value is None]

    @property
    def line(self) -> str:
        """One sentence: time, money, where the rates come from, what is not in it."""
        if self.seconds is None:
            return f"no estimate: {self.source}"
        low, high = duration(self.seconds.low), duration(self.seconds.high)
        money = f", {usd(self.usd.low)} to {usd(self.usd.high)}" if self.usd else ""
        without = f"; not counted, for no rate was measured: {', '.join(self.missing)}" if self.missing else ""
        return f"{low} to {high}{money} (rates: {self.source}{without})"


def estimate(
    recipe: Recipe,
    backend: str,
    root: Path,
    limit_tokens: int,
    once_tokens: int = 0,
    stands: Standing | None = None,
) -> Estimate:
    """Time and money of this milestone from the latest finished run of the same model, else from the table.

    `once_tokens`: at most generated once a run, whatever its items (the probes). `stands`: what a fork took over.
    """
    earlier = None if recipe.pairs.file else measured_before(root, recipe, backend)  # one that generated says too much
    found = _from_run(recipe, earlier) if earlier else _divided(_from_table(recipe, backend, limit_tokens))
    if stands is not None:
        slots = slot_count(recipe)
        time = stands.drawing(found.generation, slots) if found.generation else None
        others = stands.rest(found.rest, earlier, slots) if found.rest else None
        found = replace(found, tokens=stands.drawing(found.tokens, slots), generation=time, rest=others)
    for arm in arm_rates.left(recipe, backend, earlier, stands.own_answers if stands else 0):
        found = _with_arm(found, arm)
    if not once_tokens or (earlier and earlier.probed):
        return found
    more, seconds = arm_rates.drawing(once_tokens, SIDE_BY_SIDE, backend, earlier)
    rest = found.rest.plus(seconds) if found.rest and seconds else found.rest
    return replace(found, tokens=found.tokens.plus(more), rest=rest)


def hourly(recipe: Recipe) -> float:
    """Of all processes: each has a GPU of its own."""
    return recipe.budget.usd_per_hour * world().size


def _divided(found: Estimate) -> Estimate:
    """For several processes from the rates of one: at best each does its part in its part of the time."""
    size = world().size
    if size == 1 or found.generation is None:
        return found
    training = found.training and Range(found.training.low / size, found.training.high)
    generation = Range(found.generation.low / size, found.generation.high)
    source = f"{found.source}; the low end divided by {size} processes"
    return replace(found, generation=generation, training=training, source=source)


def _with_arm(found: Estimate, arm: arm_rates.TimedArm) -> Estimate:
    time, more = found.generation, arm.seconds
    return replace(found, tokens=found.tokens.plus(arm.tokens), generation=time.plus(more) if time and more else time)


def slot_count(recipe: Recipe) -> int:
    return recipe.items + recipe.heldout.items


def training_pairs_seen(recipe: Recipe) -> float:
    """Pairs that pass through the training, repetitions counted, for every seed; an SFT row is half a pair."""
    batch = recipe.dpo.batch_size * recipe.dpo.gradient_accumulation

    def seen(dpo: DpoSection, rows: int) -> float:
        return float((dpo.max_steps or math.ceil(dpo.epochs * rows / batch)) * batch)

    shown = recipe.items + (recipe.sft.answers if answers_further_requests(recipe) else 0)
    second = 0.5 * seen(recipe.sft.recipe(recipe.dpo), shown) if recipe.has_sft else 0.0
    return seen(recipe.dpo, recipe.items) * (len(recipe.dpo.seeds) + recipe.dpo.also_from_base) + second


def _from_run(recipe: Recipe, run: Speed) -> Estimate:
    scale = slot_count(recipe) / max(run.slots, 1)
    rounds = (1 + recipe.rounds) / (1 + run.rounds)  # a round is a critique and a revision, the rest about one more
    gain = table_rates(run.backend).gain(run.slots, slot_count(recipe))
    generation = run.generation_seconds * scale * rounds
    training = None
    if run.pairs_seen:
        seconds = run.training_seconds / run.pairs_seen * training_pairs_seen(recipe)
        training = Range(seconds * LOW, seconds * HIGH)
    tokens = run.tokens * scale * rounds
    rest = run.rest_seconds + run.growing_seconds * (max(scale, 1.0) - 1.0)
    return Estimate(
        tokens=Range(tokens * LOW, tokens * HIGH),
        generation=Range(generation * LOW / gain, generation * HIGH / gain),
        training=training,
        rest=Range(rest * LOW, rest * HIGH),
        source=f"run {run.run_id}, {run.slots} item{'s' * (run.slots != 1)} in {duration(run.seconds)}",
        usd_per_hour=hourly(recipe),
    )


def _from_table(recipe: Recipe, backend: str, limit_tokens: int) -> Estimate:
    rates = table_rates(backend)
    limit = slot_count(recipe) * limit_tokens
    tokens = Range(limit * SHORT, limit * TRIES)  # a completion uses SHORT of its limit at least, all of it at most
    if not rates.tokens_per_second:
        return Estimate(tokens, None, None, None, rates.source, hourly(recipe))
    speed = rates.at(slot_count(recipe))
    pairs = training_pairs_seen(recipe)
    pair = rates.seconds_per_pair
    start = rates.set_up or Range(0.0, 0.0)
    training = Range(pair.low * pairs + start.low, pair.high * pairs + start.high) if pair else None
    scored = slot_count(recipe) * sum(scored_seconds(recipe, rates).values())
    return Estimate(
        tokens=tokens,
        generation=Range(tokens.low / speed + scored, tokens.high / speed + TRIES * scored),
        training=training,
        rest=rates.rest,
        source=rates.source,
        usd_per_hour=hourly(recipe),
    )


class Budget:
    """The limits of a recipe against what a run has spent, over all its attempts."""

    def __init__(self, section: BudgetSection, run: Run) -> None:
        self.section, self.run = section, run
        self._said = False

    @property
    def limited(self) -> bool:
        return world().first and bool(self.section.max_usd or self.section.max_hours)

    def over(self) -> bool:
        """Whether a limit is reached. Cheap: asked after every completion."""
        if not self.limited:
            return False
        spent = self.run.spent()
        too_dear = bool(self.section.max_usd) and spent["usd"] >= self.section.max_usd
        return too_dear or (bool(self.section.max_hours) and spent["seconds"] >= self.section.max_hours * 3600)

    def check(self, where: str = "") -> None:
        """Errors: Stopped (exit 75) at a limit, with what was spent and the line that goes on."""
        if self.over():
            raise Stopped(self._message(where))

    def _message(self, where: str) -> str:
        spent, section = self.run.spent(), self.section
        used = f"{duration(spent['seconds'])}, {usd_fine(spent['usd'])} over {int(spent['attempts'])} attempt(s)"
        limits = {"budget.max_usd": section.max_usd, "budget.max_hours": section.max_hours}
        limits = {name: value for name, value in limits.items() if value}
        named = ", ".join(f"{name} = {value:g}" for name, value in limits.items())
        gone = {"budget.max_usd": spent["usd"], "budget.max_hours": spent["seconds"] / 3600}
        raised = [f"{name}={2 * max(value, gone[name]):.4g}" for name, value in limits.items()]
        return (
            f"{lines.near(self.run.path)}: the budget is used up{' ' + where if where else ''}: {used} ({named}). "
            f"Raise it and go on: {lines.resume(self.run.path, raised)}"
        )

    def install(self, context: Context) -> None:
        """Make the context's `stopped` and `check_stop` mind the budget as well as the signals."""
        asked, check = context.stopped, context.check_stop

        def stopped() -> bool:
            return bool(asked()) or self._over_aloud()

        def check_stop(where: str) -> None:
            check(where)
            self.check(where)

        stopped.__dict__["hold"] = getattr(asked, "hold", nullcontext)  # a save is not cut short
        context.stopped, context.check_stop = stopped, check_stop

    def _over_aloud(self) -> bool:
        """`over`, said once on stderr: a training step that stops for it knows only that it was stopped."""
        over = self.over()
        if over and not self._said:
            self._said = True
            sys.stderr.write(printable(f"{self._message('')} Stopping after what is in flight.\n"))
        return over


class Planned(Protocol):
    """What an estimate asks of a run's inputs."""

    @property
    def recipe(self) -> Recipe: ...

    @property
    def backend(self) -> str: ...

    @property
    def limit_tokens(self) -> int: ...

    @property
    def once_tokens(self) -> int: ...


def check_before(inputs: Planned, args: argparse.Namespace, root: Path) -> None:
    """Refuse what cannot fit, before there is a run folder below `root`; `--over-budget` starts it all the same.

    A resumed run is not refused: what it has spent and done is known, and the limits stop it in time.
    Errors: CaiError (exit 2) naming the limit and the estimate's lower end.
    """
    if not args.resume and not args.over_budget:
        _refuse(inputs.recipe, estimate(inputs.recipe, inputs.backend, root, inputs.limit_tokens, inputs.once_tokens))


@contextmanager
def enforced(context: Context, inputs: Planned, report: Callable[[Run], None]) -> Iterator[Estimate]:
    """What happens inside keeps to the budget: it is stopped at a limit, with what exists reported by `report`.

    Wherever the stop was seen (between completions, in a training step, while evaluating), it ends here: as Stopped
    with the line that goes on.
    """
    budget = Budget(inputs.recipe.budget, context.run)
    try:
        yield announce(context, inputs)
    except Stopped:
        context.progress.cut()
        if not budget.over():
            raise
        where = f"in {context.progress.name}" if context.progress.stage else "before anything was done"
        context.run.event("budget_stop", where=where, **budget.run.spent())
        with suppress(Exception):  # that no report can be written is no reason to go on spending
            report(context.run)
        budget.check(where)
        raise


def announce(context: Context, inputs: Planned) -> Estimate:
    """Say what the milestone will take, and mind the limits from now on. Error: Stopped when nothing is left."""
    recipe, run = inputs.recipe, context.run
    budget = Budget(recipe.budget, run)
    budget.check("before anything was done")
    stands, root = standing.of_run(run.path), run.path.parent
    found = estimate(recipe, inputs.backend, root, inputs.limit_tokens, inputs.once_tokens, stands)
    if not any(event["kind"] == "estimate" for event in run.events()):  # a fork's first attempt only took rows over
        run.event("estimate", **_event(found))
        if inputs.backend != "fake":
            print(f"estimate: {printable(found.line)}", flush=True)
    if budget.limited:
        budget.install(context)
    context.progress.expected = found.seconds
    context.stopped = context.progress.watch(context.stopped)
    return found


def _event(found: Estimate) -> Row:
    seconds, money = found.seconds, found.usd
    return {
        "seconds_low": round(seconds.low, 1) if seconds else None,
        "seconds_high": round(seconds.high, 1) if seconds else None,
        "usd_low": round(money.low, 4) if money else None,
        "usd_high": round(money.high, 4) if money else None,
        "source": found.source,
        "missing": found.missing,
    }


def _refuse(recipe: Recipe, found: Estimate) -> None:
    """Only the lower end decides: what may fit is started, and stopped at the limit."""
    section, seconds, money = recipe.budget, found.seconds, found.usd
    faults = []
    if section.max_hours and seconds and seconds.low > section.max_hours * 3600:
        faults.append(f"budget.max_hours = {section.max_hours:g}: at least {duration(seconds.low)} are needed")
    if section.max_usd and money and money.low > section.max_usd:
        faults.append(f"budget.max_usd = {section.max_usd:g}: at least {usd(money.low)} are needed")
    if faults:
        raise CaiError(
            f"{recipe.milestone} does not fit: {'; '.join(faults)} (rates: {found.source}). "
            "Raise the limit, lower items, or start it all the same with --over-budget."
        )
