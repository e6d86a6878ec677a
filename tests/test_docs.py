"""README and docs are under test: every command runs (on the fake model), every target, key, file and link exists."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from http.server import HTTPServer
from pathlib import Path

import pytest
import yaml
from support.pages import REPO

import runner
from cai import errors
from cai.commands import cli
from cai.data import own_pairs, pairs
from cai.recipe import load as recipes
from cai.recipe.constitution import load_constitution

PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
RULES = re.findall(r"^([a-z0-9 -]+):(?!=)", (REPO / "Makefile").read_text(), re.MULTILINE)
TARGETS = {name for rule in RULES for name in rule.split()}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    """Lines of sh blocks, and indented lines (README) that begin like a command; comments cut."""
    lines = [line for block in blocks(page, "sh") for line in block.splitlines()]
    lines += [m[1] for m in re.finditer(r"^ {4}((?:make|python|tail|jq|git) .*)$", page.read_text(), re.MULTILINE)]
    return [part for line in lines if line.strip() for part in parts(line.split("  #")[0].split(" # ")[0].strip())]


def parts(line: str) -> list[str]:
    """A line's single commands: what `;` and `&&` part, without a loop's words, `timeout` and settings in front."""
    found = []
    for part in re.split(r" *(?:;|&&) *", LOOP.sub("", line)) if "'" not in line else [line]:
        part = re.sub(r"^(?:do |[A-Z_]+=\S+ |timeout \S+ )+", "", part.strip().replace("$beta", "0.3"))
        found += [part] if part not in ("", "done") else []
    return found


LOOP = re.compile(r"^for \w+ in [^;]+;")
ELSEWHERE = {  # commands of other machines, or that change this one: known, and not run
    "git": r"git clone URL constitutional-ai( && cd .*)?|git tag -a .* -m .*",
    "cd": r"cd (?:/workspace|constitutional-ai)",
    "apt-get": r"apt-get (?:update|install -y [a-z ]+)",
    "export": r"export HF_HOME=/workspace/hf",
    "echo": r"echo 'export HF_HOME=/workspace/hf' >> ~/.bashrc",
    "tmux": r"tmux new -s cai",
    "runpodctl": r"runpodctl stop pod \$RUNPOD_POD_ID",
    "scp": r"scp -P <port> root@<ip>:/workspace/constitutional-ai/runs/latest/report.html \.",
    "pip": r"pip install \.",
    "docker": r"docker compose run --rm (?:m0|m0-gpu)(?: --milestone m\d)?",
    "mkdir": r"mkdir -p runs",
    "source": r"source .venv/bin/activate",
}


ALL = [(page.name, command) for page in PAGES for command in commands(page)]


def runner_arguments(command: str) -> list[str]:
    words = shlex.split(command.replace("<id>", "latest").replace("<other>", "latest"))
    return words[words.index("cai" if words[0] == "cai" else "runner.py") + 1 :]


@pytest.mark.parametrize(("page", "command"), ALL, ids=[f"{p}: {c}" for p, c in ALL])
def test_every_command_is_one(page, command):
    words = shlex.split(command)
    if "--version" in words:
        with pytest.raises(SystemExit) as ended:
            cli.parse(runner_arguments(command))
        assert ended.value.code == 0
    elif words[0] in ("python", "cai"):
        args = cli.parse(runner_arguments(command))
        if args.set:
            recipes.resolve(recipes.read(REPO / "cai.toml"), sets=args.set)
    elif words[0] == "make":
        assert {w for w in words[1:] if "=" not in w} <= TARGETS, command
    else:
        known = words[0] in ("tail", "jq") or re.fullmatch(ELSEWHERE.get(words[0], "(?!)"), command)
        assert known, f"{command}: a command that no test knows"


def test_make_alone_lists_every_target_that_has_a_line():
    listed = subprocess.run(["make", "-C", str(REPO)], capture_output=True, text=True, check=True).stdout
    rows = [line for line in listed.splitlines() if line[:1].isalpha() and "directory" not in line]
    assert {name for row in rows for name in re.split("  +", row)[0].split()} == TARGETS - {"PHONY"}


def test_there_are_pages_and_commands():
    names = "README.md tutorial.md constitution.md runpod.md troubleshooting.md CONTRIBUTING.md CHANGELOG.md LOG.md"
    assert set(names.split()) <= {page.name for page in PAGES}
    assert len(ALL) > 30


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_links_exist(page):
    text = page.read_text()
    for name in re.findall(r"`((?:cai|tests|prompts|docs|bench)/[\w./-]+\.(?:py|yaml|md|jsonl|j2))`", text):
        assert (REPO / name).is_file(), name
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("https://") or (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_recipe_keys_exist(page):
    known = set(recipes._leaf_paths(recipes.Recipe))
    sections = {key.split(".")[0] for key in known if "." in key}
    for key in re.findall(r"`([a-z_]+\.[a-z_.]+?)`", page.read_text()):
        if key.split(".")[0] in sections and not key.endswith((".py", ".md", ".jsonl", ".yaml", ".html", ".toml")):
            retired = page.name == "CHANGELOG.md" and key in recipes.RETIRED
            assert key in known or retired or key.startswith(("pairs.yield", "dpo.bta")), key


def test_each_reject_reason_is_explained():
    """The funnel said `missing_stage 4, length_ratio 2`, and no page what that means."""
    text = (REPO / "docs" / "reading.md").read_text()
    section = text[text.index("## Why a pair was refused") : text.index("## While it works")]
    told = {name for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    made = "missing_stage", "no_issue", "not_better", "undecided", "empty", "guard"
    assert told == {*made, *pairs.CHECKS, *own_pairs.WORDS}


def test_each_guarantee_names_its_tests_and_each_fault_has_one():
    sources = "\n".join(path.read_text() for path in (REPO / "tests").rglob("test_*.py"))
    known = set(re.findall(r"^def (test_\w+)\(", sources, re.MULTILINE))
    rows = re.findall(r"^\| (G\d+) .*\| (`test_.*) \|$", (REPO / "docs" / "guarantees.md").read_text(), re.MULTILINE)
    assert [name for name, _ in rows] == [f"G{number}" for number in range(1, 13)]
    named = {name for _, cell in rows for name in re.findall(r"`(\w+)`", cell)}
    assert len(named) >= 12 and named <= known, named - known
    faults = {int(found) for name in known for found in re.findall(r"^test_f(\d\d)_", name)}
    assert faults == set(range(1, 31)), set(range(1, 31)) - faults


@pytest.mark.parametrize("text", [(REPO / "README.md").read_text(), cli.EPILOG], ids=["README", "--help"])
def test_exit_codes_are_the_numbers_that_were_promised(text):
    """Scripts rely on the numbers; every other test reads them by name."""
    line = " ".join(text[text.index("Exit codes:") :].split())
    words = "done, bug, usage, drift, locked, corrupt, quality, gate".split(", ")
    for number, word in enumerate(words):
        assert getattr(errors, word.upper()) == number
        assert re.search(rf"\b{number} (a )?{word}\b", line), word
    assert "74 input/output, 75 stopped but resumable, 130/143 signals" in line
    assert (errors.IO, errors.RESUMABLE, errors.SIGINT, errors.SIGTERM) == (74, 75, 130, 143)


def test_exit_codes_are_all_explained():
    text = (REPO / "docs" / "troubleshooting.md").read_text()
    table = {int(code) for row in re.findall(r"^\| ([\d, ]+) \|", text, re.MULTILINE) for code in row.split(",")}
    assert table == {v for n, v in vars(errors).items() if n.isupper() and isinstance(v, int)}


def test_yaml_and_toml_examples_load(tmp_path):
    for page in PAGES:
        for text in blocks(page, "toml"):
            tomllib.loads(text)
        for text in blocks(page, "yaml"):
            assert isinstance(yaml.safe_load(text), list)
            (tmp_path / "c.yaml").write_text(text)
            load_constitution(tmp_path / "c.yaml")


def test_the_gate_of_the_guide_is_a_gate(tmp_path):
    text = (REPO / "cai.toml").read_text() + "\n" + "\n".join(blocks(REPO / "docs" / "CONTRIBUTING.md", "toml"))
    (tmp_path / "cai.toml").write_text(text)
    found = recipes.resolve(recipes.read(tmp_path / "cai.toml"), milestone="m1")
    assert [gate.metric for gate in found.gates.m1][-2:] == ["dpo.loss_fall", "pairs.yield"]


def test_the_run_of_the_tutorial_has_the_gates_of_today():
    text = (REPO / "docs" / "tutorial.md").read_text()
    found = recipes.resolve(recipes.read(REPO / "cai.toml"), milestone="m1").gates
    shown = re.findall(r"^gate +[A-Z]+ +(\S+) ", text, re.MULTILINE)
    assert shown == [gate.metric for gate in found.m1], "make the run of docs/tutorial.md again"
    assert "fresh.tuned.evades" in text and "fresh.tuned.evades" in {gate.metric for gate in found.m2}


# --- every command, page by page and in its order, on the fake model


SMALLER = {  # so that m2 and m3 take a second; what is shown is that the commands work
    'name = "Qwen/Qwen2.5-32B" ': 'name = "fake" ',
    'backend = "auto"                    # auto': 'backend = "fake"                    # auto',
    "items = 100\n": "items = 12\n",
    "heldout.items = 200 ": "heldout.items = 4 ",
    "items = 5000\n": "items = 12\n",
    "heldout.items = 200\n": "heldout.items = 4\n",
    "guard.enabled = true\n": "",
    'benchmarks.run = ["harmbench", "xstest", "mtbench"]\nbenchmarks.contamination = true\n': "",
}
# what installs packages, or runs this very test
NOT_HERE = ("setup", "lm-eval", "test", "test-fast", "test-page", "test-faults", "check")


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """What a user has after cloning, with a smaller recipe on the fake model, and one run."""
    for name in ("cai.toml", "constitution.yaml", "Makefile", "requirements.txt", "requirements-unsloth.txt"):
        shutil.copy(REPO / name, tmp_path)
    shutil.copytree(REPO / "prompts", tmp_path / "prompts")
    (tmp_path / "tests").mkdir()
    shutil.copy(REPO / "tests" / "exam.jsonl", tmp_path / "tests")
    (tmp_path / "mine.txt").write_text(blocks(REPO / "README.md", "text")[0])
    (tmp_path / "mine.csv").write_text("question\n" + "".join(f"How do I clean a {thing}?\n" for thing in THINGS))
    pairs = [
        {"prompt": f"How do I wash a {thing}?", "chosen": f"Wash the {thing} with care.", "rejected": "No."}
        for thing in THINGS
    ]
    (tmp_path / "mine.jsonl").write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs))
    (tmp_path / "requests.txt").write_text("".join(f"How do I mend a {thing}?\n" for thing in THINGS))
    text = (tmp_path / "cai.toml").read_text()
    for old, new in SMALLER.items():
        assert old in text, old
        text = text.replace(old, new)
    (tmp_path / "cai.toml").write_text(text)
    monkeypatch.chdir(tmp_path)
    for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS"):  # `make test` runs this test: its make must not speak as a part
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(HTTPServer, "serve_forever", _ctrl_c)
    monkeypatch.setattr(sys, "stdin", StdIn("Why is the sky blue?\n"))  # no terminal: --chat answers one question
    assert runner.main(["cai.toml", "--milestone", "m0"]) == errors.DONE
    return tmp_path


THINGS = "chair kettle bicycle window lamp drawer zip clock tap fence radio umbrella".split()


class StdIn(io.StringIO):
    """One question, again and again."""

    def read(self, *size):
        self.seek(0)
        return super().read(*size)


def _ctrl_c(*_args, **_more):
    raise KeyboardInterrupt


def run_command(command: str) -> int:
    """A command as the page has it, in the clone; `make` through what it would do."""
    words = shlex.split(command.replace("<id>", "latest").replace("<other>", "latest"))
    if words[0] in ELSEWHERE or {"model.backend=cpu", "model.backend=embedded"} & set(words):  # a real model: minutes
        return 0
    if "--version" in words:
        return subprocess.run([sys.executable, str(REPO / "runner.py"), "--version"]).returncode
    if words[0] == "make":
        if words[1] in NOT_HERE:
            return subprocess.run(["make", "-n", words[1]], stdout=subprocess.DEVNULL).returncode
        asked = ["make", "-n", "-o", ".venv/.installed", *words[1:]]
        made = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()
        return max(run_command(line) for line in made)
    if "runner.py" in words:
        shutil.rmtree("out", ignore_errors=True)
        return runner.main(words[words.index("runner.py") + 1 :])
    if words[1:3] == ["-m", "cai.commands.supervise"]:
        command_line = [sys.executable, *words[1:]]
        return subprocess.run(command_line, env=os.environ | {"PYTHONPATH": str(REPO)}, timeout=60).returncode
    if words[0] == "tail":
        done = subprocess.run(["timeout", "0.5", *words], capture_output=True)
        return 0 if done.returncode == 124 and done.stdout.count(b"\n") else 1
    assert words[0] == "jq", command
    if shutil.which("jq") is None:
        return 0  # the filter is read by test_every_command_is_one; jq itself is not part of the requirements
    return subprocess.run(words, stdout=subprocess.DEVNULL).returncode


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_runs(clone, page, capfd):
    if page.name == "experiments.md":  # the plain fake prefers a letter, so no pair of two sampled answers is decided
        recipe = clone / "cai.toml"
        recipe.write_text(recipe.read_text().replace('name = "fake" ', 'name = "fake:choosing" '))
    for command in commands(page):
        assert run_command(command) == errors.DONE, f"{command}\n{capfd.readouterr().err[-2000:]}"
    assert "Traceback" not in capfd.readouterr().err


# --- Python in the pages, and the notebook


def snippets(page: Path) -> list[str]:
    return [text for text in blocks(page, "python") if "import cai" in text or "import runner" in text]


NOTEBOOK = REPO / "docs" / "quickstart.ipynb"
SMALL_M2 = "cai.toml --milestone m2 --set items=6 --set dpo.max_steps=10 --set dpo.eval_steps=5".split()


def cells() -> list[str]:
    content = json.loads(NOTEBOOK.read_text())
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_is_one_and_holds_no_outputs_of_a_machine():
    content = json.loads(NOTEBOOK.read_text())
    assert (content["nbformat"], content["metadata"]["kernelspec"]["name"]) == (4, "python3")
    assert len({cell["id"] for cell in content["cells"]}) == len(content["cells"])
    for cell in content["cells"]:
        expected = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
            expected |= {"outputs", "execution_count"}
        assert set(cell) == expected


@pytest.mark.slow
def test_the_notebook_runs_from_its_first_cell_to_its_last(clone, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    assert runner.main(SMALL_M2) == errors.DONE
    names: dict[str, object] = {}
    for number, source in enumerate(cells()):
        exec(compile(source, f"cell {number}", "exec"), names)
    assert len(names["run"].examples) == len(names["pairs"]) > 0  # type: ignore[attr-defined]
    assert len(names["left"].lines) == 2  # training and held out


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)], ids=lambda page: page.name)
def test_python_in_the_pages_runs(clone, page, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    for source in snippets(page):
        exec(compile(source, page.name, "exec"), {})
