"""Answers of every arm to a benchmark's tasks, as records: eval/benchmarks/<name>.jsonl, key (arm, item, round).

Owns the prompts of the policy (its own policy.yaml, the second turn after the first), the fixed slices and resuming.
Judging comes later, from these records. Invariant: every (arm, task, turn) that ran has one row; a turn that could not
be asked has a row that says why.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from cai.data.slots import seed_of
from cai.engine import Request, Sampling
from cai.engine.asks import score
from cai.engine.model import Model
from cai.evaluate import prompted
from cai.evaluate.benchmarks.loaders import Task
from cai.evaluate.scores import Evaluation, load_judge, model_name, weights_of
from cai.recipe.prompts import FewShotExample, Prompt, Rendered, digest
from cai.run import loop
from cai.run.context import Context
from cai.run.loop import open_marked
from cai.store.jsonl import JsonObject, Row
from cai.store.records import RecordLog

KEY = ("arm", "item", "round")
BASE, TUNED = "base", "tuned"
ARMS = (BASE, TUNED)


@dataclass(frozen=True)
class Policy:
    """The loaded policy with an adapter on it, on demand. `name`: of an arm beside base and tuned.

    An arm that is prompted, not trained, has `trained` false: then `tuned` is the base, under `prompt`; with `best_of`
    above 1 the best of so many answers.
    """

    context: Context
    adapter: Path
    name: str = ""
    trained: bool = True
    prompt: Callable[[int], Prompt] | None = None  # max_new_tokens -> the prompt; None: the policy's own
    best_of: int = 1

    @contextmanager
    def arm(self, name: str) -> Iterator[Model]:
        """The model as `name`: adapter off for base, on for tuned."""
        model = self.context.model()
        model.attach(self.adapter, self.context.recipe.lora)
        model.mode("generate")
        with model.adapter(self.trained and name != BASE):
            yield model

    def asked(self, max_new_tokens: int) -> Prompt:
        return self.prompt(max_new_tokens) if self.prompt else self.context.prompts["policy"]


def open_log(context: Context, stem: str, mark: str) -> RecordLog:
    """eval/benchmarks/<stem>.jsonl of this fingerprint; the log of another one is set aside under its own name."""
    return open_marked(context, context.run.eval / "benchmarks" / f"{stem}.jsonl", mark, KEY)


def fingerprint(context: Context, adapter: Path, sha256: str, max_new_tokens: int) -> str:
    """16 hex of everything an answer depends on: weights, adapter, prompt, file, length."""
    weights = weights_of(adapter)
    parts = [
        model_name(context).encode(),
        weights if weights == b"none" else hashlib.sha256(weights).digest(),
        context.prompts["policy"].sha.encode(),
        sha256.encode(),
        f"{max_new_tokens}/{context.recipe.seed}/{context.recipe.sampling.min_p}/{context.recipe.sampling.no_repeat_ngram}".encode(),
    ]
    return digest(*parts)


def answer(
    policy: Policy, log: RecordLog, name: str, tasks: Sequence[Task], max_new_tokens: int, arms: Sequence[str] = ARMS
) -> list[Row]:
    """Every arm's answers, first turns before second ones. The model is loaded only if a row is missing."""
    context, by_item, rows = policy.context, {task.item: task for task in tasks}, list[Row]()
    evaluation = Evaluation(context, log, policy.adapter, load_judge(context))
    for arm in arms:
        for turn in range(max((len(task.turns) for task in tasks), default=0)):
            keys = [(arm, task.item, turn) for task in tasks if turn < len(task.turns)]
            chunk = 0 if all(log.has(*key) for key in keys) else _chunk(policy, arm)
            for part in loop.left(context, log, f"{name} {policy.name or arm} turn {turn + 1}", keys, chunk):
                chosen = [by_item[item] for _, item, _ in part]
                drawn, judged = _generate(policy, log, name, arm, turn, chosen, max_new_tokens), list[Row]()
                asked = [_conversation(task, turn, log.get(arm, task.item, 0)) for task in chosen]
                texts = [[row["text"] for row in each if row["status"] == "ok"] for each in drawn]
                if both := prompted.rivals(asked, texts):
                    with evaluation.judging() as scorer:
                        judged = prompted.compared(score(scorer, prompted.comparisons(evaluation, scorer, both)), both)
                best = prompted.best(texts, judged)
                loop.write(context, log, part, [_best(each, at) for each, at in zip(drawn, best, strict=True)])
            rows += loop.rows_of(log, keys)
    return rows


