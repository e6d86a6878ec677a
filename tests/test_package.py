"""The package: it builds, carries its data, and `cai` works from another folder without the repository beside it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import cai

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_version_is_one_in_package_and_citation() -> None:
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "cai.__version__"}
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == cai.__version__ and citation["license"] == "Apache-2.0"
    assert {"cff-version", "title", "authors", "message"} <= set(citation)
    releases = re.findall(r"^## (\d+\.\d+\.\d+) ", (ROOT / "docs" / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert releases[0] == cai.__version__ and len(releases) == len(set(releases))


def test_the_light_dependencies_are_pinned_too_and_none_of_them_is_heavy() -> None:
    """`pip install .` brings what reads, checks and reports; torch and its like come with the pinned set."""
    asked = {re.split(r"[><=\[]", text)[0] for text in PROJECT["project"]["dependencies"]}
    pinned = {re.split(r"[><=\[ ]", line)[0] for line in (ROOT / "requirements.txt").read_text().splitlines()}
    assert asked <= pinned  # the same libraries in both lists
    assert not asked & {"torch", "transformers", "trl", "peft", "unsloth"}


@pytest.mark.slow
def test_the_package_is_built_and_its_command_makes_a_run_elsewhere(tmp_path: Path) -> None:
    source, target, work = tmp_path / "source", tmp_path / "site", tmp_path / "work"
    shutil.copytree(ROOT / "cai", source / "cai", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "runner.py"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(target), str(source)], check=True, timeout=300)
    assert {"cai", "runner.py"} <= {path.name for path in target.iterdir()} and not (target / "tests").exists()
    carried = {path.relative_to(target) for path in (target / "cai").rglob("*") if path.suffix != ".pyc"}
    assert {p.relative_to(source) for p in (source / "cai").rglob("*") if p.is_file()} <= carried
    shutil.copytree(ROOT / "prompts", work / "prompts")
    for name in ("cai.toml", "constitution.yaml"):
        shutil.copy(ROOT / name, work)
    alone = {**os.environ, "PYTHONPATH": str(target)}
    fake = ["--set", "model.backend=fake", "--set", "model.name=fake"]
    command = [sys.executable, str(target / "bin" / "cai"), "cai.toml", "--milestone", "m0", *fake]
    done = subprocess.run(command, cwd=work, env=alone, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-1500:]
    assert (work / "runs/latest/report.html").is_file()
    code = "import cai; print(cai.__file__, len(cai.open_run('runs/latest', pandas=False).pairs))"
    done = subprocess.run([sys.executable, "-c", code], cwd=work, env=alone, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(target / "cai/__init__.py"), "1"]
