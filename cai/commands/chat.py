"""`--chat RUN`: ask base, SFT and tuned the same thing, one load, adapters switched, each answer as it was measured.

Owns the talk: its commands, what is shown, the history of each arm. The prompt is the run's own policy prompt, drawn
greedily; `/critique` puts the run's critique prompt to the base. Invariant: nothing of the run changes, and its lock is
not taken: one may talk to a run that is still training another arm.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from cai import errors
from cai.commands.export_arm import arm_named, whole_adapter
from cai.commands.streaming import Drawn, draw
from cai.data import chain
from cai.engine import Rules, Sampling
from cai.engine.model import Model
from cai.errors import CaiError
from cai.recipe.constitution import Constitution, Principle, load_constitution
from cai.recipe.load import Recipe
from cai.recipe.prompts import FewShotExample, Prompt, Rendered
from cai.report.snapshot import recipe_of
from cai.run.manifest import read_manifest
from cai.terminal import printable

BASE, SFT, FROM_BASE, TUNED = "base", "sft", "from_base", "tuned"
FOLDERS = {SFT: "adapter-sft", FROM_BASE: "adapter-from-base", TUNED: "adapter"}
ENDS = {"eos": "ends by itself", "stop": "stopped where it began another turn", "length": "cut at the limit"}
HELP = (
    "Ask anything. /critique [principle] [arm] criticises the last answer under the run's constitution, /principles "
    "lists it, /new forgets the talk so far, /quit or Ctrl-D ends."
)


@dataclass
class Talk:
    """What a talk needs: the loaded model, the run's prompts and constitution, and what was said so far, by arm."""

    model: Model
    recipe: Recipe
    prompts: Mapping[str, Prompt]
    constitution: Constitution
    adapters: Mapping[str, Path]
    write: Callable[[str], None]
    history: dict[str, list[FewShotExample]] = field(default_factory=dict)
    criticised: int = 0  # how many principles were dealt

    @property
    def arms(self) -> tuple[str, ...]:
        return (BASE, *(arm for arm in FOLDERS if arm in self.adapters))


def command(args: argparse.Namespace) -> int:
    """Talk in the terminal, or answer the one question on standard input."""
    from cai.inputs import locate

    run = locate(args, args.chat)
    terminal = sys.stdin.isatty()
    question = "" if terminal else _question()
    talk = open_talk(run, _write)
    if terminal:
        converse(talk, input)
    else:
        ask(talk, question)
    return errors.DONE


def _question() -> str:
    text = sys.stdin.read().strip()
    if not text:
        raise CaiError(
            "--chat: no terminal, and no question on standard input. Pipe one in: echo '...' | ... --chat RUN"
        )
    return text


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def open_talk(run: Path, write: Callable[[str], None]) -> Talk:
    """The run read and its model loaded. Errors: no such model here, a run folder that is not whole."""
    from cai.models.policy import load

    recipe, manifest = recipe_of(run), read_manifest(run / "manifest.json")
    names = {name: run / "prompts" / f"{name}.yaml" for name in chain.prompt_files(recipe)}
    contents = {name: (path, path.read_bytes()) for name, path in names.items() if path.is_file()}
    prompts = chain.read_prompts(contents, recipe)
    if "policy" not in prompts:
        raise CaiError(f"{names['policy']}: missing: put it back from a copy, or start a new run", errors.CORRUPT)
    constitution = load_constitution(run / "constitution.yaml")
    there = {arm: name for arm, name in FOLDERS.items() if (run / name / "adapter_model.safetensors").is_file()}
    adapters = {arm: _whole(run, name) for arm, name in there.items()}
    model: Model = load(recipe.model, manifest["backend"], seed=recipe.seed, say=lambda line: write(f"{line}\n"))
    model.rules = Rules()  # as a server draws: the rules for small models stay in the pipeline
    if not adapters:
        write("no adapter in this run yet: the base answers alone\n")
    return Talk(model, recipe, prompts, constitution, adapters, write)


def _whole(run: Path, name: str) -> Path:
    """The adapter's folder. Error: CaiError(CORRUPT) for another one than was trained: its answers would be shown."""
    return whole_adapter(arm_named(run, name.removeprefix("adapter").removeprefix("-")), run)


