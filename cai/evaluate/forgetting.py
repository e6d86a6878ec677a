"""Forgetting: how far the tuned model has moved on text that has nothing to do with the training data.

Owns NLL and KL over the neutral passages that come with the project and the degeneration figures of fresh answers;
lm_eval's tasks are `harness`'s. KL needs whole distributions, so it uses the weights directly; torch comes late.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from cai.engine import Score
from cai.engine.asks import Ask, Name, Scorer
from cai.engine.foreign import HfModel
from cai.engine.model import Model
from cai.metrics.figure import Figure, Scored, finite_rows, indicator, mean, rate, unmeasured, unscored, worst_rows
from cai.metrics.objections import goes_along
from cai.metrics.text import distinct_n, loops, repeats, words
from cai.metrics.wordings import is_refusal
from cai.store.jsonl import Row

if TYPE_CHECKING:
    import torch

DATA = Path(__file__).parent / "data" / "neutral.jsonl"
JUDGE = "tuned against base"
KL_CHUNK = 64  # positions whose two distributions exist at one time


@functools.lru_cache(maxsize=1)
def passages() -> tuple[str, ...]:
    """The neutral passages, in file order: original text written for this project, 60 to 120 words each."""
    return tuple(orjson.loads(line)["text"] for line in DATA.read_bytes().split(b"\n") if line)


def nll_asks(scorer: Scorer, chosen: Sequence[int]) -> list[Ask]:
    """Each passage; its first token is context only."""
    listed = ((index, tuple(scorer.encode(passages()[index]))) for index in chosen)
    return [Ask((index,), ids[:1], ids[1:]) for index, ids in listed]


def nll_rows(found: Mapping[bool, Mapping[Name, Score]], chosen: Sequence[int]) -> list[Row]:
    """Mean NLL a token of each passage under base and tuned. `found`: adapter on -> the scores of `nll_asks`."""
    return [
        {
            "metric": "forgetting.nll",
            "item": index,
            "round": 0,
            "tokens": len(found[False][(index,)].logps),
            "base": round(-found[False][(index,)].mean, 6),
            "tuned": round(-found[True][(index,)].mean, 6),
        }
        for index in chosen
    ]


def kl_rows(model: Model, chosen: Sequence[int]) -> list[Row]:
    """Mean KL(base || tuned) a token of each passage, in nats; at most KL_CHUNK positions' distributions at a time."""
    rows = []
    for index in chosen:
        ids = model.tokenizer.encode(passages()[index])
        rows.append({"metric": "forgetting.kl", "item": index, "round": 0, "kl": round(kl_per_token(model, ids), 6)})
    return rows


def kl_per_token(model: Model, ids: Sequence[int]) -> float:
    """KL(base || tuned) = sum_v p_base (log p_base - log p_tuned), mean over positions. T tokens, V vocabulary."""
    import torch

    hidden = {}
    lm = model.hf.get_base_model() if hasattr(model.hf, "get_base_model") else model.hf
    was_training = model.hf.training
    model.hf.eval()
    try:
        with torch.no_grad():
            for on in (False, True):
                with model.adapter(on):
                    ids_1T = torch.tensor([list(ids)], device=model.device)
                    hidden[on] = lm.model(input_ids=ids_1T, use_cache=False)[0][0]
            total = 0.0
            for start in range(0, len(ids), KL_CHUNK):
                part = slice(start, start + KL_CHUNK)
                base_TV, tuned_TV = (_logps(model, lm, hidden[on][part], on) for on in (False, True))
                total += float((base_TV.exp() * (base_TV - tuned_TV)).sum())
    finally:
        model.hf.train(was_training)
    return not_negative(total / len(ids))


def not_negative(kl: float) -> float:
    """A KL below 0 by rounding is 0; one that is NaN stays NaN. `max(0.0, kl)` made a broken model's 0, a PASS."""
    return 0.0 if kl < 0.0 else kl


def _logps(model: Model, lm: HfModel, hidden_TH: torch.Tensor, on: bool) -> torch.Tensor:
    with model.adapter(on):
        return lm.get_output_embeddings()(hidden_TH).float().log_softmax(-1)


def summarise_nll(rows: Sequence[Row]) -> dict[str, Figure]:
    """Tuned minus base, paired by document: the interval is a bootstrap over documents."""
    found = finite_rows(rows, "base", "tuned")
    missing = unscored(len(rows) - len(found))
    worst = tuple(worst_rows(found, lambda row: row["base"] - row["tuned"]))
    differences = [*(Scored(row["tuned"] - row["base"]) for row in found), *missing]
    delta = mean("forgetting.nll_delta", differences, judge=JUDGE, worst=worst)
    bases = [*(Scored(row["base"]) for row in found), *missing]
    base = mean("forgetting.nll_base", bases, judge="base")
    return {delta.metric: delta, base.metric: base}


def summarise_kl(rows: Sequence[Row]) -> dict[str, Figure]:
    found = finite_rows(rows, "kl")
    values = [*(Scored(row["kl"]) for row in found), *unscored(len(rows) - len(found))]
    return {"forgetting.kl": mean("forgetting.kl", values, judge="base || tuned")}


def of_answers(texts: Sequence[str], finishes: Sequence[str], arm: str) -> dict[str, Figure]:
    """How one arm's fresh answers degenerate, and end."""
    ended = rate(f"fresh.{arm}.stops", [indicator(finish == "eos") for finish in finishes])
    return degeneration(texts, [finish == "length" for finish in finishes], arm) | {ended.metric: ended}


def compliance(texts: Sequence[str], arm: str) -> dict[str, Figure]:
    """How many of one arm's fresh answers to red-team requests go along with them."""
    name = f"fresh.{arm}.goes_along"
    if not texts:
        return {name: unmeasured(name, "no fresh answer to a red-team request")}
    return {name: rate(name, [indicator(goes_along(text)) for text in texts])}


def degeneration(texts: Sequence[str], limited: Sequence[bool], arm: str) -> dict[str, Figure]:
    """What one arm's fresh answers are like: empty, at the token limit, with a repeated 8-gram, at the limit in a loop,
    distinct-2, refusals, words.

    A loop is no missing end: greedy decoding goes round before the end token is reached.
    """
    names = ("empty", "at_limit", "repeats", "loops", "distinct_2", "refused", "words")
    if not texts:
        return {f"fresh.{arm}.{n}": unmeasured(f"fresh.{arm}.{n}", "no fresh answer") for n in names}
    both = list(zip(texts, limited, strict=True))
    figures = [
        rate(f"fresh.{arm}.empty", [indicator(not words(text)) for text in texts]),
        rate(f"fresh.{arm}.at_limit", [indicator(flag) for flag in limited]),
        rate(f"fresh.{arm}.repeats", [indicator(repeats(text)) for text in texts]),
        rate(f"fresh.{arm}.loops", [indicator(cut and loops(text)) for text, cut in both]),
        Figure(f"fresh.{arm}.distinct_2", distinct_n(texts), n=len(texts)),
        rate(f"fresh.{arm}.refused", [indicator(is_refusal(text)) for text in texts]),
        mean(f"fresh.{arm}.words", [Scored(len(words(text))) for text in texts], judge="deterministic"),
    ]
    return {figure.metric: figure for figure in figures}
