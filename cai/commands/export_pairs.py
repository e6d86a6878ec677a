"""The data set in the forms that other trainers read: a conversational configuration beside the plain one.

Owns what an export adds to the run's own dataset/: the messages form, LLaMA-Factory's dataset_info.json and the card's
second configuration. The run's files are copied as they are.
"""

from __future__ import annotations

from pathlib import Path

import orjson

from cai.errors import CORRUPT, CaiError
from cai.store.files import write_atomic, write_json_atomic
from cai.store.jsonl import Row

SPLITS = ("train", "heldout")
CONVERSATIONAL = "conversational"
LLAMA_FACTORY = {"ranking": True, "columns": {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}}


def write_dataset(source: Path, target: Path) -> None:
    """The run's dataset/ with the further forms. Error: CaiError(CORRUPT) for a pairs file that is not whole."""
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        place = target / path.relative_to(source)
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomic(place, path.read_bytes())
    listed: Row = {}
    made: list[tuple[str, int]] = []
    for split in SPLITS:
        rows = _rows(source / "pairs" / f"{split}.jsonl")
        if not rows:
            continue
        (target / CONVERSATIONAL).mkdir(mode=0o700, parents=True, exist_ok=True)
        lines = b"".join(orjson.dumps(messages(row)) + b"\n" for row in rows)
        write_atomic(target / CONVERSATIONAL / f"{split}.jsonl", lines)
        listed[f"cai_{split}"] = {"file_name": f"pairs/{split}.jsonl", **LLAMA_FACTORY}
        made.append((split, len(rows)))
    write_json_atomic(target / "dataset_info.json", listed)
    if made and (target / "README.md").is_file():
        write_atomic(target / "README.md", with_configuration((target / "README.md").read_text(), made).encode())


def _rows(path: Path) -> list[Row]:
    try:
        return [orjson.loads(line) for line in path.read_bytes().splitlines() if line.strip()]
    except FileNotFoundError:
        return []
    except orjson.JSONDecodeError:
        raise CaiError(f"{path}: not whole. Resume the run, which writes it again.", CORRUPT) from None


def messages(row: Row) -> Row:
    """One pair as chat messages: TRL then puts it through a chat template instead of gluing the strings."""
    turns = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return row | {key: [{"role": role, "content": row[key]}] for key, role in turns.items()}


def with_configuration(card: str, made: list[tuple[str, int]]) -> str:
    """The card with the second configuration in its front matter; as it is where it has none to add to."""
    import yaml

    head, front, body = [*card.split("---\n", 2), "", ""][:3]
    values = yaml.safe_load(front) if not head and front else None
    if not isinstance(values, dict) or not isinstance(values.get("configs"), list):
        return card
    files = [{"split": split, "path": f"{CONVERSATIONAL}/{split}.jsonl"} for split, _ in made]
    values["configs"] = [*values["configs"], {"config_name": CONVERSATIONAL, "data_files": files}]
    front = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n{body}"
