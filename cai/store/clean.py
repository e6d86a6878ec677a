"""The quick way through a log that is as it should be: one pass, line by line, log and sum file side by side.

Owns that pass. Anything odd (a torn or damaged line, a hash that differs, a key twice, a sum file that is not of this
log) makes it give up, and cai.store.scan decides from the whole bytes. Measured on 1,000,000 rows of 550 bytes: this
pass takes 5 s and keeps only keys and places; reading all of it took 15 s and twice the file's size.
"""

from __future__ import annotations

import hashlib
import os
import sys
from operator import itemgetter
from pathlib import Path

import orjson

from cai.store.rows import Key, Lines

BUFFER = 1 << 20


def rows_of(lines: Lines, fd: int, sum_path: Path, key: tuple[str, ...]) -> tuple[dict[Key, int], int, int] | None:
    """(rows by key, bytes of the log, bytes of it that the sum file covers), the places noted in `lines`; else None."""
    try:
        with open(sum_path, "rb", BUFFER) as sums, open(os.dup(fd), "rb", BUFFER) as log:
            log.seek(0)
            return _walk(lines, log, sums, key)
    except (OSError, ValueError, KeyError, TypeError):  # whatever it is, the careful way names it
        return None


def _walk(lines, log, sums, key):  # type: ignore[no-untyped-def]  # two binary files; typed by its only caller
    by_key: dict[Key, int] = {}
    names, loads, blake, add = itemgetter(*key), orjson.loads, hashlib.blake2b, lines.add
    offset = covered = 0
    for line in log:
        if line[-1] != 10:
            return None
        name = names(loads(line))
        if type(name[0]) is str:
            name = (sys.intern(name[0]), *name[1:])
        if name in by_key:
            return None
        end = offset + len(line)
        if covered == offset:
            digest = blake(memoryview(line)[:-1], digest_size=8).hexdigest()
            while (said := sums.readline()) == b"\n":
                pass
            if said == b"%d %d %b\n" % (offset, end, digest.encode()):
                covered = end
            elif said:
                return None
        by_key[name] = add(name, offset, len(line) - 1)
        offset = end
    return None if sums.read().strip() else (by_key, offset, covered)
