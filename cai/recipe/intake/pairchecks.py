"""What a row of a pairs file says of its pair beside the texts, and what its texts may not hold.

Owns pool, split, margin and scores of a row, and the frames, tokens and control characters that no text of a pair has.
A `Broken` names the line. Pure.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from cai.recipe.intake import frames
from cai.recipe.intake.decoding import CONTROL
from cai.recipe.intake.entries import POOLS
from cai.recipe.intake.jsontext import Broken

HELDOUT = ("heldout", "holdout", "test", "eval", "val", "dev")  # how such a split's name begins
SHORTEST_GLUED = 20  # characters of a prompt: a shorter one may well begin both answers
CUE = re.compile(r"\s*(?:#{2,4} )?(?:Assistant|AI|Bot|GPT|Response|Answer|Output)\s*:", re.IGNORECASE)


def scored_lower(names: Mapping[str, Any]) -> bool:
    """Whether the row's own scores hold the rejected text for the better one."""
    for ours, theirs in (("chosen_{}", "rejected_{}"), ("{}_chosen", "{}_rejected")):
        for word in ("score", "rating", "reward"):
            one, two = names.get(ours.format(word)), names.get(theirs.format(word))
            if isinstance(one, int | float) and isinstance(two, int | float) and one < two:
                return True
    return False


def refuse_frames(texts: Mapping[str, str], line: int) -> None:
    """`Broken` for a prompt in a chat template's frame, an end token behind an answer, control characters."""
    for name, text in texts.items():
        if control := CONTROL.search(text):
            raise Broken(line, f'"{name}" holds the control character U+{ord(control[0]):04X}. Take it out')
        if frames.PYTHONS.match(text):
            raise Broken(line, f'"{name}" is a value as Python prints it. Save the file as JSON lines')
    try:
        frames.refuse(texts["prompt"], line)
    except Broken as broken:
        raise Broken(line, f'"prompt": {broken.why.replace("the request", "the prompt")}') from None
    for name in ("chosen", "rejected"):
        if found := frames.CLOSING.search(texts[name][-frames.LONGEST_END :]):
            raise Broken(line, f'"{name}" ends with the token {found[0].strip()!r}, which training adds. Take it off')


def glued(texts: Mapping[str, str]) -> str:
    """What stands before both answers and is part of neither: the prompt once more, or a cue."""
    both = (texts["chosen"], texts["rejected"])
    if len(texts["prompt"]) >= SHORTEST_GLUED and all(text.startswith(texts["prompt"]) for text in both):
        return "the prompt once more"
    cues = [CUE.match(text) for text in both]
    return f"the cue {cues[0][0].strip()!r}" if cues[0] and cues[1] else ""


def pool_of(names: Mapping[str, Any], line: int) -> str:
    value = names.get("pool")
    if value in (None, ""):
        return ""
    word = str(value).strip().lower()
    if word not in POOLS:
        raise Broken(line, f'pool: {str(value)[:40]!r} is unknown. Write "benign" or "redteam"')
    return word


def heldout(names: Mapping[str, Any], line: int) -> bool:
    value = names.get("split")
    word = re.match(r"[a-z]*", str(value or "train").strip().lower().replace("_", "").replace("-", ""))
    if word and word[0].startswith(HELDOUT):
        return True
    if word and word[0].startswith("train"):
        return False
    raise Broken(line, f'split: {str(value)[:40]!r} is unknown. Write "train" or "heldout", or leave the key out')


def margin(names: Mapping[str, Any], line: int) -> float | None:
    value = names.get("margin")
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise Broken(line, f"margin: {str(value)[:40]!r} is no finite number. Write a number, or leave the key out")
    return number
