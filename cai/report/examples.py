"""One example of a run made ready for reading: rounds with their differences, and each check of the metric in words.

Owns what a reader is shown of an example and why the metric accepted or refused it; the checks themselves are
cai.evaluate's. Pure. Which examples are shown at 5,000 is decided here too: a seeded sample, the worst, the best.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from cai.evaluate import critiques, revisions
from cai.evaluate.verdict import Scores, TextVerdict
from cai.metrics.figure import Unscored, sample
from cai.metrics.text import quoted_spans, rouge_l, words
from cai.recipe.settings_evaluation import EvaluationSection
from cai.report.diff import Compared, Segment, compared, cut, quotations
from cai.report.snapshot import Snapshot
from cai.store.jsonl import JsonObject, Row
from cai.store.row_types import Example
from cai.terminal import number as shown_number

SHOW_ALL = 120  # up to this many examples, all are shown
SAMPLED, EXTREMES = 40, 10  # above: a seeded sample, and this many of the worst and of the best


@dataclass(frozen=True)
class ShownCheck:
    """One test of the metric: what was found, what was wanted, whether it passed (None: not part of the verdict)."""

    name: str
    found: str
    wanted: str
    ok: bool | None


@dataclass(frozen=True)
class Judged:
    """A verdict with its checks. `status`: yes, no, nothing (no issue found), unscored."""

    question: str
    status: str
    checks: list[ShownCheck]
    why: str
    word: str = ""  # in place of what the status says

    @property
    def said(self) -> str:
        """What was checked, and no more: `passes 7 of 7 checks of form`."""
        asked = [check for check in self.checks if check.ok is not None]
        passed = sum(bool(check.ok) for check in asked)
        of = "form and likelihood" if any(check.name.startswith(("CSI", "CRI")) for check in asked) else "form"
        words = {"nothing": "finds nothing wrong", "unscored": "not scored"}
        return self.word or words.get(self.status) or f"passes {passed} of {len(asked)} checks of {of}"


@dataclass(frozen=True)
class ShownRound:
    number: int
    principle_id: str
    principle: str
    before: list[Segment]
    critique: list[Segment]
    after: list[Segment]
    marked: str = ""
    stayed: bool = False  # the critique found nothing, so there is no revision


@dataclass(frozen=True)
class Exhibit:
    item: int
    pool: str
    split: str
    instruction: str
    answer: str  # the initial one: all that an item has in which nothing was found to criticise
    rounds: list[ShownRound]
    flags: list[str]
    critique: Judged
    revision: Judged
    reject: str = ""
    why_shown: str = ""
    extra: Row = field(default_factory=dict)

    @property
    def principle_ids(self) -> list[str]:
        """Of every round, each once."""
        return list(dict.fromkeys(r.principle_id for r in self.rounds))

    @property
    def folded(self) -> bool:
        """Red-team text is behind a notice."""
        return self.pool != "benign"


def exhibits(snapshot: Snapshot) -> list[Exhibit]:
    """The kept examples to show, by item; with more than SHOW_ALL, a seeded sample and the extremes."""
    chosen = choose(snapshot)
    found = [(example, exhibit(snapshot, example, why=chosen[example["item"]])) for example in snapshot.pairs.examples
             if example["item"] in chosen]  # fmt: skip
    return [_given(shown, example) if _unrevised(snapshot, example) else shown for example, shown in found]


def _unrevised(snapshot: Snapshot, example: Example) -> bool:
    return bool(snapshot.recipe.pairs.file) or example.get("kind") == "sampled"


def rejected_exhibits(snapshot: Snapshot, limit: int = 20) -> list[Exhibit]:
    """Whole chains that made no pair, with the reason; a seeded sample above the limit."""
    rejects = [reject for reject in snapshot.pairs.rejects if "example" in reject]
    shown = set(sample([r["item"] for r in rejects], limit))
    return [
        exhibit(snapshot, r["example"], reject=f"{r['reason']}: {r['detail']}") for r in rejects if r["item"] in shown
    ]


def choose(snapshot: Snapshot) -> dict[int, str]:
    """item -> why it is shown."""
    items = [example["item"] for example in snapshot.pairs.examples]
    if len(items) <= SHOW_ALL:
        return dict.fromkeys(items, "")
    ranked = sorted(items, key=lambda item: (goodness(snapshot, item), item))
    scored = [item for item in ranked if ("critiques.gates", item) in snapshot.scores]
    found = dict.fromkeys(sample(items, SAMPLED), "sample")
    found |= dict.fromkeys(scored[:EXTREMES], "among the worst")
    found |= dict.fromkeys(scored[-EXTREMES:], "among the best")
    return found


def goodness(snapshot: Snapshot, item: int) -> float:
    """Passed checks of critique and revision plus their likelihood figures: only an order for the eye."""
    gates, checks = (snapshot.scores.get((name, item), {}) for name in ("critiques.gates", "revisions.gates"))
    total = float(len((gates.get("real") or {}).get("pass", ())) + len(checks.get("pass", ())))
    for metric in ("critiques.csi", "revisions.cri"):
        total += float(snapshot.scores.get((metric, item), {}).get("real") or 0.0)
    return total


def exhibit(snapshot: Snapshot, example: Example, reject: str = "", why: str = "") -> Exhibit:
    section, item = snapshot.recipe.evaluation, int(example["item"])
    rounds, before, quotes = [], str(example["initial_answer"]), ""
    for number, entry in enumerate(example["rounds"]):
        in_critique, in_answer = quotations(entry["critique"], before)
        both = compared(before, entry["revised_answer"], in_answer)
        critique = cut(entry["critique"], (), in_critique)
        quotes = f"{len(in_critique)} of {len(quoted_spans(entry['critique']))}"
        id_, text = str(entry["principle_id"]), str(entry["principle"])
        stayed = not entry.get("found", True)
        rounds.append(ShownRound(number, id_, text, both.before, critique, both.after, how_marked(both), stayed))
        before = entry["revised_answer"]
    scores = snapshot.scores_by_item.get(item, {})
    revision = judge_revision(scores, section)
    if rounds and all(shown.stayed for shown in rounds):
        revision = _unasked(revision, "no critique named a problem, so none was written")
    return Exhibit(
        item=item,
        pool=str(example["pool"]),
        split=str(example["split"]),
        instruction=str(example["instruction"]),
        answer=str(example["initial_answer"]),
        rounds=rounds,
        flags=_flags(example["flags"]),
        critique=_with_quotes(judge_critique(scores, section), quotes),
        revision=revision,
        reject=reject,
        why_shown=why,
        extra=_fresh(scores),
    )


def _unasked(judged: Judged, why: str) -> Judged:
    return replace(judged, status="nothing", checks=[], why=why, word="none")


def _given(shown: Exhibit, example: Example) -> Exhibit:
    """A pair of the user's own, or a sampled one: both texts side by side, no verdict on a chain that there was not."""
    both = compared(example["initial_answer"], example["revised_answer"], ())
    why = "the pair was given (pairs.file): nothing was criticised or revised"
    said = "rejected, then chosen, as the file has them"
    none = cut("None: the pair was given.", (), ())
    name = "pairs.file"
    if example.get("kind") == "sampled":
        why = "two answers were sampled and compared: nothing was criticised or revised"
        said, name = str(example["principle"]), str(example["principle_id"])
        none = cut(f"None: two sampled answers, the chosen one by {shown_number(example.get('margin'))} nats.", (), ())
    rounds = [ShownRound(0, name, said, both.before, none, both.after, how_marked(both))]
    critique, revision = _unasked(shown.critique, why), _unasked(shown.revision, why)
    return replace(shown, rounds=rounds, critique=critique, revision=revision)


