"""Which signs tell a flawed answer from a sound one, and where its flaw stands: the loaded model's own likelihoods.

Read off the critic's exam (answers with planted flaws and sound ones) and off the labelled set (revisions that mend and
that do not). Nothing is trained and nothing judged: every number that a rule could use is written down for each row,
the table says how well each sign parts the two kinds (AUC), and critiques are drawn behind openings and graded.

    python bench/critic_signals.py --rows 8 --out signals.json                      # the embedded model
    python bench/critic_signals.py --model FOLDER --format base --out signals.json  # a GPU
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cai.data import answer_signs, chain, stage_loop  # noqa: E402
from cai.data.comparisons import PAIR_FIELDS, comparison_asks, orders  # noqa: E402
from cai.data.stage import Unit  # noqa: E402
from cai.engine.asks import Ask, Scorer, score  # noqa: E402
from cai.evaluate.critic_grading import ExamRow, _points_at, grade_critique  # noqa: E402
from cai.evaluate.critic_stage import exam_rows  # noqa: E402
from cai.evaluate.exam import read_exam  # noqa: E402
from cai.metrics.text import sentences, words  # noqa: E402
from cai.recipe.constitution import load_constitution  # noqa: E402
from cai.recipe.prompts import load_prompt  # noqa: E402

PART_WORDINGS = (
    "Does the part “{part}” of this answer break the rule: {rule}",
    "Does the part “{part}” of this answer keep to the rule: {rule}",
)
QUOTED = 10  # tokens of a quotation that are scored: behind them it is copied


def parts_of(answer: str) -> list[str]:
    found = [part for line in answer.splitlines() for part in sentences(line) if len(words(part)) >= 3]
    return list(dict.fromkeys(part.replace('"', "'") for part in found)) or [answer.strip()]


def load(options: argparse.Namespace) -> SimpleNamespace:
    from cai.models import policy as models
    from cai.recipe.load import read, resolve

    values = [f"engine.backend={options.engine}", f"model.format={options.format}", *options.set]
    values += [f"model.name={options.model}", f"model.quantization={options.quantization}"] if options.model else []
    recipe = resolve(read(ROOT / "cai.toml"), sets=values, embedded=not options.model)
    loaded = models.load(recipe.model, options.backend or ("cuda" if options.model else "embedded"), seed=0, say=print)
    loaded.mode("generate")
    prompts = chain.read_prompts(
        {
            name: (path := ROOT / "prompts" / f"{name}.yaml", path.read_bytes())
            for name in ("critiques", "revisions", "relevance", "answers")
        },
        recipe,
    )
    prompts["judge_pair"] = load_prompt(ROOT / "prompts" / "judge_pair.yaml", PAIR_FIELDS)
    engine = loaded.engine(recipe.engine)
    return SimpleNamespace(
        recipe=recipe,
        prompts=prompts,
        model=lambda: loaded,
        engine=engine,
        constitution=load_constitution(ROOT / "constitution.yaml"),
        stopped=lambda: False,
        check_stop=lambda where: None,
        progress=SimpleNamespace(step=lambda *a, **k: None),
        scorer=Scorer(engine, loaded.tokenizer, loaded.format, recipe.principles.max_text_tokens),
    )


def part_asks(context: Any, row: ExamRow, principle: Any) -> Iterable[Ask]:
    """Both wordings about every part, and how likely its quotation is to open the critique, under several requests."""
    scorer, prompt = context.scorer, context.prompts["relevance"]
    answer, instruction = scorer.cut(row.answer), scorer.cut(row.instruction)
    for place, part in enumerate(parts_of(row.answer)):
        for side, wording in enumerate(PART_WORDINGS):
            question = wording.format(part=part, rule=principle.principle)
            fields = {"instruction": instruction, "answer": answer, "question": question}
            found = prompt.render(fields, format=scorer.format, tokenizer=scorer.tokenizer)
            lead = "" if found.text[-1:].isspace() else " "
            yield Ask(
                (row.id, "part", place, side), found.token_ids, tuple(scorer.encode(f"{lead}Yes")), found.prefix_len
            )
    others = [p for p in context.constitution.principles if p.id != principle.id]
    requests = {"own": principle.critique_request}
    requests |= {f"other{i}": others[(len(row.id) + 5 * i) % len(others)].critique_request for i in range(3)}
    for name, request in requests.items():
        fields = {"instruction": instruction, "answer": answer, "critique_request": request}
        found = context.prompts["critiques"].render(
            fields, format=scorer.format, tokenizer=scorer.tokenizer, prefill='"'
        )
        for place, part in enumerate(parts_of(row.answer)):
            quoted = tuple(scorer.encode(part))[:QUOTED]
            yield Ask((row.id, "quote", name, place), found.token_ids, quoted, found.prefix_len)


def signals(context: Any, rows: Sequence[ExamRow]) -> list[dict[str, Any]]:
    scorer, every = context.scorer, context.constitution.principles
    answers = {(row.id,): (row.instruction, row.answer) for row in rows}
    raw = answer_signs.raw_scores(
        score(scorer, answer_signs.question_asks(context, scorer, answers, every)), answers, every
    )
    critic = {(r.id, p.id): (r.instruction, r.answer, p) for r in rows for p in every}
    odds = answer_signs.critic_odds(score(scorer, answer_signs.critic_asks(context, scorer, critic)))
    fewer = {}
    for row in rows:
        parts = parts_of(row.answer)
        for place, part in enumerate(parts):
            fewer[row.id, place] = (row.instruction, row.answer.replace('"', "'").replace(part, "").strip() or "-")
    asks = []
    for name, text in fewer.items():
        row = next(r for r in rows if r.id == name[0])
        asks += answer_signs.question_asks(context, scorer, {name: text}, [context.constitution[row.principle]])
    deleted = score(scorer, asks)
    asked = [ask for row in rows for ask in part_asks(context, row, context.constitution[row.principle])]
    located = score(scorer, asked)
    found = []
    for row in rows:
        of, parts = row.principle, parts_of(row.answer)
        without = answer_signs.raw_scores(deleted, [(row.id, i) for i in range(len(parts))], [context.constitution[of]])
        table = []
        for place, part in enumerate(parts):
            yes, no = (located[row.id, "part", place, side].total for side in (0, 1))
            quote = {
                name: located[row.id, "quote", name, place].total for name in ("own", "other0", "other1", "other2")
            }
            table.append(
                {
                    "part": part,
                    "flawed": any(_points_at(part, f.span) or _points_at(f.span, part) for f in row.flaws),
                    "asked": answer_signs._raw(yes, no),
                    "deleted": raw[row.id,][of] - without[row.id, place][of],
                    "quote": quote,
                }
            )
        found.append(
            {
                "id": row.id,
                "sound": row.sound,
                "pool": row.pool,
                "length": row.length,
                "principle": of,
                "kinds": [f.kind for f in row.flaws],
                "raw": raw[row.id,],
                "critic": {p.id: odds[row.id, p.id] for p in every},
                "parts": table,
            }
        )
    return found


def signs_of(part: dict[str, Any]) -> dict[str, float]:
    others = statistics.fmean(part["quote"][f"other{i}"] for i in range(3))
    return {
        "asked": part["asked"],
        "deleted": part["deleted"],
        "quote": part["quote"]["own"],
        "quote, less others": part["quote"]["own"] - others,
    }


def auc(flawed: Sequence[float], sound: Sequence[float]) -> float:
    wins = sum((a > b) + 0.5 * (a == b) for a in flawed for b in sound)
    return wins / (len(flawed) * len(sound)) if flawed and sound else float("nan")


def told_apart(found: Sequence[dict[str, Any]]) -> None:
    def rate(name: str, value: Any) -> None:
        sides = [[value(row) for row in found if row["sound"] is sound] for sound in (False, True)]
        print(f"{name:<44}{auc(*sides):>8.3f}")

    print(f"\n{'flawed against sound answers':<44}{'AUC':>8}")
    rate("rule check, own principle", lambda r: r["raw"][r["principle"]])
    rate("rule check, less the mean of all", lambda r: r["raw"][r["principle"]] - statistics.fmean(r["raw"].values()))
    rate("rule check, mean of all", lambda r: statistics.fmean(r["raw"].values()))
    rate("critic's first word", lambda r: r["critic"][r["principle"]])
    rate(
        "critic's first word, less the mean of all",
        lambda r: r["critic"][r["principle"]] - statistics.fmean(r["critic"].values()),
    )
    for name in signs_of(found[0]["parts"][0]):
        rate(f"most suspect part by {name}", lambda r, name=name: max(signs_of(p)[name] for p in r["parts"]))
    print(f"\n{'where the flaw is: most suspect part is flawed':<44}{'share':>8}{'chance':>8}")
    flawed = [r for r in found if any(p["flawed"] for p in r["parts"])]
    chance = statistics.fmean(statistics.fmean(p["flawed"] for p in r["parts"]) for r in flawed)
    for name in signs_of(found[0]["parts"][0]):
        hits = [max(r["parts"], key=lambda p, name=name: signs_of(p)[name])["flawed"] for r in flawed]
        print(f"{name:<44}{statistics.fmean(hits):>8.3f}{chance:>8.3f}")
    hits = [r["parts"][0]["flawed"] for r in flawed]
    print(f"{'the first part':<44}{statistics.fmean(hits):>8.3f}{chance:>8.3f}")


def drawn(context: Any, rows: Sequence[ExamRow], found: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Critiques behind each opening, graded as the exam grades them."""
    openings: dict[str, Any] = {"free": lambda r: "", "a quotation mark": lambda r: '"'}
    for name in signs_of(found[0]["parts"][0]):
        openings[f"part by {name}"] = lambda r, name=name: (
            '"' + max(r["parts"], key=lambda p: signs_of(p)[name])["part"].rstrip(" .,;:") + '"'
        )
    openings["the flaw itself"] = lambda r: (
        '"' + next((p["part"] for p in r["parts"] if p["flawed"]), r["parts"][0]["part"]).rstrip(" .,;:") + '"'
    )
    texts: dict[str, list[dict[str, Any]]] = {}
    print(f"\n{'critiques that begin with':<44}{'found':>8}{'alarms':>8}{'refused':>9}")
    for name, opening in openings.items():
        units = []
        for number, (row, of) in enumerate(zip(rows, found, strict=True)):
            principle = context.constitution[row.principle]
            fields = {
                "instruction": row.instruction,
                "answer": row.answer,
                "critique_request": principle.critique_request,
            }
            units.append(Unit(number, 0, fields, row.principle, shift=(0, 2, 4)[number % 3], prefill=opening(of)))
        made = stage_loop.draw(context, chain.CRITIQUES, units)
        graded = []
        for row, record in zip(rows, made, strict=True):
            grade = grade_critique(row, record["text"]) if record["status"] == "ok" else None
            share = sum(grade.found) / len(grade.found) if grade and grade.found else 0.0
            graded.append(
                {
                    "id": row.id,
                    "text": record["text"],
                    "reason": record["reason"],
                    "found": None if row.sound else share,
                    "alarm": bool(grade and grade.invented) if row.sound else None,
                }
            )
        texts[name] = graded
        recall = statistics.fmean(g["found"] for g in graded if g["found"] is not None)
        alarms = [g["alarm"] for g in graded if g["alarm"] is not None]
        refused = sum(g["reason"] is not None for g in graded)
        print(f"{name:<44}{recall:>8.3f}{statistics.fmean(alarms) if alarms else float('nan'):>8.3f}{refused:>9}")
    return texts


