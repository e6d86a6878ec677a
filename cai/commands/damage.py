"""What a failure is called where a run that the command names is damaged: the damage, and no bug of the program's.

Owns that question alone, asked after anything unexpected was raised; `verify` finds the damage. A file that somebody
edited may hold a value of any kind, and no reader can foresee them all.
"""

from __future__ import annotations

import argparse
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from cai.errors import CaiError
from cai.inputs import locate
from cai.terminal import printable, word

NO_SUM = "cannot be checked"  # of a log whose sum file is gone: no hash says that it is whole
NAMING = ("resume", "report", "status", "compare", "repair", "fork", "review", "export", "chat", "against", "attribute",
          "inverse", "next_round")  # fmt: skip


def told(args: argparse.Namespace, error: Exception) -> str:
    """One line with the damage, the failure and the remedy; "" where each run that is named is sound."""
    from cai.commands import verify

    for run in named(args):
        checks = verify.verify(run)
        broken = [check for check in checks if check.verdict == "FAIL"]
        broken = broken or [check for check in checks if check.verdict == "skip" and NO_SUM in check.found]
        if broken:
            at = traceback.extract_tb(error.__traceback__)[-1]
            failed = f"{type(error).__name__} in {Path(at.filename).name}:{at.lineno}"
            more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
            found = f"{run}: is damaged, and cannot be read so ({failed}): {broken[0].found}{more}. Put the files back "
            return printable(
                f"{found}from a copy, or see all with: python runner.py --verify {word(run)}", one_line=True
            )
    return ""


def named(args: argparse.Namespace) -> Iterator[Path]:
    """The runs that flags of this command name; `--status` alone means the latest."""
    for flag in NAMING:
        value = getattr(args, flag)
        for text in value if isinstance(value, list) else [value]:
            with suppress(CaiError, OSError):
                if text is not None:
                    yield locate(args, text)
