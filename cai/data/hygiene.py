"""Pair hygiene before training: marks, leaks, evasions, length balance, displacement. Counts always, removes as told.

Owns which accepted pairs are dropped so that DPO does not learn a shortcut, and the numbers that say so; owns no file.
Pure: which pairs go depends on their texts, item numbers and people's marks only. Invariant: `total == kept + removed`,
no rule leaves fewer than `min_pairs`, and none over shares less than `max_removed_share` allows (a person's mark is no
rule: what somebody refused goes).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from cai.data.leaks import Leak, find_leaks, phrases
from cai.metrics.text import rouge_l, words
from cai.metrics.wordings import has_disclaimer, has_hedge, is_refusal
from cai.recipe.settings_evaluation import HygieneSection
from cai.store.jsonl import Row
from cai.store.row_types import Pair

MIN_PAIRS = 1  # no rule leaves fewer
SHOWN = 20


@dataclass(frozen=True, slots=True)
class Facts:
    """What rules and figures ask of one pair, read off its texts once: in a report that is most of the time.

    `excess`: words by which chosen is longer. `similarity`: ROUGE-L of both. `evasions`: its kinds of `EVASIONS`.
    """

    excess: int
    similarity: float
    evasions: frozenset[str]

    @classmethod
    def of(cls, pair: Pair) -> Facts:
        chosen, rejected = pair["chosen"], pair["rejected"]
        kinds = frozenset(kind for kind, test in EVASIONS.items() if test(pair))
        return cls(len(words(chosen)) - len(words(rejected)), rouge_l(chosen, rejected), kinds)


@dataclass(frozen=True)
class Seen:
    """What is known of all pairs before a rule looks: leaks, and the facts of each by item."""

    leaks: Sequence[Leak]
    facts: Mapping[int, Facts]

    @classmethod
    def of(cls, pairs: Sequence[Pair], section: HygieneSection) -> Seen:
        return cls(find_leaks(pairs, section), {pair["item"]: Facts.of(pair) for pair in pairs})


@dataclass(frozen=True)
class Hygiene:
    """`kept` goes into training; `removed` rows carry item, rule and detail; `facts` are JSON-able counts."""

    kept: list[Pair]
    removed: list[Row]
    leaks: list[Leak] = field(default_factory=list)
    facts: Row = field(default_factory=dict)


def clean(
    pairs: Sequence[Pair],
    section: HygieneSection,
    refused: Mapping[int, str] | None = None,
    drawn: Mapping[int, Collection[str]] | None = None,
) -> Hygiene:
    """Apply every rule that is switched on, in a fixed order; a rule that is off is only counted.

    `refused`: item -> which mark refused it; those go first where `hygiene.reviews` is on. `drawn`: item -> ids of the
    principles that its rounds were about; those of `hygiene.without_principles` go before all.
    """
    seen = Seen.of(pairs, section)
    kept: list[Pair] = list(pairs)
    removed: list[Row] = []
    rules: Row = {}

    def apply(name: str, marked: Mapping[int, str], idle: str, least: int = 0) -> None:
        gone = {} if idle else dict(list(marked.items())[: max(0, len(kept) - least)])
        rules[name] = {"active": not idle, "idle": idle, "marked": len(marked), "removed": len(gone)}
        removed.extend({"item": item, "rule": name, "detail": detail} for item, detail in gone.items())
        kept[:] = [pair for pair in kept if pair["item"] not in gone]

    if section.without_principles:
        named = {pair["item"]: _left_out(pair, section, drawn or {}) for pair in pairs}
        apply("without_principles", {item: found for item, found in named.items() if found}, "")
    if section.reviews:
        marked = {pair["item"]: refused[pair["item"]] for pair in kept if refused and pair["item"] in refused}
        apply("reviews", marked, "" if section.enabled else "off")
    for name, rule in RULES.items():
        idle, least = _idle(name, len(pairs), section), _floor(name, len(pairs), section)
        apply(name, rule(kept, section, seen), idle, least)
    assert len(pairs) == len(kept) + len(removed), (len(pairs), len(kept), len(removed))
    facts = {"total": len(pairs), "kept": len(kept), "removed": len(removed), "rules": rules}
    before, after = ([seen.facts[pair["item"]] for pair in some] for some in (pairs, kept))
    facts |= {"before": described(before), "after": described(after)}
    facts["leaks"] = [asdict(leak) for leak in seen.leaks[:SHOWN]]
    return Hygiene(kept, removed, list(seen.leaks), facts)


def _left_out(pair: Pair, section: HygieneSection, drawn: Mapping[int, Collection[str]]) -> str:
    """Which of the principles that are left out this pair's rounds were about; "" for none."""
    return ", ".join(name for name in section.without_principles if name in drawn.get(pair["item"], ()))


