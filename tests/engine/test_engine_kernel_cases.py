"""The Triton kernels against plain torch: in Triton's interpreter on a CPU (small shapes), compiled on a GPU.

Expected values come from float64 or from the eager operations of `attention`, on fresh random inputs.
"""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1" and not os.path.exists("/dev/nvidiactl"):  # without torch
    pytest.skip("run by test_engine_kernels.py in a process of its own", allow_module_level=True)
torch = pytest.importorskip("torch")
GPU = torch.cuda.is_available()
if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by test_engine_kernels.py in a process of its own", allow_module_level=True)
pytest.importorskip("triton")

from cai.engine import sampling  # noqa: E402
from cai.engine.native import attention, fp8, int8, kernels, nf4  # noqa: E402
from cai.engine.native.linears import Nf4  # noqa: E402
from cai.engine.native.rounded import round_into  # noqa: E402

DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32
TOLERANCE = 1e-2 if GPU else 1e-5


def close(out, expected, tolerance=TOLERANCE):
    out, expected = out.double(), expected.double()
    assert torch.isfinite(out).all()
    error = ((out - expected).norm() / expected.norm().clamp(min=1e-12)).item()
    assert error < tolerance, error


def random(*shape, dtype=DTYPE):
    return torch.randn(*shape).to(DEVICE, dtype)


@pytest.mark.parametrize("rows,width", [(1, 64), (3, 576)])
def test_norms_and_activation_equal_eager(rows, width):
    x, residual, weight = random(rows, width), random(rows, width), random(width)
    close(kernels.rms_norm(x, weight, 1e-5), attention.rms_norm(x, weight, 1e-5))
    for out, expected in zip(
        kernels.add_rms_norm(x, residual, weight, 1e-5),
        attention.add_rms_norm(x, residual, weight, 1e-5),
        strict=True,
    ):
        close(out, expected)
    both = random(rows, 2 * width)
    gate, up = both.split(width, -1)
    close(kernels.silu_mul(gate, up), attention.silu_mul(gate, up))
    close(kernels.gelu_mul(gate, up), attention.gelu_mul(gate, up))
    once = weight.float() + 1  # multiplied before the result is rounded
    close(kernels.rms_norm(x, once, 1e-5), attention.rms_norm(x, once, 1e-5))


def test_draws_equal_sampling_pick():
    rows, vocab = 4, 9001
    logits = random(rows, vocab, dtype=torch.float32) * 3
    temperatures = torch.tensor([0.0, 0.3, 0.7, 1.0], device=DEVICE)
    seeds = sampling.seed_tensor([1, 2**63 + 5, -7, 123456789], DEVICE)
    for position in range(5):
        positions = torch.full((rows,), position, device=DEVICE)
        drawn = kernels.pick(logits, temperatures, seeds, positions)
        assert drawn.tolist() == sampling.pick(logits, temperatures, seeds, positions).tolist()


