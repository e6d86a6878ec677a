"""Export: adapter and data set with cards that load, refusals, the merge's check, and a push only when asked."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
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

import runner
from cai import errors
from cai.commands import export as exporting
from cai.commands import merge, probe
from cai.commands.export_base import base_of
from cai.commands.export_card import model_card
from cai.commands.export_lines import usage
from cai.commands.export_prompt import asking
from cai.commands.merge import Probe, check, compare
from cai.commands.push import check_name, push
from cai.data.pairs import PairPlan, build
from cai.errors import CaiError
from cai.report import cards
from cai.report.snapshot import read_story


def no_model(snapshot, adapter):
    raise CaiError("no weights in this test")


def card_of(path, adapter=None):
    snapshot = read_story(path)
    return model_card(snapshot, base_of(snapshot), asking(snapshot))


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "load_tuned", no_model)
    path = make_run(tmp_path / "runs")
    shutil.copytree(REPO / "prompts", path / "prompts")
    (path / "adapter").mkdir()
    save_file({"a.lora_B.weight": np.ones((2, 2), np.float32)}, path / "adapter" / "adapter_model.safetensors")
    (path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "SmolLM2-135M-Instruct"}')
    return path


ADAPTER = ["README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"]
PAIRS = [
    "README.md", "conversational/heldout.jsonl", "conversational/train.jsonl", "dataset_info.json", "examples.jsonl",
    "pairs/heldout.jsonl", "pairs/train.jsonl",
]  # fmt: skip


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.mark.runs
def test_folder_holds_adapter_data_and_cards(path, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "asking", lambda snapshot: replace(asking(snapshot), folder=None, eos_id=None))
    said = []
    to = exporting.export(path, tmp_path / "out", said.append)
    assert files(to) == [f"adapter/{name}" for name in ADAPTER] + [f"dataset/{name}" for name in PAIRS]
    text = "\n".join(said)
    assert "vllm serve HuggingFaceTB/SmolLM2-135M-Instruct --enable-lora --max-lora-rank 32" in text
    assert f"--chat-template {to}/adapter/chat_template.jinja" in text
    for word in ("transformers:", "datasets:", "Ollama:", "prompt format:", "probe: skipped, no weights in this test"):
        assert word in text


def kill_at(path, to, monkeypatch, count):
    """A child that exports and dies as SIGKILL would at its `count`-th move into place; whether it got that far."""
    pid = os.fork()
    if not pid:
        move, seen = exporting._move, [0]

        def dying(*given):
            if seen[0] == count:
                os._exit(9)
            seen[0] += 1
            move(*given)

        monkeypatch.setattr(exporting, "_move", dying)
        exporting.export(path, to, lambda line: None)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


@pytest.mark.runs
def test_an_export_killed_anywhere_is_finished_by_a_second_one(path, tmp_path, monkeypatch):
    wanted = exporting.export(path, tmp_path / "whole", lambda line: None)
    for count in range(3):
        to = tmp_path / f"out{count}"
        assert kill_at(path, to, monkeypatch, count) is (count < 2)
        if count == 0:
            assert [p.name for p in to.iterdir()] == [exporting.PART]
            (to / exporting.PART / "stale").touch()
        if count == 1:  # half of it in its place
            assert (to / "adapter").is_dir() and not (to / "dataset").exists()
        exporting.export(path, to, lambda line: None)
        assert files(to) == files(wanted)
        assert all((to / name).read_bytes() == (wanted / name).read_bytes() for name in files(wanted))


@pytest.mark.runs
def test_a_second_export_renews_the_first_and_touches_no_foreign_file(path, tmp_path):
    to = exporting.export(path, tmp_path / "out", lambda line: None)
    (to / "adapter" / "notes.txt").write_text("mine")
    (to / "adapter" / "README.md").write_text("old")
    exporting.export(path, to, lambda line: None)
    assert (to / "adapter" / "notes.txt").read_text() == "mine"
    assert "# LoRA adapter" in (to / "adapter" / "README.md").read_text()
    (to / "adapter" / "adapter_model.safetensors").write_bytes(b"other weights")
    with pytest.raises(CaiError, match="nor an export of this run"):
        exporting.export(path, to, lambda line: None)
    for place in (path / "out", path.parent / "x"):
        with pytest.raises(CaiError, match="lies among the runs"):
            exporting.export(path, place, lambda line: None)


def test_a_damaged_adapter_is_not_exported(path, tmp_path):
    from cai.training.checkpoints import sums_of

    result = orjson.loads((path / "train" / "result.json").read_bytes())
    (path / "train" / "result.json").write_bytes(orjson.dumps(result | {"files": sums_of(path / "adapter")}))
    weights = path / "adapter" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(CaiError, match="not the adapter that was trained") as caught:
        exporting.export(path, tmp_path / "out", lambda line: None)
    assert caught.value.code == errors.CORRUPT and not (tmp_path / "out").exists()


@pytest.mark.runs
def test_model_card_has_metrics_gates_cost_and_limits(path, tmp_path):
    card = (exporting.export(path, tmp_path / "out", lambda line: None) / "adapter" / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert front["library_name"] == "peft"
    metrics = {m["type"]: m for m in front["model-index"][0]["results"][0]["metrics"]}
    assert metrics["critiques.meaningful"]["value"] == 0.75
    assert "n=8" in metrics["critiques.meaningful"]["name"]
    for text in (
        "revisions.addresses | FAIL",
        "## Limits",
        "no assistant",
        "| pairs | 3 |",
        "0.6931, 0.4231",
        "down\\_proj, ",
    ):
        assert text in card, text


@pytest.mark.runs
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


def with_arm(path, name, value, **result):
    """Another trained adapter beside the run's own, with what its training wrote."""
    from cai.training.checkpoints import sums_of

    folder, training = path / f"adapter-{name}", path / "train" / {"from-base": "from_base"}.get(name, name)
    shutil.copytree(path / "adapter", folder)
    save_file({"a.lora_B.weight": np.full((2, 2), value, np.float32)}, folder / "adapter_model.safetensors")
    training.mkdir()
    (training / "result.json").write_bytes(orjson.dumps({**result, "files": sums_of(folder)}))
    return folder


