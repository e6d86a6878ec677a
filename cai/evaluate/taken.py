"""Scores of the base that a fork need not measure again: CSI, CRI, the checks and the judge's word, adapter off.

Owns which rows of eval/scores.jsonl say nothing of what was trained, the mark of everything that they depend on, and
eval/taken.jsonl, in which a fork keeps its source's until it measures. Invariant: such rows become the run's own only
where the mark of the run that made them is the mark of this one, and then its log has the bytes of one that measured
them itself. What a judge of another family said is never taken: its weights may be others by now.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import orjson

from cai.data.pairs import PairSet
from cai.errors import CaiError
from cai.evaluate.judge import Judge
from cai.evaluate.scores import KEY, every_example, of_judge, settings_of
from cai.run import digests
from cai.run.context import Context
from cai.run.events import read_events
from cai.run.folder import Run
from cai.store.jsonl import Row
from cai.store.records import RecordLog, rows_of, walked
from cai.terminal import say

MARK = "base"  # the row of the score log that says what its rows of the base depend on
TAKEN = "taken.jsonl"
JUDGED = ("critiques.judge", "revisions.judge")
METRICS = ("critiques.gates", "revisions.gates", "critiques.generic_lp", "critiques.csi", "revisions.cri", *JUDGED)
OF_TUNED = {"fresh_items", "fresh_max_new_tokens", "train_pairs", "neutral_passages", "kl_passages", "critic_items"}


def mark(context: Context, pairs: PairSet, judge: Judge | None) -> str:
    """16 hex of everything that a score of the base depends on: what made the data, the model, texts, settings, judge.

    Of the data's keys all count: one that no score reads changes the texts anyway.
    """
    manifest = context.run.manifest
    facts = manifest.get("model") or {}
    parts = [
        manifest.get("identity"),
        [facts.get(name) for name in ("model", "revision", "tokenizer")],
        {name: value for name, value in settings_of(context).items() if name not in OF_TUNED},
        of_judge(judge),
        [[e["item"], e["instruction"], e["initial_answer"], e["rounds"]] for e in every_example(pairs)],
    ]
    data = b"\n".join(orjson.dumps(part, option=orjson.OPT_SORT_KEYS) for part in parts)
    return hashlib.sha256(data).hexdigest()[:16]


def leave(source: Path, run: Run) -> None:
    """A fork keeps what its source measured of the base; whether it still holds is seen when the fork measures."""
    rows = unchanged(source, "scores.jsonl")
    heads = [row for row in rows if row["metric"] == MARK]
    kept = [row for row in rows if row["metric"] in METRICS]
    if heads and kept:
        run.eval.mkdir(mode=0o700, parents=True, exist_ok=True)
        log: RecordLog[Row] = RecordLog.open(run.eval / TAKEN, run.quarantine, key=KEY)
        log.append([*heads, *kept])
        log.close()


def at_hand(source: Path) -> bool:
    """Whether a fork of this run has scores to take."""
    return any(row["metric"] == MARK for row in unchanged(source, "scores.jsonl"))


def settle(context: Context, log: RecordLog[Row], of: str) -> None:
    """Into a score log that was just begun: its mark, and the rows that the fork's source has of the same mark."""
    if len(log.rows) > 1:
        return
    found = unchanged(context.run.path, TAKEN)
    theirs = next((row["of"] for row in found if row["metric"] == MARK), None)
    judged = not context.recipe.evaluation.judge_model and context.recipe.evaluation.judge != "off"
    wanted = [name for name in METRICS if judged or name not in JUDGED]
    rows = [row for row in found if row["metric"] in wanted] if theirs == of else []
    log.append([{"metric": MARK, "item": 0, "round": 0, "of": of}, *rows])
    if rows:
        context.run.event("scores_taken", rows=len(rows))
        say(
            f"evaluation: {len(rows)} scores of the base taken from the forked run: nothing that they depend on differs"
        )


def unchanged(run: Path, name: str) -> list[Row]:
    """The rows of a log in a run's eval/ whose hashes agree; none of a damaged one: to measure again costs but time.

    Where its sum file is gone, the digest decides that an attempt left.
    """
    path = run / "eval" / name
    try:
        digests.check_log(run, path, digests.left(read_events(run / "events.jsonl"))[0])
        found = walked(path, path.with_suffix(".sum"), KEY)
        return [] if found is None or found.changed else list(rows_of(found))
    except CaiError:
        return []
