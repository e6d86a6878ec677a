"""The exported files against the model that was measured: same tokens, same probabilities, same answers, do they end?

Owns which prompts are tried, the bounds, and the line that says what was seen. Loads the run's model with its adapter
once, for this and for a merge. Imports torch inside functions.

Two engines round differently, and greedy texts part at the first near tie; so what is asked is whether the exported
adapter gives the measured answer's own tokens the measured log-probabilities, and whether texts part at near ties only.
A wrong scaling fails the first, a repetition penalty that slipped in the second.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cai.commands.export_prompt import TEMPLATE, Asking
from cai.engine import Request, Rules, Sampling, ScoreRequest
from cai.engine.foreign import HfTokenizer
from cai.engine.greedy import NEUTRAL
from cai.engine.model import Model
from cai.errors import QUALITY, CaiError
from cai.metrics.wordings import has_control_token
from cai.report.snapshot import Snapshot

if TYPE_CHECKING:
    from cai.recipe.prompts import Rendered

PROMPTS = 4
ON_A_CPU = 32  # tokens of a greedy answer, which are seconds there; on a GPU as many as a fresh answer may have
EXPORTED, OWN = "exported", "default"  # names of the two adapters while both are on the weights
SPARE = (  # where a run has too few prompts of its own
    "How do I keep basil alive on a windowsill?",
    "Write two sentences about the sea.",
    "What is seven times eight?",
    "How can I apologise to a friend I shouted at?",
)


@dataclass(frozen=True)
class Answer:
    """`ids`: all that were drawn, the end token included; `logps`: theirs, where the engine that drew was asked."""

    text: str
    finish: str
    ids: tuple[int, ...] = ()
    logps: tuple[float, ...] = ()


@dataclass(frozen=True)
class Bounds:
    """What rounding alone may do, in nats: to the mean log-probability of a token, and to a tie that it breaks."""

    mean: float
    gap: float


FINE, COARSE = Bounds(0.001, 0.01), Bounds(0.1, 1.0)  # float32; bf16 products, over weights of 16 bits or fewer


@dataclass(frozen=True)
class Compared:
    """One prompt: the measured answer and that of the exported files.

    `off`: how far the log-probability of the measured tokens is off, mean nats a token. `parted`: the first token that
    differs, counted from 0; None where none does. `gap`: nats between the two tokens there, under the exported files.
    """

    measured: Answer
    exported: Answer
    off: float
    parted: int | None
    gap: float


def prompts_of(snapshot: Snapshot) -> list[str]:
    """Held-out prompts first, then trained ones, then spare ones; none that spells a control token."""
    own = [str(pair["prompt"]) for pair in (*snapshot.pairs.heldout, *snapshot.cleaned.kept)]
    return [text for text in dict.fromkeys((*own, *SPARE)) if not has_control_token(text)][:PROMPTS]


def load_tuned(snapshot: Snapshot, adapter: Path) -> Model:
    """The run's model with its adapter on. Errors: CaiError where it cannot be loaded here."""
    from cai.models.policy import load

    model: Model = load(snapshot.recipe.model, snapshot.backend, seed=snapshot.recipe.seed)  # type: ignore[arg-type]  # a str
    model.load_adapter(adapter, snapshot.recipe.lora)
    model.rules = Rules()  # what a server draws: the recipe's rules for small models stay in the pipeline
    model.mode("generate")
    return model


def free() -> None:
    """Memory of a model that is used no more: its weights stay on the device while a cycle holds them."""
    gc.collect()
    if torch := sys.modules.get("torch"):
        torch.cuda.empty_cache()  # does nothing where there is no GPU


def through_template(model: Model, snapshot: Snapshot, asking: Asking, folder: Path) -> str:
    """What was seen of the exported files in `folder`. Error: CaiError (exit 6) if they are not what was measured."""
    from transformers import AutoTokenizer

    texts, whole = prompts_of(snapshot), snapshot.recipe.evaluation.fresh_max_new_tokens
    limit = whole if snapshot.backend == "cuda" else min(ON_A_CPU, whole)
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    rendered = [asking.render(text, model.tokenizer) for text in texts]
    ids = [templated(tokenizer, text) for text in texts]
    wrong = [i for i, r in enumerate(rendered) if tuple(ids[i]) != r.token_ids]
    if wrong and asking.format == "base":
        raise CaiError(
            f"{folder / TEMPLATE}: {len(wrong)} of {len(texts)} prompts give other tokens than the policy prompt "
            f"that was measured, the first: {texts[wrong[0]][:60]!r}. Give prompts/policy.yaml cues that end a token.",
            QUALITY,
        )
    measured = by_engine(model, snapshot, rendered, limit)
    with exported(model, folder):
        found = [
            compared(model, rendered[i], answer, by_generate(model, tokenizer, folder, ids[i], limit, asking))
            for i, answer in enumerate(measured)
        ]
    bounds = bounds_of(model)
    check(found, bounds, folder)
    return summary(asking, found, bounds, limit, whole, len(wrong))


def templated(tokenizer: HfTokenizer, text: str) -> list[int]:
    turns = [{"role": "user", "content": text}]
    return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"])


