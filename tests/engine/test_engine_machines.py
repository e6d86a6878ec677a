"""What the engine does on machines that the authors have not: full or small cards, other builds, no compiler."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("triton")
pytestmark = pytest.mark.slow

from test_engine import PREFIX, Letters, Loaded, ScoreRequest, requests, tiny  # noqa: E402

from cai.engine import Rules, build  # noqa: E402
from cai.engine.native import attention_kernels, linears, tuning  # noqa: E402
from cai.engine.native.engine import NativeEngine  # noqa: E402
from cai.engine.native.graphs import Graphs  # noqa: E402
from cai.errors import CaiError  # noqa: E402

COUNT = len(tuning.TOKENS)


def test_the_fastest_way_that_could_be_timed_is_taken_else_the_modules():
    times = {"fused": [1.0, math.inf, math.nan] * 3, "dequant": [2.0, 2.0, math.inf] * 3}
    assert tuning.fastest(times) == ["fused", "dequant", "module"] * 3


@pytest.fixture
def nf4_decoder(monkeypatch):
    """A decoder whose linears pass for NF4, none of them copied, and nothing of it is on a GPU."""
    layer = SimpleNamespace(linears=linears.LayerLinears.of(tiny().model.layers[0]))
    monkeypatch.setattr(tuning, "is_nf4", lambda module: True)
    monkeypatch.setattr(linears.Group, "unpack", lambda group, shared, dtype: setattr(group, "nf4", group.modules))
    monkeypatch.setattr(tuning, "copy_layers", lambda *a: 0)
    monkeypatch.setattr(tuning, "right_weights", lambda groups: True)
    monkeypatch.setattr(tuning.timings, "facts", lambda *a: {})
    monkeypatch.setattr(tuning.timings, "recall", lambda *a: None)
    return SimpleNamespace(layers=[layer], dtype=torch.float32, device="cpu")


def test_a_way_that_ran_out_of_memory_is_tried_again_at_the_next_start(nf4_decoder, monkeypatch):
    """The card was full, perhaps of another process: that is no property of the card."""
    kept, failure = [], [torch.OutOfMemoryError("injected")]

    def milliseconds(run):
        if failure:
            raise failure.pop()
        return 1.0

    monkeypatch.setattr(tuning, "milliseconds", milliseconds)
    monkeypatch.setattr(tuning, "agrees", lambda *a: True)
    monkeypatch.setattr(tuning.timings, "remember", lambda *a: kept.append(a))
    assert "<=1: dequant" in tuning.choose(nf4_decoder, "auto")
    assert kept == []
    assert "<=1: fused" in tuning.choose(nf4_decoder, "auto")
    assert len(kept) == 1
    assert nf4_decoder.layers[0].linears.qkv.shared.choose(1) == "fused"
    assert nf4_decoder.layers[0].linears.qkv.shared.choose(9999) == "dequant"


def test_biases_have_the_compute_type(monkeypatch):
    """float16 weights with a bias on one of three projections: the joint bias was float32, which no product takes."""
    modules = [torch.nn.Linear(64, 4, bias=biased).half() for biased in (True, False, True)]
    modules[2].bias = torch.nn.Parameter(modules[2].bias.float())  # some loaders leave biases in float32
    codes = torch.zeros(128, dtype=torch.uint8)
    monkeypatch.setattr(linears, "nf4_of", lambda module: linears.Nf4(codes, codes, codes, (4, 64)))
    group = linears.Group(modules)
    group.unpack(linears.Shared(), torch.float16)
    assert group.bias.dtype == torch.float16
    assert group.bias.tolist() == [*modules[0].bias.tolist(), 0, 0, 0, 0, *modules[2].bias.tolist()]


def test_int8_anywhere_means_no_graph():
    """Loaders leave some projections alone; the first one says nothing of the others."""
    int8 = type("Linear8bitLt", (torch.nn.Linear,), {})(4, 4)
    groups = [SimpleNamespace(modules=[torch.nn.Linear(4, 4)]), SimpleNamespace(modules=[int8])]
    engine = SimpleNamespace(stats=SimpleNamespace(batch_size=4), groups=groups)
    assert Graphs(engine).eager
    engine.groups = groups[:1]
    assert not Graphs(engine).eager


def test_a_graph_serves_only_the_rules_it_was_captured_under(monkeypatch):
    """lm_eval draws without the recipe's rules over the same engine: it got graphs that still had them."""
    attached = SimpleNamespace(signature=())
    engine = SimpleNamespace(stats=SimpleNamespace(batch_size=4), groups=[], rules=Rules(0.1), attached=attached)
    graphs, captured = Graphs(engine), []

    def capture(bucket):
        captured.append((bucket, engine.rules))
        return SimpleNamespace(replay=lambda: None), len(captured)

    monkeypatch.setattr(graphs, "_capture", capture)
    assert [graphs.run(3), graphs.run(4)] == [1, 1]
    engine.rules = Rules()
    assert graphs.run(3) == 2
    engine.rules = Rules(0.1)
    assert graphs.run(3) == 1
    assert captured == [(4, Rules(0.1)), (4, Rules())]