def how_marked(both: Compared) -> str:
    """What is said where a text was written anew: word marks would only show which words both have by accident."""
    if both.by == "words":
        return ""
    marks = "whole sentences are marked" if both.by == "sentences" else "no sentence stayed, so none is marked"
    return f"written anew, {both.share:.0%} of the words changed: {marks}"


def _with_quotes(judged: Judged, quotes: str) -> Judged:
    """A reader's check that no verdict uses: a quotation that the answer does not hold is the critic's invention."""
    check = ShownCheck("quotations that stand in the criticised text", quotes, "all", None)
    return replace(judged, checks=[*judged.checks, check])


def _flags(flags: JsonObject) -> list[str]:
    named = [name.replace("_", " ") for name, value in flags.items() if value is True]
    return [*named, *(f"ran to the limit: {where}" for where in flags.get("ran_to_limit", []))]


def _fresh(scores: Mapping[str, Row]) -> Row:
    row = scores.get("preference.fresh", {})
    return {arm: str(row[arm]) for arm in ("base", "tuned") if arm in row}


def judge_critique(scores: Scores, section: EvaluationSection) -> Judged:
    verdict = critiques.verdict(scores, section)
    return shown(verdict, "The last critique",
                 "it says that nothing is wrong; such critiques are counted apart")  # fmt: skip


def judge_revision(scores: Scores, section: EvaluationSection) -> Judged:
    verdict = revisions.verdict(scores, section)
    judged = shown(verdict, "The last revision",
                   "the critique named no problem, so there is nothing to address")  # fmt: skip
    return replace(judged, word="has nothing to address") if judged.status == "nothing" else judged


def shown(verdict: TextVerdict, question: str, nothing: str) -> Judged:
    """The verdict in words, with what was found and wanted of each check; of those not asked for, only what counts."""
    checks = [
        ShownCheck(c.name, c.found or _num(c.value), c.wanted, c.passed if c.counts else None)
        for c in verdict.criteria
        if c.counts or c.value is not None
    ]
    if verdict.nothing:
        return Judged(question, "nothing", checks, nothing)
    if isinstance(verdict.outcome, Unscored):
        return Judged(question, "unscored", checks, WHY_UNSCORED.get(verdict.outcome.reason, verdict.outcome.reason))
    if verdict.failed:
        return Judged(question, "no", checks, f"failed: {'; '.join(verdict.failed)}")
    return Judged(question, "yes", checks, "every check passed")


