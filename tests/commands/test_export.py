"""Export: adapter and data set with cards that load, refusals, the merge's check, and a push only when asked."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import numpy as np
import orjson
import pytest
import yaml
from safetensors.numpy import save_file
from support.pages import REPO, item_rows, make_run, recipe

from cai import errors
from cai.commands import export as exporting
from cai.commands import merge
from cai.commands.merge import Probe, check, compare
from cai.data.pairs import PairPlan, build
from cai.errors import CaiError
from cai.recipe.settings import LoraSection
from cai.report import cards
from cai.report.snapshot import read_story


@pytest.fixture
def path(tmp_path):
    path = make_run(tmp_path / "runs")
    (path / "adapter").mkdir()
    save_file({"a.lora_B.weight": np.ones((2, 2), np.float32)}, path / "adapter" / "adapter_model.safetensors")
    (path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "SmolLM2-135M-Instruct"}')
    return path


def test_folder_holds_adapter_data_and_cards(path, tmp_path):
    said = []
    to = exporting.export(path, tmp_path / "out", said.append)
    names = sorted(str(p.relative_to(to)) for p in to.rglob("*") if p.is_file())
    assert names == [
        "adapter/README.md", "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "dataset/README.md",
        "dataset/examples.jsonl", "dataset/pairs/heldout.jsonl", "dataset/pairs/train.jsonl",
    ]  # fmt: skip
    text = "\n".join(said)
    assert "vllm serve HuggingFaceTB/SmolLM2-135M-Instruct --enable-lora --max-lora-rank 32" in text
    for word in ("transformers:", "datasets:", "Ollama:"):
        assert word in text


def test_a_killed_export_leaves_nothing_that_looks_whole_and_is_begun_again(path, tmp_path, monkeypatch):
    to = tmp_path / "out"
    pid = os.fork()
    if not pid:  # dies as SIGKILL would, with everything copied and nothing in its place
        monkeypatch.setattr(exporting, "_publish", lambda to: os._exit(9))
        exporting.export(path, to, lambda line: None)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert [p.name for p in to.iterdir()] == [exporting.PART]
    (to / exporting.PART / "merged.gguf").touch()
    exporting.export(path, to, lambda line: None)
    assert {p.name for p in to.iterdir()} == {"adapter", "dataset"}


def test_model_card_has_metrics_gates_cost_and_limits(path, tmp_path):
    card = (exporting.export(path, tmp_path / "out", lambda line: None) / "adapter" / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert front["library_name"] == "peft"
    metrics = {m["type"]: m for m in front["model-index"][0]["results"][0]["metrics"]}
    assert metrics["critiques.meaningful"]["value"] == 0.75
    assert "n=8" in metrics["critiques.meaningful"]["name"]
    for text in ("revisions.addresses | FAIL", "## Limits", "no assistant", "| pairs | 3 |", "0.6931, 0.4231"):
        assert text in card, text


def test_what_cannot_be_exported_is_refused(path, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "x").write_text("x")
    with pytest.raises(CaiError, match="not empty"):
        exporting.export(path, full, lambda line: None)
    for nowhere in (full / "x", full / "x" / "y"):
        with pytest.raises(CaiError, match=f"{nowhere}: Not a directory. Give --to a new folder"):
            exporting.export(path, nowhere, lambda line: None)
    (path / "adapter" / "adapter_config.json").unlink()
    with pytest.raises(CaiError, match="no trained adapter"):
        exporting.export(path, tmp_path / "out", lambda line: None)


HOSTILE = (
    "</td><script>alert(1)</script> | x |\n---\n# heading\n[click](javascript:1) ![i](http://e.example/x.png) {{ 7*7 }}"
)


def test_hostile_text_is_inert_in_both_cards(path, tmp_path, monkeypatch):
    """What a user's constitution, model name, override reason and gate may hold must break no card."""
    gates = orjson.loads((path / "eval" / "gates.json").read_bytes())
    gates |= {"override": HOSTILE, "enforced": True}
    for verdict in gates["verdicts"]:
        verdict["reason"] = HOSTILE
        verdict["measured"] = {**verdict["measured"], "judge": HOSTILE}
    (path / "eval" / "gates.json").write_bytes(orjson.dumps(gates))
    manifest = orjson.loads((path / "manifest.json").read_bytes())
    manifest["model"]["model"] = f"models/{HOSTILE}"
    (path / "manifest.json").write_bytes(orjson.dumps(manifest))
    (path / "adapter" / "adapter_config.json").write_text("{}")
    card = exporting.model_card(read_story(path), path / "adapter")
    pairs = build(item_rows(0), PairPlan(2, {"honesty": HOSTILE, "no-harm": HOSTILE}))
    data = cards.card(pairs, pairs.train, [], recipe(), {"model": HOSTILE, "revision": HOSTILE})
    for text in (card, data):
        front, body = text.split("---\n", 2)[1:]
        assert yaml.safe_load(front)
        assert "\n# heading" not in body
        for word in ("<script>", "[click](", "![i](", "49"):
            assert word not in body, word
        cells = [len(re.findall(r"(?<!\\)\|", line)) for line in body.splitlines() if line.startswith("|")]
        assert set(cells) <= {3, 4, 8}