@pytest.mark.runs
def test_another_arm_is_exported_with_its_own_weights_training_and_figures(path, tmp_path):
    folder = with_arm(path, "sft", 2.0, steps=77, pairs=5, first_loss=3.25, last_loss=1.5)
    figure = {"metric": "fresh.sft.stops", "value": 0.925, "n": 40, "judge": "deterministic"}
    (path / "eval" / "sft.json").write_bytes(orjson.dumps({"figures": {"fresh.sft.stops": figure}}))
    said = []
    to = exporting.export(path, tmp_path / "sft", said.append, arm="sft")
    own = exporting.export(path, tmp_path / "own", lambda line: None)
    weights = "adapter/adapter_model.safetensors"
    assert (
        (to / weights).read_bytes()
        == (folder / "adapter_model.safetensors").read_bytes()
        != (own / weights).read_bytes()
    )
    names = [name for name in files(own / "adapter") if name not in ("README.md", "adapter_model.safetensors")]
    assert files(to / "adapter") == files(own / "adapter")
    assert all((to / "adapter" / name).read_bytes() == (own / "adapter" / name).read_bytes() for name in names)
    card, mine = ((folder / "adapter" / "README.md").read_text() for folder in (to, own))
    for text in (
        "supervised fine-tuning on 5 texts",
        "| steps | 77 |",
        "3.25, 1.5",
        "fresh.sft.stops | 0.925",
        "- sft",
    ):
        assert text in card, text
    assert "revisions.addresses | FAIL" not in card and "the run's own adapter, which is another" in card
    assert "fresh.sft.stops" not in mine and "revisions.addresses | FAIL" in mine
    assert any("probe: skipped, no weights in this test" in line for line in said)
    with pytest.raises(CaiError, match="nor an export of this run"):
        exporting.export(path, to, lambda line: None)


