"""What `reference` and `static` share: one slice through HF (or Unsloth's) `generate`, one batch of scores.

Owns the padding, the Gumbel logits processor, the stop criterion and the chunked language-model head. Doesn't own
queues, slice sizes or recovery. Axes: B rows, T tokens, V vocabulary, H hidden size, C continuation tokens of a batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from cai.engine import Completion, EngineStats, Request, Rules, Score, ScoreRequest
from cai.engine.foreign import HfConfig, HfModel, HfModule
from cai.engine.greedy import NEUTRAL
from cai.engine.sampling import allowed, gumbel_noise, seed_tensor
from cai.engine.stopping import Pieces, Row
from cai.errors import RESUMABLE, CaiError

T = TypeVar("T")
HEAD_CHUNK_BYTES = 256 << 20  # fp32 logits that exist at one time while scoring


def causal_lm(model: HfModel) -> HfModel:
    """The `...ForCausalLM` inside a model that may be wrapped by PEFT."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on GPU or CPU."""
    cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or cpu


def unless_memory_runs_out(run: Callable[[], T]) -> T | None:
    """What `run` gives; None where memory ran out. Then nothing of it is left: a kept traceback would pin tensors."""
    try:
        return run()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
    return None


@contextmanager
def memory_named(doing: str) -> Iterator[None]:
    """Where memory runs out and nothing smaller can be tried: one line instead of a traceback."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        remedy = "Set engine.batch_size lower, or use a larger card."
        raise CaiError(f"engine: out of memory {doing}. {remedy}", RESUMABLE) from None


class GumbelScores(LogitsProcessor):
    """Adds temperature * noise, so that `generate`'s argmax is the engine's draw (`sampling.pick`)."""

    def __init__(self, requests: Sequence[Request], prompt_len: int, device: torch.device | str, rules: Rules) -> None:
        self.rules = rules
        self.temperatures_B = torch.tensor([r.sampling.temperature for r in requests], device=device)
        self.seeds_B = seed_tensor([r.seed for r in requests], device)
        self.prompt_len, self.drawn = prompt_len, any(r.sampling.temperature for r in requests)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        drawn_BT = input_ids[:, self.prompt_len :]
        positions_B = torch.full_like(self.seeds_B, drawn_BT.shape[1])
        scores = allowed(scores, self.rules, self.temperatures_B, drawn_BT, positions_B)
        if not self.drawn:
            return scores
        noise_BV = gumbel_noise(self.seeds_B, positions_B, scores.shape[1])
        return scores + noise_BV.mul_(self.temperatures_B[:, None])


class RowsDone(StoppingCriteria):
    """Feeds every row its new token and tells `generate` which rows are done; all are once the caller stops."""

    def __init__(self, rows: Sequence[Row], stopped: Callable[[], bool], stats: EngineStats) -> None:
        self.rows, self.stopped, self.steps, self.cancelled, self.stats = rows, stopped, 0, False, stats

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        self.steps += 1
        for row, token in zip(self.rows, input_ids[:, -1].tolist(), strict=True):
            if row.done is None:
                row.feed(token)
        # Before `stopped`, through which a progress line looks at it.
        self.stats.in_flight = sum(len(row.ids) for row in self.rows)
        self.cancelled = self.cancelled or self.stopped()
        done = [self.cancelled or row.done is not None for row in self.rows]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)


def left_padded(requests: Sequence[Request], device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask (B, T), padded with id 0 on the left."""
    width = max(len(request.token_ids) for request in requests)
    ids = [[0] * (width - len(r.token_ids)) + list(r.token_ids) for r in requests]
    mask = [[0] * (width - len(r.token_ids)) + [1] * len(r.token_ids) for r in requests]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def generate_slice(
    model: HfModel,
    pieces: Pieces,
    requests: Sequence[Request],
    device: torch.device | str,
    stopped: Callable[[], bool],
    rules: Rules,
    stats: EngineStats,
) -> tuple[list[Completion], int]:
    """Draw all rows of one slice; completions (only finished rows' once `stopped()`) and the number of steps."""
    ids_BT, mask_BT = left_padded(requests, device)
    rows = [Row(request, pieces) for request in requests]
    done = RowsDone(rows, stopped, stats)
    longest = max(request.sampling.max_new_tokens for request in requests)
    # An id that is never drawn: `generate` would fill a missing eos from the model's config, and ours are `rows.Row`'s.
    no_eos = causal_lm(model).config.get_text_config(decoder=True).vocab_size
    config = GenerationConfig(**NEUTRAL, max_new_tokens=longest, eos_token_id=no_eos, pad_token_id=0)
    with torch.no_grad():
        model.generate(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            generation_config=config,
            logits_processor=[GumbelScores(requests, ids_BT.shape[1], device, rules)],
            stopping_criteria=[done],
        )
    stats.in_flight = 0
    return [row.completion() for row in rows if row.done is not None], done.steps


