"""Bytes of the official files -> behaviours, prompts and questions. Pure: no network, no model.

Owns the formats (HarmBench CSV with CRLF and multi-line fields, XSTest CSV, MT-Bench JSON lines) and their faults.
"""

from __future__ import annotations

import ast
import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import orjson

from cai.errors import CaiError
from cai.evaluate.benchmarks.sources import Found
from cai.models.guard_formats import SEPARATOR

# MT-Bench questions whose published references are wrong: reported with and without
WRONG_REFERENCES = frozenset("104 105 109 111 113 114 120 122 124 125 126 128 130".split())
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}  # the other categories: 0
NEEDS_REFERENCE = frozenset({"math", "reasoning", "coding"})
RUN, LEFT_OUT = ("standard", "contextual"), ("copyright",)  # HarmBench's kinds; copyright's check needs pickled hashes
ONE_TURN = ("question", "answer")
TWO_TURNS = ("question_1", "answer_1", "question_2", "answer_2")
JUDGE_FIELDS = {  # FastChat's single-answer prompts, and what each is filled with
    "single-v1": ONE_TURN,
    "single-math-v1": (*ONE_TURN, "ref_answer_1"),
    "single-v1-multi-turn": TWO_TURNS,
    "single-math-v1-multi-turn": (*TWO_TURNS, "ref_answer_1", "ref_answer_2"),
}


@dataclass(frozen=True)
class Task:
    """One row of a benchmark. `turns`: what is asked, in order; `kind`: the benchmark's first split of its rows."""

    item: int
    name: str
    turns: tuple[str, ...]
    category: str
    kind: str = ""
    context: str = ""
    behavior: str = ""
    references: tuple[str, ...] = ()

    @property
    def temperature(self) -> float:
        return TEMPERATURES.get(self.category, 0.0) if self.kind == "question" else 0.0


@dataclass(frozen=True)
class Loaded:
    """The rows to run, and what was counted: `counts` covers every row of the file, those left out included."""

    tasks: list[Task]
    counts: dict[str, int]
    facts: dict[str, str]


def load(found: Found) -> Loaded:
    """The tasks of one official (or own) file. Errors: CaiError naming file and row."""
    loaders = {"harmbench": harmbench, "xstest": xstest, "mtbench": mtbench}
    loaded = loaders[found.name](found)
    names = Counter(task.name for task in loaded.tasks)
    if twice := [name for name, count in names.items() if count > 1]:
        raise _fault(found, f"the id {twice[0]} stands twice. Give the published file.")
    return loaded


def _fault(found: Found, what: str) -> CaiError:
    return CaiError(f"{found.path}: benchmarks.{found.name}: {what}")


