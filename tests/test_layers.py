"""Imports point down only, and what starts at once does not import torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BOTTOM = ("records", "run", "recipe", "errors", "files", "settings", "settings_eval", "scanning", "attempts", "lock")
MIDDLE = (
    "engine",
    "model",
    "tokenizers",
    "prompts",
    "parsing",
    "constitution",
    "grid",
    "yamlfile",
    "fake",
    "embedded",
    "plan",
)
LAYERS = {name: 0 for name in BOTTOM} | {name: 1 for name in MIDDLE}
LAYERS |= {"stage": 2, "pairs": 3, "stages": 3, "train": 3, "training": 3, "evaluate": 3, "gates": 3, "report": 4}
LAYERS |= {"session": 3, "steps": 5, "commands": 6}
TORCH = {"torch", "transformers", "trl", "peft", "unsloth", "datasets", "bitsandbytes"}
MAY_IMPORT_TORCH = ("model", "embedded", "engine", "train", "training", "evaluate", "doctor", "export")


def modules() -> list[Path]:
    return sorted((ROOT / "cai").rglob("*.py"))


def name_of(path: Path) -> str:
    """cai/engine/static.py -> engine; cai/stage.py -> stage."""
    parts = path.relative_to(ROOT / "cai").with_suffix("").parts
    return parts[0]


def top_imports(path: Path) -> list[str]:
    """Modules that are imported when this one is (not inside functions, not for type checking only)."""
    found: list[str] = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    here = LAYERS.get(name_of(path))
    for imported in top_imports(path):
        parts = imported.split(".")
        if parts[0] != "cai" or len(parts) < 2 or here is None:
            continue
        assert LAYERS.get(parts[1], 0) <= here, f"{path.name} (layer {here}) imports {imported} from above"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_torch_outside_its_layers(path: Path) -> None:
    if name_of(path) in MAY_IMPORT_TORCH:
        return
    heavy = [name for name in top_imports(path) if name.split(".")[0] in TORCH]
    assert not heavy, f"{path.name} imports {heavy} at the top"


def test_runner_and_dry_run_start_without_torch() -> None:
    code = "import runner, cai.steps, cai.dryrun, cai.commands, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_main_reaches_the_model_in_at_most_four_calls() -> None:
    """runner.main -> milestone -> steps.X -> the module that calls the model."""
    text = (ROOT / "runner.py").read_text()
    called = {
        node.func.attr
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    }
    assert {"collect", "write_dataset", "train", "evaluate", "decide", "report"} <= called
