"""Preflight lines: each verdict from planted facts, and the padding check against engines that are wrong on purpose."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest

from cai import session
from cai.engine import Completion, Score
from cai.errors import USAGE, CaiError
from cai.models.policy import resolve_name
from cai.preflight import machine as doctor
from cai.preflight import model_checks as doctor_model
from cai.preflight.model_checks import Check
from cai.recipe.load import Recipe
from cai.recipe.settings import BudgetSection, LoraSection, ModelSection

QWEN_32B = {
    "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 40,
    "num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False,
}  # fmt: skip


def recipe(quantization="nf4", **changes):
    return Recipe(model=ModelSection(quantization=quantization), **changes)


def test_versions():
    pinned = {"torch": "2.13.0", "trl": "1.15.0"}
    assert doctor.versions_check({"torch": "2.13.0+cu130", "trl": "1.15.0"}, pinned).status == "ok"
    assert doctor.versions_check({"torch": "2.11.0", "trl": "1.15.0"}, pinned).status == "warn"
    changed = doctor.versions_check({"torch": "2.13.0", "trl": "1.14.0"}, pinned)
    assert changed.status == "fail" and "trl 1.14.0 (pinned 1.15.0)" in changed.seen
    assert "not installed" in doctor.versions_check({"torch": ""}, pinned).seen


def test_the_pins_are_read_from_the_requirements():
    assert doctor.pins(doctor.ROOT / "requirements.txt")["trl"] == "1.15.0"
    assert doctor.pins(doctor.ROOT / "requirements-unsloth.txt")["unsloth"] == "2026.10.9"


@pytest.mark.parametrize(
    ("supports", "built", "status", "part"),
    [
        ((13, 0), "13.0", "ok", "torch is built for 13.0"),
        ((12, 4), "12.6", "ok", "supports CUDA 12.4"),
        ((12, 8), "13.0", "fail", "make setup TORCH_INDEX_URL=<the index of torch's cu128 builds>"),
        ((12, 4), "13.0", "fail", "cu128"),
        ((11, 8), "12.6", "fail", "install a newer driver"),
        ((13, 0), "", "fail", "CPU build"),
        ((0, 0), "13.0", "fail", "no NVIDIA driver"),
    ],
)
def test_an_older_driver_is_named_with_the_command_that_helps(supports, built, status, part):
    check = doctor.driver_check("550.54", supports, built)
    assert check.status == status and part in check.seen


def test_memory_arithmetic_of_32b():
    """31.2e9 linear weights x 0.516 + 1.56e9 others x 2 bytes = 17.9 GiB (17.9 measured on an H200)."""
    size = doctor.size_of(QWEN_32B, "")
    assert size.linear == 64 * (2 * 5120 * 5120 + 2 * 5120 * 1024 + 3 * 5120 * 27648)
    assert size.per_rank * 32 == 268_435_456  # as counted on the model itself
    assert size.weights_gib("nf4") == pytest.approx(17.9, abs=0.1)
    assert size.weights_gib("bf16") == pytest.approx(61.0, abs=0.1)
    assert doctor.memory_check(recipe(), QWEN_32B, 79.0).status == "ok"
    assert doctor.memory_check(recipe(), QWEN_32B, 26.0).status == "warn"
    small = doctor.memory_check(recipe(), QWEN_32B, 22.0)
    assert small.status == "fail" and "Set lora.rank = 8 (and lora.alpha = 16)" in small.seen
    assert "Rent a larger card" in doctor.memory_check(recipe(), QWEN_32B, 15.0).seen
    assert doctor.memory_check(recipe(lora=LoraSection(rank=8)), QWEN_32B, 23.5).status == "warn"
    too_wide = doctor.memory_check(recipe("bf16"), QWEN_32B, 44.0)
    assert too_wide.status == "fail" and 'Set model.quantization = "int8"' in too_wide.seen


def test_size_from_a_name_and_from_nothing():
    guessed = doctor.size_of({}, "Qwen/Qwen2.5-32B")
    assert guessed.weights_gib("nf4") == pytest.approx(17.9, rel=0.1)
    assert doctor.size_of({}, "someone/model") is None
    assert doctor.memory_check(Recipe(model=ModelSection(name="someone/model")), {}, 80.0).status == "warn"


def test_config_of_a_local_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN_32B))
    assert doctor.local_config(str(tmp_path)) == QWEN_32B
    (tmp_path / "config.json").write_text("{")
    assert doctor.local_config(str(tmp_path)) == {} == doctor.local_config("nobody/nothing")


def test_price_and_disk(tmp_path, monkeypatch):
    assert doctor.price_check(recipe(budget=BudgetSection(usd_per_hour=1.74))).seen == "$1.74 an hour"
    assert doctor.price_check(recipe(budget=BudgetSection(usd_per_hour=0.0))).status == "warn"
    found = {c.name: c.status for c in doctor.disk_checks(recipe(), "embedded", tmp_path / "runs" / "deep")}
    assert found["disk for runs"] == "ok" and "write speed" in found and not list(tmp_path.iterdir())
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    assert next(doctor.disk_checks(recipe(), "cuda", tmp_path)).status == "fail"
    assert doctor.download_check(doctor.size_of(QWEN_32B, ""), "nf4").status == "fail"


def test_preflight_stops_with_every_failed_line():
    checks = [
        Check("a", "ok", "x"),
        Check("b", "fail", "broken. Run: c"),
        Check("d", "warn", "odd"),
        Check("e", "fail", "z"),
    ]
    events, said = [], []
    with pytest.raises(CaiError) as caught:
        doctor.preflight("machine", iter(checks), lambda kind, **fields: events.append((kind, fields)), said.append)
    assert str(caught.value) == "preflight: b: broken. Run: c\npreflight: e: z" and caught.value.code == USAGE
    assert events[0][1]["checks"]["d"] == "warn: odd" and said == ["warn  d                     odd"]


def gpu(monkeypatch, gib, major=8, available=True):
    """A torch that sees one card of so many GiB."""
    cuda = SimpleNamespace(
        is_available=lambda: available,
        is_initialized=lambda: False,
        get_device_properties=lambda n: SimpleNamespace(name="card", total_memory=gib * 2**30, major=major, minor=0),
        mem_get_info=lambda device=None: (gib * 2**30, gib * 2**30),
        memory_reserved=lambda device=None: 0,
        memory_allocated=lambda device=None: 0,
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))


def test_f30_no_weights_no_disk_no_bf16_wrong_gpu(monkeypatch, tmp_path):
    """Each ends before anything is spent: exit 2, one line with the numbers or the remedy."""
    config = dict(QWEN_32B)
    monkeypatch.setattr(doctor, "local_config", lambda name: config)

    def seen(**card):
        gpu(monkeypatch, **card)
        return {check.name: check for check in doctor.gpu_checks(recipe())}

    assert {check.status for check in seen(gib=80).values()} == {"ok"}
    old = seen(gib=80, major=7)["bf16"]
    assert old.status == "fail" and "rent an Ampere or newer card" in old.seen
    small = seen(gib=16)["memory"]
    assert small.status == "fail" and "of 16.0 free" in small.seen and "Rent a larger card" in small.seen
    assert seen(gib=80, available=False)["GPU"].status == "fail"
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    checks = [*seen(gib=16).values(), *doctor.disk_checks(recipe(), "cuda", tmp_path)]
    with pytest.raises(CaiError) as caught:
        doctor.preflight("machine", iter(checks), lambda *a, **k: None, lambda line: None)
    assert caught.value.code == USAGE and "memory" in str(caught.value) and "disk for runs" in str(caught.value)
    with pytest.raises(CaiError, match=r"model\.name: .*none: no such folder") as caught:
        resolve_name(ModelSection(name=str(tmp_path / "none")), print)
    assert caught.value.code == USAGE


def test_a_gpu_run_asks_before_it_loads(monkeypatch, tmp_path):
    """A failed line of the machine's preflight ends the run with exit 2; the weights are not touched."""
    loaded, events = [], []
    monkeypatch.setattr(doctor, "machine_checks", lambda *given: iter([Check("driver", "fail", "too old. Run: x")]))
    monkeypatch.setattr(session, "load", lambda *given, **more: loaded.append(given))
    source = SimpleNamespace(folder=tmp_path)
    inputs = SimpleNamespace(recipe=recipe(), backend="cuda", source=source, prompts={})
    run = SimpleNamespace(status=lambda **fields: None, event=lambda kind, **fields: events.append(kind), manifest={})
    with pytest.raises(CaiError, match="preflight: driver: too old") as caught:
        session.ModelOnDemand(inputs, run)()
    assert caught.value.code == USAGE and loaded == [] and events == ["preflight"]


