"""The one loaded model: load once, generate, go into LoRA mode, adapter on and off, all on the same weights object.

Owns which backend runs (CUDA, embedded or any model on a CPU, fake), what is loaded under which name, and the switch
between modes. Doesn't own reading the weights (`loading`), generation (`engine`) or training (`train`). Torch is
imported inside functions.

Invariants: the weights are loaded once a process; control tokens never get into a prompt of a base model (the
tokenizer surface encodes text as plain text); a LoRA weight is float32.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cai import errors
from cai.engine import Engine, Rules
from cai.engine.foreign import HfModel, HfTokenizer
from cai.engine.model import Model
from cai.engine.tokenizers import HFTokenizer, Tokenizer
from cai.errors import CaiError
from cai.models import embedded, loading, weights
from cai.models.libraries import prepare_environment, quiet
from cai.models.threads import prepare_threads
from cai.recipe.settings import EngineSection, LoraSection, ModelSection
from cai.store.jsonl import Row, one_line

if TYPE_CHECKING:
    import torch

Backend = Literal["cuda", "cpu", "embedded", "fake"]


def cuda_devices() -> int:
    """How many CUDA devices the driver sees, asked without importing torch (0: no driver, no device)."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return 0 if visible is not None and visible.strip() in ("", "-1") else count.value


def backend_of(section: ModelSection) -> Backend:
    """`auto` is CUDA where a device is visible, else the embedded model."""
    if section.backend != "auto":
        return section.backend
    return "cuda" if cuda_devices() else "embedded"


@dataclass
class LoadedModel:
    """The weights and what the pipeline may ask of them. `facts` go into the manifest."""

    hf: HfModel
    hf_tokenizer: HfTokenizer
    tokenizer: Tokenizer
    format: Literal["base", "chat"]
    backend: Backend
    name: str
    device: torch.device
    max_seq_length: int
    facts: Row = field(default_factory=dict)
    lora: bool = False
    attached: Path | None = None  # the folder of the adapter that is on these weights; None: none, or a fresh one
    rules: Rules = field(default_factory=Rules)
    say: Callable[[str], None] = print
    _engine: Engine | None = None
    _asked: tuple[str, str] = ("", "")  # linears and kv that the engine was asked for

    @property
    def embedded(self) -> bool:
        return self.backend == "embedded"

    def engine(self, section: EngineSection, rounded: bool = False) -> Engine:
        """The engine over these weights; one at a time, made on first use and after `release`.

        `rounded`: data are made, for which the recipe may ask for 8-bit products; what measures never gets them.
        """
        section = section if rounded else section.exact
        if self._engine is not None and (section.linears, section.kv) != self._asked:
            self.release()
        if self._engine is None:
            from cai.engine.build import make_engine

            self.mode("generate")
            self._asked = linears, kv = section.linears, section.kv
            self._engine = make_engine(section.backend, self, batch_size=section.batch_size, linears=linears, kv=kv)
            self._engine.rules = self.rules
            for note in ("engine", "linears", "kv"):  # what was chosen for this model and card, and why
                if note in self._engine.stats.extra:
                    self.say(f"engine: {self._engine.stats.extra[note]}")
        return self._engine

    def release(self) -> None:
        """Free the engine's caches (before training)."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def to_lora(self, lora: LoraSection, seed: int = 0) -> None:
        """Wrap the loaded weights with a fresh LoRA on every linear projection; an earlier adapter is removed."""
        import torch

        loading.check_modules(self.hf, lora.target_modules)
        self.release()
        self.attached = None
        if self.lora:
            self.hf = self.hf.unload()
            for attribute in ("peft_config", "_hf_peft_config_loaded"):
                vars(self.hf).pop(attribute, None)
        torch.manual_seed(seed)
        with quiet():
            self.hf = self._wrapped(lora, seed)
        self.lora = True
        for name, weight in self.hf.named_parameters():
            if "lora_" in name and weight.dtype != torch.float32:
                weight.data = weight.data.float()  # fact 7: bf16 LoRA weights do not move at lr 5e-6

    def _wrapped(self, lora: LoraSection, seed: int) -> HfModel:
        if self.backend == "cpu":
            return loading.wrap_plain(self.hf, lora)
        from unsloth import FastLanguageModel

        return FastLanguageModel.get_peft_model(
            self.hf,
            **loading.lora_options(lora),
            use_gradient_checkpointing=False,  # training switches its own
            random_state=seed,
            max_seq_length=getattr(self.hf, "max_seq_length", 4096),
        )

    def load_adapter(self, folder: Path, lora: LoraSection) -> None:
        """Put a trained adapter (safetensors) onto the loaded weights.

        Errors: CaiError where it is not whole, or none of this model's: a matrix that is missing would be an untrained
        one, and nothing would say so.
        """
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        self.to_lora(lora)
        try:
            result: Any = set_peft_model_state_dict(self.hf, load_file(str(folder / "adapter_model.safetensors")))
        except Exception as error:  # of a damaged file safetensors and PEFT raise what they like
            raise CaiError(f"{folder}: the adapter cannot be loaded: {one_line(error)[:300]}", errors.CORRUPT) from None
        missing = [key for key in getattr(result, "missing_keys", ()) if "lora_" in key]
        if odd := [*(getattr(result, "unexpected_keys", None) or ()), *missing]:
            raise CaiError(f"{folder}: the adapter does not fit this model: {', '.join(odd[:3])}", errors.CORRUPT)
        self.attached = folder

    def attach(self, folder: Path, lora: LoraSection) -> None:
        """This adapter is on the weights afterwards: loaded, unless training or an earlier call left it there."""
        if self.attached != folder:
            self.load_adapter(folder, lora)

    @contextlib.contextmanager
    def adapter(self, on: bool) -> Iterator[None]:
        """Within the block the adapter is on, or off (then the model is the base)."""
        if on or not self.lora:
            yield
            return
        with self.hf.disable_adapter():
            yield

    def mode(self, which: Literal["generate", "train"]) -> None:
        """Unsloth's two modes of the same weights; dropout off in the first."""
        if self.backend == "cuda":
            from unsloth import FastLanguageModel

            (FastLanguageModel.for_inference if which == "generate" else FastLanguageModel.for_training)(self.hf)
        self.hf.train(which == "train")


