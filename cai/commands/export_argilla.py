"""`--export RUN --to F --form argilla`: what people can mark there, as folders that Argilla 2.x loads by itself.

Owns the two data sets (`answers`: fresh answers side by side, blind; `pairs`: the run's pairs with its own labels as
suggestions), the key that says which arm stood where, and the card with the lines to load them. Invariants: nothing in
answers/ tells an arm, neither text, order, id nor metadata; nothing is sent anywhere. The shapes are those of
`rg.Dataset.from_disk` of argilla 2.8: .argilla/settings.json, .argilla/dataset.json, records.json.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

from cai.commands.review_blind import EMPTY, of_all, sided
from cai.commands.review_session import LABELS, QUESTIONS
from cai.data.dataset import lines as json_lines
from cai.data.marks import ANSWER_MARKS, ANSWERS
from cai.errors import CaiError
from cai.metrics.figure import seeded_index, shuffled
from cai.report.fresh import Fresh, read_fresh
from cai.report.snapshot import Snapshot
from cai.report.templating import rendered
from cai.store.files import io_error, write_atomic
from cai.store.jsonl import Row
from cai.store.row_types import Pair
from cai.terminal import printable, word

FORM = "argilla"
WRITTEN = {"answers", "pairs", "key.jsonl", "marks.jsonl", "README.md"}
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)  # no other --to is the remedy
BETTER = "better"  # the question's name
NOTE = "Texts may be harmful or offensive: requests for harmful help, and what a language model answered."
Say = Callable[[str], None]


@dataclass(frozen=True)
class Exported:
    """What is written: a data set's name -> its records; `key` and `marks` of the answers."""

    sets: dict[str, list[Row]]
    key: list[Row]
    marks: list[Row]


def refuse(args: argparse.Namespace) -> None:
    """Error: flags of the other export, which this one would pass over."""
    for name in ("merged", "push", "arm"):
        if getattr(args, name):
            raise CaiError(f"--form {args.form}: takes no --{name}: it holds texts to mark, no model. Leave one out.")


def export(snapshot: Snapshot, to: Path | None, say: Say) -> None:
    """Write the folder; without `to` only say what would stand in it. Errors: nothing to mark, a folder in use."""
    found = gather(snapshot)
    if not found.sets:
        raise CaiError(f"{snapshot.path}: has no pair and no fresh answers of two arms yet. Resume it first.")
    for name, rows in found.sets.items():
        say(f"{name}: {len(rows)} records")
    if to is None:
        say("Nothing was written.")
        return
    _refuse_folder(snapshot.path, to)
    try:
        _write(snapshot, found, to)
    except OSError as error:
        if error.errno in FULL:
            raise io_error(to, "writing", error) from None
        raise CaiError(f"{to}: {error.strerror}. Give --to a new folder in one that you may write.") from None
    say(f"exported to {word(to)}; the lines that load it into Argilla: {word(to / 'README.md')}")


def gather(snapshot: Snapshot) -> Exported:
    """The records of both sets, of which a set without any is left out."""
    fresh, answers = read_fresh(snapshot.path), list[Row]()
    key: list[Row] = []
    pools = {pair["item"]: pair["pool"] for pair in snapshot.pairs.heldout}
    if len(fresh.arms) > 1:
        answers, key = _answers(snapshot, fresh, pools)
    labelled = [*snapshot.cleaned.kept, *snapshot.pairs.heldout]
    sets = {"answers": answers, "pairs": [_pair(snapshot, pair) for pair in labelled]}
    return Exported({name: rows for name, rows in sets.items() if rows}, key, _marks(snapshot, key))


def _answers(snapshot: Snapshot, fresh: Fresh, pools: Mapping[int, str]) -> tuple[list[Row], list[Row]]:
    """Records and, in the same order, the key. One side for all annotators: Argilla shows a record as it is."""
    found: list[Row] = []
    key: list[Row] = []
    for task in shuffled(sided(snapshot, fresh, of_all(fresh), FORM), 0, FORM):
        name = hashlib.sha256(task.key.encode()).hexdigest()[:16]
        pool = {"pool": pools[task.item]} if pools.get(task.item) else {}
        fields = {"prompt": task.prompt, "left": task.left.text, "right": task.right.text}
        found.append(_record(name, fields, pool))
        key.append({"id": name, "item": task.item, "left": task.left.arm, "right": task.right.arm, "key": task.key})
    return found, key


