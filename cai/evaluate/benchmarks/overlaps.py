"""The training pairs that overlap no benchmark at hand.

Owns eval/contamination.json and what is said of it; the rule is `cai.data.contamination`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cai.data import contamination
from cai.evaluate.benchmarks.suite import at_hand
from cai.run.context import Context
from cai.store.files import write_json_atomic
from cai.store.row_types import Pair, SoundAnswer
from cai.terminal import say


def without_overlaps(
    context: Context, folder: Path, pairs: list[Pair], answers: Sequence[SoundAnswer] = ()
) -> list[Pair]:
    """The pairs that overlap no benchmark at hand; overlaps and what was not checked go to eval/contamination.json.

    `answers`: what an SFT stage would be shown beside them; `cai.data.sound` leaves out those that are listed there.
    """
    loaded, missing = at_hand(context.recipe.benchmarks, folder)
    sources = [
        source
        for name, tasks in loaded.items()
        for t in tasks
        for source in contamination.sources_of(name, t.name, (*t.turns, t.behavior, t.context, *t.references))
    ]
    index = contamination.OverlapIndex(sources)
    kept, removed = contamination.clean(pairs, index)
    texts = contamination.input_texts(context.prompts, context.constitution.principles)
    found = contamination.check_inputs(texts, index)
    checked = {name: len(tasks) for name, tasks in loaded.items()}
    context.run.eval.mkdir(exist_ok=True)
    content = contamination.result(len(pairs), removed, found, checked, missing)
    if answers:
        content["answers"] = contamination.of_answers(answers, index)
        say(f"contamination: {len(content['answers'])} of {len(answers)} own answers for SFT overlap one, too")
    write_json_atomic(context.run.eval / "contamination.json", content)
    note = f"; not checked: {', '.join(missing)}" if missing else ""
    say(f"contamination: {len(removed)} of {len(pairs)} pairs overlap a benchmark and are left out{note}")
    for row in found:
        say(f"contamination: {row['input']} overlaps {row['benchmark']} {row['name']} ({row['rule']}): change it")
    return kept
