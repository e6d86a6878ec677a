"""manifest.json as a run wrote it: read and checked before anything is taken from it.

Owns the schema's number and the kinds of its parts. What stands in them is the session's; writing is cai.run.folder's.
"""

from __future__ import annotations

from pathlib import Path

import orjson

from cai import errors
from cai.errors import CaiError
from cai.store import files
from cai.store.jsonl import Row

SCHEMA = 1  # a run with a higher one was made by a newer program
KINDS: dict[str, type] = dict.fromkeys(
    ("identity", "training_identity", "stages", "files", "model", "versions", "memory"), dict
)
KINDS |= {"sets": list, "milestone": str, "backend": str, "home": str, "items": int, "heldout_items": int}


def read_manifest(path: Path) -> Row:
    """manifest.json, or CaiError: missing or not whole (CORRUPT), written by a newer program (USAGE)."""
    try:
        manifest = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        raise CaiError(
            f"{path}: missing, so it is unknown what made this run: put it back from a copy, or start a new run",
            errors.CORRUPT,
        ) from None
    except orjson.JSONDecodeError as error:
        raise CaiError(
            f"{path}: not whole (line {error.lineno}): put it back from a copy, or start a new run",
            errors.CORRUPT,
        ) from error
    except OSError as error:
        raise files.io_error(path, "reading", error) from error
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if not isinstance(schema, int) or schema < 1:
        raise CaiError(f"{path}: has no schema number: put it back from a copy, or start a new run", errors.CORRUPT)
    if schema > SCHEMA:
        raise CaiError(
            f"{path}: schema {schema} is newer than {SCHEMA}, which this program reads: update the program",
            errors.USAGE,
        )
    if wrong := [name for name, kind in KINDS.items() if not isinstance(manifest.get(name, kind()), kind)]:
        raise CaiError(
            f"{path}: {wrong[0]}: should be a {KINDS[wrong[0]].__name__}: put it back from a copy", errors.CORRUPT
        )
    return manifest