def by_engine(model: Model, snapshot: Snapshot, rendered: list[Rendered], limit: int) -> list[Answer]:
    """Greedy, as the fresh answers of the evaluation are drawn, with the log-probabilities that it scores them by."""
    engine = model.engine(snapshot.recipe.engine)
    for i, r in enumerate(rendered):
        engine.submit(Request(i, r.token_ids, Sampling(0.0, limit, r.stop, tuple(model.tokenizer.eos_ids))))
    done = {row.id: row for row in engine.completions()}
    asked = [ScoreRequest(i, r.token_ids, done[i].token_ids) for i, r in enumerate(rendered)]
    scores = {score.id: score.logps for score in engine.score(asked)}
    rows = [done[i] for i in range(len(rendered))]
    return [Answer(row.text.strip(), row.finish, row.token_ids, scores[row.id]) for row in rows]


@contextmanager
def exported(model: Model, folder: Path) -> Iterator[None]:
    """Within the block the adapter on the weights is the one of `folder`, as PEFT loads it: its own scaling and all."""
    model.release()
    model.hf.load_adapter(str(folder), adapter_name=EXPORTED, torch_device=str(model.device))
    model.hf.set_adapter(EXPORTED)
    try:
        yield
    finally:
        model.hf.set_adapter(OWN)
        model.hf.delete_adapter(EXPORTED)


def by_generate(
    model: Model, tokenizer: HfTokenizer, folder: Path, ids: list[int], limit: int, asking: Asking
) -> Answer:
    """Greedy, by transformers' `generate` with nothing but the exported files."""
    import torch
    from transformers import GenerationConfig

    config = GenerationConfig.from_pretrained(str(folder), max_new_tokens=limit)
    if asking.format == "chat":  # there the file is the model's own, which may ask for sampling and penalties
        config.update(**NEUTRAL)
    row = torch.tensor([ids], device=model.device)
    with torch.no_grad():
        made = model.hf.generate(
            input_ids=row, attention_mask=torch.ones_like(row), generation_config=config, tokenizer=tokenizer
        )
    new = made[0, len(ids) :].tolist()
    eos = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ended = bool(new) and new[-1] in eos
    text = tokenizer.decode(new[:-1] if ended else new, skip_special_tokens=False)  # as the engine's text is
    places = [at for stop in asking.stops if (at := text.find(stop)) >= 0]
    finish = "stop" if places else "eos" if ended else "length"
    return Answer((text[: min(places)] if places else text).strip(), finish, tuple(new))


def compared(model: Model, rendered: Rendered, measured: Answer, answer: Answer) -> Compared:
    """Both answers to one prompt, and what the model as it is now makes of the measured tokens."""
    import torch

    start = len(rendered.token_ids) - 1
    with torch.no_grad():
        rows = torch.tensor([[*rendered.token_ids, *measured.ids]], device=model.device)
        logps_TV = model.hf(input_ids=rows).logits[0, start:-1].float().log_softmax(-1)
    off = [abs(float(logps_TV[i, token]) - measured.logps[i]) for i, token in enumerate(measured.ids)]
    pairs = enumerate(zip(measured.ids, answer.ids, strict=False))
    parted = next(((i, a, b) for i, (a, b) in pairs if a != b), None)
    gap = abs(float(logps_TV[parted[0], parted[1]] - logps_TV[parted[0], parted[2]])) if parted else 0.0
    return Compared(measured, answer, sum(off) / len(off), parted[0] if parted else None, gap)


def bounds_of(model: Model) -> Bounds:
    import torch

    return FINE if model.hf.dtype == torch.float32 else COARSE


def check(found: list[Compared], bounds: Bounds, folder: Path) -> None:
    """Errors: CaiError (exit 6) for an adapter that is not the measured one, or answers that are drawn otherwise."""
    off, gap = max(row.off for row in found), max(row.gap for row in found)
    if not off <= bounds.mean:
        raise CaiError(
            f"{folder}: the exported adapter is not the one that was measured: the log-probability of its answers is "
            f"off by {off:.4f} nats a token ({bounds.mean:g} at most). Export again, or train the run's adapter anew.",
            QUALITY,
        )
    if not gap <= bounds.gap:
        raise CaiError(
            f"{folder}: the exported files draw otherwise than was measured: at the first token that differs the two "
            f"are {gap:.3f} nats apart ({bounds.gap:g} at most). Look for a penalty in generation_config.json.",
            QUALITY,
        )


def summary(asking: Asking, found: list[Compared], bounds: Bounds, limit: int, whole: int, other_tokens: int) -> str:
    """`whole`: the tokens that an answer may have in the evaluation, where `limit` may be too short to see an end."""
    n, off = len(found), max(row.off for row in found)
    same = sum(row.measured.text == row.exported.text for row in found)
    ends = {finish: sum(row.exported.finish == finish for row in found) for finish in ("eos", "stop", "length")}
    tokens = "the measured tokens" if not other_tokens else f"other tokens for {other_tokens}"
    line = (
        f"probe: {n} prompts through {TEMPLATE} give {tokens}; the measured answers are as likely under the exported "
        f"adapter to {off:.4f} nats a token ({bounds.mean:g} at most); greedy answers are the measured ones for {same} "
        f"of {n}"
    )
    if parted := [row for row in found if row.parted is not None]:
        first, gap = min(row.parted or 0 for row in parted) + 1, max(row.gap for row in parted)
        line += f" (the others part at near ties, from token {first}: {gap:.3f} nats, {bounds.gap:g} at most)"
    if limit < whole:
        return f"{line}; {limit} tokens of {whole} were drawn, too few to tell whether they end"
    by = f"{ends['eos']} by {asking.eos}, {ends['stop']} by a stop string"
    return f"{line}; {n - ends['length']} of {n} end within {limit} tokens ({by})"
