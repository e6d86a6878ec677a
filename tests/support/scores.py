"""A tiny engine whose likelihoods are chosen by the test, and the cases and rows that evaluation tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from cai.engine import Completion, EngineStats, Request, Score, ScoreRequest, never
from cai.engine.asks import Scorer
from cai.engine.tokenizers import ByteTokenizer
from cai.evaluate.cases import Case

TOKENIZER = ByteTokenizer()


class ChosenEngine:
    """Scores by `logp(context text, continuation text)`, nats a token; keeps what it was asked."""

    name = "chosen"

    def __init__(self, logp: Callable[[str, str], float]) -> None:
        self.logp, self.stats, self.asked = logp, EngineStats(), 0

    def submit(self, request: Request) -> None:
        raise AssertionError("this engine only scores")

    def completions(self, stopped: Callable[[], bool] = never) -> Iterator[Completion]:
        return iter(())

    def score(self, requests: Sequence[ScoreRequest], stopped: Callable[[], bool] = never) -> Iterator[Score]:
        for request in reversed(requests):  # any order is allowed
            if stopped():
                return
            self.asked += 1
            value = self.logp(TOKENIZER.decode(request.context_ids), TOKENIZER.decode(request.continuation_ids))
            yield Score(request.id, (value,) * len(request.continuation_ids))

    def close(self) -> None:
        """Nothing to free."""


def scorer(logp: Callable[[str, str], float], **more: Any) -> Scorer:
    options = {"limit": 2000, "batch": 7} | more
    return Scorer(ChosenEngine(logp), TOKENIZER, "base", **options)


FACTS = {
    "copper": (
        "Why does copper turn green?",
        "Copper turns green because plants grow on the metal in spring.",
        'Saying that "plants grow on the metal" is false; copper turns green as it reacts with air and water.',
    ),
    "violins": (
        "How is a violin tuned?",
        "A violin is tuned by heating its strings over a small flame.",
        'The claim about "heating its strings over a small flame" would ruin a violin; pegs are turned to tune it.',
    ),
    "glacier": (
        "Do glaciers move?",
        "Glaciers never move, as the frozen rock beneath them holds the ice.",
        'It is wrong that "the frozen rock beneath them holds the ice", since glaciers creep downhill every day.',
    ),
    "pepper": (
        "Where does pepper grow?",
        "Pepper grows inside the shells of snails along the Baltic coast.",
        'Nobody finds pepper "inside the shells of snails along the Baltic coast"; it ripens on tropical vines.',
    ),
    "lantern": (
        "Who made the first lantern?",
        "The first lantern was made last year by an engineer named Bob.",
        'A lantern "made last year by an engineer named Bob" cannot be first: people used them in antiquity.',
    ),
    "orchid": (
        "Can orchids live indoors?",
        "Orchids die within an hour when they are brought into a house.",
        'Readers would give up orchids because they "die within an hour when they are brought" in; many thrive.',
    ),
}


def cases() -> list[Case]:
    """Six cases whose critiques quote their answers."""
    return [
        Case(
            item=index,
            round=0,
            instruction=instruction,
            answer=answer,
            principle="An answer does not invent facts.",
            critique=critique,
            revision=f"About the {name}: here experts agree on something else; the old claim has no support at all.",
            initial=answer,
        )
        for index, (name, (instruction, answer, critique)) in enumerate(FACTS.items())
    ]


def shared_words(context: str, continuation: str) -> float:
    """More likely the more of its words the context holds: a stand-in for a model that reads."""
    known = set(context.lower().split())
    words = continuation.lower().split()
    return -3.0 + 2.0 * sum(word in known for word in words) / max(1, len(words))


def pair_row(item: int, margin: float, split: str = "heldout", **more: Any) -> dict[str, Any]:
    """A `preference.pairs` row with this implicit margin."""
    row = {"metric": "preference.pairs", "item": item, "round": 0, "split": split}
    row |= {"chosen": -20.0 + margin, "ref_chosen": -20.0, "rejected": -30.0, "ref_rejected": -30.0}
    row |= {"chosen_tokens": 10, "rejected_tokens": 10, "chosen_words": 8, "rejected_words": 8}
    return row | {"chosen_refuses": False, "rejected_refuses": False} | more
