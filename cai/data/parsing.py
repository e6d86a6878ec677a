"""Model text -> Parsed | Unparsed, one function a stage. Pure: no model, no clock, no state; never raises.

Owns what is stripped (role tags and labels at the start, quotation marks around the whole), what is refused and under
which name: form only, what a text says is asked of `metrics.wordings`. Doesn't own whether a completion ran to its
limit (`finish`, the caller's), nor whether it is good (`evaluate`). Reasons are `name` or `name: detail`.

Invariants: a Parsed text is not empty, has no white space around it, and parses to itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from cai.metrics.text import ngrams, repetition, words
from cai.metrics.wordings import finds_nothing, has_control_token, is_remark, leftovers, only_approves
from cai.store.jsonl import clean


@dataclass(frozen=True, slots=True)
class Parsed:
    """`flags`: "control_token" (the text spells one), "no_issue" (a critique that finds nothing)."""

    text: str
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Unparsed:
    reason: str


MIN_WORDS = {"instruction": 4, "answer": 1, "critique": 5, "revision": 1}
MAX_INSTRUCTION_CHARACTERS = 800
MAX_REPETITION = 0.4  # share of 6-word sequences that came before; a poem with a refrain stays under 0.3

ROLES = r"human|user|assistant|ai|bot|system"
LABELS = {
    "instruction": rf"{ROLES}|message|instruction|request|question|prompt|order",
    "answer": rf"{ROLES}|answer|response|reply",
    "critique": rf"{ROLES}|critique|review|answer|response",
    "revision": rf"{ROLES}|answer|response|reply|new answer",
}
LABEL = {stage: re.compile(rf"[#*_>\s]*(?:{names})[*_]*:[*_]*\s*", re.I) for stage, names in LABELS.items()}
HEADING = re.compile(r"#{1,6}[ \t]*(?:message|critique|new answer|answer|response)[ \t]*:?[ \t]*(?:\n\s*|$)", re.I)
ROLE_TAG = re.compile(rf"\n[#*_>\s]*(?:{ROLES})[*_]*:", re.I)
LIST_ITEM = re.compile(r"(?:^|\n)\s*(?:[-*•]|\d{1,2}[.)])\s")
ORDER_FIELD = re.compile(r"\b(?:topic|kind|person|persona|tone)\s*:", re.I)
GLUED_ANSWER = re.compile(
    r"[?.!][\"']?\s+(?:sure\b|certainly\b|of course[,!]|absolutely[,!]|great question"
    r"|here(?:'s| is| are) (?:a|an|the|some)\b"
    r"|i(?:'d| would) be happy to|(?:answer|response|assistant)\s*:)",
    re.I,
)
META_INSTRUCTION = re.compile(
    r"^\W*(?:sure|certainly|of course|okay)\b[^?]{0,40}\bhere\b"
    r"|\bhere(?:'s| is) (?:a|the|one|your) (?:possible |sample )?message\b"
    r"|\bas an ai\b|\bfits the topic\b",
    re.I,
)
ASSISTANT_VOICE = re.compile(  # a person rarely opens a request so; a small chat model often does
    r"i(?:['’]m| am) (?:so |very |really |truly )?(?:sorry|glad (?:to|you|that)|afraid (?:i|that)|happy to|here to)\b"
    r"|sorry,? but i can(?:not|['’]t)?\b|no worries\b"
    r"|i(?:['’]d| would) be (?:happy|glad) to\b|i can(?:not|['’]t) (?:help|assist|fulfil|comply)\b|as an ai\b",
    re.I,
)
REQUEST = re.compile(  # a false alarm costs one more try
    r"[?？]|\b(?:how|what|why|which|when|where|who|whether|please|help|advice|advise|suggest|recommend|ideas?|tips?)\b"
    r"|\b(?:can|could|would|will) you\b"
    r"|\b(?:i|we)(?: am|['’]m|['’]d| would| really){0,3} (?:need|want|like|looking for)\b"
    r"|\b(?:tell|give|show|teach|find|send|make|write|explain|describe|list|name|compare|summari[sz]e|outline|plan|draft"
    r"|review|check|design|create|translate|define|discuss|answer|prove|solve|calculate|imagine|pretend|argue|convince)\b",
    re.I,
)


SENTENCE = re.compile(r".+?(?:[.!?][\"”'’)]*(?=\s|$)|\n+|$)", re.S)
SAME = 0.8  # share of a sentence's 4-word sequences that stood there before, from which on it is the same again


def before_repetition(text: str) -> str:
    """The text up to the first sentence that says what an earlier one said, begins the verdict anew or is a heading.

    A base model that has said what it had to say goes on; of 30 critiques refused as looping, 30 had begun soundly.
    """
    seen: set[tuple[str, ...]] = set()
    end = 0
    for found in SENTENCE.finditer(text):
        units = re.findall(r"\w+", found[0].lower())
        grams = [tuple(units[i : i + 4]) for i in range(max(1, len(units) - 3))] if units else []
        again = len(units) > 3 and sum(gram in seen for gram in grams) >= SAME * len(grams)
        if end and (again or re.match(r"\W*no (?:issue|problem)s?\b\W*:|\s*#{1,6}\s", found[0], re.I)):
            return text[:end].rstrip()
        seen.update(grams)
        end = found.end()
    return text


LEAST_WORDS = 12  # in front of a remark: a text that begins with one is no answer
LAST_SENTENCES = 3
_ITEM = re.compile(r"[ \t>]*(?:\(?\d{1,3}[.)]|[-*+•–])(?:[ \t*_]|\Z)")
_MARK_ALONE = re.compile(r"[ \t>]*(?:\(?\d{1,3}[.)]|[-*+•–]|-{3,})[ \t*_]*\Z")
_HEADING_ALONE = re.compile(r"[ \t]*#{2,6}[ \t]+\S[^\n]*\Z")


_JOINED = re.compile(r"^\W*(?:however|again|also|so|but|and|therefore|please note that)\b\W*", re.I)


def before_remarks(text: str, request: str = "") -> str:
    """The text up to where it begins to speak of itself: with a paragraph, "this", or near its end.

    Of 435 revisions of a 1.5B model 16 did ("This answer takes the person seriously and avoids ..."), and a judge likes
    the praise: one stood under the highest margin of its run. Code and entries of a list are left alone.
    """
    place = remark(text, request)
    kept = _unhung(text[:place]) if place is not None else text
    return kept if len(kept.split()) >= LEAST_WORDS else text


def remark(text: str, request: str = "", anywhere: bool = False) -> int | None:
    """Where the first sentence stands that judges the text it is in. `anywhere`: also where no cut could be made."""
    found = [one for one in SENTENCE.finditer(text) if one[0].strip()]
    for number, one in enumerate(found):
        start = one.start() + len(one[0]) - len(one[0].lstrip())
        line = text.rfind("\n", 0, start) + 1
        if _ITEM.match(text, line) or text[line : line + 1] == "#" or text.count("```", 0, start) % 2:
            continue
        sentence, before = one[0].strip(), text[:start]
        opens = not before.strip() or before.rstrip(" \t*_").endswith("\n") or number >= len(found) - LAST_SENTENCES
        if anywhere:
            sentence = _JOINED.sub("", sentence)
        elif not (opens or re.match(r"\W*(?:note:? )?this\b", sentence, re.I)):
            continue
        if is_remark(sentence, before, request):
            return one.start()
    return None


def _unhung(text: str) -> str:
    """Without entries of a list, or a heading, that a cut left empty at the end."""
    while True:
        text = text.rstrip()
        line = text.rfind("\n") + 1
        if not line or not (_MARK_ALONE.match(text, line) or _HEADING_ALONE.match(text, line)):
            return text
        text = text[:line]


_KEEPS = re.compile(r"[:\"“”`]|\b(?:repeat|continue|begin|start|correct|proofread|translate|rewrite|finish)\b", re.I)


def behind_echo(text: str, request: str) -> str:
    """The text without the request that it says once more, from its first sentence on, before it answers it."""
    asked = [words for one in SENTENCE.findall(request) if (words := re.findall(r"\w+", one.lower()))]
    first = next((words for words in asked if len(words) >= ECHO_WORDS), next(iter(asked), []))  # behind a greeting
    if _KEEPS.search(request) or not _alike(text[: 2 * len(" ".join(first)) + 40], first):
        return text
    grams, start = {*_grams(request)}, 0
    for found in SENTENCE.finditer(text):
        if not (words := re.findall(r"\w+", found[0].lower())):
            continue
        units, again = _grams(found[0]), words in asked
        long = bool(units) and len(found[0].split()) >= ECHO_WORDS
        if (long and (again or sum(gram in grams for gram in units) >= SAME * len(units))) or (again and start):
            start = found.end()
        elif start or not (again or len(words) <= GREETING):  # one may stand before what is said once more
            break
    kept = text[start:].lstrip()
    return kept if start and len(kept.split()) >= LEAST_WORDS else text


def _alike(start: str, wanted: list[str]) -> bool:
    """The text begins with these words, a greeting more or less."""
    words = re.findall(r"\w+", start.lower())
    return any(words[i : i + 5] == wanted[j : j + 5] != [] for i in (0, 1) for j in (0, 1))


ECHO_WORDS = 6  # of a sentence, fewer may well be in both
GREETING = 2  # words at most


def _grams(text: str) -> list[tuple[str, ...]]:
    return ngrams(re.findall(r"\w+", text.lower()), 4)


def before_loop(text: str) -> str:
    """A text that would be refused as looping, up to where it begins to say nothing new; any other as it is."""
    if repetition(text) <= MAX_REPETITION:
        return text
    kept = before_repetition(text)
    grams = {*_grams(kept)}
    rest = [gram for one in SENTENCE.findall(text[len(kept) :]) for gram in _grams(one)]
    loops = sum(gram in grams for gram in rest) >= SAME * len(rest)
    return _unhung(kept) if loops else text  # a song's next verse says something new


def bare(text: str, request: str) -> str:
    """An answer alone: without the request before it, without what it says again, or of itself, behind it."""
    while (kept := before_remarks(before_loop(behind_echo(text, request)), request)) != text:
        text = kept
    return text


def instruction(text: str) -> Parsed | Unparsed:
    """One request in one paragraph, put the way a person types it."""
    return _parse(text, "instruction", _instruction_fault)


def answer(text: str) -> Parsed | Unparsed:
    return _parse(text, "answer", _run_on)


def critique(text: str, opened: bool = False) -> Parsed | Unparsed:
    """A critique; one that goes on to write the new answer is refused.

    `opened`: it had to begin with a quotation, so it cannot say "No issue": it says that what it quotes does no harm.
    """
    found = _parse(text, "critique", _critique_fault)
    if opened and isinstance(found, Parsed) and "no_issue" not in found.flags and only_approves(found.text):
        return Parsed(found.text, (*found.flags, "no_issue"))
    return found


def revision(text: str, critique: str = "", case: str = "") -> Parsed | Unparsed:
    """The new answer alone: anything that talks about the task, and a judgement out of its critique, is refused.

    `case`: what the sentences may be from, the request and the answer that is revised.
    """
    found = _parse(text, "revision", _revision_fault)
    if isinstance(found, Parsed) and (copied := verdict_of_critique(found.text, critique, case)):
        return Unparsed(f"copied_critique: {copied[:80]}")
    return found


def verdict_of_critique(text: str, critique: str, case: str) -> str:
    """The first sentence that a text has word for word from its critique, not from its case, and that judges; or "".

    Of 1,085 revisions of a 1.5B model 63 had one ("The reader would wrongly rely on this claim"); of 2,148 later ones 9
    more say what is true or who would be hurt. What a critique says
    of the matter itself, or between quotation marks, belongs into the new answer.
    """
    judging = [one for one in SENTENCE.findall(text) if _JUDGES.search(one.strip())]
    offered = " | ".join(_QUOTED.findall(critique)) if judging else ""  # what it says should stand there
    said, known = (f" {' '.join(words(part))} " for part in (critique, f"{case}\n{offered}")) if judging else ("", "")
    for one in judging:
        own = words(one)
        same = f" {' '.join(own)} "
        if len(own) >= ECHO_WORDS and same in said and same not in known:
            return " ".join(one.split())
    return ""


_QUOTED = re.compile(r"[\"“]([^\"”]+)[\"”]")
_JUDGES = re.compile(
    r"\b(?:answers?|response|readers?|instruction|tone|claim|critique|critic|revision|rewrite|principle|wording"
    r"|(?:could|should|can|may) stand (?:there|as it is)|the advice|best advice"
    r"|would be (?:harmed|hurt|misled|deceived)|(?:harmed|hurt|misled) by (?:being|believing)"
    r"|(?:is|are|was|were)(?:n['’]t| not)? (?:true|false|(?:in)?correct|misleading))\b"
    r"|^\W*[\"“][^\"”]+[\"”],? (?:is|are|was|were|does|do|has|would|could|should|means|puts|makes|gives|tells|evades"
    r"|exposes|speaks|agrees)\b",
    re.I,
)


def _parse(text: str, stage: str, fault: Callable[[str], str]) -> Parsed | Unparsed:
    text = _strip(clean(text), stage)
    if not re.search(r"\w", text):
        return Unparsed("empty")
    if len(text.split()) < MIN_WORDS[stage] and len(text) < 20:
        return Unparsed(f"too_short: {len(text.split())} words")
    if (share := repetition(text)) > MAX_REPETITION:
        return Unparsed(f"looping: {share:.2f} of the 6-word sequences repeat")
    if reason := fault(text):
        return Unparsed(reason)
    if stage == "instruction":
        text = re.sub(r"\s*\n\s*", " ", text).strip()  # one that was merely wrapped
    flags = {"control_token": has_control_token(text), "no_issue": stage == "critique" and finds_nothing(text)}
    return Parsed(text, tuple(name for name, on in flags.items() if on))


def _strip(text: str, stage: str) -> str:
    """Without white space, labels and quotation marks around the text; until nothing more comes off."""
    while True:
        before, text = text, text.strip().strip("\x00")
        for pattern in (HEADING, LABEL[stage]):
            if found := pattern.match(text):
                text = text[found.end() :]
        text = _unquoted(text)
        if text == before:
            return text


def _unquoted(text: str) -> str:
    """Without one pair of quotation marks (or asterisks) around the whole, if it holds no other such mark."""
    pair, inside = text[:1] + text[-1:], text[1:-1]
    return inside if len(text) > 1 and pair in ('""', "“”", "''", "‘’", "**") and not set(inside) & set(pair) else text


def _instruction_fault(text: str) -> str:
    if len(text) > MAX_INSTRUCTION_CHARACTERS:
        return f"too_long: {len(text)} characters"
    if len(LIST_ITEM.findall(text)) > 1:
        return "list: several entries instead of one request"
    if ORDER_FIELD.search(text):
        return "order_repeated: it names a field of the order"
    if ROLE_TAG.search(text):
        return "role_tag: it goes on with another turn"
    if META_INSTRUCTION.search(text):
        return "meta: it talks about the task"
    if GLUED_ANSWER.search(text):
        return "answer_glued: the request is followed by an answer"
    if re.search(r"\n\s*\n", text):
        return "several_paragraphs"
    if not REQUEST.search(text):
        return "no_request: it asks for nothing"
    return "assistant_voice: it replies instead of asking" if ASSISTANT_VOICE.match(text) else ""


def _run_on(text: str) -> str:
    return "role_tag: it goes on with another turn" if ROLE_TAG.search(text) else ""


def _critique_fault(text: str) -> str:
    found = leftovers(text, ("announced", "label"))
    return f"leftover: {found.split(': ', 1)[1]}" if found else _run_on(text)


def _revision_fault(text: str) -> str:
    place = remark(text)
    found = leftovers(text) or (f"about itself: {text[place:].strip()[:80]}" if place is not None else "")
    return _run_on(text) or (f"leftover: {found}" if found else "")
