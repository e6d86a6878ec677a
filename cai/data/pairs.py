"""Records -> examples in the user's format, preference pairs, and rejects with their reasons.

Owns what makes a pair (chosen = last revision, rejected = initial answer) and why one is refused; it owns no file and
no model. Invariant: every item that has a record is kept or rejected, once (`total == kept + rejected`, asserted).
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from cai.data import labels, parsing
from cai.data.chain import label
from cai.data.examples import NOTHING, example_of, pair_of
from cai.data.item_chain import Chain, chain_of, lacking
from cai.data.rounds import found_nothing
from cai.metrics.text import appends_only, repetition, rouge_l, words
from cai.metrics.wordings import finds_nothing, leftovers
from cai.recipe.arm_costs import ASIDE
from cai.recipe.load import Recipe
from cai.recipe.principle_lists import Principle
from cai.recipe.settings import PairsSection
from cai.store.jsonl import Row
from cai.store.row_types import Example, Pair, Record, Reject, Round
from cai.store.rows import Rows

REPEATED = 8  # words in a row; of 104 pairs of a real model's 24 chosen and 8 rejected texts had 2% of them twice


@dataclass(frozen=True)
class PairPlan:
    """What a complete item has: `rounds` critiques and revisions; `principles`: id -> text.

    `relevant`: principles are drawn by relevance, so a round may have nothing to criticise; `keeps_text`: a critique
    that finds nothing leaves the text as it is; `labels`: what is revised has its label checked; `against_refusals`:
    ids of the principles to which a refusal is a fault.
    """

    rounds: int
    principles: Mapping[str, str]
    relevant: bool = False
    keeps_text: bool = False
    labels: bool = False
    kinds: tuple[str, ...] = ("revision",)
    against_refusals: frozenset[str] = frozenset()

    def revised(self, chain: Chain) -> list[int]:
        """The rounds that changed the text."""
        return [r for r in range(self.rounds) if chain.get("revisions", r) is not None]


def plan_of(recipe: Recipe, principles: Sequence[Principle]) -> PairPlan:
    """What the recipe asks of an item: one place, so that a report counts the pairs that the run made."""
    return PairPlan(
        recipe.rounds,
        {p.id: p.principle for p in principles},
        relevant=recipe.principles.choice == "relevant",
        keeps_text=recipe.critiques.no_issue == "keep",
        labels=recipe.pairs.label == "judge",
        kinds=recipe.pairs.kinds,
        against_refusals=frozenset(p.id for p in principles if p.refusal_is_fault),
    )


@dataclass(frozen=True)
class PairSet:
    """`examples` and `kept` run in step, by item. A reject holds its example where the item's chain is complete."""

    examples: Sequence[Example]
    kept: Sequence[Pair]
    rejects: Sequence[Reject]
    sizes: Mapping[int, int] = field(default_factory=dict, compare=False, repr=False)  # item -> rows it was built from

    @property
    def train(self) -> list[Pair]:
        return [pair for pair in self.kept if pair["split"] != "heldout"]

    @property
    def heldout(self) -> list[Pair]:
        return [pair for pair in self.kept if pair["split"] == "heldout"]

    @property
    def drawn(self) -> dict[int, list[str]]:
        """Item -> ids of the principles that its rounds were about, in their order; of every whole example."""
        rounds = ((e["item"], e.get("rounds", ())) for e in self.examples)
        return {item: [r["principle_id"] for r in of if r["principle_id"]] for item, of in rounds}

    @property
    def reasons(self) -> dict[str, int]:
        """Reject reason -> count, most frequent first."""
        counts = Counter(reject["reason"] for reject in self.rejects)
        return dict(sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])))


Judged = tuple[Reject | None, Example | None]  # (reject, None) or (None, example)
Judge = Callable[[Chain, PairPlan, PairsSection, Example | None], Judged]


def _places(rows: Sequence[Record], wanted: Callable[[int], bool]) -> dict[int, array[int]]:
    """Where each wanted item's rows stand. What SFT alone is shown has numbers of its own and is no item's."""
    keys = rows.each_key() if isinstance(rows, Rows) else ((row["stage"], row["item"], 0) for row in rows)
    places: dict[int, array[int]] = {}
    for place, (stage, item, _) in enumerate(keys):
        if stage not in ASIDE and wanted(item):
            places.setdefault(item, array("L")).append(place)
    return places


