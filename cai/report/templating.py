"""Templates to text: the one jinja2 environment of the report, the cards and the review page.

Owns escaping: HTML is escaped always (`autoescape=True`, never `|safe` on text from a run), an unknown name is an
error. Markdown templates turn escaping off for themselves and pass model text through `fenced` or `inline`.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from cai.store.files import write_atomic
from cai.store.jsonl import JsonObject
from cai.terminal import duration, number, percent, printable, usd

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
        finalize=_inert,
    )
    found.filters.update(
        fenced=fenced,
        inline=inline,
        code=code,
        number=number,
        duration=duration,
        usd=usd,
        percent=percent,
        shown=printable,
    )
    return found


def rendered(template: str, values: JsonObject) -> str:
    """The text of a template."""
    return environment().get_template(template).render(values)


def write_pages(folder: Path, name: str, template: str, data: object, shown: JsonObject) -> Path:
    """NAME.json of `data`, NAME.md and NAME.html of `shown` by the templates of that name; gives the page."""
    write_atomic(folder / f"{name}.json", orjson.dumps(data, option=orjson.OPT_INDENT_2) + b"\n")
    for kind in ("md", "html"):
        write_atomic(folder / f"{name}.{kind}", rendered(f"{template}.{kind}.j2", shown).encode())
    return folder / f"{name}.html"


def _inert(value: object) -> Any:
    """Whatever a template prints, names of models and judges too: no control or bidi mark gets into a page raw."""
    return printable(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def code(text: object) -> str:
    """Inline code of Markdown that no backtick in the text can leave."""
    shown = printable(str(text), one_line=True)
    longest = max((len(run) for run in re.findall(r"`+", shown)), default=0)
    fence, pad = "`" * (longest + 1), " " if longest else ""
    return f"{fence}{pad}{shown}{pad}{fence}"


def fenced(text: str) -> str:
    """Model text as a Markdown block that it cannot leave: a fence longer than any run of backticks in it."""
    text = printable(text)
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def inline(text: object) -> str:
    """One line of Markdown table or list that text cannot break."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", printable(str(text), one_line=True))
