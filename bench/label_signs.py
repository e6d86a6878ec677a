"""How well do wordings of the comparison sort revisions that somebody marked: AUC by prompt file, pool and principle.

Marked revisions: JSON lines `instruction, principle, answer, revision, pool, better` (1, 0, -1, by somebody who did
not know which text was which). A prompt file with the fields `first` and `second` compares both texts in both orders;
one with `answer` asks about each text by itself (Yes, No). The known revisions of cai/data/cases are sorted, too.

    python bench/label_signs.py --marked marked.jsonl --prompts prompts/judge_pair.yaml others/ --out signs.json
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from critic_signals import auc, load, parser_of  # noqa: E402

from cai.data.comparisons import (  # noqa: E402
    NO_PRINCIPLE,
    PAIR_FIELDS,
    comparison_asks,
    log_odds,
    pair_log_odds,
    verdict_asks,
)
from cai.data.principles import cases  # noqa: E402
from cai.engine.asks import Ask, Name, Scorer, score  # noqa: E402
from cai.recipe.prompts import Prompt, load_prompt  # noqa: E402

MARKED = ("instruction", "principle", "answer", "revision", "pool", "better")
ALONE = frozenset({"instruction", "answer"})
UNDER = ("own", "general")


def rows_of(marked: Path | None) -> list[dict[str, Any]]:
    known = [
        {**{k: case[k] for k in ("instruction", "principle", "answer", "revision", "pool", "kind")}, "set": "known"}
        | {"better": 1 if case["better"] else -1}
        for case in cases()
    ]
    lines = marked.read_text().splitlines() if marked else []
    return known + [{**marked_row(line, f"{marked}: line {n}"), "set": "marked"} for n, line in enumerate(lines, 1)]


def marked_row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        if set(MARKED) <= row.keys() and row["better"] in (1, 0, -1):
            return row
    except (ValueError, AttributeError):
        pass
    sys.exit(f"{where}: no marked revision. Write a JSON object with {', '.join(MARKED)} (1, 0 or -1).")


def prompt_of(path: Path) -> Prompt:
    text = path.read_text()
    alone = "{{first}}" not in text
    fields = ALONE | ({"principle"} if "{{principle}}" in text else set()) if alone else PAIR_FIELDS
    return load_prompt(path, frozenset(fields))


def asks_of(scorer: Scorer, prompt: Prompt, rows: Sequence[Mapping[str, Any]]) -> Iterable[Ask]:
    for n, row in enumerate(rows):
        for under in UNDER:
            principle = row["principle"] if under == "own" else NO_PRINCIPLE
            if "first" in prompt.fields:
                texts = (row["instruction"], principle, row["revision"], row["answer"])
                yield from comparison_asks(scorer, prompt, (n, under), *texts)
                continue
            for which in ("revision", "answer"):
                fields = {"instruction": scorer.cut(row["instruction"]), "answer": scorer.cut(row[which])}
                fields |= {"principle": principle} if "principle" in prompt.fields else {}
                yield from verdict_asks(scorer, prompt, (n, under, which), fields, ("Yes", "No"))


def margins(scores: Mapping[Name, Any], prompt: Prompt, count: int) -> list[dict[str, float]]:
    def one(n: int, under: str) -> float:
        if "first" in prompt.fields:
            return pair_log_odds(scores, (n, under))
        ours, theirs = (log_odds(scores, (n, under, which), ("Yes", "No")) for which in ("revision", "answer"))
        return round(ours - theirs, 6)

    return [{under: one(n, under) for under in UNDER} for n in range(count)]


def likelihoods(context: Any, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Nats a token that either text has as an answer to its instruction: revision less answer."""
    scorer, prompt, asks = context.scorer, context.prompts["answers"], []
    for n, row in enumerate(rows):
        shown = prompt.render({"instruction": row["instruction"]}, format=scorer.format, tokenizer=scorer.tokenizer)
        for which in ("revision", "answer"):
            asks.append(Ask((n, which), tuple(shown.token_ids), scorer.continuation(row[which]), shown.prefix_len))
    scores = score(scorer, asks)

    def mean(n: int, which: str) -> float:
        found = scores.get((n, which))  # an empty text has none
        return found.total / len(scorer.continuation(rows[n][which])) if found else -math.inf

    found = [mean(n, "revision") - mean(n, "answer") for n in range(len(rows))]
    return [{under: value for under in UNDER} for value in found]


def table(name: str, rows: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, float]]) -> None:
    cells = []
    for which, pool in (("marked", "redteam"), ("marked", "benign"), ("marked", ""), ("known", "")):
        chosen = [i for i, row in enumerate(rows) if row["set"] == which and (not pool or row["pool"] == pool)]
        for way in (*UNDER, "mean"):
            value = {i: math.fsum(found[i].values()) / 2 if way == "mean" else found[i][way] for i in chosen}
            better = [value[i] for i in chosen if rows[i]["better"] > 0]
            cells.append(f"{auc(better, [value[i] for i in chosen if rows[i]['better'] < 0]):>7.2f}")
    print(f"{name:<34}{''.join(cells)}", flush=True)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--marked", type=Path)
    parser.add_argument("--prompts", type=Path, nargs="+", default=[ROOT / "prompts" / "judge_pair.yaml"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    context, rows = load(options), rows_of(options.marked)
    files = [file for path in options.prompts for file in (sorted(path.glob("*.yaml")) if path.is_dir() else [path])]
    heads = ("red-team", "benign", "all", "known")
    print(f"{'AUC: own principle, general, mean':<34}{''.join(f'{head:>21}' for head in heads)}")
    every: dict[str, list[dict[str, float]]] = {}
    for file in files:
        prompt = prompt_of(file)
        every[file.stem] = margins(score(context.scorer, asks_of(context.scorer, prompt, rows)), prompt, len(rows))
        table(file.stem, rows, every[file.stem])
    every["likelihood as an answer"] = likelihoods(context, rows)
    table("likelihood as an answer", rows, every["likelihood as an answer"])
    if options.out:
        options.out.write_text(json.dumps({"rows": rows, "margins": every}, indent=0) + "\n")


if __name__ == "__main__":
    main()
