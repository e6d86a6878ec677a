"""Which of a prompt file's examples a review under a principle is shown: those of its topic.

A small model does what the last examples did, whatever it is asked: shown a rotation of all, a 1.5B model declined 4 of
255 harmful requests. Owns the choice, no example and no principle. Few topics, so that prefixes stay shared.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

from cai.metrics.text import grounding, idf
from cai.recipe.principle_lists import Principle, requests_for
from cai.recipe.prompts import FewShotExample, Prompt

ALIKE = 0.2  # IDF-weighted share of a request's words that one example's request has, from which on it is its topic


def panel(examples: Sequence[FewShotExample], principle: Principle, pool: str) -> tuple[int, ...]:
    """The places of the examples to show, the most telling last; () where none is of the principle's topic.

    Examples without a topic stand first, then those of the other pool, then those of the request's own.
    """
    topics = tuple(dict.fromkeys(example.topic for example in examples if example.topic))
    requests = principle.critique_request, principle.revision_request
    made = requests == requests_for(principle.principle)  # of a sentence: the words around it are of no topic
    asked = principle.principle if made else " ".join(requests)
    topic = principle.topic if principle.topic in topics else nearest(tuple(examples), asked)
    if not topic:
        return ()
    shown = [place for place, example in enumerate(examples) if example.topic in ("", topic)]
    return tuple(sorted(shown, key=lambda place: (examples[place].topic != "", examples[place].pool == pool, place)))


def without_panel(prompts: Iterable[Prompt], principles: Sequence[Principle]) -> list[str]:
    """What is to be said of files whose examples have no topic, and of topics that are of no example: a line each."""
    said: dict[str, None] = {}
    for prompt in prompts:
        topics = {example.topic for example in prompt.examples if example.topic}
        lacking = dict.fromkeys(p.topic for p in principles if p.topic not in topics and p.topic)
        if not topics and prompt.examples:
            said[f"few_shot.by_topic: no example of {prompt.path} has a topic, so the first ones are shown"] = None
        elif topics and lacking:
            named = ", ".join(repr(topic[:40]) for topic in list(lacking)[:5])
            known = ", ".join(topic[:40] for topic in sorted(topics)[:8])
            line = f"constitution: no example of {prompt.path} has the topic {named} (its topics: {known})"
            said[f"{line}, so the principle's words choose the examples"] = None
    return list(said)


@lru_cache(maxsize=1024)
def nearest(examples: tuple[FewShotExample, ...], asked: str) -> str:
    """The topic of the example whose request shares most words with this one; "" where none shares enough."""
    weights = idf(example.request for example in examples)
    alike = [(grounding(asked, example.request, weights), example.topic) for example in examples if example.topic]
    most = max((share for share, _ in alike), default=0.0)
    return next(topic for share, topic in alike if share == most) if most >= ALIKE else ""
