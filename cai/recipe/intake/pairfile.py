"""The bytes of a user's file of preference pairs -> prompt, chosen and rejected of each, and what is to be said of it.

Owns which shapes hold a pair: TRL's (plain strings, conversations, the prompt within both texts), LLaMA-Factory's
(Alpaca, ShareGPT, two outputs), HH-RLHF's transcripts, and a run's own files. Pure: the caller reads the file, once.
Invariant: no text of a pair is guessed. What could be something else ends with one line that names file, line and
remedy; a row that is readable and yet no pair to train on (an empty text, several turns) is left out and counted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from cai.errors import CaiError
from cai.recipe.intake import delimited, frames, jsontext
from cai.recipe.intake.decoding import text_of
from cai.recipe.intake.entries import CONTEXT, CONVERSATION, NO_CONTEXT, REQUEST, all_text, counted, normal
from cai.recipe.intake.jsontext import Broken, Entry
from cai.recipe.intake.pairchecks import glued, heldout, margin, pool_of, refuse_frames, scored_lower
from cai.store.jsonl import clean

KEY = "pairs.file"
FORM = '{"prompt": "...", "chosen": "...", "rejected": "..."}'
ROLES = {"user": "user", "human": "user", "prompter": "user", "system": "system"}
ROLES |= dict.fromkeys(("assistant", "gpt", "bot", "model", "chatbot", "ai"), "assistant")
READ = frozenset((*REQUEST, *CONTEXT, *CONVERSATION, "chosen", "rejected", "preference_pair", "output", "pool", "split",
                  "margin", "system", "history"))  # fmt: skip
IGNORED, GLUED = "key ", "line "  # of counts: a key that is not read; where both answers begin with what is no answer
ROLE_KEYS = frozenset(("role", "from"))
SPEAKER = re.compile(r"(?:^|\n)\s*(?:#{2,4} )?(Human|User|Assistant|AI|GPT|Bot)\s*:[ \t]*")
MOST = 500_000  # pairs: an item is a place in the file, and those above are the held-out ones (data.slots)
LONGEST = 1_000_000  # characters of a text: more than any model reads
Turns = list[tuple[str, str]]


class OwnPair(NamedTuple):
    """One pair and the line on which it begins. `fault`: why it cannot be trained on, "" if it can."""

    prompt: str
    chosen: str
    rejected: str
    pool: str
    line: int
    heldout: bool = False
    margin: float | None = None
    fault: str = ""


@dataclass(frozen=True)
class PairIntake:
    """`rows` in file order; `how`: what the file was read as; `notes`: what else is to be said."""

    rows: tuple[OwnPair, ...]
    how: str
    notes: tuple[str, ...] = ()

    @property
    def splits(self) -> bool:
        """Whether rows say themselves which are held out."""
        return any(row.heldout for row in self.rows)


def read(data: bytes, name: str, *, pool: str = "") -> PairIntake:
    """The pairs of a file. `name`: as faults name it; `pool`: of rows without one. Errors: CaiError of one line."""
    text, packed = text_of(data, f"{name}: {KEY}")
    counts: Counter[str] = Counter()
    try:
        entries, how = _entries(text.removeprefix("\ufeff"))
        rows = tuple(_pair(entry, pool or "benign", counts) for entry in entries)
        if counts["glued"] * 2 > len(rows):
            line, _, sign = next(key for key in counts if key.startswith(GLUED)).removeprefix(GLUED).partition(" ")
            raise Broken(int(line), f"both answers begin with {sign}. Give the answers alone")
    except Broken as broken:
        raise CaiError(f"{name}: line {broken.line}: {' '.join(broken.why.split()).rstrip('.')}.") from None
    except RecursionError:
        raise CaiError(f"{name}: {KEY}: nested too deeply. Write one JSON object a line.") from None
    if len(rows) > MOST:
        raise CaiError(f"{name}: {KEY}: {len(rows):,} pairs, at most {MOST:,} are read. Give a smaller file.")
    if not rows:
        raise CaiError(f"{name}: {KEY}: no pair in it. Write one JSON object a line: {FORM}")
    return PairIntake(rows, f"{how} ({packed})" if packed else how, tuple(_notes(counts)))


def _entries(text: str) -> tuple[Sequence[Entry], str]:
    first = text.lstrip()[:1]
    if first == "[":
        found = jsontext.array(text)
        if found is None:
            raise Broken(1, "text follows the JSON array. Give the array alone, or one object a line")
        return found, "a JSON array"
    if first == "{":
        values = list(jsontext.values(text))
        if len(values) == 1 and isinstance(values[0].value, Mapping) and not _is_pair(values[0].value):
            inner = [v for v in values[0].value.values() if isinstance(v, list) and v and isinstance(v[0], Mapping)]
            if len(inner) == 1:
                return [Entry(values[0].line, value) for value in inner[0]], "one JSON object, its list"
        return values, "JSON lines"
    if text.strip() and (table := delimited.parse(text)) is not None:
        return table.rows, table.how
    if not text.strip():
        return [], "nothing"
    raise Broken(1, f"plain text holds no pairs. Write one JSON object a line: {FORM}")


def _is_pair(row: Mapping[str, Any]) -> bool:
    names = {normal(name) for name in row}
    return bool(names & {"chosen", "rejected", "preference_pair"}) or "output" in names


def _pair(entry: Entry, pool: str, counts: Counter[str]) -> OwnPair:
    """The pair of an entry. Errors: Broken."""
    if not isinstance(entry.value, Mapping):
        raise Broken(entry.line, f"{type(entry.value).__name__} where a pair should be. Write {FORM}")
    outer = names = _names(entry.value, entry.line)
    if isinstance(names.get("preference_pair"), Mapping):  # a run's own examples.jsonl
        names = _names(names["preference_pair"], entry.line)
    else:
        counts.update(f"{IGNORED}{name}" for name in names if name not in READ)
        counts["scored_lower"] += scored_lower(names)
    chosen, rejected = _both(names, entry, counts)
    prompt = _prompt(names, entry.line, counts)
    fault = ""
    if prompt is None:
        prompt, chosen, rejected, fault = _implicit(chosen, rejected, entry.line)
    turns = [(role, text) for role, text in prompt if role != "system"]
    counts["system"] += any(role == "system" and text.strip() for role, text in prompt)
    fault = fault or ("more_turns" if len(turns) > 1 else "")
    asked = turns[-1][1] if turns and turns[-1][0] == "user" else ""
    texts = {"prompt": _clean(asked)} | {
        name: _clean(_last(value, prompt, name, entry.line, counts))
        for name, value in (("chosen", chosen), ("rejected", rejected))
    }
    if any(len(text) > LONGEST for text in texts.values()):
        raise Broken(entry.line, f"a text of more than {LONGEST:,} characters. Shorten it, or take the line out")
    fault = fault or next((f"empty_{name}" for name, text in texts.items() if not frames.visible(text)), "")
    refuse_frames(texts, entry.line)
    counts["glued"] += (sign := glued(texts)) != ""
    if sign and counts["glued"] == 1:
        counts.update({f"{GLUED}{entry.line} {sign}": 1})
    return OwnPair(
        texts["prompt"],
        texts["chosen"],
        texts["rejected"],
        pool=pool_of(outer, entry.line) or pool,
        line=entry.line,
        heldout=heldout(outer, entry.line),
        margin=margin(outer, entry.line),
        fault=fault,
    )


def _names(row: Mapping[str, Any], line: int) -> dict[str, Any]:
    """Normal key -> value. Errors: Broken for two keys that say the same."""
    names: dict[str, Any] = {}
    for name, value in row.items():
        if normal(name) in names and normal(name) in READ:
            raise Broken(line, f"two keys say {normal(name)!r} ({str(name)[:40]!r} is one): keep one")
        names.setdefault(normal(name), value)
    return names


def _both(names: Mapping[str, Any], entry: Entry, counts: Counter[str]) -> tuple[Any, Any]:
    """chosen and rejected as they stand."""
    two = names.get("output")
    if "chosen" not in names and isinstance(two, list) and len(two) == 2:  # LLaMA-Factory's two outputs
        counts["outputs"] += 1
        return two[0], two[1]
    for name in ("chosen", "rejected"):
        if name not in names:
            keys = ", ".join(str(key)[:40] for key in list(entry.value)[:8]) or "none"
            raise Broken(entry.line, f'no "{name}" (keys here: {keys}). Write {FORM}')
    return names["chosen"], names["rejected"]


def _prompt(names: Mapping[str, Any], line: int, counts: Counter[str]) -> Turns | None:
    """The turns before the answer; None where only chosen and rejected hold them."""
    found = [name for name in (*REQUEST, *CONVERSATION) if names.get(name) not in (None, "", [])]
    requests = [name for name in found if name in REQUEST]
    if len(requests) > 1 and len({str(names[name]) for name in requests}) > 1:
        raise Broken(line, f"{' and '.join(map(repr, requests))} both hold text. Keep the one that is the prompt")
    if not found:
        blank = [name for name in (*REQUEST, *CONVERSATION) if name in names]
        return [("user", "")] if blank else None
    turns = _turns(names[found[0]], line, found[0], "user")
    for name in CONTEXT:  # Alpaca's input, Dolly's context
        extra = names.get(name)
        if isinstance(extra, str) and extra.strip().lower() not in NO_CONTEXT and requests:
            turns = [*turns[:-1], (turns[-1][0], f"{turns[-1][1]}\n\n{extra.strip()}")]
            counts["joined"] += 1
    if names.get("history"):
        turns = [("user", ""), ("assistant", ""), *turns]
    return [("system", str(names["system"])), *turns] if names.get("system") else turns


def _implicit(chosen: Any, rejected: Any, line: int) -> tuple[Turns, Any, Any, str]:
    """The prompt that both texts begin with: conversations or transcripts that differ in the last turn alone."""
    one, two = (_turns(value, line, name, "") for name, value in (("chosen", chosen), ("rejected", rejected)))
    if len(one) < 2 or len(two) < 2:
        raise Broken(line, f'no "prompt", and chosen and rejected are no conversations. Write {FORM}')
    if one[:-1] == two[:-1]:
        return one[:-1], one[-1:], two[-1:], ""
    if one[0] == two[0]:  # they part before the last turn
        return one[:1], one[-1:], two[-1:], "more_turns"
    raise Broken(line, f'no "prompt", and chosen and rejected begin differently. Write {FORM}')


def _turns(value: Any, line: int, name: str, alone: str) -> Turns:
    """[(role, text)] of a text, a transcript, a turn or a list of turns. `alone`: the role of a plain text."""
    if isinstance(value, str):
        value = _decoded(value)
    if isinstance(value, str):
        return _transcript(value) or [(alone, value)]
    if isinstance(value, Mapping):
        value = [value]
    if isinstance(value, list) and value and all(isinstance(turn, Mapping) for turn in value):
        return [_turn(turn, line, name) for turn in value]
    kind = "empty" if value in (None, []) else type(value).__name__
    raise Broken(line, f'"{name}" is no text and no list of messages ({kind}). Write {FORM}')


def _decoded(text: str) -> Any:
    """The messages that a table's cell holds as JSON; any other text as it is."""
    inner = frames.within(text)
    if (
        isinstance(inner, list)
        and inner
        and all(isinstance(turn, Mapping) and turn.keys() & ROLE_KEYS for turn in inner)
    ):
        return inner
    return text


