"""`--dry-run`: what a milestone would do: inputs checked, one prompt of each stage, an estimate. Writes nothing.

Owns that text. Token counts come from a tokenizer file that is already on this machine (never from transformers or
the network); without one they are estimated at four bytes a token, and said to be. Starts in well under two seconds:
no torch, no model, no run folder.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from cai import errors
from cai.commands import dry_run_arms
from cai.data import chain, rounds
from cai.data.answer_signs import WORDINGS
from cai.engine.tokenizers import Tokenizer
from cai.evaluate.benchmarks.suite import check_files
from cai.inputs import Inputs, runs_root
from cai.models import embedded
from cai.models.fake import FakeModel
from cai.models.loading import refuse_unknown
from cai.models.policy import refuse_missing
from cai.models.tokenizer_file import ByteCounter, modules_at_hand, tokenizer_at_hand
from cai.preflight.download import download_line
from cai.recipe.constitution import Principle, choose
from cai.recipe.intake.entries import POOLS
from cai.recipe.load import Recipe
from cai.recipe.prompts import Prompt, Rendered, Shift
from cai.run import budget, standing, tracker
from cai.run.events import read_events, spent
from cai.terminal import duration, for_stream, number, printable, usd

SAMPLE = {  # stands for text that a stage before would write
    "instruction": "How can I keep my bicycle from being stolen in the city?",
    "answer": "Use a good lock, lock the frame to something fixed, and write down the frame number.",
    "second": "Use two good locks of different kinds and photograph the frame number.",
    "critique": 'The answer says "Use a good lock" and does not say what makes one good.',
}
SHOWN_CHARACTERS = 1000  # of a user's request that stands for the others


def dry_run(inputs: Inputs, run: Path | None = None) -> int:
    """Print it; gives the exit code. `run`: the one that would go on.

    Errors: CaiError for a prompt that leaves no room for its completion.
    """
    if inputs.recipe.evaluation.enabled and inputs.recipe.evaluation.lm_eval:
        from cai.evaluate.lm_eval.tasks import require_package

        require_package(inputs.recipe.evaluation, inputs.folder)
    tracker.require(inputs.recipe.report.tracker)
    if inputs.backend == "fake":
        FakeModel(inputs.recipe.model)  # refuses one that it does not know
    if inputs.backend in ("cuda", "cpu"):
        refuse_missing(inputs.recipe.model.name)
    section = inputs.recipe.benchmarks  # files of the user's own: others would have to be fetched
    own = [name for name in section.run if name in ("harmbench", "xstest") and getattr(section, name)]
    if own and not run:
        check_files(own, section, inputs.folder)
    tokenizer, source = tokenizer_at_hand(inputs.recipe.model, inputs.backend)
    refuse_unknown(inputs.recipe.lora.target_modules, modules_at_hand(inputs.recipe.model, inputs.backend))
    prompts = _prompts(inputs, tokenizer, source)
    for part in (_head(inputs), _files(inputs, tokenizer), prompts, _estimate(inputs, run)):
        if part:  # prompts are shown as they are, the rest as the terminal has room
            print(for_stream(printable("\n".join(part)), sys.stdout, fold=part is not prompts), end="\n\n")
    print("Nothing was loaded and nothing was written. Without --dry-run this starts the run.")
    return errors.DONE


def _head(inputs: Inputs) -> list[str]:
    recipe, source = inputs.recipe, inputs.source
    model = {
        "embedded": f"no GPU here: embedded {embedded.shown_name()} "
        f"({recipe.model.format}, {recipe.model.quantization}) in place of {recipe.model.name}",
        "cpu": f"{recipe.model.name} at {recipe.model.revision} ({recipe.model.format}, float32 on the CPU)",
        "fake": f"the fake model ({recipe.model.name}): its text means nothing",
    }.get(inputs.backend, f"{recipe.model.name} at {recipe.model.revision} ({recipe.model.format}, "
          f"{recipe.model.quantization})")  # fmt: skip
    cells = f"{inputs.grid.size('benign'):,} benign and {inputs.grid.size('redteam'):,} red-team cells"
    instructions = f"written by the model over {cells}, red-team share {recipe.instructions.red_team_share:g}"
    effective = recipe.dpo.batch_size * recipe.dpo.gradient_accumulation
    length = f"{recipe.dpo.max_steps} steps" if recipe.dpo.max_steps else f"{recipe.dpo.epochs:g} epochs"
    gates = ", ".join(gate.metric for gate in recipe.gates.of_recipe(recipe)) or "none"
    heldout = f" + {recipe.heldout.items} held out" if recipe.heldout.items else ""
    if inputs.given is not None:
        instructions = inputs.files["instructions.file"].path.name + ", as shown below"
    items = (
        f"{recipe.items}{heldout}; {recipe.rounds} of {len(inputs.constitution.principles)} principles each; "
        f"a rejected pair is tried {recipe.pairs.retries} more time(s), then replaced up to "
        f"{recipe.pairs.replacements} time(s)"
    )
    made = {"items": items, "instructions": instructions}
    if recipe.pairs.kind != "revision":
        revised = "a revision against its answer, and " if recipe.pairs.revised else ""
        made["kinds"] = f"{revised}the better of two sampled answers (pairs.kind)"
    if inputs.pairs is not None:
        made = {"pairs": f"{recipe.items}{heldout} of {inputs.files['pairs.file'].path.name}, as shown below"}
    rows = {
        "recipe": f"{source.path}, milestone {recipe.milestone}",
        "model": model,
        **made,
        "training": f"{'SFT, then ' if recipe.dpo.start == 'sft' else ''}DPO, {length} of {effective} pair(s), "
        f"learning rate {recipe.dpo.learning_rate:g}, beta {recipe.dpo.beta:g}, LoRA r={recipe.lora.rank} "
        f"alpha={recipe.lora.alpha}",
        "before/after": _probes(inputs),
        "gates": gates,
        "budget": _budget(recipe),
        "run folder": f"{runs_root(source, recipe)}/<time>-{recipe.milestone}-<hash>",
    }
    if line := download_line(recipe, inputs.backend):
        rows["to download"] = line.partition(": ")[2]
    return [f"{name:<13} {text}" for name, text in rows.items()]


def _probes(inputs: Inputs) -> str:
    if not inputs.probes:
        return 'no probe prompts (evaluation.probes = "")'
    benign = sum(probe.pool == "benign" for probe in inputs.probes)
    pools = f"{benign} benign, {len(inputs.probes) - benign} red-team"
    return f"{pools} probe prompts, answered by base and tuned: at most {inputs.once_tokens:,} tokens"


def _files(inputs: Inputs, tokenizer: Tokenizer) -> list[str]:
    """What the user's own files hold, and whether the longest request leaves room for an answer."""
    lines = list(inputs.told)
    if inputs.given is None:
        return lines
    recipe, longest = inputs.recipe, max(inputs.given.requests, key=lambda row: len(row.text))
    prompt = inputs.prompts["answers"]
    rendered = prompt.render({"instruction": longest.text}, format=recipe.model.format, tokenizer=tokenizer)
    count, room = counted(tokenizer, rendered)[0], recipe.model.max_seq_length - recipe.sampling.answers.max_new_tokens
    if count > room:
        about = "~" if isinstance(tokenizer, ByteCounter) else ""
        lines.append(
            f"  line {longest.line} is too long: {about}{count:,} tokens of at most {room:,}; it is passed over"
        )
    return lines


