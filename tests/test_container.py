"""Dockerfile and compose.yaml: parsed, each line's logic tried without Docker, and M0 run as the container would."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from support.runs import FAKE

from cai import errors
from cai.commands import cli

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
IGNORED = (ROOT / ".dockerignore").read_text().split()


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


def values(of: str) -> list[str]:
    return [value.strip() for word, value in instructions() if word == of]


def environment() -> dict[str, str]:
    return dict(pair.split("=", 1) for value in values("ENV") for pair in shlex.split(value))


def test_every_instruction_is_one_of_dockers_and_the_first_names_an_image_with_the_python_that_is_asked_for() -> None:
    known = {"FROM", "RUN", "WORKDIR", "COPY", "ARG", "ENV", "USER", "VOLUME", "ENTRYPOINT", "CMD"}
    assert {word for word, _ in instructions()} <= known
    word, image = instructions()[0]
    found = re.fullmatch(r"python:3\.(\d+)-slim-bookworm", image)  # a release of Debian, not whatever is newest
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert word == "FROM" and found and int(found[1]) >= int(asked.removeprefix(">=3."))


def test_the_runner_is_the_process_that_docker_stop_reaches_and_whose_exit_code_counts() -> None:
    """In exec form, not below make, which answers every code with 2; options behind the service replace CMD."""
    (entry,), (command,) = values("ENTRYPOINT"), values("CMD")
    assert json.loads(entry) == ["python", "runner.py", "cai.toml"]
    assert json.loads(command) == ["--milestone", "m0"]
    base = COMPOSE["services"]["m0"]
    assert base["init"] is True and base["stop_grace_period"] == "2m" and "command" not in base


def test_nothing_runs_as_root_and_what_is_written_may_be() -> None:
    """hadolint's DL3002, and the folders of that user: made before USER, else a volume would begin as root's."""
    words = [word for word, _ in instructions()]
    assert values("USER") == ["cai"] and words.index("USER") > max(n for n, word in enumerate(words) if word == "RUN")
    last = values("RUN")[-1]
    assert "useradd --uid 1000" in last and "chown cai runs" in last and "chmod 1777 /cache" in last
    assert json.loads(values("VOLUME")[0]) == ["/cai/runs", "/cache"]
    assert COMPOSE["services"]["m0"]["user"] == "${CAI_UID:-1000}"
    assert environment()["HOME"] == "/cache" and environment()["USER"] == "cai"  # a user that no passwd names


def test_layers_are_small_and_come_in_the_order_of_change() -> None:
    """DL3009, DL3015, DL3042: no lists, no recommends, no wheels are left; the source comes after the packages."""
    apt, setup, _ = values("RUN")
    assert "--no-install-recommends" in apt and apt.endswith("rm -rf /var/lib/apt/lists/*")
    assert setup.startswith("PIP_NO_CACHE_DIR=1 make setup")
    words = [(word, value) for word, value in instructions() if word in ("RUN", "COPY")]
    assert words.index(("COPY", ". .")) > words.index(("RUN", setup))


def test_what_is_copied_before_set_up_is_all_that_set_up_needs(tmp_path: Path) -> None:
    before: list[str] = []
    for word, value in instructions():
        if word == "COPY":
            *sources, target = value.split()
            assert target == "./" or (sources, target) == (["."], ".")
            assert all(source == "." or ((ROOT / source).is_file() and not ignored(source)) for source in sources)
            before += sources
        if word == "RUN" and "make setup" in value:
            break
    for name in before:
        shutil.copy(ROOT / name, tmp_path)
    words = shlex.split(value.replace("$TORCH_INDEX_URL", ""))[1:]
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
    assert base["build"] == "."
    places = dict(volume.rsplit(":", 1)[::-1] for volume in base["volumes"])
    (workdir,) = values("WORKDIR")
    assert places == {f"{workdir}/runs": "./runs", "/cache": "cache"} and "cache" in COMPOSE["volumes"]
    settings = environment()
    assert settings["HF_HOME"].startswith("/cache") and settings["XDG_CACHE_HOME"] == "/cache"
    assert services["m0-gpu"]["extends"] == "m0"
    (device,) = services["m0-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["count"], device["capabilities"]) == ("nvidia", "all", ["gpu"])


def test_every_docker_line_of_the_docs_names_a_service_and_options_of_the_runner() -> None:
    texts = [DOCKERFILE, (ROOT / "compose.yaml").read_text(), (ROOT / "README.md").read_text()]
    texts += [path.read_text() for path in (ROOT / "docs").glob("*.md") if path.name != "CHANGELOG.md"]
    lines = [line for text in texts for line in re.findall(r"docker compose run --rm ([^\n`]*)", text)]
    assert len(lines) >= 6
    for line in lines:
        service, *words = shlex.split(re.sub(r"\s{2,}.*", "", line))
        assert service in COMPOSE["services"]
        if words:
            cli.parse(["cai.toml", *words])


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A folder with what COPY would bring and no more, after the last RUN, with this Python in place of the image's."""
    for name in tracked():
        if not ignored(name):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tmp_path / name)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").symlink_to(sys.executable)
    for line in values("RUN")[-1].split(" && "):
        if not line.startswith(("useradd", "chown", "chmod")):  # of root's
            subprocess.run(line.replace("/cache", "cache"), shell=True, cwd=tmp_path, check=True)
    return tmp_path


def started(image: Path, *words: str) -> subprocess.Popen[str]:
    """ENTRYPOINT with these words in the place of CMD, in the environment of ENV."""
    entry = json.loads(values("ENTRYPOINT")[0])
    env = {name: value.replace("/cache", str(image / "cache")) for name, value in environment().items()}
    env["PATH"] = f"{image / '.venv/bin'}:{os.environ['PATH']}"
    entry[0] = sys.executable  # a link to it does not find its packages
    return subprocess.Popen(
        [*entry, *words], cwd=image, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


@pytest.mark.slow
def test_the_image_runs_m0_by_its_entry_and_command_and_goes_on_with_it(image: Path) -> None:
    process = started(image, *json.loads(values("CMD")[0]), *FAKE)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said[-3000:]
    assert (image / "runs/latest/report.html").is_file()
    done = started(image, "--status", "runs/latest")
    assert "done" in done.communicate(timeout=120)[0] and done.returncode == 0
    made = subprocess.run(["make", "-n", "m0"], cwd=image, capture_output=True, text=True)
    assert made.returncode == 0 and "pip" not in made.stdout, "the stamp is newer than what was copied"


@pytest.mark.slow
def test_a_stop_of_the_container_ends_the_run_resumable_with_its_own_code(image: Path) -> None:
    process = started(image, "--milestone", "m1", *FAKE[:2], "--set", "model.name=fake:slow")
    assert process.stdout is not None
    for line in process.stdout:
        if "step 1 of" in line:
            process.send_signal(signal.SIGTERM)
            break
    said = process.communicate(timeout=120)[0]
    assert process.returncode == errors.RESUMABLE and "--resume" in said