def _turn(turn: Mapping[str, Any], line: int, name: str) -> tuple[str, str]:
    said = next((turn[key] for key in ("role", "from") if key in turn), None)
    text = next((turn[key] for key in ("content", "value", "text") if key in turn), None)
    role = ROLES.get(str(said).lower())
    if role is None:
        raise Broken(line, f'"{name}" has a turn of {str(said)[:30]!r}. Roles are user, assistant and system')
    text = all_text(text)
    if not isinstance(text, str):
        raise Broken(line, f'"{name}" has a turn that is not all text. Give text alone')
    return role, text


def _transcript(text: str) -> Turns:
    """The turns of "Human: ... Assistant: ..."; [] for any other text. An opening last turn has no text yet."""
    spoken = list(SPEAKER.finditer(text))
    if not spoken or text[: spoken[0].start()].strip() or (len(spoken) == 1 and not text.startswith("\n\n")):
        return []
    ends = [*(match.start() for match in spoken[1:]), len(text)]
    roles = ["user" if match[1] in ("Human", "User") else "assistant" for match in spoken]
    if roles[0] != "user":
        return []
    turns = [(role, text[m.end() : end].strip()) for role, m, end in zip(roles, spoken, ends, strict=True)]
    return turns[:-1] if turns[-1] == ("assistant", "") else turns


