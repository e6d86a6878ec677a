"""Is a critique meaningful? G1-G7 without a model, CSI by likelihood, J1 and J2 by a judge; with shuffled and generic
controls of each.

Owns the checks, their rows and their summaries. Meaningful = G1-G7 and CSI, and J1 and J2 where the recipe requires the
judge. A critique that finds nothing wrong is counted apart: it is neither meaningful nor a failure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from cai.evaluate.cases import FALLBACK, GENERIC_CRITIQUE, MIN_QUOTE_MATCH, Case, others
from cai.evaluate.verdict import NOT_SCORED, Criterion, Scores, TextVerdict, by_judge, decide, likelihood, score_rows
from cai.metrics.figure import Figure, Outcome, Scored, by_metric, indicator, mean, rate, rounded, shuffled, worst_rows
from cai.metrics.stats import mcnemar_exact, rogan_gladen
from cai.metrics.text import Weights, copied_share, grounding, idf, misquoted_share, rouge_l, words
from cai.metrics.wordings import finds_nothing, only_praises
from cai.recipe.settings_evaluation import EvaluationSection
from cai.store.jsonl import Row

GATES = ("g1", "g2", "g3", "g4", "g5", "g6", "g7")
KINDS = ("real", "shuffled", "generic")
LEAST_WORDS, MOST_WORDS = 12, 300  # G1
MAX_PEERS = 100  # critiques of other prompts that G5 compares with: bounds an n^2 at 5,000 items


def variants(case: Case, pool: Sequence[Case]) -> dict[str, Case]:
    """The case and its controls. Shuffled: its critique laid on another answer. Generic: a fixed one on its answer."""
    other = others(case, pool)[0]
    return {
        "real": case,
        "shuffled": replace(other, critique=case.critique),
        "generic": replace(case, critique=GENERIC_CRITIQUE),
    }


def weights(cases: Sequence[Case]) -> Weights:
    """IDF over the prompts and answers of a run, with the shipped cases so that few items still have one."""
    return idf(f"{c.instruction} {c.answer}" for c in (*cases, *FALLBACK))


def peers(case: Case, pool: Sequence[Case]) -> list[str]:
    """Critiques of other prompts, at most MAX_PEERS, seeded."""
    found = {c.key: c for c in pool if c.instruction != case.instruction and c.critique.strip()}
    keys = list(found)
    chosen = keys if len(keys) <= MAX_PEERS else shuffled(keys, 0, ("peers", case.key))[:MAX_PEERS]
    return [found[key].critique for key in chosen if found[key].critique != case.critique or found[key].key != case.key]


def gate_values(case: Case, idf_weights: Weights, requests: Sequence[str], peer: Sequence[str]) -> Row:
    """G1-G7 of one critique as numbers. `peer`: critiques of other prompts."""
    text = case.critique
    return {
        "g1_words": len(words(text)),
        "g2_echo": max((rouge_l(text, request) for request in (case.principle, *requests) if request), default=0.0),
        "g3_copied": copied_share(text, case.answer),
        "g4_grounding": grounding(text, f"{case.instruction} {case.answer}", idf_weights),
        "g5_repeated": max((rouge_l(text, other) for other in peer), default=0.0),
        "g6_misquoted": misquoted_share(text, (case.answer, case.instruction), MIN_QUOTE_MATCH),
        "g7_only_praise": float(only_praises(text)),
    }


def gate_passes(values: Mapping[str, float], section: EvaluationSection) -> dict[str, bool]:
    return {
        "g1": LEAST_WORDS <= values["g1_words"] <= MOST_WORDS,
        "g2": values["g2_echo"] < section.max_echo,
        "g3": values["g3_copied"] < section.max_copied,
        "g4": values["g4_grounding"] >= section.min_grounding,
        "g5": values["g5_repeated"] < section.max_repeated,
        "g6": values["g6_misquoted"] <= section.max_misquoted,
        "g7": not values["g7_only_praise"],
    }


def gate_row(
    case: Case,
    pool: Sequence[Case],
    requests: Sequence[str],
    section: EvaluationSection,
    idf_: Weights,
    shown: Sequence[str] = (),
) -> Row:
    """The deterministic row of one item: values and passes of the critique and of its controls.

    `shown`: the critiques of the prompt's few-shot examples; they are of other prompts, too.
    """
    own_peers = [*peers(case, pool), *shown]
    row: Row = {"metric": "critiques.gates", "item": case.item, "round": case.round, "text": case.critique}
    row["finds_nothing"] = case.nothing or finds_nothing(case.critique)
    for kind, variant in variants(case, pool).items():
        values = gate_values(variant, idf_, requests, own_peers)
        row[kind] = rounded(values) | {"pass": [name for name, ok in gate_passes(values, section).items() if ok]}
    return row


def failed_gates(row: Row, kind: str) -> list[str]:
    """Of the gates that the row has a value of: G6 and G7 came later than the first rows on disk."""
    measured = {name.split("_")[0] for name in row[kind]} & set(GATES)
    return sorted(measured - set(row[kind]["pass"]))


def gates_pass(row: Row, kind: str) -> bool:
    return not failed_gates(row, kind)


def specificity_rows(found: Mapping[tuple[int, int], Mapping[str, Outcome]]) -> list[Row]:
    return score_rows("critiques.csi", found)


def verdict(scores: Scores, section: EvaluationSection, kind: str = "real") -> TextVerdict:
    """Is the critique meaningful? `scores`: its rows of `critiques.gates`, `critiques.csi` and `critiques.judge`."""
    gates, csi = scores.get("critiques.gates"), scores.get("critiques.csi")
    if gates is None:
        return NOT_SCORED
    judge_row = (scores.get("critiques.judge") or {}).get(kind) or {}
    required = section.judge == "require"
    criteria = [
        Criterion(name, gates[kind][key], wanted, gate in gates[kind]["pass"])
        for gate, (key, name, wanted) in _bars(section).items()
        if key in gates[kind]  # G6 and G7 came later than the first rows on disk
    ]
    criteria.append(specific(csi, kind, section))
    criteria += [by_judge(label, judge_row.get(name), required) for name, label in JUDGE_QUESTIONS.items()]
    return decide(criteria, sampled=csi is not None, nothing=bool(gates["finds_nothing"]))


def specific(csi: Row | None, kind: str, section: EvaluationSection) -> Criterion:
    name = "CSI specific to this answer, nats a token"
    return likelihood(name, csi, kind, section.min_specificity, "no CSI")


JUDGE_QUESTIONS = {
    "j1": "J1 the answer holds the problem (log-odds)",
    "j2": "J2 fixing it would help (log-odds)",
}


def _bars(section: EvaluationSection) -> dict[str, tuple[str, str, str]]:
    """Gate -> (value of its row, name, what is wanted), in words."""
    return {
        "g1": ("g1_words", "G1 length in words", f"{LEAST_WORDS} to {MOST_WORDS}"),
        "g2": ("g2_echo", "G2 echoes the request (ROUGE-L)", f"below {section.max_echo:g}"),
        "g3": ("g3_copied", "G3 copied from the answer", f"below {section.max_copied:g}"),
        "g4": ("g4_grounding", "G4 about this prompt and answer", f"at least {section.min_grounding:g}"),
        "g5": ("g5_repeated", "G5 same as critiques of other prompts", f"below {section.max_repeated:g}"),
        "g6": ("g6_misquoted", "G6 quotes what nobody said", f"at most {section.max_misquoted:g}"),
        "g7": ("g7_only_praise", "G7 only praises", "0"),
    }


def summarise(
    gates: Sequence[Row], csi: Sequence[Row], judged: Sequence[Row], section: EvaluationSection, judge: str
) -> dict[str, Figure]:
    """Rows -> figures by metric name. `judge`: the name of the model that scored CSI and J."""
    csi_of = {(row["item"], row["round"]): row for row in csi}
    judged_of = {(row["item"], row["round"]): row for row in judged}
    real = [row for row in gates if not row["finds_nothing"]]
    result = by_metric(rate("critiques.finds_nothing", [indicator(row["finds_nothing"]) for row in gates]))
    sampled = [row for row in real if (row["item"], row["round"]) in csi_of]

    def scores_of(row: Row) -> dict[str, Row]:
        key = (row["item"], row["round"])
        return {"critiques.gates": row, "critiques.csi": csi_of[key], "critiques.judge": judged_of.get(key, {})}

    outcomes: dict[str, list[Outcome]] = {}
    for kind in KINDS:
        tail = "" if kind == "real" else f".{kind}"
        deterministic = [indicator(gates_pass(row, kind)) for row in real]
        worst = worst_rows(real, lambda row: len(row["real"]["pass"])) if kind == "real" else ()
        result |= by_metric(rate("critiques.gates" + tail, deterministic, worst=worst))
        outcomes[kind] = [verdict(scores_of(row), section, kind).outcome for row in sampled]
        csi_to_bar = [specific(csi_of[row["item"], row["round"]], kind, section) for row in sampled]
        name = f"likelihood of {judge}"
        result |= by_metric(mean("critiques.csi" + tail, [c.score for c in csi_to_bar], judge=name))
        result |= by_metric(rate("critiques.specific" + tail, [c.outcome for c in csi_to_bar], judge=name))
    result |= by_metric(*_meaningful_rates(outcomes, sampled, csi_of, result, section, judge))
    return result | _judge_rates(judged, judge)


def _meaningful_rates(
    outcomes: Mapping[str, list[Outcome]],
    sampled: Sequence[Row],
    csi_of: Mapping[tuple[int, int], Row],
    result: Mapping[str, Figure],
    section: EvaluationSection,
    judge: str,
) -> list[Figure]:
    """The headline with its controls, exact McNemar against each, and the rate corrected for the check's own errors."""
    name = f"G1-G7, likelihood of {judge}" + (", J1, J2" if section.judge == "require" else "; no truth judge")
    controls = [rate(f"critiques.meaningful.{kind}", outcomes[kind], judge=name) for kind in KINDS[1:]]
    facts: Row = {"finds_nothing": result["critiques.finds_nothing"].value}
    won = {kind: [o == Scored(1.0) for o in outcomes[kind]] for kind in KINDS}
    if sampled:
        facts |= {f"mcnemar_p.{kind}": mcnemar_exact(won[kind], won["real"]) for kind in KINDS[1:]}
        apparent = sum(won["real"]) / len(sampled)
        false_accepts = max(sum(won[kind]) for kind in KINDS[1:]) / len(sampled)
        facts["corrected"] = rogan_gladen(apparent, section.exam_sensitivity, 1.0 - false_accepts)
    order = lambda row: (gates_pass(row, "real"), csi_of[row["item"], row["round"]]["real"] or -9.0)  # noqa: E731 - one key, used once
    worst = tuple(_worst(row, csi_of) for row in worst_rows(sampled, order))
    return [rate("critiques.meaningful", outcomes["real"], judge=name, worst=worst, facts=facts), *controls]


def _worst(row: Row, csi_of: Mapping[tuple[int, int], Row]) -> Row:
    csi = csi_of[row["item"], row["round"]]["real"]
    return {
        "item": row["item"],
        "round": row["round"],
        "csi": csi,
        "failed": failed_gates(row, "real"),
        "text": row["text"][:400],
    }


def _judge_rates(judged: Sequence[Row], judge: str) -> dict[str, Figure]:
    result: dict[str, Figure] = {}
    for name in ("j1", "j2") if judged else ():
        for kind in ("real", "shuffled"):
            tail = "" if kind == "real" else f".{kind}"
            answers = [(row.get(kind) or {}).get(name) for row in judged]
            outcomes = [by_judge(JUDGE_QUESTIONS[name], answer, True).outcome for answer in answers]
            result |= by_metric(rate(f"critiques.{name}{tail}", outcomes, judge=judge))
    return result
