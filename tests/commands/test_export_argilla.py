"""--export --form argilla: two data sets in the shapes that argilla 2.8 reads, blind where they must be, and a card.

Tried with the real package against its real server (2.8.0); here the shapes alone, which that try confirmed.
"""

from __future__ import annotations

import argparse
import json
import re

import orjson
import pytest
from support.pages import make_run, recipe, records
from support.runs import read_jsonl

from cai.commands import export_argilla, review_blind
from cai.commands.export import command
from cai.errors import DONE, CaiError
from cai.recipe.settings import HeldoutSection
from cai.report.snapshot import read_story

ITEMS = (500_000, 500_001, 500_002)

SERVER_S_AGENT = r"[a-zA-Z0-9-_:./\s]*[a-zA-Z0-9][a-zA-Z0-9-_:./\s]*"  # argilla_server, schemas/v1/suggestions.py


@pytest.fixture
def path(tmp_path):
    made = make_run(tmp_path / "runs", records(3, heldout=3), recipe=recipe(items=3, heldout=HeldoutSection(items=3)))
    rows = []
    for item in ITEMS:
        said = {"base": f"One {item}. \u202e\x00", "tuned": "" if item == 500_001 else f"Two {item}."}
        rows.append({"metric": "preference.fresh", "item": item, "round": 0, "prompt": f"Why {item}?", **said})
    (made / "eval" / "scores.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return made


def exported(path, to, **more):
    flags = {"export": str(path), "to": to, "form": "argilla", "dry_run": False, "merged": False, "push": "", "arm": ""}
    recipe_file = path.parent.parent / "cai.toml"
    recipe_file.write_text("[milestones.m0]\n")
    args = argparse.Namespace(**{**flags, "recipe": recipe_file, "milestone": "", "set": [], **more})
    return command(args)


def test_both_sets_have_what_from_disk_opens(path, tmp_path):
    to = tmp_path / "out"
    assert exported(path, to) == DONE
    assert {p.name for p in to.iterdir()} == {"answers", "pairs", "key.jsonl", "marks.jsonl", "README.md"}
    for name, count in (("answers", 3), ("pairs", 6)):
        settings = json.loads((to / name / ".argilla" / "settings.json").read_text())
        rows = json.loads((to / name / "records.json").read_text())
        assert json.loads((to / name / ".argilla" / "dataset.json").read_text())["name"] == f"{path.name}-{name}"
        fields = [field["name"] for field in settings["fields"]]
        assert fields == ["prompt", "left", "right"] and len(rows) == count == len({row["id"] for row in rows})
        known = {about["name"] for about in settings["metadata"]}
        choices = [option["value"] for option in settings["questions"][0]["settings"]["options"]]
        assert choices == ["left", "right", "equal"]
        for row in rows:
            assert list(row["fields"]) == fields and all(text.strip() for text in row["fields"].values())
            assert set(row["metadata"]) <= known
            assert "\u202e" not in str(row["fields"].values()) and "\x00" not in "".join(row["fields"].values())


def test_nothing_in_the_blind_set_tells_an_arm_and_the_key_does(path, tmp_path):
    exported(path, tmp_path / "out")
    for file in (tmp_path / "out" / "answers").rglob("*.json"):
        assert not re.search(r"tuned|base\b|50000\d(?![.?])", file.read_text()), file
    rows = {row["id"]: row for row in json.loads((tmp_path / "out" / "answers" / "records.json").read_text())}
    key = read_jsonl(tmp_path / "out" / "key.jsonl")
    assert {row["id"] for row in key} == set(rows)
    for row in key:
        said = {row["left"]: rows[row["id"]]["fields"]["left"], row["right"]: rows[row["id"]]["fields"]["right"]}
        assert said["base"].startswith("One") and (said["tuned"].startswith("Two") or said["tuned"] == "(no text)")
        assert not rows[row["id"]]["suggestions"], "the judge's word would be an anchor"


def test_a_pair_has_its_label_as_suggestion_on_the_side_where_chosen_stands(path, tmp_path):
    exported(path, tmp_path / "out")
    pairs = {f"{pair['split']}-{pair['item']}": pair for pair in read_story(path).pairs.kept}
    rows = json.loads((tmp_path / "out" / "pairs" / "records.json").read_text())
    assert {row["id"] for row in rows} == set(pairs)
    for row in rows:
        assert row["fields"][row["suggestions"]["better"]["value"]] == pairs[row["id"]]["chosen"]
    assert len({row["suggestions"]["better"]["value"] for row in rows}) == 2
    for agent in {row["suggestions"]["better"]["agent"] for row in rows}:
        assert re.fullmatch(SERVER_S_AGENT, agent), "the server of argilla 2.8 refuses the whole batch for it"


def test_marks_given_here_go_along_on_the_sides_that_are_shown_there(path, tmp_path):
    with review_blind.reading(read_story(path), "ann") as session:
        for task in session.pending:
            side = "left" if task.left.arm == "tuned" else "right"
            assert session.mark(session.ticket(task), "equal" if task.item == 500_002 else side)
    exported(path, tmp_path / "out")
    key = {row["id"]: row for row in read_jsonl(tmp_path / "out" / "key.jsonl")}
    marks = read_jsonl(tmp_path / "out" / "marks.jsonl")
    said = {key[m["id"]]["item"]: key[m["id"]].get(m["value"], m["value"]) for m in marks}
    assert said == {500_000: "tuned", 500_001: "tuned", 500_002: "equal"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'rg.Dataset.from_disk("answers"' in card and 'for name in ["ann"]' in card


def test_the_code_of_the_card_compiles(path, tmp_path):
    with review_blind.reading(read_story(path), "ann") as session:
        session.mark(session.ticket(session.pending[0]), "left")
    exported(path, tmp_path / "out")
    blocks = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.S)
    assert len(blocks) == 3
    for block in blocks:
        compile(block, "card", "exec")


def test_a_dry_run_writes_nothing_and_a_second_export_renews_the_first(path, tmp_path, capsys):
    assert exported(path, tmp_path / "out", dry_run=True) == DONE
    assert "answers: 3 records" in capsys.readouterr().out and not (tmp_path / "out").exists()
    assert exported(path, tmp_path / "out") == exported(path, tmp_path / "out") == DONE


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"merged": True}, "--form argilla: takes no --merged"),
        ({"push": "a/b"}, "--form argilla: takes no --push"),
        ({"arm": "sft"}, "--form argilla: takes no --arm"),
        ({"to": None}, "needs --to FOLDER"),
    ],
)
def test_flags_that_would_be_passed_over_are_refused(path, tmp_path, more, told):
    with pytest.raises(CaiError, match=told):
        exported(path, more.pop("to", tmp_path / "out"), **more)


def test_a_folder_in_use_and_a_run_with_nothing_to_mark_are_one_line(path, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(CaiError, match="is not empty"):
        exported(path, tmp_path / "full")
    with pytest.raises(CaiError, match="lies among the runs"):
        exported(path, path.parent / "out")
    empty = make_run(tmp_path / "others", [])
    with pytest.raises(CaiError, match="no pair and no fresh answers"):
        export_argilla.export(read_story(empty), tmp_path / "out", print)
