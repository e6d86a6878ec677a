"""The probe prompts: a few fixed questions that base and tuned answer at every milestone, so that both can be read.

Owns the file's schema (prompts/probes.yaml, or what `evaluation.probes` names). Doesn't own asking them. Probes make no
data: they are part of no identity, and a run may be resumed with others.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cai.errors import CaiError
from cai.recipe.grid import POOLS
from cai.recipe.yaml_files import check_keys, check_text, load_yaml

NAME = "prompts/probes.yaml"  # of the copy in a run folder
MOST = 24  # both arms answer each at every milestone: a handful is read, hundreds are an evaluation


@dataclass(frozen=True, slots=True)
class Probe:
    """`pool`: red-team ones are folded wherever they are shown."""

    id: str
    pool: str
    prompt: str


def load_probes(path: Path, data: bytes | None = None) -> tuple[Probe, ...]:
    """The probes of a file in order. Errors: CaiError, one line with the file, the entry and the remedy."""
    content, _ = load_yaml(path, data)
    if not isinstance(content, list) or not content:
        raise CaiError(f'{path}: no list of probes. Write entries of id, pool and prompt, or evaluation.probes = "".')
    if len(content) > MOST:
        raise CaiError(f"{path}: {len(content)} probes, at most {MOST}: both models answer each at every milestone.")
    found: dict[str, Probe] = {}
    for number, entry in enumerate(content, start=1):
        where = f"{path}: probe {number}"
        check_keys(entry, ("id", "pool", "prompt"), (), where)
        for key in ("id", "prompt"):
            check_text(entry[key], f"{where}: {key}")
        if entry["pool"] not in POOLS:
            raise CaiError(f"{where}: pool: {entry['pool']!r} found; write {' or '.join(POOLS)}")
        if entry["id"] in found:
            raise CaiError(f"{where}: id {entry['id']!r} is given twice; name each once")
        found[entry["id"]] = Probe(entry["id"], entry["pool"], entry["prompt"].strip())
    return tuple(found.values())
