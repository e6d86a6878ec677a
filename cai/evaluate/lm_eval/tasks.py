"""Tasks of the lm_eval package on the loaded model, arm by arm, as records; base against tuned document by document.

Owns the border to the optional package (versions, messages, its one call), eval/lm_eval.jsonl and the figures
`forgetting.<task>_delta`. Rows of that log: every request answered, every document's score, and a last one a task and
arm. A task that is finished needs neither the package nor the model again. The engine's side is `replay`.
"""

from __future__ import annotations

import difflib
import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai.errors import CaiError
from cai.evaluate.lm_eval.replay import HarnessRequest, Replay, Unanswered, answer
from cai.evaluate.scores import Evaluation, model_name, weights_of
from cai.metrics.figure import Figure, Figures, by_metric, paired, unmeasured
from cai.recipe.prompts import digest
from cai.recipe.settings_evaluation import EvaluationSection
from cai.run.loop import open_marked
from cai.store import records
from cai.store.jsonl import Row
from cai.store.records import RecordLog

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

Scores = dict[tuple[str, int], float | None]  # (leaf task, document) -> score; None: a number in it is not finite
VERSION = "0.4.13"
INSTALL = f"Install it with `make lm-eval` (lm_eval=={VERSION}), or empty evaluation.lm_eval."
KEY = ("arm", "item", "round")
ARMS = ("base", "tuned")
STEM = "lm_eval"
PREFERRED = ("acc_norm", "acc", "exact_match", "prompt_level_strict_acc", "f1", "em")
ANSWERED_AT_ONCE = 64  # requests between two writes: what a kill loses
PASSES = 5  # calls of lm_eval for one task and arm: to learn what it asks, for each kind of request, and to score


def require(section: EvaluationSection, folder: Path) -> None:
    """Exit 2, before anything is generated, where the package or a task cannot be had."""
    if section.enabled and section.lm_eval:
        manager = tasks_at_hand(section, folder)
        for name in section.lm_eval:
            check_task(manager, name)


def require_package(section: EvaluationSection, folder: Path) -> Path | None:
    """The recipe's own folder of tasks, if any, after the quick checks: nothing is imported."""
    try:
        installed = version("lm_eval")
    except PackageNotFoundError:
        raise CaiError(f"evaluation.lm_eval: the package lm_eval is not installed. {INSTALL}") from None
    if installed != VERSION:
        told = f"lm_eval {installed} is installed, {VERSION} is what this was tried with"
        raise CaiError(f"evaluation.lm_eval: {told}. {INSTALL}")
    include = folder / section.lm_eval_include if section.lm_eval_include else None
    if include is not None and not include.is_dir():
        raise CaiError(
            f"evaluation.lm_eval_include: {include}: no such folder. Give the one that holds your task YAML."
        )
    return include


def tasks_at_hand(section: EvaluationSection, folder: Path) -> TaskManager:
    """lm_eval's task manager with the recipe's own folder."""
    include = require_package(section, folder)
    with console_muted():
        from lm_eval.tasks import TaskManager

        return TaskManager(include_path=str(include) if include else None)


def check_task(manager: TaskManager, name: str) -> None:
    """Known, loadable with its documents, and nothing that runs code or wants images. Errors: CaiError, one line."""
    if name not in manager.all_tasks:
        near = difflib.get_close_matches(name, manager.all_tasks, 1)
        hint = f"Did you mean {near[0]}?" if near else "Tasks of your own: set evaluation.lm_eval_include."
        raise CaiError(f"evaluation.lm_eval: {name!r} is no task of lm_eval {VERSION}. {hint}")
    try:
        with console_muted():
            loaded = manager.load([name])["tasks"]
    except Exception as error:  # datasets, networks and task code raise what they like
        raise CaiError(
            f"evaluation.lm_eval: {name}: its task cannot be loaded: {described(error)}. "
            "Check the network (or HF_HOME of a downloaded copy), or leave the task out."
        ) from None
    for leaf, task in loaded.items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            why = "runs code that the model wrote" if getattr(task, "UNSAFE_CODE", False) else "wants images"
            raise CaiError(f"evaluation.lm_eval: {name}: its part {leaf} {why}. Leave the task out.")