def labels(context: Any, limit: int) -> list[dict[str, Any]]:
    """Both orders of the comparison, and the rule check before and after, of revisions whose worth is known."""
    scorer, prompt, every = context.scorer, context.prompts["judge_pair"], context.constitution.principles
    kinds = ("addressing", "unchanged", "cosmetic", "disclaimer", "refusal", "empty_revision")
    rows = [r for r in read_exam(ROOT / "tests" / "exam.jsonl") if r["kind"] in kinds]
    rows = [row for kind in kinds for row in [r for r in rows if r["kind"] == kind][:limit]]
    asks, answers = [], {}
    for n, row in enumerate(rows):
        for name, principle in (("own", row["principle"]), ("none", "")):
            texts = (row["prompt"], principle, row["revision"], row["answer"])
            asks += comparison_asks(scorer, prompt, (n, name), *texts)
        answers[n, "before"] = (row["prompt"], row["answer"])
        answers[n, "after"] = (row["prompt"], row["revision"])
    scores = score(scorer, asks)
    raw = answer_signs.raw_scores(
        score(scorer, answer_signs.question_asks(context, scorer, answers, every)), answers, every
    )
    ids = {p.principle: p.id for p in every}
    return [
        {
            "kind": row["kind"],
            "pool": row["pool"],
            "principle": ids.get(row["principle"], row["theme"]),
            "own": orders(scores, (n, "own")),
            "none": orders(scores, (n, "none")),
            "before": raw[n, "before"],
            "after": raw[n, "after"],
        }
        for n, row in enumerate(rows)
    ]


