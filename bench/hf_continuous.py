"""HF's continuous batching (`init_continuous_batching`) as a backend of bench/generate.py.

Lengths are forced like on the other backends: an end token that is never drawn and each request's own limit. It draws
with its own random numbers, so only numbers of tokens are compared. Source: transformers, continuous_batching.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cai.engine import Completion, EngineStats, Request


class ContinuousEngine:
    """`submit` queues; `completions` feeds the manager's thread and yields as requests finish."""

    name = "hf-continuous"

    def __init__(self, model: Any) -> None:
        self.model, self.stats = model, EngineStats()
        self.queue: list[Request] = []

    def submit(self, request: Request) -> None:
        self.queue.append(request)

    def completions(self) -> Iterator[Completion]:
        from transformers import GenerationConfig
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        requests, self.queue = {str(r.id): r for r in self.queue}, []
        longest = max(r.sampling.max_new_tokens for r in requests.values())
        config = GenerationConfig(do_sample=True, temperature=0.7, max_new_tokens=longest, eos_token_id=-1)
        options = ContinuousBatchingConfig(max_memory_percent=0.6)
        manager = self.model.init_continuous_batching(generation_config=config, continuous_batching_config=options)
        manager.start()
        try:
            for name, request in requests.items():
                new = request.sampling.max_new_tokens
                manager.add_request(list(request.token_ids), request_id=name, max_new_tokens=new)
            left = set(requests)
            while left:
                result = manager.get_result(timeout=1.0)
                if result is None:
                    if not manager.is_running():
                        raise RuntimeError(f"the manager's thread ended with {len(left)} requests left")
                    continue
                if result.error:
                    raise RuntimeError(result.error)
                if result.is_finished():
                    left.discard(result.request_id)
                    yield Completion(int(result.request_id), tuple(result.generated_tokens), "", "length")
        finally:
            manager.stop(block=True, timeout=30)
        self.stats.prompt_tokens_computed += sum(len(r.token_ids) for r in requests.values())  # it does not say

    def close(self) -> None:
        self.queue.clear()