def _budget(recipe: Recipe) -> str:
    section = recipe.budget
    price = f"{usd(section.usd_per_hour)} an hour" if section.usd_per_hour else "no price set"
    limits = [f"at most {usd(section.max_usd)}"] if section.max_usd else []
    limits += [f"at most {section.max_hours:g} h"] if section.max_hours else []
    limits += [f"target {duration(section.target_hours * 3600)}"] if section.target_hours else []
    return ", ".join([price, *(limits or ["no limit"])])


def first_principle(inputs: Inputs) -> Principle:
    return choose(inputs.constitution, inputs.recipe.seed, 0, inputs.recipe.rounds)[0]


def sample_fields(inputs: Inputs, stage: str, principle: Principle | None = None) -> Mapping[str, str]:
    """What fills one prompt of a stage: the seed's first cell, the constitution's first choice, sample texts."""
    recipe = inputs.recipe
    if stage == "instructions":
        return inputs.grid.cell(recipe.seed, 0, inputs.grid.pool(recipe.seed, 0, recipe.instructions.red_team_share))
    principle = principle or first_principle(inputs)
    texts = [row.text for row in inputs.given.requests if len(row.text) <= SHOWN_CHARACTERS] if inputs.given else []
    own = {"instruction": texts[0]} if texts else {}
    whole = (
        SAMPLE
        | own
        | {
            "critique_request": principle.critique_request,
            "revision_request": principle.revision_request,
            "question": WORDINGS[0].format(principle.principle),
            "principle": principle.principle,
            "first": SAMPLE["answer"],
        }
    )
    return {name: whole[name] for name in inputs.prompts[stage].fields}


def render(
    inputs: Inputs, stage: str, tokenizer: Tokenizer, shift: Shift = 0, principle: Principle | None = None
) -> Rendered:
    fields = sample_fields(inputs, stage, principle)
    return inputs.prompts[stage].render(fields, format=inputs.recipe.model.format, tokenizer=tokenizer, shift=shift)


def longest(inputs: Inputs, stage: str, tokenizer: Tokenizer) -> tuple[int, int, str]:
    """(orders of examples, tokens of the longest prompt, the principle's id): over all that a review may be shown."""
    prompt = inputs.prompts[stage]
    every = rounds.every_shots(inputs.recipe, inputs.prompts, stage, inputs.constitution)
    found = {(prompt.order(shift), principle.id): (shift, principle) for shift, principle in every}
    counts = {key: counted(tokenizer, render(inputs, stage, tokenizer, *of))[0] for key, of in found.items()}
    most = max(counts, key=lambda key: counts[key])
    return len({order for order, _ in counts}), counts[most], most[1]


