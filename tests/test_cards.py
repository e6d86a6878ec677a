"""docs/cards.md: what is computed there is the program's own arithmetic, cell by cell."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cai.data import chain
from cai.preflight.machine import WORKING_GIB, memory_check, size_of
from cai.recipe import load as recipes
from cai.run import budget
from cai.run.rates import H200
from cai.terminal import duration, usd

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "cards.md").read_text()
SHAPES = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary, tied: the models' config.json
    "Qwen2.5-1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "Qwen2.5-3B": (2048, 11008, 36, 16, 2, 151936, True),
    "Qwen2.5-7B": (3584, 18944, 28, 28, 4, 152064, False),
    "Qwen2.5-14B": (5120, 13824, 48, 40, 8, 152064, False),
    "Qwen2.5-32B": (5120, 27648, 64, 40, 8, 152064, False),
}
KEYS = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size".split()
FREE = {"24 GB": 23.5, "48 GB": 46.0, "80 GB": 78.5}  # GiB
QUANTIZATIONS = ("nf4", "int8", "bf16")


def table() -> dict[str, dict[str, str]]:
    lines = [line for line in PAGE.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    heads = next(row for row in rows if "nf4" in row)
    return {row[0]: dict(zip(heads, row, strict=True)) for row in rows if row[0] in SHAPES}


def config(name: str) -> dict:
    *numbers, tied = SHAPES[name]
    return {**dict(zip(KEYS, numbers, strict=True)), "tie_word_embeddings": tied}


def fits(name: str, quantization: str, rank: int, free: float) -> bool:
    sets = [f"model.name={name}", f"model.quantization={quantization}", f"lora.rank={rank}"]
    recipe = recipes.resolve(recipes.read(ROOT / "cai.toml"), milestone="m0", sets=sets)
    return memory_check(recipe, config(name), free).status != "fail"


def test_every_model_of_the_table_is_known_here() -> None:
    assert set(table()) == set(SHAPES)


@pytest.mark.parametrize("name", SHAPES)
def test_what_a_model_needs_is_weights_adapter_and_room_to_work(name: str) -> None:
    size = size_of(config(name), name)
    for quantization in QUANTIZATIONS:
        need = size.weights_gib(quantization) + size.per_rank * 32 * 16 / 2**30 + WORKING_GIB
        assert float(table()[name][quantization]) == pytest.approx(need, abs=0.051)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("card", FREE)
def test_what_fits_on_a_card_is_what_the_check_lets_through(name: str, card: str) -> None:
    cell, free = table()[name][card], FREE[card]
    found = [key for key in QUANTIZATIONS if fits(name, key, 32, free)]
    if rank := re.search(r"`lora.rank` (\d+)", cell):
        assert not found and fits(name, "nf4", int(rank[1]), free)
    else:
        assert found == (list(QUANTIZATIONS) if cell == "any" else cell.split(", "))
    if card == "24 GB":
        assert table()[name]["2 x 24 GB"] == f"{cell}, on one" and table()[name]["T4, 16 GB"] == "no"


def test_the_times_are_the_estimates_of_the_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    import runner

    for name in ("m0", "m1", "m2", "m3"):
        runner.main([str(ROOT / "cai.toml"), "--dry-run", "--milestone", name, "--set", "model.backend=cuda"])
        found = re.search(r"^ +(.+?) to (.+?), (\$.+?) to (\$.+?) \(rates: table", capsys.readouterr().out, re.M)
        assert found
        part = PAGE[PAGE.index("## Time and money") :].splitlines()
        row = next(line for line in part if line.startswith(f"| {name.upper()} |"))
        minutes = {"1 min 59 s": "2 min"}.get(found[2], found[2])
        assert f"{found[1]} to {minutes}, {found[3]} to {found[4]}" in row


def test_a_24_gb_card_costs_what_the_rates_of_the_table_come_to_by_size_bandwidth_and_flops() -> None:
    """The page names its factors; each cell is the estimate's own tokens and pairs at the scaled rates."""
    part = PAGE[PAGE.index("### A 24 GB card") : PAGE.index("## Time and money")]
    price, sizes = 0.40, (14.8, 32.8)
    named = {
        "$0.40 an hour",
        "1.008 to 4.8 TB/s",
        "165 to 989",
        "14.8 to 32.8 billion",
        "November 2026",
        "not an offer",
    }
    assert all(text in " ".join(part.split()) for text in named)
    faster, longer = (1.008 / 4.8) * (sizes[1] / sizes[0]), (989 / 165) * (sizes[0] / sizes[1])
    pair, start = H200.seconds_per_pair, H200.set_up
    assert pair is not None and start is not None
    for name in ("m0", "m1", "m2", "m3"):
        recipe = recipes.resolve(recipes.read(ROOT / "cai.toml"), milestone=name, sets=["model.name=Qwen/Qwen2.5-14B"])
        tokens = budget.estimate(recipe, "cuda", Path("no-such-folder"), chain.limit_tokens(recipe)).tokens
        speed, pairs = H200.at(min(budget.slot_count(recipe), 10)) * faster, budget.training_pairs_seen(recipe)
        found = [t / speed + p * longer * pairs + s for t, p, s in zip(tokens, pair, start, strict=True)]
        time = " to ".join(map(duration, found))
        money = " to ".join(usd(seconds / 3600 * price) for seconds in found)
        assert f"| {name.upper()} | {time} | {money} |" in part
        if name in ("m2", "m3"):
            assert f"{name.upper()} {money}" in " ".join((ROOT / "README.md").read_text().split())
