"""--compare: what differs in recipe and figures, and paired statistics on shared prompts only."""

from __future__ import annotations

import orjson
import pytest
from support.pages import ANSWER, item_rows, make_run, recipe, records

from cai.commands.compare import differences, lines, paired, shared, side
from cai.recipe.settings import DpoSection
from cai.report.snapshot import read_story

B = "20261122-190000-m1-def456"


def csi(items, value):
    rows = [{"metric": "critiques.csi", "item": i, "round": 1, "real": value + 0.01 * i} for i in items]
    return b"".join(orjson.dumps(row) + b"\n" for row in rows)


@pytest.fixture
def both(tmp_path):
    one = make_run(tmp_path, records(6, heldout=0, rejects=False), recipe=recipe(items=6))
    rows = [r for i in range(6) for r in item_rows(i, **({"revision": ANSWER} if i in (1, 2) else {}))]
    changed = recipe(items=6, dpo=DpoSection(max_steps=10, beta=0.3))
    two = make_run(tmp_path, rows, run_id=B, recipe=changed)
    (one / "eval" / "scores.jsonl").write_bytes(csi(range(6), 0.2))
    (two / "eval" / "scores.jsonl").write_bytes(csi(range(6), 0.5))
    return read_story(one), read_story(two)


def test_recipe_differences_name_key_and_both_values(both):
    found = {key: (a, b) for key, a, b in differences(*both)}
    assert found == {"dpo.beta": ("0.1", "0.3"), "dpo.max_steps": ("1", "10")}
    assert differences(both[0], both[0]) == []


def test_paired_statistics_by_hand(both):
    """Kept: A 6 of 6, B 4 of 6 (two revisions equal the answer): two discordant pairs, exact p = 2 * 0.5**2 = 0.5."""
    sides = [side(snapshot) for snapshot in both]
    assert sorted(shared(*sides)) == [(i, i) for i in range(6)]
    found = {p.name: p for p in paired(*sides)}
    assert (found["kept as a pair"].one, found["kept as a pair"].two) == (1.0, pytest.approx(4 / 6))
    assert found["kept as a pair"].p == pytest.approx(0.5)
    assert found["CSI"].low == pytest.approx(0.3)
    assert found["CSI"].high == pytest.approx(0.3)
    assert found["words of the revision"].n == 6
    assert "critique meaningful" not in found  # no gate rows: the metric decided nothing


def test_the_screen(both):
    text = "\n".join(lines(*both))
    for part in ("dpo.beta: 0.1 -> 0.3", "6 prompts are in both runs", "exact McNemar p=0.5, Holm 0.5",
                 "critiques.meaningful", "PASS 0.75 [0.41, 0.93] (n=8)", "pairs kept", "6 of 6", "4 of 6"):  # fmt: skip
        assert part in text, part


def test_runs_without_a_shared_prompt_say_so(tmp_path):
    one = make_run(tmp_path, item_rows(0))
    two = make_run(tmp_path, item_rows(0, instruction="Something else entirely?"), run_id=B)
    assert "No prompt is in both runs" in "\n".join(lines(read_story(one), read_story(two)))
