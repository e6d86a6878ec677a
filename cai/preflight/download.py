"""What a run will download before it can begin, said before it does: one line, or nothing where all is here.

Owns that sentence and the look into the hub's cache (no network). Sizes are `machine.size_of`'s arithmetic.
"""

from __future__ import annotations

from pathlib import Path

from cai.preflight.machine import local_config, size_of
from cai.recipe.load import Recipe
from cai.recipe.settings import ModelSection
from cai.recipe.settings_benchmarks import STAND_IN

GB = 1e9


def download_line(recipe: Recipe, backend: str) -> str:
    """`backend`: cuda or cpu; the embedded and the fake model come with the requirements."""
    if backend not in ("cuda", "cpu"):
        return ""
    names = [_policy(recipe.model), *map(_judge, _others(recipe))]
    found = [text for text in names if text]
    return f"to download: {'; '.join(found)}; into {_cache()} (HF_HOME)" if found else ""


def _policy(model: ModelSection) -> str:
    if at_hand(model.name):
        return ""
    size = size_of(local_config(model.name), model.name)
    if size is None:
        return f"{model.name}, of unknown size"
    whole, small = (size.weights_gib(key) * 2**30 / GB for key in ("bf16", "nf4"))
    if model.quantization != "nf4" or model.backend == "cpu" or model.revision != "main":
        return f"{model.name}, about {whole:.0f} GB"
    return f"{model.name}, about {small:.0f} GB where the hub has a copy in 4 bits, else {whole:.0f} GB"


def _others(recipe: Recipe) -> list[str]:
    """Guard and judges that are models, each once."""
    names = [recipe.guard.model] if recipe.guard.enabled else []
    names += [recipe.benchmarks.judge_of(name) for name in recipe.benchmarks.run]
    return [name for name in dict.fromkeys(names) if name not in (STAND_IN, "regex")]


def _judge(name: str) -> str:
    if at_hand(name):
        return ""
    size = size_of(local_config(name), name)
    return f"the judge {name}" + (f", up to {size.weights_gib('bf16') * 2**30 / GB:.0f} GB" if size else "")


def at_hand(name: str) -> bool:
    """A local folder, or weights of that name (or of its quantised copy by somebody else) in the hub's cache."""
    if Path(name).expanduser().is_dir():
        return True
    last = Path(name).name.lower()
    try:
        folders = [path for path in _cache().glob("models--*") if path.name.lower().split("--")[-1].startswith(last)]
    except OSError:
        return False
    return any(_is(folder.name, name) and any(folder.glob("snapshots/*/*.safetensors")) for folder in folders)


def _is(folder: str, name: str) -> bool:
    """The cache's folder of this very name, or of Unsloth's quantised copy of it."""
    owner, _, last = folder.removeprefix("models--").lower().partition("--")
    wanted_owner, _, wanted = name.lower().partition("/")
    copies = tuple(f"{wanted}-{end}" for end in ("bnb-4bit", "unsloth-bnb-4bit", "4bit"))
    return (owner == wanted_owner and last == wanted) or (owner == "unsloth" and last in (*copies, wanted))


def _cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)
