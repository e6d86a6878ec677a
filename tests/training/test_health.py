"""Signs of ill health in a training log: when each is there, and that a short or partial log shows none."""

from __future__ import annotations

import math

import pytest

from cai.recipe.settings import HealthSection
from cai.training import health

HEALTH = HealthSection(window=4)


def log(*falls: float, loss: float = 0.6) -> list[dict[str, float]]:
    return [{"step": i + 1, "loss": 0.6931 if i == 0 else loss, health.FALL: fall} for i, fall in enumerate(falls)]


def names(found: list[health.Sign]) -> list[str]:
    return [sign.name for sign in found]


def test_displacement_is_judged_on_the_mean_of_the_window():
    """Mean of the last four: (0.1 + 0.3 + 0.4 + 0.5) / 4 = 0.325 nats a token."""
    found = health.in_log(log(9.0, 0.1, 0.3, 0.4, 0.5), HEALTH)
    assert names(found) == ["displacement"]
    assert found[0].value == pytest.approx(0.325)
    assert '0.33 nats a token (more than 0.3); set dpo.loss_type = ["sigmoid", "sft"]' in found[0].text
    assert health.in_log(log(9.0, 0.1, 0.3, 0.3, 0.5), HEALTH) == []  # exactly 0.3 is not more than 0.3


def test_no_sign_before_the_first_whole_window():
    assert health.in_log(log(5.0, 5.0, 5.0), HEALTH) == []
    assert health.in_log([], HEALTH) == []


def test_a_loss_that_rises():
    found = health.in_log(log(0.0, 0.0, 0.0, 0.0, 0.0, loss=1.0), HEALTH)
    assert names(found) == ["rising_loss"] and found[0].value == pytest.approx(0.3069)
    assert health.in_log(log(0.0, 0.0, 0.0, 0.0, 0.0, loss=0.8), HEALTH) == []


def test_a_log_without_the_key_and_what_was_not_measured_show_nothing():
    assert health.in_log([{"step": i, "loss": 0.6931} for i in range(9)], HEALTH) == []
    assert health.displacement(math.nan, HEALTH) is None
    assert health.truncation(math.nan, HEALTH) is None


def test_truncation():
    assert health.truncation(0.02, HEALTH) is None
    assert "3.0% of the pairs were truncated (more than 2%)" in health.truncation(0.03, HEALTH).text


def test_a_held_out_loss_that_rises_over_its_lowest():
    """0.60, 0.50, 0.54 rose by 0.04, which is not more than 0.05; 0.56 by 0.06 is; no window is waited for."""
    held = [{"step": n, health.HELDOUT: loss} for n, loss in ((2, 0.60), (4, 0.50), (6, 0.54))]
    assert health.in_log([*log(0.0, 0.0), *held], HEALTH) == []
    (sign,) = health.in_log([*log(0.0, 0.0), *held, {"step": 8, health.HELDOUT: 0.56}], HEALTH)
    assert sign.name == "heldout_rise" and sign.value == pytest.approx(0.06) and 'dpo.keep = "best"' in sign.text


def test_held_out_entries_are_no_steps():
    """Between four steps they do not fill the window, nor stand for the first loss."""
    held = [{"step": 0, health.HELDOUT: 0.7}] * 9
    assert health.in_log([*held, *log(5.0, 5.0, 5.0)], HEALTH) == []
    assert names(health.in_log([*held, *log(0.0, 0.0, 0.0, 0.0, 0.0, loss=1.0)], HEALTH)) == ["rising_loss"]


@pytest.mark.parametrize(
    ("margin", "kl", "same", "told"),
    [
        (0.049, 0.01, 0.1, "held-out margin x beta 0.049 (below 0.05)"),
        (0.2, 0.0019, 0.1, "KL 0.0019 nats a token (below 0.002)"),
        (0.2, 0.01, 0.5, "50% of the fresh answers unchanged (50% or more)"),
        (0.05, 0.002, 0.49, ""),
        (-0.049, 0.01, 0.1, "held-out margin x beta -0.049 (below 0.05)"),
        (-1.724, 0.356, 0.0, ""),  # it moved, the wrong way: a higher learning rate is no remedy
        (math.nan, math.nan, math.nan, ""),
    ],
)
def test_an_adapter_that_barely_moved(margin, kl, same, told):
    sign = health.barely_moved(margin, kl, same, HEALTH)
    assert (sign is None) == (not told)
    if sign:
        assert told in sign.text and "raise dpo.learning_rate" in sign.text and sign.text.count("(") == 2


def test_pairs_that_were_learnt_by_heart():
    """Of a real run: 55 pairs, 100 steps of 4, margin 11.8 on them and -1.72 on 44 held-out ones."""
    sign = health.learnt_by_heart(11.8, -1.72, HEALTH)
    assert "11.80 on them, -1.72 on held-out ones" in sign.text and 'dpo.keep = "best"' in sign.text
    assert "dpo.max_steps" in sign.text and "raise" not in sign.text
    for trained, heldout in ((11.8, -0.049), (0.04, -1.0), (11.8, 0.3), (math.nan, -1.0), (1.0, math.nan)):
        assert health.learnt_by_heart(trained, heldout, HEALTH) is None


def test_an_adapter_whose_answers_end_too_early():
    """What passes the gate of stops and says nothing: 17 words of 276, 22 of 97. 79 are short, and whole."""
    sign = health.cut_short(17.3, 276.0)
    assert sign.name == "cut_short" and "17 words where the base's have 276" in sign.text
    assert "sft.end_weight" not in sign.text and "dpo.learning_rate" in sign.text and "sigmoid" in sign.text
    sign = health.cut_short(22.0, 97.0, stage=True)
    assert "22 words where the SFT stage's have 97" in sign.text and "sft.end_weight" in sign.text
    assert health.cut_short(25.0, 100.0) is None
    assert health.cut_short(79.0, 276.0) is None and health.cut_short(math.nan, 276.0) is None
    assert health.cut_short(10.0, math.nan) is None and health.cut_short(0.0, 0.0) is None


def test_an_adapter_that_moved_too_far():
    assert health.moved_too_far(0.1, 0.3, HEALTH) is None and health.moved_too_far(math.nan, math.nan, HEALTH) is None
    sign = health.moved_too_far(0.101, 0.5, HEALTH)
    assert "KL 0.101" in sign.text and "lost 0.50 nats" in sign.text and "lower dpo.learning_rate" in sign.text
