"""The terminal and the signals: what a person sees, and how a person (or a spot market) stops a run.

Owns `printable` (model text must not steer a terminal), streams that outlive their terminal, and the stop switch. Does
not know what is being run. Invariants: no control in model text reaches a terminal as one; no dead terminal ends a run;
the first SIGINT or SIGTERM asks for a stop, the second ends the process at once, SIGHUP does nothing.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import signal
import string
import sys
import textwrap
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

# C0 without tab and newline, DEL, C1, bidi marks and embeddings and isolates, line and paragraph separator,
# zero-width and byte-order marks, language tags (invisible text), lone surrogates.
UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028\u2029\u202a-\u202e\u2060-\u2069\ufeff\ud800-\udfff"
    "\ufff9-\ufffb\U000e0000-\U000e007f]"
)
SAFE = frozenset(string.ascii_letters + string.digits + string.punctuation + " ") - set("'\\")  # within $'...'


def printable(text: str, *, one_line: bool = False) -> str:
    """`text` with every control character spelled out (`\\x1b`, `\\u202e`), so that a terminal or log shows it inert.

    Tabs and newlines stay, unless `one_line`: then they are spelled out too, so one row cannot pose as two.
    """
    shown = UNSAFE.sub(_spell, text)
    return shown.replace("\n", "\\n").replace("\t", "\\t") if one_line else shown


def _spell(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def word(text: str | Path) -> str:
    """One word of a printed command, as a shell reads it back; a path with a dash in front is no flag.

    What a line of this output cannot show, bytes that are no text and letters that its encoding lacks (`LC_ALL=C`), is
    spelled as `$'caf\\xc3\\xa9'`, which bash, zsh and busybox take for these very bytes.
    """
    plain = f"./{text}" if isinstance(text, Path) and str(text).startswith("-") else str(text)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    shown = plain.encode(encoding, "replace").decode(encoding, "replace") == plain
    if shown and not UNSAFE.search(plain) and "\n" not in plain and "\t" not in plain:
        return shlex.quote(plain)
    data = plain.encode("utf-8", "surrogateescape")
    return f"$'{''.join(chr(byte) if chr(byte) in SAFE else f'{chr(92)}x{byte:02x}' for byte in data)}'"


class LastingStream(io.TextIOBase):
    """A text stream that swallows the death of its terminal or pipe: from then on it writes to nowhere."""

    def __init__(self, inner: TextIO) -> None:
        self._inner = inner
        self.dead = False

    def write(self, text: str) -> int:
        if not self.dead:
            try:
                self._inner.write(text)
                if "\n" in text or "\r" in text:
                    self._inner.flush()
            except (OSError, ValueError):  # EPIPE (| head), EIO (terminal closed), ENOSPC (redirected), closed file
                self._bury()
        return len(text)

    def flush(self) -> None:
        if not self.dead:
            try:
                self._inner.flush()
            except (OSError, ValueError):
                self._bury()

    def _bury(self) -> None:
        """Point the descriptor at /dev/null, so that libraries' own writes and the exit's flush succeed as well."""
        self.dead = True
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._inner.fileno())
            os.close(nowhere)

    def isatty(self) -> bool:
        try:
            return not self.dead and self._inner.isatty()
        except ValueError:
            return False

    def fileno(self) -> int:
        return self._inner.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._inner.encoding

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        return self._inner.errors

    @property
    def buffer(self) -> Any:
        return getattr(self._inner, "buffer", None)


def last_through_hangups() -> None:
    """Make stdout and stderr outlive their terminal, and never fail on a character they cannot encode."""
    _open_descriptors()
    for fd, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:  # closed when the program was started
            stream = os.fdopen(fd, "w", encoding="utf-8", closefd=False)
        if isinstance(stream, LastingStream):
            continue
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, LastingStream(stream))
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)


def _open_descriptors() -> None:
    """Point descriptors that were closed at the start (`2>&-`) at /dev/null: a log opened next would be stderr."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest number, which is this one


def number(value: object, digits: int = 3) -> str:
    """A float with `digits` significant digits, an int with thousands separators, None as a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (abs(value) >= 1000 and float(value).is_integer()):
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value + 0.0:.{digits}g}"  # + 0.0: no "-0"


def interval(low: float | None, high: float | None, shown: Callable[[float], str] = number) -> str:
    """` [0.1, 0.3]` behind a value; nothing where an end is not known."""
    return "" if low is None or high is None else f" [{shown(low)}, {shown(high)}]"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A line a row, its columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


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


def stage_name(stage: str, round_: int, per_round: bool = False) -> str:
    """A stage's round for the eye, counted from one. `per_round`: it is one of a principle, else a try."""
    if per_round:
        return f"{stage}, round {round_ + 1}"
    return f"{stage}, try {round_ + 1}" if round_ else stage


COLOURS = {  # SGR codes of the words that decide: good, bad, neither
    "PASS": "32",
    "FAIL": "31",
    "ALARM": "31",
    "UNDERPOWERED": "33",
    "UNMEASURED": "33",
    "ADVISORY": "33",
    "WARNING": "33",
    "not passed": "31",
}
WORDS = re.compile(rf"\b({'|'.join(COLOURS)})\b")
NARROW = 100  # columns below which rows with columns are folded, too
LABEL = re.compile(r"(\s*\S[^:]{0,11} {2,}|\s*)(?=\S)")


def painted(text: str, colours: bool) -> str:
    """`text` with the deciding words in colour. Only ever after `printable`: no escape of the text's own is left."""
    return WORDS.sub(lambda word: f"\x1b[{COLOURS[word[1]]}m{word[1]}\x1b[0m", text) if colours else text


def coloured(stream: Any) -> bool:
    """Whether this stream is a terminal that wants colour (no-color.org: NO_COLOR set to anything says no)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def folded(text: str, columns: int) -> str:
    """Lines that are longer than the terminal continue under their text, not under their label.

    A line with a command stays whole, and in a wide terminal a row with columns: the terminal breaks it softly, and it
    can still be copied as one.
    """
    found = []
    for line in text.split("\n"):
        label = LABEL.match(line)
        start = len(label[0]) if label else 0
        table = columns >= NARROW and "  " in line[start:]
        if len(line) <= columns or table or "runner.py" in line:
            found.append(line)
            continue
        indent = min(start, columns // 2)
        found += textwrap.wrap(
            line, columns, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
        )
    return "\n".join(found)


def columns() -> int:
    """Of the terminal that stdout is; 0 where it is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 0


def say(line: str) -> None:
    """A line on stdout; names of models, judges and files come from others, so none of it acts on a terminal."""
    print(for_stream(printable(line), sys.stdout, fold=True), flush=True)


def for_stream(text: str, stream: Any, *, fold: bool = False) -> str:
    """`text` (printable already) as a terminal shows it best; unchanged for a file or a pipe."""
    if not stream.isatty():
        return text
    return painted(folded(text, shutil.get_terminal_size().columns) if fold else text, coloured(stream))
