"""What fault tests share: small file systems, and skips that say what this machine cannot do."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(Path(__file__).parent))

# What runs together on one worker, the dearest first, so that two workers end together: (part of the node id, group).
GROUPS = (
    ("test_sweep.py", ""),  # a group a test
    ("test_embedded_run.py", ""),
    ("test_ranks.py", "ranks"),
    ("test_train_kill.py", "train kill"),
    ("test_whole_run.py", "whole run"),
    ("test_train_ranks.py", "train ranks"),
    ("test_rehearsal.py", "rehearsal"),
    ("test_training_disk.py", "disk"),
    ("test_security.py", "security"),
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        name = f"/{item.nodeid}"
        found = (number for number, (part, _) in enumerate(GROUPS) if f"/{part}" in name)
        return next(found, len(GROUPS)) if item.get_closest_marker("faults") else len(GROUPS)

    items.sort(key=place)
    for item in items:
        if (number := place(item)) < len(GROUPS):
            item.add_marker(pytest.mark.xdist_group(GROUPS[number][1] or item.name))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 64 KB; skips where mounting is not allowed."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def strace() -> str:
    """The strace program, if it may inject faults here."""
    program = shutil.which("strace")
    if program is None:
        pytest.skip("strace is not installed")
    probe = subprocess.run(
        [program, "-f", "-o", "/dev/null", "-e", "trace=none", "true"], capture_output=True, text=True
    )
    if probe.returncode:
        pytest.skip(f"strace may not trace here: {probe.stderr.strip()[:100]}")
    return program
