"""M3 by phase at 32B shapes: each phase's rate measured with random weights, times what an M3 asks of it.

One process builds the policy once (NF4, all layers, on the card) and measures, the most telling first: generation by
stage (the mix of bench/shapes.py, redraws included), relevance and labels on the same engine, DPO with a checkpoint,
then a guard of 4B and a judge of 13B. Each step has a time limit, none fails the rest, and the file is written anew
behind each: a cut leaves what was measured. 25 GB of the card stay free. What is scored: bench/m3_asks.py; counts and
the table: bench/m3_counts.py.

    python bench/m3_phases.py m3-phases.json --seconds 250                        (a GPU: measure, then the table)
    python bench/m3_phases.py m3-phases.json                                      (any machine: the table alone)
    python bench/m3_phases.py m3-phases-fp8.json --seconds 250 --linears fp8      (data drawn in 8 bits)
    python bench/m3_phases.py m3-phases.json --seconds 250 --small                (a CPU: every line, tiny shapes)

What only a real run shows is not in it: what the weights write (how many tries a pair takes, how long texts are),
loading, the report. Random weights cost what real ones cost.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

from shapes import STAGES, stage_requests  # noqa: E402

Row = dict[str, Any]
FREE_GB = 25.0  # of the card, for others; and CONTEXT_GB, which torch's limit does not count
CONTEXT_GB = 1.5
LEAST = 6.0  # seconds, with fewer a step is not begun
TABLE_SECONDS = 4.0
LATER = 85.0  # seconds that generation leaves to the steps behind it
SURE = 0.85  # of a time that requests are dealt for: the end of a stage, when rows run out, is not foreseen
# seconds a request of each stage took on an H200 (bench/results/generate-h200.json): how a time is dealt among them
DEALT = {"instructions": 0.027, "answers": 0.061, "critiques": 0.066, "revisions": 0.119}
MOST = 768  # requests a stage


@dataclass(frozen=True)
class Sizes:
    """What is measured. `small`: every line on a CPU, for no figure."""

    shape: str = "qwen2-32b"
    guard: str = "guard"
    judge: str = "judge-13b"
    scale: float = 1.0
    requests: int = MOST
    drawing: float = 95.0  # seconds of all stages, at most
    answers: int = 16  # of which relevance is scored
    pairs: int = 12  # that are labelled
    steps: int = 8
    exchanges: tuple[int, int] = (600, 200)  # of guard and judge


SMALL = Sizes("tiny", "tiny-guard", "tiny-judge", 0.03, 6, 20.0, 3, 3, 3, (4, 4))


class Cut(BaseException):
    """A step's time is over. No Exception, so that nothing on the way takes it for a fault of its own."""


