"""What tests import by name (fixtures live in conftest.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson

ROOT = Path(__file__).resolve().parents[2]
FAKE = ("--set", "model.backend=fake", "--set", "model.name=fake", "--set", "evaluation.critic_items=4")
PAPERS_WAY = (  # principles dealt blindly, every critique acted on, every revision preferred: each item has every row
    *("--set", "principles.choice=uniform", "--set", "critiques.found=drawn", "--set", "critiques.no_issue=revise"),
    *("--set", "pairs.label=always"),
)
# rounds that find nothing: whether there is something to criticise is decided before a critique is asked for
CALIBRATED = ("--set", "principles.by=rule_check", "--set", "critiques.found=calibrated")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in path.read_bytes().split(b"\n") if line]
