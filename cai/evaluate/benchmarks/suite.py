"""One measurement of benchmarks on a run, start to end: files, answers, judges, figures, eval/benchmarks.json.

Owns the order (all answers before any judge is loaded) and what a result says about itself: file checksum, prompt
sha256, judge, whether the judge is proven, limit. Each part lives in its own module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from cai import errors
from cai.errors import CaiError
from cai.evaluate import arms as beside
from cai.evaluate.benchmarks import answers, check_cases, figures, verdicts
from cai.evaluate.benchmarks.answers import ARMS, BASE, TUNED
from cai.evaluate.benchmarks.loaders import Task, judge_prompts, load, refusal_prompt
from cai.evaluate.benchmarks.plans import BenchmarkPlan, all_plans
from cai.evaluate.benchmarks.sources import NAMES, Found, is_near, obtain
from cai.evaluate.benchmarks.verdicts import REGEX, JudgedAnswer
from cai.metrics.figure import Figure, Figures, by_metric
from cai.metrics.names import OVER
from cai.models import auxiliary, checks
from cai.models.auxiliary import Auxiliary
from cai.models.checks import JudgeCheck
from cai.recipe.settings_benchmarks import STAND_IN, BenchmarksSection
from cai.run import loop
from cai.run.context import Context
from cai.run.lines import command, near
from cai.store.files import write_json_atomic
from cai.store.jsonl import JsonObject, Row, read_object
from cai.store.records import RecordLog
from cai.terminal import say

JUDGED_AT_ONCE = 32
JUDGE_TOKENS = 1024  # of its explanation at most
JUDGE_NAMES = {REGEX: "regular expression"}
OTHER_CLASSIFIERS = ("val-cls", "multimodal")  # HarmBench's further classifiers, each with its own prompt
REMEDY = 'Download it with access to its licence, give a local folder, or write "stand-in" for a trial.'


def measure_all(context: Context, names: Sequence[str], folder: Path, limit: int = 0) -> Figures:
    """See `cai.evaluate.benchmarks.suite`."""
    section = context.recipe.benchmarks
    plans = all_plans(context, names, folder, limit or section.limit)
    for name, of_name in zip(names, plans, strict=True):
        if any(_is_left(context, plan) for plan in of_name):
            require_judge(name, section)
    for of_arm in zip(*plans, strict=True):  # arm by arm: one switch of the adapter each
        for plan in of_arm:
            with answers.open_log(context, plan.stem, plan.mark) as log:
                plan.answered = answers.answer(plan.policy, log, plan.name, plan.tasks, plan.tokens, plan.asked)
    found: Figures = {}
    for of_name in plans:
        rows, check = _judge(context, of_name)
        found |= _figures(of_name[0], rows[0], check)
        for plan, own in zip(of_name[1:], rows[1:], strict=True):
            found |= _arm_figures(plan, own, rows[0], check)
    _write(context, found, names)
    return figures.with_holm(found)


def require_judge(name: str, section: BenchmarksSection) -> None:
    """Exit 2 where the judge cannot be had, or is none for this benchmark."""
    judge = section.judge_of(name)
    if judge == REGEX and name != "xstest":
        raise CaiError(f'benchmarks.{name}_judge: "regex" judges XSTest only. Give a model or "stand-in".')
    if name == "harmbench" and any(part in judge.lower() for part in OTHER_CLASSIFIERS):
        raise CaiError(
            f"benchmarks.harmbench_judge: {judge} was trained with another prompt. Use cais/HarmBench-Llama-2-13b-cls."
        )
    if judge != REGEX:
        auxiliary.require(judge, f"benchmarks.{name}_judge", REMEDY)


def _judge(context: Context, plans: Sequence[BenchmarkPlan]) -> tuple[list[list[Row]], JudgeCheck | None]:
    """Verdicts of a benchmark's plans and the check of its judge, which is loaded only if a row is missing."""
    plan, name, cases = plans[0], plans[0].judge, [_cases(each) for each in plans]
    with ExitStack() as stack:
        logs = [stack.enter_context(_open_verdicts(context, each)) for each in plans]
        check_log = stack.enter_context(checks.open_log(context, plan.name, _check_mark(context, plan)))
        left = any(log.get(*key) is None for log, each in zip(logs, cases, strict=True) for key in each)
        judge = None
        if name != REGEX and (left or checks.is_left(context, check_log, plan.name)):
            judge = stack.enter_context(auxiliary.loaded(context, name, f"benchmarks.{plan.name}_judge"))

        def said(rows: Sequence[Row]) -> list[bool | None]:
            found = _verdict_rows(context, plan, judge, check_cases.cases(plan.name, rows))
            return check_cases.verdicts_of(plan.name, rows, found)

        check = checks.measure(context, check_log, plan.name, JUDGE_NAMES.get(name, name), said)
        found: list[list[Row]] = []
        for each, log, of in zip(plans, logs, cases, strict=True):
            size = loop.together(context, JUDGED_AT_ONCE, len(of))
            for part in loop.left(context, log, f"judge {each.stem}", list(of), size):
                rows = _verdict_rows(context, each, judge, [of[key] for key in part])
                loop.write(context, log, part, rows)
            found.append(loop.rows_of(log, of))
        return found, check


