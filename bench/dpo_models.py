"""What bench/dpo.py trains: models made on the card, or a tiny one for a dry run, and made pairs."""

from __future__ import annotations

import random
from typing import Any

SEED = 11


def full_layers(name: str) -> int:
    """The layers of the shape that a made model is of; what is loaded is whole."""
    from families import SHAPES

    if not name.startswith("made:"):
        return 0
    return int(SHAPES[name.removeprefix("made:").partition("/")[0]][1]["num_hidden_layers"])


def made_model(text: str) -> Any:
    """Random weights behind the pipeline's own model, as plain transformers and PEFT have them. Rows are token ids."""
    import torch
    from families import made
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from cai.engine.tokenizers import HFTokenizer
    from cai.models.policy import LoadedModel

    shape, _, layers = text.removeprefix("made:").partition("/")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hf = made(shape, device, int(layers or 0))
    words = Tokenizer(models.WordLevel({"<end>": 0}, unk_token="<end>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")
    own = HFTokenizer(tokenizer, eos_ids=(0,))
    return LoadedModel(hf, tokenizer, own, "base", "cpu", text, torch.device(device), 4096)


def cpu_model(name: str, model: Any) -> Any:
    """Dry runs: the tiny checkpoint in place of the embedded weights."""
    from transformers import AutoModelForCausalLM

    model.hf = AutoModelForCausalLM.from_pretrained(name)
    return model


def cap(gigabytes: float) -> None:
    """At most so many 10^9 bytes of the card for this process; 0: all of it."""
    import torch

    if gigabytes and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / total))


def make_rows(count: int, tokens: int, prompt: int) -> list[Any]:
    """Pairs of random ids; `tokens` a pair counts the prompt twice, as a padded trainer computes it."""
    from cai.training.token_rows import PairRow

    draw, rows = random.Random(SEED), []
    room = tokens - 2 * prompt
    for item in range(count):
        chosen = room // 2 + draw.randint(-room // 8, room // 8)
        parts = [[draw.randrange(1000, 40000) for _ in range(n)] for n in (prompt, chosen, room - chosen)]
        rows.append(PairRow(item, *(tuple(part) for part in parts)))
    return rows
