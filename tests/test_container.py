"""Dockerfile and compose.yaml: parsed, each line's logic tried without Docker, and M0 run as the container would."""

from __future__ import annotations

import fnmatch
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
IGNORED = (ROOT / ".dockerignore").read_text().split()
RULES = re.findall(r"^([a-z0-9 -]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)
TARGETS = {name for rule in RULES for name in rule.split()}


def instructions() -> list[tuple[str, str]]:
    lines = DOCKERFILE.replace("\\\n", " ").splitlines()
    return [tuple(line.split(" ", 1)) for line in lines if line and not line.startswith("#")]  # type: ignore[misc]


def ignored(name: str) -> bool:
    return any(fnmatch.fnmatch(name, p.replace("**/", "*")) or name.split("/")[0] == p for p in IGNORED)


def tracked() -> list[str]:
    done = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git clone")
    return [name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


def test_every_instruction_is_one_of_dockers_and_the_first_names_an_image_with_the_python_that_is_asked_for() -> None:
    known = {"FROM", "RUN", "WORKDIR", "COPY", "ARG", "ENV", "CMD"}
    assert {word for word, _ in instructions()} <= known
    word, image = instructions()[0]
    found = re.fullmatch(r"python:3\.(\d+)-slim", image)
    assert word == "FROM" and found and int(found[1]) >= 11
    compile_ = [value for word, value in instructions() if word == "CMD"]
    assert len(compile_) == 1 and yaml.safe_load(compile_[0]) == ["make", "m0"]


def test_what_is_copied_before_set_up_is_all_that_set_up_needs(tmp_path: Path) -> None:
    before: list[str] = []
    for word, value in instructions():
        if word == "COPY":
            *sources, target = value.split()
            assert target == "./" or (sources, target) == (["."], ".")
            assert all(source == "." or ((ROOT / source).is_file() and not ignored(source)) for source in sources)
            before += sources
        if word == "RUN" and value.startswith("make"):
            break
    for name in before:
        shutil.copy(ROOT / name, tmp_path)
    words = shlex.split(value.replace("$TORCH_INDEX_URL", ""))
    done = subprocess.run([words[0], "-n", *words[1:]], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    named = re.findall(r"-r (\S+)", done.stdout)
    assert named and all((tmp_path / name).is_file() for name in named)
    assert "--index-url" not in done.stdout  # an empty build argument asks for no other index


def test_what_a_run_needs_is_not_left_out_of_the_image() -> None:
    gone = [name for name in tracked() if ignored(name)]
    assert not [name for name in gone if not name.startswith(".ci/")]
    for name in (".venv/bin/python", "runs/latest/records.jsonl", ".git/config", "cai/__pycache__/x.pyc"):
        assert ignored(name), name


def test_the_services_run_a_target_of_the_makefile_and_keep_runs_and_weights_outside_the_container() -> None:
    services = COMPOSE["services"]
    base = services["m0"]
    assert base["build"] == "." and base["command"][0] == "make" and base["command"][1] in TARGETS
    places = dict(volume.rsplit(":", 1)[::-1] for volume in base["volumes"])
    workdir = next(value for word, value in instructions() if word == "WORKDIR")
    assert places == {f"{workdir}/runs": "./runs", "/cache": "cache"} and "cache" in COMPOSE["volumes"]
    settings = dict(
        pair.split("=", 1) for word, value in instructions() if word == "ENV" for pair in shlex.split(value)
    )
    assert settings["HF_HOME"].startswith("/cache") and settings["XDG_CACHE_HOME"] == "/cache"
    assert services["m0-gpu"]["extends"] == "m0" and services["m0-gpu"]["gpus"] == "all"
    asked = re.findall(r"docker compose run --rm (\S+)", DOCKERFILE + (ROOT / "compose.yaml").read_text())
    assert {name.strip("`") for name in asked} <= set(services)


@pytest.mark.slow
def test_the_files_of_the_image_run_m0_as_its_command_does(tmp_path: Path) -> None:
    """The container's own command, on the fake model, in a folder that holds what COPY would bring and no more."""
    for name in tracked():
        if not ignored(name):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tmp_path / name)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").symlink_to(sys.executable)
    for word, value in instructions()[-4:]:
        if word == "RUN":
            subprocess.run(value, shell=True, cwd=tmp_path, check=True)  # the stamp, after everything was copied
    fake = "ARGS=--set model.backend=fake --set model.name=fake"
    command = yaml.safe_load(next(value for word, value in instructions() if word == "CMD"))
    done = subprocess.run([*command, fake, f"PY={sys.executable}"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    assert (tmp_path / "runs/latest/report.html").is_file() and "pip" not in done.stdout
