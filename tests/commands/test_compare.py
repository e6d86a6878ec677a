"""--compare: what differs in recipe and figures, and paired statistics on shared prompts only."""

from __future__ import annotations

from dataclasses import replace

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


def test_three_runs_stand_side_by_side_and_equal_figures_are_folded(both, tmp_path):
    """A against B and A against C; what all measured alike is one line of names and no row."""
    three = make_run(tmp_path, records(6, heldout=0, rejects=False), run_id="20261122-200000-m1-aaa111",
                     recipe=recipe(items=6, dpo=DpoSection(max_steps=10, beta=0.5)))  # fmt: skip
    text = lines(*both, read_story(three))
    assert any(line.split() == ["dpo.beta:", "0.1", "->", "0.3", "->", "0.5"] for line in text)
    assert [line.split()[:1] for line in text[:3]] == [["A"], ["B"], ["C"]]
    assert sum("Paired, A -> B:" in line for line in text) == sum("Paired, A -> C:" in line for line in text) == 1
    folded = next(line for line in text if "figures are equal" in line)
    assert "critiques.meaningful" in folded and not any(line.startswith("critiques.meaningful") for line in text)


def test_where_the_figures_have_no_room_side_by_side_they_stand_under_each_other(both):
    wide, narrow = lines(*both, columns=200), lines(*both, columns=20)
    assert wide == lines(*both) and len(narrow) > len(wide)
    place = narrow.index("pairs kept")
    assert [line.split()[0] for line in narrow[place + 1 : place + 3]] == ["A", "B"]


def test_the_pace_is_of_the_chain_and_not_of_the_probes(both):
    """A fork drew nothing but six short answers: 286,921 tokens/s stood beside 1,735."""
    probes = {
        "kind": "stage",
        "attempt": 1,
        "s": 1.0,
        "stage": "probes.base",
        "items": 6,
        "tokens": 10**9,
        "seconds": 1.0,
    }
    others = [event for event in both[1].events if event["kind"] != "stage"]
    row = next(line for line in lines(both[0], replace(both[1], events=[*others, probes])) if "tokens/s" in line)
    assert row.split()[-1] == "–"


def test_a_figure_that_differs_between_two_of_three_is_a_row(both):
    """B measured it nowhere and gated it nowhere: A and C still differ, so it is shown."""
    name, figures = next((n, dict(f)) for n, f in both[0].figures.items() if f.get("value") is not None)
    without = replace(both[1], figures={}, gates={})
    changed = replace(both[0], gates={}, figures={name: {**figures, "value": 0.123}})
    rows = [line for line in lines(replace(both[0], gates={}), without, changed) if line.startswith(name)]
    assert len(rows) == 1 and "0.123" in rows[0] and "–" in rows[0]


def test_the_margin_is_shown_with_beta_and_without_under_names_that_say_so(both):
    """Logs: policy 2 nats above the reference on chosen, 1 on rejected: 1 nat, 0.1 x 1 at A and 0.3 x 1 at B."""
    row = {"ref_chosen": -9.0, "chosen": -7.0, "ref_rejected": -9.0, "rejected": -8.0}
    sides = [side(story) for story in both]
    scored = {("preference.pairs", item): row for item in range(6)}
    sides = [replace(of, snapshot=replace(of.snapshot, scores=scored)) for of in sides]
    found = {p.name: (p.one, p.two) for p in paired(*sides)}
    assert found["dpo.margin (beta x nats)"] == (pytest.approx(0.1), pytest.approx(0.3))
    assert found["margin in nats, without beta"] == (1.0, 1.0)
