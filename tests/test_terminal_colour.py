"""Colour and width: on a terminal alone, never against NO_COLOR, never in a file, never inside a command."""

from __future__ import annotations

import io

import pytest

from cai import terminal
from cai.terminal import folded, for_stream, painted, printable


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def wants_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")


def test_verdicts_are_coloured_on_a_terminal_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "gate PASS a: met; gate FAIL b; WARNING"
    assert for_stream(line, Terminal()).count("\x1b[0m") == 3
    assert "\x1b[32mPASS\x1b[0m" in for_stream(line, Terminal())
    assert "\x1b[31mFAIL\x1b[0m" in for_stream(line, Terminal())
    assert for_stream(line, io.StringIO()) == line
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        monkeypatch.setenv(name, value)
        assert for_stream(line, Terminal()) == line
        monkeypatch.delenv(name)


def test_say_paints_what_it_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr("sys.stdout", stream)
    terminal.say("gate PASS\x1b[31m")
    assert stream.getvalue() == "gate \x1b[32mPASS\x1b[0m\\x1b[31m\n"


def test_words_that_only_contain_a_verdict_stay_plain() -> None:
    assert painted("PASSWORD FAILED", True) == "PASSWORD FAILED"


def test_a_wide_terminal_breaks_prose_between_words_and_leaves_rows_with_columns() -> None:
    prose = "65 figures are equal: " + ", ".join(f"critiques.figure{n} 0.{n}" for n in range(12))
    assert len(lines := folded(prose, 100).split("\n")) > 1 and all(len(line) <= 100 for line in lines)
    made = "just made    " + "answers, item 39: " + "a word of it " * 12
    first, *others = folded(made, 100).split("\n")
    assert first.startswith("just made    answers") and all(line[:13].isspace() and line[13] != " " for line in others)
    row = "dpo.loss  " + "0.693 [0.68, 0.705] (n=10)  " * 6 + "end"
    assert folded(row, 100) == row


def test_a_narrow_terminal_folds_under_the_text_and_keeps_commands_whole() -> None:
    row = "spent        " + "12 min 5 s in 3 attempts, $0.24, $0.012 a pair; limit $5.00 and 2 h"
    shown = folded(row, 60).split("\n")
    assert len(shown) == 2 and all(len(line) <= 60 for line in shown) and shown[1].startswith(" " * 13)
    assert " ".join(line.strip() for line in shown).split() == row.split()
    command = "go on        python runner.py runs/20261128-220352-m1-900651/recipe.toml --resume runs/x"
    assert folded(command, 60) == command
    assert folded(row, 120) == row
    block = "  differs    " + ", ".join(f"some.key={n}" for n in range(9))
    assert all(line.startswith(" " * 13) for line in folded(block, 60).split("\n")[1:])
    assert printable(folded(row, 60)) == folded(row, 60)
