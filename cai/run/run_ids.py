"""The names of runs: how one is made, what is one, and which folder a name on the command line means.

Owns the form of an id and the rule that a run named by a user lies in the folder of runs, as a plain folder; what
lies in it is `folder`'s.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import orjson

from cai import errors
from cai.errors import CaiError

RUN_ID = re.compile(r"^[a-z0-9][a-z0-9._-]{0,79}$")


def new_run_id(milestone: str, identity: Mapping[str, str], now: datetime | None = None) -> str:
    """`<utc yyyymmdd-hhmmss>-<milestone>-<hash6>`; the hash is of the identity, so equal recipes look alike."""
    stamp = (now or datetime.now(UTC)).strftime("%Y%m%d-%H%M%S")
    digest = hashlib.sha256(orjson.dumps(dict(identity), option=orjson.OPT_SORT_KEYS)).hexdigest()[:6]
    return check_run_id(f"{stamp}-{milestone.lower()}-{digest}")


def check_run_id(run_id: str) -> str:
    if not RUN_ID.fullmatch(run_id):
        raise CaiError(
            f"run id {run_id!r}: must match {RUN_ID.pattern} (lower-case letters, digits, '.', '_', '-'; at most 80)"
        )
    return run_id


def resolve_run(argument: str | Path, root: Path) -> Path:
    """The folder that `--resume ARGUMENT` means: `ID`, `root/ID` or `root/latest`; never one outside `root`.

    Errors: CaiError(USAGE) for a malformed id, another folder, a symbolic link or a run that does not exist.
    """
    given = Path(argument)
    if given.parent != Path(".") and os.path.realpath(given.parent) != os.path.realpath(root):
        raise CaiError(
            f"{argument}: is not inside {root}/: give {root}/<id> or {root}/latest, or the run's recipe.toml as recipe"
        )
    name = given.name
    if name == "latest":
        try:
            name = os.readlink(root / "latest")
        except OSError as error:
            if (root / "latest").exists():
                raise CaiError(
                    f"{root}/latest: is no link to a run but a file or folder of its own: name the run itself "
                    f"({_hint('', root)}), and remove it so that the next run can set the link"
                ) from error
            raise CaiError(f"{root}/latest: there is no latest run yet: start one with make m0") from error
    path = root / check_run_id(name)
    if path.is_symlink():
        raise CaiError(f"{path}: is a symbolic link: name the run folder itself")
    if not path.is_dir():
        raise CaiError(f"{path}: no such run ({_hint(name, root)})")
    refuse_pipes(path)
    return path


def latest_run(root: Path) -> str:
    """What `root/latest` names; "" where there is no such link."""
    try:
        return os.readlink(root / "latest")
    except OSError:
        return ""


def run_folders(root: Path) -> list[Path]:
    """Every run below `root`, oldest first."""
    return sorted(p for p in root.glob("*") if RUN_ID.fullmatch(p.name) and p.is_dir() and not p.is_symlink())


def refuse_pipes(run: Path) -> None:
    """CaiError(CORRUPT) for a pipe, socket or device in a run folder: reading it would wait for ever."""
    for path in (Path(folder, name) for folder, _, names in os.walk(run) for name in names):
        if path.exists() and not path.is_file() and not path.is_dir():
            raise CaiError(f"{path}: is a pipe or a device: put the file back, or remove it", errors.CORRUPT)


def _hint(name: str, root: Path) -> str:
    """The run that was meant, as far as its name tells; else the newest."""
    known = [path.name for path in run_folders(root)]
    if not known:
        return f"{root}/ holds none"
    near = [run for run in known if name and name in run] or difflib.get_close_matches(name, known, 1, 0.8)
    return f"did you mean {near[-1]}?" if near else f"the newest of {len(known)} is {known[-1]}"
