"""What M3's stages and its evaluation ask a scoring engine: the program's own asks, over made texts; their tokens.

Owns the requests of bench/m3_phases.py's scoring and what they come to. No model, no torch. Tokens of prompts are a
quarter of the bytes, as `--dry-run` counts where no tokenizer is at hand; texts have the lengths that bench/shapes.py's
stages draw.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from shapes import SEED, STAGES  # noqa: E402

from cai.commands.cli import parse  # noqa: E402
from cai.data import labels, principles  # noqa: E402
from cai.data.comparisons import PAIR_FIELDS, comparison_asks  # noqa: E402
from cai.data.stage import Unit  # noqa: E402
from cai.engine import Score, ScoreRequest  # noqa: E402
from cai.engine.asks import Ask, Name, Scorer, score  # noqa: E402
from cai.engine.native.nesting import by_prefix  # noqa: E402
from cai.evaluate import likelihood  # noqa: E402
from cai.evaluate.cases import Case  # noqa: E402
from cai.evaluate.judge import JUDGE_FIELDS, Judge, judge_critiques, judge_revisions  # noqa: E402
from cai.inputs import Inputs, read_inputs  # noqa: E402
from cai.models.tokenizer_file import ByteCounter  # noqa: E402
from cai.recipe.prompts import load_prompt  # noqa: E402

BYTES = 4  # a token, as `--dry-run` has it
CASES = 8
SIDES = {"instruction": "instructions", "chosen": "revisions", "rejected": "answers"}  # of a pair: whose length it has


def m3() -> Inputs:
    """The recipe as it runs on a GPU, whatever this machine is."""
    return read_inputs(parse([str(ROOT / "cai.toml"), "--milestone", "m3", "--set", "model.backend=cuda"]))


def text(stage: str, item: int) -> str:
    """Words of a length that a stage's completion has in bench/shapes.py."""
    draw = random.Random(f"{SEED}-text-{stage}-{item}")
    low, high = next(shape.outputs for shape in STAGES if shape.name == stage)
    return " ".join(f"{draw.randrange(1000):03d}" for _ in range(draw.randint(low, high)))  # BYTES each


def scorer_of(inputs: Inputs, engine: Any = None) -> Scorer:
    return Scorer(engine, ByteCounter(), inputs.recipe.model.format, BYTES * inputs.recipe.principles.max_text_tokens)


def context_of(inputs: Inputs) -> Any:
    """What the stages that score read of a run's context; its tokens are bytes, and texts are cut at so many more."""
    cut = {"max_text_tokens": BYTES * inputs.recipe.principles.max_text_tokens}
    section = inputs.recipe.principles.model_copy(update=cut)
    model = SimpleNamespace(tokenizer=ByteCounter(), format=inputs.recipe.model.format)
    known = [{"status": "ok", "use": "bar", "known": "no better", "margin": 0.0}] * labels.LEAST  # a bar can be drawn
    return SimpleNamespace(
        recipe=inputs.recipe.model_copy(update={"principles": section}), constitution=inputs.constitution,
        prompts=inputs.prompts, model=lambda: model, engine=None, stopped=None,
        log=SimpleNamespace(by_stage=lambda name: known),
    )  # fmt: skip


def relevance_asks(inputs: Inputs, answers: int) -> list[Ask]:
    """What `relevance` asks about so many answers of a round, every other one to a red-team request."""
    texts: dict[Name, tuple[str, str]] = {(i,): (text("instructions", i), text("answers", i)) for i in range(answers)}
    fits = {(i,): principles.fitting(inputs.constitution, ("benign", "redteam")[i % 2]) for i in range(answers)}
    return principles.every_ask(context_of(inputs), scorer_of(inputs), texts, fits)


def label_asks(inputs: Inputs, pairs: int) -> list[Ask]:
    """What `labels` asks about so many pairs, in which every round was about another principle."""
    ids, units = [principle.id for principle in inputs.constitution.principles], []
    for i in range(pairs):
        fields = {name: text(stage, i) for name, stage in SIDES.items()}
        used = tuple(ids[(i + round_) % len(ids)] for round_ in range(inputs.recipe.rounds))
        units.append(Unit(i, 0, fields, extra={"used": used, "before": {}}))
    return labels.verdict_asks(context_of(inputs), units, "chosen", "rejected")[1]


