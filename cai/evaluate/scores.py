"""The ground that the measurements of a run stand on: the score log, the lazily loaded model, the sampled cases.

Owns resuming (a row once written is never scored again), the fingerprint that starts a new log when what is measured
has changed, and the switch between base and tuned. Does not own any metric.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import orjson

from cai.data.comparisons import PAIR_FIELDS
from cai.data.pairs import PairSet
from cai.engine import Engine, never
from cai.engine.asks import Scorer
from cai.engine.model import Model
from cai.evaluate import critiques, revisions
from cai.evaluate.cases import MIN_QUOTE_MATCH
from cai.evaluate.external import External
from cai.evaluate.judge import JUDGE_FIELDS, Judge
from cai.recipe.prompts import load_prompt
from cai.recipe.settings import LoraSection
from cai.recipe.settings_evaluation import EvaluationSection
from cai.run import loop
from cai.run.context import Context
from cai.run.loop import open_marked
from cai.store.jsonl import Row
from cai.store.records import RecordLog
from cai.store.row_types import Example

Key = tuple[int, int]
KEY = ("metric", "item", "round")
SHIPPED_PROMPTS = Path(__file__).parent.parent.parent / "prompts"
# they change no row that is stored: the arms of `prompted` have rows of their own, named by `best_of`
DISPLAY_KEYS = {"exam_sensitivity", "judge", "enabled", "lm_eval_include", "prompted", "best_of"}
DISPLAY_KEYS |= {"probes", "probe_tokens"}  # in records.jsonl
NO_TASKS = {"lm_eval": [], "lm_eval_limit": 0, "lm_eval_batch_size": 8}  # in a log of their own: never part of this one
# constants that were settings once: with them the scores of runs made before still count
CONSTANTS = {"batch": 64, "min_quote_match": MIN_QUOTE_MATCH, "max_unchanged": revisions.UNCHANGED}
CONSTANTS |= {"min_critique_words": critiques.LEAST_WORDS, "max_critique_words": critiques.MOST_WORDS}
CONSTANTS |= {"min_length_ratio": revisions.SHORTEST, "max_length_ratio": revisions.LONGEST}
CONSTANTS |= {"min_revision_words": revisions.LEAST_WORDS}


@dataclass
class Evaluation:
    """What every measurement takes. `model()` loads the weights and the adapter at the first missing row."""

    context: Context
    log: RecordLog
    adapter: Path
    judge: Judge | None
    external: External | None = None  # a judge of another family; None: the base judges
    lora: LoraSection | None = None  # of an adapter that another recipe trained; None: the run's own
    _model: Model | None = field(default=None, repr=False)

    @property
    def section(self) -> EvaluationSection:
        return self.context.recipe.evaluation

    @property
    def judges(self) -> bool:
        """Whether the base is asked for its word on texts."""
        return self.section.judge != "off" and self.judge is not None

    @property
    def judge_name(self) -> str:
        if self.external is not None:
            return self.external.shown
        return f"{model_name(self.context)}, adapter off"

    def model(self) -> Model:
        """The loaded model with this run's adapter on it, ready to score."""
        if self.external is not None:
            self.external.close()
        model = self.context.model()
        if model is not self._model or model.attached != self.adapter:
            model.attach(self.adapter, self.lora or self.context.recipe.lora)
            model.mode("generate")
            self._model = model
        return model

    def engine(self) -> Engine:
        return self.model().engine(self.context.recipe.engine)

    def scorer(self) -> Scorer:
        return make_scorer(self.model(), self.engine(), self.section, self.context.stopped)

    @contextmanager
    def base(self) -> Iterator[Scorer]:
        """Scoring by the base model: the adapter is off, the trained policy never judges itself."""
        with self.model().adapter(False):
            yield self.scorer()

    @contextmanager
    def judging(self) -> Iterator[Scorer]:
        """Scoring by whoever judges: the base, or the recipe's judge of another family."""
        if self.external is not None:
            yield self.external.scorer()
            return
        with self.base() as scorer:
            yield scorer

    def left(self, metric: str, keys: Sequence[Key], chunk: int) -> Iterator[list[Key]]:
        """The fixed slices of `keys` that miss a row of this metric; the caller gives the rows of each to `write`."""
        named = [(metric, *key) for key in keys]
        for part in loop.left(self.context, self.log, f"evaluate {metric}", named, chunk):
            yield [(item, round_) for _, item, round_ in part]

    def write(self, metric: str, part: Iterable[Key], rows: Iterable[Row]) -> None:
        loop.write(self.context, self.log, [(metric, *key) for key in part], rows)

    def rows(self, metric: str, keys: Iterable[Key]) -> list[Row]:
        """The rows of `keys` in order. A row that carries `skipped` says why a key has no score: it is left out."""
        found = loop.rows_of(self.log, [(metric, *key) for key in keys])
        return [row for row in found if "skipped" not in row]


