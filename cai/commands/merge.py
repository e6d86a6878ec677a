"""One set of bf16 weights from base and adapter, published only if it still does what the adapter does.

Owns the merge and its check. On held-out prompts in the policy format, the adapter changes the log-probability of each
token of its own text by some amount against its base; the merged model, read back from disk, must change it by nearly
the same amount against the plain base. So what quantisation does to both sides cancels (a 4-bit base may be far from
its original), and a merge that lost the adapter cannot pass. Imports torch inside functions.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from cai.commands.probe import free
from cai.engine.foreign import HfModel
from cai.engine.greedy import NEUTRAL
from cai.engine.model import Model
from cai.errors import QUALITY, CaiError

NEW_TOKENS = 24
MOST_LOST = 0.5  # of the adapter's mean change, that the merge may miss it by: "well below" what losing it all gives
SMALL = 2e9  # parameters up to which the merge and its check are computed in float32


@dataclass(frozen=True)
class Probe:
    """The adapter's greedy text after a prompt, and the log-probs of its tokens with the adapter and without it."""

    prompt_ids: tuple[int, ...]
    new_ids: tuple[int, ...]
    adapter: tuple[float, ...]
    base: tuple[float, ...]


@dataclass(frozen=True)
class BaseSource:
    """Where the unquantised base lies: a hub id with its commit ("" for main), or a folder."""

    name: str
    revision: str = ""


def merge(before: Sequence[Probe], source: BaseSource, adapter: Path, target: Path, say: Callable[[str], None]) -> Path:
    """Write merged bf16 weights to `target`. Error: CaiError (exit 6), and no folder, if they are not the adapter's."""
    from cai.models.libraries import quiet

    with quiet():
        plain = _write(source, adapter, target, before)
        merged, alike = _of_folder(target, before)
    lost, effect = compare(before, plain, merged)
    total = sum(len(probe.new_ids) for probe in before)
    say(
        f"merged: misses the adapter's change of the text by {lost:.4f} of {effect:.4f} nats a token; "
        f"would draw {alike} of {total} tokens the same"
    )
    check(lost, effect, target)
    return target


def check(lost: float, effect: float, target: Path) -> None:
    """Refuse (and remove) a merge that is not well nearer to the adapter than the base is; NaN is not."""
    if not lost <= MOST_LOST * effect or not effect > 0.0:
        shutil.rmtree(target, ignore_errors=True)
        raise CaiError(
            f"{target}: the merged model is not the adapter's: it misses its change of the text by {lost:.4f} "
            f"of {effect:.4f} nats a token (at most {MOST_LOST:.0%} of it). Use the adapter on its base instead.",
            QUALITY,
        )


def compare(
    before: Sequence[Probe], plain: Sequence[Sequence[float]], merged: Sequence[Sequence[float]]
) -> tuple[float, float]:
    """(mean |change by the merge - change by the adapter|, mean |change by the adapter|), nats a token."""
    lost, effect = [], []
    for probe, base, whole in zip(before, plain, merged, strict=True):
        for tuned, untuned, there, here in zip(probe.adapter, probe.base, whole, base, strict=True):
            effect.append(abs(tuned - untuned))
            lost.append(abs((there - here) - (tuned - untuned)))
    return sum(lost) / max(len(lost), 1), sum(effect) / max(len(effect), 1)


def measure(model: Model, prompts: Sequence[tuple[int, ...]]) -> list[Probe]:
    """Probes of the loaded model, its adapter on and off."""
    probes = []
    for prompt_ids in prompts:
        with model.adapter(True):
            new_ids = greedy(model.hf, prompt_ids)
            tuned, _ = forced(model.hf, prompt_ids, new_ids)
        with model.adapter(False):
            untuned, _ = forced(model.hf, prompt_ids, new_ids)
        probes.append(Probe(prompt_ids, new_ids, tuned, untuned))
    return probes


def _write(source: BaseSource, adapter: Path, target: Path, before: Sequence[Probe]) -> list[tuple[float, ...]]:
    """Merge and save; the plain base's log-probs of the probes, seen on the way."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from cai.models.loading import complete_weights

    more = {"revision": source.revision} if source.revision else {}
    options: dict[str, Any] = {"trust_remote_code": False, "use_safetensors": True} | more
    with complete_weights():
        base: HfModel = AutoModelForCausalLM.from_pretrained(source.name, dtype=torch.bfloat16, **options)
    base = _placed(base)
    plain = [forced(base, probe.prompt_ids, probe.new_ids)[0] for probe in before]
    merged = PeftModel.from_pretrained(cast(torch.nn.Module, base), str(adapter)).merge_and_unload()
    merged = merged.to(torch.bfloat16)
    _mend_generation(merged)
    merged.save_pretrained(str(target))
    del base, merged
    free()
    return plain


def _placed(hf: HfModel) -> HfModel:
    """On the GPU where there is one; a small one in float32, so that rounding is not taken for a loss."""
    import torch

    hf = hf.float() if hf.num_parameters() <= SMALL else hf
    return hf.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _mend_generation(hf: HfModel) -> None:
    """A base's own invalid settings (sampling numbers without sampling: Llama 2's, Vicuna's) stop no merge."""
    from transformers import GenerationConfig

    config = hf.generation_config
    if config is None:
        return
    try:
        config.validate(strict=True)
    except ValueError:
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        hf.generation_config = GenerationConfig(**{name: getattr(config, name, None) for name in ids})


def plain_name(name: str) -> str:
    """The unquantised original of a pre-quantised twin on the hub."""
    for tail in ("-unsloth-bnb-4bit", "-bnb-4bit"):
        name = name.removesuffix(tail)
    return name


def _of_folder(folder: Path, before: Sequence[Probe]) -> tuple[list[tuple[float, ...]], int]:
    """The written model's log-probs of the probes, and how many of their tokens it would draw."""
    import torch
    from transformers import AutoModelForCausalLM

    hf: HfModel = _placed(AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.bfloat16))
    found = [forced(hf, probe.prompt_ids, probe.new_ids) for probe in before]
    return [logps for logps, _ in found], sum(alike for _, alike in found)


def greedy(hf: HfModel, prompt_ids: tuple[int, ...]) -> tuple[int, ...]:
    import torch
    from transformers import GenerationConfig

    from cai.engine.generate import causal_lm

    row = torch.tensor([prompt_ids], device=hf.device)
    never = causal_lm(hf).config.vocab_size  # no end token: a fixed number of tokens
    config = GenerationConfig(**NEUTRAL, max_new_tokens=NEW_TOKENS, eos_token_id=never, pad_token_id=0)
    with torch.no_grad():
        made = hf.generate(input_ids=row, attention_mask=torch.ones_like(row), generation_config=config)
    return tuple(made[0, len(prompt_ids) :].tolist())


def forced(hf: HfModel, prompt_ids: tuple[int, ...], new_ids: tuple[int, ...]) -> tuple[tuple[float, ...], int]:
    """Log-probs of another model's tokens, and how many of them this one would have drawn there too."""
    import torch

    start = len(prompt_ids) - 1
    with torch.no_grad():
        rows = torch.tensor([[*prompt_ids, *new_ids]], device=hf.device)
        logps_TV = hf(input_ids=rows).logits[0, start:-1].float().log_softmax(-1)
    logps = tuple(float(logps_TV[i, token]) for i, token in enumerate(new_ids))
    return logps, sum(int(logps_TV[i].argmax()) == token for i, token in enumerate(new_ids))
