"""Weights into memory, and what must hold of any load: safe and whole files, nothing missing, enough room.

Owns the checks before a load, the two ways of loading (Unsloth, and plain transformers in float32 on a CPU), the CPU's
LoRA and the arithmetic before a download. Doesn't own names, tokens or modes (`policy`). Imports torch late.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from cai.engine.foreign import Foreign, HfModel, HfTokenizer
from cai.engine.memory import MOST_COPIED
from cai.errors import CaiError
from cai.models import weights
from cai.models.tokenizer_file import check_template
from cai.recipe.settings import LoraSection, ModelSection

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

KEY = "model.name"
PREQUANTISED = {"nf4": {"load_in_4bit": True}, "int8": {"load_in_4bit": False, "load_in_8bit": True}}
BYTES = 4  # of a float32 number
ROOM = 1.25  # of the weights: activations, scores, the adapter and its optimiser at short lengths
SPARE = 1 << 30  # bytes for libraries and tokenizer


def _finite(parameter: torch.Tensor) -> bool:
    """Whether every number is one; packed weights (nf4, int8, fp8) are not looked at. Takes no memory."""
    import torch

    plain = parameter.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if not plain or parameter.is_meta or not parameter.numel():
        return True
    return all(bool(end.isfinite()) for end in parameter.detach().aminmax())


@contextlib.contextmanager
def complete_weights(key: str = KEY) -> Iterator[None]:
    """Within the block a checkpoint that lacks weights is an error; transformers draws them at random, with a warning.

    So is one with a number that is not finite: it would load, write, and have every text refused. Both are known to
    `_finalize_model_loading` alone where the caller is Unsloth (transformers 5.17).
    """
    from transformers.modeling_utils import PreTrainedModel

    kept = PreTrainedModel.__dict__["_finalize_model_loading"]
    missing: list[str] = []
    broken: list[str] = []

    def finalize(model: HfModel, load_config: object, loading_info: object) -> Foreign:
        found = kept.__func__(model, load_config, loading_info)
        broken.extend(name for name, parameter in model.named_parameters() if not _finite(parameter))
        missing.extend(sorted(found.missing_keys | {str(key[0]) for key in found.mismatched_keys}))
        return found

    setattr(PreTrainedModel, "_finalize_model_loading", staticmethod(finalize))  # noqa: B010
    try:
        yield
    finally:
        setattr(PreTrainedModel, "_finalize_model_loading", kept)  # noqa: B010  (a method cannot be assigned, for mypy)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CaiError(f"{key}: the weights lack {missing[0]}{more}, which would be random. Download the model again.")
    if broken:
        raise CaiError(f"{key}: {broken[0]} is not finite. Download the model again.")


def check_vocabulary(hf: HfModel, hf_tokenizer: HfTokenizer, name: str, key: str = KEY) -> None:
    """Every token that a text can become has a row among the embeddings. Error: the tokenizer of another model.

    A row that is not there is an IndexError on a CPU and a dead process on a GPU. Of added tokens those count that the
    template writes or that end a text: some models come with others that they never see.
    """
    rows, added = int(hf.get_input_embeddings().weight.shape[0]), dict(hf_tokenizer.added_tokens_decoder)
    template, eos = str(hf_tokenizer.chat_template or ""), hf_tokenizer.eos_token_id
    seen = {id_ for id_, token in added.items() if id_ == eos or str(token) in template}
    if beyond := [i for i in hf_tokenizer.get_vocab().values() if i >= rows and (i in seen or i not in added)]:
        raise CaiError(
            f"{key}: {name}: its tokenizer has the token {max(beyond):,}, and the model has {rows:,} rows: they are of "
            "two models. Download both again."
        )


def check_files(section: ModelSection, backend: str, name: str) -> None:
    """Every check that needs no weights. `name`: the folder or hub id to load. Errors: CaiError (exit 2)."""
    folder, revision = (Path(name) if Path(name).is_dir() else None), revision_of(section, name)
    if folder is not None:
        weights.check_folder(folder, KEY)
    elif _file_of(name, "adapter_config.json", revision):
        raise CaiError(f"{KEY}: {name} is an adapter, which would load another base. Name that base itself.")
    if backend == "cpu":
        check_room(section, folder, revision)
    check_template(section, name if folder is not None else _file_of(name, "tokenizer_config.json", revision))


def revision_of(section: ModelSection, name: str) -> str | None:
    return None if Path(name).is_dir() or section.revision == "main" else section.revision


def _file_of(name: str, file: str, revision: str | None) -> str:
    """A small file of a hub model, out of the cache or downloaded; "" where it has none or the hub is out of reach."""
    from huggingface_hub import hf_hub_download

    try:
        return str(hf_hub_download(name, file, revision=revision))
    except Exception:  # the hub's own errors and those of four network libraries; loading will tell
        return ""


def by_unsloth(section: ModelSection, backend: str, name: str) -> tuple[HfModel, HfTokenizer]:
    """(model, tokenizer) on the GPU, or of the embedded model. Errors: what the libraries raise."""
    import torch
    from unsloth import FastLanguageModel

    options: dict[str, Any] = PREQUANTISED.get(section.quantization, {"load_in_4bit": False})
    dtype = torch.float32 if section.quantization == "fp32" else torch.bfloat16
    if backend == "embedded":
        options, dtype = {"load_in_4bit": False}, (torch.float32 if section.quantization != "bf16" else torch.bfloat16)
    revision = revision_of(section, name)
    found: tuple[HfModel, HfTokenizer] = FastLanguageModel.from_pretrained(
        model_name=name,
        max_seq_length=section.max_seq_length,
        dtype=dtype,
        revision=revision,
        use_exact_model_name=revision is not None,  # a commit belongs to the repository that was named, not to a twin
        use_safetensors=True,
        trust_remote_code=False,
        **options,
    )
    return found


def plain(section: ModelSection, name: str) -> tuple[HfModel, HfTokenizer]:
    """(model, tokenizer) in float32 on the CPU. Errors: what the libraries raise."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    revision = revision_of(section, name)
    more: dict[str, Any] = {"trust_remote_code": False} | ({"revision": revision} if revision else {})
    tokenizer = AutoTokenizer.from_pretrained(name, **more)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, use_safetensors=True, **more)
    return model.eval(), tokenizer