def load(section: ModelSection, backend: Backend, *, seed: int = 0, say: Callable[[str], None] = print) -> Model:
    """Load the weights once. Errors: no such model, no weights in reach, no memory (exit 2, one line)."""
    prepare_environment()
    if backend == "fake":
        from cai.models.fake import FakeModel

        return FakeModel(section)
    if backend in ("embedded", "cpu"):
        prepare_threads()
    started = time.monotonic()
    with quiet():
        if backend != "cpu":
            import unsloth  # noqa: F401  (before trl, transformers and peft: it patches them at import)
        import torch

    if backend == "cuda" and not torch.cuda.is_available():
        raise CaiError('model.backend: "cuda" is asked for, and this torch sees no GPU. Run `--doctor` for the reason.')
    name = str(embedded.folder()) if backend == "embedded" else resolve_name(section, say, twins=backend == "cuda")
    loading.check_files(section, backend, name)
    hf, hf_tokenizer = _from_pretrained(section, backend, name)
    loading.check_vocabulary(hf, hf_tokenizer, section.name)
    torch.manual_seed(seed)
    hf_tokenizer.padding_side = "left"
    shown = embedded.shown_name() if backend == "embedded" else section.name
    eos = eos_token(section, hf_tokenizer)
    facts = _facts(hf, section, backend, name, time.monotonic() - started)
    tokenizer = HFTokenizer(hf_tokenizer, eos_ids=(hf_tokenizer.convert_tokens_to_ids(eos),))
    device = torch.device("cuda" if backend == "cuda" else "cpu")
    return LoadedModel(
        hf, hf_tokenizer, tokenizer, section.format, backend, shown, device, section.max_seq_length, facts, say=say
    )


def _from_pretrained(section: ModelSection, backend: Backend, name: str) -> tuple[HfModel, HfTokenizer]:
    import torch

    try:
        with quiet(), loading.complete_weights():
            return loading.plain(section, name) if backend == "cpu" else loading.by_unsloth(section, backend, name)
    except torch.cuda.OutOfMemoryError as error:
        raise CaiError(f"model.name: {section.name} does not fit on this GPU ({error}). Use a larger card.") from None
    except CaiError:
        raise
    except Exception as error:  # of a damaged file transformers, tokenizers and safetensors raise what they like
        line = " ".join(str(error).split())[:300] or type(error).__name__
        remedy = "Check the name, the network (or HF_HOME of a downloaded copy), or give a whole local folder."
        raise CaiError(f"model.name: cannot load {section.name!r}: {line.rstrip('.')}. {remedy}") from None