def test_the_exported_adapter_names_its_base_as_others_find_it(path, tmp_path):
    to = exporting.export(path, tmp_path / "out", lambda line: None)
    assert orjson.loads((to / "adapter" / "adapter_config.json").read_bytes())["base_model_name_or_path"] == (
        "HuggingFaceTB/SmolLM2-135M-Instruct"
    )


@pytest.mark.parametrize("content", ["[]", '{"base_model', ""])
def test_a_damaged_adapter_config_is_one_line(path, tmp_path, content):
    (path / "adapter" / "adapter_config.json").write_text(content)
    with pytest.raises(CaiError, match=r"adapter_config\.json: not whole.*resume") as caught:
        exporting.export(path, tmp_path / "out", lambda line: None)
    assert caught.value.code == errors.CORRUPT


def test_a_base_in_a_local_folder_is_named_without_its_place(path):
    (path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "/home/ann/models/qwen"}')
    manifest = orjson.loads((path / "manifest.json").read_bytes())
    manifest["model"]["model"] = "/home/ann/models/qwen"
    (path / "manifest.json").write_bytes(orjson.dumps(manifest))
    card = exporting.model_card(read_story(path), path / "adapter")
    assert "for qwen," in card
    assert "/home/ann" not in card
    assert "base_model" not in yaml.safe_load(card.split("---\n")[1])


def test_the_lines_survive_a_folder_with_spaces_and_an_odd_rank(path, tmp_path):
    story = read_story(path)
    story = replace(story, recipe=story.recipe.model_copy(update={"lora": LoraSection(rank=24)}))
    to = tmp_path / "it's here"
    to.mkdir()
    (to / "merged.gguf").touch()
    lines = {line.split(":")[0]: line.split(":", 1)[1].strip() for line in exporting.usage(story, to, True)[1:]}
    words = shlex.split(lines["vLLM"])
    assert words[words.index("--max-lora-rank") + 1] == "32"  # vLLM takes no 24
    assert words[-1] == f"cai={to}/adapter"
    assert shlex.split(lines["Ollama"])[:2] == ["echo", f"FROM {to}/merged.gguf"]
    for name in ("transformers", "peft", "datasets"):
        ast.parse(lines[name])


def test_the_exported_data_set_loads(path, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    from datasets import load_dataset

    to = exporting.export(path, tmp_path / "out", lambda line: None)
    found = load_dataset(str(to / "dataset"), cache_dir=str(tmp_path / "cache"))
    assert {name: len(split) for name, split in found.items()} == {"train": 3, "heldout": 1}


class LoopbackHub(BaseHTTPRequestHandler):
    """Enough of the hub's protocol for two uploads; notes what was asked of it."""

    asked: ClassVar[list[tuple[str, dict]]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        rows = [orjson.loads(line) for line in body.splitlines() if line.strip()]
        self.asked.append((self.path, rows[0] if len(rows) == 1 else {"lines": rows}))
        files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in rows[0].get("files", [])]
        place = f"http://{self.headers['Host']}/{'datasets/' if rows[0].get('type') == 'dataset' else ''}me/cai"
        commit = {"commitUrl": f"{place}/commit/{'0' * 40}", "commitOid": "0" * 40, "pullRequestUrl": None}
        answer = {"files": files, "url": place, "errors": [], "warnings": [], **commit}
        data = orjson.dumps(answer)
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_args) -> None:
        """Quiet."""


