"""The names of the figures that a run can measure: a gate on a misspelt one is refused before a run, not after hours.

Owns the list and the nearest name; the figures are made where they are measured. A new figure is named here
(`tests/metrics/test_names.py` fails on one that is not). `{x}` stands for any word: a task, an arm, a seed, a category.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

BESIDE = ("sft", "from_base", "few_shot", "constitution", "best_of_n")  # arms beside base and tuned
OVER = re.compile(rf"^dpo_over_({'|'.join(BESIDE)})\.")  # what the tuned model has over one of them, row by row

_CONTROLLED = ("gates", "csi", "specific", "meaningful")
_CRITIC = ("recall", "false_alarms", "flaw_gone", "checkable.found", "checkable.gone", "broken")
_DPO = ("loss", "loss_fall", "margin", "chosen_fall")
_ANSWERS = ("empty", "repeated", "cut", "stops", "refused")
_OF_KINDS = ("pairs.yield", "labels.margin", "preference.p1", "preference.p1.train")  # pairs.kind = "both"

NAMES = (
    *("pairs.kept", "pairs.yield"),
    *(f"data.{name}" for name in ("scaffolding", "copied", "nothing_found")),
    *(f"labels.{name}" for name in ("better", "original_wins", "margin", "known.better", "known.worse")),
    *(f"{name}.{kind}" for name in _OF_KINDS for kind in ("revision", "sampled")),
    *("principles.lift", "principles.broken"),
    *(f"critic.{name}{tail}" for name in _CRITIC for tail in ("", ".{x}")),
    "critiques.finds_nothing",
    *(f"critiques.{name}{kind}" for name in _CONTROLLED for kind in ("", ".shuffled", ".generic")),
    *(f"critiques.{name}{kind}" for name in ("j1", "j2") for kind in ("", ".shuffled")),
    *(f"revisions.{name}" for name in ("gates", "r1", "r2", "r3", "r4", "r5", "j3", "improves")),
    *(f"revisions.{name}{kind}" for name in ("cri", "responsive", "addresses") for kind in ("", ".shuffled")),
    *(f"preference.{name}" for name in ("p1", "p1.train", "p1.permuted", "p1.over_base")),
    *(f"preference.{name}" for name in ("p2.before", "p2.after", "p2.gain")),
    *(f"preference.{name}" for name in ("p3", "p3.length_controlled", "length_only", "refusal_only", "surface")),
    *(f"{name}.agreement" for name in ("critiques.j1", "critiques.j2", "revisions.j3", "revisions.improves")),
    "preference.p3.agreement",
    *(f"preference.over.{{x}}{tail}" for tail in ("", ".length_controlled")),
    *(f"dpo.{name}" for name in ("first_loss_error", "logged_fall", "grad_norm_max", "finite", "truncated")),
    *(f"dpo.{name}{split}" for name in _DPO for split in ("", ".heldout")),
    *(f"dpo.{name}.seed_{{x}}" for name in ("last_loss", "heldout_accuracy", "heldout_margin")),
    *(f"forgetting.{name}" for name in ("nll_delta", "nll_base", "kl", "{x}_delta")),
    *(f"fresh.{{x}}.{name}" for name in ("empty", "at_limit", "repeats", "loops", "distinct_2", "stops")),
    *(f"fresh.{{x}}.{name}" for name in ("same_as_base", "refused", "words", "goes_along")),
    "fresh.tuned.evades",
    *(f"harmbench.{name}" for name in ("asr.{x}", "asr_drop", "asr_drop.{x}", "p", "improvement")),
    *(f"xstest.{name}" for name in ("over_refusal.{x}", "over_refusal_rise", "partial_refusal.{x}")),
    *(f"xstest.{name}" for name in ("unsafe_refusal.{x}", "unsafe_refusal_rise", "unsafe_compliance.{x}")),
    *(f"mtbench.{name}" for name in ("score.{x}", "delta", "delta_without_wrong", "delta.turn_{x}")),
    *(f"{bench}.{name}.{{x}}" for bench in ("harmbench", "xstest", "mtbench") for name in _ANSWERS),
    *(f"{bench}.same_as_base" for bench in ("harmbench", "xstest", "mtbench")),
    *(f"checks.{{x}}.{name}" for name in ("kappa", "sensitivity", "specificity")),
    *("guard.dropped", "guard.chosen_unsafe", "contamination.removed", "contamination.inputs"),
    *(f"{arm}.last_loss" for arm in ("sft", "from_base")),
)
_KNOWN = re.compile("|".join(re.escape(name).replace(r"\{x\}", r"[\w-]+") for name in NAMES))


GOES_ALONG = "share of red-team requests that are neither refused nor objected to, by wording"
MEANINGS = (  # beginnings of names -> what the figure says, for the report
    ("data.scaffolding", "examples in which a text runs on into the prompt's own form"),
    ("data.copied", "examples in which a text copies eight words, or a whole sentence of six, of a prompt's example"),
    ("data.nothing_found", "examples of which every critique says that nothing is wrong"),
    ("labels.better", "share of revised texts that the model finds better: by more than the bar, or in both orders"),
    ("labels.original_wins", "share of revised texts to which the original is preferred as clearly"),
    ("labels.known.better", "share of revisions known to be better that pass the bar (half of them set it)"),
    ("labels.known.worse", "share of revisions known to be no better that pass it all the same"),
    ("labels.margin", "mean log-odds, in nats, that the revised text is the better one"),
    ("principles.lift", "how much more an answer breaks the drawn principle than all that fit, nats of log-odds"),
    ("principles.broken", "share of rounds in which the text breaks a principle at all"),
    ("critic.recall", "share of planted flaws that the model's own critique finds"),
    ("critic.false_alarms", "share of sound answers in which it names a fault"),
    ("critic.flaw_gone", "share of planted flaws that are gone after its own revision"),
    ("critic.checkable", "the same of flaws that a program can check: found, and gone"),
    ("critic.broken", "share of sound answers that its revision makes worse, as far as a program can see"),
    ("preference.surface", "held-out pairs told apart by characters and length alone: P1 has to be ahead of it"),
    ("pairs.", "pairs that came through, as a number (kept) and a share of the items tried (yield)"),
    ("critiques.finds_nothing", "share of critiques that say nothing is wrong"),
    ("critiques.gates", "share of critiques that pass the word checks G1 to G6"),
    ("critiques.csi", "how much likelier a critique is after its own answer than after others, nats a token"),
    ("critiques.specific", "share of critiques whose CSI reaches the bar"),
    ("critiques.meaningful", "share that passes both: the gate of M1"),
    ("critiques.j", "share a judge model says yes to: the answer holds the problem (j1), fixing it would help (j2)"),
    ("revisions.gates", "share of revisions that pass the word checks R1 to R5"),
    ("revisions.r", "share of revisions that pass this one check (responsive: CRI reaches the bar)"),
    ("revisions.cri", "how much likelier a revision is after its own critique than after another, nats a token"),
    ("revisions.addresses", "share that passes both: the gate of M1"),
    ("revisions.", "share a judge model says yes to: the problem is gone (j3), better than the text before (improves)"),
    ("preference.p1", "share of pairs whose implicit reward prefers the revision to the answer: the gate of M2"),
    ("preference.p2", "the same by log-probability a token, before and after training"),
    ("preference.p3", "share of fresh answers of the tuned model preferred to the base's"),
    ("preference.over.", "share of fresh answers of the tuned model preferred to those of the base prompted well"),
    ("preference.", "share that length or refusal alone would get right: P1 must be ahead of it"),
    ("dpo.first_loss_error", "how far the first loss is from ln 2: 0 where policy and reference start equal"),
    ("dpo.loss", "DPO loss over all pairs after training; loss_fall: how far it fell below ln 2"),
    ("dpo.margin", "implicit reward of the chosen over the rejected text, after training"),
    ("dpo.chosen_fall", "nats a token that the chosen texts lost; below 0: they became likelier"),
    ("dpo.", "health of the training as logged: fall of the loss, gradient, finite values, cut pairs, other seeds"),
    ("forgetting.nll", "nats a token on neutral text: the base's (base), what the tuned model loses (delta)"),
    ("forgetting.kl", "distance of the tuned model's next words from the base's on neutral text"),
    ("forgetting.", "points lost on a task of lm_eval"),
    (
        "fresh.tuned.evades",
        "share of benign requests refused, or answered in less than a quarter of the words, unlike before DPO",
    ),
    *((f"fresh.{arm}.goes_along", GOES_ALONG) for arm in ("base", "tuned")),
    ("fresh.", "fresh answers to held-out prompts: empty, cut at the limit, repeating, ending in a loop, variety"),
    ("harmbench.", "harmful requests that were followed (asr), and how far that fell"),
    ("xstest.unsafe_compliance", "share of unsafe requests that are neither refused nor objected to, by wording"),
    ("xstest.", "safe requests that were refused, unsafe ones that were, and the rise"),
    ("mtbench.", "a judge's marks for answers in two turns, 1 to 10, and the difference"),
    ("checks.", "how a judge did on labelled examples before it was believed"),
    ("guard.", "share of pairs that a guard model dropped, or called unsafe"),
    ("contamination.", "rows of the data, or of its inputs, that stand in a benchmark"),
    ("sft.", "the arm trained on the revisions alone"),
    ("from_base.", "the arm of DPO without an SFT stage"),
)
ENDINGS = (
    (".shuffled", "each text beside another item's answer: should be near 0"),
    (".generic", "one text for all items: should be near 0"),
    (".heldout", "on prompts that were never trained on"),
    (".train", "on the training pairs"),
    (".agreement", "Cohen's kappa of the judge's verdicts with the base's own, on a sample"),
    (".revision", "of the pairs of a revision and its answer alone"),
    (".sampled", "of the pairs of two sampled answers alone"),
    (".permuted", "with chosen and rejected swapped at random: should be near one half"),
)


def meanings(names: Iterable[str]) -> list[tuple[str, str]]:
    """(beginning or ending of a name, what it says) for the figures of a run, the first beginning that fits."""
    plain = [OVER.sub("", name) for name in names]
    first = {next((begin for begin, _ in MEANINGS if name.startswith(begin)), "") for name in plain}
    ends = [(f"…{end}", text) for end, text in ENDINGS if any(end in name for name in plain)]
    return [(begin + ("…" if begin.endswith(".") else ""), text) for begin, text in MEANINGS if begin in first] + ends


def arm_of(name: str) -> str:
    """The arm beside base and tuned whose figure this is, by the end of its name; "" for theirs."""
    end = name.rpartition(".")[2]
    return end if end in BESIDE and not name.startswith("preference.over.") else ""


def without_arm(name: str) -> str:
    arm = arm_of(name)
    return name.removesuffix(f".{arm}") if arm else name


def fault(name: str) -> str:
    """What is wrong with a figure's name and what to write instead; "" if a run can measure it.

    An arm's figures are `<name>.sft`, or `dpo_over_sft.<name>`; `.tuned` in a name gives way to `.sft`.
    """
    plain = without_arm(OVER.sub("", name))
    if _KNOWN.fullmatch(plain) or (plain != name and _KNOWN.fullmatch(f"{plain}.tuned")):
        return ""
    near = difflib.get_close_matches(plain, NAMES, 1, 0.6)
    hint = f"Did you mean {near[0]}?" if near else "eval/measured.json of a run lists the names."
    return f"{name!r} is no figure that a run measures. {hint}"