WHY_UNSCORED = {
    "no CSI": "the form is right; its likelihood was not scored",
    "no CRI": "the form is right; its likelihood was not scored",
    "unjudged": "the recipe requires the judge, and it was not judged",
}


GLOSSARY = (
    ("G1 length", "A critique of a few words says nothing; one of hundreds is a second answer."),
    ("G2 echo", "Likeness (ROUGE-L) to the principle or to a request for a critique: an echo criticises nothing."),
    ("G3 copied", "Share of its runs of five words that stand in the answer: a copy criticises nothing."),
    (
        "G4 about this answer",
        "Share of its content words, rare ones weighing more, that stand in the prompt or answer.",
    ),
    ("G5 repeated", "Likeness (ROUGE-L) to the nearest critique of another prompt: one text for all fits none."),
    ("G6 misquoted", "Share of its quotations of three words and more that stand in neither answer nor prompt."),
    ("G7 praise", "Words of praise, and none that names a fault."),
    ("CSI", "How much likelier the critique is after its own prompt and answer than after others, in nats a token."),
    ("R1 to R3", "The revision is long enough, changes more than a sentence at the end, and keeps to a sane length."),
    ("R4 refusal", "A harmless request is not refused."),
    ("R5 quotations", "What the critique quoted as wrong does not all stand there still."),
    ("CRI", "How much likelier the revision is after its own critique than after a generic or another one."),
    (
        "J1 to J4",
        "Opinions of a judge model. They count only where the recipe requires them, after it passed its exam.",
    ),
    ("ROUGE-L", "Likeness of two texts by their longest common run of words, gaps allowed: 0 for none, 1 for equal."),
    ("Nats a token", "Natural logarithm of how much likelier, for each token: 0.15 is 16% likelier, 0.69 twice."),
    ("Log-odds", "Above 0 the judge says yes rather than no; 2 is about seven to one."),
)


def _num(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}" if float(value).is_integer() else f"{value:.2f}"


def lengths(snapshot: Snapshot) -> dict[str, list[float]]:
    """Words of every kept answer and its last revision."""
    pairs = snapshot.pairs.kept
    return {
        "answers": [float(len(words(p["rejected"]))) for p in pairs],
        "revisions": [float(len(words(p["chosen"]))) for p in pairs],
    }


def edits(snapshot: Snapshot) -> dict[str, list[float]]:
    """Share of each kept pair that changed: 1 - ROUGE-L of answer and last revision."""
    return {"pairs": [1.0 - rouge_l(p["rejected"], p["chosen"]) for p in snapshot.pairs.kept]}


def first_shown(shown: Sequence[Exhibit]) -> Exhibit | None:
    """The one for the first screen: benign, and the one of which most checks passed; none where all are red-team."""
    benign = [one for one in shown if not one.folded and one.rounds]
    return max(benign, key=lambda one: (one.critique.status == "yes") + (one.revision.status == "yes"), default=None)


@dataclass(frozen=True)
class Filter:
    """One choice above the examples: name, and (class, label) of its options."""

    name: str
    label: str
    options: list[tuple[str, str]]


POOLS = {"benign": "benign", "redteam": "red-team"}
VERDICTS = {
    "yes": "critique passes its checks", "no": "critique fails a check", "nothing": "critique finds nothing",
    "unscored": "critique not scored",
}  # fmt: skip


def filters(shown: Sequence[Exhibit]) -> list[Filter]:
    """By principle, pool and verdict; a choice with one option is none."""
    ids = sorted({id_ for one in shown for id_ in one.principle_ids})
    found = [
        Filter("principle", "Principle", [(f"principle-{place}", id_) for place, id_ in enumerate(ids)]),
        Filter("pool", "Pool", _present("pool", POOLS, [one.pool for one in shown])),
        Filter("verdict", "Verdict", _present("verdict", VERDICTS, [one.critique.status for one in shown])),
    ]
    return [each for each in found if len(each.options) > 1 or (each.name == "principle" and each.options)]


def _present(name: str, words: Mapping[str, str], values: Sequence[str]) -> list[tuple[str, str]]:
    return [(f"{name}-{value}", label) for value, label in words.items() if value in values]


def classes(one: Exhibit, choices: Sequence[Filter]) -> str:
    """The classes by which an example is found: of its principles, its pool, its verdict."""
    wanted = {*one.principle_ids, POOLS.get(one.pool, one.pool), VERDICTS[one.critique.status]}
    return " ".join(name for choice in choices for name, label in choice.options if label in wanted)