def random_nf4(outputs, k):
    codes = torch.randint(0, 256, (outputs * k // 2,), dtype=torch.uint8).to(DEVICE)
    absmax = torch.rand(outputs * k // 64).to(DEVICE) + 0.5
    table = torch.tensor(nf4.NF4, device=DEVICE)
    weight = Nf4(codes, absmax, table, (outputs, k))
    flat = torch.stack((codes >> 4, codes & 15), 1).flatten().long()
    dense = (table.double()[flat].view(-1, 64) * absmax.double()[:, None]).view(outputs, k)
    return weight, dense


@pytest.mark.parametrize("outputs,k", [(1, 64), (33, 192), (70, 1088)])
def test_dequantise_equals_table_times_scale(outputs, k):
    weight, dense = random_nf4(outputs, k)
    out = torch.full((outputs, k), float("nan"), dtype=DTYPE, device=DEVICE)
    nf4.dequantise(weight, out)
    assert torch.equal(out, dense.float().to(DTYPE)) or GPU
    close(out, dense, 4e-3 if GPU else 1e-6)


@pytest.mark.parametrize("outputs,k,stride", [(1, 64, 128), (33, 192, 256), (70, 1088, 1096)])
def test_rows_may_lie_apart_and_what_is_between_them_is_left_alone(outputs, k, stride):
    weight, _ = random_nf4(outputs, k)
    dense = nf4.dequantise(weight, torch.empty((outputs, k), dtype=DTYPE, device=DEVICE))
    wide = torch.full((outputs + 1, stride), 7.0, dtype=DTYPE, device=DEVICE)
    assert torch.equal(nf4.dequantise(weight, wide[:outputs, :k]), dense)
    assert (wide[:outputs, k:] == 7.0).all() and (wide[outputs] == 7.0).all()


@pytest.mark.parametrize("tokens", [1, 3, 17, 65, 130, 300])
@pytest.mark.parametrize("outputs,k", [((65,), 128), ((40,), 1088), ((70, 33, 8), 576)])
@pytest.mark.parametrize("biased", [False, True])
def test_fused_product_equals_float64(tokens, outputs, k, biased):
    weights, dense = zip(*(random_nf4(count, k) for count in outputs), strict=True)
    x, bias = random(tokens, k), random(sum(outputs)) if biased else None
    expected = x.double() @ torch.cat(dense).T + (bias.double() if biased else 0)
    close(nf4.fused_linears(x, list(weights), bias), expected)


@pytest.mark.skipif(not GPU, reason="the interpreter knows no assembler")
def test_permutes_give_every_code_of_the_table_to_the_bit():
    """The product with unit vectors is the weight itself: every pair of codes, in every place of four bytes."""
    k = 1024
    codes = torch.arange(256, dtype=torch.uint8).repeat(4, 1)
    codes = torch.stack([row.roll(shift) for shift, row in enumerate(codes)]).repeat(1, 2).flatten().to(DEVICE)
    weight = Nf4(codes, torch.ones(4 * k // 64, device=DEVICE), torch.tensor(nf4.NF4, device=DEVICE), (4, k))
    dense = torch.empty(4, k, dtype=torch.bfloat16, device=DEVICE)
    nf4.dequantise(weight, dense)
    identity = torch.eye(k, dtype=torch.bfloat16, device=DEVICE)
    assert torch.equal(nf4.fused_linears(identity, [weight], None).T, dense)


def test_the_table_is_bitsandbytes_own():
    functional = pytest.importorskip("bitsandbytes.functional")
    assert functional.get_4bit_type("nf4", device="cpu").tolist() == [float(v) for v in torch.tensor(nf4.NF4)]


# -- 8-bit copies


@pytest.mark.parametrize("rows,width", [(1, 64), (7, 576), (3, 1000), (2, 5120)])
def test_rows_are_rounded_to_three_bits_of_mantissa_each_with_its_own_scale(rows, width):
    x = random(rows, width)
    x[0] *= 1e-6
    x[-1] *= 3e4
    rounded = fp8.round_rows(x)
    assert rounded.values.dtype == torch.float8_e4m3fn and rounded.values.shape == x.shape
    assert rounded.scales.shape == (rows, 1)
    assert (rounded.values.float().abs().amax(1) == 448).all()  # the whole range is used
    back, largest = rounded.values.double() * rounded.scales.double(), x.double().abs().amax(1, keepdim=True)
    assert torch.allclose(back.abs().amax(1, keepdim=True), largest, rtol=1e-6)
    error = (back - x.double()).abs()
    assert (error <= x.double().abs() / 16 + largest / 448 * 2**-9).all()  # half a step, or half the smallest step
    assert (error.norm(dim=1) > 1e-3 * x.double().norm(dim=1)).all()  # it was rounded at all


def test_a_view_of_a_wider_tensor_is_rounded_row_by_row():
    wide = random(5, 192)
    part, alone = fp8.round_rows(wide[:, 64:128]), fp8.round_rows(wide[:, 64:128].contiguous())
    assert torch.equal(part.values.float(), alone.values.float()) and torch.equal(part.scales, alone.scales)


def test_rows_of_zeros_and_of_no_number():
    x = torch.zeros(3, 64, device=DEVICE, dtype=DTYPE)
    x[1, 5] = float("nan")
    rounded = fp8.round_rows(x)
    back = rounded.values.float() * rounded.scales
    assert (back[0] == 0).all() and (back[2] == 0).all()
    assert torch.isnan(back[1]).any()  # a fault stays visible


needs_fp8 = pytest.mark.skipif(GPU and torch.cuda.get_device_capability() < (8, 9), reason="a card without fp8")


@needs_fp8
@pytest.mark.parametrize("tokens", [1, 3, 16, 130])
@pytest.mark.parametrize("outputs,k,biased", [(48, 64, False), (160, 576, True), (1024, 320, True)])
def test_the_8_bit_product_is_that_of_the_rounded_rows(tokens, outputs, k, biased):
    x, w = random(tokens, k, dtype=torch.bfloat16), random(outputs, k, dtype=torch.bfloat16)
    x[:, 0] *= 5  # a channel that stands out
    bias = random(outputs, dtype=torch.bfloat16) if biased else None
    x8, w8 = fp8.round_rows(x), fp8.round_rows(w)
    exact = (x8.values.double() * x8.scales.double()) @ (w8.values.double() * w8.scales.double()).T
    out = fp8.product(x8, w8, bias)
    assert out.dtype == torch.bfloat16
    close(out, exact if bias is None else exact + bias.double(), 1e-2)
    plain = x.double() @ w.double().T + (0 if bias is None else bias.double())
    close(out, plain, 0.08)


@needs_fp8
def test_a_row_s_8_bit_product_does_not_depend_on_the_other_rows():
    x, w8 = random(32, 256, dtype=torch.bfloat16), fp8.round_rows(random(64, 256, dtype=torch.bfloat16))
    together = fp8.product(fp8.round_rows(x), w8, None)
    x[1:] *= 1000
    close(fp8.product(fp8.round_rows(x), w8, None)[0], together[0], 5e-3)


@pytest.mark.parametrize(("rows", "width"), [(1, 64), (7, 576), (3, 1000)])
def test_rows_in_int8_equal_plain_torch(rows, width):
    x = random(rows, width)
    x[-1] *= 3e4
    values = torch.zeros((int8.padded(rows), width), dtype=torch.int8, device=DEVICE)
    found = round_into(values, x, int8.LARGEST, whole=True)
    expected = int8.round_rows_eagerly(x)
    close(found.scales, expected.scales)
    assert ((values.int() - expected.values.int()).abs() <= 1).all()  # a tie may fall to the other side
    assert (values != expected.values).float().mean() < 1e-3


@pytest.mark.parametrize("biased", [False, True])
def test_integer_sums_are_scaled_back(biased):
    sums = torch.randint(-(1 << 24), 1 << 24, (24, 48), dtype=torch.int32, device=DEVICE)
    x_scales, w_scales = (torch.rand(n, 1).to(DEVICE) + 0.5 for n in (3, 40))
    bias = random(40, dtype=torch.bfloat16) * 1e6 if biased else None
    out = torch.empty((3, 40), dtype=torch.bfloat16, device=DEVICE)  # to which the interpreter truncates
    given = out if bias is None else bias
    int8._scale_back[(3, 3)](sums, x_scales, w_scales, given, out, 48, 40, biased, 16)
    close(out, int8.scaled_back_eagerly(sums, x_scales, w_scales, bias), 1e-3 if GPU else 5e-3)


@pytest.mark.skipif(not GPU, reason="tests/test_engine_int8.py has the arithmetic on a CPU")
@pytest.mark.parametrize("tokens", [1, 16, 17, 131, 512])
@pytest.mark.parametrize(("outputs", "k", "biased"), [(48, 64, False), (160, 576, True), (7168, 5120, True)])
def test_the_int8_product_equals_that_of_a_cpu(tokens, outputs, k, biased):
    x, w = random(tokens, k), random(outputs, k)
    bias = random(outputs) if biased else None
    out = int8.product(int8.round_rows(x), int8.round_rows(w), bias)
    plain = x.double() @ w.double().T + (0 if bias is None else bias.double())
    close(out, plain, 0.02)
    x8, w8 = (int8.round_rows_eagerly(t.cpu()) for t in (x, w))
    close(out.cpu(), int8.product(x8, w8, None if bias is None else bias.cpu()), 2e-3)