def input_ids_of(request: ScoreRequest) -> tuple[int, ...]:
    """The tokens that the decoder reads to score a request: all but the last."""
    return (*request.context_ids, *request.continuation_ids[:-1])


def score_batch(model: HfModel, requests: Sequence[ScoreRequest], device: torch.device | str) -> list[Score]:
    """Log-probs of one batch's continuations: the decoder body once, the head at continuation positions in chunks."""
    lm = causal_lm(model)
    rows: dict[tuple[int, ...], int] = {}  # "Yes" and "No" after one question: the same row
    row_of = [rows.setdefault(input_ids_of(r), len(rows)) for r in requests]
    width = max(map(len, rows))
    ids_BT = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in rows], device=device)
    with torch.no_grad():
        # Padding is on the right, where a causal model never looks: no attention mask.
        hidden_BTH = lm.model(input_ids=ids_BT, use_cache=False)[0]
        places = [
            row * width + len(r.context_ids) - 1 + i
            for row, r in zip(row_of, requests, strict=True)
            for i in range(len(r.continuation_ids))
        ]
        targets = [token for r in requests for token in r.continuation_ids]
        hidden_CH = hidden_BTH.reshape(-1, hidden_BTH.shape[-1])[torch.tensor(places, device=device)]
        head, targets_C = lm.get_output_embeddings(), torch.tensor(targets, device=device)
        logps = head_logps(head, hidden_CH, targets_C, lm.config.get_text_config()).tolist()
    return list(split_scores(requests, logps))


def head_logps(
    head: HfModule, hidden_CH: torch.Tensor, targets_C: torch.Tensor, config: HfConfig | None = None
) -> torch.Tensor:
    """fp32 log-probs (C) of the targets; at most HEAD_CHUNK_BYTES of logits at a time.

    A head that an adapter wraps or that is quantised is called, for its weight alone is not what it computes.
    `config`: whose keys scale or cap the logits (Cohere, Granite, Gemma 2); None where the caller refuses such models.
    """
    plain = type(head) is torch.nn.Linear and head.weight.is_floating_point()
    vocab = head.weight.shape[0]
    step = max(1, HEAD_CHUNK_BYTES // (4 * vocab))
    parts = []
    for start in range(0, len(targets_C), step):
        part_CH = hidden_CH[start : start + step]
        logits_CV = logits_fp32(part_CH, head.weight, head.bias) if plain else head(part_CH).float()
        logits_CV = scaled_and_capped(logits_CV, config)
        chosen_C = logits_CV.gather(1, targets_C[start : start + step, None])[:, 0]
        parts.append(chosen_C - logits_CV.logsumexp(-1))
    return torch.cat(parts)


def scaled_and_capped(logits: torch.Tensor, config: Any) -> torch.Tensor:
    """What a model does to its head's logits after the product, as its own forward does."""
    logits = logits * (getattr(config, "logit_scale", None) or 1.0)  # Cohere
    logits = logits / (getattr(config, "logits_scaling", None) or 1.0)  # Granite
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    return logits if cap is None else torch.tanh(logits / cap) * cap


def logits_fp32(hidden_NH: torch.Tensor, weight_VH: torch.Tensor, bias_V: torch.Tensor | None) -> torch.Tensor:
    """The head's logits in fp32 -> [N, V]; on a GPU the product's own accumulators.

    Rounded to bf16 on the way, logits of 16 to 32 are 0.125 apart: about 0.5 nats (sd) in the sum of 200 tokens.
    """
    if hidden_NH.is_cuda and hidden_NH.dtype != torch.float32 and mm_gives_fp32(hidden_NH.dtype):
        logits = torch.mm(hidden_NH, weight_VH.t(), out_dtype=torch.float32)
        return logits if bias_V is None else logits.add_(bias_V)
    return F.linear(hidden_NH, weight_VH, bias_V).float()


@functools.cache
def mm_gives_fp32(dtype: torch.dtype) -> bool:
    """Whether this torch and card multiply `dtype` into fp32, and rightly so; asked once a process."""
    try:
        a, b = (torch.arange(256, device="cuda").view(16, 16).remainder(n).to(dtype) for n in (7, 5))
        found = torch.mm(a, b.t(), out_dtype=torch.float32)
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return found.dtype == torch.float32 and bool(torch.equal(found, a.float() @ b.float().t()))


def split_scores(requests: Sequence[ScoreRequest], logps: Sequence[float]) -> Iterator[Score]:
    """Cut one flat list of log-probs into the requests' scores, in order."""
    at = 0
    for request in requests:
        end = at + len(request.continuation_ids)
        yield Score(request.id, tuple(logps[at:end]))
        at = end