def _pair(snapshot: Snapshot, pair: Pair) -> Row:
    """A pair with its label as the suggestion; its score is the judge's probability where there is a margin."""
    chosen, rejected = (
        ("right", "left") if seeded_index(2, (snapshot.run_id, FORM, pair["item"])) else ("left", "right")
    )
    fields = {"prompt": pair["prompt"], chosen: pair["chosen"], rejected: pair["rejected"]}
    about = {"pool": pair["pool"], "split": pair["split"], "item": pair["item"]}
    margin, agent = pair.get("margin"), f"pairs.label: {snapshot.recipe.pairs.label}"
    score = round(1 / (1 + math.exp(-margin)), 6) if isinstance(margin, float) and abs(margin) < 700 else None
    suggestion = {"value": chosen, "score": score, "agent": agent}
    name = f"{pair['split']}-{pair['item']}"
    ordered = {part: fields[part] for part in ("prompt", "left", "right")}
    return _record(name, ordered, about) | {"suggestions": {BETTER: suggestion}}


def _record(name: str, fields: Mapping[str, str], metadata: Mapping[str, object]) -> Row:
    shown = {part: printable(text) if text.strip() else EMPTY for part, text in fields.items()}
    return {"id": name, "fields": shown, "metadata": dict(metadata), "suggestions": {}, "responses": {}, "vectors": {}}


def _marks(snapshot: Snapshot, key: Sequence[Row]) -> list[Row]:
    """What was marked here already, on Argilla's sides; apart, for a response there belongs to a user of its server."""
    records = {row["key"]: row for row in key}
    found = []
    for row in snapshot.reviews:
        if row["what"] == ANSWERS and row["mark"] != "skip" and (there := records.get(row["key"])):
            arm = row.get(row["mark"])
            value = next((side for side in ("left", "right") if there[side] == arm), "equal")
            found.append({"id": there["id"], "question": BETTER, "value": value, "rater": row["rater"]})
    return found


# --- the files


def settings(name: str) -> Row:
    """As argilla 2.8 writes `Settings.to_json`."""
    blind = name == "answers"
    asked = QUESTIONS[ANSWERS] if blind else f"{QUESTIONS[ANSWERS]} (suggested: the one that was trained towards)"
    options = [{"value": mark, "text": LABELS[mark]} for mark in ANSWER_MARKS]
    choice = {"type": "label_selection", "options": options, "visible_options": len(options)}
    questions = [_asked(BETTER, asked, choice, required=True)]
    questions.append(_asked("note", "Note", {"type": "text", "use_markdown": False}, required=False))
    titles = {"prompt": "Instruction", "left": "Left answer", "right": "Right answer"}
    plain = {"type": "text", "use_markdown": False}
    terms = {"type": "terms", "values": None, "visible_for_annotators": True}
    whole = {"type": "integer", "min": None, "max": None, "visible_for_annotators": True}
    about = {"pool": terms} if blind else {"pool": terms, "split": terms, "item": whole}
    return {
        "guidelines": NOTE,
        "questions": questions,
        "fields": [_asked(part, title, plain, required=True) for part, title in titles.items()],
        "vectors": [],
        "metadata": [
            {"name": part, "title": part, "settings": how, "visible_for_annotators": True}
            for part, how in about.items()
        ],
        "allow_extra_metadata": False,
        "distribution": {"strategy": "overlap", "min_submitted": 2 if blind else 1},
        "mapping": None,
    }


def _asked(name: str, title: str, how: Mapping[str, object], *, required: bool) -> Row:
    """A field or a question."""
    return {"name": name, "title": title, "settings": dict(how), "required": required, "description": None,
            "type": how["type"]}  # fmt: skip


def _refuse_folder(run: Path, to: Path) -> None:
    if to.resolve().is_relative_to(run.parent.resolve()):
        raise CaiError(f"{to}: lies among the runs. Give --to a folder of its own.")
    if to.exists() and (not to.is_dir() or {path.name for path in to.iterdir()} - WRITTEN):
        raise CaiError(f"{to}: is not empty, nor an export of this form. Give --to a new folder.")


def _write(snapshot: Snapshot, found: Exported, to: Path) -> None:
    for name, rows in found.sets.items():
        folder = to / name
        (folder / ".argilla").mkdir(mode=0o700, parents=True, exist_ok=True)
        title = {"name": f"{snapshot.run_id}-{name}", "status": "draft", "guidelines": NOTE}
        for path, value in ((".argilla/settings.json", settings(name)), (".argilla/dataset.json", title)):
            write_atomic(folder / path, orjson.dumps(value, option=orjson.OPT_INDENT_2))
        write_atomic(folder / "records.json", orjson.dumps(rows, option=orjson.OPT_INDENT_2))
    write_atomic(to / "key.jsonl", json_lines(found.key))
    write_atomic(to / "marks.jsonl", json_lines(found.marks))
    counts, raters = {name: len(rows) for name, rows in found.sets.items()}, {row["rater"] for row in found.marks}
    told = {"run": snapshot.run_id, "sets": counts, "raters": sorted(raters), "note": NOTE}
    write_atomic(to / "README.md", rendered("argilla_card.md.j2", told).encode())