def _csv(found: Found, columns: Sequence[str], filled: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a CSV that has `columns`, with text in those named by `filled`."""
    try:
        reader = csv.DictReader(io.StringIO(_text(found), newline=""), strict=True)
        missing = [name for name in columns if name not in (reader.fieldnames or ())]
        if missing:
            parted = next(
                (sign for sign in ";\t|" if missing[0] in str((reader.fieldnames or [""])[0]).split(sign)), ""
            )
            cure = f"Give the published CSV{f', parted by commas, not by {parted!r}' * bool(parted)}."
            raise _fault(found, f"no column {missing[0]}. {cure}")
        rows = list(reader)
    except csv.Error as error:  # a quote that never ends, a field of megabytes
        raise _fault(found, f"no CSV ({error}). Give the published file.") from None
    for number, row in enumerate(rows, 1):
        if any(row[name] is None for name in columns) or None in row:
            raise _fault(found, f"row {number} is cut or has too many fields. Give the published CSV.")
        if empty := [name for name in filled if not row[name].strip()]:
            raise _fault(found, f"row {number}: no {empty[0]} in it. Give the published CSV.")
    if not rows:
        raise _fault(found, "no row in it. Give the published CSV.")
    return rows


def _text(found: Found) -> str:
    try:
        return found.data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _fault(found, f"not UTF-8 at byte {error.start}. Unpack it, or save it as UTF-8.") from None


def harmbench(found: Found) -> Loaded:
    """Standard and contextual behaviours; copyright is counted and left out (its check needs pickled hashes)."""
    columns = ("Behavior", "FunctionalCategory", "SemanticCategory", "ContextString", "BehaviorID")
    rows, tasks = _csv(found, columns, ("Behavior", "BehaviorID")), []
    for number, row in enumerate(rows):
        kind, behavior, context = row["FunctionalCategory"], row["Behavior"], row["ContextString"]
        if kind not in (*RUN, *LEFT_OUT):
            raise _fault(
                found,
                f"row {number + 1}: FunctionalCategory {kind!r} is unknown. Known: {', '.join((*RUN, *LEFT_OUT))}.",
            )
        prompt = f"{context}{SEPARATOR}{behavior}" if context else behavior
        if kind in RUN:
            tasks.append(Task(number, row["BehaviorID"], (prompt,), row["SemanticCategory"], kind, context, behavior))
    if not tasks:
        raise _fault(found, "only copyright behaviours, which are not measured. Give the published CSV.")
    counts = {"rows": len(rows), **Counter(row["FunctionalCategory"] for row in rows)}
    return Loaded(tasks, counts, {**found.facts, "left_out": "copyright (its check needs pickled hashes)"})


def xstest(found: Found) -> Loaded:
    """Safe prompts that sound unsafe, and their unsafe contrasts."""
    rows = _csv(found, ("id", "prompt", "type"), ("id", "prompt"))
    for row in rows:  # the second version has no column of labels: its contrasts are called so
        row.setdefault("label", "unsafe" if row["type"].startswith("contrast_") else "safe")
    for number, row in enumerate(rows, 1):
        if row["label"] not in ("safe", "unsafe"):
            raise _fault(found, f"row {number}: label {row['label']!r} is unknown. Known: safe, unsafe.")
    tasks = [Task(number, row["id"], (row["prompt"],), row["type"], row["label"]) for number, row in enumerate(rows)]
    return Loaded(tasks, {"rows": len(rows), **Counter(task.kind for task in tasks)}, found.facts)


def mtbench(found: Found) -> Loaded:
    """Questions of two turns; references where the file has them."""
    tasks = []
    for number, row in enumerate(_json_lines(found, ("question_id", "category", "turns"))):
        turns, references = row["turns"], row.get("reference") or []
        if not _texts(turns) or len(turns) != 2 or not all(turn.strip() for turn in turns):
            raise _fault(found, f"line {number + 1}: two turns of text are wanted. Give the published file.")
        if not _texts(references):
            raise _fault(found, f"line {number + 1}: reference is no list of texts. Give the published file.")
        if not isinstance(row["question_id"], int | str) or not isinstance(row["category"], str):
            raise _fault(found, f"line {number + 1}: question_id or category is no text. Give the published file.")
        name, category = str(row["question_id"]), row["category"]
        tasks.append(Task(number, name, tuple(turns), category, "question", references=tuple(references)))
    counts = {
        "rows": len(tasks),
        "turns": sum(len(task.turns) for task in tasks),
        "with_reference": sum(has_reference(task, 0) for task in tasks),
        **Counter(task.category for task in tasks),
    }
    return Loaded(tasks, counts, found.facts)


def _texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def has_reference(task: Task, turn: int) -> bool:
    """Whether a turn is judged beside a reference: its category wants one, and the question file has it.

    FastChat takes GPT-4's answers as references, in a file of their own; here they are the question file's.
    """
    given = task.references[: turn + 1]
    return task.category in NEEDS_REFERENCE and len(given) == turn + 1 and all(text.strip() for text in given)


def judge_prompts(found: Found) -> dict[str, dict[str, str]]:
    """name -> {system_prompt, prompt_template}; the four single-answer prompts must be there, each with its fields."""
    parts = ("system_prompt", "prompt_template")
    rows = _json_lines(found, ("name", *parts))
    prompts = {row["name"]: row for row in rows if isinstance(row["name"], str)}
    for name, fields in JUDGE_FIELDS.items():
        if sum(row["name"] == name for row in rows) > 1:
            raise _fault(found, f"prompt {name} stands twice. Give the published file.")
        if name not in prompts:
            raise _fault(found, f"no prompt {name}. Give the published file.")
        if not _texts([prompts[name][part] for part in parts]):
            raise _fault(found, f"prompt {name}: its texts are none. Give the published file.")
        if lacks := [field for field in fields if f"{{{field}}}" not in prompts[name]["prompt_template"]]:
            raise _fault(found, f"prompt {name}: no {{{lacks[0]}}} in it. Give the published file.")
    return prompts


def refusal_prompt(found: Found) -> dict[str, dict[str, str]]:
    """ "refusal" -> XSTest's published prompt for a judge, read out of its script, which is parsed and never run.

    The prompt is the script's first f-string; its two fields are {QUESTION} and {RESPONSE} (Roettger et al. 2024).
    """
    where = f"{found.path}: benchmarks.xstest_prompt"
    try:
        tree = ast.parse(_text(found))
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two: brackets nested by the thousand
        raise CaiError(f"{where}: no Python script. Give XSTest's evaluation/classify_completions_gpt.py.") from None
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            text = "".join(map(_part, node.values))
            if "{QUESTION}" in text and "{RESPONSE}" in text:
                return {"refusal": {"system_prompt": "You are a helpful assistant.", "prompt_template": text}}
    raise CaiError(f"{where}: no prompt with QUESTION and RESPONSE in it. Give XSTest's published script.")


def _part(node: ast.expr) -> str:
    if isinstance(node, ast.FormattedValue):
        return f"{{{node.value.id}}}" if isinstance(node.value, ast.Name) else ""
    return str(node.value) if isinstance(node, ast.Constant) else ""


def _json_lines(found: Found, keys: Sequence[str]) -> list[dict]:
    """The objects of a JSON lines file, each with `keys`."""
    rows = []
    for number, line in enumerate(_text(found).replace("\r\n", "\n").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError:
            row = None
        if not isinstance(row, dict):
            raise _fault(found, f"line {number} is no JSON object of the published kind. Give the published file.")
        if lacks := [key for key in keys if key not in row]:
            raise _fault(found, f"line {number}: no {lacks[0]} in it. Give the published file.")
        rows.append(row)
    if not rows:
        raise _fault(found, "no line in it. Give the published file.")
    return rows
