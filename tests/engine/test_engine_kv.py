"""Who gets keys and values in 8 bits, what is said where nothing comes of the wish, and that what measures is exact."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

from paged import paged  # noqa: E402
from test_engine import Letters, Loaded, complete, requests, tiny  # noqa: E402

from cai.engine import build  # noqa: E402
from cai.engine.native.cache import KVShape  # noqa: E402
from cai.engine.native.engine import NativeEngine  # noqa: E402
from cai.models.policy import LoadedModel  # noqa: E402
from cai.recipe.settings import EngineSection  # noqa: E402

UNUSED = 'kv: 16 bits or more; "int8" is for the native engine on a GPU'


@pytest.mark.parametrize("name", ["native", "static", "reference"])
def test_on_a_cpu_nothing_comes_of_it_and_that_is_said(name):
    asked, plain = (build.make_engine(name, Loaded(tiny()), batch_size=4, kv=kv) for kv in ("int8", "auto"))
    assert asked.stats.extra["kv"] == UNUSED and "kv" not in plain.stats.extra
    if name == "native":
        assert complete(asked, requests()) == complete(plain, requests())
        assert asked.cache.keys.dtype == torch.float32 and asked.exact is asked.cache


def test_the_wish_reaches_the_engine(monkeypatch):
    from cai.engine.native import engine as native

    class Engine(NativeEngine):
        def __init__(self, *args, **options):
            given.append(options["kv"])
            super().__init__(*args, **options)
            self.stats.extra["kv"] = "as it is"

    given: list[str] = []
    monkeypatch.setattr(native, "NativeEngine", Engine)
    assert build.make_engine("auto", Loaded(tiny()), kv="int8").stats.extra["kv"] == "as it is" and given == ["int8"]


def test_only_who_makes_data_gets_it(monkeypatch):
    asked, closed, said = [], [], []

    def make(name, model, *, batch_size, linears, kv):
        asked.append((linears, kv))
        return SimpleNamespace(stats=SimpleNamespace(extra={"kv": kv}), close=lambda: closed.append(kv))

    monkeypatch.setattr(build, "make_engine", make)
    model = LoadedModel(tiny(), None, Letters(), "base", "embedded", "tiny", "cpu", 256, say=said.append)
    section = EngineSection(linears="bf16", kv="int8")
    first = model.engine(section, rounded=True)
    assert model.engine(section, rounded=True) is first and asked == [("bf16", "int8")] and said == ["engine: int8"]
    measuring = model.engine(section)
    assert measuring is not first and asked[1:] == [("bf16", "auto")] and closed == ["int8"]
    assert model.engine(EngineSection(linears="bf16"), rounded=True) is measuring


@pytest.mark.parametrize(("rounding", "dtype"), [("fp8", torch.float32), ("", torch.int8)])
def test_rows_whose_own_tokens_are_rounded_have_their_prefix_also_alone(rounding, dtype):
    """Else a row that comes back alone would draw another text than beside others of its prefix."""
    engine = SimpleNamespace(shared=SimpleNamespace(rounding=rounding), drawn=KVShape(1, 1, 16, dtype))
    assert NativeEngine.rounds.fget(engine)
    engine = SimpleNamespace(shared=SimpleNamespace(rounding=""), drawn=KVShape(1, 1, 16, torch.float32))
    assert not NativeEngine.rounds.fget(engine)


def test_closing_lets_both_caches_and_the_store_go():
    engine = paged(apart=20)
    assert complete(engine, requests())
    left = [weakref.ref(thing) for thing in (engine.cache, engine.exact, engine.store, engine.state, engine.scheduler)]
    engine.gpu = False  # no device to wait for
    engine.close()
    gc.collect()
    assert [thing() for thing in left] == [None] * 5
