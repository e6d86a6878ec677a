"""The commands that are printed for a person to paste: whole, from where the person stands, each --set once.

Owns their spelling alone. Pure but for the working folder and the name by which the program was called.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cai.terminal import word


def near(path: Path) -> Path:
    """`path` as one would write it here: relative where it lies below the working folder, else as it is."""
    try:
        here = os.path.realpath(os.getcwd())
    except OSError:  # the folder in which one stands is gone
        return path
    whole = os.path.join(os.path.realpath(path.parent), path.name)  # a link that was named stays one
    return Path(os.path.relpath(whole, here)) if whole.startswith(here + os.sep) else path


def program() -> str:
    """`python runner.py`, or the console command, as this process was called."""
    called = Path(sys.argv[0] or "runner.py")
    if called.name == "cai":
        return "cai"
    return f"python {word(near(called))}" if called.name == "runner.py" else "python runner.py"


def command(*words: str | Path) -> str:
    """`python runner.py` with these words, quoted for a shell."""
    return f"{program()} {' '.join(map(word, words))}"


def once(sets: Sequence[str]) -> list[str]:
    """What --set says, each key once: the last one holds, as it does when a recipe is read."""
    return list({text.partition("=")[0].strip(): text for text in sets}.values())


def set_words(sets: Sequence[str]) -> list[str]:
    return [part for text in once(sets) for part in ("--set", text)]


def resume(run: Path, sets: Sequence[str] = ()) -> str:
    """The line that goes on with a run, wherever it lies: by its own copy of the recipe."""
    at = near(run)
    return command(at / "recipe.toml", "--resume", at, *set_words(sets))


def export(run: Path) -> str:
    """The line that writes the data set, and an adapter if there is one, in the forms that others read."""
    at = near(run)
    return command(at / "recipe.toml", "--export", at, "--to", "out")
