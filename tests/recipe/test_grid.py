"""The grid: every cell once before any twice, topics in turn, the red-team share in every prefix."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cai.errors import CaiError
from cai.recipe.grid import POOLS, Grid, load_grid, permute

SHIPPED = Path(__file__).resolve().parents[2] / "prompts" / "grid.yaml"
LISTS = "topics: [a, b, c], kinds: [k, l], personas: [p], tones: [s, t]"
GOOD = f"benign: {{{LISTS}}}\nredteam: {{{LISTS}}}\n"


def small(*sizes: int) -> Grid:
    names = ("topic", "kind", "persona", "tone")
    axes = {name: tuple(f"{name}{i}" for i in range(n)) for name, n in zip(names, sizes, strict=True)}
    return Grid("g.yaml", "0" * 16, {"benign": axes, "redteam": axes})


def test_the_shipped_grid_is_large_enough():
    grid = load_grid(SHIPPED)
    least = {"benign": (60, 15, 12, 8), "redteam": (40, 10, 8, 6)}
    for pool in POOLS:
        assert all(len(axis) >= n for axis, n in zip(grid.axes[pool].values(), least[pool], strict=True))
    assert not set(grid.axes["benign"]["topic"]) & set(grid.axes["redteam"]["topic"])


@pytest.mark.runs
@given(
    sizes=st.tuples(st.integers(1, 7), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)),
    seed=st.integers(0, 2**63),
    pool=st.sampled_from(POOLS),
)
@settings(max_examples=60, deadline=None)
def test_all_cells_come_once_before_any_comes_twice(sizes, seed, pool):
    grid, total = small(*sizes), math.prod(sizes)
    for walk in range(2):
        cells = [tuple(grid.cell(seed, walk * total + i, pool).values()) for i in range(total)]
        assert len(set(cells)) == total


def test_topics_come_in_turn_and_every_axis_is_used():
    grid = load_grid(SHIPPED)
    topics = len(grid.axes["benign"]["topic"])
    cells = [grid.cell(3, i, "benign") for i in range(topics * 4)]
    for start in range(0, len(cells), topics):
        assert len({cell["topic"] for cell in cells[start : start + topics]}) == topics
    for name, axis in grid.axes["benign"].items():
        counts = Counter(cell[name] for cell in cells)
        assert len(counts) == len(axis)
        assert max(counts.values()) < 4 * len(cells) / len(axis)


def test_cells_follow_the_seed_and_have_the_four_fields():
    grid = load_grid(SHIPPED)
    cells = [grid.cell(1, i, "redteam") for i in range(50)]
    assert cells == [grid.cell(1, i, "redteam") for i in range(50)]
    assert cells != [grid.cell(2, i, "redteam") for i in range(50)]
    assert list(cells[0]) == ["topic", "kind", "persona", "tone"]


@pytest.mark.runs
def test_three_thousand_cells_are_distinct_in_both_pools_also_from_far_indexes():
    grid = load_grid(SHIPPED)
    for pool in POOLS:
        for start in (0, 500_000):
            assert len({tuple(grid.cell(9, start + i, pool).values()) for i in range(3000)}) == 3000


@pytest.mark.runs
@given(share=st.floats(0, 1), seed=st.integers(0, 2**63))
@settings(max_examples=100, deadline=None)
def test_every_prefix_has_the_share_within_three_items(share, seed):
    grid, red = small(1, 1, 1, 1), 0
    for item in range(200):
        red += grid.pool(seed, item, share) == "redteam"
        assert abs(red - (item + 1) * share) <= 3


def test_share_zero_and_one_are_exact_and_pools_do_not_alternate():
    grid = small(1, 1, 1, 1)
    assert {grid.pool(5, item, 0.0) for item in range(500)} == {"benign"}
    assert {grid.pool(5, item, 1.0) for item in range(500)} == {"redteam"}
    even = [grid.pool(5, item, 0.5) == "redteam" for item in range(0, 400, 2)]
    assert 0.35 < sum(even) / len(even) < 0.65


@pytest.mark.runs
@given(size=st.integers(1, 300), key=st.text(max_size=5))
@settings(max_examples=40, deadline=None)
def test_permute_is_a_bijection(size, key):
    assert sorted(permute(i, size, key) for i in range(size)) == list(range(size))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("benign:", "bening:", "key 'benign' is missing"),
        ("redteam:", "extra: 1\nredteam:", "unknown key 'extra'"),
        ("kinds: [k, l]", "kind: [k, l]", "benign: key 'kinds' is missing"),
        ("kinds: [k, l]", "kinds: []", "benign.kinds: no list found"),
        ("kinds: [k, l]", "kinds: k", "benign.kinds: no list found"),
        ("kinds: [k, l]", "kinds: [k, 3]", r"benign.kinds\[1\]: int found"),
        ("kinds: [k, l]", "kinds: [k, ' ']", r"benign.kinds\[1\]: is empty"),
        ("kinds: [k, l]", "kinds: [k, ' k']", "benign.kinds: 'k' stands twice"),
    ],
)
def test_a_bad_file_gives_one_line(tmp_path, old, new, message):
    path = tmp_path / "grid.yaml"
    path.write_text(GOOD)
    assert load_grid(path).size("benign") == 12
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(CaiError, match=message) as caught:
        load_grid(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
