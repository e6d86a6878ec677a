"""Types reach the heart: rows are TypedDicts, the model is a Protocol, and `Any` stays rare and has its places."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CAI = ROOT / "cai"
MOST = 4.0  # uses of `Any` a thousand lines
# names that stand for `Any` or a dictionary of it: a new one would only hide its uses from the count
ALIASES = {
    "cai/store/jsonl.py": {"Row", "JsonObject"},
    "cai/store/rows.py": {"Key"},
    "cai/engine/asks.py": {"Name"},
    "cai/engine/native/graphs.py": {"Pool"},
    "cai/training/loss.py": {"Batch"},
    "cai/report/drawing.py": {"Style"},
    "cai/run/digests.py": {"Entry"},
}
ROW_TYPES = ("Record", "Example", "Pair", "Reject", "PairScore", "FigureRow")


def sources() -> dict[str, str]:
    return {str(path.relative_to(ROOT)): path.read_text() for path in sorted(CAI.rglob("*.py"))}


def uses(node: ast.AST) -> int:
    return sum(isinstance(inner, ast.Name) and inner.id == "Any" for inner in ast.walk(node))


def test_any_is_rarer_than_four_in_a_thousand_lines() -> None:
    files = sources()
    count = sum(uses(ast.parse(text)) for text in files.values())
    lines = sum(len(text.splitlines()) for text in files.values())
    assert 1000 * count / lines < MOST, f"{count} uses of Any in {lines} lines: say what it is, or `object`"


def test_every_name_that_stands_for_any_is_listed() -> None:
    found: dict[str, set[str]] = {}
    for name, text in sources().items():
        for node in ast.parse(text).body:
            if isinstance(node, ast.Assign) and uses(node.value) and isinstance(node.targets[0], ast.Name):
                found.setdefault(name, set()).add(node.targets[0].id)
    assert found == ALIASES


def test_the_model_needs_no_type_ignore() -> None:
    for name in ("models/policy.py", "models/fake.py", "models/auxiliary.py", "engine/model.py", "session.py"):
        assert "type: ignore" not in (CAI / name).read_text(), name


def test_every_type_ignore_names_its_error() -> None:
    for name, text in sources().items():
        assert not re.search(r"# type: ignore(?!\[)", text), name


def test_each_kind_of_row_is_used() -> None:
    files = sources()
    for kind in ROW_TYPES:
        users = [name for name, text in files.items() if re.search(rf"import .*\b{kind}\b", text)]
        assert users, f"{kind} of cai/store/row_types.py is used nowhere"
