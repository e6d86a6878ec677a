"""A module is read in one sitting, a function on one screen."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

CAI = Path(__file__).resolve().parents[1] / "cai"
MODULE_LINES, FUNCTION_LINES = 350, 60  # decorators and docstrings counted


def functions_of(source: str) -> dict[str, int]:
    """Lines of each function by `name:line`, from its first decorator to its last line."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[f"{node.name}:{node.lineno}"] = (node.end_lineno or first) - first + 1
    return found


@pytest.mark.runs
@pytest.mark.parametrize("path", sorted(CAI.rglob("*.py")), ids=lambda path: str(path.relative_to(CAI)))
def test_no_module_and_no_function_is_longer_than_one_reads_at_once(path: Path) -> None:
    source = path.read_text()
    assert source.count("\n") <= MODULE_LINES, f"{path.name}: cut it along its ideas"
    long = {name: lines for name, lines in functions_of(source).items() if lines > FUNCTION_LINES}
    assert not long, f"{path.name}: {long}"


def test_a_function_is_counted_with_its_decorators() -> None:
    assert functions_of("@one\n@two\ndef f():\n    x = 1\n\n    return x\n") == {"f:3": 6}
