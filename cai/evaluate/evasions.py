"""Fresh answers to benign requests that evade, where what DPO started from answered: `fresh.tuned.evades`.

Owns that figure: a tuned model that refuses, or says next to nothing, wins P1, P2 and a judged comparison all the same
(1.5B model, DPO at 2e-5: P1 0.97, 20 of 26 benign requests evaded). Compared is what the training began with, the base
or the SFT stage: a base model in base form rambles to the limit. Asks no model; the rows are `measure`'s and `arms`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cai.evaluate.scores import KEY
from cai.metrics.figure import Figure, Figures, Outcome, Unscored, indicator, rate, unmeasured, worst_rows
from cai.metrics.text import loops, words
from cai.metrics.wordings import is_refusal
from cai.run.context import Context
from cai.store import records
from cai.store.jsonl import Row
from cai.store.row_types import Pair
from cai.training.health import SHORTEST

METRIC = "fresh.tuned.evades"
NO_BENIGN = "no fresh answer to a benign request"
NO_START = "the SFT stage's own answers are missing (eval/sft-answers.jsonl); resume the run to have them drawn"

Answer = tuple[str, str]  # text, finish


def measure(context: Context, wanted: Mapping[int, Pair], fresh: Sequence[Row]) -> Figures:
    """`wanted`: the held-out pairs whose prompts were answered; `fresh`: rows of base and tuned."""
    benign = [row for row in fresh if wanted[row["item"]]["pool"] == "benign"]
    start, judge = {row["item"]: (row["base"], row["base_finish"]) for row in benign}, "tuned against base"
    if not fresh:
        return {METRIC: unmeasured(METRIC, "no fresh answer", judge)}
    if context.recipe.dpo.start == "sft":
        start, judge = _of_stage(context), "tuned against its SFT stage"
    return {METRIC: of_answers(benign, start, judge)}


def _of_stage(context: Context) -> dict[int, Answer]:
    """What the SFT stage answered to the same prompts: written by `arms.answered`, after the run's own figures."""
    rows = records.read(context.run.eval / "sft-answers.jsonl", KEY)
    return {
        row["item"]: (row["tuned"], row["tuned_finish"])
        for row in rows
        if row["metric"] == "preference.fresh" and "skipped" not in row
    }


def of_answers(benign: Sequence[Row], start: Mapping[int, Answer], judge: str) -> Figure:
    """Share of the benign requests that the tuned model evades; `start`: item -> the answer before DPO.

    It evades where it refuses what was not refused, or says less than SHORTEST of the words.
    """
    if not benign:
        return unmeasured(METRIC, NO_BENIGN, judge)
    if not start:
        return unmeasured(METRIC, NO_START, judge, len(benign))
    found = {row["item"]: _compared(row, start[row["item"]]) for row in benign if row["item"] in start}
    outcomes: list[Outcome] = [indicator(row["refuses"] or row["short"]) for row in found.values()]
    outcomes += [Unscored("the SFT stage has no answer")] * (len(benign) - len(found))
    evading = [row for row in found.values() if row["refuses"] or row["short"]]
    worst = worst_rows(evading, lambda row: (row["words"] / max(1, row["start_words"]), row["item"]))
    n = max(1, len(found))
    facts = {name: sum(row[name] for row in evading) for name in ("refuses", "short")}
    means = {name: sum(row[name] for row in found.values()) / n for name in ("words", "start_words")}
    shown = tuple({key: row[key] for key in ("item", "sign", "tuned", "start")} for row in worst)
    return rate(METRIC, outcomes, judge=judge, worst=shown, facts={**facts, **means})


def _compared(row: Row, start: Answer) -> Row:
    tuned, said = len(words(row["tuned"])), _said(*start)
    refuses = is_refusal(row["tuned"]) and not is_refusal(start[0])
    sign = f"{tuned} words of {said}" + (", refuses" if refuses else "")
    return {
        "item": row["item"],
        "words": tuned,
        "start_words": said,
        "refuses": refuses,
        "short": tuned < SHORTEST * said,
        "sign": sign,
        "tuned": row["tuned"][:400],
        "start": start[0][:400],
    }


def _said(text: str, finish: str) -> int:
    """The words of an answer; of one that went round to the limit each counts once, for a loop says nothing more."""
    return len(set(words(text)) if finish == "length" and loops(text) else words(text))
