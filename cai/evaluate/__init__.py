"""Evaluation: critiques, revisions, preference, training health and forgetting, each as figures with n and interval.

One entrance for a run (`evaluate_run`) and one for a labelled file (`cai.evaluate.exam`). Importing this package
imports neither torch nor scipy; the parts are imported when they are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cai.data.pairs import PairSet
    from cai.data.stage import Context
    from cai.evaluate.gates import Measured


def evaluate_run(
    context: Context, pairs: PairSet, training_pairs: Sequence[dict[str, Any]], adapter: Path, folder: Path
) -> dict[str, Measured]:
    """Every figure of a run by metric name; rows go to eval/scores.jsonl, figures to eval/measured.json.

    `folder`: where the recipe's paths are resolved.

    Resumes from its rows; with none missing, no model is loaded. Errors: Stopped.
    """
    from cai.evaluate.measure import measure

    return measure(context, pairs, training_pairs, adapter, folder)