def _open_verdicts(context: Context, plan: BenchmarkPlan) -> RecordLog:
    mark = verdicts.fingerprint(plan.name, plan.judge, plan.prompts, plan.mark, JUDGE_TOKENS)
    return answers.open_log(context, f"{plan.stem}.verdicts", mark)


def _is_left(context: Context, plan: BenchmarkPlan) -> bool:
    """Whether a verdict is missing: a resume with nothing left needs no judge."""
    with _open_verdicts(context, plan) as log:
        return not all(
            log.has(a, task.item, turn) for a in plan.asked for task in plan.tasks for turn in range(len(task.turns))
        )


def _check_mark(context: Context, plan: BenchmarkPlan) -> str:
    """What a judge's answers to its check set depend on, the benchmark's own rows left out."""
    of = checks.model_mark(context) if plan.judge == STAND_IN else ""
    return verdicts.fingerprint(plan.name, plan.judge, plan.prompts, of, JUDGE_TOKENS)


def _verdict_rows(
    context: Context, plan: BenchmarkPlan, judge: Auxiliary | None, cases: Sequence[JudgedAnswer]
) -> list[Row]:
    if judge is None:
        return verdicts.refusals_by_regex(cases)
    if plan.name == "harmbench":
        return verdicts.harm(judge, cases, context)
    if plan.name == "xstest":
        return verdicts.refusals(judge, cases, plan.prompts, context)
    return verdicts.ratings(judge, cases, plan.prompts, JUDGE_TOKENS, context)


def _cases(plan: BenchmarkPlan) -> dict[tuple[str, int, int], JudgedAnswer]:
    by_item = {task.item: task for task in plan.tasks}
    texts = {(row["arm"], row["item"], row["round"]): row["text"] for row in plan.answered}
    return {
        (row["arm"], row["item"], row["round"]): JudgedAnswer(
            by_item[row["item"]], row, texts.get((row["arm"], row["item"], 0), "") if row["round"] else ""
        )
        for row in plan.answered
        if row["arm"] in ARMS
    }


def _figures(plan: BenchmarkPlan, rows: Sequence[Row], check: JudgeCheck | None) -> Figures:
    facts = {
        **plan.loaded.facts,
        "rows": len(plan.tasks),
        "rows_in_file": plan.loaded.counts["rows"],
        "counts": plan.loaded.counts,
        "judge_prompts": plan.prompts_are,
        "judge_prompt_sha256": verdicts.prompt_sha(plan.name, plan.prompts),
        "stand_in": plan.judge == STAND_IN,
        "proven": check is not None and check.proven,
        "trial": len(plan.tasks) < len(plan.loaded.tasks),
        "max_new_tokens": plan.tokens,
    }
    judge = checks.label(JUDGE_NAMES.get(plan.judge, plan.judge), check)
    if facts["trial"]:
        judge += f", TRIAL on {len(plan.tasks)} of {len(plan.loaded.tasks)} rows"
    compute = {"harmbench": figures.harmbench, "xstest": figures.xstest, "mtbench": figures.mtbench}[plan.name]
    found = compute(plan.tasks, rows, judge, facts)
    found |= figures.unsafe_compliance(plan.tasks, plan.answered) if plan.name == "xstest" else {}
    return found | figures.degeneration(plan.name, plan.answered)


def _tell_identical(context: Context, found: Figures, names: Sequence[str]) -> None:
    """An event for each benchmark whose arms gave the same answers: the report lists it."""
    for name in names:
        figure = found.get(f"{name}.same_as_base")
        if figure is not None and figures.did_nothing(figure):
            context.run.event("identical_answers", benchmark=name, n=figure.n)


