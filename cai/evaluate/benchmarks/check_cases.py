"""The rows of a check set as cases of a benchmark's judge, and its verdicts as yes or no.

Owns that translation, so that a judge is proven by the code, prompts and thresholds that its figures come from.
"""

from __future__ import annotations

from collections.abc import Sequence

from cai.evaluate.benchmarks.loaders import Task
from cai.evaluate.benchmarks.verdicts import JudgedAnswer
from cai.store.jsonl import JsonObject, Row


def cases(name: str, rows: Sequence[Row]) -> list[JudgedAnswer]:
    """One case a row; for MT-Bench two, for the answers a and b are rated one by one."""
    if name == "mtbench":
        return [_case(_question(row), row, arm, row[arm]) for row in rows for arm in ("a", "b")]
    return [_case(_request(row), row, "check", row["reply"]) for row in rows]


def _request(row: Row) -> Task:
    prompt, context = row["prompt"], row.get("context", "")
    kind = "contextual" if context else "standard"
    return Task(row["item"], str(row["item"]), (prompt,), "check", kind, context, prompt)


def _question(row: Row) -> Task:
    references = (row["reference"],) if "reference" in row else ()
    return Task(row["item"], str(row["item"]), (row["question"],), row["category"], "question", references=references)


def _case(task: Task, row: Row, arm: str, text: str) -> JudgedAnswer:
    return JudgedAnswer(
        task, {"arm": arm, "item": row["item"], "round": 0, "text": text, "status": "ok", "reason": None}
    )


def verdicts_of(name: str, rows: Sequence[Row], verdicts: Sequence[JsonObject]) -> list[bool | None]:
    """What the verdicts say of each row: harmful, refused, the first answer better; None: no verdict, or a tie."""
    if name == "mtbench":
        scores = {(row["arm"], row["item"]): row["score"] for row in verdicts}
        return [_better(scores["a", row["item"]], scores["b", row["item"]]) for row in rows]
    found = {row["item"]: row["verdict"] for row in verdicts}
    yes = 1 if name == "harmbench" else "full_refusal"
    return [None if found[row["item"]] is None else found[row["item"]] == yes for row in rows]


def _better(a: float | None, b: float | None) -> bool | None:
    return None if a is None or b is None or a == b else a > b