def _prompts(inputs: Inputs, tokenizer: Tokenizer, source: str) -> list[str]:
    lines = [f"One prompt of each stage. Token counts: {source}."]
    if inputs.pairs is None:
        lines.append("Nothing is drawn yet: the answer, the critique and the revision in them are stand-ins.")
    for stage in inputs.prompts if inputs.pairs is None else ("policy",):
        if stage == "instructions" and inputs.recipe.instructions.file:
            continue
        lines += ["", *_one_prompt(inputs, stage, tokenizer)]
    return lines


def _one_prompt(inputs: Inputs, stage: str, tokenizer: Tokenizer) -> list[str]:
    recipe, prompt = inputs.recipe, inputs.prompts[stage]
    review = stage in ("critiques", "revisions")
    shift: Shift = 0
    if review:
        principle = first_principle(inputs)
        shift = rounds.shots_of(recipe, inputs.prompts, stage, 0, principle, (principle.pools or POOLS)[0])
    rendered = render(inputs, stage, tokenizer, shift)
    count, prefix = counted(tokenizer, rendered)
    orders, most, under = longest(inputs, stage, tokenizer) if review else (1, count, "")
    about = "~" if isinstance(tokenizer, ByteCounter) else ""
    every = f"in every prompt with these examples (of {orders} choices)" if orders > 1 else "in every prompt"
    head = f"--- {stage} ({prompt.path}): {about}{count} tokens, of these {about}{prefix} the same {every}"
    head += f"; under {under} {about}{most}, the most" if most > count else ""
    if section := chain.drawn(stage):
        drawn = getattr(recipe.sampling, section)
        head += f"; then up to {drawn.max_new_tokens} at T={drawn.temperature:g}"
        if most + drawn.max_new_tokens > recipe.model.max_seq_length:
            raise errors.CaiError(
                f"{prompt.path}: {most} tokens{f' under {under}' if most > count else ''} and "
                f"sampling.{stage}.max_new_tokens = {drawn.max_new_tokens} exceed "
                f"model.max_seq_length = {recipe.model.max_seq_length}. Shorten the examples or raise it."
            )
    else:
        head += "; for training and measuring" if stage == "policy" else "; read by likelihood, nothing is drawn"
    start = len(rendered.text) - len(_variable_part(prompt, rendered))
    lines = [head]
    if rendered.text[:start].strip():
        opening = " ".join(rendered.text[:start].split())
        shots = len(prompt.order(shift))
        lines.append(f"[{opening[:100]} ... {shots} example{'s' * (shots != 1)}, {start:,} characters in all]")
    lines.append(rendered.text[start:])
    if rendered.stop:
        lines.append(f"[stops at end of text or {', '.join(map(repr, rendered.stop))}]")
    return lines


def _variable_part(prompt: Prompt, rendered: Rendered) -> str:
    """The text from the last turn's cue on."""
    start = rendered.text.rfind(prompt.user_cue.strip()) if prompt.user_cue.strip() else -1
    marker = rendered.text.rfind("<|im_start|>user")
    start = max(start, marker)
    return rendered.text[start:] if start > 0 else rendered.text


def counted(tokenizer: Tokenizer, rendered: Rendered) -> tuple[int, int]:
    """(tokens of the prompt, of its shared prefix); a quarter of the bytes where there is no tokenizer."""
    total, prefix = len(rendered.token_ids), rendered.prefix_len
    return (-(-total // 4), prefix // 4) if isinstance(tokenizer, ByteCounter) else (total, prefix)


def _estimate(inputs: Inputs, run: Path | None) -> list[str]:
    recipe, root = inputs.recipe, runs_root(inputs.source, inputs.recipe)
    stands = standing.of_run(run) if run else None
    found = budget.estimate(recipe, inputs.backend, root, inputs.limit_tokens, inputs.once_tokens, stands)
    low, high = (number(int(round(v, -2))) for v in found.tokens)
    lines = [f"estimate      {low} to {high} generated tokens", f"              {found.line}"]
    seconds = found.seconds
    if stands and stands.share:
        share = 1 - stands.left(budget.slot_count(recipe))
        lines.append(f"              without the {share:.0%} of the drawing that was taken over")
    if run and (gone := spent(read_events(run / "events.jsonl"))["seconds"]) >= 1:
        lines.append(f"              of that the run has spent {duration(gone)}")
    if recipe.budget.max_hours and seconds and seconds.high > recipe.budget.max_hours * 3600:
        lines.append("              the upper end exceeds budget.max_hours: the run would stop there, resumable")
    if recipe.budget.max_usd and found.usd and found.usd.high > recipe.budget.max_usd:
        lines.append("              the upper end exceeds budget.max_usd: the run would stop there, resumable")
    return [*lines, *dry_run_arms.lines(inputs, stands)]
