"""What a person sees while it works: a progress line, status.json, plain lines where there is no terminal.

Owns rates, time to go and money on screen and in status.json; the run folder owns the files, the recipe the price.
Nothing here changes what a run does, and nothing here runs in a thread: `watch` lets a long batch tick through the very
function that it asks whether to stop.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress

from tqdm import tqdm

from cai.engine import EngineStats, memory
from cai.errors import CaiError
from cai.run import words
from cai.run.folder import Run
from cai.run.pace import Pace
from cai.store import records
from cai.store.jsonl import JsonObject
from cai.terminal import duration, duration_range, number, printable, usd, usd_fine

Rows = Sequence[JsonObject]
PLAIN_SECONDS = 30.0
STATUS_SECONDS = 2.0
BAR_SECONDS = 1.0
BESIDE = 28  # characters that a bar wants beside its name: a count and the time
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"  # tqdm's own time to go does not know of batches


class Progress:
    """One stage at a time: `begin`, `step` for every completion, `committed` for every batch on disk, `end`."""

    def __init__(
        self,
        run: Run,
        usd_per_hour: float,
        whole_items: Callable[[Rows], set[int]] = lambda rows: set(),
        steps: Sequence[words.Step] = (),
    ) -> None:
        self.steps = steps
        self.stats: EngineStats | None = None  # of the engine that draws: tokens of rows that are not finished yet
        self.expected: tuple[float, float] | None = None  # seconds of the whole run, as estimated when it began
        self.run, self.usd_per_hour, self._whole_among = run, usd_per_hour, whole_items
        self.bar: tqdm[object] | None = None
        self.stage, self.round, self.unit = "", 0, "item"
        self.total = self.done = self.tokens = self.finished = self.rejected = self.before = 0
        self.began = self.last_line = self.last_status = self.last_step = time.monotonic()
        self.open = False  # between `begin` and `end`
        self.whole: set[int] | None = None  # items whose last revision stands: the pairs that may be accepted
        self.per_round = False
        self.pace = Pace()
        self.shares = 1  # processes that do this step together; each counts its own part until all are joined

    def begin(
        self,
        stage: str,
        round_: int,
        total: int,
        done: int = 0,
        unit: str = "item",
        together: int = 1,
        per_round: bool = False,
    ) -> None:
        """`together`: how many items run side by side, and so finish at about the same time."""
        self.per_round = per_round
        self.stage, self.round, self.total, self.done, self.unit = stage, round_, total, done, unit
        self.tokens = self.finished = self.rejected = 0
        self.shares = 1
        self.before, self.open, self.pace = done, True, Pace(together)
        self.began = self.last_line = self.last_step = time.monotonic()
        memory.begin_phase()
        if self.whole is None:
            self._count_whole()
        if sys.stderr.isatty():
            self.bar = tqdm(
                total=total, initial=done, desc=self._short(), bar_format=BAR, dynamic_ncols=True, file=sys.stderr
            )
        self._status(True)

    @property
    def name(self) -> str:
        """In words, with its place among the run's steps where that is known."""
        return f"{self.place}{words.in_words(self.stage, self.round, self.per_round)}"

    def _short(self) -> str:
        """The name, cut where the count of a narrow terminal's bar would have no room beside it."""
        room = max(shutil.get_terminal_size().columns - BESIDE, len(self.place) + 12)
        return self.name if len(self.name) <= room else self.name[: room - 1].rstrip() + "…"

    @property
    def place(self) -> str:
        """`step 5 of 14, `, or nothing."""
        number = words.place(self.steps, self.stage, self.round)
        return f"step {number} of {len(self.steps)}, " if number else ""

    def follow(self, stats: EngineStats) -> None:
        """Count tokens while they are made, not when their rows are finished."""
        self.stats = stats

    @property
    def made(self) -> int:
        """Tokens of this stage, those of unfinished rows included."""
        return self.tokens + (self.stats.in_flight if self.stats and self.open else 0)

    def say(self, text: str) -> None:
        """A line between two stages."""
        sys.stderr.write(printable(f"{text}\n"))

    def step(self, tokens: int, items: int = 1) -> None:
        self.tokens += tokens
        self.finished += items
        self.last_step = time.monotonic()
        self.pace.note(time.monotonic() - self.began, self.finished * self.shares, self.total - self.shown)
        if self.bar is not None:
            self.bar.update(items)
        self.tick()

    def joined(self, finished: int, tokens: int) -> None:
        """What all processes did of this step."""
        self.finished, self.tokens, self.shares = finished, tokens, 1

    def training(self, step: int, steps: int) -> None:
        """One optimizer step done."""
        self.total, self.done = steps, step
        if self.bar is not None:
            self.bar.total = steps
        self.step(0)

    def committed(self, rows: Sequence[JsonObject]) -> None:
        self.done += len(rows)
        self.rejected += sum(row["status"] != "ok" for row in rows)
        if self.whole is not None:
            self.whole |= self._whole_among(rows)
        self.tick()

    def cut(self) -> None:
        """A stop came within a stage: what it took until then is noted, so that no time is without a phase."""
        if self.open:
            self.end(cut=True)

    def end(self, stats: EngineStats | None = None, **fields: object) -> None:
        self.open = False
        seconds = time.monotonic() - self.began
        if self.bar is not None:
            self.bar.set_postfix_str(self.rates())
            self.bar.close()
            self.bar = None
        else:
            self._line(f", took {duration(seconds)}")
        extra = {"out_of_memory": stats.out_of_memory, "batch_size": stats.batch_size} if stats else {}
        self.run.event(
            "stage",
            stage=self.stage,
            round=self.round,
            items=self.finished,
            rejected=self.rejected,
            tokens=self.tokens,
            seconds=round(seconds, 3),
            **extra,
            **memory.peaks(),
            **fields,
        )
        self._status(True)

    def watch(self, stopped: Callable[[], bool]) -> Callable[[], bool]:
        """`stopped`, asked at every decoding step, also keeps status.json and the plain line going in a long batch."""

        def asked() -> bool:
            self.tick()
            return stopped()

        asked.__dict__["hold"] = getattr(stopped, "hold", nullcontext)
        return asked

    def tick(self) -> None:
        """Whatever is due: a plain line every 30 s (a bar every second), status.json every 2 s."""
        clock = time.monotonic()
        if clock - self.last_line >= (PLAIN_SECONDS if self.bar is None else BAR_SECONDS):
            self.last_line = clock
            if self.bar is None:
                self._line(f", {duration(clock - self.began)} so far{self._to_go()}")
            else:
                self.bar.set_postfix_str(self.rates() + self._to_go())
        if clock - self.last_status >= STATUS_SECONDS:
            self._status()

    def rates(self) -> str:
        """`82 tok/s, $1.02, $0.011 a pair`: what is known of it."""
        seconds = max(time.monotonic() - self.began, 1e-6)
        speed = self.tokens_per_second()
        rate = (
            f"{number(speed, 2)} tok/s" if speed else f"{number(self.finished * self.shares / seconds)} {self.unit}/s"
        )
        parts = [rate] if self.finished or self.made else []
        if self.usd_per_hour:
            parts.append(usd(self.run.spent()["usd"]))
            parts += [f"{usd_fine(self.usd_per_pair())} a pair"] if self.whole else []
        return ", ".join(parts)

    def tokens_per_second(self) -> float | None:
        """Up to now where an engine tells what is in flight; else of finished rows, up to the last that finished."""
        if self.made > self.tokens:
            return self.shares * self.made / max(time.monotonic() - self.began, 1e-6)
        return self.shares * self.tokens / max(self.last_step - self.began, 1e-6) if self.tokens else None

    def usd_per_pair(self) -> float | None:
        """Over all attempts, for one item whose chain is whole (the pairs are judged when all are)."""
        return self.run.spent()["usd"] / len(self.whole) if self.whole and self.usd_per_hour else None

    def eta_seconds(self) -> tuple[float, float] | None:
        """(low, high) of this stage, from its own rate; None until as many items are done as run side by side."""
        return self.pace.to_go(time.monotonic() - self.began)

    def _to_go(self) -> str:
        eta, run = self.eta_seconds(), self.run_seconds()
        parts = [f"{duration_range(*eta)} to go"] if eta and eta[1] else []
        parts += [f"{duration_range(*run)} left of the whole run"] if run and run != eta else []
        return "".join(f", {part}" for part in parts)

    def run_seconds(self) -> tuple[float, float] | None:
        """(low, high) of all steps that are left: the estimate less what was spent, this stage's own rate at least."""
        if self.expected is None:
            return None
        spent, (low, high) = self.run.spent()["seconds"], self.eta_seconds() or (0.0, 0.0)
        left = max(self.expected[0] - spent, low), max(self.expected[1] - spent, high)
        return left if left[1] > 0 else None

    @property
    def shown(self) -> int:
        """Items done for the eye: on disk, or finished in the batch that is not on disk yet."""
        return min(max(self.done, self.before + self.finished * self.shares), max(self.total, self.done))

    def _line(self, tail: str) -> None:
        rejected = f" ({self.rejected} rejected)" if self.rejected else ""
        rates = f", {rates}" if (rates := self.rates()) else ""
        sys.stderr.write(printable(f"{self.name}: {self.shown}/{self.total}{rejected}{rates}{tail}\n"))

    def _status(self, now: bool = False) -> None:
        clock = time.monotonic()
        self.last_status = clock
        spent, eta, price, run = self.run.spent(), self.eta_seconds(), self.usd_per_pair(), self.run_seconds()
        speed = self.tokens_per_second()
        self.run.status(
            now=now,
            stage=self.stage,
            round=self.round,
            done=self.shown,
            total=self.total,
            rejected=self.rejected,
            stage_seconds=round(clock - self.began, 1),
            tokens_per_second=None if speed is None else round(speed, 1),
            eta_seconds=None if eta is None else [round(seconds, 1) for seconds in eta],
            run_seconds=None if run is None else [round(seconds, 1) for seconds in run],
            step=words.place(self.steps, self.stage, self.round),
            steps=len(self.steps),
            seconds=round(spent["seconds"], 1),
            usd=round(spent["usd"], 4),
            whole_items=len(self.whole or ()),
            usd_per_pair=None if price is None else round(price, 6),
        )

    def _count_whole(self) -> None:
        """Read once what earlier attempts left; a folder that cannot be read counts as empty."""
        self.whole = set()
        with suppress(OSError, ValueError, CaiError):
            self.whole = self._whole_among(records.look(self.run.records_path))
