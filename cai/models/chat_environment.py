"""The Jinja environment of chat templates: what transformers gives them, in a sandbox that cannot be filled.

Owns extensions, globals and filters (those of transformers 5: generation, loop controls, tojson, strftime_now), the
choice among named templates, and the bounds: a template is code of the model's publisher, and one that multiplies
strings or loops without end would cost hours or all memory before the first prompt. Renders without transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache, wraps
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jinja2.parser
    import jinja2.runtime


MOST_TEMPLATE = 1 << 20  # characters; the longest published one has some 30,000
MOST_TEXT = 1 << 24  # characters that one render may make
MOST_STEPS = 1 << 20  # numbers that all `range` of one render may give, and rounds of all its loops
MOST_BITS = 1 << 16  # of a number
WIDTH = re.compile(r"\d{7,}")  # in what a text is formatted with
STEPS = "_steps"  # the name under which a template's loops find their counter


SPENT: ContextVar[int] = ContextVar("SPENT", default=0)  # rounds of one render's loops and filters


class Absurd(ValueError):
    """A template beyond the bounds."""


def render(template: str, messages: Sequence[Mapping[str, str]], **values: object) -> str:
    """The text of the turns. Errors: what the template raises (jinja2.TemplateError), Absurd."""
    if len(template) > MOST_TEMPLATE:
        raise Absurd(f"the chat template has {len(template):,} characters, at most {MOST_TEMPLATE:,}")
    SPENT.set(0)
    values = {"strftime_now": datetime.now().strftime} | values | {"range": _counted_range(), STEPS: _counted_steps}
    made = _environment().from_string(template)
    made.root_render_func.__globals__.update(dict.fromkeys(("str_join", "markup_join"), _joined))  # what `~` calls
    parts, length = [], 0
    for part in made.generate(messages=messages, **values):
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


def _counted_steps(values: Iterable[object]) -> Iterator[object]:
    """Around what each `for` goes over: loops within loops over one list count nothing by `range`."""
    for value in values:
        _spend(1)
        yield value


def _spend(steps: int) -> None:
    SPENT.set(spent := SPENT.get() + steps)
    if spent > MOST_STEPS:
        raise Absurd(f"the chat template loops more than {MOST_STEPS:,} times")


def _within(text: Any) -> Any:
    """The value, unless it is a text beyond the bound: one that doubles itself in a loop fills any memory."""
    if isinstance(text, int) and text.bit_length() > MOST_BITS:
        raise Absurd(f"the chat template makes a number of more than {MOST_BITS:,} bits")
    if isinstance(text, str | list | tuple) and len(text) > MOST_TEXT:
        raise Absurd(f"the chat template makes a text of more than {MOST_TEXT:,} characters")
    return text


def _refuse_growth(name: str, *values: Any) -> None:
    """Absurd, before it is made: a width, a count, a join or a replacement beyond the bound."""
    if any(isinstance(value, int) and abs(value) > MOST_TEXT for value in values):
        raise Absurd(f"the chat template asks for more than {MOST_TEXT:,} of something")
    texts = [value for value in values if isinstance(value, str)]
    if name in ("format", "%") and any(map(WIDTH.search, texts)):
        raise Absurd(f"the chat template formats to more than {MOST_TEXT:,} characters")
    size = 0
    if name == "replace" and len(texts) > 2:
        size = texts[0].count(texts[1]) * len(texts[2])
    if name == "indent" and texts:
        width = next((value for value in values[1:] if isinstance(value, int | str)), 4)
        size = (texts[0].count("\n") + 1) * (width if isinstance(width, int) else len(width))
    for value in values if name == "sum" else ():  # of lists: each is copied once more
        if isinstance(value, list | tuple):
            size += len(value) * sum(len(part) for part in value if isinstance(part, list | tuple))
    for value in values if name == "join" else ():
        if isinstance(value, list | tuple):
            size += sum(len(part) for part in value if isinstance(part, str)) + len(value) * len(max(texts or [""]))
    if size > MOST_TEXT:
        raise Absurd(f"the chat template makes a text of more than {MOST_TEXT:,} characters")


def _bounded(name: str, made: Callable[..., Any]) -> Callable[..., Any]:
    """A filter within the bounds; `wraps` keeps what jinja hands to it first."""

    @wraps(made)
    def bounded(*args: Any, **named: Any) -> Any:
        _refuse_growth(name, *args, *named.values())
        found = _within(made(*args, **named))
        _spend(sum(len(value) for value in (*args, found) if isinstance(value, list | tuple)))
        return found

    return bounded


def _joined(values: Iterable[object]) -> str:
    return str(_within("".join(map(str, values))))


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
        intercepted_binops = frozenset({"*", "**", "+", "%"})

        def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
            whole = super()._parse(source, name, filename)
            for loop in whole.find_all(nodes.For):
                loop.iter = nodes.Call(nodes.Name(STEPS, "load"), [loop.iter], [], None, None, lineno=loop.lineno)
            return whole

        def call(self, context: jinja2.runtime.Context, thing: Any, *args: Any, **named: Any) -> Any:
            own = getattr(getattr(thing, "__wrapped__", thing), "__self__", None)  # a text's own join, zfill, format
            _refuse_growth(getattr(thing, "__name__", ""), *([own] if isinstance(own, str) else []), *args)
            return _within(super().call(context, thing, *args, **named))

        def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
            for text, count in ((left, right), (right, left)):
                repeats = operator == "*" and isinstance(text, str | list | tuple) and isinstance(count, int)
                if repeats and len(text) * count > MOST_TEXT:
                    raise Absurd(f"the chat template makes a text of more than {MOST_TEXT:,} characters")
            if operator == "**" and isinstance(right, int | float) and abs(right) > 64:
                raise Absurd("the chat template raises to a power above 64")
            if operator == "%":
                _refuse_growth("%", left)
            return _within(super().call_binop(context, operator, left, right))

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: object, ensure_ascii: bool = False, **how: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **how)

    environment = Bounded(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.globals.pop("lipsum")
    environment.globals["raise_exception"] = refuse
    environment.filters["tojson"] = tojson
    environment.filters = {name: _bounded(name, made) for name, made in environment.filters.items()}
    return environment