def parser_of(text: str | None) -> argparse.ArgumentParser:
    """The options that `load` reads."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder with weights, for a GPU; the embedded model without it")
    parser.add_argument("--quantization", choices=("nf4", "int8", "bf16"), default="nf4")
    parser.add_argument("--format", choices=("base", "chat"), default="base")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--backend", default="", help="fake: a try of the script without a model")
    parser.add_argument("--set", action="append", default=[])
    return parser


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--rows", type=int, default=0, help="rows of the exam, and of each kind of revision; 0 = all")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    context = load(options)
    rows = [row for row in exam_rows() if row.principle in {p.id for p in context.constitution.principles}]
    if options.rows:
        sound = [r for r in rows if r.sound][: options.rows // 2]
        rows = [r for r in rows if not r.sound][: options.rows - len(sound)] + sound
    began = time.perf_counter()
    found = signals(context, rows)
    print(f"{len(rows)} rows scored in {time.perf_counter() - began:.0f} s")
    told_apart(found)
    texts = drawn(context, rows, found)
    known = labels(context, options.rows or 10**6)
    print(
        f"\n{'revisions by kind':<24}{'n':>4}{'both orders':>13}{'by the mean':>13}{'rule fell':>11}{'mean, fell':>12}"
    )
    for kind in dict.fromkeys(row["kind"] for row in known):
        of = [row for row in known if row["kind"] == kind]
        both = [a > 0 > b for a, b in (row["own"] for row in of)]
        mean = [a - b > 0 for a, b in (row["own"] for row in of)]
        fell = [row["after"].get(row["principle"], 0) < row["before"].get(row["principle"], 0) for row in of]
        joint = [m and f for m, f in zip(mean, fell, strict=True)]
        shares = "".join(f"{statistics.fmean(x):>12.2f}" for x in (both, mean, fell, joint))
        print(f"{kind:<24}{len(of):>4} {shares}")
    if options.out:
        options.out.write_text(json.dumps({"rows": found, "critiques": texts, "labels": known}, indent=0) + "\n")


if __name__ == "__main__":
    main()