def model_name(context: Context) -> str:
    """The model that was loaded: without a GPU it is not the recipe's."""
    return str((context.run.manifest.get("model") or {}).get("model", context.recipe.model.name))


def weights_of(adapter: Path) -> bytes:
    """The bytes of its weights; b"none" where there are none."""
    file = adapter / "adapter_model.safetensors"
    return file.read_bytes() if file.is_file() else b"none"


def make_scorer(
    model: Model, engine: Engine, section: EvaluationSection, stopped: Callable[[], bool] = never
) -> Scorer:
    return Scorer(
        engine,
        model.tokenizer,
        model.format,
        section.max_text_tokens,
        share_contexts=model.backend in ("embedded", "cpu"),
        stopped=stopped,
    )


def load_judge(context: Context) -> Judge | None:
    """The judge's prompts from the run's own prompt folder, else those that come with the project."""
    own = Path(context.prompts["policy"].path).parent
    for folder in (own, SHIPPED_PROMPTS):
        if (folder / "judge.yaml").is_file() and (folder / "judge_pair.yaml").is_file():
            single = load_prompt(folder / "judge.yaml", JUDGE_FIELDS)
            return Judge(single, load_prompt(folder / "judge_pair.yaml", PAIR_FIELDS))
    return None


def settings_of(context: Context) -> Row:
    """The settings that a stored score depends on."""
    settings = context.recipe.evaluation.model_dump(mode="json") | NO_TASKS | CONSTANTS
    if not settings["judge_model"]:  # a key that came later: the scores of runs made before still count
        del settings["judge_model"]
    return {name: value for name, value in settings.items() if name not in DISPLAY_KEYS}


def of_judge(judge: Judge | None) -> list[str] | None:
    """The hashes of its prompts."""
    return [judge.single.sha, judge.pair.sha] if judge else None


def fingerprint(context: Context, pairs: PairSet, adapter: Path, judge: Judge | None) -> str:
    """16 hex of everything a stored score depends on: settings, judge prompts, texts, adapter."""
    texts = [[e["instruction"], e["initial_answer"], e["rounds"]] for e in every_example(pairs)]
    weights = weights_of(adapter)
    parts = [
        orjson.dumps(settings_of(context), option=orjson.OPT_SORT_KEYS),
        orjson.dumps(of_judge(judge)),
        orjson.dumps(texts),
        weights if weights == b"none" else hashlib.sha256(weights).digest(),
    ]
    return hashlib.sha256(b"\n".join(parts)).hexdigest()[:16]


def every_example(pairs: PairSet) -> list[Example]:
    """Complete examples, kept or rejected, by item: measuring only the kept would measure the filter."""
    rejected = [reject["example"] for reject in pairs.rejects if "example" in reject]
    return sorted([*pairs.examples, *rejected], key=lambda example: example["item"])


def open_scores(context: Context, mark: str) -> RecordLog:
    """eval/scores.jsonl of this fingerprint; the log of another one is set aside under its own name."""
    return open_marked(context, context.run.eval / "scores.jsonl", mark, KEY)
