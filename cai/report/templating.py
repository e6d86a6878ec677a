"""Templates to text: the one jinja2 environment of the report, the cards and the review page.

Owns escaping: HTML is escaped always (`autoescape=True`, never `|safe` on text from a run), an unknown name is an
error. Markdown templates turn escaping off for themselves and pass model text through `fenced` or `inline`.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai.terminal import printable

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"


@lru_cache(maxsize=1)
def environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # not needed to print a duration

    found = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found.filters.update(
        fenced=fenced,
        inline=inline,
        number=number,
        duration=duration,
        usd=usd,
        percent=percent,
        shown=printable,
    )
    return found


def fenced(text: str) -> str:
    """Model text as a Markdown block that it cannot leave: a fence longer than any run of backticks in it."""
    text = printable(text)
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def inline(text: Any) -> str:
    """One line of Markdown table or list that text cannot break."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", printable(str(text), one_line=True))


def number(value: Any, digits: int = 3) -> str:
    """A float with `digits` significant digits, an int with thousands separators, None as a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (abs(value) >= 1000 and float(value).is_integer()):
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value + 0.0:.{digits}g}"  # + 0.0: no "-0"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def usd(value: float | None) -> str:
    """Dollars; below a cent as `< $0.01`, so that a price is never shown as nothing."""
    if value is None:
        return "–"
    return "< $0.01" if 0 < value < 0.01 else f"${value:,.2f}"


def usd_fine(value: float | None) -> str:
    """Dollars with three significant digits below one: a pair costs cents."""
    if value is None or value >= 1:
        return usd(value)
    return "< $0.0001" if 0 < value < 0.0001 else f"${value:.3g}"


def duration(seconds: float | None) -> str:
    """`45 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds is None:
        return "–"
    if 0 < seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s" if rest and minutes < 10 else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def duration_range(low: float, high: float) -> str:
    """`3 min to 5 min`; one time where both read the same, `up to 40 s` where the lower end is none."""
    first, last = duration(low), duration(high)
    if first == last:
        return last
    return f"{first} to {last}" if low >= 1 else f"up to {last}"


def stage_name(stage: str, round_: int) -> str:
    """A stage's round for the eye, counted from one. An instruction's rounds are tries, a critique's its principles."""
    if stage in ("critiques", "revisions"):
        return f"{stage}, round {round_ + 1}"
    return f"{stage}, try {round_ + 1}" if round_ else stage
