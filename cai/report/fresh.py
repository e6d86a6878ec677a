"""Every fresh answer of a run by the arm that gave it, and who won by the run's own judge. Read once, never written.

Owns which rows of eval/ are answers to held-out prompts and how their arms are called: `base`, `tuned`, `sft`,
`from_base`, the base prompted well, and the other run of a comparison by its id. Invariant: a verdict counts only for
the texts that it was given on; a log that is missing or damaged has no answers.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cai.data.marks import ANSWERS
from cai.report.snapshot import log_of
from cai.store.jsonl import Row
from cai.store.scan import RECORD_KEY, SCORE_KEY

BASE, TUNED = "base", "tuned"
SET_ASIDE = re.compile(r"-[0-9a-f]{16}$")  # the log of another adapter, as `open_marked` names it
TRAINED = ("sft", "from_base")  # arms with a log of their own answers: eval/<arm>-answers.jsonl
Wins = dict[int, float]  # item -> 1 the first one's answer is better in both orders, 0 the other's, 0.5 neither


@dataclass
class Fresh:
    """`texts`: arm -> item -> answer. Of (first, second): `verdicts`, the judge's, and `odds`, nats for the first."""

    prompts: dict[int, str] = field(default_factory=dict)
    texts: dict[str, dict[int, str]] = field(default_factory=dict)
    verdicts: dict[tuple[str, str], Wins] = field(default_factory=dict)
    odds: dict[tuple[str, str], Wins] = field(default_factory=dict)

    @property
    def arms(self) -> list[str]:
        """Those that answered, the base first, then tuned."""
        there = [arm for arm, texts in self.texts.items() if texts]
        return sorted(there, key=lambda arm: (_last(arm) == 1, -_last(arm), arm))

    def both(self, first: str, second: str) -> list[int]:
        """The prompts that both answered, by item."""
        return sorted(self.texts.get(first, {}).keys() & self.texts.get(second, {}).keys() & self.prompts.keys())

    def alike(self, first: str, second: str) -> int:
        """How many of them letter by letter the same: there is nothing to ask a person."""
        return sum(self.texts[first][item] == self.texts[second][item] for item in self.both(first, second))

    def judged(self, first: str, second: str) -> Wins:
        """The judge's verdicts on these two, whichever way they were asked."""
        turned = {item: 1.0 - win for item, win in self.verdicts.get((second, first), {}).items()}
        return {**turned, **self.verdicts.get((first, second), {})}

    def leaning(self, first: str, second: str) -> Wins:
        """Which way the judge's log-odds lean, in which a liking for a place cancels: 1 the first, 0 the second."""
        turned = {item: -odds for item, odds in self.odds.get((second, first), {}).items()}
        known = {**turned, **self.odds.get((first, second), {})}
        return {item: float(odds > 0) for item, odds in known.items() if odds}

    def key(self, first: str, second: str, item: int) -> str:
        """The name of a mark on these two texts: of other texts it is another one."""
        said = "\0".join((self.prompts[item], self.texts[first][item], self.texts[second][item]))
        return f"{ANSWERS}/{first}/{second}/{item}/{hashlib.sha256(said.encode()).hexdigest()[:12]}"


def ordered(one: str, two: str) -> tuple[str, str]:
    """Two arms in the order in which their comparison is told: tuned before all others, the base behind all."""
    first, second = sorted((one, two), key=lambda arm: (_last(arm), arm))
    return first, second


def _last(arm: str) -> int:
    return {TUNED: 0, BASE: 2}.get(arm, 1)


def read_fresh(run: Path) -> Fresh:
    """What a run folder holds. The first text of an arm and prompt stands; scores.jsonl goes before the experiments."""
    found, folder = Fresh(), run / "eval"
    _scores(found, _rows(folder / "scores.jsonl"))
    for arm in TRAINED:
        _trained(found, arm, _rows(folder / f"{arm}-answers.jsonl"))
    if experiments := [path for name in ("against", "attribution") for path in sorted((folder / name).glob("*.jsonl"))]:
        asked = [row for row in _rows(run / "records.jsonl", RECORD_KEY) if row.get("stage") == "instructions"]
        for path in experiments:
            _experiment(found, path, asked)
    return found


