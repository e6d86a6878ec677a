"""The rooms of the house in order: every import points down, late ones too, and torch stays where it belongs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CAI = ROOT / "cai"
ROOMS = (  # from the ground up: a room imports itself and the rooms before it
    "errors",
    "world",
    "terminal",
    "store",
    "metrics",
    "engine",
    "recipe",
    "run",
    "models",
    "data",
    "training",
    "inputs",
    "evaluate",
    "report",
    "preflight",
    "session",
    "pipeline",
    "commands",
)
HEAVY = {"torch", "transformers", "trl", "peft", "unsloth", "datasets", "bitsandbytes"}
SLOW = HEAVY | {"scipy", "numpy", "huggingface_hub", "matplotlib", "sklearn", "jinja2", "accelerate", "triton"}
TORCH_ROOMS = ("engine", "models", "training", "evaluate", "preflight", "commands")


def modules() -> list[Path]:
    return sorted(CAI.rglob("*.py"))


def room_of(path: Path) -> str:
    """cai/engine/static.py -> engine; cai/pipeline.py -> pipeline; cai/__init__.py -> ''."""
    first = path.relative_to(CAI).with_suffix("").parts[0]
    return "" if first == "__init__" else first


def imports_of(path: Path) -> list[tuple[str, bool]]:
    """(module, whether it is imported inside a function) of every import but those for type checking only."""
    tree = ast.parse(path.read_text())
    typing_only: set[int] = set()
    late: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            typing_only |= {id(inner) for inner in ast.walk(node)}
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            late |= {id(inner) for inner in ast.walk(node)}
    found = []
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in late) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [(name if file_of(name) else node.module, id(node) in late) for name in inner]
    return list(dict.fromkeys(found))


def file_of(module: str) -> Path | None:
    """The file of a module of ours, or None."""
    stem = ROOT / module.replace(".", "/")
    return next((file for file in (stem.with_suffix(".py"), stem / "__init__.py") if file.is_file()), None)


@cache
def brings(module: str) -> frozenset[str]:
    """The slow libraries that importing this module brings at once, through modules of ours."""
    seen, todo, found = {module}, [module], set()
    while todo:
        file = file_of(todo.pop())
        for name, late in imports_of(file) if file else ():
            if late:
                continue
            if name.split(".")[0] in SLOW:
                found.add(name.split(".")[0])
            elif name.startswith("cai") and name not in seen:
                seen.add(name)
                todo.append(name)
    return frozenset(found)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_import_points_down_and_every_room_is_listed(path: Path) -> None:
    here = room_of(path)
    if not here:
        return
    assert here in ROOMS, f"{here} is no room of the house: list it where it stands"
    for name, _ in imports_of(path):
        there = name.split(".")
        if there[0] == "cai" and len(there) > 1:
            assert there[1] in ROOMS, f"{path.name} imports {name}, which is in no listed room"
            assert ROOMS.index(there[1]) <= ROOMS.index(here), f"{path.name} ({here}) imports {name} from above"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_torch_outside_its_rooms(path: Path) -> None:
    if room_of(path) in TORCH_ROOMS:
        return
    heavy = [name for name, late in imports_of(path) if not late and name.split(".")[0] in HEAVY]
    assert not heavy, f"{path.name} imports {heavy} at the top"


def test_contributing_shows_the_rooms_in_this_order_and_where_torch_may_stand() -> None:
    text = (ROOT / "docs" / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| `cai/(\w+)(?:/|\.py)` \| .+ \| (yes)? ?\|$", text, re.MULTILINE)
    assert tuple(room for room, _ in rows) == ROOMS
    assert tuple(room for room, torch in rows if torch) == TORCH_ROOMS


def test_no_two_modules_import_each_other_in_a_circle() -> None:
    """Late imports count: a circle that is hidden in a function is a circle."""
    graph = {}
    for path in modules():
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        graph[module] = {name for name, _ in imports_of(path) if file_of(name) and name != module}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, f"a circle: {' -> '.join((*way[way.index(module) :], module))}"
        if module in done:
            return
        for name in sorted(graph.get(module, ())):
            visit(name, (*way, module))
        done.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_runner_and_dry_run_start_without_torch() -> None:
    code = "import runner, cai.pipeline, cai.commands.dry_run, cai.commands, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
