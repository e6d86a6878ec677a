"""A judge of another family (`evaluation.judge_model`): loaded like the guard, asked what the base would be asked.

Owns when it is loaded and freed, how its prompts are written (its own chat template where it has one, else the
transcript). What is asked stays `judge`'s and `preference`'s, and so do the rows; how far the base agrees is
`agreement`'s. Invariant: while it is asked no adapter is on, and the policy's memory is its own again before the policy
is asked (`Evaluation.model`). The stand-in is the base itself: it proves the path and measures nothing.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from datetime import datetime

from cai.engine.asks import Format, Scorer
from cai.models import auxiliary
from cai.models.auxiliary import Auxiliary
from cai.recipe.settings_benchmarks import STAND_IN
from cai.recipe.settings_evaluation import EvaluationSection
from cai.run.context import Context

KEY = "evaluation.judge_model"
REMEDY = (
    "Download it (a gated one: accept its licence on the hub and set HF_TOKEN), give a local folder, "
    f'or let the base judge: --set {KEY}="". For a trial only: "stand-in".'
)


def require(section: EvaluationSection) -> None:
    """Exit 2 with the remedy, before anything is generated, where the judge cannot be had."""
    if section.enabled and section.judge != "off" and section.judge_model:
        auxiliary.require(section.judge_model, KEY, REMEDY)


@dataclass
class External:
    """The judge on call: loaded at the first question, kept while questions follow, freed by `close`."""

    context: Context
    _stack: ExitStack = field(default_factory=ExitStack, repr=False)
    _scorer: Scorer | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        return self.context.recipe.evaluation.judge_model

    @property
    def shown(self) -> str:
        """The judge's name in figures."""
        return f"{self.name} (the base itself)" if self.name == STAND_IN else self.name

    def scorer(self) -> Scorer:
        """What `judge` and `preference` ask through."""
        if self._scorer is None:
            section = self.context.recipe.evaluation
            loaded = self._stack.enter_context(auxiliary.loaded(self.context, self.name, KEY))
            if not loaded.stand_in:  # a template that names today's date: the run's first day, so that a resume agrees
                loaded.tokenizer.date = datetime.fromisoformat(str(self.context.run.manifest["created"]))
            self._scorer = scorer_of(loaded, section, self.context)
        return self._scorer

    def close(self) -> None:
        self._scorer = None
        self._stack.close()


def scorer_of(judge: Auxiliary, section: EvaluationSection, context: Context) -> Scorer:
    """Its prompts are chat turns where its tokenizer has a template, the transcript where it has none."""
    templated = bool(getattr(judge.hf_tokenizer, "chat_template", None))
    written: Format = context.recipe.model.format if judge.stand_in else "chat" if templated else "base"
    limit, on_cpu = section.max_text_tokens, judge.on_cpu
    return Scorer(judge.engine, judge.tokenizer, written, limit, share_contexts=on_cpu, stopped=context.stopped)


def external_of(context: Context) -> External | None:
    """The recipe's judge, not loaded yet; None where the base judges, or nobody."""
    section = context.recipe.evaluation
    return External(context) if section.judge_model and section.judge != "off" else None


def closing(external: External | None) -> AbstractContextManager[object]:
    """The judge is freed on every way out."""
    return contextlib.closing(external) if external else nullcontext()
