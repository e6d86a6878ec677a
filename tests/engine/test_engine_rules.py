"""min_p: what is far less likely than the best token is never drawn; greedy rows and 0 change nothing."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.slow


def test_masked_tokens_are_those_below_the_floor() -> None:
    """p = (0.5, 0.4, 0.06, 0.04), min_p 0.1 keeps p >= 0.05, at any temperature on the scaled logits."""
    from cai.engine.sampling import mask_min_p

    logits = torch.tensor([[0.5, 0.4, 0.06, 0.04]]).log()
    kept = mask_min_p(logits, torch.tensor([1.0]), 0.1).isfinite()
    assert kept.tolist() == [[True, True, True, False]]
    hot = mask_min_p(logits, torch.tensor([2.0]), 0.1).isfinite()  # p^(1/2): flatter, so all stay
    assert hot.tolist() == [[True, True, True, True]]


def test_draws_come_from_the_kept_only_and_in_proportion() -> None:
    from cai.engine.sampling import mask_min_p, pick

    logits = torch.tensor([[0.5, 0.4, 0.06, 0.04]]).log().repeat(4000, 1)
    ones = torch.ones(4000)
    drawn = pick(mask_min_p(logits, ones, 0.2), ones, torch.arange(4000), torch.zeros(4000, dtype=torch.int64))
    shares = torch.bincount(drawn, minlength=4) / 4000
    assert shares[2:].sum() == 0
    assert abs(shares[0] - 5 / 9) < 0.03
