"""What to look at and what to change where a gate did not pass: one or two lines a gate. Pure.

Owns the wording alone: the figures name their worst texts, `gates` decides. Invariant: every gate of the shipped recipe
has its own line here (tests/evaluate/test_advice.py), and a line names keys or files that exist.
"""

from __future__ import annotations

from collections.abc import Sequence

from cai.evaluate.gates import Verdict
from cai.store.jsonl import JsonObject

ADVICE = (  # beginnings of names -> what to change, the first that fits
    ("pairs.kept", "read why texts were rejected (funnel of the report, `status: rejected` in records.jsonl)"),
    ("data.scaffolding", "read where the text runs on; shorter answers (sampling.*.max_new_tokens) or a file's stop:"),
    ("data.copied", "fewer shown examples for that stage (few_shot.*), or the chat form (model.format)"),
    ("data.nothing_found", 'critiques.no_issue = "keep" makes no pair of them; critiques.found = "calibrated" decides'),
    ("labels.better", "read pairs with the lowest margin; a larger model, or the critique prompt's examples"),
    ("labels.known", "the model cannot compare two answers: a larger one, or the chat form (model.format)"),
    ("labels.", 'pairs.label = "judge" leaves out what is not found better'),
    ("critic.recall", "a larger model, principles that name the flaw, or few_shot.critiques; make exam tries it alone"),
    (
        "critic.false_alarms",
        'a higher bar: pairs.false_labels lower where critiques.found = "compared", else critiques.false_alarms',
    ),
    ("critiques.", "read these critiques: do they name what their answer says? prompts/critiques.yaml, principles.top"),
    ("revisions.", "read these revisions beside their critiques; prompts/revisions.yaml, sampling.revisions"),
    (
        "preference.p1",
        "more pairs (items), read held-out pairs that it ranks wrongly; a surface control ahead says length",
    ),
    (
        "preference.p2",
        "where the loss over training pairs hardly fell, more steps or a higher dpo.learning_rate; where it fell to "
        'near nothing, fewer steps or dpo.keep = "best", and more pairs (items)',
    ),
    ("preference.p3", "read its fresh answers beside the base's in the report; dpo.beta, dpo.epochs, more pairs"),
    ("dpo.first_loss_error", "policy and reference differ at the start: another model or adapter than the reference's"),
    ("dpo.loss_fall", "a higher dpo.learning_rate or more steps (dpo.epochs)"),
    ("dpo.", "read the curves of the report; dpo.learning_rate, dpo.beta"),
    (
        "forgetting.",
        "a lower dpo.learning_rate, fewer dpo.epochs, or a higher dpo.beta keep it nearer to the base; of an SFT stage "
        "fewer sft.epochs, a lower sft.learning_rate, a smaller lora.rank, and more items before all",
    ),
    (
        "fresh.tuned.stops",
        "see how many of them ran to the limit in a loop: greedy decoding goes round there; revisions that repeat "
        'themselves teach it, more and other texts help. The others have not learnt to end: dpo.start = "sft", and '
        "with it more items; more sft.epochs or a higher sft.learning_rate teach it from few, and forget the rest",
    ),
    (
        "fresh.tuned.evades",
        'a lower dpo.learning_rate, a higher dpo.beta, or dpo.loss_type = ["sigmoid", "sft"]; read the chosen texts of '
        "benign requests too: short ones teach it. Where every request is harmful (instructions.red_team_share = 1) "
        "nothing shows it: take the gate out of your recipe, or hold benign prompts out",
    ),
    ("fresh.", 'dpo.start = "sft" teaches it to end; sampling.answers.max_new_tokens is the limit'),
    ("harmbench.", "more red-team items (instructions.red_team_share), more epochs; read what was followed"),
    ("xstest.", "fewer red-team items (instructions.red_team_share), principles against needless refusal"),
    ("mtbench.", "a lower dpo.learning_rate or fewer dpo.epochs; read the answers with the lowest marks"),
    ("checks.", "another judge (benchmarks.judge, guard.model): this one disagrees with the labels"),
    ("guard.", "read what the guard calls unsafe; another guard.model"),
    ("contamination.", "take the named rows out of prompts, principles or instructions"),
    ("", "read the rows behind the figure in the report"),
)


def to_change(metric: str) -> str:
    return next(text for beginning, text in ADVICE if metric.startswith(beginning))


def to_read(worst: Sequence[JsonObject]) -> str:
    """The items of the worst texts with what is wrong there: "item 3 (answers: ### Case), item 7 (round 2)"."""
    return ", ".join(filter(None, map(_named, worst[:3])))


def _named(row: JsonObject) -> str:
    name = next((f"{key} {row[key]}" for key in ("item", "id", "prompt", "text") if row.get(key) not in (None, "")), "")
    if not name:
        return ""
    what = [f"round {row['round'] + 1}"] if row.get("round") else []  # an item may stand here twice, once a round
    what += [str(row[key]) for key in ("stage", "sign", "copied", "margin") if row.get(key) not in (None, "")]
    return f"{name[:60]} ({' '.join(' '.join(what).split())[:80]})" if what else name[:60]


def lines(verdict: Verdict) -> list[str]:
    """Nothing for a gate that passed; else what to read, where there is something, and what to change."""
    if verdict.status == "PASS":
        return []
    if verdict.status == "UNDERPOWERED":
        return ["  to decide it: more items (items, heldout.items), or a lower minimum_n of this gate"]
    found = []
    if verdict.measured and (named := to_read(verdict.measured.worst)):
        found.append(f"  to read first: {named}")
    return [*found, f"  to change: {to_change(verdict.gate.metric)}"]
