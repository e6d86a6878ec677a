"""The files of a model before anything is loaded: safetensors only, whole, of a size that a model has, and which ones.

Owns what is refused (pickles, an adapter in the model's place, parts that are missing or cut, absurd configs), the
identity of a local folder by its content, and the size and module names that the headers tell. Reads headers and small
samples, never the weights; imports no torch.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import orjson

from cai import errors
from cai.errors import CaiError
from cai.store.jsonl import JsonObject, Row

MOST_HEADER = 100 << 20  # bytes; safetensors' own bound
MOST_CONFIG = 16 << 20
HASHED_WHOLE = 256 << 20  # bytes of a file up to which every byte counts for its identity
SAMPLES, SAMPLE = 256, 4096  # of a larger one: blocks, spread evenly, and their length
LIMITS = {  # config.json's numbers: the largest published models are far below
    "num_hidden_layers": 2_000,
    "hidden_size": 262_144,
    "intermediate_size": 2_097_152,
    "num_attention_heads": 4_096,
    "num_key_value_heads": 4_096,
    "vocab_size": 16_777_216,
    "max_position_embeddings": 1_000_000_000_000,
}
LIMITS_ANYWHERE = LIMITS | {  # of other families and of nested parts (a vision tower, experts); 0 is "none" there
    "head_dim": 65_536,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 65_536),
    **dict.fromkeys(("n_layer", "n_layers", "num_layers", "depth"), 2_000),  # other families, a vision tower
    **dict.fromkeys(("n_embd", "d_model", "moe_intermediate_size"), 2_097_152),
}
MOST_PARAMETERS = 4e12
UNSTABLE = ("transformers_version", "_name_or_path", "name_or_path")  # of config.json: not what the model is
LOCAL = "content:"  # how the revision of a local folder begins in the manifest
WORDS = (  # of a folder: what makes prompts out of texts, and texts out of tokens
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def check_folder(folder: Path, key: str) -> list[Path]:
    """The weight files of a local model. Errors: CaiError (exit 2), one line, for what must not or cannot be loaded."""
    if (folder / "adapter_config.json").is_file():
        raise CaiError(
            f"{key}: {folder}: adapter_config.json would load another base than this folder. "
            "Name the base itself, or merge the adapter first (--export --merged)."
        )
    _refuse_pipes(folder, key)
    config = read_config(folder, key)
    check_config(config, f"{key}: {folder / 'config.json'}")
    files = _weight_files(folder, key)
    for file in files:
        header(file, key)
    return files


def _refuse_pipes(folder: Path, key: str) -> None:
    """Reading a pipe or a device would wait for ever, whichever of a model's twenty files it stands for."""
    for path in sorted(folder.iterdir()):
        if path.exists() and not path.is_file() and not path.is_dir():
            raise CaiError(f"{key}: {path}: is a pipe or a device, not a file of a model. Download it again.")


def read_config(folder: Path, key: str) -> Row:
    path = folder / "config.json"
    try:
        if path.stat().st_size > MOST_CONFIG:
            raise CaiError(f"{key}: {path}: larger than {MOST_CONFIG >> 20} MiB. Give the folder of a saved model.")
        value = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        raise CaiError(f"{key}: {folder}: no config.json in it. Give the folder of a saved model.") from None
    except (OSError, orjson.JSONDecodeError) as error:
        raise CaiError(f"{key}: {path}: cannot be read ({error}). Download it again.") from None
    if not isinstance(value, dict):
        raise CaiError(f"{key}: {path}: holds no table. Download it again.")
    return value


def check_config(config: JsonObject, where: str) -> None:
    """Numbers that no model has would fill the memory before anything else looks at them."""
    decoder, parts = (config, config.get("text_config")), list[object]([config])
    while parts:
        part = parts.pop()
        if not isinstance(part, Mapping):
            continue
        parts += part.values()
        for name, most in LIMITS_ANYWHERE.items():
            value, least = part.get(name), int(name in LIMITS and any(part is own for own in decoder))
            if value is not None and not (isinstance(value, int) and least <= value <= most):
                raise CaiError(
                    f"{where}: {name} is {repr(value)[:40]}, expected {least} to {most:,}. Download it again."
                )
        if parameters(part) > MOST_PARAMETERS:
            raise CaiError(f"{where}: describes a model of {parameters(part):.0e} parameters. Download it again.")


def parameters(config: JsonObject) -> float:
    """Parameters of a dense decoder of this shape, roughly; 0 where config.json does not tell."""
    try:
        layers, hidden = int(config["num_hidden_layers"]), int(config["hidden_size"])
        inner, vocab = int(config.get("intermediate_size") or 4 * hidden), int(config["vocab_size"])
    except (KeyError, TypeError, ValueError):
        return 0.0
    tables = 1 if config.get("tie_word_embeddings") else 2
    return layers * (4.0 * hidden * hidden + 3.0 * hidden * inner) + tables * vocab * hidden