def refuse_pickles(folder: Path, key: str) -> None:
    """A folder whose weights are pickles alone is not loaded: a pickle can hold code."""
    pickles = sorted(path.name for suffix in ("bin", "pt", "pth") for path in folder.glob(f"*model*.{suffix}"))
    if pickles and not list(folder.glob("*.safetensors")):
        raise CaiError(f"{key}: {folder}: {pickles[0]} is a pickle, which may hold code. Save it as safetensors.")


def refuse_missing(name: str) -> None:
    """A path that is no folder of a saved model; a dry run asks it, too. Error: exit 2."""
    remedy = "Give a hub id or the folder of a saved model."
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise CaiError(f"model.name: {name}: no config.json in it. {remedy}")
    elif Path(name).is_absolute() or name.startswith((".", "~")):
        raise CaiError(f"model.name: {name}: no such folder. {remedy}")


def resolve_name(section: ModelSection, say: Callable[[str], None], *, twins: bool = True) -> str:
    """The name that will really be loaded: Unsloth maps some names to a twin on the hub (`twins`), already quantised.

    A revision belongs to the repository that was named: with one, that one is loaded.
    """
    if Path(section.name).is_dir():
        refuse_pickles(Path(section.name), "model.name")
        return section.name
    refuse_missing(section.name)
    if not twins or section.revision != "main":
        return section.name
    from unsloth.models.loader_utils import get_model_name

    with quiet():
        twin = get_model_name(section.name, load_in_4bit=section.quantization == "nf4")
    if twin and twin.lower() != section.name.lower():
        smaller = twin.lower().endswith(("4bit", "8bit"))
        why = (
            "its copy already quantised to 4 bits (a smaller download)" if smaller else "its copy in another repository"
        )
        say(f"model: {section.name} is loaded as {twin}, {why}")
        return twin
    return section.name


def eos_token(section: ModelSection, hf_tokenizer: HfTokenizer) -> str:
    """`<|endoftext|>` for a base model (its chat tokens are untrained), the tokenizer's own for a chat model."""
    wanted = section.eos or ("<|endoftext|>" if section.format == "base" else hf_tokenizer.eos_token)
    known = hf_tokenizer.get_vocab()
    if wanted not in known:
        if section.eos or hf_tokenizer.eos_token is None:
            raise CaiError(f"model.eos: {wanted!r} is no token of this tokenizer. Set model.eos to one that is.")
        return hf_tokenizer.eos_token
    return wanted


def _facts(hf: HfModel, section: ModelSection, backend: Backend, name: str, seconds: float) -> Row:
    import torch

    quantised = getattr(hf.config, "quantization_config", None)
    facts = {
        "model": embedded.shown_name() if backend == "embedded" else section.name,
        "loaded_from": Path(name).name if Path(name).is_dir() else name,
        **_known_by(hf, section, backend, name),
        "backend": backend,
        "format": section.format,
        "quantization": section.quantization if quantised or backend == "cuda" else str(hf.dtype).split(".")[-1],
        "layers": hf.config.num_hidden_layers,
        "hidden_size": hf.config.hidden_size,
        "load_seconds": round(seconds, 2),
    }
    if backend == "cuda":
        facts |= {
            "gpu": torch.cuda.get_device_name(0),
            "gpu_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1),
            "weights_gib": round(torch.cuda.memory_allocated() / 2**30, 2),
        }
    else:
        facts["threads"] = torch.get_num_threads()
    return facts


def _known_by(hf: HfModel, section: ModelSection, backend: Backend, name: str) -> Row:
    """The hub's commit; of a local folder its content's hashes, for the same name can hold another model tomorrow."""
    if Path(name).is_dir():
        packaged = backend == "embedded" and not embedded.is_given()
        return {"revision": "local"} if packaged else weights.known_by(Path(name))
    return {"revision": getattr(hf.config, "_commit_hash", None) or section.revision}