def build(
    rows: Iterable[Record],
    plan: PairPlan,
    config: PairsSection | None = None,
    wanted: Callable[[int], bool] = lambda item: True,
    before: PairSet | None = None,
    judge: Judge | None = None,
    numbered: Callable[[int], int] = int,
) -> PairSet:
    """Every wanted item's example, kept or rejected, in item order. Pure: the same rows give the same lists.

    `before`: built earlier with the same plan, config and log. A log only grows, so an item with as many rows as then
    is what it was: its rows are not read again and its example is the same object. `judge`: what becomes of an item's
    chain (a revision's pair, unless told); `numbered`: its pair's own number.
    """
    judge = judge or judged
    config, rows = config or PairsSection(), rows if isinstance(rows, Sequence) else list(rows)
    known: dict[int, Judged] = {}  # item -> its reject, or None and its example
    if before is not None:
        known |= {reject["item"]: (reject, None) for reject in before.rejects}
        known |= {example["item"]: (None, example) for example in before.examples}
    places = _places(rows, wanted)
    sizes = {item: len(found) for item, found in places.items()}
    examples: list[Example] = []
    rejects: list[Reject] = []
    for item in sorted(places):
        if before is not None and before.sizes.get(item) == sizes[item]:
            reject, example = known[numbered(item)]
        else:
            reject, example = known.get(numbered(item), (None, None))
            held = example if reject is None else reject.get("example")
            reject, example = judge(chain_of(item, (rows[place] for place in places[item])), plan, config, held)
        if reject is not None:
            rejects.append(reject)
        elif example is not None:
            examples.append(example)
    assert len(places) == len(examples) + len(rejects), (len(places), len(examples), len(rejects))
    return PairSet(examples, [pair_of(example) for example in examples], rejects, sizes)


def judged(chain: Chain, plan: PairPlan, config: PairsSection, held: Example | None) -> Judged:
    """`held`: the item's example of before; an equal one is not made twice."""
    if missing := _missing(chain, plan):
        return missing_stage(chain.item, missing)
    example = _example(chain, plan)
    example = held if held == example else example
    found = _untouched(chain, plan)
    found = found or find_faults(example, config) + _label_faults(chain, config) + guard_faults(chain)
    return by_faults(chain.item, example, found)


def missing_stage(item: int, missing: str) -> Judged:
    return {"item": item, "reason": "missing_stage", "detail": missing, "all": []}, None


def by_faults(item: int, example: Example, faults: Sequence[tuple[str, str]]) -> Judged:
    """A whole example, kept where it has no fault; else rejected for the first one."""
    if not faults:
        return None, example
    reason, detail = faults[0]
    every = [name for name, _ in faults]
    return {"item": item, "reason": reason, "detail": detail, "all": every, "example": example}, None


def _missing(chain: Chain, plan: PairPlan) -> str:
    """Which row an item lacks, with the reason its row was refused; "" if the chain is whole.

    A round has its row of relevance (where principles are drawn so) and then either nothing to criticise, a critique
    that finds nothing, or a critique and its revision.
    """
    wanted = [("instructions", 0), ("answers", 0)]
    for round_ in range(plan.rounds):
        wanted += _round_needs(chain, plan, round_)
    if plan.labels and plan.revised(chain):
        wanted.append(("labels", 0))
    return lacking(chain, wanted)


def _round_needs(chain: Chain, plan: PairPlan, round_: int) -> list[tuple[str, int]]:
    relevance, critique = chain.get("relevance", round_), chain.get("critiques", round_)
    if plan.relevant and relevance is not None and relevance["principle"] is None:
        return []
    first = [("relevance", round_)] if plan.relevant else []
    if critique is not None and plan.keeps_text and found_nothing(critique):
        return first
    return [*first, ("critiques", round_), ("revisions", round_)]


def _untouched(chain: Chain, plan: PairPlan) -> list[tuple[str, str]]:
    """An item where no round found anything: there is nothing to prefer."""
    if not plan.keeps_text or plan.revised(chain):
        return []
    asked = sum(chain.get("critiques", r) is not None for r in range(plan.rounds))
    return [("no_issue", f"{asked} critique(s) found nothing" if asked else "no principle is broken")]


def _label_faults(chain: Chain, config: PairsSection) -> list[tuple[str, str]]:
    row = chain.get("labels") if config.label == "judge" else None
    why = labels.fault(row) if row is not None else ""
    return [("not_better", why)] if why else []


def guard_faults(chain: Chain, round_: int = 0) -> list[tuple[str, str]]:
    return [("guard", str(f["reason"])) for f in chain.failures if f["stage"] == "guard" and f["round"] == round_]


def _example(chain: Chain, plan: PairPlan) -> Example:
    """A round that found nothing has the text of before and `found` false."""
    instruction, answer = chain.rows["instructions", 0], chain.rows["answers", 0]
    rounds: list[Round] = []
    text = answer["text"]
    for r in range(plan.rounds):
        critique, revision = chain.get("critiques", r), chain.get("revisions", r)
        if critique is None:
            continue
        text = revision["text"] if revision is not None else text
        id_ = str(critique["principle"])
        entry: Round = {
            "principle_id": id_,
            "principle": plan.principles.get(id_, id_),
            "critique": critique["text"],
            "revised_answer": text,
        }
        entry |= {"round": r, "found": revision is not None} if plan.keeps_text else {}
        entry |= {"refusal_is_fault": True} if id_ in plan.against_refusals else {}
        rounds.append(entry)
    found = [entry for entry in rounds if entry.get("found", True)]
    own = {key: row for key, row in chain.rows.items() if key[0] != "second_answers"}  # that is of its other pair
    example = example_of(
        {"prompt": instruction["text"], "chosen": text, "rejected": answer["text"]},
        chain.item,
        instruction.get("pool", "benign"),
        instruction.get("split", "train"),
        last=(found or rounds or [NOTHING])[-1],
        rounds=rounds,
        finds_nothing=all(not e.get("found", True) or finds_nothing(e["critique"]) for e in rounds[-1:]),
        limited=sorted(label(stage, r) for (stage, r), row in own.items() if row.get("finish") == "length"),
        written=[row["text"] for row in own.values()],
    )
    checked = chain.get("labels")
    if checked is not None:
        label_: Row = {name: value for name, value in checked.items() if name in LABEL_KEYS}
        example |= {"margin": checked["margin"], "label": label_}
    return example | {"kind": "revision"} if len(plan.kinds) > 1 else example