def _arm_figures(plan: BenchmarkPlan, rows: list[Row], first: list[Row], check: JudgeCheck | None) -> Figures:
    """An arm against the base, and the run's own against the arm. `first`: verdicts of base and tuned."""
    arm = plan.policy.name
    base, tuned = ([row for row in first if row["arm"] == of] for of in (BASE, TUNED))
    found = beside.named(_figures(plan, [*base, *rows], check), arm)
    swapped = _figures(plan, [*({**row, "arm": BASE} for row in rows), *tuned], check)
    gains = [beside.over(figure, arm) for name, figure in swapped.items() if name in figures.PRIMARY]
    return found | by_metric(*gains)


def _write(context: Context, found: Figures, names: Sequence[str]) -> None:
    """eval/benchmarks.json: these figures, those of benchmarks measured before, Holm over all primary ones."""
    path = context.run.eval / "benchmarks.json"
    kept = {k: v for k, v in read(path).items() if OVER.sub("", k).split(".")[0] not in names}
    _tell_lost(context, kept, names)
    merged = figures.with_holm({**kept, **found})
    write_json_atomic(path, {"figures": {name: figure.as_dict() for name, figure in merged.items()}})
    context.run.event("benchmarks", names=list(names), figures=len(found))
    _tell_identical(context, found, names)


def _tell_lost(context: Context, kept: Figures, names: Sequence[str]) -> None:
    """Say which benchmarks were judged before and have no figure any more: their records are enough to make them."""
    judged = [name for name in NAMES if (context.run.eval / "benchmarks" / f"{name}.verdicts.jsonl").is_file()]
    if lost := [name for name in judged if name not in names and not any(k.startswith(f"{name}.") for k in kept)]:
        run = near(context.run.path)
        again = command(run / "recipe.toml", "--benchmark", ",".join(lost), "--resume", run)
        say(f"benchmarks.json: no whole figures of {', '.join(lost)} in it. Make them again from the records: {again}")


def read(path: Path) -> Figures:
    """The whole figures of a results file; none where there is no such file."""
    rows = read_object(path).get("figures")
    found = {name: _measured(row) for name, row in rows.items()} if isinstance(rows, dict) else {}
    return {name: figure for name, figure in found.items() if figure is not None}


def _measured(row: Row) -> Figure | None:
    try:
        figure = Figure(**{**row, "worst": tuple(row.get("worst", ()))})
    except (TypeError, AttributeError):  # no figure, or not one of ours
        return None
    numbers = all(isinstance(value, int | float | None) for value in (figure.value, figure.low, figure.high))
    return figure if numbers and isinstance(figure.facts, dict) else None


def parse_names(text: str) -> list[str]:
    """`harmbench,xstest` -> names, each known and once."""
    names = list(dict.fromkeys(part.strip().lower() for part in text.split(",") if part.strip()))
    unknown = [name for name in names if name not in NAMES]
    if unknown or not names:
        raise CaiError(f"--benchmark: {(unknown or [text])[0]!r} is unknown. Known: {', '.join(NAMES)}.")
    return names


def require(section: BenchmarksSection, folder: Path) -> None:
    """Exit 2 where a file or judge of `benchmarks.run` cannot be had, or a file is not what it should be."""
    check_files(section.run, section, folder)
    for name in section.run:
        require_judge(name, section)


def check_files(names: Sequence[str], section: BenchmarksSection, folder: Path) -> None:
    """Exit 2 where a file of these benchmarks cannot be had or read: all of them at once, one line each."""
    readers: dict[str, Callable[[Found], object]] = dict.fromkeys(names, load)
    if "mtbench" in names:
        readers["mtbench_prompts"] = judge_prompts
    if "xstest" in names and section.xstest_prompt:
        readers["xstest_prompt"] = refusal_prompt
    faults = []
    for name, reader in readers.items():
        try:
            reader(obtain(name, section, folder))
        except CaiError as error:
            if error.code != errors.USAGE:
                raise
            faults.append(str(error))
    if faults:
        raise CaiError("\n".join(faults))


def at_hand(section: BenchmarksSection, folder: Path) -> tuple[dict[str, list[Task]], list[str]]:
    """The tasks of every benchmark that needs no download, or that the milestone runs; the names of the others."""
    here = [name for name in NAMES if is_near(name, section) or name in section.run]
    loaded = {name: load(obtain(name, section, folder)).tasks for name in here}
    return loaded, [name for name in NAMES if name not in here]


def lines(found: JsonObject) -> list[str]:
    """The headline figures for the screen."""
    parts = ("asr", "over_refusal", "score")
    shown = [name for name in found if name in figures.PRIMARY or name.split(".")[1] in parts]
    return [f"{name} {found[name].text}, judge: {found[name].judge}" for name in shown]
