"""Constitutional AI on one GPU: generate, critique, revise, train with DPO, measure, report.

`cai.open_run("runs/latest")` gives a run as plain tables (docs/api.md); nothing heavy is imported before it is called.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cai.report.opened import OpenedRun

__version__ = "0.1.0"
__all__ = ["__version__", "open_run"]


def open_run(path: str | Path, *, pandas: bool | None = None) -> OpenedRun:
    """The run in that folder: examples, rounds, pairs, rejects, figures, gates and curves as plain tables.

    `pandas`: True for DataFrames, False for lists of dicts, None for DataFrames where pandas is installed.
    Error: CaiError in one line where there is no run.
    """
    from cai.report.opened import OpenedRun

    return OpenedRun(path, pandas=pandas)
