"""Other models beside the policy: judges, classifiers and guards, by hub id or local folder, or the stand-in.

Owns loading them through plain transformers (the policy goes through `cai.models.policy`), the memory arithmetic that
decides beside or after the policy, and what is said where the weights cannot be had. Torch is imported inside
functions.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cai.engine import Engine, Request, Sampling, ScoreRequest, memory
from cai.engine.foreign import HfModel, HfTokenizer
from cai.engine.model import Model
from cai.engine.tokenizers import HFTokenizer, Tokenizer, Turn
from cai.errors import CaiError, Stopped
from cai.models import weights
from cai.recipe.prompts import encode_pieces
from cai.recipe.settings import EngineSection
from cai.recipe.settings_benchmarks import STAND_IN
from cai.run.context import Context
from cai.store.jsonl import Row

if TYPE_CHECKING:
    import torch

LOADED = "auxiliary_loaded"
Placement = Literal["auto", "beside", "after"]
HEADROOM_GIB = 6.0  # what the engine keeps free, and the cache of short prompts, beside the weights
GPU_ROWS = 64  # rows at a time, for the size of the cache: prompts are long and little is drawn
LONGEST = {True: 32_768, False: 4_096}  # tokens that the cache has room for, on a GPU and on a CPU
SHARED_STEP = 16  # a shared beginning is cut to a multiple, so that chance agreement does not make it another one


@dataclass
class Auxiliary:
    """A loaded model that is only asked. `stand_in`: it is the policy's base, and what it says means nothing."""

    name: str
    engine: Engine
    tokenizer: Tokenizer
    hf_tokenizer: HfTokenizer
    max_seq_length: int
    facts: Row
    stand_in: bool = False
    bos_ids: tuple[int, ...] = ()
    on_cpu: bool = False  # seconds a text: small slices


def require(name: str, key: str, remedy: str, revision: str = "main") -> None:
    """Fail early and cheaply (exit 2) where the weights of `name` cannot be had: no folder, no copy, no access."""
    if name == STAND_IN:
        return
    if Path(name).is_dir():
        if not weights.weight_files(Path(name)):
            raise CaiError(f"{key}: {name}: no whole model in this folder (config.json, *.safetensors). {remedy}")
        weights.check_folder(Path(name), key)  # now, and not when it is loaded: by then the data are made
        return
    if Path(name).is_absolute() or name.startswith((".", "~")):
        raise CaiError(f"{key}: {name}: no such folder. {remedy}")
    copy = cached_folder(name, revision)
    if copy and weights.weight_files(copy):
        return
    from huggingface_hub import hf_hub_download

    try:  # a cached config.json without weights proves no access: it is asked for again
        hf_hub_download(name, "config.json", revision=revision, force_download=copy is not None)
    except Exception as error:  # the hub's own errors and those of four network libraries
        raise CaiError(f"{key}: {name} cannot be had ({type(error).__name__}). {remedy}") from None


