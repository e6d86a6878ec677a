"""Which base an exported adapter belongs to, as others can find it and as it lies here.

Owns the name and the commit in shared files, and the place in printed lines. Invariant: a base out of a local folder
never stands under a name that the hub could resolve to somebody else's model.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from cai.models import embedded, weights
from cai.report.snapshot import Snapshot

HUB_NAMES = {embedded.NAME: "HuggingFaceTB/SmolLM2-135M-Instruct"}  # where the embedded model's original lies
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Base:
    """`shared`: in files that travel; `here`: in lines for this machine; `revision`: its commit, "" if none is known.

    `twin`: the repository that was loaded in its place (already quantised), with its own commit; "" where none was.
    `converted`: the folder of the embedded model on this machine, which needs no hub; "" for every other base.
    """

    shared: str
    here: str
    revision: str = ""
    twin: str = ""
    converted: str = ""

    @property
    def on_hub(self) -> bool:
        return "/" in self.shared and HUB_ID.fullmatch(self.shared) is not None


def base_of(snapshot: Snapshot) -> Base:
    """The run's base, by its manifest."""
    facts = snapshot.manifest.get("model") or {}
    name, revision = snapshot.model, str(facts.get("revision") or "")
    if name in HUB_NAMES:
        folder = embedded.converted()
        return Base(HUB_NAMES[name], HUB_NAMES[name], converted="" if folder is None else str(folder))
    if weights.is_local(facts) or not HUB_ID.fullmatch(name):
        return _local(snapshot, name)
    commit = revision if COMMIT.fullmatch(revision) else ""
    loaded = str(facts.get("loaded_from") or name)
    if loaded.lower() != name.lower():
        return Base(name, name, "", f"{loaded}@{commit}" if commit else loaded)
    return Base(name, name, commit)


def _local(snapshot: Snapshot, name: str) -> Base:
    """A placeholder that is no hub id (it has spaces), and the folder where it lies on this machine."""
    place = Path(os.environ["CAI_EMBEDDED"]) if snapshot.backend == "embedded" and embedded.is_given() else Path(name)
    place = place.expanduser()
    plain = re.sub(r"[^\w.-]+", "-", place.name).strip("-") or "base"
    return Base(f"<folder of {plain}>", str(place.resolve()) if place.is_dir() else str(place))