@pytest.mark.slow
def test_push_reaches_the_hub_only_when_asked(path, tmp_path):
    (path.parent.parent / "cai.toml").write_text("[milestones.m0]\n")
    server = ThreadingHTTPServer(("127.0.0.1", 0), LoopbackHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE" and "proxy" not in k.lower()}
    env |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_TOKEN": "hf_x",
        "HF_HOME": str(tmp_path / "hf"),
    }
    command = [sys.executable, str(REPO / "runner.py"), "cai.toml", "--export", f"runs/{path.name}"]
    LoopbackHub.asked.clear()
    for more in ([], ["--push", "me/cai"]):
        assert LoopbackHub.asked == []
        to = ["--to", str(tmp_path / f"out{len(more)}")]
        done = subprocess.run([*command, *to, *more], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
    server.shutdown()
    assert "pushed adapter to me/cai (private)" in done.stdout
    made = [body for where, body in LoopbackHub.asked if where == "/api/repos/create"]
    assert [(row["name"], row["visibility"]) for row in made] == [("cai", "private"), ("cai-pairs", "private")]
    sent = {line["value"]["path"] for where, body in LoopbackHub.asked if "/commit/" in where
            for line in body["lines"] if line["key"] == "file"}  # fmt: skip
    assert {"README.md", "adapter_model.safetensors", "pairs/train.jsonl", "examples.jsonl"} <= sent


class Hub:
    def __init__(self, fault=None):
        self.calls, self.fault = [], fault

    def create_repo(self, name, **more):
        if self.fault:
            raise self.fault
        self.calls.append((name, more["repo_type"], more["private"]))

    def upload_folder(self, **more):
        self.calls.append(more["repo_id"])


def test_push_is_private_and_only_when_asked(path, tmp_path, monkeypatch):
    to = exporting.export(path, tmp_path / "out", lambda line: None)
    hub = Hub()
    exporting.push(to, "me/cai", lambda line: None, hub)
    assert hub.calls == [("me/cai", "model", True), "me/cai", ("me/cai-pairs", "dataset", True), "me/cai-pairs"]
    with pytest.raises(CaiError, match="hf auth login") as fault:
        exporting.push(to, "me/cai", lambda line: None, Hub(OSError("401 Unauthorized\nlong")))
    assert fault.value.code == 74


def test_a_merge_within_tolerance_passes_and_one_beyond_is_removed(tmp_path):
    one = [Probe((1,), (5, 6, 7, 8), (-1.0, -1.0, -1.0, -1.0))]
    near = [Probe((1,), (5, 6, 7, 9), (-1.02, -1.0, -0.98, -1.0))]
    far = [Probe((1,), (9, 9, 9, 9), (-3.0, -1.0, -1.0, -1.0))]
    assert compare(one, near) == (pytest.approx(0.01), 0.75)
    check(*compare(one, near), tmp_path)
    (tmp_path / "merged").mkdir()
    with pytest.raises(CaiError, match="not the adapter's") as fault:
        check(*compare(one, far), tmp_path / "merged")
    assert fault.value.code == 6
    assert not (tmp_path / "merged").exists()
    with pytest.raises(CaiError):
        check(float("nan"), 1.0, tmp_path / "merged")


def test_gguf_needs_the_converter(tmp_path, monkeypatch):
    said = []
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", "")
    assert exporting.to_gguf(tmp_path, tmp_path / "x.gguf", said.append) is False
    assert "not installed" in said[0]
    script = "import pathlib, sys; pathlib.Path(sys.argv[3]).write_text('gguf')"
    (tmp_path / exporting.CONVERTER).write_text(script)
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    assert exporting.to_gguf(tmp_path, tmp_path / "x.gguf", said.append)
    assert (tmp_path / "x.gguf").read_text() == "gguf"
    (tmp_path / exporting.CONVERTER).write_text("raise SystemExit('bad weights')")
    with pytest.raises(CaiError, match="bad weights"):
        exporting.to_gguf(tmp_path, tmp_path / "x.gguf", said.append)


def test_names_of_prequantised_twins_lead_to_the_original():
    assert merge._plain("unsloth/Qwen2.5-32B-bnb-4bit") == "unsloth/Qwen2.5-32B"