def test_an_arm_that_is_not_there_or_damaged_is_refused_with_the_lines_to_use(path, tmp_path):
    with pytest.raises(CaiError, match=r"--arm sft: no such adapter in .* Go on: .* --resume "):
        exporting.export(path, tmp_path / "out", lambda line: None, arm="sft")
    folder = with_arm(path, "from-base", 3.0)
    with pytest.raises(CaiError, match=r"There is: .* --export .* --to out --arm from-base"):
        exporting.export(path, tmp_path / "out", lambda line: None, arm="seed-9")
    save_file({"a.lora_B.weight": np.full((2, 2), 4.0, np.float32)}, folder / "adapter_model.safetensors")
    with pytest.raises(CaiError, match="not the adapter that was trained"):
        exporting.export(path, tmp_path / "out", lambda line: None, arm="from-base")


def test_a_run_without_an_adapter_says_which_lines_go_on(path, tmp_path):
    with_arm(path, "sft", 2.0)
    shutil.rmtree(path / "adapter")
    (path / "train" / "result.json").unlink()
    said = []
    exporting.export(path, tmp_path / "out", said.append)
    text = "\n".join(said)
    assert "the data set alone" in text and "--resume" in text and "--to out --arm sft" in text


def test_hostile_text_is_inert_in_both_cards(path, tmp_path, monkeypatch):
    """What a user's constitution, model name, override reason and gate may hold must break no card."""
    gates = orjson.loads((path / "eval" / "gates.json").read_bytes())
    gates |= {"override": HOSTILE, "enforced": True}
    for verdict in gates["verdicts"]:
        verdict["reason"] = HOSTILE
        if verdict["measured"]:
            verdict["measured"]["judge"] = HOSTILE
    (path / "eval" / "gates.json").write_bytes(orjson.dumps(gates))
    manifest = orjson.loads((path / "manifest.json").read_bytes())
    manifest["model"]["model"] = f"models/{HOSTILE}"
    (path / "manifest.json").write_bytes(orjson.dumps(manifest))
    (path / "adapter" / "adapter_config.json").write_text("{}")
    card = card_of(path)
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


@pytest.mark.runs
def test_the_exported_adapter_names_its_base_as_others_find_it(path, tmp_path):
    to = exporting.export(path, tmp_path / "out", lambda line: None)
    assert orjson.loads((to / "adapter" / "adapter_config.json").read_bytes())["base_model_name_or_path"] == (
        "HuggingFaceTB/SmolLM2-135M-Instruct"
    )


@pytest.mark.runs
@pytest.mark.parametrize("content", ["[]", '{"base_model', ""])
def test_a_damaged_adapter_config_is_one_line(path, tmp_path, content):
    (path / "adapter" / "adapter_config.json").write_text(content)
    with pytest.raises(CaiError, match=r"adapter_config\.json: not whole.*resume") as caught:
        exporting.export(path, tmp_path / "out", lambda line: None)
    assert caught.value.code == errors.CORRUPT


def with_model(path, **facts):
    manifest = orjson.loads((path / "manifest.json").read_bytes())
    manifest["model"] |= facts
    (path / "manifest.json").write_bytes(orjson.dumps(manifest | {"backend": facts.get("backend", "cpu")}))


LOCAL = (
    ("/home/ann/models/qwen", "v1"),
    ("models/My-Base-32B", "local"),
    ("models/My-Base-32B", "content:0123456789abcdef"),
)


@pytest.mark.parametrize(("name", "revision"), LOCAL)
def test_a_base_in_a_local_folder_never_becomes_a_hub_id(path, tmp_path, monkeypatch, name, revision):
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    monkeypatch.chdir(tmp_path)
    with_model(path, model=name, revision=revision)
    said = []
    to = exporting.export(path, tmp_path / "out", said.append)
    card = (to / "adapter" / "README.md").read_text()
    shared = orjson.loads((to / "adapter" / "adapter_config.json").read_bytes())["base_model_name_or_path"]
    with pytest.raises(HFValidationError):
        validate_repo_id(shared)
    assert name.rpartition("/")[2] in shared
    for text in (card, shared, (to / "dataset" / "README.md").read_text()):
        assert "/home/ann" not in text and "models/My" not in text and "huggingface.co/" not in text
    assert "base_model" not in yaml.safe_load(card.split("---\n")[1])
    assert f"vllm serve {name} --enable" in "\n".join(said)
    assert "transformers:" not in "\n".join(said)  # the placeholder cannot be loaded through
    (tmp_path / "models" / "My-Base-32B").mkdir(parents=True)
    assert base_of(read_story(path)).here in (name, str(tmp_path / "models" / "My-Base-32B"))


