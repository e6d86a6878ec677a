"""The native engine: continuous batching over the loaded weights, one step ahead of the host.

Owns the loop (prefill what is admitted, else decode), the hand-over of drawn tokens one step late, the prefix and its
set-up, scoring, and all device memory of generation. Scheduling, attention and linears are modules beside it.
Invariants: a row's draws depend on its seed and positions only; `close` frees everything; nothing is yielded twice.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from cai.engine import Completion, EngineStats, Request, Rules, Score, ScoreRequest, generate, never
from cai.engine.foreign import HfModel
from cai.engine.native import attention, prefixes, scoring
from cai.engine.native.adapters import AttachedAdapter, factor_bytes, tuned_module
from cai.engine.native.batches import Flight, Packed, Prompt, packed_step
from cai.engine.native.cache import GPU_BLOCK_TOKENS, KVCache, KVShape, gpu_blocks, gpu_prefill_tokens
from cai.engine.native.decoder import Decoder
from cai.engine.native.families import text_parts
from cai.engine.native.nesting import NOWHERE, Nested, Part, Parts, parts_of
from cai.engine.native.scheduler import Running, Scheduler, prompt_tokens
from cai.engine.native.state import RowState
from cai.engine.sampling import allowed, pick, seed_tensor
from cai.engine.stopping import Pieces, Row
from cai.engine.stopping import TokenDecoder as TokenDecoder
from cai.errors import RESUMABLE, CaiError

if TYPE_CHECKING:
    from cai.engine.native.graphs import Graphs

MAX_LEN = 4096  # where neither model nor loader says
CPU_ROWS, GPU_ROWS = 16, 512
CPU_PREFILL_TOKENS = 1024
GPU_ROW_TOKENS = 1024  # own tokens a row is expected to need at most, for the size of the cache


class NativeEngine:
    """`batch_size` = rows that decode together (0 = 16 on a CPU, up to 512 on a GPU)."""

    name = "native"
    rules = Rules()
    streams = True

    def __init__(
        self,
        hf_model: HfModel,
        tokenizer: TokenDecoder,
        *,
        batch_size: int = 0,
        device: str = "cpu",
        linears: str = "auto",
        kv: str = "auto",
        max_len: int = 0,
    ) -> None:
        config, _ = text_parts(hf_model)
        known = getattr(hf_model, "max_seq_length", None) or MAX_LEN
        self.max_len = max_len or min(config.max_position_embeddings, known)
        self.gpu = torch.device(device).type == "cuda"
        self.ops: Any = attention
        if self.gpu:
            from cai.engine.native import kernels

            self.ops = kernels
        self.decoder = Decoder(hf_model, self.ops, self.max_len)
        self.device, self.pieces = self.decoder.device, Pieces(tokenizer)
        self.shape = KVShape(len(self.decoder.layers), self.decoder.kv_heads, self.decoder.dim, self.decoder.dtype)
        self.drawn = self.shape if kv == "auto" or not self.gpu else replace(self.shape, dtype=torch.int8)
        self.stats = EngineStats(batch_size=batch_size or (GPU_ROWS if self.gpu else CPU_ROWS))
        self.graphs: Graphs | None = None
        self.attached = AttachedAdapter(tuned_module(hf_model), self.decoder.dtype)
        self.beside = factor_bytes(hf_model, self.decoder.dtype)
        with generate.memory_named("when the engine was set up"):
            if self.gpu:
                from cai.engine.native import tuning

                self.ops.rms_norm(self.decoder.norm[None], self.decoder.norm, 1.0)  # no compiler: the error comes here
                smaller = self.drawn.bytes_per_token / self.shape.bytes_per_token
                later = self.beside + (prefixes.SAVED_TOKENS + self._exact_tokens()) * self.shape.bytes_per_token
                wanted = int(tuning.KV_BYTES_WANTED * smaller)
                self.stats.extra["linears"] = tuning.choose(self.decoder, linears, later, wanted)
            else:
                self.decoder.pack()
            self.groups = [group for layer in self.decoder.layers for group in layer.linears.groups]
            self.shared = self.groups[0].shared
            self._allocate()

    def _allocate(self) -> None:
        rows = self.stats.batch_size
        self.store = prefixes.new_store(self.shape, self.device, self.max_len)
        if self.gpu:
            if tokens := self._exact_tokens():
                self.exact = KVCache(self.shape, -(-tokens // GPU_BLOCK_TOKENS), GPU_BLOCK_TOKENS, self.device)
            blocks = gpu_blocks(self.drawn, self.device, max(rows * GPU_ROW_TOKENS, 2 * self.max_len), self.beside)
            self.cache = KVCache(self.drawn, blocks, GPU_BLOCK_TOKENS, self.device)
            prefill_tokens = gpu_prefill_tokens(self.device)
        else:  # the last slot is the scratch row of a prefix
            self.cache = KVCache(self.shape, rows + 1, self.max_len, self.device, by_slot=True)
            prefill_tokens = CPU_PREFILL_TOKENS
        if not self.drawn.eight_bits:
            self.exact = self.cache
        else:
            tokens = self.cache.blocks * self.cache.block_tokens
            self.stats.extra["kv"] = f"kv: 8 bits and a scale a head for rows that are drawn, {tokens:,} tokens"
        self.state = RowState(rows, self.cache.blocks_for(self.max_len) + 1, self.max_len, self.device)
        self.scheduler = Scheduler(self.cache, rows, prefill_tokens, self.rounds, several=self.gpu)
        self.dirty = False
        self.stats.extra["kv_tokens"] = self.cache.blocks * self.cache.block_tokens
        if self.gpu:
            from cai.engine.native.graphs import Graphs

            self.graphs = Graphs(self)

    def _exact_tokens(self) -> int:
        """What scores and prefixes have room for where rows are kept in 8 bits; else they share the rows' cache."""
        return max(2 * gpu_prefill_tokens(self.device), self.max_len) if self.drawn.eight_bits else 0

    @property
    def rounds(self) -> bool:
        """Whether a row's own tokens are computed otherwise than prefixes and scores are: in 8 bits."""
        return bool(self.shared.rounding) or self.drawn.eight_bits

    # -- requests in, completions out

    def submit(self, request: Request) -> None:
        self.require(len(request.token_ids) + request.sampling.max_new_tokens, f"request {request.id}")
        self.scheduler.add(Row(request, self.pieces), request.first)

    def require(self, tokens: int, what: str, cache: KVCache | None = None) -> None:
        """Refuse a row that is longer than the model's context or than all of the cache (of that which draws)."""
        cache = cache or self.cache
        if tokens > self.max_len:
            raise CaiError(f"engine: {what} needs {tokens} tokens, the model holds {self.max_len}.")
        if (room := cache.blocks * cache.block_tokens - 1) < tokens:
            raise CaiError(f"engine: {what} needs {tokens} tokens, memory has room for {room}. Use a larger card.")

    def completions(self, stopped: Callable[[], bool] = never) -> Iterator[Completion]:
        flight: Flight | None = None
        try:
            while not stopped():
                with torch.no_grad():
                    following = self._launch()
                landing, flight = (flight, following) if self.gpu else (following, None)
                if landing is not None:
                    yield from self._land(landing)
                if flight is None and self.scheduler.idle:
                    return
        finally:  # the caller stopped or walked away: nothing stays in flight
            if flight is not None:
                flight.tokens()
            if hasattr(self, "scheduler"):
                self.scheduler.clear()
                self.dirty = True
            self.stats.in_flight = 0

    def score(self, requests: Sequence[ScoreRequest], stopped: Callable[[], bool] = never) -> Iterator[Score]:
        yield from scoring.score(self, requests, stopped)

    def close(self) -> None:
        """Free caches, copies and graphs. The loaded modules stay as they were."""
        for group in getattr(self, "groups", ()):
            group.drop()
        if (graphs := getattr(self, "graphs", None)) is not None:
            graphs.clear()
        for name in "graphs cache exact store state scheduler decoder groups shared attached".split():
            self.__dict__.pop(name, None)
        gc.collect()
        if self.gpu:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    # -- one step

    def _launch(self) -> Flight | None:
        """Put the next step on the device: a prefill if rows are admitted, else a decode step if rows run."""
        scheduler = self.scheduler
        for running in [r for r in scheduler.active.values() if r.exhausted]:
            scheduler.release(running)  # its last draw is in flight: the slot is free already
            self.dirty = True
        if scheduler.idle:
            return None
        prefixes.follow_adapter(self)
        admitted = scheduler.admit(self.place, self.holds)  # prefixes are exact, so before the draws
        with self.shared.draws():
            return self._prefill_rows(admitted) if admitted else self._decode()

    def _prefill_rows(self, admitted: list[Running]) -> Flight | None:
        """None where memory ran out: the rows wait again, and prompts are computed in pieces half as long."""
        packed = [Prompt(prompt_tokens(r.row, r.part.length), r.blocks, parts_of(r.part)) for r in admitted]
        drawn = generate.unless_memory_runs_out(lambda: self._first_draws(admitted, packed))
        if drawn is None:
            if len(admitted) == 1:
                raise CaiError("engine: out of memory for a single prompt. Use a larger card.", RESUMABLE)
            self._put_back(admitted)
            self.prefill_less(sum(r.tokens for r in admitted))
            return None
        for running in admitted:
            running.launched = len(running.row.ids) + 1
        self.dirty = True
        return Flight.of(admitted, list(range(len(admitted))), drawn)

    def _first_draws(self, admitted: list[Running], packed: Packed) -> torch.Tensor:
        ends = [end - 1 for end in itertools.accumulate(len(prompt.ids) for prompt in packed)]
        hidden_BH = self.prefill(packed, torch.tensor(ends, device=self.device), self.cache)
        temperatures = torch.tensor([r.row.request.sampling.temperature for r in admitted], device=self.device)
        seeds = seed_tensor([r.row.request.seed for r in admitted], self.device)
        draws = torch.tensor([len(r.row.ids) for r in admitted], device=self.device)
        slots = torch.tensor([r.slot for r in admitted], device=self.device)
        if self.rules.no_repeat_ngram:
            self.state.recall(admitted)
        drawn = self._pick(hidden_BH, temperatures, seeds, draws, self.state.history[slots])
        self.state.ids[slots] = drawn
        self.state.history[slots, draws] = drawn.to(torch.int32)
        return drawn

    def prefill_less(self, tokens: int) -> None:
        """Memory ran out over `tokens` tokens: half as many at a time from now on."""
        self.scheduler.prefill_tokens = self.stats.extra["prefill_tokens"] = max(1, tokens // 2)
        self.memory_ran_out()

    def _decode_fewer(self, rows: list[Running]) -> None:
        """Memory ran out in a decode step: the later half of the rows wait again; they draw the same text then."""
        if len(rows) == 1:
            raise CaiError("engine: out of memory while a single row is drawn. Use a larger card.", RESUMABLE)
        keep = len(rows) // 2
        self._put_back(rows[keep:])
        self.scheduler.max_rows = self.stats.extra["decode_rows"] = keep
        self.memory_ran_out()

    def _put_back(self, rows: list[Running]) -> None:
        for running in reversed(rows):
            self.scheduler.release(running)
            self.scheduler.add(running.row, first=True)
        self.dirty = True

    def memory_ran_out(self) -> None:
        """Free what can be made again: the graphs."""
        self.stats.out_of_memory += 1
        if self.graphs is not None:
            self.graphs.clear()
        gc.collect()
        if self.gpu:
            torch.cuda.empty_cache()

    def _decode(self) -> Flight | None:
        scheduler = self.scheduler
        changed, preempted = scheduler.grow()
        for running in preempted:
            scheduler.add(running.row, first=True)
        if not scheduler.active:
            return None
        self._compact()
        if self.dirty or changed or preempted:
            self.state.write(scheduler.active.values())
            self.dirty = False
        rows = [scheduler.active[slot] for slot in sorted(scheduler.active)]
        span, longest = rows[-1].slot + 1, 1 + max(r.tokens for r in rows)
        graphs, parts = self.graphs, () if self.graphs else tuple(parts_of(r.part) for r in rows)
        step = (lambda: graphs.run(span)) if graphs else (lambda: self.decode_on_device(span, longest, parts))
        drawn = generate.unless_memory_runs_out(step)
        if drawn is None:
            self._decode_fewer(rows)
            return None
        flight = Flight.of(rows, [r.slot for r in rows], drawn)
        for running in rows:
            running.tokens += 1
            running.launched += 1
        self.stats.decode_steps += 1
        return flight

    def decode_on_device(self, rows: int, longest: int = 0, parts: tuple[Parts, ...] = ()) -> torch.Tensor:
        """The device's part of a decode step: no host reads, so that it can be captured."""
        step = self.state.decode_step(rows, self.cache.block_tokens, self.store, longest, parts)
        hidden_BH = self.decoder.forward(self.state.ids[:rows], step, self.cache)
        drawn = self._pick(hidden_BH, *self.state.sampling(rows), self.state.history[:rows])
        self.state.advance(rows, drawn)
        return drawn

    def _pick(
        self,
        hidden_BH: torch.Tensor,
        temperatures_B: torch.Tensor,
        seeds_B: torch.Tensor,
        draws_B: torch.Tensor,
        history_BT: torch.Tensor,
    ) -> torch.Tensor:
        """One id a row, under the engine's rules."""
        drawn_BT = history_BT if self.gpu else history_BT[:, : int(draws_B.max())]
        logits_BV = allowed(self.decoder.logits(hidden_BH), self.rules, temperatures_B, drawn_BT, draws_B)
        if not self.gpu:
            return pick(logits_BV, temperatures_B, seeds_B, draws_B, forbidden=self.rules.min_p > 0)
        return getattr(self.ops, "pick", pick)(logits_BV, temperatures_B, seeds_B, draws_B)

    def _compact(self) -> None:
        """Close holes: always on a CPU (rows are read in place), on a GPU where a smaller graph then does."""
        scheduler = self.scheduler
        top, count = max(scheduler.active) + 1, len(scheduler.active)
        if top == count or (self.graphs is not None and self.graphs.bucket(top) == self.graphs.bucket(count)):
            return
        pairs = scheduler.compact()
        if self.cache.by_slot:
            for source, target in pairs:
                running = scheduler.active[target]
                self.cache.move(source + 1, target + 1, running.tokens)
                self.cache.give_back(running.blocks)
                running.blocks = self.cache.take(1, target)
        self.state.move(pairs)
        self.dirty = True

    def _land(self, flight: Flight) -> Iterator[Completion]:
        """Feed the drawn tokens to their rows; a row that ends leaves its slot."""
        tokens, done, drawn = flight.tokens(), [], 0
        for running, place in zip(flight.rows, flight.places, strict=True):
            row = running.row
            if row.done is not None or (not running.alive and not running.exhausted):
                continue  # finished a step ago, or preempted
            drawn += 1
            if row.feed(tokens[place]) is not None:
                if running.alive:
                    self.scheduler.release(running)
                    self.dirty = True
                done.append(row)
        self.stats.in_flight += drawn - sum(len(row.ids) for row in done)
        yield from (row.completion() for row in done)

    # -- prefill

    def prefill(self, packed: Packed, wanted: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Hidden states of the wanted tokens of whole rows, packed; their keys and values go into their blocks."""
        ids = [token for prompt in packed for token in prompt.ids]
        step = packed_step(packed, self.store, cache.block_tokens, self.device)
        if self.gpu:
            step.tiles = self.ops.query_tiles(step.lens, step.parts, self.device)
        self.stats.prompt_tokens_computed += len(ids)
        return self.decoder.forward(torch.tensor(ids, device=self.device), step, cache, wanted)

    def place(self, prefix: tuple[int, ...]) -> Part | None:
        """Where a prefix stands, computed if it is not there; None where rows that run have to leave first."""
        held = {running.part for running in self.scheduler.active.values()}
        parts = prefixes.placed(self, [Nested(prefix)], held)
        return None if parts is None else next(iter(parts[0]), NOWHERE)

    def holds(self, prefix: tuple[int, ...]) -> bool:
        """Whether it is there, so that one row is no reason to run without it; on a CPU bytes don't hang on that."""
        return self.scheduler.several and (Nested(prefix), self.attached.signature) in self.store.parts
