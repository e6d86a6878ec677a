"""Frozen NF4 weights as training reads them on a GPU: the own kernel, bitsandbytes' numbers to the bit."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from cai.training.frozen import Frozen  # noqa: E402
from tests.gpu.test_engine_gpu import quantised  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]


def test_training_reads_nf4_weights_by_the_own_kernel_to_the_bit():
    functional = pytest.importorskip("bitsandbytes").functional
    weights, seen = Frozen(), 0
    for module in quantised().modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            expected = functional.dequantize_4bit(module.weight.data, state)
            assert torch.equal(weights.write(module, torch.empty_like(expected)), expected)
            wide = expected.new_empty((expected.shape[0], expected.shape[1] + 64))
            assert torch.equal(weights.write(module, wide[:, :-64]), expected)
            seen += 1
    assert weights.own and seen == 28
