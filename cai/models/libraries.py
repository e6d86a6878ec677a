"""What the libraries under the models are told before they are imported, and how they are kept quiet.

Owns environment variables, and the banners that stay off the console (`threads` has how a CPU is used). Loads nothing.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator

from cai.models import embedded
from cai.world import world


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Library banners off the console; shown after all when the block fails."""
    if os.environ.get("CAI_VERBOSE"):
        yield
        return
    out = io.StringIO()
    loggers = [logging.getLogger(name) for name in ("torch", "transformers", "bitsandbytes", "unsloth")]
    levels = [logger.level for logger in loggers]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
    except BaseException:
        sys.stderr.write(out.getvalue()[-4000:])
        raise
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def prepare_environment() -> None:
    """Telemetry off, no progress bars of libraries, before any of them is imported."""
    number = f"-{here.rank}" if (here := world()).several else ""  # Unsloth writes its modules anew at each import
    defaults = {
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "WANDB_DISABLED": "true",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "UNSLOTH_COMPILE_LOCATION": str(embedded.cache_root() / f"unsloth_compiled_cache{number}"),
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }
    for key, value in defaults.items():
        os.environ.setdefault(key, value)
