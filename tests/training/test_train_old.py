"""An old recipe gives the old numbers to the last digit: trainings against tests/support/trajectories.json.

On another processor or version of torch sums are rounded otherwise; then the same to six digits.
"""

from __future__ import annotations

import json

import pytest
from support.record_trajectories import CASES, FILE, machine, trajectory

pytestmark = pytest.mark.slow
KEPT = json.loads(FILE.read_text())


def test_every_case_is_recorded():
    assert set(KEPT["cases"]) == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_an_old_recipe_gives_the_old_numbers(name):
    found, expected = trajectory(**CASES[name]), KEPT["cases"][name]
    if machine() == KEPT["machine"]:
        assert found == expected
    for key in ("loss", "grad_norm"):
        values, wanted = ([float.fromhex(value) for value in side[key]] for side in (found, expected))
        assert values == pytest.approx(wanted, rel=1e-5)
