"""Which forward pass training uses for the loaded model, and its gradient checkpointing. Imports torch.

`packed` (training/packed.py) is ours, for Llama-shaped models in LoRA mode; `padded` runs any causal model through its
own modules. Reference, policy and evaluation share the choice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from cai.engine.foreign import HfModel
from cai.engine.model import Model
from cai.training.attention import packed_batch
from cai.training.loss import Batch, Forward, padded_batch, padded_forward
from cai.training.packed import PackedForward, refusal
from cai.training.token_rows import PairRow


@dataclass(frozen=True)
class Layout:
    """`own_checkpointing`: the forward pass checkpoints by itself. `reference_with_grad`: a pass without gradients
    would take other kernels (Unsloth's layers do), so the reference runs with gradients on and drops the graph.
    `why`: what kept the model from the packed pass."""

    name: str
    collate: Callable[[Sequence[PairRow]], Batch]
    forward: Forward
    own_checkpointing: bool
    reference_with_grad: bool
    why: str = ""


def layout_for(model: Model) -> Layout:
    """The fastest forward pass that is right for this model."""
    why = refusal(model.hf)
    if why is None:
        return Layout("packed", packed_batch, PackedForward(), True, False)
    pad_id = model.hf_tokenizer.pad_token_id
    collate = partial(padded_batch, pad_id=0 if pad_id is None else pad_id)
    return Layout("padded", collate, padded_forward, False, True, why)


def set_checkpointing(hf: HfModel, layout: Layout, on: bool) -> None:
    """Turn recomputation in the backward pass on or off, for whichever forward pass is in use."""
    if isinstance(layout.forward, PackedForward):
        layout.forward.checkpoint_layers = hf.config.num_hidden_layers if on else 0
        on = False
    if on:
        hf.enable_input_require_grads()
        hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        hf.gradient_checkpointing_disable()
        if hasattr(hf, "_require_grads_hooks"):
            hf.disable_input_require_grads()