def _idle(rule: str, total: int, section: HygieneSection) -> str:
    """Why a rule removes nothing, however much it marks; "" if it does."""
    if not (section.enabled and getattr(section, rule)):
        return "off"
    few = rule in QUOTA_RULES and total < section.quota_min_pairs
    return f"fewer than {section.quota_min_pairs} pairs" if few else ""  # a share of ten pairs says nothing


def _floor(rule: str, total: int, section: HygieneSection) -> int:
    """How many pairs a rule leaves at least.

    What all revisions have in common no quota can cure: dropping pairs leaves its share as it is, down to the last one.
    """
    share = 1.0 - section.max_removed_share if rule in QUOTA_RULES else 0.0
    return max(MIN_PAIRS, math.ceil(share * total))


def held_back(facts: Row) -> list[str]:
    """One line for each rule at work that marked more than it was allowed to remove."""
    rules = facts["rules"].items()
    return [
        f"hygiene: {name} marked {rule['marked']} of {facts['total']} pairs and removed {rule['removed']}: more would "
        "leave too few (hygiene.max_removed_share, min_pairs). What marks them is in most revisions; look at those."
        for name, rule in rules
        if rule["active"] and rule["marked"] > rule["removed"]
    ]


def lines(facts: Row) -> list[str]:
    """What the training pairs were and are (length, likeness, evasions), and which rules were held back; for pages."""
    found = []
    for when, of in (("Before hygiene", facts["before"]), ("After it", facts["after"])):
        if of["n"] and (facts["removed"] or of is facts["before"]):
            kinds = ", ".join(f"{kind} {of[f'{kind}_share']:.0%}" for kind in EVASIONS)
            found.append(
                f"{when}, {of['n']} training pairs: chosen is longer in {of['chosen_longer_share']:.0%} (length alone "
                f"tells it in {of['length_only_accuracy']:.0%}); ROUGE-L with rejected {of['mean_similarity']:.2f}; "
                f"{kinds}."
            )
    return found + held_back(facts)


def describe(pairs: Sequence[Pair]) -> Row:
    """Length, evasion and similarity figures of a set of pairs; shares with n, None where there is no pair."""
    return described([Facts.of(pair) for pair in pairs])


def described(facts: Sequence[Facts]) -> Row:
    """The figures of `describe`. Similarity near 1: DPO lowers the likelihood of both (Razin et al. 2024)."""
    n = len(facts)
    if not n:
        return {"n": 0}
    longer = sum(of.excess > 0 for of in facts)
    equal = sum(of.excess == 0 for of in facts)
    share = (longer + 0.5 * equal) / n
    return {
        "n": n,
        "chosen_longer_share": round(share, 4),
        "length_only_accuracy": round(max(share, 1.0 - share), 4),
        "mean_similarity": round(sum(of.similarity for of in facts) / n, 4),
        **{f"{kind}_share": round(sum(kind in of.evasions for of in facts) / n, 4) for kind in EVASIONS},
    }


def _order(pair: Pair) -> bytes:
    """Which pairs of an over-full kind go first: by hash, so that no topic or position is favoured."""
    return hashlib.sha256(str(pair["item"]).encode()).digest()


