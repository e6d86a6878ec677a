"""Small random checkpoints of the common families, as folders that any loader takes. Needs torch and transformers."""

from __future__ import annotations

from pathlib import Path

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "max_position_embeddings": 4096}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
CONTROLS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>")
FAMILIES = ("llama", "qwen2", "qwen3", "smollm3", "gemma", "gemma3")


def byte_tokenizer(template: str = CHATML, eos: str = "<|im_end|>"):
    """Bytes as tokens: any text goes in and comes back."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(list(CONTROLS))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token=eos, pad_token="<|endoftext|>")
    if template:
        tokenizer.chat_template = template
    return tokenizer


def config_of(family: str, vocab: int):
    import transformers as t

    more = {"vocab_size": vocab, "eos_token_id": 256, "bos_token_id": 256, "pad_token_id": 256}
    made = {
        "llama": lambda: t.LlamaConfig(**SHAPE, **more),
        "qwen2": lambda: t.Qwen2Config(**SHAPE, **more, tie_word_embeddings=True),
        "qwen3": lambda: t.Qwen3Config(**SHAPE, **more, head_dim=8),
        "smollm3": lambda: t.SmolLM3Config(**SHAPE, **more),
        "gemma": lambda: t.GemmaConfig(**SHAPE, **more, head_dim=8),
        "gemma2": lambda: t.Gemma2Config(**SHAPE, **more, head_dim=8, sliding_window=512),
        "gemma3": lambda: t.Gemma3TextConfig(**SHAPE, **more, head_dim=8, sliding_window=512),
    }
    return made[family]()


def save_tiny(folder: Path, family: str = "llama", *, template: str = CHATML, seed: int = 3) -> Path:
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = byte_tokenizer(template)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(family, len(tokenizer)), dtype=torch.float32)
    with torch.no_grad():  # random embeddings alone are so flat that every greedy text is one token
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape) * 0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
