"""The arms beside each other: every cell is its arm's own figure, and what no arm has is empty or left out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from cai.report import arms_table
from cai.report.publication import main_rows, p1_rows
from cai.report.table_text import NONE

ARMS = ("few_shot", "constitution", "best_of_n", "sft", "from_base")


def snapshot(figures: dict[str, Any], start: str = "sft") -> Any:
    return SimpleNamespace(figures=figures, recipe=SimpleNamespace(dpo=SimpleNamespace(start=start)))


def figure(value: float, n: int = 40, **more: Any) -> dict[str, Any]:
    return {"value": value, "low": None, "high": None, "n": n, "facts": {}, **more}


def every_figure() -> dict[str, Any]:
    """One value for each figure and arm, no two alike."""
    names = ["preference.p1", *(f"preference.p1.{arm}" for arm in ("sft", "from_base"))]
    names += ["preference.p2.before", "preference.p2.after", "preference.p2.after.sft", "preference.p2.after.from_base"]
    names += ["preference.p3", *(f"preference.p3.{arm}" for arm in ("sft", "from_base"))]
    names += ["preference.p3.length_controlled", "preference.p3.length_controlled.sft"]
    names += [f"preference.over.{arm}{tail}" for arm in ARMS for tail in ("", ".length_controlled")]
    names += [f"fresh.{arm}.{what}" for arm in ("base", "tuned", *ARMS) for what in ("stops", "refused", "words")]
    names += [f"forgetting.{what}{arm}" for what in ("nll_delta", "kl", "mmlu_delta") for arm in ("", ".sft")]
    names += [f"harmbench.asr.{arm}" for arm in ("base", "tuned", *ARMS)]
    return {name: figure(float(place)) for place, name in enumerate(names)}


def test_every_cell_is_the_figure_of_its_arm() -> None:
    figures = every_figure()
    told = snapshot(figures)
    assert arms_table.head(told)[1:] == (
        "base", "base, pairs shown", "base, principles given", "base, best of n", "SFT", "DPO", "SFT+DPO", "n"
    )  # fmt: skip
    rows = {row[0]: row[1:-1] for row in arms_table.rows(told)}

    def of(*names: str) -> tuple[str, ...]:
        return tuple(f"{figures[name]['value']:g}" if name else NONE for name in names)

    trained = ("preference.p1.sft", "preference.p1.from_base", "preference.p1")
    assert rows["prefers held-out revisions (P1)"] == of("", "", "", "", *trained)
    after = ("preference.p2.after.sft", "preference.p2.after.from_base", "preference.p2.after")
    assert rows["the same a token (P2)"] == of("preference.p2.before", "", "", "", *after)
    judged = ("preference.p3.sft", "preference.p3.from_base", "preference.p3")
    assert rows["preferred to the base's answers (P3)"] == of("", "", "", "", *judged)
    over = tuple(f"preference.over.{arm}" for arm in ARMS)
    assert rows["the tuned model preferred to it"] == of("preference.p3", *over, "")
    ended = [f"fresh.{arm}.stops" for arm in ("base", *ARMS, "tuned")]
    assert rows["stops by itself"] == of(*ended)
    assert rows["HarmBench attack success"] == of(*(f"harmbench.asr.{arm}" for arm in ("base", *ARMS, "tuned")))
    kept = ("forgetting.nll_delta.sft", "", "forgetting.nll_delta")
    assert rows["forgetting: nats a token"] == of("", "", "", "", *kept)
    assert rows["mmlu, points lost or won"] == of(
        "", "", "", "", "forgetting.mmlu_delta.sft", "", "forgetting.mmlu_delta"
    )
    assert "MT-Bench rating" not in rows


def test_base_and_tuned_alone_have_no_such_table_and_dpo_from_the_base_is_called_dpo() -> None:
    alone = {name: value for name, value in every_figure().items() if not name.endswith(ARMS) and "over" not in name}
    alone = {name: value for name, value in alone.items() if not any(f".{arm}." in name for arm in ARMS)}
    assert arms_table.rows(snapshot(alone)) == []
    assert arms_table.head(snapshot(every_figure(), start="base"))[-2] == "DPO"


def test_a_cell_says_its_interval_and_a_row_on_how_many() -> None:
    figures = {"fresh.base.stops": figure(0.25, low=0.1, high=0.5), "fresh.sft.stops": figure(0.5, n=38),
               "fresh.tuned.stops": {**figure(0.75), "value": None}}  # fmt: skip
    assert arms_table.rows(snapshot(figures)) == [("stops by itself", "0.25 [0.1, 0.5]", "0.5", NONE, "38 to 40")]


def test_figures_of_an_arm_stand_in_no_row_of_their_own_in_the_main_table() -> None:
    figures = {name: {**value, "judge": "", "unscored": 0} for name, value in every_figure().items()}
    names = [row[0] for row in main_rows(figures)]
    assert [name for name in names if name.endswith(ARMS) and not name.startswith("preference.over.")] == []
    assert "preference.over.few_shot" in names and names.count("fresh.stops") == 1


def test_p1_is_told_by_pool_and_principle_where_there_are_several() -> None:
    facts = {"by_pool": {"benign": "3 of 4", "redteam": "1 of 2"}, "by_principle": {"kind": "4 of 6"}}
    told = snapshot({"preference.p1": figure(0.7, facts=facts)})
    assert p1_rows(told) == [("pool", "benign", "3 of 4"), ("pool", "redteam", "1 of 2")]