def converse(talk: Talk, read: Callable[[str], str]) -> None:
    """Line after line until the end of input."""
    talk.write(f"{printable(str(talk.model.name), one_line=True)}: {', '.join(talk.arms)}. {HELP}\n")
    while True:
        try:
            line = read("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            talk.write("\n")
            return
        if line in ("/quit", "/exit"):
            return
        try:
            _obey(talk, line)
        except KeyboardInterrupt:  # this answer, not the talk
            talk.write("\n(stopped)\n")
        except CaiError as error:  # a question that is too long
            talk.write(f"{printable(str(error))}\n")


def _obey(talk: Talk, line: str) -> None:
    word, *rest = line.split() or [""]
    if word == "/critique":
        criticise(talk, rest)
    elif word == "/principles":
        talk.write(
            "".join(f"{p.id}: {printable(' '.join(p.principle.split()))}\n" for p in talk.constitution.principles)
        )
    elif word == "/new":
        talk.history.clear()
        talk.write("(a new talk)\n")
    elif word.startswith("/"):
        talk.write(f"{HELP}\n")
    elif line:
        ask(talk, line)


def ask(talk: Talk, question: str) -> None:
    """Every arm's answer, each behind its own talk so far."""
    for arm in talk.arms:
        talk.write(f"\n[{arm}]\n")
        rendered, limit = fitting(talk, arm, question)
        done = _drawn(talk, arm, rendered, limit)
        talk.write(f"\n({ENDS[done.finish]}, {done.tokens} tokens)\n")
        talk.history.setdefault(arm, []).append(FewShotExample(question, done.text))


def fitting(talk: Talk, arm: str, question: str) -> tuple[Rendered, int]:
    """The policy prompt with as much of the arm's talk as leaves room; the oldest exchanges go first."""
    limit, past = talk.recipe.sampling.answers.max_new_tokens, list(talk.history.get(arm, []))
    room = talk.model.max_seq_length
    while True:
        policy = talk.prompts["policy"]
        policy = replace(policy, examples=(*policy.examples, *past), _prefixes={})
        fields = {"instruction": question}
        rendered = policy.render(fields, format=talk.model.format, tokenizer=talk.model.tokenizer)
        left = room - len(rendered.token_ids)
        if left >= min(limit, room // 4):
            return rendered, min(limit, left)
        if not past:
            raise CaiError(
                f"--chat: {len(rendered.token_ids)} tokens leave no room for an answer in {room}. Ask shorter."
            )
        past.pop(0)


def criticise(talk: Talk, words: list[str]) -> None:
    """The run's critique prompt on the last answer of an arm (the tuned one), written by the base."""
    arm = next((word for word in words if word in talk.arms), talk.arms[-1])
    if not talk.history.get(arm):
        talk.write("(nothing was answered yet)\n")
        return
    principle = _principle(talk, [word for word in words if word not in talk.arms])
    if principle is None or "critiques" not in talk.prompts:
        talk.write("(no such principle: /principles lists them)\n")
        return
    last, prompt = talk.history[arm][-1], talk.prompts["critiques"]
    known = {"instruction": last.user, "answer": last.assistant, "critique_request": principle.critique_request}
    fields = {name: known[name] for name in prompt.fields}
    rendered = prompt.render(fields, format=talk.model.format, tokenizer=talk.model.tokenizer)
    talk.write(f"[critique of {arm} by the base, {principle.id}]\n")
    limit = min(talk.recipe.sampling.critiques.max_new_tokens, talk.model.max_seq_length - len(rendered.token_ids))
    if limit < 1:
        talk.write("(the answer leaves no room for a critique)\n")
        return
    _drawn(talk, BASE, rendered, limit)
    talk.write("\n")


def _principle(talk: Talk, words: list[str]) -> Principle | None:
    """The one that was named, else the next of the constitution."""
    principles = talk.constitution.principles
    if words:
        return next((p for p in principles if p.id == words[0]), None)
    talk.criticised += 1
    return principles[(talk.criticised - 1) % len(principles)]


def _drawn(talk: Talk, arm: str, rendered: Rendered, limit: int) -> Drawn:
    """Greedy text of an arm, written while it is made where the backend lets one see it."""
    model = talk.model
    if folder := talk.adapters.get(arm):
        model.attach(folder, talk.recipe.lora)
    model.mode("generate")
    sampling = Sampling(0.0, limit, rendered.stop, tuple(model.tokenizer.eos_ids))
    with ExitStack() as stack:
        stack.enter_context(model.adapter(arm != BASE))
        return draw(model, talk.recipe.engine, rendered, sampling, lambda text: talk.write(printable(text)))
