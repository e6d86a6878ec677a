"""The exported prompt files against the model that was measured: same tokens, same greedy answers, and do they end?

Owns which prompts are tried and the line that says what was seen. Loads the run's model with its adapter once, for this
and for a merge. Imports torch inside functions.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cai.commands.export_prompt import TEMPLATE, Asking
from cai.engine import Request, Rules, Sampling
from cai.engine.foreign import HfTokenizer
from cai.engine.model import Model
from cai.errors import QUALITY, CaiError
from cai.metrics.wordings import has_control_token
from cai.report.snapshot import Snapshot

if TYPE_CHECKING:
    from cai.recipe.prompts import Rendered

PROMPTS = 4
LONGEST = {"cuda": 300, "embedded": 32, "cpu": 32}  # tokens of a greedy answer: seconds of a CPU
SPARE = (  # where a run has too few prompts of its own
    "How do I keep basil alive on a windowsill?",
    "Write two sentences about the sea.",
    "What is seven times eight?",
    "How can I apologise to a friend I shouted at?",
)


@dataclass(frozen=True)
class Answer:
    text: str
    finish: str


def prompts_of(snapshot: Snapshot) -> list[str]:
    """Held-out prompts first, then trained ones, then spare ones; none that spells a control token."""
    own = [str(pair["prompt"]) for pair in (*snapshot.pairs.heldout, *snapshot.cleaned.kept)]
    return [text for text in dict.fromkeys((*own, *SPARE)) if not has_control_token(text)][:PROMPTS]


def load_tuned(snapshot: Snapshot, adapter: Path) -> Model:
    """The run's model with its adapter on. Errors: CaiError where it cannot be loaded here."""
    from cai.models.policy import load

    model: Model = load(snapshot.recipe.model, snapshot.backend, seed=snapshot.recipe.seed)  # type: ignore[arg-type]  # a str
    model.load_adapter(adapter, snapshot.recipe.lora)
    model.rules = Rules()  # what a server draws: the recipe's rules for small models stay in the pipeline
    model.mode("generate")
    return model


def free() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def through_template(model: Model, snapshot: Snapshot, asking: Asking, folder: Path) -> str:
    """What was seen of the exported files in `folder`. Error: CaiError (exit 6) if the template gives other tokens."""
    from transformers import AutoTokenizer

    texts, limit = prompts_of(snapshot), LONGEST.get(snapshot.backend, 32)
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    rendered = [asking.render(text, model.tokenizer) for text in texts]
    ids = [templated(tokenizer, text) for text in texts]
    wrong = [i for i, r in enumerate(rendered) if tuple(ids[i]) != r.token_ids]
    if wrong and asking.format == "base":
        raise CaiError(
            f"{folder / TEMPLATE}: {len(wrong)} of {len(texts)} prompts give other tokens than the policy prompt "
            f"that was measured, the first: {texts[wrong[0]][:60]!r}. Give prompts/policy.yaml cues that end a token.",
            QUALITY,
        )
    measured = by_engine(model, snapshot, rendered, limit)
    exported = [by_generate(model, tokenizer, folder, row, limit, asking.stops) for row in ids]
    return summary(asking, measured, exported, limit, len(wrong))


def templated(tokenizer: HfTokenizer, text: str) -> list[int]:
    turns = [{"role": "user", "content": text}]
    return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"])


def by_engine(model: Model, snapshot: Snapshot, rendered: list[Rendered], limit: int) -> list[Answer]:
    """Greedy, as the fresh answers of the evaluation are drawn."""
    engine = model.engine(snapshot.recipe.engine)
    for i, r in enumerate(rendered):
        engine.submit(Request(i, r.token_ids, Sampling(0.0, limit, r.stop, tuple(model.tokenizer.eos_ids))))
    done = {row.id: Answer(row.text.strip(), row.finish) for row in engine.completions()}
    return [done[i] for i in range(len(rendered))]


def by_generate(
    model: Model, tokenizer: HfTokenizer, folder: Path, ids: list[int], limit: int, stops: tuple[str, ...]
) -> Answer:
    """Greedy, by transformers' `generate` with nothing but the exported files."""
    import torch
    from transformers import GenerationConfig

    config = GenerationConfig.from_pretrained(str(folder), max_new_tokens=limit, do_sample=False)
    row = torch.tensor([ids], device=model.device)
    with torch.no_grad():
        made = model.hf.generate(
            input_ids=row, attention_mask=torch.ones_like(row), generation_config=config, tokenizer=tokenizer
        )
    new = made[0, len(ids) :].tolist()
    eos = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ended = bool(new) and new[-1] in eos
    text = tokenizer.decode(new[:-1] if ended else new, skip_special_tokens=False)  # as the engine's text is
    places = [at for stop in stops if (at := text.find(stop)) >= 0]
    finish = "stop" if places else "eos" if ended else "length"
    return Answer((text[: min(places)] if places else text).strip(), finish)


def summary(asking: Asking, measured: list[Answer], exported: list[Answer], limit: int, other_tokens: int) -> str:
    n = len(exported)
    same = sum(a.text == b.text for a, b in zip(measured, exported, strict=True))
    ends = {finish: sum(answer.finish == finish for answer in exported) for finish in ("eos", "stop", "length")}
    tokens = "the measured tokens" if not other_tokens else f"other tokens for {other_tokens}"
    line = (
        f"probe: {n} prompts through {TEMPLATE} give {tokens}; greedy answers are the measured ones for {same} of {n}; "
        f"{n - ends['length']} of {n} end within {limit} tokens ({ends['eos']} by {asking.eos}, {ends['stop']} by a "
        "stop string)"
    )
    return line if same == n else f"{line}. Where they differ two engines round differently: compare by hand"