def _rows(path: Path, key: tuple[str, ...] = SCORE_KEY) -> list[Row]:
    return [row for row in log_of(path, key) if "skipped" not in row]


def _scores(found: Fresh, rows: Sequence[Row]) -> None:
    """Base and tuned, and the base prompted well, with P3 and `prompted.NAME.judged`."""
    for row in rows:
        metric, item = str(row["metric"]), int(row["item"])
        if metric == "preference.fresh":
            found.prompts[item] = str(row["prompt"])
            for arm in (BASE, TUNED):
                found.texts.setdefault(arm, {})[item] = str(row[arm])
        elif metric.startswith("prompted.") and "text" in row:
            found.texts.setdefault(metric.removeprefix("prompted."), {})[item] = str(row["text"])
    for arm in list(found.texts):
        judged = "preference.p3" if arm == BASE else f"prompted.{arm}.judged"
        _verdicts(found, (TUNED, arm), [row for row in rows if row["metric"] == judged], "j4")


def _trained(found: Fresh, arm: str, rows: Sequence[Row]) -> None:
    """An arm with an adapter of its own: its answers stand as `tuned`, judged against base and tuned."""
    for row in rows:
        if row["metric"] == "preference.fresh":
            found.prompts.setdefault(int(row["item"]), str(row["prompt"]))
            found.texts.setdefault(arm, {})[int(row["item"])] = str(row[TUNED])
    _verdicts(found, (arm, BASE), [row for row in rows if row["metric"] == "preference.p3"], "j4")
    _verdicts(found, (TUNED, arm), [row for row in rows if row["metric"] == f"over.{arm}"], "j4")


def _experiment(found: Fresh, path: Path, asked: Iterable[Row]) -> None:
    """One log of `head_to_head`: answers of two or three arms and the judgements in the judge's own wording."""
    name, other = path.parent.name, path.stem.removeprefix("without-")
    if SET_ASIDE.search(path.stem):
        return
    called = {"a": TUNED, "b": other, "without": other}
    rows = _rows(path)
    texts: dict[str, dict[int, str]] = {}
    for row in rows:
        metric = str(row["metric"])
        if metric.startswith(f"{name}.answers.") and "text" in row:
            arm = metric.removeprefix(f"{name}.answers.")
            texts.setdefault(called.get(arm, arm), {})[int(row["item"])] = str(row["text"])
    for arm, said in texts.items():
        found.texts[arm] = {**said, **found.texts.get(arm, {})}
    wanted = {item for said in texts.values() for item in said}
    found.prompts = {int(r["item"]): str(r["text"]) for r in asked if r["item"] in wanted} | found.prompts
    ours, theirs = (other, TUNED) if name == "against" else (TUNED, BASE if path.stem == "principles" else other)
    pair = [(found.texts[arm], texts.get(arm, {})) for arm in (ours, theirs) if arm in found.texts]
    shown = {item for item in wanted if all(item in said and texts[item] == said[item] for texts, said in pair)}
    judged = [row for row in rows if row["metric"] == f"{name}.judged" and row["round"] == 0 and row["item"] in shown]
    _verdicts(found, (ours, theirs), judged, "win")


def _verdicts(found: Fresh, pair: tuple[str, str], rows: Iterable[Row], name: str) -> None:
    """Verdicts that stand already are kept: they were given on the texts that are shown."""
    rows = list(rows)
    for of, key in ((found.verdicts, name), (found.odds, "log_odds")):
        given = {int(row["item"]): float(row[key]) for row in rows if isinstance(row.get(key), int | float)}
        if given:
            of[pair] = {**given, **of.get(pair, {})}