COMMIT = "1818d35814b8319459f4bd55ed1ac8709630f003"


def test_the_bases_commit_stands_in_config_card_and_lines(path, tmp_path):
    with_model(path, model="Qwen/Qwen2.5-1.5B", revision=COMMIT, loaded_from="Qwen/Qwen2.5-1.5B")
    said = []
    to = exporting.export(path, tmp_path / "out", said.append)
    config = orjson.loads((to / "adapter" / "adapter_config.json").read_bytes())
    assert (config["base_model_name_or_path"], config["revision"]) == ("Qwen/Qwen2.5-1.5B", COMMIT)
    assert f"at `{COMMIT}`" in (to / "adapter" / "README.md").read_text()
    assert f"vllm serve Qwen/Qwen2.5-1.5B --revision {COMMIT}" in "\n".join(said)


def test_a_commit_of_the_quantised_twin_is_not_given_for_the_base(path, tmp_path):
    with_model(path, model="Qwen/Qwen2.5-32B", revision=COMMIT, loaded_from="unsloth/Qwen2.5-32B-bnb-4bit")
    to = exporting.export(path, tmp_path / "out", lambda line: None)
    config = orjson.loads((to / "adapter" / "adapter_config.json").read_bytes())
    assert (config["base_model_name_or_path"], config["revision"]) == ("Qwen/Qwen2.5-32B", None)
    assert f"Trained on unsloth/Qwen2.5-32B-bnb-4bit@{COMMIT}" in (to / "adapter" / "README.md").read_text()


@pytest.mark.runs
def test_the_lines_survive_a_folder_with_spaces_and_an_odd_rank(path, tmp_path):
    snapshot = read_story(path)
    to = tmp_path / "it's here"
    to.mkdir()
    (to / "merged.gguf").touch()
    found = usage(base_of(snapshot), asking(snapshot), 24, to, True)
    lines = {line.split(":")[0]: line.split(":", 1)[1].strip() for line in found[1:]}
    words = shlex.split(lines["vLLM"])
    assert words[words.index("--max-lora-rank") + 1] == "32"  # vLLM takes no 24
    assert words[words.index("--lora-modules") + 1] == f"cai={to}/adapter"
    assert shlex.split(lines["Ollama"])[:2] == ["cd", str(to)]
    for name in ("transformers", "peft", "tokenizer", "datasets"):
        ast.parse(lines[name])


