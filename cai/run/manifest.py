"""manifest.json as a run wrote it: read and checked before anything is taken from it.

Owns the schema's number, the kinds of its parts, and the sums of those that say what made the run: a resume compares
the recipe with them alone. What stands in them is the session's; writing is cai.run.folder's. What a screen tells of
the resolved recipe and the pairs is read here too, as far as it is there.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Collection
from pathlib import Path

import orjson

from cai import errors
from cai.errors import CaiError
from cai.store import files
from cai.store.jsonl import JsonObject, Row

SCHEMA = 1  # a run with a higher one was made by a newer program
KINDS: dict[str, type] = dict.fromkeys(
    ("identity", "training_identity", "stages", "files", "model", "versions", "memory", "sums"), dict
)
KINDS |= {"sets": list, "milestone": str, "backend": str, "home": str, "items": int, "heldout_items": int}
SEALED = ("milestone", "backend", "created", "identity", "training_identity", "stages", "files", "model")


def sealed(manifest: JsonObject, changed: Collection[str] = SEALED) -> Row:
    """The manifest with `sums`, a hash of each part of `SEALED`. Of a part that is not `changed` the old one stays.

    They stand in the file itself, which is replaced whole: no kill and no lost event makes a sum that does not fit.
    """
    known = manifest.get("sums", {})
    sums = {
        name: known[name] if name in known and name not in changed else _sum(manifest[name])
        for name in SEALED
        if name in manifest
    }
    return {**manifest, "sums": sums}


def _sum(part: object) -> str:
    return hashlib.sha256(orjson.dumps(part, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]


def edited(manifest: JsonObject) -> list[str]:
    """The parts that are not as the program wrote them; none of a run from before there were sums."""
    sums = manifest.get("sums")
    if sums is None:
        return []
    here = {name: _sum(manifest[name]) for name in SEALED if name in manifest}
    return [name for name in (*SEALED, *sorted(sums.keys() - SEALED)) if here.get(name) != sums.get(name)]


def refuse_edited(manifest: JsonObject, path: Path) -> None:
    """Before a resume or a fork takes rows by what the manifest says. Errors: CaiError(CORRUPT)."""
    if parts := edited(manifest):
        why = "edited since the program wrote it, so what made this run is not known"
        raise _corrupt(path, f"{', '.join(parts)}: {why}")


def _corrupt(path: Path, why: str) -> CaiError:
    return CaiError(f"{path}: {why}: put it back from a copy, or start a new run", errors.CORRUPT)


def read_manifest(path: Path) -> Row:
    """manifest.json, or CaiError: missing or not whole (CORRUPT), written by a newer program (USAGE)."""
    if path.is_fifo():
        raise _corrupt(path, "is a pipe")
    try:
        manifest = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        raise _corrupt(path, "missing, so it is unknown what made this run") from None
    except orjson.JSONDecodeError as error:
        raise _corrupt(path, f"not whole (line {error.lineno})") from error
    except OSError as error:
        raise files.io_error(path, "reading", error) from error
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if not isinstance(schema, int) or schema < 1:
        raise _corrupt(path, "has no schema number")
    if schema > SCHEMA:
        raise CaiError(f"{path}: schema {schema} is newer than {SCHEMA}, which this program reads: update the program")
    if wrong := [name for name, kind in KINDS.items() if not isinstance(manifest.get(name, kind()), kind)]:
        raise CaiError(
            f"{path}: {wrong[0]}: should be a {KINDS[wrong[0]].__name__}: put it back from a copy", errors.CORRUPT
        )
    return manifest


def resolved_table(run: Path) -> Row:
    """recipe.resolved.toml; {} where it cannot be read."""
    try:
        return tomllib.loads((run / "recipe.resolved.toml").read_text())
    except (OSError, ValueError):
        return {}


def pair_counts(run: Path) -> tuple[int, int] | None:
    """(training pairs, held-out pairs) as written, by counting lines."""
    try:
        train, heldout = ((run / "dataset" / "pairs" / f"{s}.jsonl").read_bytes() for s in ("train", "heldout"))
    except OSError:
        return None
    return train.count(b"\n"), heldout.count(b"\n")
