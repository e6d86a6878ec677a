"""The bars that bench/gpu_session.sh measures, from its session.json: one line a bar, what was measured beside it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

FAMILIES = (("qwen3", "Qwen3-14B shapes", 8.0), ("olmo2", "OLMo-2-32B shapes", 8.0), ("guard", "a guard of 4B", 4.0))


def ratio(over: Any, under: Any) -> float | None:
    return over / under if over and under else None


def bars(found: dict[str, Any]) -> list[tuple[str, float | None, str, float, str]]:
    """(name, measured or None, "least" or "most", bar, what else)."""

    def of(step: str) -> dict[str, Any]:
        return found.get(step, {}).get("result") or {}

    def tokens(step: str, stage: str = "") -> float | None:
        row = next(iter(of(step).get("rows", [])), {})
        return row.get("stages", {}).get(stage, {}).get("tokens_per_s") if stage else row.get("tokens_per_s")

    pair = {kind: of(f"dpo-{kind}").get("ours", {}) for kind in ("llama31", "qwen2")}
    seconds = {kind: row.get("seconds_a_pair") for kind, row in pair.items()}
    stages = {
        s: ratio(tokens("int8", s), tokens("exact", s)) for s in "instructions answers critiques revisions".split()
    }
    by_stage = ", ".join(f"{name} {value:.2f}" for name, value in stages.items() if value)
    shown = {kind: f"{value:.4f} s" if value else "not run" for kind, value in seconds.items()}
    saving = pair["llama31"].get("saving_share")
    return [
        *(
            (f"{shown_as}, native / static", of(step).get("native_over_static"), "least", bar, layers(of(step)))
            for step, shown_as, bar in FAMILIES
        ),
        ("int8 / exact", ratio(tokens("int8"), tokens("exact")), "least", 1.3,
         f"{tokens('exact')} and {tokens('int8')} useful tokens/s; {by_stage}"),
        ("DPO, seconds a pair, Llama 3.1 / Qwen2", ratio(seconds["llama31"], seconds["qwen2"]), "most", 1.1,
         f"{shown['llama31']} and {shown['qwen2']} at {pair['qwen2'].get('layers')} layers"),
        ("saving, share of ten minutes at all layers", saving, "most", 0.03,
         f"a save took {pair['llama31'].get('save_seconds')} s"),
    ]  # fmt: skip


def layers(result: dict[str, Any]) -> str:
    return "{} of {} layers".format(*result["layers"]) if "layers" in result else "not run"


def main() -> None:
    found = json.loads(Path(sys.argv[1]).read_text())
    for name, step in found.items():
        counts = f" {step['result']}" if name == "tests" else ""
        print(f"{name}: exit {step['rc']}, {step['seconds']} s;{counts} before: {step['card_before']}")
    for name, value, kind, bar, more in bars(found):
        if value is None:
            print(f"{name}: no figure ({more})")
            continue
        met = value >= bar if kind == "least" else value <= bar
        sign = ">=" if kind == "least" else "<="
        print(f"{name}: {value:.3g} (bar {sign} {bar:g}: {'met' if met else 'MISSED'}); {more}")


if __name__ == "__main__":
    main()
