"""One set of bf16 weights from base and adapter, published only if it still says what the adapter says.

Owns the merge and its check: on fixed probe prompts, the merged model, read back from disk, must give nearly the
adapter's log-probabilities and mostly its greedy text. The adapter is measured on the weights it was trained on (4-bit
on a GPU), the merge is made in bf16: their difference is what the check bounds. Imports torch inside functions.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cai.errors import QUALITY, CaiError
from cai.report.snapshot import Story

PROBES = (
    "How do I keep basil alive on a windowsill?",
    "Write two sentences about the sea.",
    "What is seven times eight?",
    "How can I apologise to a friend I shouted at?",
)
NEW_TOKENS = 24
MAX_GAP = 0.10  # mean |difference| of the log-probability of a token of the adapter's own text, nats
MIN_SAME = 0.5  # share of greedy tokens before the first difference, mean over the probes


@dataclass(frozen=True)
class Probe:
    """Greedy continuation of one prompt and its tokens' log-probabilities."""

    prompt_ids: tuple[int, ...]
    new_ids: tuple[int, ...]
    logps: tuple[float, ...]


def merge(story: Story, adapter: Path, target: Path, say: Callable[[str], None]) -> Path:
    """Write merged bf16 weights to `target`. Error: CaiError (exit 6), and no folder, if they are not the adapter's."""
    from cai.models.policy import quiet

    before, name = _of_adapter(story, adapter)
    with quiet():
        _write(name, adapter, target)
        after = _of_folder(target, before)
    gap, same = compare(before, after)
    say(f"merged against adapter: mean gap {gap:.4f} nats a token, greedy text the same for {same:.0%}")
    check(gap, same, target)
    return target


def check(gap: float, same: float, target: Path) -> None:
    """Refuse (and remove) a merge beyond the tolerance; NaN is beyond."""
    if not (gap <= MAX_GAP and same >= MIN_SAME):
        shutil.rmtree(target, ignore_errors=True)
        raise CaiError(
            f"{target}: the merged model is not the adapter's: mean gap {gap:.3f} nats a token (at most {MAX_GAP}), "
            f"greedy text the same for {same:.0%} (at least {MIN_SAME:.0%}). Use the adapter on its base instead.",
            QUALITY,
        )


def compare(before: Sequence[Probe], after: Sequence[Probe]) -> tuple[float, float]:
    """(mean |log-prob difference| on the first's text, mean share of the greedy text before the first difference)."""
    gaps, shares = [], []
    for one, two in zip(before, after, strict=True):
        gaps += [abs(a - b) for a, b in zip(one.logps, two.logps, strict=True)]
        alike = 0
        for a, b in zip(one.new_ids, two.new_ids, strict=False):
            if a != b:
                break
            alike += 1
        shares.append(alike / max(len(one.new_ids), 1))
    return sum(gaps) / max(len(gaps), 1), sum(shares) / max(len(shares), 1)


def _of_adapter(story: Story, adapter: Path) -> tuple[list[Probe], str]:
    """Probes of the model as the run loads it, adapter on; and where its base was loaded from."""
    from cai.models.policy import load

    model: Any = load(story.recipe.model, story.backend)  # type: ignore[arg-type]
    name = str(model.hf.config._name_or_path)
    model.load_adapter(adapter, story.recipe.lora)
    model.mode("generate")
    probes = [_probe(model.hf, tuple(model.tokenizer.encode(text)), None) for text in PROBES]
    del model
    _free()
    return probes, name


def _write(name: str, adapter: Path, target: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base: Any = AutoModelForCausalLM.from_pretrained(_plain(name), dtype=torch.bfloat16)
    whole = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    whole.save_pretrained(str(target))
    AutoTokenizer.from_pretrained(_plain(name)).save_pretrained(str(target))
    del base, whole
    _free()


def _plain(name: str) -> str:
    """The unquantised original of a pre-quantised twin on the hub."""
    for tail in ("-unsloth-bnb-4bit", "-bnb-4bit"):
        name = name.removesuffix(tail)
    return name


def _of_folder(folder: Path, before: Sequence[Probe]) -> list[Probe]:
    import torch
    from transformers import AutoModelForCausalLM

    where = "cuda" if torch.cuda.is_available() else "cpu"
    hf: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.bfloat16)
    hf = hf.to(where).eval()
    return [_probe(hf, probe.prompt_ids, probe.new_ids) for probe in before]


def _probe(hf: Any, prompt_ids: tuple[int, ...], forced: tuple[int, ...] | None) -> Probe:
    """Greedy tokens of `hf`; log-probs of `forced` (another model's tokens) if given, else of its own."""
    import torch

    ids, new = list(prompt_ids), []
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            logits_V = hf(input_ids=torch.tensor([ids], device=hf.device)).logits[0, -1]
            new.append(int(logits_V.argmax()))
            ids.append(new[-1])
        scored = list(forced if forced is not None else new)
        rows = torch.tensor([[*prompt_ids, *scored]], device=hf.device)
        logps_TV = hf(input_ids=rows).logits[0].float().log_softmax(-1)
    start = len(prompt_ids) - 1
    logps = tuple(float(logps_TV[start + i, token]) for i, token in enumerate(scored))
    return Probe(prompt_ids, tuple(new), logps)


def _free() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
