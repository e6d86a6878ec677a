"""`--exam FILE`: the metrics' own exam on a labelled set."""

from __future__ import annotations

import argparse
from pathlib import Path

import orjson

from cai.errors import DONE
from cai.evaluate import judge as judging
from cai.evaluate.exam import CPU_JUDGE_ROWS, PARTS, read_exam, run_exam
from cai.evaluate.scores import JUDGE_FIELDS, PAIR_FIELDS, make_scorer
from cai.store.files import write_atomic
from cai.terminal import say, word


def command(args: argparse.Namespace) -> int:
    """`runner.py RECIPE --exam FILE`: the table on screen, every row's scores beside the runs."""
    from cai.inputs import read_inputs, runs_root
    from cai.models.policy import load
    from cai.recipe.prompts import load_prompt

    rows = read_exam(args.exam)
    inputs = read_inputs(args)
    recipe, section = inputs.recipe, inputs.recipe.evaluation
    folder = inputs.prompts["policy"].path
    judge = None
    if section.judge != "off" and (Path(folder).parent / "judge.yaml").is_file():
        single = load_prompt(Path(folder).parent / "judge.yaml", JUDGE_FIELDS)
        judge = judging.Judge(single, load_prompt(Path(folder).parent / "judge_pair.yaml", PAIR_FIELDS))
    model = load(recipe.model, inputs.backend, seed=recipe.seed, say=say)
    model.mode("generate")
    engine = model.engine(recipe.engine)
    scorer = make_scorer(model, engine, section)
    say(f"{args.exam}: {len(rows)} labelled rows, scored by {model.name}")
    exam = run_exam(
        rows,
        section,
        scorer,
        judge,
        judge_rows=0 if inputs.backend == "cuda" else CPU_JUDGE_ROWS,
        progress=lambda what, done, total: say(f"{what}: {done}/{total}"),
    )
    say(exam.table)
    for part in PARTS:
        if failures := exam.failures(part):
            say(f"{part}: misses the bar (good >= 80%, bad <= 10%): {'; '.join(failures)}")
    if len({row["good"] for row in rows}) == 1:
        say(f"{args.exam}: all rows have one label: how many of the other are accepted stays open")
    out = runs_root(inputs.source, recipe) / f"exam-{args.exam.stem}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in exam.rows))
    say(f"scores of every row: {word(out)}")
    return DONE