# --- padding


class Engine:
    """Continues a prompt with tokens of a table; scores a token by how far it is from the right one."""

    name = "stub"

    def __init__(self, table, nats_a_step=4.0):
        self.table, self.nats, self.queue = table, nats_a_step, []

    def submit(self, request):
        self.queue.append(request)

    def completions(self, stopped=None):
        queue, self.queue = self.queue, []
        for request in queue:
            ids = self.table(request.token_ids, len(queue))
            yield Completion(request.id, tuple(ids), "", "length")

    def score(self, requests, stopped=None):
        for request in requests:
            right = self.table(request.context_ids[:3], 1)[len(request.context_ids) - 3]
            yield Score(request.id, (-self.nats * abs(request.continuation_ids[0] - right),))

    def close(self):
        pass


def padding(batch_table, nats=4.0, backend="cuda"):
    from cai.engine import build

    alone = Engine(lambda ids, size: [ids[0] + i for i in range(8)], nats)
    model = SimpleNamespace(engine=lambda section: Engine(batch_table), backend=backend)
    real = build.make_engine
    build.make_engine = lambda *_a, **_k: alone
    try:
        return doctor_model.padding_check(model, recipe(), [(10, 11, 12), (20, 21, 22), (30, 31, 32)])
    finally:
        build.make_engine = real


