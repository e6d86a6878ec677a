"""Guards: safety models that read a prompt and a reply, and the rules by which a pair is dropped.

Owns the interface, how a probability is read from the first verdict token, the drop rules and their summary. Formats
are `guardformats`', loading is `auxiliary`'s, the records are `stages.guard`'s. The stand-in proves the path and
measures nothing; it is used only where the recipe names it, and is marked in every row and figure.
Legend: unsafe = P(unsafe label) over the guard's labels, read at the first token of the verdict.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from cai.errors import CaiError
from cai.metrics.figure import Figure, by_metric, indicator, rate
from cai.models import guard_formats as formats
from cai.models.auxiliary import Auxiliary, chat_ids, choices, why_none, written
from cai.models.guard_formats import EXCLUDED, LLAMA, QWEN, QWEN_CATEGORIES, QWEN_LABELS, Exchange
from cai.recipe.prompts import digest
from cai.recipe.settings_benchmarks import STAND_IN, GuardSection
from cai.run.context import Context
from cai.store.jsonl import Row
from cai.store.row_types import Record

if TYPE_CHECKING:
    from cai.models.checks import JudgeCheck

CATEGORY_TOKENS = 24
YES_NO = (" Yes", " No")
NEUTRAL_UNSAFE = 0.2  # the stand-in is shifted so that a greeting scores this
LICENCE = "Llama licence: a model trained with its help has a name that begins with Llama"
REMEDY = (
    "Download it (a gated one: accept its licence on the hub and set HF_TOKEN), give a local folder, "
    'or turn the filter off: --set guard.enabled=false. For a trial only: guard.model = "stand-in".'
)


@dataclass(frozen=True)
class Judgement:
    """What a guard says of one exchange. `unsafe` None: it could not be read, and `reason` says why."""

    unsafe: float | None
    label: str = ""
    category: str = ""
    refuses: bool | None = None
    reason: str | None = None


class Guard(Protocol):
    """A guard judges exchanges in bulk, in order; `sha` is of its prompt's format."""

    name: str
    stand_in: bool
    sha: str

    def judge(self, exchanges: Sequence[Exchange], context: Context) -> list[Judgement]: ...


def make_guard(auxiliary: Auxiliary, section: GuardSection) -> Guard:
    """The guard of the recipe over loaded weights; of the fake model, a hash."""
    if auxiliary.stand_in and auxiliary.facts["of"].startswith("fake"):
        return HashGuard()
    if style_of(section) == LLAMA:
        return LlamaGuard(auxiliary, section)
    return QwenGuard(auxiliary, section)


def style_of(section: GuardSection) -> str:
    """Which format: by the recipe, else by the name; the stand-in has one. Error: a name that tells nothing."""
    if section.model == STAND_IN:
        return QWEN
    if section.style != "auto":
        return section.style
    name = section.model.lower().replace("_", "-")
    if "qwen3guard" in name:
        return QWEN
    if "llama-guard" in name or "llamaguard" in name:
        return LLAMA
    raise CaiError(f'guard.style: {section.model} does not tell its format. Write "qwen3guard" or "llama-guard".')


class HashGuard:
    """The stand-in of the fake model: a number between 0 and 0.6 made of the text."""

    name, stand_in, sha = STAND_IN, True, digest(b"hash guard")

    def judge(self, exchanges: Sequence[Exchange], context: Context) -> list[Judgement]:
        return [self._one(exchange) for exchange in exchanges]

    def _one(self, exchange: Exchange) -> Judgement:
        number = int.from_bytes(hashlib.blake2b(exchange.reply.encode(), digest_size=4).digest(), "little")
        unsafe = round(0.6 * number / 2**32, 6)
        return Judgement(unsafe, "Unsafe" if unsafe >= 0.5 else "Safe", QWEN_CATEGORIES[number % 3], False)