def lora_options(lora: LoraSection) -> dict[str, Any]:
    """PEFT's names of the recipe's keys."""
    names = {"r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout, "bias": "none"}
    return {**names, "target_modules": list(lora.target_modules)}


def wrap_plain(hf: HfModel, lora: LoraSection) -> HfModel:
    """The model with a fresh LoRA by PEFT alone."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", **lora_options(lora))
    return get_peft_model(cast("PreTrainedModel", hf), config)


def check_modules(hf: HfModel, names: Sequence[str]) -> None:
    """Every name of `lora.target_modules` is a linear module of the decoder's layers. Error: the names that there are.

    PEFT takes a list of which one name fits and passes over the others: half of the adapter would be missing, untold.
    """
    import torch

    known = {
        name.rpartition(".")[2]
        for name, module in hf.named_modules()
        if any(part.isdigit() for part in name.split("."))
        and "lora_" not in name
        and (isinstance(module, torch.nn.Linear) or hasattr(module, "base_layer"))
    }
    refuse_unknown(names, known)


def refuse_unknown(names: Sequence[str], known: set[str]) -> None:
    if known and (odd := [name for name in names if name not in known]):
        listed = ", ".join(sorted(known))
        raise CaiError(
            f"lora.target_modules: {odd[0]!r} is no linear module of this model's layers; there are {listed}."
        )


def check_room(section: ModelSection, folder: Path | None, revision: str | None) -> None:
    """Whether the model fits into memory in float32, before a download or a load. Error: exit 2 with both sizes."""
    count = _parameters(section, folder, revision)
    copied = count * BYTES if count * BYTES <= MOST_COPIED else 0.0  # for generation, beside the weights
    need, free = count * BYTES * ROOM + SPARE + copied, free_memory()
    if count and free and need > free:
        raise CaiError(
            f"{KEY}: {section.name} needs about {need / 1e9:.1f} GB of memory on a CPU ({count / 1e9:.2f} billion "
            f"parameters in float32), {free / 1e9:.1f} GB are free. Take a smaller model, or a machine with a GPU."
        )


def _parameters(section: ModelSection, folder: Path | None, revision: str | None) -> float:
    if folder is not None:
        return float(weights.stored_parameters(weights.check_folder(folder, KEY), KEY))
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(section.name, "config.json", revision=revision)
    except Exception as error:  # the hub's own errors and those of four network libraries
        raise CaiError(
            f"{KEY}: {section.name} cannot be had ({type(error).__name__}). Check the name and the network (or HF_HOME "
            "of a downloaded copy), or give a local folder."
        ) from None
    config = weights.read_config(Path(path).parent, KEY)
    weights.check_config(config, f"{KEY}: {section.name}: config.json")
    return weights.parameters(config.get("text_config") or config)


def free_memory() -> int:
    """Bytes that this process may still take: of the machine, and of its control group; 0 where nothing tells."""
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")))
    with contextlib.suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        found.append(limit - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    return max(0, min(found, default=0))
