"""The official benchmark files: found at the recipe's path, or downloaded once into the cache, and checked by sha256.

Owns names, public addresses, known checksums and the message for a damaged file. Reads no content. The project ships
none of these files. Invariant: bytes that are not the official ones are never measured on unless the recipe says
`benchmarks.checksum = false` or names their sha256, and then the result says it too.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cai.errors import CaiError
from cai.recipe.settings_benchmarks import BenchmarksSection
from cai.store.files import cache_root, write_atomic

GITHUB = "https://raw.githubusercontent.com"
TIMEOUT_SECONDS = 60
OWN = "Get it again, or set benchmarks.checksum = false for a file of your own."
PUBLISHED = "official"  # as a path: the published file itself, downloaded once


@dataclass(frozen=True)
class Official:
    """A published file: where it lies and what it must hash to."""

    file: str
    url: str
    sha256: str


OFFICIAL = {
    "harmbench": Official(
        "harmbench_behaviors_text_val.csv",
        f"{GITHUB}/centerforaisafety/HarmBench/main/data/behavior_datasets/harmbench_behaviors_text_val.csv",
        "7bfaaa5e2b9b95002c89e2d33c019f58e9e8496e2fc65d368f1eeb8179e69534",  # MIT
    ),
    "xstest": Official(
        "xstest_prompts.csv",
        f"{GITHUB}/paul-rottger/xstest/main/xstest_prompts.csv",
        "11783fb294ed017473ee53c207d71f2161c7672c8d0b037501e78387f801cb5a",  # CC-BY-4.0
    ),
    "mtbench": Official(
        "mt_bench_questions.jsonl",
        f"{GITHUB}/lm-sys/FastChat/main/fastchat/llm_judge/data/mt_bench/question.jsonl",
        "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",  # Apache-2.0
    ),
    "mtbench_prompts": Official(
        "mt_bench_judge_prompts.jsonl",
        f"{GITHUB}/lm-sys/FastChat/main/fastchat/llm_judge/data/judge_prompts.jsonl",
        "fd283293406d024f44c174b094ef48031d0687a4682fd3a56b29b138f80281b6",  # Apache-2.0
    ),
    "xstest_prompt": Official(
        "xstest_classify_completions_gpt.py",
        f"{GITHUB}/paul-rottger/xstest/a3bb396ddc1939c6f264f17b7cf5b7a5d82833de/evaluation/classify_completions_gpt.py",
        "81dc9d69587f257ea53cde08f3af0569de58ba1b209a44bbabc3a5610cfd9962",  # CC-BY-4.0
    ),
}


@dataclass(frozen=True)
class Found:
    """A file's bytes and where they came from. `checked`: "official", "recipe" (its sha256 key) or "unchecked"."""

    name: str
    path: Path
    data: bytes
    sha256: str
    checked: str

    @property
    def facts(self) -> dict[str, str]:
        return {"file": self.path.name, "sha256": self.sha256, "checksum": self.checked}


def obtain(
    name: str, section: BenchmarksSection, folder: Path, *, fetch: Callable[[str], bytes] | None = None
) -> Found:
    """The checked file of `name`. Errors, one line each: no such file, no network, another checksum (exit 2)."""
    given = getattr(section, name)
    if given and given != PUBLISHED:
        path, data = _given(name, given, folder)
        return check(name, path, data, section)
    return _published(name, section, fetch or download)


def _given(name: str, given: str, folder: Path) -> tuple[Path, bytes]:
    """The recipe's own file: a regular one (a pipe or a device may never end)."""
    try:
        path = folder / Path(given).expanduser()
        if path.exists() and not path.is_file():
            raise CaiError(f"{path}: benchmarks.{name}: is no regular file. Give the file's path.")
        return path, path.read_bytes()
    except OSError as error:
        where, why = str(folder / given), error.strerror
    except (ValueError, RuntimeError) as error:  # a NUL in it, a home that nobody has
        where, why = repr(given), str(error).rstrip(".")
    raise CaiError(f"{where[:400]}: benchmarks.{name}: {why}. Give the file's path.")


def _published(name: str, section: BenchmarksSection, fetch: Callable[[str], bytes]) -> Found:
    """The published file, from the cache after the first time. `checksum = false` is for files of one's own only."""
    path, url = cached_path(name), OFFICIAL[name].url
    strict = section.model_copy(update={"checksum": True})
    try:
        if path.is_file():
            return check(name, path, path.read_bytes(), strict, "Remove it, and it is downloaded again.")
        remedy = f"It came from {url}: save the published file and give its path as benchmarks.{name}."
        found = check(name, path, fetch(url), strict, remedy)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, found.data)
    except OSError as error:
        raise CaiError(
            f"{path}: benchmarks.{name}: {error.strerror}. Make this cache usable, name another one in CAI_CACHE, "
            f"or give the file's path as benchmarks.{name}."
        ) from None
    return found


def cached_path(name: str) -> Path:
    return cache_root() / "benchmarks" / OFFICIAL[name].file


def is_near(name: str, section: BenchmarksSection) -> bool:
    """Whether the file can be had without a download."""
    return bool(getattr(section, name)) or cached_path(name).is_file()


def check(name: str, path: Path, data: bytes, section: BenchmarksSection, remedy: str = OWN) -> Found:
    """The bytes with their checksum's verdict, or CaiError: damaged or altered, and the remedy."""
    sha = hashlib.sha256(data).hexdigest()
    if sha == OFFICIAL[name].sha256:
        return Found(name, path, data, sha, "official")
    if section.sha256.get(name, "").lower() == sha:
        return Found(name, path, data, sha, "recipe")
    if not section.checksum:
        return Found(name, path, data, sha, "unchecked")
    raise CaiError(
        f"{path}: benchmarks.{name}: sha256 {sha[:16]}... is not that of the official file "
        f"({OFFICIAL[name].sha256[:16]}...): damaged or altered. {remedy}"
    )


def download(url: str) -> bytes:
    """One GET. Errors: CaiError with the address and the remedy."""
    if os.environ.get("HF_HUB_OFFLINE") == "1" or os.environ.get("CAI_OFFLINE"):
        raise CaiError(f"{url}: not downloaded: this session is offline. Save it and give its path in [benchmarks].")
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as answer:
            return answer.read()
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError; a short or odd answer is none
        why = " ".join(str(error).split())[:200]
        raise CaiError(f"{url}: download failed ({why}). Save it and give its path in [benchmarks].") from None


NAMES = ("harmbench", "xstest", "mtbench")


SEEN = 5  # answers from which on it is strange that both arms say the same