@dataclass
class Session:
    """The file of results, and the clock."""

    path: Path
    ends: float
    found: Row = field(default_factory=lambda: {"steps": {}})

    def left(self, keep: float = 0.0) -> float:
        return self.ends - time.monotonic() - keep

    def write(self) -> None:
        beside = self.path.with_name(self.path.name + ".new")
        beside.write_text(json.dumps(self.found, indent=1) + "\n")
        beside.rename(self.path)

    def step(self, name: str, most: float, work: Callable[[Row], None], keep: float = 0.0) -> bool:
        """`work` fills the step's row, within `most` seconds and with `keep` left; whether it came to its end."""
        row: Row = {}
        self.found["steps"][name] = row
        allowed, began = min(most, self.left(keep)), time.monotonic()
        if allowed < LEAST:
            row["error"] = f"skipped, {max(0.0, self.left()):.0f} s were left"
        else:
            print(f"== {name}: at most {allowed:.0f} s, {self.left():.0f} s are left", flush=True)
            try:
                with limited(allowed):
                    work(row)
            except Cut:
                row["error"] = f"cut off after {time.monotonic() - began:.0f} s"
            except Exception as error:  # the other steps still count
                row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        row["took_s"] = round(time.monotonic() - began, 1)
        self.write()
        print(f"== {name}: {row.get('error', 'done')}, {row['took_s']} s", flush=True)
        return "error" not in row


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Cut is raised inside after so many seconds."""

    def ring(*_: object) -> None:
        raise Cut

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


@dataclass
class Policy:
    """The weights, built once, and the engine over them while it is open."""

    sizes: Sizes
    cap_gb: float
    session: Session
    linears: str = "auto"
    loaded: Any = None
    engine: Any = None

    def build(self, row: Row) -> None:
        from dpo_models import full_layers, made_model

        name = f"made:{self.sizes.shape}"
        self.loaded = made_model(name)
        layers = self.loaded.hf.config.num_hidden_layers
        self.session.found |= {"shape": self.sizes.shape, "layers": f"{layers} of {full_layers(name)}"}

    def generate(self, row: Row) -> None:
        """Every stage of the chain; a stage that was drawn stands in the file at once."""
        from generate import PlainTokenizer, Wanted, Weights, engine_for, warm_up

        began = time.monotonic()
        weights = Weights(self.loaded.hf, PlainTokenizer(), str(self.loaded.device.type))
        name = "native" if self.linears == "auto" else f"native-{self.linears}"
        self.engine = engine_for(Wanted(name, 0.0, 0, ()), weights, 0)
        vocab = self.loaded.hf.config.vocab_size
        list(warm_up(self.engine, vocab, self.engine.stats.batch_size))  # every number of rows has its graph
        row |= {"set_up_s": round(time.monotonic() - began, 1), "batch": self.engine.stats.batch_size, "stages": {}}
        row["notes"] = {k: v for k, v in self.engine.stats.extra.items() if isinstance(v, str | int)}
        ends, pace = time.monotonic() + min(self.sizes.drawing, self.session.left(LATER)), 1.0
        for stage in (stage for stage in STAGES if stage.name in DEALT):
            ahead = sum(seconds for name, seconds in DEALT.items() if name not in row["stages"])
            count = max(2, min(self.sizes.requests, int(SURE * (ends - time.monotonic()) / (pace * ahead))))
            row["stages"][stage.name] = found = self._stage(stage, count, vocab)
            pace = max(found["seconds_a_request"] / DEALT[stage.name], 0.05)
            row["out_of_memory"] = self.engine.stats.out_of_memory
            self.session.write()
            print(f"# {stage.name}: {json.dumps(found)}", flush=True)

    def _stage(self, stage: Any, count: int, vocab: int) -> Row:
        from generate import run_stage

        before = self.engine.stats.prompt_tokens_computed
        requests = stage_requests(stage, count, vocab, self.sizes.scale, stage.rotations)
        tokens, seconds, redraws = run_stage(self.engine, requests, stage.again)
        return {
            "requests": count, "tokens": tokens, "seconds": round(seconds, 3), "redraws": redraws,
            "tokens_per_s": round(tokens / seconds, 1), "seconds_a_request": seconds / count,
            "seconds_a_token": seconds / tokens,
            "prompt_tokens_computed": self.engine.stats.prompt_tokens_computed - before,
        }  # fmt: skip

    def score(self, row: Row) -> None:
        """Relevance of answers and labels of pairs: the program's own asks, in ids of no meaning."""
        import m3_asks

        inputs, vocab = m3_asks.m3(), self.loaded.hf.config.vocab_size
        each = (
            ("relevance", m3_asks.relevance_asks, self.sizes.answers),
            ("labels", m3_asks.label_asks, self.sizes.pairs),
        )
        for name, of, count in each:
            self._scored(m3_asks, m3_asks.shrunk(of(inputs, 1), vocab, self.sizes.scale, seed=1))  # kernels
            row[name] = self._scored(m3_asks, m3_asks.shrunk(of(inputs, count), vocab, self.sizes.scale))
            row[name] |= {"units": count, "seconds_a_unit": row[name]["seconds"] / count}
            row["out_of_memory"] = self.engine.stats.out_of_memory
            self.session.write()
            print(f"# {name}: {json.dumps(row[name])}", flush=True)

    def _scored(self, m3_asks: Any, asks: Any) -> Row:
        scorer = m3_asks.Scorer(self.engine, None, "base")
        before, began = self.engine.stats.prompt_tokens_computed, time.monotonic()
        assert len(m3_asks.score(scorer, asks)) == len(asks)
        seconds, tokens = time.monotonic() - began, self.engine.stats.prompt_tokens_computed - before
        return {"requests": len(asks), "prompt_tokens_computed": tokens, "seconds": round(seconds, 3),
                "tokens_per_s": round(tokens / seconds, 1), "seconds_a_token": seconds / tokens}  # fmt: skip

    def close(self) -> None:
        """The engine's memory goes back, the weights stay."""
        if self.engine is not None:
            self.engine.close()
            self.engine = None
        emptied()

    def train(self, row: Row) -> None:
        """DPO as the recipe has it, a pair of the lengths that the stages draw, a checkpoint at the end."""
        import dpo
        from m3_asks import m3, prompt_tokens

        recipe, mean = m3().recipe.dpo, {stage.name: sum(stage.outputs) // 2 for stage in STAGES}
        prompt = prompt_tokens() + mean["instructions"]
        tokens, scale = 2 * prompt + mean["answers"] + mean["revisions"], self.sizes.scale
        pairs = recipe.batch_size * recipe.gradient_accumulation
        options = dpo.parser().parse_args(
            [f"made:{self.sizes.shape}", "--saving", "--cap-gb", str(self.cap_gb), "--steps", str(self.sizes.steps),
             "--pairs", str(recipe.batch_size), "--accumulation", str(recipe.gradient_accumulation),
             "--rows", str(pairs * self.sizes.steps), "--tokens", str(max(40, round(tokens * scale))),
             "--prompt", str(max(4, round(prompt * scale)))]
        )  # fmt: skip
        clock = dpo.Clock(pairs)
        row |= {"tokens_a_pair": options.tokens, "prompt_tokens": options.prompt, "pairs_a_step": pairs}
        try:
            found = dpo.ours(options, self.loaded, clock)
        finally:  # of a training that was cut off its steps count
            if clock.seconds:
                timed = clock.result()
                row |= {key: timed[key] for key in ("seconds_a_pair", "first_step_seconds", "step_seconds", "losses")}
        row |= {key: found[key] for key in ("save_seconds", "checkpointing", "layout", "layers", "peak_reserved_gib")}
        reference = next(event for event in found["events"] if event["kind"] == "reference")
        row["reference_seconds_a_pair"] = reference["seconds"] / reference["pairs"]
        row["set_up_seconds"] = max(0.0, found["first_step_seconds"] - reference["seconds"])
        row["probes"] = [event for event in found["events"] if event["kind"] in ("training_probe", "out_of_memory")]
        print(f"# dpo: {json.dumps(row)}", flush=True)

    def forget(self) -> None:
        self.close()
        self.loaded = None
        emptied()


def asked(shape: str, exchanges: int, sizes: Sizes, row: Row) -> None:
    """A guard or a classifier that judges exchanges, as bench/families.py has them."""
    import families
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    holder = SimpleNamespace(hf=families.made(shape, device), tokenizer=families.Numbers(), device=device)
    options: Any = SimpleNamespace(shape=shape, rows=exchanges, scale=sizes.scale, stages=())
    row |= families.measured("native", options, holder)
    row |= {"exchanges": exchanges, "seconds_an_exchange": row["seconds"] / exchanges}
    print(f"# {json.dumps(row)}", flush=True)


def emptied() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def limit_of_card() -> float:
    """10^9 bytes that this process may take: all but what others need; 0 without a card."""
    import torch

    if not torch.cuda.is_available():
        return 0.0
    return torch.cuda.get_device_properties(0).total_memory / 1e9 - FREE_GB - CONTEXT_GB


def free_of_card() -> float | None:
    import torch

    return round(torch.cuda.mem_get_info()[0] / 1e9, 1) if torch.cuda.is_available() else None


def measure(session: Session, sizes: Sizes, linears: str) -> None:
    from dpo_models import cap
    from generate import machine

    session.found |= {**machine(), "scale": sizes.scale, "linears": linears}
    session.found["cap_gb"] = cap_gb = round(limit_of_card(), 1)
    cap(cap_gb)
    session.found["free_gb_before"] = free_of_card()  # less than the card has: others work on it, too
    policy = Policy(sizes, cap_gb, session, linears)
    if session.step("weights", 90.0, policy.build):
        session.step("generation", 180.0, policy.generate, keep=LATER - 5.0)
        if policy.engine is not None:
            session.step("scoring", 25.0, policy.score)
        policy.close()
        session.step("dpo", 110.0, policy.train)
    policy.forget()
    for name, shape, count in zip(("guard", "judge"), (sizes.guard, sizes.judge), sizes.exchanges, strict=True):
        session.step(name, 30.0, lambda row, shape=shape, count=count: asked(shape, count, sizes, row))  # type: ignore[misc]
        emptied()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the session's results, written and read")
    parser.add_argument("--seconds", type=float, default=0.0, help="measure within so many; 0: only the table")
    parser.add_argument("--linears", choices=("auto", "fp8", "int8"), default="auto", help="of what is drawn")
    parser.add_argument("--small", action="store_true", help="tiny shapes on any machine")
    options = parser.parse_args()
    session = Session(options.file, time.monotonic() + options.seconds - TABLE_SECONDS)
    if options.seconds:
        options.file.parent.mkdir(parents=True, exist_ok=True)
        measure(session, SMALL if options.small else Sizes(), options.linears)
    else:
        try:
            session.found = json.loads(options.file.read_text())
        except (OSError, ValueError) as error:
            raise SystemExit(f"{options.file}: no results ({error}). Measure first: --seconds 250.") from None
    import m3_counts

    session.found["table"] = m3_counts.table(session.found)
    session.write()
    print(m3_counts.shown(session.found["table"], session.found))


if __name__ == "__main__":
    main()