def _last(value: Any, prompt: Turns, name: str, line: int, counts: Counter[str]) -> str:
    """The answer: a text, or the last turn of a conversation that begins with the prompt."""
    value = _decoded(value) if isinstance(value, str) else value
    if isinstance(value, str) and not _transcript(value):
        return value
    turns = value if _are_turns(value) else _turns(value, line, name, "assistant")
    before = [turn for turn in turns[:-1] if turn[0] != "system"]
    if turns[-1][0] != "assistant":
        raise Broken(line, f'"{name}" ends with a turn of the {turns[-1][0]}. Its last turn is the answer')
    known = [(role, _clean(text)) for role, text in prompt if role != "system"]
    if before and [(role, _clean(text)) for role, text in before] != known:
        raise Broken(line, f'"{name}" is a conversation that does not begin with the prompt. Give the answer alone')
    counts["conversations"] += not isinstance(value, str)
    return turns[-1][1]


def _are_turns(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(turn, tuple) for turn in value)


def _clean(text: str) -> str:
    return clean(text).replace("\r\n", "\n").replace("\r", "\n").strip()


def _notes(counts: Mapping[str, int]) -> list[str]:
    found = {
        "system": "a system prompt is not read ({} rows): put it into the prompt if it belongs to it",
        "joined": "{} row(s) have an input or context: it is joined to the prompt",
        "scored_lower": "{} row(s) score the rejected text higher than the chosen one: are the two swapped?",
        "glued": "{} row(s) whose two answers begin with the prompt or a cue such as 'Assistant:', taken so",
        "outputs": "{} row(s) with two outputs: the first is taken as chosen",
    }
    notes = [text.format(counts[name]) for name, text in found.items() if counts.get(name)]
    ignored = {key.removeprefix(IGNORED): n for key, n in counts.items() if key.startswith(IGNORED)}
    return notes + ([f"keys ignored: {counted(ignored)}"] if ignored else [])