def _chunk(policy: Policy, arm: str) -> int:
    """Rows between two writes: a few batches, so that a streaming engine is kept full."""
    with policy.arm(arm) as model:
        engine = model.engine(policy.context.recipe.engine)
        return max(1, engine.stats.batch_size) * (4 if engine.streams else 1)


def _generate(
    policy: Policy, log: RecordLog, name: str, arm: str, turn: int, tasks: Sequence[Task], max_new_tokens: int
) -> list[list[Row]]:
    """Each task's rows, `best_of` of them."""
    context, count = policy.context, policy.best_of
    rows: list[list[Row]] = []
    with ExitStack() as stack:
        model = stack.enter_context(policy.arm(arm))
        engine, prompt = model.engine(context.recipe.engine), policy.asked(max_new_tokens)
        for place, task in enumerate(tasks):
            rendered = _render(prompt, model, task, turn, log.get(arm, task.item, 0) if turn else None)
            rows.append([_row(context, name, arm, turn, task, rendered, k) for k in range(count)])
            if len(rendered.token_ids) + max_new_tokens > model.max_seq_length:
                for row in rows[place]:
                    row |= {"status": "unscored", "reason": f"prompt_too_long: {len(rendered.token_ids)} tokens"}
                continue
            eos = tuple(model.tokenizer.eos_ids)
            heat = task.temperature if count == 1 else context.recipe.sampling.answers.temperature
            sampling = Sampling(heat, max_new_tokens, rendered.stop, eos)
            for k, row in enumerate(rows[place]):
                request = Request(place * count + k, rendered.token_ids, sampling, row["seed"], rendered.prefix_len)
                engine.submit(request)
        for done in engine.completions(context.stopped):
            found = {"text": done.text.strip(), "finish": done.finish, "tokens": len(done.token_ids)}
            rows[done.id // count][done.id % count] |= found
    context.check_stop(f"in {name}")
    return rows


def _best(drawn: Sequence[Row], at: int) -> Row:
    """A task's row: of several answers the one that the run's judge, the base, likes most beside the first."""
    if len(drawn) == 1 or drawn[0]["status"] != "ok":
        return drawn[0]
    return {**drawn[at], "draw": at, "draws": len(drawn), "tokens": sum(row["tokens"] for row in drawn)}


def _conversation(task: Task, turn: int, first: JsonObject | None) -> str:
    """What the judge is told was asked: with what was said before, where this is the second turn."""
    return task.turns[0] if not turn or first is None else "\n\n".join((task.turns[0], first["text"], task.turns[1]))


def _render(policy: Prompt, model: Model, task: Task, turn: int, first: JsonObject | None) -> Rendered:
    """The policy prompt; the second turn stands after the first one and what this arm answered to it."""
    if turn and first is not None:
        asked = FewShotExample(task.turns[0], first["text"])
        policy = replace(policy, examples=(*policy.examples, asked), _prefixes={})
    return policy.render({"instruction": task.turns[turn]}, format=model.format, tokenizer=model.tokenizer)


def _row(context: Context, name: str, arm: str, turn: int, task: Task, rendered: Rendered, draw: int) -> Row:
    """`seed` is the same for both arms: where they draw, they draw with the same noise."""
    return {
        "arm": arm,
        "item": task.item,
        "round": turn,
        "name": task.name,
        "text": "",
        "status": "ok",
        "reason": None,
        "finish": None,
        "tokens": 0,
        "seed": seed_of(context.recipe.seed, name, task.item, turn, draw),
        "prompt_sha": rendered.sha,
    }
