"""The data set of a run against its records: every example whole, its pair made of it, its texts those of the rows.

Owns that check of `--verify`. Neither rows nor examples are held, only a mark of each text: a data set is as large as
the log it was made from.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

import orjson

from cai.data.sampled import KIND as SAMPLED
from cai.recipe.intake import pairfile
from cai.store.jsonl import Row
from cai.store.scan import BUFFER, readable

Results = Iterator[tuple[str, str]]
Texts = dict[str, set[object]]  # stage -> marks of its texts
EXAMPLE_KEYS = ("instruction", "initial_answer", "principle", "critique", "revised_answer", "preference_pair")


def dataset(run: Path) -> Results:
    """G11 and the user's format: every example whole, its pair made of it, its texts those of the records."""
    path = run / "dataset" / "examples.jsonl"
    trained = (run / "train" / "result.json").exists()
    if not path.exists():
        yield ("FAIL", "examples.jsonl is missing; a resume writes it again") if trained else ("skip", "no dataset yet")
        return
    texts = _texts(run)
    count, faults, wrong = 0, list[str](), list[str]()
    for number, example in enumerate(_objects(path, faults), start=1):
        count = number
        if why := _example_fault(example, texts):
            wrong.append(f"line {number}: {why}")
    faults += wrong
    for split in ("train", "heldout"):
        wrong = []
        for number, pair in enumerate(_objects(run / "dataset" / "pairs" / f"{split}.jsonl", faults), start=1):
            if not _of_records(pair, texts):
                wrong.append(f"{split}.jsonl line {number}: not a pair of the records' texts")
        faults += wrong
    if faults:
        yield "FAIL", f"{len(faults)} faults, first: {faults[0]}; a resume writes the data set again"
    else:
        yield "ok", f"{count} examples"


def _texts(run: Path) -> Texts:
    """Marks of the records' texts by stage; of a run on pairs of the user's own, of its copy of their file."""
    texts: Texts = {}
    if (run / "records.jsonl").exists():
        for _, _, row in readable(run / "records.jsonl"):
            texts.setdefault(row["stage"], set()).add(_mark(row["text"]))
    if (run / pairfile.KEY).is_file():
        rows = pairfile.read((run / pairfile.KEY).read_bytes(), str(run / pairfile.KEY)).rows
        texts["answers"] = {_mark(row.rejected) for row in rows}
        texts["revisions"] = {_mark(row.chosen) for row in rows}
        texts["critiques"] = {_mark("")}
    return texts


def _mark(text: object) -> object:
    """What stands for a text, so that no text is held: 16 bytes of its hash."""
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest() if isinstance(text, str) else text


def _of_records(pair: Row, texts: Texts) -> bool:
    """A revision and an answer, or, of a sampled pair, an answer and the second one in either order."""
    sides = [_mark(pair.get("chosen")), _mark(pair.get("rejected"))]
    if pair.get("kind") == SAMPLED:
        answers = texts.get("answers", set()) | texts.get("second_answers", set())
        return all(side in answers for side in sides)
    return sides[0] in texts.get("revisions", ()) and sides[1] in texts["answers"]


def _objects(path: Path, faults: list[str]) -> Iterator[Row]:
    """The JSON objects of a derived file; what is wrong with it as a file of JSON lines is added to `faults`."""
    if not path.is_file():
        faults.append(f"{path.name} is missing")
        return
    at = len(faults)
    with path.open("rb", BUFFER) as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                faults.insert(at, f"{path.name}: its last line is cut")
                return
            try:
                value = orjson.loads(line)
            except orjson.JSONDecodeError:
                value = None
            if isinstance(value, dict):
                yield value
            else:
                faults.append(f"{path.name} line {number}: not a JSON object")


def _example_fault(example: Row, texts: Texts) -> str:
    """Why an example is not what the records say, or ""."""
    if missing := [key for key in EXAMPLE_KEYS if key not in example]:
        return f"lacks {', '.join(missing)}"
    pair = {"chosen": example["revised_answer"], "rejected": example["initial_answer"]}
    if {key: example["preference_pair"].get(key) for key in pair} != pair:
        return "the pair is not revised against initial answer"
    if example.get("kind") == SAMPLED:
        whole = _of_records({**example["preference_pair"], "kind": SAMPLED}, texts)
        return "" if whole else "its answers are not in the records"
    stages = {"answers": "initial_answer", "critiques": "critique", "revisions": "revised_answer"}
    other = [field for stage, field in stages.items() if _mark(example[field]) not in texts.get(stage, ())]
    return f"its {other[0]} is not in the records" if other else ""
