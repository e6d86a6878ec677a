"""The data set of a run: examples in the user's format, preference pairs, and a card that `datasets` can load.

Owns the files under dataset/ and their key order; `pairs` owns what an example is, `hygiene` what is trained on.
Invariant: equal inputs give equal bytes (no time stamp, no run id, nothing measured), and a file that is right already
is not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from cai.data.hygiene import Hygiene
from cai.data.pairs import PairSet
from cai.run.folder import Run
from cai.store.files import holds, write_atomic
from cai.store.jsonl import JsonObject, Row, encode

Card = Callable[[PairSet, Sequence[Row], Sequence[Row]], str]  # (pairs, train rows, held-out rows) -> README.md
PAIR_KEYS = ("prompt", "chosen", "rejected", "item", "pool")


def write_dataset(run: Run, pairs: PairSet, cleaned: Hygiene, card: Card) -> None:
    """Write dataset/examples.jsonl, pairs/train.jsonl, pairs/heldout.jsonl and README.md, each whole or not at all.

    `cleaned.kept`: the training pairs after hygiene. `card` writes README.md. Errors: CaiError(IO).
    """
    train, heldout = [pair_row(p) for p in cleaned.kept], [pair_row(p) for p in pairs.heldout]
    folder = run.dataset
    (folder / "pairs").mkdir(mode=0o700, parents=True, exist_ok=True)
    write_if_changed(folder / "examples.jsonl", lines(pairs.examples))
    write_if_changed(folder / "pairs" / "train.jsonl", lines(train))
    write_if_changed(folder / "pairs" / "heldout.jsonl", lines(heldout))
    write_if_changed(folder / "README.md", card(pairs, train, heldout).encode())


def pair_row(pair: JsonObject) -> Row:
    """One line of a pairs file: plain strings, as TRL takes them."""
    return {key: pair[key] for key in (*PAIR_KEYS, "kind") if key != "kind" or key in pair}


def lines(rows: Sequence[JsonObject]) -> bytes:
    """JSON lines in the rows' own key order."""
    found = bytearray()  # grown in place: a join would hold every line beside the whole
    for row in rows:
        found += encode(row)
    return bytes(found)


def write_if_changed(path: Path, data: bytes) -> None:
    if not holds(path, data):
        write_atomic(path, data)
