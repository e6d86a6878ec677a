"""What is kept of a card's timings comes back as it was, or not at all."""

from __future__ import annotations

import math

import orjson
import pytest

from cai.engine.native import timings

FACTS = {"card": "some card", "memory": 80 << 30, "versions": {"torch": "2.13.0"}, "linears": "auto"}
TOKENS = (1, 16, 512)
TIMES = {"fused": [1.5, 2.5, math.inf], "dequant": [20.0, 21.0, 40.25]}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CAI_CACHE", str(tmp_path))
    return tmp_path


def test_timings_come_back_and_other_facts_have_none():
    assert timings.recall(FACTS, TOKENS) is None
    timings.remember(FACTS, TIMES, TOKENS)
    assert timings.recall(FACTS, TOKENS) == TIMES
    assert timings.recall(FACTS | {"card": "another"}, TOKENS) is None
    assert timings.recall(FACTS, (1, 16, 256)) is None


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"[]", b"null", b'{"ms": {}}', b'{"ms": {"fused": [1.0]}, "tokens": [1, 16, 512]}'],
)
def test_a_damaged_file_is_measured_again(damage):
    timings.remember(FACTS, TIMES, TOKENS)
    timings.path_of(FACTS).write_bytes(damage)
    assert timings.recall(FACTS, TOKENS) is None


@pytest.mark.parametrize("value", [0, -1.0, "fast", [1]])
def test_no_time_but_a_positive_number_is_believed(value):
    timings.remember(FACTS, TIMES, TOKENS)
    path = timings.path_of(FACTS)
    kept = orjson.loads(path.read_bytes())
    kept["ms"]["fused"][0] = value
    path.write_bytes(orjson.dumps(kept))
    assert timings.recall(FACTS, TOKENS) is None


def test_a_cache_that_cannot_be_written_is_no_fault(tmp_path):
    (tmp_path / "cai").write_text("a file where the folder should be")
    timings.remember(FACTS, TIMES, TOKENS)
    assert timings.recall(FACTS, TOKENS) is None


def test_a_library_under_another_name_has_no_version():
    """Nightly builds of torch bring `pytorch-triton`: the engine starts all the same."""
    assert timings.version("orjson")
    assert timings.version("a-name-that-nobody-installed") == ""


def test_a_new_driver_or_another_choice_of_ways_is_measured_again(monkeypatch, tmp_path):
    from types import SimpleNamespace

    torch = pytest.importorskip("torch")
    card = SimpleNamespace(name="some card", total_memory=1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    decoder = SimpleNamespace(
        device="cuda", dtype=torch.bfloat16, layers=[SimpleNamespace(linears=SimpleNamespace(groups=[]))]
    )
    paths = [timings.path_of(timings.facts(decoder, 0, "auto")) for _ in range(2)]
    monkeypatch.setattr(timings, "driver", lambda: "another driver")
    paths.append(timings.path_of(timings.facts(decoder, 0, "auto")))
    for changed in ("tuning.py", "linears.py", "int8.py"):
        real = timings.source
        monkeypatch.setattr(timings, "source", lambda name, c=changed, r=real: r(name) + b"#" * (name == c))
        paths.append(timings.path_of(timings.facts(decoder, 0, "auto")))
    assert paths[0] == paths[1] and len(set(paths)) == 5
