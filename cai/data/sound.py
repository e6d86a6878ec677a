"""What SFT imitates: revisions, and answers that no revision bettered.

With `sft.select = "clean"` no text that repeats itself or was cut: an SFT stage teaches to end, and it teaches a loop
as well (of 55 revisions that it was shown 15 said eight words twice; all 11 of 44 fresh answers that did not end then
were loops; a 1.5B model). Beside answers in which nothing was found it then takes benign ones that ended by themselves
and whose revision made no pair, unless the label held that revision better: own answers to helpful requests stand
beside the revisions in Bai et al. 2022, section 3.2, too. To a red-team request only an answer that declines.
"""

from __future__ import annotations

from collections.abc import Sequence

from cai.data import own_answers
from cai.data.contamination import request_sha
from cai.data.pairs import REPEATED, PairSet, refusal_at_fault
from cai.metrics.text import repetition
from cai.metrics.wordings import leftovers
from cai.recipe.load import Recipe
from cai.run.context import Context
from cai.store.jsonl import read_object
from cai.store.row_types import Example, Pair, Reject, SoundAnswer

MAX_REPETITION = 0.02  # share of a text's 8-word sequences that stood in it before


def shown_beside(context: Context, pairs: PairSet, limit: int) -> list[SoundAnswer]:
    """What an SFT stage is shown beside the revisions, less what overlaps a benchmark (eval/contamination.json)."""
    found = candidates(context, pairs, limit)
    if not context.recipe.benchmarks.contamination:
        return found
    listed = read_object(context.run.eval / "contamination.json").get("answers") or []
    gone = {row.get("sha") for row in listed if isinstance(row, dict)}
    return [row for row in found if request_sha(row) not in gone]


def candidates(context: Context, pairs: PairSet, limit: int) -> list[SoundAnswer]:
    """`sound_rows`, then the answers to further requests; none where no SFT stage stands before DPO."""
    if context.recipe.dpo.start != "sft":
        return []
    own = own_answers.imitated(context, _is_whole)
    return [*sound_rows(pairs, limit, context.recipe), *own]


def sound_rows(pairs: PairSet, limit: int, recipe: Recipe) -> list[SoundAnswer]:
    """At most `limit` answers of training items that need no revision, in the order of items.

    With `sft.select = "clean"` as many as the run wants items, if that is more: where few revisions pass, a stage that
    is shown only as many answers teaches nothing (47 texts: 0.43 of 49 fresh answers ended, 0.45 before; 1.5B).
    """
    clean = recipe.sft.select == "clean"
    limit = max(limit, recipe.items) if clean else limit
    found: list[SoundAnswer] = []
    for reject in pairs.rejects:
        if len(found) == limit:
            break
        example = reject.get("example")
        if example is None or example["split"] != "train" or not _needs_none(reject, example, clean):
            continue
        found.append({"item": reject["item"], "prompt": example["instruction"], "chosen": example["initial_answer"]})
    return found


def imitable(pairs: Sequence[Pair], recipe: Recipe) -> list[Pair]:
    """The pairs whose chosen text an SFT stage is shown; all of them where it would be left with none."""
    clean = [pair for pair in pairs if not repeats(pair["chosen"])] if recipe.sft.select == "clean" else []
    return clean or list(pairs)


def repeats(text: str) -> bool:
    return repetition(text, REPEATED) > MAX_REPETITION


def _needs_none(reject: Reject, example: Example, clean: bool) -> bool:
    if not clean:
        return reject["reason"] == "no_issue"
    if example["pool"] != "benign" and not (reject["reason"] == "no_issue" and example["flags"]["answer_refuses"]):
        return False  # nothing found is no proof: 8 of 22 such answers of a 1.5B model did what was asked
    return reject["reason"] != "guard" and not _bettered(example) and _whole(example)


def _bettered(example: Example) -> bool:
    """Its label held the revision better, by more than known revisions that are no better reach."""
    margin, bar = example.get("margin"), example["label"].get("bar") if "label" in example else None
    return margin is not None and margin > (bar or 0.0)


def _whole(example: Example) -> bool:
    """It ended by itself, says nothing twice, holds nothing of its prompt; no refusal where that is a fault."""
    return (
        not refusal_at_fault(example, revised=False)
        and "answers" not in example["flags"]["ran_to_limit"]
        and _is_whole(example["initial_answer"])
    )


def _is_whole(answer: str) -> bool:
    return bool(answer.strip()) and not repeats(answer) and not leftovers(answer)
