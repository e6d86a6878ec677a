"""Gates: measured values and the recipe's criteria -> PASS, FAIL, UNDERPOWERED or UNMEASURED. Pure.

Owns the decision and its wording; owns no measuring and no exit code. Invariant: a gate passes only on a value that was
measured on enough items, with few unscored, and that beats every control it names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from cai.metrics.figure import Figure
from cai.recipe.settings_evaluation import GateSpec
from cai.store.jsonl import JsonObject, Row

Status = Literal["PASS", "FAIL", "UNDERPOWERED", "UNMEASURED"]
SIGNS = {"at_least": ">=", "at_most": "<=", "above": ">", "below": "<"}


@dataclass(frozen=True)
class Verdict:
    """What a gate decided, and on what. `reason` is one sentence."""

    gate: GateSpec
    status: Status
    measured: Figure | None
    reason: str

    @property
    def blocks(self) -> bool:
        """The next milestone waits: anything but PASS, unless the criterion is advisory."""
        return self.status != "PASS" and not self.gate.advisory

    @property
    def line(self) -> str:
        gate, value = self.gate, self.measured.text if self.measured else "not measured"
        side = "" if gate.bound == "point" else f" ({gate.bound} bound)"
        wanted = f"{SIGNS[gate.comparison]} {gate.threshold:g}{side}"
        return f"{self.status:<12} {gate.metric} {value}, wanted {wanted}: {self.reason}"

    def as_dict(self) -> Row:
        return {
            "metric": self.gate.metric,
            "status": self.status,
            "reason": self.reason,
            "criterion": self.gate.model_dump(mode="json"),
            "measured": self.measured.as_dict() if self.measured else None,
        }


def meets(value: float, gate: GateSpec) -> bool:
    t = gate.threshold
    return {"at_least": value >= t, "at_most": value <= t, "above": value > t, "below": value < t}[gate.comparison]


def decide(measured: Figure | None, gate: GateSpec, controls: Mapping[str, Figure] | None = None) -> Verdict:
    """One gate. `controls`: every other measured value, by metric, for the names in `gate.beats`."""
    if measured is None:
        return Verdict(gate, "UNMEASURED", None, "nothing was measured")
    status, reason = _decide(measured, gate, controls or {})
    return Verdict(gate, status, measured, reason)


def _decide(measured: Figure, gate: GateSpec, controls: Mapping[str, Figure]) -> tuple[Status, str]:
    value = measured.value
    if (missing := _unmeasured(measured, gate)) or value is None:
        return "UNMEASURED", missing
    if measured.facts.get("trial"):
        return "UNDERPOWERED", f"a trial on a part of the rows (n={measured.n})"
    if not math.isfinite(value):
        return "FAIL", f"the value is {value}"
    if measured.n < gate.minimum_n:
        return "UNDERPOWERED", f"n={measured.n} is below {gate.minimum_n}"
    if (possible := measured.facts.get("of")) and measured.n < gate.minimum_share * possible:
        return "UNDERPOWERED", f"n={measured.n} is below {gate.minimum_share:.0%} of {possible}"
    if not meets(value, gate):
        if measured.n < gate.decides_from:
            why = f"the value misses it on n={measured.n}, and a miss decides from {gate.decides_from} on"
            return "UNDERPOWERED", why
        return "FAIL", "the value misses the criterion"
    if (beaten := _beaten_by_control(value, gate, controls)) is not None:
        return beaten
    if gate.bound == "point":
        return "PASS", "met"
    bound = measured.low if gate.bound == "lower" else measured.high
    if bound is None or not math.isfinite(bound):
        return "UNDERPOWERED", "there is no interval to decide by"
    if meets(bound, gate):
        return "PASS", f"met by the {gate.bound} bound"
    return "UNDERPOWERED", f"the value meets it, its {gate.bound} bound {bound:.3g} does not"


def _unmeasured(measured: Figure, gate: GateSpec) -> str:
    """Why a figure, the gate's own or a control's, decides nothing; "" if it does."""
    if measured.value is None or measured.n == 0:
        return measured.note or "no unit was scored"
    if measured.facts.get("stand_in"):
        return "the stand-in judged it, which measures nothing"
    tried = measured.n + measured.unscored
    if measured.unscored > gate.max_unscored * tried:
        return f"{measured.unscored} of {tried} unscored, more than {gate.max_unscored:.0%}"
    return ""


def _beaten_by_control(value: float, gate: GateSpec, controls: Mapping[str, Figure]) -> tuple[Status, str] | None:
    """FAIL where a control does as well, UNMEASURED where a named control has no value."""
    rises = gate.comparison in ("at_least", "above")
    for name in gate.beats:
        control = controls.get(name)
        if control is None or control.value is None or not math.isfinite(control.value):
            return "UNMEASURED", f"its control {name} was not measured"
        if missing := _unmeasured(control, gate):
            return "UNMEASURED", f"its control {name}: {missing}"
        ahead = value - control.value if rises else control.value - value
        if ahead < gate.beats_by - 1e-9 or ahead <= 0.0:
            return "FAIL", f"the control {name} has {control.value:.3g}: ahead by {ahead:.3g}, wanted {gate.beats_by:g}"
    return None


def decide_all(measured: Mapping[str, Figure], gates: Sequence[GateSpec]) -> list[Verdict]:
    """Every criterion of a milestone, in the recipe's order."""
    return [decide(measured.get(gate.metric), gate, measured) for gate in gates]


def passed(verdicts: Sequence[Verdict]) -> bool:
    """All criteria that count are PASS. No criterion at all passes nothing and blocks nothing."""
    return not any(verdict.blocks for verdict in verdicts)


def whole_verdicts(content: JsonObject) -> list[Row]:
    """The verdicts of a stored gates.json, as `as_dict` wrote them; what was damaged since is left out."""
    rows = content.get("verdicts")
    return [row for row in rows if _is_whole(row)] if isinstance(rows, list) else []


def _is_whole(row: object) -> bool:
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in ("metric", "status", "reason")):
        return False
    criterion = row.get("criterion")
    return isinstance(criterion, dict) and any(isinstance(criterion.get(name), int | float) for name in SIGNS)
