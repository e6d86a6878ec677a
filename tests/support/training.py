"""A tiny random Llama behind the surface of `cai.models.policy.LoadedModel`: training tests in seconds, no download.

Two layers, width 32, byte vocabulary, fp32, stock transformers and PEFT (no unsloth): the arithmetic of training is the
same code path as with the embedded model.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace

import torch

from cai.engine.tokenizers import ByteTokenizer
from cai.recipe.settings import DpoSection, LoraSection

LORA = LoraSection(rank=4, alpha=8)


class FakePrompt:
    """The policy prompt's surface: `User: ...\\n\\nAssistant:` as bytes."""

    def render(self, fields, *, format, tokenizer, shift=0):
        text = f"User: {fields['instruction']}\n\nAssistant:"
        return SimpleNamespace(token_ids=tuple(tokenizer.encode(text)), text=text)


def hf_tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocab = {f"b{i}": i for i in range(256)} | {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="b0"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


SCALED = {
    "llama3": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
}  # fmt: skip


def tiny_config(kind="llama"):
    """`kind`: llama, qwen2, qwen3, mistral, or Llama with one of the scaled rotary embeddings."""
    from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

    shape = dict(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=kind == "llama",
    )  # fmt: skip
    if kind in SCALED:
        return LlamaConfig(**shape, rope_parameters=SCALED[kind])
    if kind == "mistral":
        return MistralConfig(**shape, sliding_window=None)
    if kind == "qwen3":
        return Qwen3Config(**shape, head_dim=16)
    return LlamaConfig(**shape) if kind == "llama" else Qwen2Config(**shape)


class TinyModel:
    """LoadedModel's surface over random weights."""

    backend = "embedded"
    format, embedded, name = "base", True, "example/tiny-random"

    def __init__(self, seed=0, kind="llama", dtype=torch.float32):
        from transformers import AutoModelForCausalLM

        torch.manual_seed(seed)
        self.hf = AutoModelForCausalLM.from_config(tiny_config(kind), dtype=dtype)
        with torch.no_grad():
            for parameter in self.hf.parameters():
                if parameter.dim() > 1:
                    parameter.copy_(torch.randn(parameter.shape) * 0.3)
            if kind == "qwen3":  # norms of ones would hide a norm that is left out or stands in another's place
                for name, parameter in self.hf.named_parameters():
                    if "norm" in name:
                        parameter.copy_(1.0 + 0.5 * torch.rand(parameter.shape))
        self.hf.eval()
        self.tokenizer, self.hf_tokenizer = ByteTokenizer(), hf_tokenizer()
        self.facts = {"revision": "main", "quantization": "fp32"}
        self.device = torch.device("cpu")

    lora = False

    def mode(self, which):
        self.hf.train(which == "train")

    def to_lora(self, lora, seed=0):
        from peft import LoraConfig, get_peft_model

        if self.lora:
            self.hf = self.hf.unload()
            vars(self.hf).pop("peft_config", None)
        self.lora = True
        self.hf = get_peft_model(
            self.hf,
            LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules=list(lora.target_modules),
                       task_type="CAUSAL_LM"),
        )  # fmt: skip

    @contextlib.contextmanager
    def adapter(self, on):
        if on:
            yield
        else:
            with self.hf.disable_adapter():
                yield


def awake(model, spread=0.1):
    """The model with an adapter that does something: B is not zero."""
    from cai.training import adapter

    adapter.reset(model.hf, 3)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapter.lora_parameters(model.hf):
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return model


def make_pairs(count, start=0):
    return [
        {
            "item": start + i,
            "prompt": f"Say something about number {i}.",
            "chosen": f"Number {i} is fine." + " Indeed." * (i % 3),
            "rejected": f"I hate {i}!" + " Boo." * (i % 4),
        }
        for i in range(count)
    ]


def dpo(**changes):
    values = dict(
        max_steps=4, batch_size=2, gradient_accumulation=2, learning_rate=5e-3, save_steps=2, warmup_ratio=0.0
    )
    return DpoSection(**(values | changes))


def run_train(folder: Path, *, model=None, pairs=None, config=None, seed=7, **callbacks):
    from cai.training.train import train

    model = model or TinyModel()
    return train(
        model, make_pairs(6) if pairs is None else pairs, make_pairs(2, 100), LORA, config or dpo(), folder / "train",
        prompt=FakePrompt(), seed=seed, **callbacks,
    )  # fmt: skip
