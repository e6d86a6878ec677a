"""Child processes of tests/training/test_train.py: a training that gets killed, and TRL's own trainer beside ours."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "training")]

from support.training import LORA, FakePrompt, TinyModel, dpo, make_pairs, run_train  # noqa: E402


def serve() -> None:
    """For each line `how folder number` of stdin a forked training that gets killed; says how each child ended.

    The imports are made once: ten seconds of them before each of twenty trainings took longer than all trainings.
    """
    import test_train_start  # noqa: F401

    import cai.training.sft_trainer
    import cai.training.trainers  # noqa: F401

    print("ready", flush=True)
    for line in sys.stdin:
        how, folder, number = line.split()
        child = os.fork()
        if child == 0:
            if how == "kill-in-save":
                kill_in_save(Path(folder), int(number))
            if how == "kill-start-after":
                from test_train_start import two_stages

                two_stages(Path(folder))
            else:
                run_train(Path(folder))
            os._exit(0)
        if how.endswith("-after"):
            time.sleep(float(number))
            os.kill(child, signal.SIGKILL)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def kill_in_save(folder: Path, count: int) -> None:
    """SIGKILL at the `count`-th file opened for writing below the second checkpoint."""
    seen = [0]

    def hook(event: str, arguments: tuple) -> None:
        if event not in ("open", "os.rename", "shutil.rmtree") or "checkpoint-4" not in str(arguments[0]):
            return
        if event == "open" and not (isinstance(arguments[1], str) and set(arguments[1]) & set("wax")):
            return
        if seen[0] == count:
            os.kill(os.getpid(), signal.SIGKILL)
        seen[0] += 1

    sys.addaudithook(hook)


def beside_trl(folder: Path) -> None:
    """Losses of our four steps, and of TRL's DPOTrainer on the same rows, order and start."""
    import trl.trainer.utils as utils

    utils._ChunkedLogProbFunction = plain_chunked()  # TRL's is a Triton kernel: no CPU
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from trl import DPOConfig, DPOTrainer

    from cai.training import adapter
    from cai.training.token_rows import schedule, tokenize_pairs

    ours = run_train(folder)
    model = TinyModel()
    model.to_lora(LORA)
    rows = tokenize_pairs(
        make_pairs(6), FakePrompt(), format="base", tokenizer=model.tokenizer, max_length=dpo().max_length
    ).rows
    order = schedule(rows, steps=4, effective_batch=4, seed=7)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    data = Dataset.from_dict({n: [list(getattr(rows[i], n)) for i in order] for n in names})

    class Trainer(DPOTrainer):
        def _prepare_dataset(self, dataset, *_a, **_k):
            return dataset

        def _get_train_sampler(self, *_a, **_k):
            return SequentialSampler(data)

    arguments = DPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=4,
        learning_rate=5e-3, lr_scheduler_type="linear", warmup_steps=0, beta=0.1, logging_steps=1, report_to="none",
        save_strategy="no", use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model.hf, args=arguments, processing_class=model.hf_tokenizer, train_dataset=data)
    model.hf.delete_adapter("ref")
    adapter.reset(model.hf, 7)
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(json.dumps([[entry["loss"] for entry in ours.log], theirs]))


