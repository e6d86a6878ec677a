"""Which backend serves the loaded weights, by name; `auto` takes `native` where it knows the decoder, else `static`."""

from __future__ import annotations

from typing import Any

from cai.engine import Engine
from cai.engine.model import Runnable
from cai.errors import CaiError

PRICE = "They are many times slower: 13.5 times slower where both were measured (32B shapes, docs/engine.md)."


def make_engine(name: str, model: Runnable, *, batch_size: int = 0, linears: str = "auto", kv: str = "auto") -> Engine:
    """The engine over `model`  (`.hf`, `.tokenizer`, `.device`). `batch_size` 0 = found from memory."""
    options: dict[str, Any] = {"batch_size": batch_size, "device": str(model.device)}
    if name == "reference":
        from cai.engine.oracle import ReferenceEngine

        return with_note(ReferenceEngine(model.hf, model.tokenizer, **options), linears, kv)
    if name == "static":
        from cai.engine.static import StaticEngine

        return with_note(StaticEngine(model.hf, model.tokenizer, **options), linears, kv)
    if name not in ("auto", "native"):
        raise CaiError(f'engine.backend: {name!r} is none of "auto", "native", "static", "reference".')
    from cai.engine.native.decoder import unsupported

    if reason := unsupported(model.hf):
        if name == "native":
            raise CaiError(f'engine.backend: native cannot run this model: {reason}. Use "static".')
        static = make_engine("static", model, batch_size=batch_size, linears=linears, kv=kv)
        static.stats.extra["engine"] = f"static batches, since native cannot run this model: {reason}. {PRICE}"
        return static
    from cai.engine.native.engine import NativeEngine

    try:
        return with_note(NativeEngine(model.hf, model.tokenizer, linears=linears, kv=kv, **options), linears, kv)
    except RuntimeError as error:
        if "C compiler" not in str(error):
            raise
    remedy = "Install one (apt-get install gcc) or name it in CC."
    raise CaiError(f"engine: no C compiler, which Triton needs to start its kernels. {remedy}")


def with_note(engine: Engine, linears: str, kv: str) -> Engine:
    """A wish that nothing came of is said."""
    if kv != "auto":
        text = f'kv: 16 bits or more; "{kv}" is for the native engine on a GPU'
        engine.stats.extra.setdefault("kv", text)
    if linears != "auto":
        text = f'linears: the loaded modules; "{linears}" is for the native engine on a GPU'
        engine.stats.extra.setdefault("linears", text)
    return engine
