"""DPO side by side on one model: TRL + PEFT default, Unsloth + TRL default, ours. Same pairs, LoRA start and order.

Each variant runs in its own process (Unsloth rewrites TRL at import) and loads the model itself. Printed: seconds a
pair in steady state (median step after the first two), first step after `train()`, peak memory, the loss of each step
and how far the trajectories lie apart. JSON names the machine.

    python bench/make_model.py 32b /dev/shm/random-32b
    python bench/dpo.py /dev/shm/random-32b --out dpo.json

In place of a folder, "made:SHAPE/LAYERS" (bench/families.py) makes the weights on the card, without a file and without
Unsloth; for ours alone. `--saving` saves as the recipe does, at the end (and each `dpo.save_minutes`, here 10), and
says what a save takes and what share of ten minutes it would be with all of the shape's layers.

    python bench/dpo.py made:llama31-32b/16 --variants ours --saving --out dpo-llama31.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from dpo_models import SEED, cap, cpu_model, full_layers, made_model, make_rows  # noqa: E402

VARIANTS = ("trl", "unsloth", "ours")
RANK, ALPHA, BETA = 32, 64, 0.1
SAVE_MINUTES = 10.0
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def settings(options: argparse.Namespace) -> Any:
    from cai.recipe.settings import DpoSection

    return DpoSection(
        max_steps=options.steps, batch_size=options.pairs, gradient_accumulation=options.accumulation, beta=BETA,
        learning_rate=options.learning_rate, warmup_ratio=0.0, scheduler="constant", save_steps=10_000,
        save_minutes=SAVE_MINUTES if options.saving else 0.0,
        first_loss_tolerance=5.0, gradient_checkpointing=options.checkpointing,
    )  # fmt: skip


class Clock:
    """Step times, losses and memory of one variant; called after every optimizer step."""

    def __init__(self, pairs_a_step: int) -> None:
        self.pairs, self.began, self.last = pairs_a_step, time.monotonic(), time.monotonic()
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.margins: list[float] = []

    def step(self, loss: float, margin: float) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.monotonic()
        if not self.seconds:
            self.first_step = now - self.began
        self.seconds.append(now - self.last)
        self.last = now
        self.losses.append(loss)
        self.margins.append(margin)

    def saved(self, notes: list[dict[str, Any]], layers: int, name: str) -> dict[str, float]:
        """Seconds from the last step to its sealed checkpoint, and its share of the time between two at full depth.

        A checkpoint is the adapter and its moments: its size goes with the layers, as the time of a step does.
        """
        taken = self.began + next(note["at"] for note in reversed(notes) if note["kind"] == "checkpoint") - self.last
        depth = (full_layers(name) or layers) / layers
        return {"save_seconds": taken, "saving_share": taken * depth / (60.0 * SAVE_MINUTES), "depth_factor": depth}

    def result(self) -> dict[str, Any]:
        import torch

        cuda = torch.cuda.is_available()
        steady = statistics.median(self.seconds[2:] or self.seconds)
        return {
            "seconds_a_pair": steady / self.pairs,
            "first_step_seconds": self.first_step,
            "step_seconds": [round(s, 3) for s in self.seconds],
            "losses": self.losses,
            "margins": self.margins,
            "peak_allocated_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0,
            "peak_reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if cuda else 0.0,
            "machine": torch.cuda.get_device_name(0) if cuda else "CPU",
            "torch": torch.__version__,
        }


def ours(options: argparse.Namespace, model: Any = None, clock: Clock | None = None) -> dict[str, Any]:
    """cai.training's Job on the model as the pipeline loads it, or on one that was made before; `clock` follows it."""
    from cai.models.policy import load
    from cai.recipe.settings import LoraSection, ModelSection
    from cai.training.job import Job

    section = ModelSection(name=options.model, format="base", quantization=options.quantization)
    if model is None and options.model.startswith("made:"):
        model = made_model(options.model)
    elif model is None:
        model = load(section, "embedded" if options.cpu else "cuda")
        model = cpu_model(options.model, model) if options.cpu else model
    model.to_lora(LoraSection(rank=RANK, alpha=ALPHA), SEED)
    model.mode("train")
    cap(options.cap_gb)
    rows = make_rows(options.rows, options.tokens, options.prompt)
    notes: list[dict[str, Any]] = []
    clock = clock or Clock(options.pairs * options.accumulation)

    def event(kind: str, **fields: Any) -> None:
        if kind == "train_step":
            clock.step(fields["loss"], fields["rewards/margins"])
        else:
            notes.append({"kind": kind, "at": round(time.monotonic() - clock.began, 2), **fields})

    with tempfile.TemporaryDirectory() as folder:
        job = Job(model, rows, LoraSection(rank=RANK, alpha=ALPHA), settings(options), Path(folder), SEED, event,
                  lambda: False, lambda *_: None)  # fmt: skip
        if options.profile:
            profile_step(job, options)
        clock.began = clock.last = time.monotonic()
        if not options.saving:
            no_saving()
        _, shape, _ = job.run()
        saved = clock.saved(notes, model.hf.config.num_hidden_layers, options.model) if options.saving else {}
    facts = {"layout": job.layout.name, "layers": model.hf.config.num_hidden_layers, **saved}
    return clock.result() | {"events": notes, "checkpointing": shape.checkpointing, "order": job.order, **facts}