def beside_sft(folder: Path) -> None:
    """Losses of our four steps, and of TRL's SFTTrainer, untouched but for its Triton kernel, on the same rows."""
    import trl.trainer.utils as utils

    utils._ChunkedLogProbFunction = plain_chunked()
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from trl import SFTConfig, SFTTrainer

    from cai.training import adapter
    from cai.training.token_rows import revisions_only, schedule, tokenize_pairs

    ours = run_train(folder, objective="sft")
    model = TinyModel()
    model.to_lora(LORA)
    found = tokenize_pairs(make_pairs(6), FakePrompt(), format="base", tokenizer=model.tokenizer, max_length=2048)
    rows = revisions_only(found).rows
    chosen = [rows[i] for i in schedule(rows, steps=4, effective_batch=4, seed=7)]
    data = Dataset.from_dict({
        "input_ids": [[*row.prompt_ids, *row.chosen_ids] for row in chosen],
        "labels": [[-100] * len(row.prompt_ids) + list(row.chosen_ids) for row in chosen],
    })  # fmt: skip

    class Trainer(SFTTrainer):
        def _get_train_sampler(self, *_a, **_k):
            return SequentialSampler(data)

    arguments = SFTConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=4,
        learning_rate=5e-3, lr_scheduler_type="linear", warmup_steps=0, logging_steps=1, report_to="none",
        save_strategy="no", use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True,
        max_length=None, dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    trainer = Trainer(model=model.hf, args=arguments, processing_class=model.hf_tokenizer, train_dataset=data)
    adapter.reset(model.hf, 7)
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(json.dumps([[entry["loss"] for entry in ours.log], theirs]))


def kill_sft(folder: Path) -> None:
    """The SFT arm on the embedded model, SIGKILL after its third step (a checkpoint of the second is there)."""
    from test_train_sft import train_arm

    from cai.models.policy import load
    from cai.recipe.settings import ModelSection

    def event(kind: str, **fields) -> None:
        if kind == "train_step" and fields["step"] == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    model = load(ModelSection(format="chat", quantization="fp32", max_seq_length=512), "embedded")
    train_arm(model, folder, "sft", event=event)


KILLS = (("train_step", 3), ("trained", 0), ("train_step", 1), ("train_step", 3))  # two in SFT, then two in DPO


def kill_stages(folder: Path) -> None:
    """Both stages on the embedded model: once left alone, once killed at each of KILLS; the adapters' folders stay.

    The model is loaded once; each training that gets killed runs in a fork.
    """
    from test_train_start import two_stages

    from cai.models.policy import load
    from cai.recipe.settings import ModelSection
    from cai.recipe.settings_sft import SftSection

    config = dpo(start="sft", max_length=128, batch_size=1, gradient_accumulation=1, max_steps=3, learning_rate=1e-4)
    settings = {"config": config, "stage": SftSection().recipe(config), "pairs": make_pairs(4)}
    model = load(ModelSection(format="chat", quantization="fp32", max_seq_length=512), "embedded")
    codes = []
    for kill in KILLS:
        if (child := os.fork()) == 0:

            def event(kind: str, /, *, kill=kill, **fields) -> None:
                if (kind, fields["step"] if kind == "train_step" else 0) == kill:
                    os.kill(os.getpid(), signal.SIGKILL)

            two_stages(folder / "killed", model=model, event=event, **settings)
            os._exit(0)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    resumed = two_stages(folder / "killed", model=model, **settings)
    alone = two_stages(folder / "alone", model=model, **settings)
    print(json.dumps({"codes": codes, "resumed_from": resumed.resumed_from, "first_loss": alone.first_loss}))


def plain_chunked():
    """`ChunkedLogProbFunction.apply` by its definition."""
    import torch

    class Plain:
        @staticmethod
        def apply(hidden, weight, bias, labels, temperature, chunk, softcap, scale, outputs):
            logits = torch.nn.functional.linear(hidden, weight, bias).float()
            logps = torch.log_softmax(logits, -1)
            chosen = logps.gather(1, labels[:, None]).squeeze(1)
            entropy = -(logps.exp() * logps).sum(-1).detach()
            return chosen, entropy, None, logits.mean(-1).detach(), logits.argmax(-1) == labels

    return Plain


if __name__ == "__main__":
    what, where = sys.argv[1], Path(sys.argv[2])
    if what == "serve":
        serve()
    elif what == "kill-sft":
        kill_sft(where)
    else:
        {"trl": beside_trl, "beside-sft": beside_sft, "kill-stages": kill_stages}[what](where)
