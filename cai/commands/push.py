"""`--push`: each part of an exported folder into a private repository of its own, only when asked for by name.

Owns the repositories' names, what would be sent, and the remedy of a push that failed: an export that was half pushed
is pushed again by the same line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cai import errors
from cai.errors import CaiError
from cai.store.jsonl import one_line

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Say = Callable[[str], None]
PARTS = (("model", "adapter", ""), ("dataset", "dataset", "-pairs"), ("model", "merged", "-merged"))
NO_NETWORK = re.compile(r"connect|timeout|timedout|offline|gaierror|proxy|network|protocolerror", re.IGNORECASE)
OUT_OF_REACH = re.compile(r"offline|name resolution|not known|network is unreachable|cannot reach|max retries", re.I)


def push(folder: Path, repository: str, say: Say, api: HfApi | None = None) -> None:
    """Upload what was exported. Error: CaiError(IO) with the remedy that fits."""
    if api is None:
        from huggingface_hub import HfApi

        api = HfApi()
    for kind, part, name in _parts(folder, repository):
        try:
            api.create_repo(name, repo_type=kind, private=True, exist_ok=True)
            api.upload_folder(repo_id=name, repo_type=kind, folder_path=str(folder / part))
        except Exception as error:  # the hub library raises many kinds: network, login, name
            raise CaiError(f"--push {name}: {_line(error)}. {remedy(error)}", errors.IO) from None
        say(f"pushed {part} to {name} (private)")


def check_name(repository: str) -> None:
    """Error: a name that the hub cannot have, before anything is written for it."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    for _, _, tail in PARTS:
        try:
            validate_repo_id(repository + tail)
        except HFValidationError as error:
            why = f"{_line(error)}. Write NAME or OWNER/NAME, as the hub shows it."
            raise CaiError(f"runner.py: --push {repository[:80]}: {why}") from None


def push_plan(folder: Path, repository: str) -> list[str]:
    """One line a repository (or part), then its files with their sizes."""
    lines = []
    for kind, part, name in _parts(folder, repository):
        files = [path for path in sorted((folder / part).rglob("*")) if path.is_file()]
        total = sum(path.stat().st_size for path in files)
        where = f" -> {kind} repository {name} (private)" if repository else ""
        lines.append(f"{part}/{where}: {len(files)} files, {total:,} bytes")
        lines += [f"  {path.relative_to(folder / part)}  {path.stat().st_size:,}" for path in files]
    return lines


def _parts(folder: Path, repository: str) -> Iterator[tuple[str, str, str]]:
    return ((kind, part, f"{repository}{tail}") for kind, part, tail in PARTS if (folder / part).is_dir())


def _line(error: Exception) -> str:
    return one_line(error)[:200].rstrip(".") or type(error).__name__


def remedy(error: BaseException) -> str:
    """Without a network nobody is helped by logging in."""
    chain: list[BaseException] = []
    seen: BaseException | None = error
    while seen is not None and len(chain) < 8:
        chain.append(seen)
        seen = seen.__cause__ or seen.__context__
    if getattr(getattr(error, "response", None), "status_code", None) is None and any(
        OUT_OF_REACH.search(str(one)) or any(NO_NETWORK.search(kind.__name__) for kind in type(one).__mro__)
        for one in chain
    ):
        return "The hub is out of reach: check the network (proxy, HF_HUB_OFFLINE), then run the same line again."
    return "Log in with `hf auth login` (a token that may write) and check the name, then run the same line again."
