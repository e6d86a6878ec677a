"""Scoring in batches against one by one, on what a run scores: CSI, CRI and the judge, over the labelled set.

One by one: every (context, continuation) is a call of its own and its whole context is computed. In batches: as a run
scores, rows packed and equal beginnings computed once. The same metric functions do both; only the engine that they
call is wrapped. Printed: requests, seconds, the ratio, and the largest difference between the two results in nats.

    python bench/score.py --cases 8 --judged 2 --out score.json             # the embedded model
    python bench/score.py --model FOLDER --quantization nf4                 # a GPU
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cai.engine import Engine, Score, ScoreRequest, never  # noqa: E402
from cai.engine.asks import Scorer  # noqa: E402
from cai.evaluate.cases import Case  # noqa: E402
from cai.evaluate.exam import read_exam  # noqa: E402
from cai.evaluate.judge import Judge, judge_critiques, judge_revisions  # noqa: E402
from cai.evaluate.likelihood import responsiveness, specificity  # noqa: E402
from cai.evaluate.scores import JUDGE_FIELDS, PAIR_FIELDS, make_scorer  # noqa: E402
from cai.recipe.prompts import load_prompt  # noqa: E402

Work = Callable[[Scorer], Any]


class Counted:
    """An engine that counts the requests it scores; `alone`: each in a call of its own, no beginning shared."""

    def __init__(self, engine: Engine, alone: bool) -> None:
        self.engine, self.alone, self.requests = engine, alone, 0

    def score(self, requests: Sequence[ScoreRequest], stopped: Callable[[], bool] = never) -> Iterator[Score]:
        self.requests += len(requests)
        if not self.alone:
            yield from self.engine.score(requests, stopped)
            return
        for request in requests:
            yield from self.engine.score([dataclasses.replace(request, prefix_len=0)], stopped)


def cases_of(kind: str, count: int) -> list[Case]:
    rows = [row for row in read_exam(ROOT / "tests" / "exam.jsonl") if row["kind"] == kind][:count]
    return [
        Case(i, 0, r["prompt"], r["answer"], r.get("principle", ""), r["critique"], r.get("revision", ""), "benign")
        for i, r in enumerate(rows)
    ]


def works(cases: int, judged: int) -> dict[str, Work]:
    critiques, revisions = cases_of("good", cases), cases_of("addressing", cases)
    single = load_prompt(ROOT / "prompts" / "judge.yaml", JUDGE_FIELDS)
    judge = Judge(single, load_prompt(ROOT / "prompts" / "judge_pair.yaml", PAIR_FIELDS))
    return {
        "CSI": lambda scorer: specificity(scorer, critiques, critiques),
        "CRI": lambda scorer: responsiveness(scorer, revisions, critiques),
        "judge of critiques": lambda scorer: judge_critiques(scorer, judge, critiques[:judged], critiques),
        "judge of revisions": lambda scorer: judge_revisions(scorer, judge, revisions[:judged]),
    }


def numbers(found: Any) -> list[float]:
    """Every number of a result, in a fixed order."""
    if isinstance(found, bool) or found is None:
        return []
    if isinstance(found, (int, float)):
        return [float(found)]
    if dataclasses.is_dataclass(found):
        return numbers(dataclasses.asdict(found))  # type: ignore[arg-type]
    if isinstance(found, dict):
        return [value for key in sorted(found, key=str) for value in numbers(found[key])]
    return [value for part in found for value in numbers(part)] if isinstance(found, (list, tuple)) else []


def load(options: argparse.Namespace) -> tuple[Any, Scorer]:
    from cai.models import policy as models
    from cai.recipe.load import read, resolve

    values = [f"engine.backend={options.engine}"]
    values += [f"model.name={options.model}", f"model.quantization={options.quantization}"] if options.model else []
    recipe = resolve(read(ROOT / "cai.toml"), sets=values, embedded=not options.model)
    loaded = models.load(recipe.model, "cuda" if options.model else "embedded", seed=0, say=lambda text: None)
    loaded.mode("generate")
    return loaded, make_scorer(loaded, loaded.engine(recipe.engine), recipe.evaluation)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    model, scorer = load(options)
    gpu = torch.cuda.is_available()

    def timed(work: Work, alone: bool) -> tuple[float, int, list[float]]:
        engine = Counted(scorer.engine, alone)
        began = time.perf_counter()
        found = work(dataclasses.replace(scorer, engine=engine))  # type: ignore[arg-type]
        if gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - began, engine.requests, numbers(found)

    table = works(options.cases, options.judged)
    timed(works(2, 1)["CSI"], False)  # the first call prepares
    rows = {}
    for name, work in table.items():
        alone, requests, expected = timed(work, True)
        together, _, found = timed(work, False)
        off = max(abs(a - b) for a, b in zip(expected, found, strict=True))
        rows[name] = {"requests": requests, "one_by_one_s": alone, "batched_s": together, "difference_nats": off}
    rows["all"] = {key: sum(row[key] for row in rows.values()) for key in ("requests", "one_by_one_s", "batched_s")}
    rows["all"]["difference_nats"] = max(row["difference_nats"] for name, row in rows.items() if name != "all")
    device = torch.cuda.get_device_name() if gpu else f"{torch.get_num_threads()} CPU threads"
    return {
        "machine": f"{platform.machine()}, {device}, torch {torch.__version__}",
        "model": f"{model.name}, {options.quantization if options.model else 'fp32'}",
        "engine": scorer.engine.name,
        "rows": {name: {**row, "ratio": row["one_by_one_s"] / row["batched_s"]} for name, row in rows.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder with weights, for a GPU; the embedded model without it")
    parser.add_argument("--quantization", choices=("nf4", "int8", "bf16"), default="nf4")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--cases", type=int, default=26, help="critiques and revisions (26 in the set)")
    parser.add_argument("--judged", type=int, default=8, help="how many of each the judge reads")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = measure(options)
    print(f"{found['machine']}; {found['model']}; {found['engine']} engine")
    print(f"{'':<22}{'requests':>9}{'one by one s':>14}{'batched s':>11}{'ratio':>7}{'difference':>12}")
    for name, row in found["rows"].items():
        figures = f"{row['requests']:>9}{row['one_by_one_s']:>14.2f}{row['batched_s']:>11.2f}{row['ratio']:>7.2f}"
        print(f"{name:<22}{figures}{row['difference_nats']:>12.6f}")
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