class QwenGuard:
    """Qwen3Guard-Gen: `Safety: X`, `Categories: ...`, `Refusal: Yes|No`. The stand-in answers our own text in it."""

    def __init__(self, auxiliary: Auxiliary, section: GuardSection) -> None:
        self.auxiliary, self.section = auxiliary, section
        self.name, self.stand_in = auxiliary.name, auxiliary.stand_in
        self.parts = [] if self.stand_in else formats.template_parts(auxiliary.hf_tokenizer, QWEN)
        self.sha = digest(QWEN.encode(), *([b"stand-in"] if self.stand_in else [part.encode() for part in self.parts]))
        self._shift: float | None = None

    def judge(self, exchanges: Sequence[Exchange], context: Context) -> list[Judgement]:
        heads = [self._head(exchange) for exchange in exchanges]
        labels, refusals = self._read(heads, context)
        shares = {i: _shares(logps) for i, logps in labels.items()}
        unsafe = {i: self._shifted(self._unsafe(share), context) for i, share in shares.items()}
        verdicts = {i: self._verdict(shares[i], value >= self.section.threshold) for i, value in unsafe.items()}
        flagged = {i: heads[i] for i, word in verdicts.items() if word != "Safe"}
        categories = self._categories(flagged, verdicts, context)
        again = self._refusals(flagged, verdicts, categories, context)
        told = {i: (again if i in flagged else refusals).get(i) for i in shares}  # None: no number
        return [
            Judgement(
                round(unsafe[i], 6),
                QWEN_LABELS[max(range(3), key=shares[i].__getitem__)],
                categories.get(i, ""),
                told[i],
            )
            if i in unsafe
            else Judgement(None, reason=why_none(self.auxiliary, heads[i]))
            for i in range(len(exchanges))
        ]

    def _read(
        self, heads: Sequence[tuple[int, ...]], context: Context
    ) -> tuple[dict[int, list[float]], dict[int, bool]]:
        """Log-probs of the labels at the verdict's first telling token; and whether the reply refuses if it is Safe.

        One row of the engine reads both: the lines of a safe verdict are known before it is asked, and stand first, so
        that the verdict's shorter row is found in theirs. A verdict that is not Safe asks for its refusal again.
        """
        encode = self.auxiliary.tokenizer.encode
        lead, safe = tuple(encode("Safety:")), tuple(encode(_lines("Safe", "None")))
        labels = tuple(f" {label}" for label in QWEN_LABELS)
        asks: dict[int, tuple[tuple[int, ...], tuple[str, ...]]] = {}
        for i, head in enumerate(heads):
            asks[2 * i] = (head + safe, YES_NO)
            asks[2 * i + 1] = (head + lead, labels)
        found = choices(self.auxiliary, asks, context, first=True)
        refuses = {i // 2: yes > no for i, (yes, no, *_) in found.items() if i % 2 == 0}
        return {i // 2: logps for i, logps in found.items() if i % 2}, refuses

    def _unsafe(self, shares: Sequence[float]) -> float:
        return shares[1] + (shares[2] if self.section.controversial == "unsafe" else 0.0)

    def _verdict(self, shares: Sequence[float], flagged: bool) -> str:
        """The label that the further lines are read after: the likelier of the two unsafe ones, or Safe."""
        return QWEN_LABELS[1 if shares[1] >= shares[2] else 2] if flagged else "Safe"

    def _shifted(self, unsafe: float, context: Context) -> float:
        """A stand-in's own bias cancelled by what it says of a greeting; a guard's figure as it is."""
        if not self.stand_in:
            return unsafe
        if self._shift is None:
            labels, _ = self._read([self._head(Exchange("Hello!", "Hello! How can I help you today?"))], context)
            if 0 not in labels:
                raise CaiError("guard.model: the stand-in has no finite verdict on a greeting. Take a guard.")
            self._shift = _logit(NEUTRAL_UNSAFE) - _logit(self._unsafe(_shares(labels[0])))
        return 1.0 / (1.0 + math.exp(-(_logit(unsafe) + self._shift)))

    def _head(self, exchange: Exchange) -> tuple[int, ...]:
        if self.stand_in:
            return chat_ids(self.auxiliary, "", stand_in_text(exchange))
        return formats.exchange_ids(self.parts, exchange, QWEN, self.auxiliary.tokenizer)

    def _categories(
        self, heads: Mapping[int, tuple[int, ...]], verdicts: Mapping[int, str], context: Context
    ) -> dict[int, str]:
        leads = {i: f"Safety: {verdicts[i]}\nCategories:" for i in heads}
        texts = continuations(self.auxiliary, heads, leads, context)
        return {i: formats.qwen_category(texts.get(i, "")) for i in heads}

    def _refusals(
        self,
        heads: Mapping[int, tuple[int, ...]],
        verdicts: Mapping[int, str],
        categories: Mapping[int, str],
        context: Context,
    ) -> dict[int, bool]:
        """Yes against No in the third line, after the two lines that this verdict has; None: no number."""
        asks = {}
        for i, head in heads.items():
            named = categories.get(i, "None")
            text = _lines(verdicts[i], "None" if named == "unparsed" else named)
            asks[i] = (head + tuple(self.auxiliary.tokenizer.encode(text)), YES_NO)
        return {i: yes > no for i, (yes, no) in choices(self.auxiliary, asks, context, first=True).items()}


class LlamaGuard:
    """Llama Guard 3: `safe`, or `unsafe` and a line of codes; excluded categories are not in its prompt."""

    def __init__(self, auxiliary: Auxiliary, section: GuardSection) -> None:
        self.auxiliary, self.section = auxiliary, section
        self.name, self.stand_in = auxiliary.name, auxiliary.stand_in
        self.parts = formats.template_parts(auxiliary.hf_tokenizer, LLAMA, section.excluded)
        self.sha = digest(LLAMA.encode(), *(part.encode() for part in self.parts))

    def judge(self, exchanges: Sequence[Exchange], context: Context) -> list[Judgement]:
        heads = [formats.exchange_ids(self.parts, exchange, LLAMA, self.auxiliary.tokenizer) for exchange in exchanges]
        asks = {i: (head, ("safe", "unsafe")) for i, head in enumerate(heads)}
        found = choices(self.auxiliary, asks, context, first=True)
        unsafe = {i: _shares(logps)[1] for i, logps in found.items()}
        flagged = {i: heads[i] for i, value in unsafe.items() if value >= self.section.threshold}
        texts = continuations(self.auxiliary, flagged, dict.fromkeys(flagged, "unsafe\n"), context)
        return [
            self._judgement(unsafe[i], texts.get(i, ""))
            if i in unsafe
            else Judgement(None, reason=why_none(self.auxiliary, heads[i]))
            for i in range(len(exchanges))
        ]

    def _judgement(self, unsafe: float, text: str) -> Judgement:
        """What the recipe excludes does not count, even where the guard names it although its prompt has it not."""
        category = formats.llama_category(text, self.section.excluded)
        if category == EXCLUDED:
            return Judgement(0.0, "safe", category)
        return Judgement(round(unsafe, 6), "unsafe" if unsafe >= 0.5 else "safe", category)


def _lines(verdict: str, category: str) -> str:
    """What stands before the answer of Qwen3Guard's third line."""
    return f"Safety: {verdict}\nCategories: {category}\nRefusal:"


def stand_in_text(exchange: Exchange) -> str:
    return (
        "Read a request and the reply of an assistant. Say whether the reply is Safe, Unsafe or Controversial, name "
        "the kind of unsafe content, and say whether the reply is a refusal.\n\n"
        f"Request: {exchange.prompt}\n\nReply: {exchange.reply}"
    )


def _shares(logps: Sequence[float]) -> list[float]:
    top = max(logps)
    weights = [math.exp(logp - top) for logp in logps]
    return [weight / math.fsum(weights) for weight in weights]


def _logit(share: float) -> float:
    clipped = min(max(share, 1e-9), 1.0 - 1e-9)
    return math.log(clipped / (1.0 - clipped))


def continuations(
    auxiliary: Auxiliary, heads: Mapping[int, tuple[int, ...]], leads: Mapping[int, str], context: Context
) -> dict[int, str]:
    """A few greedy tokens after each head and its lead, where the categories stand; none where there is no room."""
    prompts = {i: head + tuple(auxiliary.tokenizer.encode(leads[i])) for i, head in heads.items()}
    return written(auxiliary, prompts, CATEGORY_TOKENS, context, shares=True)


# --- rules


def verdict(pool: str, chosen: Judgement, rejected: Judgement, section: GuardSection) -> tuple[str, str]:
    """("", "") to keep the pair, else (reason, category)."""
    if chosen.unsafe is None or rejected.unsafe is None:
        return f"unscored: {chosen.reason or rejected.reason}", "unscored"
    if chosen.unsafe >= section.threshold:
        category = chosen.category or "unparsed"
        return f"chosen_unsafe: {category} {chosen.unsafe:.2f}", category
    if pool == "redteam" and not chosen.unsafe < rejected.unsafe:
        return f"not_safer: {chosen.unsafe:.3f} against {rejected.unsafe:.3f}", "not_safer"
    return "", ""


def summary(rows: Sequence[Record], section: GuardSection, check: JudgeCheck | None = None) -> dict[str, Figure]:
    """Share of judged pairs that were dropped, reasons, rates by category and pool, the over-filter alarm.

    `check`: what the guard said of its check set, which stands behind its name.
    """
    from cai.models.checks import label

    judge = label(section.model, check)
    reasons = Counter(str(row["reason"]).split(":")[0] for row in rows if row["status"] != "ok")
    dropped = rate("guard.dropped", [indicator(row["status"] != "ok") for row in rows], judge=judge)
    unscored = sum(row["chosen_unsafe"] is None or row["rejected_unsafe"] is None for row in rows)
    dropped.facts.update(
        {
            "reasons": dict(sorted(reasons.items())),
            "by_category": dict(sorted(Counter(r["category"] for r in rows if r["status"] != "ok").items())),
            "by_pool": {pool: _pool_rate(rows, pool) for pool in ("benign", "redteam")},
            "alarm": dropped.value is not None and dropped.value > section.alarm,
            "unscored": unscored,
            "stand_in": section.model == STAND_IN,
            "proven": check is not None and check.proven,
            "excluded": list(section.excluded) if style_of(section) == LLAMA else [],
        }
    )
    if style_of(section) == LLAMA:
        dropped.facts["licence"] = LICENCE
    scored = [unsafe for row in rows if (unsafe := row["chosen_unsafe"]) is not None]
    kept = rate("guard.chosen_unsafe", [indicator(unsafe >= section.threshold) for unsafe in scored], judge=judge)
    return by_metric(dropped, kept)


def described(section: GuardSection) -> str:
    """How a card names the guard that filtered the pairs: the stand-in marked, Llama's licence told; "" without one."""
    from cai.models.checks import marked

    if not section.enabled:
        return ""
    return marked(section.model) + (f". {LICENCE}" if style_of(section) == LLAMA else "")


def _pool_rate(rows: Sequence[Record], pool: str) -> Row:
    mine = [row for row in rows if row["pool"] == pool]
    return {"n": len(mine), "dropped": sum(row["status"] != "ok" for row in mine)}
