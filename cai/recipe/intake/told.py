"""What is said about a user's instructions when a run starts and by --dry-run: counts, pools, first lines, shortage.

Owns these sentences. Pure: strings in a list.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from cai.metrics.scripts import language_note
from cai.recipe.intake.instructionfile import Intake
from cai.store.jsonl import JsonObject
from cai.terminal import printable

SHOWN = 3
WIDTH = 90


def about(intake: Intake, name: str, *, wanted: int, heldout: int, pool: str) -> list[str]:
    """Lines of what was found in the file. `wanted`: training items; `pool`: instructions.pool."""
    count, pools = len(intake.requests), intake.by_pool
    counts = ", ".join(f"{n:,} {kind}" for kind, n in pools.items())
    lines = [f"instructions.file: {name}: {count:,} requests, {counts} ({intake.how})"]
    for row in intake.requests[:SHOWN]:
        text = printable(row.text, one_line=True)
        lines.append(f"  line {row.line}, {row.pool}: {text[:WIDTH]}{'...' if len(text) > WIDTH else ''}")
    lines += [f"  {printable(note, one_line=True)}" for note in intake.notes]
    if language := language_note(row.text for row in intake.requests):
        lines.append(f"  {language}")
    if not pool and not intake.pooled:
        lines.append(
            '  no row names a pool, so all are benign; a file of red-team requests: instructions.pool = "redteam"'
        )
    if count < wanted + heldout:
        held = f" and {heldout:,} held out" if heldout else ""
        lines.append(
            f"  short by {wanted + heldout - count:,}: {wanted:,} items{held} want a request each. "
            "Add lines, or lower items"
        )
    return lines


def pool_cure(reasons: Mapping[str, int], rows: Iterable[JsonObject], from_file: bool) -> str:
    """What cures a run whose pairs were refused because benign requests were declined; "" if that is not what led."""
    if not from_file or not reasons or max(reasons, key=lambda name: reasons[name]) != "refusal_of_benign":
        return ""
    pools = {row["item"]: row.get("pool") for row in rows if row["status"] == "ok"}
    benign = sum(pool == "benign" for pool in pools.values())
    return (
        f'{benign} of {len(pools)} requests are in the pool "benign", where a revision that declines is refused. '
        'If they are red-team requests, say so: instructions.pool = "redteam" (or "pool" in a row), in a new run. Else '
    )
