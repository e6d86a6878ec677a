"""The lines that an export ends with: how to load and serve what lies in the folder, on this machine. Pure."""

from __future__ import annotations

from pathlib import Path

from cai.commands.export_base import Base
from cai.commands.export_prompt import TEMPLATE, Asking
from cai.terminal import word

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes
NO_GGUF = "needs a GGUF: export --merged with llama.cpp's converter (LLAMA_CPP=its folder)"


def vllm_rank(rank: int) -> int:
    """The smallest --max-lora-rank that holds an adapter of this rank."""
    return next((size for size in VLLM_RANKS if size >= rank), rank)


def usage(base: Base, asking: Asking, rank: int, to: Path, merged: bool) -> list[str]:
    """vLLM, transformers, peft, datasets, Ollama: the base by the name or folder under which it lies here."""
    adapter, dataset, whole = (to.resolve() / name for name in ("adapter", "dataset", "merged"))
    pinned = f", revision={base.revision!r}" if base.revision else ""
    serve = f"vllm serve {word(base.here)}" + (f" --revision {base.revision}" if base.revision else "")
    serve += f" --enable-lora --max-lora-rank {vllm_rank(rank)} --lora-modules {word(f'cai={adapter}')}"
    loaded = f"AutoModelForCausalLM.from_pretrained({base.here!r}{pinned})"
    lines = [f"exported to {word(to)}"]
    if asking.nothing_to_load:
        return [
            *lines,
            f"datasets:      load_dataset({str(dataset)!r})",
            f"adapter:       {asking.missed}: no library loads it",
        ]
    lines += [
        f"vLLM:          {serve}{_as_trained(asking, adapter)}",
        f"peft:          PeftModel.from_pretrained({loaded}, {str(adapter)!r})  # base and tuned, the card's way",
    ]
    if base.on_hub:
        lines.append(f"transformers:  AutoModelForCausalLM.from_pretrained({str(adapter)!r})  # or this: tuned alone")
    if base.converted:
        lines.append(
            f"without a hub: from_pretrained({base.converted!r}) in place of {base.here!r}: what was trained on"
        )
    lines += [
        f"tokenizer:     AutoTokenizer.from_pretrained({(base.here if asking.folder is None else str(adapter))!r})",
        f"datasets:      load_dataset({str(dataset)!r})",
    ]
    if merged:
        lines.append(f"merged:        vllm serve {word(whole)}{_as_trained(asking, whole)}")
    if (to / "merged.gguf").is_file():
        folder = word(to.resolve())
        lines.append(f"Ollama:        cd {folder} && ollama create cai -f Modelfile && ollama run cai")
    else:
        lines.append(f"Ollama:        {NO_GGUF}")
    lines.append(_format_line(asking))
    return lines


def _as_trained(asking: Asking, folder: Path) -> str:
    """vLLM's flags for the format that was trained: the base's own template and end token are others."""
    if asking.format == "chat":
        return ""
    template = f" --chat-template {word(folder / TEMPLATE)}"
    known = asking.eos_id is not None
    return template + (f" --generation-config {word(folder)}" if known else "")


def _format_line(asking: Asking) -> str:
    if asking.missed:
        return f"prompt format: {asking.missed}: the folder holds no tokenizer files; the card says how to prompt"
    if asking.format == "chat":
        return "prompt format: the model's own chat template, as it was trained"
    stops = ", ".join(map(repr, asking.stops)) or "none"
    return f"prompt format: {TEMPLATE} (the policy prompt), end token {asking.eos}, stop strings {stops}; see the card"
