"""What the tests share: the repository root, and whole runs of `runner.main` on the fake model."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.runs import FAKE, PAPERS_WAY, ROOT

sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "training")]  # the fault tests share fixtures with tests/training
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """A file whose `pytestmark` is a mark that is not asked for is not imported: torch alone takes ten seconds."""
    left_out = set(re.findall(r"\bnot (\w+)", config.option.markexpr))
    if not left_out or not collection_path.name.startswith("test_"):
        return None
    whole = re.search(r"^pytestmark = (.*)$", collection_path.read_text(), re.M)
    marks = set(re.findall(r"mark\.(\w+)", whole[1])) if whole else set()
    return True if marks & left_out else None


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with copies of what a recipe names: cai.toml, constitution.yaml, prompts/."""
    for name in ("cai.toml", "constitution.yaml"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "prompts", tmp_path / "prompts")
    return tmp_path


@pytest.fixture
def run_fake(project: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, Path]]:
    """`run_fake("--milestone", "m1", ...)` -> (exit code, newest run), in the project folder."""
    import runner

    monkeypatch.chdir(project)

    def run(*argv: str, fake: tuple[str, ...] = FAKE) -> tuple[int, Path]:
        code = runner.main([str(project / "cai.toml"), *fake, *argv])
        return code, (project / "runs" / "latest").resolve()

    return run


@pytest.fixture
def run_paper(run_fake: Callable[..., tuple[int, Path]]) -> Callable[..., tuple[int, Path]]:
    """`run_fake` in the paper's way, whose rows and pairs can be counted beforehand."""

    def run(*argv: str, fake: tuple[str, ...] = FAKE) -> tuple[int, Path]:
        return run_fake(*argv, fake=(*fake, *PAPERS_WAY) if fake else fake)

    return run
