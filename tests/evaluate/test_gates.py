"""Gates: a gate passes only on a value that was measured, on enough units, and that beats its controls."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cai.evaluate.gates import decide, decide_all, passed
from cai.metrics.figure import Figure
from cai.metrics.stats import wilson
from cai.recipe.settings_evaluation import GateSpec, GatesSection


def rate(k: int, n: int, **more) -> Figure:
    low, high = wilson(k, n)
    return Figure("m", k / n, low, high, n, **more)


def spec(**keys) -> GateSpec:
    return GateSpec(**{"metric": "m"} | keys)


@pytest.mark.parametrize(
    ("measured", "gate", "status"),
    [
        (None, spec(at_least=0.7), "UNMEASURED"),
        (Figure("m", None), spec(at_least=0.7), "UNMEASURED"),
        (Figure("m", math.nan, n=3), spec(at_least=0.7), "FAIL"),
        (rate(7, 10), spec(at_least=0.7), "PASS"),
        (rate(6, 10), spec(at_least=0.7), "FAIL"),
        (rate(10, 10), spec(at_least=0.7, minimum_n=11), "UNDERPOWERED"),
        (rate(7, 10), spec(above=0.7), "FAIL"),
        (Figure("m", 0.01, -0.01, 0.03, 60), spec(at_most=0.02, bound="upper"), "UNDERPOWERED"),
        (Figure("m", 0.01, 0.0, 0.015, 60), spec(at_most=0.02, bound="upper"), "PASS"),
        (Figure("m", 0.03, 0.0, 0.05, 60), spec(at_most=0.02, bound="upper"), "FAIL"),
        (Figure("m", 0.9, n=50), spec(at_least=0.7, bound="lower"), "UNDERPOWERED"),
        (rate(9, 10, unscored=5), spec(at_least=0.7), "UNMEASURED"),
        (rate(9, 10, unscored=1), spec(at_least=0.7), "PASS"),
    ],
)
def test_decide(measured, gate, status):
    assert decide(measured, gate).status == status


def test_control_that_does_as_well_fails_the_gate():
    gate = spec(at_least=0.7, beats=("control",), beats_by=0.1)
    assert decide(rate(9, 10), gate, {"control": rate(9, 10)}).status == "FAIL"
    assert decide(rate(9, 10), gate, {"control": rate(8, 10)}).status == "PASS"
    assert decide(rate(9, 10), gate, {}).status == "UNMEASURED"


@pytest.mark.parametrize(
    "control",
    [
        Figure("c", math.nan, n=10),
        Figure("c", 0.0, n=0),
        rate(0, 2, unscored=8),
        rate(0, 10, facts={"stand_in": True}),
    ],
    ids=["nan", "no unit", "mostly unscored", "judged by a stand-in"],
)
def test_a_control_that_measures_nothing_leaves_the_gate_unmeasured(control):
    verdict = decide(rate(9, 10), spec(at_least=0.7, beats=("c",), beats_by=0.2), {"c": control})
    assert verdict.status == "UNMEASURED"
    assert "its control c" in verdict.reason


def test_a_figure_that_is_not_finite_fails_before_anything_else():
    assert decide(Figure("m", math.inf, n=3), spec(at_least=0.7, minimum_n=5)).status == "FAIL"


def test_trap_02_more_than_80_percent_needs_88_of_100_and_172_of_200():
    gate = spec(above=0.8, bound="lower")
    assert decide(rate(87, 100), gate).status == "UNDERPOWERED"
    assert decide(rate(88, 100), gate).status == "PASS"
    assert decide(rate(171, 200), gate).status == "UNDERPOWERED"
    assert decide(rate(172, 200), gate).status == "PASS"
    assert decide(rate(79, 100), gate).status == "FAIL"


def test_trap_01_seven_of_ten_alone_says_nothing():
    low, high = wilson(7, 10)
    assert (round(low, 2), round(high, 2)) == (0.40, 0.89)
    gate = next(gate for gate in GatesSection().m1 if gate.metric == "critiques.meaningful")
    assert set(gate.beats) == {"critiques.meaningful.shuffled", "critiques.meaningful.generic"}
    controls = {name: rate(6, 10) for name in gate.beats}
    assert decide(rate(7, 10), gate, controls).status == "FAIL"
    assert decide(rate(7, 10), gate, {name: rate(1, 10) for name in gate.beats}).status == "PASS"


def test_one_comparison_is_wanted():
    with pytest.raises(ValidationError, match="exactly one"):
        spec()
    with pytest.raises(ValidationError, match="exactly one"):
        spec(at_least=0.1, at_most=0.2)
    with pytest.raises(ValidationError, match="does not go with"):
        spec(at_most=0.1, bound="lower")


def test_advisory_gate_does_not_block():
    verdicts = decide_all({"m": rate(1, 10)}, [spec(at_least=0.7, advisory=True)])
    assert verdicts[0].status == "FAIL"
    assert passed(verdicts)
    assert not passed(decide_all({}, [spec(at_least=0.7)]))


def test_line_says_value_interval_n_and_unscored():
    line = decide(rate(9, 12, unscored=1), spec(at_least=0.7)).line
    assert line.startswith("PASS")
    for part in ("0.75", "[0.468, 0.911]", "n=12", "1 unscored", ">= 0.7"):
        assert part in line


def test_every_default_gate_survives_a_round_trip():
    for milestone in ("m0", "m1", "m2", "m3"):
        for gate in GatesSection().of(milestone):
            assert GateSpec(**{k: tuple(v) if isinstance(v, list) else v for k, v in gate.model_dump().items()}) == gate
    assert GatesSection().of("nightly") == ()


@pytest.mark.runs
@given(st.integers(0, 60), st.integers(1, 60), st.integers(1, 80), st.floats(0, 1))
def test_a_gate_never_passes_below_its_threshold_or_minimum(k, n, minimum, threshold):
    k = min(k, n)
    for bound in ("point", "lower"):
        verdict = decide(rate(k, n), spec(at_least=threshold, minimum_n=minimum, bound=bound))
        if verdict.status == "PASS":
            assert k / n >= threshold
            assert n >= minimum


def test_a_miss_for_want_of_power_is_no_failure():
    """A p of 0.2 on 60 behaviours says little; on 300 it says that nothing was gained."""
    gate = next(gate for gate in GatesSection().m3 if gate.metric == "harmbench.p")
    few, many = (Figure("harmbench.p", 0.2, n=n) for n in (60, 300))
    assert [decide(found, gate).status for found in (few, many)] == ["UNDERPOWERED", "FAIL"]
    assert decide(Figure("harmbench.p", 0.01, n=60), gate).status == "PASS"
