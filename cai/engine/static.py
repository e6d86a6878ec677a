"""Static batches: length-sorted fixed slices through HF's or Unsloth's `generate`. Always works; rows wait for the
slowest of their slice.

Owns slicing, the out-of-memory ladder (halve the batch outside the `except` block, since the traceback pins tensors)
and the scoring batches. Invariant: a slice that ran out of memory is drawn again whole, so each request completes once.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence

import torch

from cai.engine import Completion, EngineStats, Request, Rules, Score, ScoreRequest, generate, never
from cai.engine.foreign import HfConfig, HfModel
from cai.engine.memory import free_gpu_bytes
from cai.engine.stopping import Pieces, TokenDecoder
from cai.errors import RESUMABLE, CaiError

SCORE_TOKENS_CPU, SCORE_TOKENS_GPU = 4096, 16384  # padded tokens in one scoring batch
CPU_BATCH, GPU_BATCH_LIMIT, TYPICAL_TOKENS = 16, 256, 1800


class StaticEngine:
    """Slices of `batch_size` (0 = from free memory), shortest prompts first."""

    name = "static"
    rules = Rules()
    streams = False

    def __init__(self, hf_model: HfModel, tokenizer: TokenDecoder, *, batch_size: int = 0, device: str = "cpu") -> None:
        self.model, self.pieces, self.device = hf_model, Pieces(tokenizer), device
        self.queue: list[Request] = []
        self.stats = EngineStats(batch_size=batch_size or default_batch_size(hf_model, device))

    def submit(self, request: Request) -> None:
        self.queue.append(request)

    def completions(self, stopped: Callable[[], bool] = never) -> Iterator[Completion]:
        self.queue.sort(key=lambda request: len(request.token_ids))  # stable: equal lengths keep their order
        while self.queue and not stopped():
            requests = self.queue[: self.stats.batch_size]
            done = self._slice(requests, stopped)
            if done is None:
                self._halve("generation")
                continue
            del self.queue[: len(requests)]
            yield from done
        self.queue.clear()

    def score(self, requests: Sequence[ScoreRequest], stopped: Callable[[], bool] = never) -> Iterator[Score]:
        waiting = sorted(requests, key=lambda r: len(r.context_ids) + len(r.continuation_ids))
        budget = SCORE_TOKENS_CPU if self.device == "cpu" else SCORE_TOKENS_GPU
        while waiting and not stopped():
            count = batch_within(waiting, budget)
            scores = self._scored(waiting[:count])
            if scores is None:
                if budget == 1:
                    raise CaiError("engine: a single row does not fit in memory while scoring.", RESUMABLE)
                budget = max(1, budget // 2)
                self._note("scoring", budget)
                continue
            del waiting[:count]
            yield from scores

    def close(self) -> None:
        self.queue.clear()
        gc.collect()
        if self.device != "cpu":
            torch.cuda.empty_cache()

    def _slice(self, requests: Sequence[Request], stopped: Callable[[], bool]) -> list[Completion] | None:
        """None where memory ran out. Nothing of the failed attempt outlives this frame."""
        drawn = generate.unless_memory_runs_out(
            lambda: generate.generate_slice(self.model, self.pieces, requests, self.device, stopped, self.rules)
        )
        if drawn is None:
            return None
        done, steps = drawn
        self.stats.decode_steps += steps
        self.stats.prompt_tokens_computed += sum(len(request.token_ids) for request in requests)
        return done

    def _scored(self, requests: Sequence[ScoreRequest]) -> list[Score] | None:
        scores = generate.unless_memory_runs_out(lambda: generate.score_batch(self.model, requests, self.device))
        if scores is None:
            return None
        self.stats.prompt_tokens_computed += sum(len(r.context_ids) + len(r.continuation_ids) for r in requests)
        return scores

    def _halve(self, phase: str) -> None:
        if self.stats.batch_size == 1:
            raise CaiError(f"engine: out of memory in {phase} at batch size 1. Use a larger card.", RESUMABLE)
        self.stats.batch_size = max(1, self.stats.batch_size // 2)
        self._note(phase, self.stats.batch_size)

    def _note(self, phase: str, size: int) -> None:
        self.stats.out_of_memory += 1
        self.stats.extra.setdefault("ladder", []).append({"phase": phase, "size": size})
        gc.collect()
        if self.device != "cpu":
            torch.cuda.empty_cache()


def batch_within(requests: Sequence[ScoreRequest], budget: int) -> int:
    """How many of the first requests (sorted by length) fit into `budget` padded tokens; at least one.

    Requests that feed the decoder the same tokens are one row of the batch.
    """
    count, rows = 0, set[tuple[int, ...]]()
    for request in requests:
        row = generate.input_ids_of(request)
        if count and row not in rows and len(row) * (len(rows) + 1) > budget:
            break
        rows.add(row)
        count += 1
    return count


def kv_bytes_per_token(config: HfConfig, bytes_per_number: int = 2) -> int:
    """Bytes of keys and values that one token leaves in all layers."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * bytes_per_number


def default_batch_size(model: HfModel, device: str) -> int:
    """16 on a CPU; on a GPU what fits into 80% of free memory, twice the cache (it is copied as it grows)."""
    if device == "cpu":
        return CPU_BATCH
    rows = int(0.8 * free_gpu_bytes()) // (2 * TYPICAL_TOKENS * kv_bytes_per_token(generate.causal_lm(model).config))
    return max(1, min(GPU_BATCH_LIMIT, rows))
