"""runner.py for a model with random weights: what it writes becomes made-up words that pass as every stage's text.

    python bench/noise.py cai.toml --milestone m0 --set model.name=/dev/shm/random-32b --set 'gates.m0=[]'

For speed and memory of a whole milestone; no text and no figure means anything. The words stand in the records, so
resume, verify and report of such a run need only runner.py. A completion's words are as many as its length suggests.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cai.data import chain
from cai.data.parsing import Parsed
from cai.data.stage import Unit

CHARACTERS_A_WORD = 6
LOOSE = ('pairs.label="always"', "pairs.reject_limit=false", "pairs.min_length_ratio=0.0", "pairs.max_length_ratio=1e6")


def parse(text: str, unit: Unit) -> Parsed:
    """Words out of the text's hash: no two texts are alike, no rule of parser or pairs finds anything in them."""
    count = min(max(len(text) // CHARACTERS_A_WORD, 20), 2000)
    letters = hashlib.shake_256(f"{unit.item}/{unit.round}/{text}".encode()).digest(CHARACTERS_A_WORD * count)
    word = "".join(chr(ord("a") + byte % 26) for byte in letters)
    return Parsed(" ".join(word[i : i + CHARACTERS_A_WORD - 1] for i in range(0, len(word), CHARACTERS_A_WORD)))


def accept() -> None:
    """Put the parser into every stage of the chain that writes, for this process."""
    chain.CHAIN = tuple(
        replace(stage, parse=parse, limit_is_fault=False) if stage.parse else stage for stage in chain.CHAIN
    )
    chain.INSTRUCTIONS = chain.CHAIN[0]


def main(argv: list[str]) -> int:
    import runner

    accept()
    return runner.main([*argv, *(part for one in LOOSE for part in ("--set", one))])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