def no_saving() -> None:
    """A 32B checkpoint (1 GB adapter, 2 GB moments) at the last step is not what is timed here."""
    from cai.training import trainers as trainer

    trainer.PairTrainer._save_checkpoint = lambda *_: None  # type: ignore[method-assign]


def default(options: argparse.Namespace, unsloth: bool) -> dict[str, Any]:
    """TRL's DPOTrainer as its documentation uses it; the rows are handed over as token ids in our order."""
    if unsloth:
        import unsloth
    import torch
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from cai.training import adapter
    from cai.training.token_rows import schedule

    hf = load_default(options, unsloth)
    cap(options.cap_gb)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = make_rows(options.rows, options.tokens, options.prompt)
    effective = options.pairs * options.accumulation
    order = schedule(rows, steps=options.steps, effective_batch=effective, seed=SEED)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    data = Dataset.from_dict({n: [list(getattr(rows[i], n)) for i in order] for n in names})
    cuda = torch.cuda.is_available()
    arguments = DPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=options.pairs,
        gradient_accumulation_steps=options.accumulation, max_steps=options.steps,
        learning_rate=options.learning_rate, lr_scheduler_type="constant", warmup_steps=0, beta=BETA, max_length=4096,
        logging_steps=1, report_to="none", save_strategy="no", bf16=cuda, use_cpu=not cuda, seed=SEED,
        remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    clock = Clock(effective)

    class Trainer(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_a: Any, **_k: Any) -> Any:
            return dataset

        def _get_train_sampler(self, *_a: Any, **_k: Any) -> Any:
            return SequentialSampler(data)

    class Watch(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:
                clock.step(float(logs["loss"]), float(logs.get("rewards/margins", 0.0)))

    trainer = Trainer(model=hf, args=arguments, processing_class=tokenizer, train_dataset=data, callbacks=[Watch()])
    dtypes = sorted({str(p.dtype) for p in hf.parameters() if p.requires_grad})
    if "ref" in hf.peft_config:
        hf.delete_adapter("ref")
    kept = {name: p.dtype for name, p in adapter.lora_parameters(hf)}
    adapter.reset(hf, SEED)  # the same start for all, in the dtype that the constructor left
    for name, parameter in adapter.lora_parameters(hf):
        parameter.data = parameter.data.to(kept[name])
    clock.began = clock.last = time.monotonic()
    trainer.train()
    return clock.result() | {"lora_dtype_as_left_by_the_constructor": dtypes, "order": order}


def load_default(options: argparse.Namespace, unsloth: bool) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model

    if unsloth:
        from unsloth import FastLanguageModel

        hf, _ = FastLanguageModel.from_pretrained(
            options.model, max_seq_length=4096, dtype=torch.float32 if options.cpu else torch.bfloat16,
            load_in_4bit=not options.cpu,
        )  # fmt: skip
        return FastLanguageModel.get_peft_model(
            hf, r=RANK, lora_alpha=ALPHA, lora_dropout=0, target_modules=TARGETS,
            use_gradient_checkpointing=False if options.cpu else "unsloth",
        )  # fmt: skip
    from transformers import AutoModelForCausalLM

    placement = {} if options.cpu else {"device_map": {"": 0}, "dtype": torch.bfloat16}
    hf = AutoModelForCausalLM.from_pretrained(options.model, **placement)
    return get_peft_model(hf, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM"))


def profile_step(job: Any, options: argparse.Namespace) -> None:
    """Kernel times of one micro-batch, forward and backward, after a warm-up."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from cai.training.forward import set_checkpointing
    from cai.training.loss import sequence_logps
    from cai.training.scoring import to_device

    set_checkpointing(job.model.hf, job.layout, False)
    batch = to_device(job.layout.collate(job.rows[: options.pairs]), job.model.device)

    def once() -> None:
        sums_2B, _ = sequence_logps(job.model.hf, batch, job.layout.forward)
        (sums_2B[0] - sums_2B[1]).mean().backward()
        torch.cuda.synchronize()

    for _ in range(2):
        once()
    began = time.monotonic()
    once()
    print(
        f"micro-batch of {options.pairs} pairs, {len(batch['ids_T'])} packed tokens: {time.monotonic() - began:.3f} s"
    )
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as record:
        once()
    table = record.key_averages().table(sort_by="self_cuda_time_total", row_limit=24, max_name_column_width=70)
    print("\n".join(line[:72] + line[-130:] if len(line) > 210 else line for line in table.splitlines()))
    job.model.hf.zero_grad(set_to_none=True)


# The largest difference of a step's loss from ours. fp32: rounding. bf16: two orders of the same sums through 64
# layers of random weights; log-probs of whole completions differ by nats. Unsloth and TRL differ by 0.1 themselves.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.25}


def spread(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Largest difference of a step's loss from ours."""
    base = results.get("ours", {}).get("losses")
    if not base:
        return {}
    return {
        name: max(abs(a - b) for a, b in zip(r["losses"], base, strict=False))
        for name, r in results.items()
        if name != "ours" and "losses" in r
    }


def show(results: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    print(f"\n{options.model}: {options.tokens} tokens a pair, {options.pairs} x {options.accumulation} pairs a step")
    for r in results.values():
        if "save_seconds" in r:
            share = f"{r['saving_share']:.2%} of {SAVE_MINUTES:g} minutes at full depth"
            print(f"a save took {r['save_seconds']:.2f} s at {r['layers']} layers: {share}")
    print(
        "| variant | s/pair | first step s | peak GiB allocated / reserved | losses |\n| --- | --- | --- | --- | --- |"
    )
    for name, r in results.items():
        if "error" in r:
            print(f"| {name} | failed: {r['error']} | | | |")
            continue
        losses = " ".join(f"{loss:.3f}" for loss in r["losses"])
        peak = f"{r['peak_allocated_gib']:.1f} / {r['peak_reserved_gib']:.1f}"
        print(f"| {name} | {r['seconds_a_pair']:.3f} | {r['first_step_seconds']:.1f} | {peak} | {losses} |")
    mine = results.get("ours", {}).get("seconds_a_pair")
    for name, r in results.items():
        if mine and name != "ours" and "seconds_a_pair" in r:
            print(f"{name} / ours: {r['seconds_a_pair'] / mine:.2f}x")
    allowed = TOLERANCE["fp32" if options.cpu else "bf16"]
    for name, distance in spread(results).items():
        verdict = "within" if distance <= allowed else "OUTSIDE"
        print(f"largest loss difference, {name} - ours: {distance:.4f}, {verdict} the tolerance of {allowed}")


def run_child(name: str, options: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, __file__, *argv, "--child", name, "--out", str(out)]
        try:
            done = subprocess.run(command, timeout=options.timeout, env={**os.environ, "PYTHONUNBUFFERED": "1"})
        except subprocess.TimeoutExpired:
            return {"error": f"took longer than {options.timeout} s"}
        return json.loads(out.read_bytes()) if out.exists() else {"error": f"exit {done.returncode}"}


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--tokens", type=int, default=1160)
    parser.add_argument("--prompt", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=4, help="pairs a micro-batch")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rows", type=int, default=32, help="distinct pairs: as many as a step has, and losses fall")
    parser.add_argument("--learning-rate", type=float, default=5e-6)
    parser.add_argument("--checkpointing", choices=("auto", "on", "off"), default="auto")
    parser.add_argument("--quantization", choices=("nf4", "bf16"), default="nf4")
    parser.add_argument("--cap-gb", type=float, default=80.0, help="memory cap of the process, 0 for none")
    parser.add_argument("--timeout", type=float, default=300)
    parser.add_argument("--saving", action="store_true", help="checkpoints as the recipe asks for, timed")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--cpu", action="store_true", help="dry run with a tiny bf16 checkpoint")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", choices=VARIANTS, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    options = parser().parse_args()
    if options.child:
        result = ours(options) if options.child == "ours" else default(options, options.child == "unsloth")
        options.out.write_text(json.dumps(result))
        return
    argv = [a for a in sys.argv[1:] if not a.startswith("--out")]
    argv = [a for a in argv if a != str(options.out)]
    results = {name: run_child(name, options, argv) for name in options.variants}
    show(results, options)
    if options.out:
        options.out.write_text(
            json.dumps({"arguments": vars(options) | {"out": str(options.out)}, **results}, indent=1)
        )


if __name__ == "__main__":
    main()
