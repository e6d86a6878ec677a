"""A disk that fills while a real training saves its checkpoints (F10), at every size in small steps."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from support.training import run_train
from test_train import alone, sha  # noqa: F401  (a fixture)

from cai import errors
from cai.errors import CaiError
from cai.training import checkpoints

pytestmark = pytest.mark.faults


def test_f10_a_disk_that_fills_inside_a_save_of_a_checkpoint(alone, small_disk: Path) -> None:  # noqa: F811
    """Exit 74 and one line; what stands verifies, nothing half keeps space; the end is the adapter of the run alone."""
    failed = 0
    for kilobytes in range(64, 4000, 24):
        subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", small_disk], check=True)
        try:
            run_train(small_disk)
            break
        except CaiError as error:
            assert error.code == errors.IO and "\n" not in str(error) and "ree space" in str(error), error
            failed += 1
        left = checkpoints.found(small_disk / "train")
        assert [checkpoints.fault(folder) for folder in left] == [None] * len(left), kilobytes
        assert not list((small_disk / "train").glob("damaged-*")), kilobytes
    assert failed >= 5 and sha(small_disk) == sha(alone[0])
