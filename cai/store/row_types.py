"""The rows that the pipeline writes and reads again, by kind: record, example, pair, reject, score, figure.

Owns their keys and value types, for the type checker; makes, reads and judges none. A row is one JSON object: at run
time a plain dict. What may be absent is `NotRequired`: a stage's own fields, and what runs of before did not
write. A row whose keys are computed (a score by control and criterion) stays a `Row`.
"""

from __future__ import annotations

from typing import NotRequired, TypedDict

from cai.store.jsonl import Row


class RecordExtra(TypedDict, total=False):
    """What a unit brings into its row as it is."""

    pool: str
    cell: dict[str, str] | None
    split: str
    parent: int | None


class UnitExtra(RecordExtra, total=False):
    """What a unit brings to a stage that measures: the principles that were `used`, the scores `before`."""

    used: tuple[str, ...]
    before: dict[str, float | None]


class Record(TypedDict):
    """One line of records.jsonl, under (stage, item, round). `status`: ok or rejected, then with its `reason`."""

    v: int
    stage: str
    item: int
    round: int
    principle: str | None
    text: str
    status: str
    reason: str | None
    finish: str | None
    tokens: int
    seed: int
    prompt_sha: str
    flags: NotRequired[list[str]]
    draws: NotRequired[int]
    # instructions
    pool: NotRequired[str]
    cell: NotRequired[dict[str, str] | None]
    split: NotRequired[str]
    parent: NotRequired[int | None]
    line: NotRequired[int]
    # probes
    arm: NotRequired[str]
    adapter: NotRequired[str]
    probe: NotRequired[str]
    prompt: NotRequired[str]
    # calibration and relevance, in nats
    scores: NotRequired[dict[str, float | None]]
    critic: NotRequired[dict[str, float | None]]
    evidence: NotRequired[dict[str, float | None]]
    bar: NotRequired[float | None]
    # labels, in nats
    first: NotRequired[float | None]
    second: NotRequired[float | None]
    margin: NotRequired[float | None]
    fallen: NotRequired[float | None]
    risen: NotRequired[float | None]
    used: NotRequired[list[str]]
    known: NotRequired[str]
    use: NotRequired[str]
    kind: NotRequired[str]
    # guard
    guard: NotRequired[str]
    chosen_unsafe: NotRequired[float | None]
    rejected_unsafe: NotRequired[float | None]
    chosen_refuses: NotRequired[bool | None]
    category: NotRequired[str | None]


class TextPair(TypedDict):
    prompt: str
    chosen: str
    rejected: str


class Round(TypedDict):
    """One principle's critique and the text after it. `found` is false where the critique left the text as it was.

    `refusal_is_fault`: to its principle.
    """

    principle_id: str | None
    principle: str
    critique: str
    revised_answer: str
    round: NotRequired[int]
    found: NotRequired[bool]
    refusal_is_fault: NotRequired[bool]


class Flags(TypedDict):
    answer_refuses: bool
    revision_refuses: bool
    critique_finds_nothing: bool
    control_tokens: bool
    ran_to_limit: list[str]


class Example(TypedDict):
    """One line of dataset/examples.jsonl: the user's six keys first, then ours."""

    instruction: str
    initial_answer: str
    principle: str
    critique: str
    revised_answer: str
    preference_pair: TextPair
    item: int
    pool: str
    split: str
    principle_id: str | None
    rounds: list[Round]
    flags: Flags
    margin: NotRequired[float | None]
    label: NotRequired[Row]
    kind: NotRequired[str]


class TrainingPair(TextPair):
    """What an arm is trained on. `margin`: nats by which the chosen text was preferred, where labels are checked."""

    item: int
    margin: NotRequired[float | None]


class Pair(TrainingPair):
    """What the data set holds: `split` is train or heldout, `kind` (where there are two) revision or sampled."""

    pool: str
    split: str
    kind: NotRequired[str]


class SoundAnswer(TypedDict):
    """An answer that no principle objects to: what SFT may imitate beside the revisions."""

    item: int
    prompt: str
    chosen: str


class Reject(TypedDict):
    """An item that makes no pair: the most telling reason first, `all` of them after it."""

    item: int
    reason: str
    detail: str
    all: list[str]
    example: NotRequired[Example]


class PairScore(TypedDict):
    """A row `preference.pairs` of eval/scores.jsonl: log-prob sums in nats, `ref_` with the adapter off."""

    metric: str
    item: int
    round: int
    split: str
    chosen: float
    rejected: float
    ref_chosen: float
    ref_rejected: float
    chosen_tokens: int
    rejected_tokens: int
    chosen_words: int
    rejected_words: int
    chosen_refuses: bool
    rejected_refuses: bool


class FigureRow(TypedDict, total=False):
    """A figure as it stands in eval/*.json (`cai.metrics.figure` makes it whole; a reader takes what is there)."""

    metric: str
    value: float | None
    low: float | None
    high: float | None
    n: int
    unscored: int
    judge: str
    worst: list[Row]
    note: str
    facts: Row
