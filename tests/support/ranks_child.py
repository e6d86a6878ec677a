"""One process of several that train one step together over gloo: tests/training/test_train_ranks.py starts them.

`python ranks_child.py FOLDER`, with RANK and WORLD_SIZE in the environment, leaves FOLDER/rank-N.pt: the gradients that
the optimiser was handed and the adapter after the step; once as the trainer does it ("through") and once with the loss
called beside the wrapper ("beside"). Built without `Job`, which refuses several processes.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).parents[1])]

import torch  # noqa: E402

from cai.training import adapter  # noqa: E402
from cai.training.forward import layout_for  # noqa: E402
from cai.training.guards import TrainingPlan  # noqa: E402
from cai.training.loss import sequence_logps  # noqa: E402
from cai.training.token_rows import tokenize_pairs  # noqa: E402
from cai.training.trainers import PairTrainer  # noqa: E402
from support.training import LORA, FakePrompt, TinyModel, dpo, make_pairs  # noqa: E402

PAIRS = 4


def one_step(folder: Path, world: int, way: str) -> dict[str, dict[str, torch.Tensor]]:
    model = TinyModel()
    model.to_lora(LORA)
    rows = tokenize_pairs(
        make_pairs(PAIRS), FakePrompt(), format="base", tokenizer=model.tokenizer, max_length=400
    ).rows
    adapter.reset(model.hf, 7)
    layout = layout_for(model)
    with torch.no_grad():
        refs = sequence_logps(model.hf, layout.collate(rows), layout.forward)[0].T.tolist()
    plan = TrainingPlan(
        rows=rows, refs=[tuple(pair) for pair in refs], order=range(PAIRS), steps=1, micro_batch=1,
        accumulation=PAIRS // world, checkpointing=False, dpo=dpo(max_steps=1, save_steps=100), seed=7,
        folder=folder, seal_facts={}, forward=layout.forward, collate=layout.collate,
        event=lambda *a, **k: None, stopped=lambda: False, progress=lambda *a: None,
    )  # fmt: skip
    found = {}

    class Trainer(PairTrainer):
        def _check_step(self, norm):
            found["grads"] = {name: p.grad.clone() for name, p in adapter.lora_parameters(self.model)}

        def _save_checkpoint(self, model, trial):
            """Rank 0's, once there are ranks; here nothing is saved."""

        def _through(self, model, method, *arguments):
            return super()._through(model, method, *arguments) if way == "through" else method(*arguments)

    Trainer(model.hf, model.hf_tokenizer, plan, model.device).train()
    found["weights"] = {name: p.detach().clone() for name, p in adapter.lora_parameters(model.hf)}
    return found


if __name__ == "__main__":
    rank, out = os.environ["RANK"], Path(sys.argv[1])
    ways = {way: one_step(out / rank, int(os.environ["WORLD_SIZE"]), way) for way in ("through", "beside")}
    torch.save(ways, out / f"rank-{rank}.pt")