def cached_folder(name: str, revision: str = "main") -> Path | None:
    """The hub's local copy of a model: the folder that holds its config.json."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


@contextlib.contextmanager
def loaded(
    context: Context, name: str, key: str, *, revision: str = "main", place: Placement = "auto"
) -> Iterator[Auxiliary]:
    """The model within the block, as an `Auxiliary`; afterwards its memory is free again.

    The stand-in is the policy with its adapter off. Errors: CaiError (exit 2) with the key where it cannot be loaded.
    """
    if name == STAND_IN:
        model = context.model()
        with model.adapter(False):
            engine = model.engine(context.recipe.engine)
            facts = {"model": STAND_IN, "of": str(model.name)}
            hf_tokenizer, limit = model.hf_tokenizer, model.max_seq_length
            on_cpu = model.backend in ("embedded", "cpu")
            yield Auxiliary(STAND_IN, engine, model.tokenizer, hf_tokenizer, limit, facts, True, on_cpu=on_cpu)
        return
    with_policy = make_room(context, name, place, revision)
    auxiliary = _load(name, key, revision, context.recipe.engine)
    auxiliary.facts["placement"] = "beside" if with_policy else "after"
    weights.refuse_other(context.run.events(LOADED), auxiliary.facts, key)
    context.run.event(LOADED, **auxiliary.facts)
    try:
        yield auxiliary
    finally:
        auxiliary.engine.close()
        del auxiliary
        _collect()


def make_room(context: Context, name: str, place: Placement, revision: str = "main") -> bool:
    """Whether the policy may stay on the device; where it may not it is set aside (and loaded again when needed)."""
    policy: Model | None = getattr(context.model, "model", None)  # a function that gives the model has none
    if policy is None:
        return False
    policy.release()
    need, free = weights_gib(name, revision), free_gib()
    if place == "beside" or (place == "auto" and fits_beside(need, free)):
        return True
    del policy
    context.model.set_aside()
    _collect()
    context.run.event("policy_set_aside", need_gib=need, free_gib=free)
    return False


def fits_beside(need_gib: float | None, free_gib: float | None) -> bool:
    """Weights and headroom fit into what is free. An unknown size counts as too large; no GPU as enough."""
    if free_gib is None:
        return True
    return need_gib is not None and need_gib + HEADROOM_GIB <= free_gib


def weights_gib(name: str, revision: str = "main") -> float | None:
    """Size of the weight files in GiB as they lie on disk (bf16 on disk is bf16 on the device); None: not known.

    Of a folder, of the hub's local copy, or, before a download, as the hub lists them.
    """
    folder = Path(name) if Path(name).is_dir() else cached_folder(name, revision)
    if folder and (files := weights.weight_files(folder)):
        return sum(path.stat().st_size for path in files) / 2**30
    if Path(name).is_dir():
        return None
    try:
        from huggingface_hub import model_info

        listed = model_info(name, revision=revision, files_metadata=True).siblings or []
    except Exception:  # offline: an unknown size
        return None
    return sum(f.size or 0 for f in listed if f.rfilename.endswith(".safetensors")) / 2**30 or None


def free_gib() -> float | None:
    """Free memory of the GPU, or None without one."""
    import torch

    return memory.free_gpu_bytes() / 2**30 if torch.cuda.is_available() else None


def load_tokenizer(name: str, key: str, revision: str) -> HfTokenizer:
    """The tokenizer of `name` alone, chat template included. Errors: CaiError (exit 2) where it cannot be loaded."""
    from cai.models.libraries import prepare_environment, quiet

    prepare_environment()
    from transformers import AutoTokenizer

    try:
        with quiet():
            return AutoTokenizer.from_pretrained(name, trust_remote_code=False, **_options(name, revision))
    except Exception as error:  # of a damaged file transformers, tokenizers and safetensors raise what they like
        raise _no_loading(name, key, error) from None


def _options(name: str, revision: str) -> Row:
    return {} if Path(name).is_dir() or revision == "main" else {"revision": revision}


def _no_loading(name: str, key: str, error: Exception) -> CaiError:
    line = " ".join(str(error).split())[:200].rstrip(".")
    return CaiError(f"{key}: cannot load {name!r}: {line}. Check the name, the access, or give a whole folder.")


def _load(name: str, key: str, revision: str, section: EngineSection) -> Auxiliary:
    if Path(name).is_dir():
        weights.check_folder(Path(name), key)
    hf_tokenizer = load_tokenizer(name, key, revision)
    import torch
    from transformers import AutoModelForCausalLM

    from cai.models.libraries import quiet
    from cai.models.loading import check_vocabulary, complete_weights

    cuda, options = torch.cuda.is_available(), _options(name, revision)
    try:
        with quiet(), complete_weights(key):
            options["dtype"] = torch.bfloat16 if cuda else torch.float32
            options["device_map"] = "cuda" if cuda else "cpu"  # straight onto the device: no copy in host memory
            hf = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False, use_safetensors=True, **options)
    except CaiError:
        raise
    except Exception as error:  # of a damaged file transformers, tokenizers and safetensors raise what they like
        raise _no_loading(name, key, error) from None
    check_vocabulary(hf, hf_tokenizer, name, key)
    hf.eval()
    eos = hf.generation_config.eos_token_id if hf.generation_config else None
    ids = [i for i in (eos if isinstance(eos, list) else [eos]) if isinstance(i, int)]  # the file may hold anything
    tokenizer = HFTokenizer(hf_tokenizer, eos_ids=ids or list(filter(None, [hf_tokenizer.eos_token_id])))
    config = hf.config.get_text_config(decoder=True)
    limit = min(int(getattr(config, "max_position_embeddings", 4096)), LONGEST[cuda])
    vars(hf)["max_seq_length"] = limit  # `native` makes room for as much
    commit = getattr(hf.config, "_commit_hash", None) or "local"
    known = weights.known_by(Path(name)) if Path(name).is_dir() else {"revision": commit}
    facts = {"model": name, **known, "dtype": str(hf.dtype)}
    holder = _Holder(hf, tokenizer, torch.device("cuda" if cuda else "cpu"))
    engine = _engine_over(holder, section, cuda)
    facts["engine"] = engine.stats.extra.get("engine", engine.name)
    bos = hf_tokenizer("", add_special_tokens=True)["input_ids"][:1]
    bos_ids = tuple(bos) if bos and bos[0] == hf_tokenizer.bos_token_id else ()
    return Auxiliary(name, engine, tokenizer, hf_tokenizer, limit, facts, False, bos_ids)


def _engine_over(holder: _Holder, section: EngineSection, cuda: bool) -> Engine:
    """`native` where it knows the decoder and finds room beside the weights, else static batches, and why."""
    from cai.engine.build import PRICE, make_engine

    try:
        return make_engine("auto", holder, batch_size=section.batch_size or (GPU_ROWS if cuda else 0))
    except CaiError as error:
        why = str(error)
    _collect()
    engine = make_engine("static", holder, batch_size=section.batch_size)
    engine.stats.extra["engine"] = f"static batches, since native cannot run here: {why} {PRICE}"
    return engine


def choices(
    judge: Auxiliary,
    asks: Mapping[int, tuple[tuple[int, ...], tuple[str, ...]]],
    context: Context,
    *,
    first: bool = False,
) -> dict[int, list[float]]:
    """Log-probability of each continuation after its context; `why_none` says why a context has no entry: it is beyond
    the judge's window, or a log-probability of it is no finite number (which must not become the likeliest answer).

    `first`: of the first tokens that tell the continuations apart, so that one row of the engine serves them all.
    What all contexts begin with (a template) is computed once. On a CPU several rows behind one context share it.
    """
    requests: list[ScoreRequest] = []
    where: dict[int, tuple[int, int]] = {}
    asks = {i: ask for i, ask in asks.items() if len(ask[0]) + 8 <= judge.max_seq_length}
    common = shared_length([ids for ids, _ in asks.values()])
    for i, (ids, words) in asks.items():
        continuations = [tuple(judge.tokenizer.encode(word)) for word in words]
        continuations = shortest_distinct(continuations) if first else continuations
        shares = judge.on_cpu and any(len(continuation) > 1 for continuation in continuations)
        for place, continuation in enumerate(continuations):
            where[len(requests)] = (i, place)
            requests.append(ScoreRequest(len(requests), tuple(ids), continuation, len(ids) if shares else common))
    found: dict[int, list[float]] = {i: [math.nan] * len(asks[i][1]) for i, _ in where.values()}
    count = 0
    for score in judge.engine.score(requests, context.stopped):
        i, place = where[score.id]
        found[i][place] = score.total
        count += 1
    if count < len(requests):
        raise Stopped("stopped while judging; resume to go on")
    return {i: logps for i, logps in found.items() if all(map(math.isfinite, logps))}


def written(
    asked: Auxiliary, prompts: Mapping[int, tuple[int, ...]], tokens: int, context: Context, *, shares: bool = False
) -> dict[int, str]:
    """Greedy tokens after each prompt that leaves room for them. `shares`: what all begin with is computed once."""
    fits = {i: ids for i, ids in prompts.items() if len(ids) + tokens <= asked.max_seq_length}
    common = shared_length(list(fits.values())) if shares else 0
    for i, ids in fits.items():
        sampling = Sampling(0.0, tokens, (), tuple(asked.tokenizer.eos_ids))
        asked.engine.submit(Request(i, ids, sampling, prefix_len=common))
    found = {done.id: done.text for done in asked.engine.completions(context.stopped)} if fits else {}
    if len(found) < len(fits):
        raise Stopped("stopped while judging; resume to go on")
    return found


def why_none(judge: Auxiliary, ids: Sequence[int], too_long: str = "too_long") -> str:
    """Why `choices` has no entry for this context."""
    if len(ids) + 8 > judge.max_seq_length:
        return f"{too_long}: {len(ids)} tokens"
    return "not_finite: the judge's log-probability is no number"


def shared_length(contexts: Sequence[tuple[int, ...]]) -> int:
    """How many tokens all contexts begin with, as a multiple of SHARED_STEP."""
    if not contexts:
        return 0
    first, last = min(contexts), max(contexts)
    same = next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return same - same % SHARED_STEP


def shortest_distinct(continuations: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Each continuation cut to its fewest first tokens that no other begins with (whole, where there are none).

    Of "1]]" to "10]]" in single digits, eight are cut to their digit: two rows of the engine serve all ten.
    """

    def cut(i: int, ids: tuple[int, ...]) -> tuple[int, ...]:
        others = [other for j, other in enumerate(continuations) if j != i]
        lengths = range(1, len(ids) + 1)
        return next((ids[:n] for n in lengths if all(other[:n] != ids[:n] for other in others)), ids)

    return [cut(i, ids) for i, ids in enumerate(continuations)]


def chat_ids(judge: Auxiliary, system: str, user: str) -> tuple[int, ...]:
    """The judge's chat template; plain text for a model without one. Content is tokenised as plain text."""
    turns = ([Turn("system", system)] if system.strip() else []) + [Turn("user", user)]
    try:
        return tuple(encode_pieces(judge.tokenizer.chat(turns), judge.tokenizer))
    except CaiError:
        return judge.bos_ids + tuple(judge.tokenizer.encode(f"{system}\n\n{user}\n\n".lstrip()))


@dataclass
class _Holder:
    """What `make_engine` asks of a model."""

    hf: HfModel
    tokenizer: Tokenizer
    device: torch.device


def _collect() -> None:
    gc.collect()
    if "CUDA_VISIBLE_DEVICES" not in os.environ or os.environ["CUDA_VISIBLE_DEVICES"]:
        import torch

        torch.cuda.empty_cache()