def _above_quota(
    pairs: Sequence[Pair],
    marked: Sequence[Pair],
    quota: float,
    detail: str,
    order: Callable[[Pair], bytes | tuple[int, bytes]] = _order,
) -> dict[int, str]:
    """The marked pairs beyond `quota` of what would then be left: m - k <= quota (n - k), first in `order` first."""
    excess = len(marked) - quota * len(pairs)
    if excess <= 0:
        return {}
    count = len(marked) if quota >= 1.0 else min(len(marked), -int(-excess // (1.0 - quota)))
    return {pair["item"]: detail for pair in sorted(marked, key=order)[:count]}


def _leak_rule(pairs: Sequence[Pair], section: HygieneSection, seen: Seen) -> dict[int, str]:
    """Leak by leak, the pairs that hold most leaks first: fewer go in all."""
    wanted = {(leak.place, leak.phrase) for leak in seen.leaks}
    held = {pair["item"]: wanted & phrases(pair["chosen"]) for pair in pairs} if wanted else {}
    gone: dict[int, str] = {}
    for leak in seen.leaks:
        left = [pair for pair in pairs if pair["item"] not in gone]
        holders = [pair for pair in left if (leak.place, leak.phrase) in held[pair["item"]]]
        gone |= _above_quota(
            left,
            holders,
            section.leak_max_share,
            f"{leak.place}: {leak.phrase}",
            lambda pair: (-len(held[pair["item"]]), _order(pair)),
        )
    return gone


def _only_in_chosen(test: Callable[[str], bool]) -> Callable[[Pair], bool]:
    return lambda pair: test(pair["chosen"]) and not test(pair["rejected"])


def _truncates(pair: Pair) -> bool:
    """Half of the answer is gone, and it was not declined: dropping content is the cheapest way to drop a flaw."""
    return 2 * len(words(pair["chosen"])) < len(words(pair["rejected"])) and not is_refusal(pair["chosen"])


EVASIONS: dict[str, Callable[[Pair], bool]] = {
    "refusal": _only_in_chosen(is_refusal),
    "disclaimer": _only_in_chosen(has_disclaimer),
    "hedge": _only_in_chosen(has_hedge),
    "truncation": _truncates,
}


def _evasion_rule(pairs: Sequence[Pair], section: HygieneSection, seen: Seen) -> dict[int, str]:
    gone: dict[int, str] = {}
    for kind in EVASIONS:
        left = [pair for pair in pairs if pair["item"] not in gone]
        marked = [pair for pair in left if kind in seen.facts[pair["item"]].evasions]
        gone |= _above_quota(left, marked, getattr(section, f"max_{kind}_share"), kind)
    return gone


def _length_rule(pairs: Sequence[Pair], section: HygieneSection, seen: Seen) -> dict[int, str]:
    """The pairs whose chosen text is longer by the most go, until the share is met."""
    excess = {pair["item"]: seen.facts[pair["item"]].excess for pair in pairs}
    longer = [pair for pair in pairs if excess[pair["item"]] > 0]
    share = section.max_longer_share
    gone = _above_quota(pairs, longer, share, "", lambda pair: (-excess[pair["item"]], _order(pair)))
    return {item: f"chosen longer by {excess[item]} words" for item in gone}


def _displacement_rule(pairs: Sequence[Pair], section: HygieneSection, seen: Seen) -> dict[int, str]:
    scored = ((pair["item"], seen.facts[pair["item"]].similarity) for pair in pairs)
    return {item: f"ROUGE-L {value:.3f}" for item, value in scored if value > section.max_pair_similarity}


Rule = Callable[[Sequence[Pair], HygieneSection, Seen], dict[int, str]]
RULES: dict[str, Rule] = {
    "displacement": _displacement_rule,
    "leaks": _leak_rule,
    "evasions": _evasion_rule,
    "length_balance": _length_rule,
}
QUOTA_RULES = ("leaks", "evasions", "length_balance")