@pytest.mark.runs
def test_the_exported_data_set_loads(path, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    from datasets import load_dataset

    to = exporting.export(path, tmp_path / "out", lambda line: None)
    found = load_dataset(str(to / "dataset"), cache_dir=str(tmp_path / "cache"))
    assert {name: len(split) for name, split in found.items()} == {"train": 3, "heldout": 1}
    turns = load_dataset(str(to / "dataset"), "conversational", cache_dir=str(tmp_path / "cache"))
    assert {name: len(split) for name, split in turns.items()} == {"train": 3, "heldout": 1}
    plain, row = found["train"][0], turns["train"][0]
    assert row["prompt"] == [{"role": "user", "content": plain["prompt"]}]
    assert row["chosen"] == [{"role": "assistant", "content": plain["chosen"]}]
    listed = orjson.loads((to / "dataset" / "dataset_info.json").read_bytes())
    for entry in listed.values():
        first = orjson.loads((to / "dataset" / entry["file_name"]).read_bytes().split(b"\n")[0])
        assert entry["ranking"] is True and set(entry["columns"].values()) <= set(first)
    card = (to / "dataset" / "README.md").read_text()
    assert "**TRL glues them**" in card and "dataset: cai_train" in card and "rl: dpo" in card


@pytest.mark.runs
def test_the_two_lines_of_the_card_make_turns(path, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    to = exporting.export(path, tmp_path / "out", lambda line: None)
    code = re.findall(r"```python\n(.*?)```", (to / "dataset" / "README.md").read_text(), re.S)[1]
    place: dict = {}
    exec("from datasets import load_dataset\n" + code.replace("path/to/this/folder", str(to / "dataset")), place)
    assert place["pairs"]["train"][0]["rejected"][0]["role"] == "assistant"


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
    with_model(path, backend="fake")
    (path.parent.parent / "cai.toml").write_text("[milestones.m0]\n")
    server = ThreadingHTTPServer(("127.0.0.1", 0), LoopbackHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {
        k: v
        for k, v in os.environ.items()
        if k not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") and "proxy" not in k.lower()
    }
    env |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_TOKEN": "hf_x",
        "HF_HOME": str(tmp_path / "hf"),
    }
    command = [sys.executable, str(REPO / "runner.py"), "cai.toml", "--export", f"runs/{path.name}"]
    LoopbackHub.asked.clear()
    for more in ([], ["--push", "me/cai", "--dry-run"], ["--push", "me/cai"]):
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


@pytest.mark.runs
def test_push_is_private_and_only_when_asked(path, tmp_path, monkeypatch):
    to = exporting.export(path, tmp_path / "out", lambda line: None)
    hub = Hub()
    push(to, "me/cai", lambda line: None, hub)
    assert hub.calls == [("me/cai", "model", True), "me/cai", ("me/cai-pairs", "dataset", True), "me/cai-pairs"]
    with pytest.raises(CaiError, match="hf auth login") as fault:
        push(to, "me/cai", lambda line: None, Hub(OSError("401 Unauthorized\nlong")))
    assert fault.value.code == 74
    for error in (ConnectionError("Name or service not known"), TimeoutError("timed out"), OfflineModeIsEnabled("x")):
        with pytest.raises(CaiError, match=r"check the network .* run the same line again") as fault:
            push(to, "me/cai", lambda line: None, Hub(error))
        assert "log in" not in str(fault.value).lower()


class OfflineModeIsEnabled(Exception):
    """As huggingface_hub names it."""


@pytest.mark.runs
def test_a_failed_push_is_tried_again_by_the_same_line(path, tmp_path, monkeypatch, capsys):
    (path.parent.parent / "cai.toml").write_text("[milestones.m0]\n")
    monkeypatch.chdir(tmp_path)
    hub = Hub(ConnectionError("unreachable"))
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    line = ["cai.toml", "--export", f"runs/{path.name}", "--to", "out", "--push", "me/cai"]
    assert runner.main(line) == errors.IO
    assert "check the network" in capsys.readouterr().err
    hub.fault = None
    assert runner.main(line) == errors.DONE
    assert ("me/cai-pairs", "dataset", True) in hub.calls


@pytest.mark.parametrize("name", ["no slash", "a/b/c", "https://huggingface.co/me/x", "me/" + "b" * 90, "me/..", "a\0"])
def test_a_name_that_the_hub_cannot_have_is_refused_before_anything_is_written(name):
    with pytest.raises(CaiError, match=r"--push .*Write NAME or OWNER/NAME") as caught:
        check_name(name)
    assert caught.value.code == errors.USAGE and "\n" not in str(caught.value)
    check_name("me/cai")


@pytest.mark.runs
def test_a_dry_push_lists_and_writes_and_sends_nothing(path, tmp_path, monkeypatch, capsys):
    (path.parent.parent / "cai.toml").write_text("[milestones.m0]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: pytest.fail("the hub was asked"))
    before = files(tmp_path)
    assert runner.main(["cai.toml", "--export", f"runs/{path.name}", "--push", "me/cai", "--dry-run"]) == errors.DONE
    out = capsys.readouterr().out
    assert "adapter/ -> model repository me/cai (private):" in out
    assert "dataset/ -> dataset repository me/cai-pairs (private):" in out
    assert "chat_template.jinja" in out and "Nothing was written and nothing was sent" in out
    assert files(tmp_path) == before


def test_a_merge_is_judged_by_the_adapters_change_not_by_the_distance(tmp_path):
    """The base before quantisation is far away; what counts is that the adapter's change is there on top of it."""
    before = [Probe((1,), (5, 6), adapter=(-1.0, -1.0), base=(-1.4, -1.6))]
    plain = [(-1.9, -1.1)]  # another base: half a nat away
    kept, lost = [(-1.52, -0.48)], plain
    assert compare(before, plain, kept) == (pytest.approx(0.02), pytest.approx(0.5))
    check(*compare(before, plain, kept), tmp_path)
    for whole in (lost, [(-1.7, -0.9)], [(-5.0, -5.0)], [(float("nan"), -1.0)]):
        (tmp_path / "merged").mkdir()
        with pytest.raises(CaiError, match="not the adapter's") as fault:
            check(*compare(before, plain, whole), tmp_path / "merged")
        assert fault.value.code == 6
        assert not (tmp_path / "merged").exists()
    with pytest.raises(CaiError):  # an adapter that changes nothing: no merge can be told from the base
        check(0.0, 0.0, tmp_path / "merged")


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
    assert merge.plain_name("unsloth/Qwen2.5-32B-bnb-4bit") == "unsloth/Qwen2.5-32B"


def card_code(card: str) -> str:
    return card.split("```python\n")[1].split("```")[0]


def test_where_no_hub_is_in_reach_the_embedded_models_folder_is_named(path, tmp_path, monkeypatch):
    """The printed lines ended in "couldn't connect", though the base lay in the cache."""
    monkeypatch.setattr("cai.commands.export_base.embedded.converted", lambda: tmp_path / "cached")
    snapshot = read_story(path)
    loadable = replace(asking(snapshot), missed="")
    (line,) = [x for x in usage(base_of(snapshot), loadable, 32, tmp_path, False) if x.startswith("without a hub:")]
    assert f"from_pretrained({str(tmp_path / 'cached')!r})" in line
    assert str(tmp_path) not in card_of(path), "no place of this machine travels"
    monkeypatch.setattr("cai.commands.export_base.embedded.converted", lambda: None)
    assert not any("without a hub" in x for x in usage(base_of(snapshot), loadable, 32, tmp_path, False))


@pytest.mark.runs
def test_a_card_takes_no_file_from_the_folder_that_the_folder_has_not(path, tmp_path, monkeypatch):
    """Without a tokenizer at hand the export has neither its files nor generation_config.json: the base's serve."""
    monkeypatch.setattr(exporting, "asking", lambda snapshot: replace(asking(snapshot), folder=None, eos_id=None))
    said: list[str] = []
    to = exporting.export(path, tmp_path / "out", said.append)
    code = card_code((to / "adapter" / "README.md").read_text())
    compile(code, "card", "exec")
    assert 'AutoTokenizer.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")' in code
    assert "GenerationConfig.from_pretrained" not in code and "chat_template.jinja" in code
    lines = {line.partition(":")[0]: line for line in "\n".join(said).splitlines()}
    assert "AutoTokenizer.from_pretrained('HuggingFaceTB/SmolLM2-135M-Instruct')" in lines["tokenizer"]
    assert "the card's way" in lines["peft"] and "or this" in lines["transformers"]  # which of the two is said


def test_a_card_names_the_weights_as_they_were_loaded(path, tmp_path):
    with_model(path, quantization="float32")
    to = exporting.export(path, tmp_path / "out", lambda line: None)
    assert "| base loaded as | float32 |" in (to / "adapter" / "README.md").read_text()


def test_an_adapter_of_the_fake_model_claims_nothing_that_could_be_loaded(path, tmp_path):
    manifest = path / "manifest.json"
    values = orjson.loads(manifest.read_bytes())
    values |= {"backend": "fake", "model": {"model": "fake", "backend": "fake"}}
    manifest.write_bytes(orjson.dumps(values))
    said: list[str] = []
    card = (exporting.export(path, tmp_path / "out", said.append) / "adapter" / "README.md").read_text()
    for word in ("from_pretrained", "vllm serve", "ollama create", "nf4", "a local folder"):
        assert word not in card and word not in "\n".join(said), word
    assert "There is nothing to load" in card and "no library loads it" in "\n".join(said)
