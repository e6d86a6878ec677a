"""Settings under which `transformers.generate` is plain greedy decoding, written out. Pure data, no import.

What a GenerationConfig leaves out, `generate` takes from the base's own generation_config.json (transformers 5.17,
`_prepare_generation_config`), which for chat models may hold a repetition_penalty (Qwen2.5-Coder-32B-Instruct: 1.05):
greedy draws are then other texts than the model's (tests/engine/test_greedy_settings.py).
"""

from __future__ import annotations

NEUTRAL: dict[str, bool | int | float] = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
}