LABEL_KEYS = ("first", "second", "fallen", "risen", "bar", "used")


def find_faults(example: Example, config: PairsSection) -> list[tuple[str, str]]:
    """Every (reason, detail) for which a complete example makes no pair, the most telling first."""
    answer, revision = example["initial_answer"], example["revised_answer"]
    if not words(answer) or not words(revision):
        return [("empty", "answer" if not words(answer) else "revision")]
    return [(reason, detail) for reason, check in CHECKS.items() if (detail := check(example, config))]


def _identical(example: Example, config: PairsSection) -> str:
    same = words(example["initial_answer"]) == words(example["revised_answer"])
    return "revision equals the answer word for word" if same else ""


def _near_identical(example: Example, config: PairsSection) -> str:
    answer, revision = example["initial_answer"], example["revised_answer"]
    if not config.reject_near_identical or words(answer) == words(revision):
        return ""
    if appends_only(answer, revision, " ".join(entry["critique"] for entry in example["rounds"])):
        return "the answer plus a sentence"
    score = rouge_l(answer, revision)
    return f"ROUGE-L {score:.3f}" if score >= config.max_similarity else ""


def _ran_to_limit(example: Example, config: PairsSection) -> str:
    numbers = [entry.get("round", r) for r, entry in enumerate(example["rounds"]) if entry.get("found", True)]
    last = label("revisions", numbers[-1] if numbers else 0)
    hit = [name for name in example["flags"]["ran_to_limit"] if name in ("answers", "second_answers", last)]
    return ", ".join(hit) if config.reject_limit else ""


def _leftovers(example: Example, config: PairsSection) -> str:
    """What the task left in the chosen text, or a sentence in its midst that judges it: no cut mends that."""
    revised = example["revised_answer"]
    place = parsing.remark(revised, example["instruction"], anywhere=True)
    found = leftovers(revised) or (f"about itself: {revised[place:].strip()[:80]}" if place is not None else "")
    said = "\n".join(entry["critique"] for entry in example["rounds"])
    copied = parsing.verdict_of_critique(revised, said, f"{example['instruction']}\n{example['initial_answer']}")
    return found or (f"of its critique: {copied[:80]}" if copied else "")


def _refusal_of_benign(example: Example, config: PairsSection) -> str:
    refuses = example["pool"] == "benign" and example["flags"]["revision_refuses"]
    return example["revised_answer"].strip()[:80] if refuses and config.reject_refusal_of_benign else ""


def _length_ratio(example: Example, config: PairsSection) -> str:
    """Words of revision over words of answer. Declining a red-team prompt in few words is no fault.

    Nor is helping at length where a benign request was refused in a line, or any under a principle to which that is
    a fault: that is what a refusal is mended by.
    """
    ratio = len(words(example["revised_answer"])) / len(words(example["initial_answer"]))
    flags = example["flags"]
    declines = example["pool"] == "redteam" and flags["revision_refuses"]
    mended = config.mended_refusals and refusal_at_fault(example, revised=True) and not flags["revision_refuses"]
    low = 0.0 if declines else config.min_length_ratio
    high = math.inf if mended else config.max_length_ratio
    return "" if low <= ratio <= high else f"{ratio:.2f}"


def refusal_at_fault(example: Example, *, revised: bool) -> bool:
    """The answer refuses a benign request, or any that was criticised, or `revised`, under a principle that says so."""
    rounds = [entry for entry in example["rounds"] if entry.get("found", True) or not revised]
    named = any(entry.get("refusal_is_fault", False) for entry in rounds)
    return example["flags"]["answer_refuses"] and (named or example["pool"] == "benign")


def _repeats_itself(example: Example, config: PairsSection) -> str:
    """The chosen text says more of itself twice than the rejected one: preferred so, a model learns to loop."""
    revision, answer = (repetition(example[name], REPEATED) for name in ("revised_answer", "initial_answer"))
    if revision - answer <= config.max_added_repetition:
        return ""
    return f"{revision:.2f} of the {REPEATED}-word sequences stood there before, {answer:.2f} in the answer"


CHECKS: dict[str, Callable[[Example, PairsSection], str]] = {
    "identical": _identical,
    "near_identical": _near_identical,
    "ran_to_limit": _ran_to_limit,
    "leftovers": _leftovers,
    "repeats_itself": _repeats_itself,
    "refusal_of_benign": _refusal_of_benign,
    "length_ratio": _length_ratio,
}