def _weight_files(folder: Path, key: str) -> list[Path]:
    """The safetensors files: those of the index, or all. A pickle is never among them: it can hold code."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(orjson.loads(index.read_bytes())["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise CaiError(f"{key}: {index}: cannot be read. Download it again.") from None
        odd = [n for n in names if not isinstance(n, str) or not n.endswith(".safetensors") or "/" in n or "\\" in n]
        if odd:
            raise CaiError(f"{key}: {index}: names {str(odd[0])[:80]}: weights must be safetensors beside it.")
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise CaiError(f"{key}: {folder}: {missing[0]} is missing. Download it again.")
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    pickles = sorted(path.name for kind in ("bin", "pt", "pth") for path in folder.glob(f"*.{kind}"))
    if pickles:
        raise CaiError(f"{key}: {folder}: {pickles[0]} is a pickle, which may hold code. Save it as safetensors.")
    raise CaiError(f"{key}: {folder}: no model.safetensors in it. Give the folder of a saved model.")


def header(file: Path, key: str) -> Row:
    """The tensors' table of a safetensors file. Error: cut or odd, as a download that broke off leaves it."""
    again = "Download it again"
    try:
        with file.open("rb") as source:
            size = os.fstat(source.fileno()).st_size
            length = int.from_bytes(source.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, MOST_HEADER):
                raise CaiError(f"{key}: {file}: no whole safetensors file ({size:,} bytes). {again}.")
            table = orjson.loads(source.read(length))
        ends = [row["data_offsets"][1] for name, row in table.items() if name != "__metadata__"]
        wanted = 8 + length + max(ends, default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise CaiError(f"{key}: {file}: its header cannot be read. {again}.") from None
    if size != wanted:
        raise CaiError(f"{key}: {file}: {size:,} bytes of {wanted:,}: the download broke off. {again}.")
    return {name: row for name, row in table.items() if name != "__metadata__"}


def identity(folder: Path) -> str:
    """`content:` and 16 hex of what a local folder holds: config, headers, sizes, the weights' bytes (large: sampled).

    Two fine-tunings of one model have equal headers, so bytes are looked at: all up to 256 MiB a file, else 256 blocks.
    """
    sha = hashlib.sha256()
    try:
        config = orjson.loads((folder / "config.json").read_bytes())
        config = {name: value for name, value in config.items() if name not in UNSTABLE}
    except (OSError, ValueError, AttributeError):
        config = {}
    sha.update(orjson.dumps(config, option=orjson.OPT_SORT_KEYS))
    for file in sorted(folder.glob("*.safetensors")):
        sha.update(f"\0{file.name}\0{file.stat().st_size}\0".encode())
        for block in _blocks(file):
            sha.update(block)
    return LOCAL + sha.hexdigest()[:16]


def _blocks(file: Path) -> Iterator[bytes]:
    size = file.stat().st_size
    with file.open("rb") as source:
        if size <= HASHED_WHOLE:
            while part := source.read(1 << 20):
                yield part
            return
        yield source.read(8 + min(int.from_bytes(source.read(8), "little"), MOST_HEADER))
        for i in range(SAMPLES):
            source.seek(max(0, size - SAMPLE) * i // (SAMPLES - 1))
            yield source.read(SAMPLE)


def weight_files(folder: Path) -> list[Path]:
    """The files of a whole model; none where its config, its weights or one of their parts is missing."""
    if not (folder / "config.json").is_file():
        return []
    for kind in ("safetensors", "bin"):
        index = next(iter(sorted(folder.glob(f"*.{kind}.index.json"))), None)
        if index is not None:
            try:
                parts = sorted({folder / part for part in orjson.loads(index.read_bytes())["weight_map"].values()})
            except (OSError, ValueError, KeyError, TypeError, AttributeError):  # a list that was cut or is none
                return []
            return parts if all(part.is_file() for part in parts) else []
        if files := sorted(folder.glob(f"*.{kind}")):
            return files
    return []


def known_by(folder: Path) -> Row:
    """How manifest and events know a local folder: what it holds, its weights and its tokenizer with the template."""
    sha = hashlib.sha256()
    for name in WORDS:
        if (folder / name).is_file():
            data = (folder / name).read_bytes()
            sha.update(f"\0{name}\0{len(data)}\0".encode() + data)
    return {"revision": identity(folder), "tokenizer": LOCAL + sha.hexdigest()[:16]}


def refuse_other(before: Iterable[JsonObject], facts: JsonObject, key: str) -> None:
    """A guard or judge in a local folder is the one that this run asked before, or its verdicts are of two models.

    `before`: what was told at each load. Errors: CaiError(DRIFT), before it is asked anything.
    """
    for event in before:
        if event.get("model") != facts["model"]:
            continue
        for name in ("revision", "tokenizer"):
            then, now = str(event.get(name, "")), str(facts.get(name, ""))
            if then.startswith(LOCAL) and then != now:
                raise CaiError(
                    f"{key}: {facts['model']}: its {name} is not what this run asked before ({then} -> {now}): put the "
                    "folder's files back, or use the other model under another name, in a new run or a fork",
                    errors.DRIFT,
                )


def is_local(facts: JsonObject) -> bool:
    """Whether a manifest's model came out of a folder of the user's, which nobody else can find by its name."""
    revision, name = str(facts.get("revision", "")), str(facts.get("model", ""))
    return revision == "local" or revision.startswith(LOCAL) or name.startswith(("/", ".", "~"))


def stored_parameters(files: list[Path], key: str) -> int:
    """How many numbers the weight files hold."""
    rows = (row for file in files for row in header(file, key).values())
    return sum(math.prod(row.get("shape") or [1]) for row in rows)


def projections(files: list[Path], key: str) -> set[str]:
    """Last names of the linear modules of the decoder's layers, as `lora.target_modules` spells them."""
    found = set()
    for file in files:
        for name, row in header(file, key).items():
            path = name.split(".")
            if path[-1] == "weight" and len(row.get("shape") or []) == 2 and any(part.isdigit() for part in path):
                found.add(path[-2])
    return found
