"""What the signs of answers count, apart from any model."""

from __future__ import annotations

import pytest

from cai.engine.asks import common


@pytest.mark.parametrize("shared", range(9))
@pytest.mark.parametrize("longer", [0, 1, 5])
def test_how_many_ids_two_prompts_begin_with(shared: int, longer: int) -> None:
    first = (*range(shared), -1)
    assert common(first, (*range(shared), -2, *range(longer))) == shared
    assert common((*range(shared),), (*range(shared + longer),)) == shared
    assert common([*range(shared + longer)], [*range(shared)]) == shared
