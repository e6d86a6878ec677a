"""Which benchmark is measured on which arm: base and tuned, the adapters beside them, the base prompted well.

Owns the arms of a run's benchmarks (`benchmarks.prompted`, [sft], `dpo.also_from_base`), the names of their record
files, and what their answers depend on. Answers and judges nothing. Invariant: an arm has files of its own, so that one
that is asked for later leaves every row that stands as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

from cai import errors
from cai.errors import CaiError
from cai.evaluate import arms as beside
from cai.evaluate import prompted
from cai.evaluate.benchmarks import answers, loaders, sources, verdicts
from cai.evaluate.benchmarks.answers import ARMS, TUNED, Policy
from cai.evaluate.benchmarks.loaders import Loaded, Task
from cai.evaluate.scores import load_judge
from cai.metrics.figure import sample
from cai.recipe.prompts import Prompt, digest
from cai.recipe.settings_benchmarks import BenchmarksSection
from cai.run.context import Context
from cai.store.jsonl import Row
from cai.store.row_types import Pair
from cai.training.train import load_result

OVERHEAD = 512  # tokens that an arm's examples leave to the question, beside its answers


@dataclass
class BenchmarkPlan:
    """One benchmark of this measurement, on one arm. `prompts`: what MT-Bench's or XSTest's judge is asked.

    `prompts_are`: "published", "ours", or what the checksum of the file said of them. `policy`: who answers.
    """

    name: str
    loaded: Loaded
    tasks: list[Task]
    judge: str
    prompts: Mapping[str, Mapping[str, str]]
    prompts_are: str
    mark: str
    tokens: int
    answered: list[Row]
    policy: Policy

    @property
    def asked(self) -> tuple[str, ...]:
        """The arms whose answers this plan holds; one beside base and tuned stands in the place of tuned."""
        return (TUNED,) if self.policy.name else ARMS

    @property
    def stem(self) -> str:
        """Of its record files."""
        arm, count = self.policy.name, self.policy.best_of
        return ".".join(filter(None, (self.name, f"{arm}_{count}" if count > 1 else arm)))


def policies(context: Context) -> list[Policy]:
    """The run's own policy, then every arm that stands beside it and has its adapter."""
    run, recipe = context.run, context.recipe
    found = [Policy(context, run.adapter)]
    folders = [(beside.SFT, run.sft_adapter, "sft", recipe.sft.enabled)]
    folders.append((beside.FROM_BASE, run.path / "adapter-from-base", "from_base", recipe.dpo.also_from_base))
    for name, folder, training, on in folders:
        if not on or not has_adapter(folder):
            continue
        if load_result(run.path / "train" / training) is None:  # it was trained: the figures would be another adapter's
            raise CaiError(
                f"{folder}: is not the adapter that was trained. Resume the run, which writes it again.", errors.CORRUPT
            )
        found.append(Policy(context, folder, name))
    return found + [_prompted(context, arm) for arm in recipe.benchmarks.prompted]


def _prompted(context: Context, arm: str) -> Policy:
    """An arm that nobody trains. Error: its judge is off."""
    count = context.recipe.evaluation.best_of if arm == "best_of_n" else 1
    if count > 1 and context.recipe.evaluation.judge == "off":
        raise CaiError(
            'benchmarks.prompted: "best_of_n" is chosen by the judge, and evaluation.judge = "off". Leave one out.'
        )
    return Policy(context, context.run.adapter, arm, trained=False, prompt=_prompt(context, arm), best_of=count)


def _prompt(context: Context, arm: str) -> Callable[[int], Prompt]:
    @functools.cache
    def made(max_new_tokens: int) -> Prompt:
        room = 2 * max_new_tokens + OVERHEAD
        return prompted.prompt_of(context, arm, training_pairs(context), room)

    return made


def training_pairs(context: Context) -> list[Pair]:
    """The pairs of the data set, which the few-shot arm is shown."""
    path = context.run.dataset / "pairs" / "train.jsonl"
    try:
        return [orjson.loads(line) for line in path.read_bytes().split(b"\n") if line]
    except (OSError, ValueError):
        raise CaiError(f"{path}: cannot be read. Resume the run, which writes it again.", errors.CORRUPT) from None


def has_adapter(folder: Path) -> bool:
    return (folder / "adapter_model.safetensors").is_file()


def plan(context: Context, name: str, folder: Path, limit: int, policy: Policy) -> BenchmarkPlan:
    section = context.recipe.benchmarks
    loaded = loaders.load(sources.obtain(name, section, folder))
    tasks = sample(loaded.tasks, limit) if limit else list(loaded.tasks)
    prompts, prompts_are = _judge_prompts(name, section, folder)
    tokens = section.mtbench_max_new_tokens if name == "mtbench" else section.max_new_tokens
    mark = _mark(policy, answers.fingerprint(context, policy.adapter, loaded.facts["sha256"], tokens))
    return BenchmarkPlan(name, loaded, tasks, section.judge_of(name), prompts, prompts_are, mark, tokens, [], policy)


def _mark(policy: Policy, mark: str) -> str:
    """With what a prompted arm puts before the prompt, or chooses by."""
    context, more = policy.context, []
    if policy.name == "few_shot":
        more = [text for e in prompted.shown_of(training_pairs(context)) for text in (e.user, e.assistant)]
        more.append(str(context.recipe.model.max_seq_length))
    elif policy.name == "constitution":
        more = [prompted.rules_of(context)]
    elif policy.best_of > 1:
        judge, answer = load_judge(context), context.recipe.sampling.answers
        shas = [judge.single.sha, judge.pair.sha] if judge else []
        more = [str(policy.best_of), str(answer.temperature), str(context.recipe.evaluation.max_text_tokens), *shas]
    return digest(mark.encode(), *(text.encode() for text in more)) if more else mark


def _judge_prompts(name: str, section: BenchmarksSection, folder: Path) -> tuple[Mapping[str, Mapping[str, str]], str]:
    """What the judge of this benchmark is asked, and where it comes from."""
    if name == "harmbench":
        return {}, "published"
    if name == "xstest" and not section.xstest_prompt:
        return verdicts.OWN_REFUSAL, "ours"
    found = sources.obtain(f"{name}_{'prompt' if name == 'xstest' else 'prompts'}", section, folder)
    return (loaders.refusal_prompt if name == "xstest" else loaders.judge_prompts)(found), found.checked


def all_plans(context: Context, names: Sequence[str], folder: Path, limit: int) -> list[list[BenchmarkPlan]]:
    """Of each benchmark its plans: the run's own first."""
    arms = policies(context)
    return [[plan(context, name, folder, limit, policy) for policy in arms] for name in names]