@pytest.mark.parametrize(
    "dim,dtype,stages", [(128, torch.bfloat16, 3), (256, torch.bfloat16, 1), (128, torch.float32, 1)]
)
def test_long_keys_are_not_pipelined(dim, dtype, stages):
    assert attention_kernels.pipeline_stages(torch.empty(2, 4, dim, dtype=dtype)) == stages


def test_what_the_cache_cannot_hold_is_refused_with_that_reason():
    engine = NativeEngine(tiny(), Letters(), batch_size=2)
    engine.cache.blocks, engine.cache.block_tokens = 1, 20  # a card with room for 20 tokens
    with pytest.raises(CaiError, match="memory has room for 19"):
        engine.submit(requests(4)[1])
    with pytest.raises(CaiError, match="score request 3 needs 25 tokens, memory has room for 19"):
        list(engine.score([ScoreRequest(3, tuple(range(20)), (1, 2, 3, 4, 5))]))


def test_a_stop_while_scoring_sets_up_no_further_prefix():
    engine = NativeEngine(tiny(), Letters(), batch_size=2)
    wanted = [ScoreRequest(i, (i // 2, *PREFIX), (1,), len(PREFIX)) for i in range(8)]
    assert list(engine.score(wanted, lambda: True)) == []
    assert engine.stats.prompt_tokens_computed == 0


def test_memory_that_runs_out_over_a_prefix_is_tried_once_more(monkeypatch):
    engine = NativeEngine(tiny(), Letters(), batch_size=2)
    first, second = ([ScoreRequest(i, (at, *PREFIX, i), (1,), len(PREFIX)) for i in range(2)] for at in (5, 6))
    expected = {score.id: score.logps for score in engine.score(second)}
    engine.store.parts.clear()
    list(engine.score(first))
    real, faults = engine.prefill, [torch.OutOfMemoryError("injected")]

    def tight(*args):
        if faults:
            raise faults.pop()
        return real(*args)

    monkeypatch.setattr(engine, "prefill", tight)
    assert {score.id: score.logps for score in engine.score(second)} == expected
    assert engine.stats.out_of_memory == 1
    assert len(engine.cache.free) == engine.cache.blocks


def test_no_compiler_for_the_kernels_is_one_line(monkeypatch):
    """Triton's own words; any other error keeps its traceback."""

    def failing(words):
        def init(*a, **k):
            raise RuntimeError(words)

        monkeypatch.setattr(NativeEngine, "__init__", init)

    failing("Failed to find C compiler. Please specify via CC environment variable or set triton.knobs.build.impl.")
    with pytest.raises(CaiError, match="no C compiler, which Triton needs"):
        build.make_engine("auto", Loaded(tiny()))
    failing("something else")
    with pytest.raises(RuntimeError, match="something else"):
        build.make_engine("auto", Loaded(tiny()))


def test_what_was_chosen_is_said_with_its_reason():
    """A model that native cannot run: static batches, many times slower, and nobody was told."""
    from cai.models.policy import LoadedModel
    from cai.recipe.settings import EngineSection

    said, odd = [], tiny()
    odd.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    for hf in (tiny(), odd):
        model = LoadedModel(hf, None, Letters(), "base", "embedded", "tiny", "cpu", 256, say=said.append)
        model.engine(EngineSection())
    assert len(said) == 1
    assert said[0].startswith("engine: static batches, since native cannot run this model: rotary embedding 'dynamic'")


@pytest.mark.parametrize(("waves", "timed"), [(1, {"3": 1000.0}), (2, {})])
def test_a_step_is_timed_only_where_all_rows_fit(monkeypatch, waves, timed):
    """Rows that enter later end later: 256 rows under 80 GB once took -1.81 ms a step."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    import decode_step

    clock, stats = iter((64.0, 0.0, 64.0)), SimpleNamespace(batch_size=3, decode_steps=7)
    monkeypatch.setattr(decode_step, "time", SimpleNamespace(monotonic=lambda: next(clock)))

    def completions():
        stats.decode_steps += 71 * waves
        yield from (SimpleNamespace(id=i) for i in (1, 2, 0))

    engine = SimpleNamespace(stats=stats, submit=lambda request: None, completions=completions)
    assert decode_step.step_times(engine, [3, 4], 1.0) == timed