class Counter:
    """Stands for the engine: counts the tokens that it would compute, a part of a prefix and an equal row once."""

    def __init__(self) -> None:
        self.tokens = 0
        self.parts: set[tuple[tuple[int, ...], int]] = set()

    def score(self, requests: Sequence[ScoreRequest], stopped: Any = None) -> Iterator[Score]:
        for prefix, group in by_prefix(requests):
            start, before = 0, ()
            for end in prefix.ends:
                if (part := (prefix.token_ids[:end], start)) not in self.parts:
                    self.parts.add(part)
                    self.tokens += end - start
                start = end
            for request in group:
                row = (*request.context_ids, *request.continuation_ids)[:-1]
                if row != before[: len(row)]:
                    self.tokens += len(row) - start
                    before = row
                yield Score(request.id, (-1.0,) * len(request.continuation_ids))


def evaluation_tokens(inputs: Inputs) -> dict[str, float]:
    """Prompt tokens of what the evaluation scores by likelihood, name -> tokens; counted over a few cases."""
    section, found = inputs.recipe.evaluation, {}
    files = {"judge": JUDGE_FIELDS, "judge_pair": PAIR_FIELDS}
    judge = Judge(*(load_prompt(ROOT / "prompts" / f"{name}.yaml", fields) for name, fields in files.items()))
    names = ("instructions", "answers", "critiques", "revisions")
    cases = []
    for i in range(CASES):
        asked, answer, critique, revision = (text(name, i) for name in names)
        cases.append(Case(i, 0, asked, answer, "An answer is true.", critique, revision))

    def scored(name: str, wanted: int, *works: Callable[[Scorer], object]) -> None:
        counter = Counter()
        for work in works:
            work(scorer_of(inputs, counter))
        found[name] = counter.tokens / BYTES / CASES * wanted

    def compared(s: Scorer) -> object:
        texts = [(case.instruction, "", case.answer, case.revision) for case in cases]
        return score(s, [ask for i, four in enumerate(texts) for ask in comparison_asks(s, judge.pair, (i,), *four)])

    scored(
        "CSI and CRI", section.likelihood_items, lambda s: likelihood.generic_lps(s, cases),
        lambda s: likelihood.specificity(s, cases, cases), lambda s: likelihood.responsiveness(s, cases, cases),
    )  # fmt: skip
    both = (lambda s: judge_critiques(s, judge, cases, cases), lambda s: judge_revisions(s, judge, cases))
    scored("judge, J1 to J4", section.judge_items, *both)
    scored("judge, P3", min(section.fresh_items, inputs.recipe.heldout.items), compared)
    return found


def shrunk(asks: Sequence[Ask], vocab: int, scale: float = 1.0, seed: int = 0) -> list[Ask]:
    """The same asks in ids of no meaning, a fourth as many as bytes: equal beginnings and contexts stay equal."""
    draw, words = random.Random(f"{SEED}-asks-{seed}"), {}  # type: ignore[var-annotated]
    made_of: dict[tuple[int, ...], tuple[int, ...]] = {(): ()}

    def ids(context: tuple[int, ...], start: int, end: int) -> tuple[int, ...]:
        """What stands for the first `end` of a context, behind what stands for the first `start`."""
        if (found := made_of.get(context[:end])) is None:
            size = max(2, round((end - start) / BYTES * scale))
            more = (draw.randrange(1000, min(vocab, 30000)) for _ in range(size))
            found = made_of[context[:end]] = (*made_of[context[:start]], *more)
        return found

    made = []
    for ask in asks:
        head = ids(ask.context, 0, ask.head)
        shared = ids(ask.context, ask.head, ask.shared)
        context = ids(ask.context, ask.shared, len(ask.context))
        word = words.setdefault(ask.continuation, 11 + len(words))
        made.append(Ask(ask.name, context, (word,), len(shared), len(head)))
    return made


def prompt_tokens() -> int:
    """Of the policy's prompt without its instruction."""
    inputs = m3()
    form = inputs.recipe.model.format
    return (
        len(inputs.prompts["policy"].render({"instruction": ""}, format=form, tokenizer=ByteCounter()).token_ids)
        // BYTES
    )
