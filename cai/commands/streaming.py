"""One answer, greedily, its text written while tokens come: for a person who waits. Imports torch inside functions.

Owns how text is held back until no stop string can begin in it. Stop rules are the engines' own (`engine.stopping`), so
an answer ends where a measured one does; where there are no weights the engine answers at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cai.engine import Finish, Request, Sampling
from cai.engine.greedy import NEUTRAL
from cai.engine.model import Model
from cai.engine.stopping import UNDECIDED, Pieces, Row
from cai.recipe.prompts import Rendered
from cai.recipe.settings import EngineSection

if TYPE_CHECKING:
    from cai.engine import Completion


@dataclass(frozen=True)
class Drawn:
    text: str
    finish: Finish
    tokens: int


class Shown:
    """What of a growing text was written; the end stays back while it may be the beginning of a stop string."""

    def __init__(self, stops: tuple[str, ...], write: Callable[[str], None]) -> None:
        self.held = max((len(stop) for stop in stops), default=0)
        self.write, self.text, self.count = write, "", 0

    def grow(self, text: str) -> None:
        text = text.lstrip()
        self._up_to(text, len(text.rstrip(UNDECIDED)) - self.held)

    def end(self, text: str) -> None:
        text = text.strip()
        self._up_to(text, len(text))

    def _up_to(self, text: str, end: int) -> None:
        if end > self.count:
            self.write(text[self.count : end])
            self.count = end


def draw(
    model: Model, section: EngineSection, rendered: Rendered, sampling: Sampling, write: Callable[[str], None]
) -> Drawn:
    """The completion of one prompt; `write` gets its text in pieces."""
    request, shown = Request(0, rendered.token_ids, sampling, 0, rendered.prefix_len), Shown(sampling.stop, write)
    if model.hf is None:
        engine = model.engine(section)
        engine.submit(request)
        done = next(iter(engine.completions()))
    else:
        done = _streamed(model, Row(request, Pieces(model.tokenizer)), shown)
    shown.end(done.text)
    return Drawn(done.text.strip(), done.finish, len(done.token_ids))


def _streamed(model: Model, row: Row, shown: Shown) -> Completion:
    import torch
    from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

    from cai.engine.generate import causal_lm

    class Feed(StoppingCriteria):
        def __call__(
            self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: object
        ) -> Any:  # a BoolTensor, for which torch has no constructor that says so
            row.feed(int(input_ids[0, -1]))
            if row.done is None:
                shown.grow(model.tokenizer.decode(row.ids))
            return torch.tensor([row.done is not None], device=input_ids.device)

    ids = torch.tensor([list(row.request.token_ids)], device=model.device)
    # An id that is never drawn: `generate` would fill a missing end token from the model's config; ours are the row's.
    no_eos = causal_lm(model.hf).config.vocab_size
    longest = row.request.sampling.max_new_tokens
    config = GenerationConfig(**NEUTRAL, max_new_tokens=longest, eos_token_id=no_eos, pad_token_id=0)
    with torch.no_grad():
        model.hf.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([Feed()]),
        )
    return row.completion()
