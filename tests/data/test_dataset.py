"""The data set on disk: the user's format, plain pairs, a card that loads, and the same bytes for the same inputs."""

from __future__ import annotations

from functools import partial

import orjson
import pytest
import yaml
from support.pages import Cleaned, item_rows, make_run, pair_set, recipe, records

from cai.data.dataset import write_dataset
from cai.recipe.settings import PairsSection
from cai.report.cards import card
from cai.run.folder import Run

FACTS = {"model": "SmolLM2-135M-Instruct", "backend": "embedded", "revision": "v1", "load_seconds": 3.0}


def written(tmp_path, rows, facts=FACTS, name="20261122-180000-m1-abc123"):
    pairs = pair_set(rows)
    with Run.create(tmp_path, name, {}, {}) as run:
        write_dataset(run, pairs, Cleaned(pairs.train), partial(card, recipe=recipe(), facts=facts))
    return run.dataset


def read(path):
    return [orjson.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def test_examples_have_the_users_keys_first_and_pairs_are_plain_strings(tmp_path):
    folder = written(tmp_path, records(3, heldout=1))
    first = read(folder / "examples.jsonl")[0]
    wanted = ["instruction", "initial_answer", "principle", "critique", "revised_answer", "preference_pair"]
    assert list(first)[:6] == wanted
    assert first["preference_pair"]["chosen"] == first["revised_answer"]
    assert first["preference_pair"]["rejected"] == first["initial_answer"]
    train, heldout = read(folder / "pairs" / "train.jsonl"), read(folder / "pairs" / "heldout.jsonl")
    assert [list(row) for row in train] == [["prompt", "chosen", "rejected", "item", "pool"]] * 3
    assert [row["item"] for row in heldout] == [500_000]


def test_equal_inputs_give_equal_bytes_in_another_run(tmp_path):
    one = written(tmp_path / "a", records())
    two = written(tmp_path / "b", records(), FACTS | {"load_seconds": 9.0}, "20261123-090000-m1-abc123")
    names = [p.relative_to(one) for p in sorted(one.rglob("*")) if p.is_file()]
    assert [str(n) for n in names] == ["README.md", "examples.jsonl", "pairs/heldout.jsonl", "pairs/train.jsonl"]
    assert all((one / n).read_bytes() == (two / n).read_bytes() for n in names)


def test_a_file_that_is_right_is_not_written_again(tmp_path):
    path = make_run(tmp_path)
    before = {p: p.stat().st_ino for p in (path / "dataset").rglob("*") if p.is_file()}
    pairs = pair_set(records())
    with Run.open(path) as run:
        write_dataset(run, pairs, Cleaned(pairs.train), partial(card, recipe=recipe(), facts=FACTS))
    assert before == {p: p.stat().st_ino for p in before}


def test_card_warns_names_the_splits_and_counts_the_rejects(tmp_path):
    text = (written(tmp_path, records(3, heldout=1)) / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert [f["split"] for f in front["configs"][0]["data_files"]] == ["train", "heldout"]
    assert "not-for-all-audiences" in front["tags"]
    assert "Warning: harmful text" in text
    assert "small embedded model" in text
    assert "identical 1" in text
    assert "| train | 3 |" in text


@pytest.mark.parametrize(("by", "told"), [("comparison", "comparison in both orders;"), ("answer", "each by itself;")])
def test_the_card_says_how_two_sampled_answers_were_ordered(by, told):
    pairs = pair_set(records())
    text = card(pairs, [], [], recipe=recipe(pairs=PairsSection(kind="sampled", by=by)), facts=FACTS)
    assert told in text and text.count("the better one by the model's own") == 1


@pytest.mark.runs
def test_the_card_is_what_the_hubs_own_reader_and_writer_makes_of_it(tmp_path):
    from huggingface_hub import DatasetCard

    text = (written(tmp_path, records(3, heldout=1)) / "README.md").read_text()
    assert str(DatasetCard(text)) == text


def test_model_text_cannot_break_the_card(tmp_path):
    text = (written(tmp_path, item_rows(0, instruction="x\n---\nlicense: evil")) / "README.md").read_text()
    assert "evil" not in text


def test_hostile_text_stays_one_line_a_row(tmp_path):
    hostile = 'a\u2028b\u0085c\x00d"\n\u202e</script>' + " plain words that make a long enough revision text here now"
    folder = written(tmp_path, item_rows(0, revision=hostile))
    assert read(folder / "pairs" / "train.jsonl")[0]["chosen"] == hostile


@pytest.mark.slow
def test_the_folder_loads_with_datasets(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    from datasets import load_dataset

    both = load_dataset(str(written(tmp_path / "a", records(3, heldout=1))), cache_dir=str(tmp_path / "cache"))
    assert {name: len(split) for name, split in both.items()} == {"train": 3, "heldout": 1}
    alone = load_dataset(str(written(tmp_path / "b", records(2, heldout=0))), cache_dir=str(tmp_path / "cache"))
    assert {name: len(split) for name, split in alone.items()} == {"train": 2}
    assert alone["train"].column_names == ["prompt", "chosen", "rejected", "item", "pool"]