def right(ids, size):
    return [ids[0] + i for i in range(8)]


def wrong_for_the_second(ids, size):
    return [ids[0] + i + (i > 3 and size > 1 and ids[0] == 20) for i in range(8)]


def test_padding_that_agrees():
    assert padding(right).status == "ok"


def test_padding_garbage_fails_and_a_near_tie_does_not():
    garbage = padding(wrong_for_the_second)
    assert garbage.status == "fail" and "4.00 nats" in garbage.seen
    tie = padding(wrong_for_the_second, nats=0.1)
    assert tie.status == "ok" and "1 differ at a near tie (at most 0.100 nats)" in tie.seen
    assert padding(wrong_for_the_second, nats=0.1, backend="embedded").status == "fail"


def wishing(linears, **model):
    made = recipe()
    update = {"engine": made.engine.model_copy(update={"linears": linears})}
    return made.model_copy(update=update | {"model": made.model.model_copy(update={"name": "some-32B", **model})})


@pytest.mark.parametrize(
    ("linears", "nats", "status", "words"),
    [
        ("fp8", 0.034, "ok", "KL 0.0340 nats a token"),
        ("fp8", 0.11, "warn", 'More than 0.1: engine.linears = "auto"'),
        ("fp8", float("nan"), "warn", 'engine.linears = "auto"'),
        ("fp8", 0.0, "warn", "nothing is rounded"),  # a CPU, or an adapter that only the modules compute
        ("int8", 0.034, "ok", "KL 0.0340 nats a token"),
        ("int8", 0.11, "fail", 'More than 0.1: engine.linears = "auto"'),
        ("int8", float("nan"), "fail", 'engine.linears = "auto"'),
    ],
)
def test_what_8_bit_drawing_changes_is_measured_and_said(monkeypatch, linears, nats, status, words):
    from cai.engine.native import scoring

    seen = []
    monkeypatch.setattr(scoring, "divergence", lambda engine, ids: seen.append(ids) or (nats, 0.9))
    section = wishing(linears).engine
    check = doctor_model.rounding_check(SimpleNamespace(name="native"), [(1, 2), (1, 2, 3)], section)
    assert (check.status, seen) == (status, [(1, 2, 3)]) and words in check.seen
    said: list[str] = []
    if status != "fail":
        doctor.preflight("model", iter([check]), lambda *a, **k: None, said.append)
        assert said == [check.line()]  # the price of rounding is on screen, however low
    other = doctor_model.rounding_check(SimpleNamespace(name="static"), [(1, 2)], section)
    assert (
        other.status == "warn" and f'nothing is rounded: engine.linears = "{linears}"' in other.seen and len(seen) == 1
    )


