"""The pairs of a run, of whichever kinds its recipe asks for (`pairs.kind`).

Owns how a sampled pair is judged and how the kinds stand in one set; what makes a revision's pair is `pairs`', what
makes a sampled example is `sampled`'s. Invariant: an item with a record is kept or rejected once for each kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

from cai.data import pairs, sampled, slots
from cai.data.item_chain import Chain, lacking
from cai.data.pairs import PairPlan, PairSet
from cai.recipe.settings import PairsSection
from cai.store.row_types import Example, Pair, Record, Reject

T = TypeVar("T", Example, Pair, Reject)
NEEDED = (("instructions", 0), ("answers", 0), (sampled.SECOND, 0), (sampled.COMPARED, 0))


def build(
    rows: Iterable[Record],
    plan: PairPlan,
    config: PairsSection | None = None,
    wanted: Callable[[int], bool] = lambda item: True,
    before: PairSet | None = None,
) -> PairSet:
    """`pairs.build` for each kind of `config`; of an item's two examples the revision's stands first. Pure."""
    config, rows = config or PairsSection(), rows if isinstance(rows, Sequence) else list(rows)
    if config.kinds == ("revision",):
        return pairs.build(rows, plan, config, wanted, before)
    found = []
    for kind in config.kinds:
        earlier = _of_kind(before, kind)
        how = (_judged, slots.sampled_item) if kind == sampled.KIND else (pairs.judged, int)
        found.append(pairs.build(rows, plan, config, wanted, earlier, *how))
    examples = _merged([example for part in found for example in part.examples])
    kept = _merged([pair for part in found for pair in part.kept])
    return PairSet(examples, kept, _merged([r for part in found for r in part.rejects]), found[0].sizes)


def kind_of(item: int) -> str:
    """The kind of a pair, by its number."""
    return sampled.KIND if item >= slots.SAMPLED else "revision"


def one_a_prompt(found: Sequence[Pair]) -> list[Pair]:
    """The pairs without the second one of an item that has both kinds: what asks about prompts asks once."""
    revised = {pair["item"] for pair in found if kind_of(pair["item"]) == "revision"}
    return [
        pair for pair in found if kind_of(pair["item"]) == "revision" or slots.drawn_item(pair["item"]) not in revised
    ]


def _merged(found: list[T]) -> list[T]:
    """By the item that was drawn, a revision's first."""
    return sorted(found, key=lambda row: (slots.drawn_item(row["item"]), row["item"]))


def _of_kind(before: PairSet | None, kind: str) -> PairSet | None:
    if before is None:
        return None
    examples = [example for example in before.examples if kind_of(example["item"]) == kind]
    rejects = [reject for reject in before.rejects if kind_of(reject["item"]) == kind]
    return replace(before, examples=examples, kept=[], rejects=rejects)


def _judged(chain: Chain, plan: PairPlan, config: PairsSection, held: Example | None) -> pairs.Judged:
    """The same of a sampled pair."""
    item = slots.sampled_item(chain.item)
    if missing := lacking(chain, NEEDED):
        return pairs.missing_stage(item, missing)
    row, answers = chain.rows[sampled.COMPARED, 0], (chain.rows["answers", 0], chain.rows[sampled.SECOND, 0])
    example = sampled.example_of(chain.rows["instructions", 0], answers, row, dict(plan.principles))
    example = held if held == example else example
    why = sampled.undecided(row, config)
    faults = pairs.find_faults(example, config) + ([("undecided", why)] if why else [])
    return pairs.by_faults(item, example, faults + pairs.guard_faults(chain, sampled.GUARD_ROUND))
