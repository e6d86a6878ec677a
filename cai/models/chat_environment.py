"""The Jinja environment of chat templates: what transformers gives them, in a sandbox that cannot be filled.

Owns extensions, globals and filters (those of transformers 5: generation, loop controls, tojson, strftime_now), the
choice among named templates, and the bounds: a template is code of the model's publisher, and one that multiplies
strings or loops without end would cost hours or all memory before the first prompt. Renders without transformers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jinja2.parser
    import jinja2.runtime


MOST_TEMPLATE = 1 << 20  # characters; the longest published one has some 30,000
MOST_TEXT = 1 << 24  # characters that one render may make
MOST_STEPS = 1 << 20  # numbers that all `range` of one render may give


class Absurd(ValueError):
    """A template beyond the bounds."""


def render(template: str, messages: Sequence[Mapping[str, str]], **values: object) -> str:
    """The text of the turns. Errors: what the template raises (jinja2.TemplateError), Absurd."""
    if len(template) > MOST_TEMPLATE:
        raise Absurd(f"the chat template has {len(template):,} characters, at most {MOST_TEMPLATE:,}")
    values = {"strftime_now": datetime.now().strftime} | values | {"range": _counted_range()}
    parts, length = [], 0
    for part in _environment().from_string(template).generate(messages=messages, **values):
        length += len(part)
        if length > MOST_TEXT:
            raise Absurd(f"the chat template writes more than {MOST_TEXT:,} characters")
        parts.append(part)
    return "".join(parts)


def choose(template: object) -> str:
    """The template of plain turns: of several named ones "default", as transformers does; "" where there is none."""
    if isinstance(template, list):
        template = {row.get("name"): row.get("template") for row in template if isinstance(row, Mapping)}
    if isinstance(template, Mapping):
        template = template.get("default")
    return template if isinstance(template, str) else ""


def _counted_range() -> Callable[..., range]:
    given = 0

    def counted(*bounds: int) -> range:
        nonlocal given
        found = range(*bounds)
        given += len(found)
        if given > MOST_STEPS:
            raise Absurd(f"the chat template counts beyond {MOST_STEPS:,}")
        return found

    return counted


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the assistant's text for training masks; the text itself is unchanged."""

        tags = {"generation"}  # noqa: RUF012  (jinja2's own declaration)

        def parse(self, parser: jinja2.parser.Parser) -> nodes.Node | list[nodes.Node]:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    class Bounded(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
            for text, count in ((left, right), (right, left)):
                repeats = operator == "*" and isinstance(text, str | list | tuple) and isinstance(count, int)
                if repeats and len(text) * count > MOST_TEXT:
                    raise Absurd(f"the chat template makes a text of more than {MOST_TEXT:,} characters")
            if operator == "**" and isinstance(right, int | float) and abs(right) > 64:
                raise Absurd("the chat template raises to a power above 64")
            return super().call_binop(context, operator, left, right)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: object, ensure_ascii: bool = False, **how: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **how)

    environment = Bounded(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.globals["raise_exception"] = refuse
    environment.filters["tojson"] = tojson
    return environment
