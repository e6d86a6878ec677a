"""vLLM as a backend of bench/generate.py, where it is installed (0.25 wants torch 2.11 and reads bitsandbytes weights).

One vLLM engine in a process of its own: it loads its own weights. `vllm` reads the same NF4 checkpoint as the other
backends, `vllm-bf16` the folder of --bf16-model (`bench/make_model.py 32b FOLDER --quantization bf16`); where it holds
no weights, only a config.json, vLLM draws random ones. Prefixes are cached, lengths forced, text is not made. It draws
with its own random numbers, so only numbers of tokens are compared; requests get no seed of their own, which vLLM's
older model runner pays for row by row.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cai.engine import Completion, EngineStats, Request


class VllmEngine:
    """`submit` queues; `completions` hands all to vLLM's own scheduler and yields when the last one is done."""

    name = "vllm"

    def __init__(self, folder: str, memory_share: float) -> None:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # its memory is then this process's
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")  # of top-k and top-p only, which no request here uses
        try:
            from vllm import LLM
        except ImportError:
            raise RuntimeError("vllm is not installed") from None
        self.stats, self.queue = EngineStats(), []
        self.llm: Any = LLM(
            model=folder,
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=4096,
            enable_prefix_caching=True,
            gpu_memory_utilization=memory_share,
            load_format="auto" if list(Path(folder).glob("*.safetensors")) else "dummy",
            seed=0,
        )

    def submit(self, request: Request) -> None:
        self.queue.append(request)

    def completions(self) -> Iterator[Completion]:
        from vllm import SamplingParams

        requests, self.queue = self.queue, []
        sampling = [
            SamplingParams(
                temperature=request.sampling.temperature,
                max_tokens=request.sampling.max_new_tokens,
                ignore_eos=True,
                detokenize=False,
            )
            for request in requests
        ]
        prompts = [{"prompt_token_ids": list(request.token_ids)} for request in requests]
        results = self.llm.generate(prompts, sampling, use_tqdm=False)
        for request, result in zip(requests, results, strict=True):
            self.stats.prompt_tokens_computed += len(request.token_ids) - (result.num_cached_tokens or 0)
            yield Completion(request.id, tuple(result.outputs[0].token_ids), "", "length")

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()  # else the next engine of this process finds no memory
        self.llm = None
