"""lm_eval's model interface over records: answers that stand are replayed, missing ones are asked of the engine.

lm_eval builds its prompts and scores in one call; so it is called once to learn what it asks (`Unanswered`), the engine
answers in slices that are written at once, and it is called again with everything answered. Owns tokenisation, windows
and stop strings as lm_eval's own Hugging Face backend has them. Imports neither lm_eval nor torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

import orjson

from cai.data.slots import seed_of
from cai.engine import Engine, Request, Rules, Sampling, Score, ScoreRequest, never
from cai.engine.model import Model
from cai.errors import CaiError
from cai.metrics.figure import rounded
from cai.recipe.prompts import digest
from cai.store.jsonl import JsonObject, Row

DEFAULT_NEW_TOKENS = 256
LOG_HALF = math.log(0.5)
TIE = 1e-3  # nats by which one log-prob may be rounded against another
LIMIT_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
CUT_SAMPLING = {"top_p": 1.0, "top_k": 0, "min_p": 0.0}  # what would make the engine draw otherwise than asked


@dataclass(frozen=True)
class HarnessRequest:
    """One request of lm_eval. `number`: how often the same was asked before (tasks that sample ask several times)."""

    kind: str
    args: tuple[Any, ...]  # texts, and a table of options
    number: int = 0

    @property
    def item(self) -> int:
        """A number that stands for kind and arguments in the log's key."""
        return int(digest(orjson.dumps([self.kind, self.args], default=str))[:13], 16)


class Unanswered(Exception):
    """Requests that no record answers yet."""

    def __init__(self, asks: Sequence[HarnessRequest]) -> None:
        super().__init__(f"{len(asks)} requests are not answered")
        self.asks = list(asks)


class Instance(Protocol):
    """lm_eval's `Instance`."""

    args: tuple[Any, ...]


class Replay:
    """The three calls of lm_eval's `LM`. `find`: (item, number) -> row, or None where it is not answered.

    A log-prob that is no number stands as null in its row, and is NaN for lm_eval: its document is unscored.
    """

    def __init__(self, find: Callable[[int, int], Row | None]) -> None:
        self.find = find

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        return [(_logp(row), row["greedy"]) for row in self._rows("loglikelihood", requests)]

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        return [_logp(row) for row in self._rows("loglikelihood_rolling", requests)]

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        return [row["text"] for row in self._rows("generate_until", requests)]

    def _rows(self, kind: str, requests: Sequence[Instance]) -> list[Row]:
        asks = list(numbered(kind, requests))
        rows = [self.find(ask.item, ask.number) for ask in asks]
        missing = [ask for ask, row in zip(asks, rows, strict=True) if row is None]
        if missing:
            raise Unanswered(missing)
        return [row for row in rows if row is not None]


def _logp(row: Row) -> float:
    return math.nan if row["logp"] is None else float(row["logp"])


def numbered(kind: str, requests: Sequence[Instance]) -> Iterator[HarnessRequest]:
    """Each request as an Ask. Greedy repeats are one: only what is drawn is asked again."""
    seen: dict[int, Iterator[int]] = {}
    for request in requests:
        ask = HarnessRequest(kind, tuple(request.args))
        drawn = kind == "generate_until" and temperature(ask.args[1]) > 0
        number = next(seen.setdefault(ask.item, count())) if drawn else 0
        yield HarnessRequest(kind, ask.args, number)


def answer(
    model: Model, engine: Engine, asks: Sequence[HarnessRequest], stopped: Callable[[], bool] = never
) -> list[Row]:
    """Rows of these requests, in order; fewer where `stopped()`. The recipe's sampling rules don't apply here."""
    rules, engine.rules = engine.rules, Rules()
    try:
        found: dict[int, Row] = {}
        kinds = (("generate_until", _generate), ("loglikelihood", _score), ("loglikelihood_rolling", _rolling))
        for kind, compute in kinds:
            mine = {i: ask for i, ask in enumerate(asks) if ask.kind == kind}
            if mine:
                found |= compute(model, engine, mine, stopped)
    finally:
        engine.rules = rules
    return [
        {"item": ask.item, "round": ask.number, "kind": ask.kind, **found[i]}
        for i, ask in enumerate(asks)
        if i in found
    ]


# --- log-likelihoods


