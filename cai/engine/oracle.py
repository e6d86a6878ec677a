"""The oracle: HF `generate`, one row at a time. Any speed; the other backends are compared with it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

from cai.engine import Completion, EngineStats, Request, Rules, Score, ScoreRequest, generate, never
from cai.engine.foreign import HfModel
from cai.engine.stopping import Pieces, TokenDecoder


class ReferenceEngine:
    """Batch 1, no padding, in the order of submission."""

    name = "reference"
    rules = Rules()
    streams = False

    def __init__(self, hf_model: HfModel, tokenizer: TokenDecoder, *, batch_size: int = 1, device: str = "cpu") -> None:
        self.model, self.pieces, self.device = hf_model, Pieces(tokenizer), device
        self.queue: deque[Request] = deque()
        self.stats = EngineStats(batch_size=1)

    def submit(self, request: Request) -> None:
        self.queue.append(request)

    def completions(self, stopped: Callable[[], bool] = never) -> Iterator[Completion]:
        while self.queue and not stopped():
            request = self.queue.popleft()
            done, steps = generate.generate_slice(self.model, self.pieces, [request], self.device, stopped, self.rules)
            self.stats.decode_steps += steps
            self.stats.prompt_tokens_computed += len(request.token_ids)
            yield from done
        self.queue.clear()

    def score(self, requests: Sequence[ScoreRequest], stopped: Callable[[], bool] = never) -> Iterator[Score]:
        for request in requests:
            if stopped():
                return
            self.stats.prompt_tokens_computed += len(request.context_ids) + len(request.continuation_ids)
            yield from generate.score_batch(self.model, [request], self.device)

    def close(self) -> None:
        self.queue.clear()
