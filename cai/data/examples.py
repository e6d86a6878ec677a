"""The example of every kind of pair, in the user's format, and the pair of an example. Pure; judges none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cai.metrics.wordings import has_control_token, is_refusal
from cai.store.row_types import Example, Pair, Round, TextPair

NOTHING: Round = {"principle_id": None, "principle": "", "critique": "", "revised_answer": ""}  # no round criticised


def example_of(
    texts: TextPair,
    item: int,
    pool: str,
    split: str,
    *,
    last: Round = NOTHING,
    rounds: Sequence[Round] = (),
    finds_nothing: bool = False,
    limited: Sequence[str] = (),
    written: Iterable[str] | None = None,
) -> Example:
    """The user's six keys first, then ours. What a kind of pair does not have is empty.

    `last`: the round that the example is about. `limited`: what ran to its token limit. `written`: every text of the
    item, where there are more than the two.
    """
    return {
        "instruction": texts["prompt"],
        "initial_answer": texts["rejected"],
        "principle": last["principle"],
        "critique": last["critique"],
        "revised_answer": texts["chosen"],
        "preference_pair": texts,
        "item": item,
        "pool": pool,
        "split": split,
        "principle_id": last["principle_id"],
        "rounds": list(rounds),
        "flags": {
            "answer_refuses": is_refusal(texts["rejected"]),
            "revision_refuses": is_refusal(texts["chosen"]),
            "critique_finds_nothing": finds_nothing,
            "control_tokens": any(map(has_control_token, written or (texts["chosen"], texts["rejected"]))),
            "ran_to_limit": list(limited),
        },
    }


def pair_of(example: Example) -> Pair:
    pair: Pair = {
        **example["preference_pair"],
        "item": example["item"],
        "pool": example["pool"],
        "split": example["split"],
    }
    pair = pair | {"margin": example["margin"]} if "margin" in example else pair
    return pair | {"kind": example["kind"]} if "kind" in example else pair