@pytest.mark.parametrize(("linears", "status"), [("auto", "fail"), ("fp8", "fail"), ("fused", "fail")])
def test_8_bit_keys_and_values_are_measured_and_named_with_the_products(monkeypatch, linears, status):
    from cai.engine.native import scoring

    monkeypatch.setattr(scoring, "divergence", lambda engine, ids: (0.2, 0.5))
    section = wishing(linears).engine.model_copy(update={"kv": "int8"})
    check = doctor_model.rounding_check(SimpleNamespace(name="native"), [(1, 2)], section)
    assert check.status == status and 'engine.kv = "auto" draws exactly' in check.seen
    assert ('engine.linears = "auto" and' in check.seen) == (linears == "fp8")
    monkeypatch.setattr(scoring, "divergence", lambda engine, ids: (0.0, 1.0))
    unused = doctor_model.rounding_check(SimpleNamespace(name="native"), [(1, 2)], section)
    assert 'engine.kv = "int8" is for the native engine on a GPU' in unused.seen


@pytest.mark.parametrize("linears", ["fp8", "int8", "auto"])
def test_it_is_measured_where_the_recipe_asks_for_it(monkeypatch, linears):
    asked = []
    for name in ("sample_prompts", "prompt_check", "padding_check", "stop_check"):
        monkeypatch.setattr(doctor_model, name, lambda *a: {"answers": (1, 2)})
    monkeypatch.setattr(doctor_model, "training_checks", lambda *a: iter(()))
    monkeypatch.setattr(doctor_model, "rounding_check", lambda engine, texts, linears: "measured")
    model = SimpleNamespace(
        backend="cuda", release=lambda: None, engine=lambda section, rounded: asked.append((section.linears, rounded))
    )
    found = list(doctor_model.model_checks(model, wishing(linears), {}))
    assert ("measured" in found) == (linears != "auto") and asked == [(linears, True)] * (linears != "auto")


@pytest.mark.parametrize(
    ("linears", "model", "card", "free", "status", "words"),
    [
        ("fp8", {}, (9, 0), 79.0, "ok", "8-bit copies 30.1 GiB beside the weights"),
        ("fp8", {}, (8, 9), 79.0, "ok", "8-bit copies"),
        ("fp8", {}, (8, 6), 79.0, "fail", "needs compute capability 8.9 (Ada, Hopper), this card has 8.6"),
        ("fp8", {}, (9, 0), 47.0, "fail", "of 47.0 free. Set engine.linears"),
        ("fp8", {"quantization": "bf16"}, (9, 0), 139.0, "fail", 'NF4 weights, and model.quantization is "bf16"'),
        ("fp8", {"name": "unknown"}, (9, 0), 139.0, "ok", "compute capability 9.0"),
        ("int8", {}, (8, 0), 79.0, "ok", "8-bit copies 30.1 GiB beside the weights"),
        ("int8", {}, (7, 5), 79.0, "fail", '"int8" needs compute capability 8.0 (Ampere and later), this card has 7.5'),
        ("int8", {"quantization": "bf16"}, (8, 0), 139.0, "fail", '"int8" is made of NF4 weights'),
    ],
)
def test_8_bit_copies_that_cannot_be_are_refused_before_gigabytes_are_read(linears, model, card, free, status, words):
    check = doctor.eight_bit_check(wishing(linears, **model), card, {}, free)
    assert check.status == status and words in check.seen, check.seen
    assert ('Set engine.linears = "auto"' in check.seen) == (status == "fail")


def test_the_machine_is_asked_for_8_bit_products_only_where_the_recipe_wants_them(monkeypatch):
    monkeypatch.setattr(doctor, "local_config", lambda name: dict(QWEN_32B))
    gpu(monkeypatch, gib=80)  # capability 8.0: an A100
    found = {linears: {c.name: c.status for c in doctor.gpu_checks(wishing(linears))} for linears in ("fp8", "auto")}
    assert found["fp8"]["8-bit drawing"] == "fail" and "8-bit drawing" not in found["auto"]


def test_a_chat_token_in_a_base_prompt_fails():
    model = SimpleNamespace(format="base", tokenizer=SimpleNamespace(control_ids=frozenset({256})))
    assert doctor_model.prompt_check(model, {"answers": (1, 2), "policy": (3,)}).status == "ok"
    bad = doctor_model.prompt_check(model, {"answers": (1, 256)})
    assert bad.status == "fail" and "prompts/answers.yaml" in bad.seen