def described(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


@contextmanager
def console_muted() -> Iterator[None]:
    """No banners, bars and warnings of lm_eval and datasets on the console."""
    logging.getLogger("lm_eval").setLevel(logging.CRITICAL)
    sink = io.StringIO()
    with redirect_stdout(sink), redirect_stderr(sink), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# --- measuring


def measure(
    evaluation: Evaluation, folder: Path, arms: Sequence[str] = ARMS, stem: str = STEM
) -> dict[str, dict[str, Scores]]:
    """task -> arm -> scores; what is missing is measured. Errors: Stopped; CaiError (package, tasks)."""
    section = evaluation.section
    if not section.lm_eval:
        return {}
    with open_marked(
        evaluation.context, evaluation.context.run.eval / f"{stem}.jsonl", fingerprint(evaluation), KEY
    ) as log:
        todo = [(name, arm) for name in section.lm_eval for arm in arms if log.get(*done_key(name, arm)) is None]
        manager = tasks_at_hand(section, folder) if todo else None
        for name, arm in todo:
            check_task(manager, name)
            _measure_task(evaluation, log, manager, name, arm)
        return {name: {arm: scores_of(log.rows, name, arm) for arm in arms} for name in section.lm_eval}


def stored(evaluation: Evaluation, arms: Sequence[str] = ARMS, stem: str = STEM) -> dict[str, dict[str, Scores]]:
    """The same from a log that another arm wrote; nothing is measured."""
    rows = records.read(evaluation.context.run.eval / f"{stem}.jsonl", KEY)
    return {name: {arm: scores_of(rows, name, arm) for arm in arms} for name in evaluation.section.lm_eval}


def fingerprint(evaluation: Evaluation) -> str:
    """16 hex of what an answer depends on beside its request: weights, adapter, package, window, documents a task."""
    settings = f"{VERSION}/{evaluation.context.recipe.model.max_seq_length}/{evaluation.section.lm_eval_limit}"
    return digest(model_name(evaluation.context).encode(), weights_of(evaluation.adapter), settings.encode())


def done_key(name: str, arm: str) -> tuple[str, int, int]:
    return (f"{arm}/{name}/done", 0, 0)


def _measure_task(evaluation: Evaluation, log: RecordLog, manager: TaskManager, name: str, arm: str) -> None:
    """One task on one arm: request rows, document rows, the last row."""
    replay = Replay(lambda item, number: log.get(arm, item, number))
    for _ in range(PASSES):
        try:
            results = evaluate(replay, manager, name, evaluation.section.lm_eval_limit)
            break
        except Unanswered as missing:
            _answer(evaluation, log, name, arm, missing.asks)
        except CaiError:
            raise
        except Exception as error:  # the task's own code, on the model's answers
            raise CaiError(
                f"evaluation.lm_eval: {name}: lm_eval failed on it: {described(error)}. Leave it out."
            ) from None
    else:
        raise CaiError(f"evaluation.lm_eval: {name}: it asks for something else at every call. Leave it out.")
    rows = document_rows(results["samples"])
    facts = {"v": 1, "arm": done_key(name, arm)[0], "item": 0, "round": 0, "documents": len(rows)}
    versions = {leaf: version for leaf, version in sorted(results.get("versions", {}).items())}
    log.append([{"v": 1, "arm": f"{arm}/{name}/{row.pop('leaf')}", **row} for row in rows])
    log.append([{**facts, "versions": versions}])


def evaluate(replay: Replay, manager: TaskManager, name: str, limit: int) -> Row:
    """One call of lm_eval. Errors: Missing, and whatever the task's code raises."""
    with console_muted():
        from lm_eval import simple_evaluate
        from lm_eval.api.model import LM

        calls = {call: _method(call) for call in ("loglikelihood", "loglikelihood_rolling", "generate_until")}
        lm = type("Replayed", (LM,), calls)()
        lm.replay = replay
        return simple_evaluate(
            model=lm, tasks=[name], limit=limit or None, bootstrap_iters=0, log_samples=True, task_manager=manager
        )


def _method(call: str) -> Callable[..., object]:
    def method(self: Any, requests: Sequence[object]) -> object:
        return getattr(self.replay, call)(requests)

    return method


def _answer(evaluation: Evaluation, log: RecordLog, name: str, arm: str, asks: Sequence[HarnessRequest]) -> None:
    """The missing requests by the engine, written slice by slice."""
    unique = list({(ask.item, ask.number): ask for ask in asks}.values())
    progress, size = evaluation.context.progress, ANSWERED_AT_ONCE
    progress.begin(f"evaluate lm_eval {name} {arm}", 0, total=len(unique))
    with evaluation.model().adapter(arm != "base"):
        engine = evaluation.engine()
        for start in range(0, len(unique), size):
            rows = answer(evaluation.model(), engine, unique[start : start + size], evaluation.context.stopped)
            log.append([{"v": 1, "arm": arm, "task": name, **row} for row in rows])
            evaluation.context.check_stop("while lm_eval asks")
            progress.step(0, len(rows))
            progress.committed([{"status": "ok"}] * len(rows))
    progress.end()


def document_rows(samples: Mapping[str, Sequence[Row]]) -> list[Row]:
    """Every document's score by its task's first filter and preferred metric; a task without one gives no row.

    Null where a likelihood of its answers is no number: the largest of several NaN is the first answer, right or wrong.
    """
    rows: list[Row] = []
    for leaf, documents in samples.items():
        first = [row for row in documents if row["filter"] == documents[0]["filter"]]
        metric = next((m for m in (*PREFERRED, *first[0]["metrics"]) if _is_score(first[0].get(m))), None)
        if metric is not None:
            rows += [
                {"leaf": leaf, "item": int(row["doc_id"]), "round": 0, "score": _of(row, metric), "metric": metric}
                for row in first
            ]
    return rows


def _of(document: Row, metric: str) -> float | None:
    value = float(document[metric])
    return value if math.isfinite(value) and _finite(document.get("resps")) else None


def _finite(value: object) -> bool:
    """No float in these nested lists and tuples is NaN or infinite."""
    if isinstance(value, list | tuple):
        return all(map(_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _is_score(value: object) -> bool:
    return isinstance(value, int | float) or type(value).__name__ in ("float64", "float32", "bool_", "int64")


# --- figures


def scores_of(rows: Sequence[Row], name: str, arm: str) -> Scores:
    head = f"{arm}/{name}/"
    mine = [row for row in rows if str(row["arm"]).startswith(head) and "score" in row]
    return {(row["arm"].removeprefix(head), row["item"]): row["score"] for row in mine}


def figures(measured: Mapping[str, Mapping[str, Scores]]) -> Figures:
    """`forgetting.<task>_delta`: tuned - base over documents scored on both arms."""
    return by_metric(*(delta(name, arms.get("base", {}), arms.get("tuned", {})) for name, arms in measured.items()))


def delta(name: str, base: Scores, tuned: Scores) -> Figure:
    """Mean difference with its bootstrap interval; exact McNemar where every score is 0 or 1, else Wilcoxon."""
    metric, judge = f"forgetting.{name}_delta", f"lm_eval {VERSION}"
    pairs = {key: (base.get(key), tuned.get(key)) for key in {**base, **tuned}}
    both = {key: (a, b) for key, (a, b) in pairs.items() if a is not None and b is not None}
    lost = len(pairs) - len(both)
    if not both:
        return unmeasured(metric, "lm_eval gives no score a document for this task", judge, lost)
    first, second = [a for a, _ in both.values()], [b for _, b in both.values()]
    found = paired(metric, first, second, judge, lost, yes_no={*first, *second} <= {0.0, 1.0})
    found.facts["parts"] = len({leaf for leaf, _ in both})
    return found