def encode_pair(model: Model, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of both, tokenised together; spaces at the context's end belong to the continuation."""
    encode = model.tokenizer.encode
    if not context:
        ids, start = encode(continuation), prefix_id(model)
        return (ids[:1], ids[1:]) if len(ids) > 1 and ids[0] == start else ([start], ids)
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    whole, first = encode(context + continuation), encode(context) or [prefix_id(model)]
    return first, whole[len(encode(context)) :]


def prefix_id(model: Model) -> int:
    """What stands before a text without a context: the tokenizer's begin token, else the end token."""
    begin = getattr(model.hf_tokenizer, "bos_token_id", None)
    return int(model.tokenizer.eos_ids[0] if begin is None else begin)


def _score(
    model: Model, engine: Engine, asks: Mapping[int, HarnessRequest], stopped: Callable[[], bool]
) -> dict[int, Row]:
    """Sum of log-probs, and whether the greedy text is the continuation. Contexts are cut at their beginning."""
    encoded: dict[int, tuple[list[int], list[int]]] = {}
    for i, ask in asks.items():
        context, continuation = encode_pair(model, *ask.args)
        room = model.max_seq_length - len(continuation)
        if room < 1:
            raise CaiError(
                f"evaluation.lm_eval: a continuation of {len(continuation)} tokens does not fit into "
                f"model.max_seq_length = {model.max_seq_length}. Raise it, or leave the task out."
            )
        encoded[i] = (context[-room:], continuation)
    empty = {i: {"logp": 0.0, "greedy": True} for i, (_, continuation) in encoded.items() if not continuation}
    wanted = [ScoreRequest(i, tuple(c), tuple(t)) for i, (c, t) in encoded.items() if t]
    scores = {score.id: score for score in engine.score(wanted, stopped)}
    greedy = _greedy(engine, [request for request in wanted if request.id in scores], scores, stopped)
    return empty | {i: {**rounded({"logp": scores[i].total}), "greedy": flag} for i, flag in greedy.items()}


def _greedy(
    engine: Engine, requests: Sequence[ScoreRequest], scores: Mapping[int, Score], stopped: Callable[[], bool]
) -> dict[int, bool]:
    """Whether each continuation is what greedy decoding writes. Drawn only where the log-probs leave it open.

    A continuation whose tokens all have more than half of the probability is; one whose first token is less likely
    than that of another continuation of the same context is not.
    """
    best: dict[tuple[int, ...], float] = {}
    for request in requests:
        best[request.context_ids] = max(best.get(request.context_ids, -math.inf), scores[request.id].logps[0])
    found: dict[int, bool] = {}
    for request in requests:
        logps = scores[request.id].logps
        if min(logps) > LOG_HALF:
            found[request.id] = True
        elif logps[0] < best[request.context_ids] - TIE:
            found[request.id] = False
        else:
            engine.submit(Request(request.id, request.context_ids, Sampling(0.0, len(logps))))
    texts = {request.id: request.continuation_ids for request in requests}
    return found | {done.id: tuple(done.token_ids) == texts[done.id] for done in engine.completions(stopped)}


def _rolling(
    model: Model, engine: Engine, asks: Mapping[int, HarnessRequest], stopped: Callable[[], bool]
) -> dict[int, Row]:
    """Log-prob of a whole text: every token once, after as many tokens before it as fit."""
    requests: list[ScoreRequest] = []
    owner: list[int] = []
    for i, ask in asks.items():
        for context, part in windows(model.tokenizer.encode(ask.args[0]), prefix_id(model), model.max_seq_length):
            requests.append(ScoreRequest(len(owner), context, part))
            owner.append(i)
    found = {score.id: score.total for score in engine.score(requests, stopped)}
    totals = dict.fromkeys(asks, 0.0)
    for number, i in enumerate(owner):
        if number in found and i in totals:
            totals[i] = round(totals[i] + found[number], 6)
        else:
            totals.pop(i, None)
    return {i: dict(rounded({"logp": total})) for i, total in totals.items()}


def windows(ids: Sequence[int], prefix: int, length: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(context, part) pairs whose parts make up `ids` once; both together never exceed `length`."""
    whole = (prefix, *ids)
    for start in range(1, len(whole), length - 1):
        part = whole[start : start + length - 1]
        yield whole[max(0, start - (length - len(part))) : start], part


# --- generation


def temperature(arguments: JsonObject) -> float:
    return 0.0 if arguments.get("do_sample") is False else float(arguments.get("temperature") or 0.0)


def sampling_of(model: Model, arguments: JsonObject) -> Sampling:
    """lm_eval's generation arguments for the engine. Errors: CaiError where it cannot draw as asked."""
    limit = next((int(arguments[name]) for name in LIMIT_NAMES if arguments.get(name)), DEFAULT_NEW_TOKENS)
    if limit >= model.max_seq_length:
        raise CaiError(
            f"evaluation.lm_eval: a task wants {limit} new tokens, model.max_seq_length is {model.max_seq_length}. "
            "Raise it, or leave the task out."
        )
    heat = temperature(arguments)
    cut = [name for name, off in CUT_SAMPLING.items() if heat and arguments.get(name) not in (None, off)]
    if cut:
        raise CaiError(f"evaluation.lm_eval: a task draws with {cut[0]}, which the engine has not. Leave the task out.")
    until = arguments.get("until") or ()
    stops = (until,) if isinstance(until, str) else tuple(until)
    return Sampling(heat, limit, tuple(stop for stop in stops if stop), tuple(model.tokenizer.eos_ids))


def _generate(
    model: Model, engine: Engine, asks: Mapping[int, HarnessRequest], stopped: Callable[[], bool]
) -> dict[int, Row]:
    for i, ask in asks.items():
        context, arguments = ask.args
        sampling = sampling_of(model, arguments)
        ids = model.tokenizer.encode(context) or [prefix_id(model)]
        seed = seed_of(0, "lm_eval", ask.item, ask.number)
        engine.submit(Request(i, tuple(ids[-(model.max_seq_length - sampling.max_new_tokens) :]), sampling, seed))
    return {done.id: {"text": done.text, "finish": done.finish} for done in engine.completions(stopped)}
