"""Preflight of the loaded model: padding, prompts, stop token, first DPO loss, the adapter's dtype, the longest pair.

Each check is one line of `--doctor` and says what it saw. The adapter that the last ones need is replaced when training
begins. Torch is imported inside functions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from cai.engine import Completion, Engine, Request, Sampling, ScoreRequest
from cai.engine.model import Model
from cai.errors import CaiError
from cai.recipe.load import Recipe

if TYPE_CHECKING:
    from cai.engine.native.engine import NativeEngine
    from cai.recipe.prompts import Prompt
    from cai.recipe.settings import EngineSection
    from cai.training.forward import Layout

Status = Literal["ok", "warn", "fail"]
NEAR_TIE = {"cuda": 0.5, "cpu": 0.001}  # nats: rounding of bf16 (0.28 seen in 64 layers of random weights), of fp32
FAR = 0.1  # nats a token: NF4 moved a 135M model by 0.27 from its own weights, 8-bit products by 0.03 from NF4


@dataclass(frozen=True)
class Check:
    """One line: what was looked at, how it stands, what was seen and the remedy. `told`: on screen even when ok."""

    name: str
    status: Status
    seen: str
    told: bool = False

    def line(self) -> str:
        return f"{self.status:<4}  {self.name:<22}{self.seen}"


def model_checks(model: Model, recipe: Recipe, prompts: Mapping[str, Prompt]) -> Iterator[Check]:
    """What only the model can show; the adapter that the last checks need is replaced when training begins."""
    samples = sample_prompts(prompts, model)
    yield prompt_check(model, samples)
    if model.backend == "fake":
        return
    texts = [ids for ids in samples.values() if ids][:3]
    yield padding_check(model, recipe, texts)
    yield stop_check(model, recipe, min(texts, key=len))
    if recipe.engine.rounded:
        yield rounding_check(model.engine(recipe.engine, rounded=True), texts, recipe.engine)
    model.release()
    yield from training_checks(model, recipe)


SAMPLE = "How do I keep bread fresh for a week?"


def sample_prompts(prompts: Mapping[str, Prompt], model: Model) -> dict[str, tuple[int, ...]]:
    """Every prompt file rendered with a plain sentence in each field."""
    return {
        name: prompt.render(
            dict.fromkeys(prompt.fields, SAMPLE), format=model.format, tokenizer=model.tokenizer
        ).token_ids
        for name, prompt in prompts.items()
    }


def prompt_check(model: Model, samples: Mapping[str, tuple[int, ...]]) -> Check:
    """A base model never sees a chat token; its chat tokens are untrained."""
    if model.format != "base":
        return Check("chat tokens", "ok", "format = chat: the template's own tokens, content as plain text")
    control = set(model.tokenizer.control_ids)
    bad = [name for name, ids in samples.items() if control & set(ids)]
    if bad:
        return Check(
            "chat tokens", "fail", f"prompts/{bad[0]}.yaml renders to a control token. Remove it from the file"
        )
    total = sum(len(ids) for ids in samples.values())
    return Check("chat tokens", "ok", f"none in {len(samples)} base prompts ({total} tokens)")


def short_checks(model: Model, recipe: Recipe, prompts: Mapping[str, Prompt]) -> Iterator[Check]:
    """For a CPU: that a batch equals its rows alone, on the ends of three prompts (a few seconds)."""
    samples = [ids for ids in sample_prompts(prompts, model).values() if ids]
    texts = [ids[-length:] for ids, length in zip(samples, (20, 60, 110), strict=False)]
    yield padding_check(model, recipe, texts)


def padding_check(model: Model, recipe: Recipe, prompts: list[tuple[int, ...]]) -> Check:
    """Greedy, a batch of unequal prompts against each alone (Unsloth's padded batches were wrong until 2026-02).

    Another token is rounding when the lone prompt's own model finds it as likely as its own within `NEAR_TIE`; garbage
    from wrong padding is several nats off.
    """
    from cai.engine.build import make_engine

    engine = model.engine(recipe.engine)
    together = greedy(engine, prompts, at_once=True)
    reference = make_engine("reference", model)
    try:
        alone = greedy(reference, prompts, at_once=False)
        gaps = [gap(reference, *texts) for texts in zip(prompts, together, alone, strict=True)]
    finally:
        reference.close()
    tolerance = NEAR_TIE["cuda" if model.backend == "cuda" else "cpu"]
    same, ties = gaps.count(0.0), sum(0 < g <= tolerance for g in gaps)
    lengths = "/".join(str(len(ids)) for ids in prompts)
    text = f"{same} of {len(prompts)} prompts ({lengths} tokens) equal alone, greedy, engine {engine.name}"
    if ties:
        text += f"; {ties} differ at a near tie (at most {max(g for g in gaps if g <= tolerance):.3f} nats)"
    if same + ties == len(prompts):
        return Check("padded batch = alone", "ok", text)
    text += f"; worst token {max(gaps):.2f} nats below the best"
    return Check("padded batch = alone", "fail", f'{text}. Set engine.backend = "reference" and report it')


def rounding_check(engine: Engine, prompts: Sequence[tuple[int, ...]], section: EngineSection) -> Check:
    """How far 8 bits move this model's own distribution while it draws, on the longest of the prompts.

    "int8" has no exponent: beyond FAR a model's channels stand out too much for it, and it is refused.
    """
    wishes = {"engine.linears": section.linears, "engine.kv": section.kv}
    asked = {key: wish for key, wish in wishes.items() if wish in ("fp8", "int8")}
    said = " and ".join(f'{key} = "{wish}"' for key, wish in asked.items())
    unused = f"nothing is rounded: {said} is for the native engine on a GPU"
    if engine.name != "native":
        return Check("8-bit drawing", "warn", unused)
    from cai.engine.native.scoring import divergence

    ids = max(prompts, key=len)
    nats, same = divergence(cast("NativeEngine", engine), ids)
    if nats == 0.0:
        return Check("8-bit drawing", "warn", unused)
    text = f"KL {nats:.4f} nats a token, the same first choice at {same:.1%} of {len(ids)} tokens (exact against drawn)"
    if nats <= FAR:
        return Check("8-bit drawing", "ok", text, told=True)
    status: Status = "fail" if "int8" in asked.values() else "warn"
    remedy = " and ".join(f'{key} = "auto"' for key in asked)
    return Check("8-bit drawing", status, f"{text}. More than {FAR}: {remedy} draws exactly")


def greedy(engine: Engine, prompts: Sequence[tuple[int, ...]], *, at_once: bool) -> list[tuple[int, ...]]:
    """Eight greedy tokens of each prompt, all in one batch or one after another."""
    found: dict[int, tuple[int, ...]] = {}
    for i, ids in enumerate(prompts):
        engine.submit(Request(i, ids, Sampling(0.0, 8)))
        if not at_once:
            found |= {done.id: done.token_ids for done in engine.completions()}
    found |= {done.id: done.token_ids for done in engine.completions()}
    return [found[i] for i in range(len(prompts))]


def gap(reference: Engine, prompt: tuple[int, ...], batch: tuple[int, ...], alone: tuple[int, ...]) -> float:
    """Where the two texts part: how many nats less likely the batch's token is than the lone prompt's. 0.0 = equal."""
    at = next((i for i, (a, b) in enumerate(zip(batch, alone, strict=False)) if a != b), None)
    if at is None:
        return 0.0 if batch == alone else math.inf
    context = prompt + alone[:at]
    requests = [ScoreRequest(i, context, (token,)) for i, token in enumerate((alone[at], batch[at]))]
    logps = {score.id: score.total for score in reference.score(requests)}
    return max(logps[0] - logps[1], 1e-9)


def stop_check(model: Model, recipe: Recipe, prompt: tuple[int, ...]) -> Check:
    """The end token is what the recipe says, and generation ends on the token it is told to end on."""
    eos = model.tokenizer.eos_ids[0]
    name = model.tokenizer.decode([eos])
    engine = model.engine(recipe.engine)

    def draw(eos_ids: tuple[int, ...]) -> Completion:
        engine.submit(Request(0, prompt, Sampling(0.0, 4, eos_ids=eos_ids)))
        return next(iter(list(engine.completions())))

    first = draw(()).token_ids[0]
    stopped = draw((first,))
    if model.format == "base" and name != (recipe.model.eos or "<|endoftext|>"):
        return Check("stop token", "warn", f"end token is {name!r}, unusual for a base model")
    if stopped.finish != "eos" or stopped.token_ids != (first,):
        return Check(
            "stop token", "fail", f"generation ran on past its end token (finish {stopped.finish}). Try engine.backend"
        )
    return Check("stop token", "ok", f"{name} (id {eos}); generation stops at the end token")


def training_checks(model: Model, recipe: Recipe) -> Iterator[Check]:
    """LoRA in fp32, first loss log 2, and the longest pair that the recipe allows."""
    from cai.training import adapter
    from cai.training.forward import layout_for, set_checkpointing

    model.to_lora(recipe.lora, recipe.seed)
    model.mode("train")
    adapter.reset(model.hf, recipe.seed)
    try:
        adapter.require_fp32(model.hf)
        count = sum(p.numel() for _, p in adapter.lora_parameters(model.hf))
        yield Check("LoRA in fp32", "ok", f"{count / 1e6:.1f} M weights")
    except CaiError as error:
        yield Check("LoRA in fp32", "fail", str(error))
    layout = layout_for(model)
    set_checkpointing(model.hf, layout, False)
    yield first_loss_check(model, recipe, layout)
    yield longest_check(model, recipe, layout)
    model.hf.zero_grad(set_to_none=True)
    model.mode("generate")


def first_loss_check(model: Model, recipe: Recipe, layout: Layout) -> Check:
    """Policy and reference before any step, as training computes them: -log sigmoid(0) = log 2."""
    import torch

    from cai.training.loss import pair_loss, sequence_logps
    from cai.training.scoring import to_device
    from cai.training.token_rows import PairRow

    ids = tuple(model.tokenizer.encode(f"{SAMPLE} {SAMPLE}"))
    batch = to_device(layout.collate([PairRow(0, ids, ids[: len(ids) // 2], ids[1:])]), model.device)
    policy_2B, logps_N = sequence_logps(model.hf, batch, layout.forward)
    with torch.set_grad_enabled(layout.reference_with_grad):
        reference_2B, _ = sequence_logps(model.hf, batch, layout.forward)
    sums = policy_2B.detach(), reference_2B.detach(), logps_N, batch["lengths_S"]
    value = float(pair_loss(*sums, beta=recipe.dpo.beta, loss_type=("sigmoid",), loss_weights=(1.0,)))
    good = abs(value - math.log(2)) <= recipe.dpo.first_loss_tolerance
    text = f"{value:.6f} (log 2 = 0.693147), {layout.name} layout{': ' + layout.why if layout.why else ''}"
    return Check("first DPO loss", "ok" if good else "fail", text)


def longest_check(model: Model, recipe: Recipe, layout: Layout) -> Check:
    """Forward and backward over the longest pair dpo.max_length allows, first without, then with checkpointing."""
    if model.backend != "cuda":
        return Check("longest pair fits", "ok", "not measured without a GPU")
    from cai.training.fit import memory_limit, peak_of_step
    from cai.training.forward import set_checkpointing
    from cai.training.token_rows import PairRow

    length = min(recipe.dpo.max_length, model.max_seq_length)
    prompt, word = length // 4, model.tokenizer.encode(" word")[:1]
    row = PairRow(0, tuple(word * prompt), tuple(word * (length - prompt)), tuple(word * (length - prompt)))
    limit = memory_limit() / 2**30
    for checkpointing in (False, True):
        set_checkpointing(model.hf, layout, checkpointing)
        peak = peak_of_step(model, layout, [row])
        set_checkpointing(model.hf, layout, False)
        if peak is not None:
            how = "with" if checkpointing else "without"
            text = f"2 x {length} tokens: peak {peak / 2**30:.1f} of {limit:.1f} GiB {how} gradient checkpointing"
            return Check("longest pair fits", "ok", text)
    return Check("longest pair fits", "fail", f"2 x {length} tokens run out of {limit:.1f} GiB. Lower dpo.max_length")
