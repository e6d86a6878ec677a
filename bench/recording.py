"""Records a kill and a resume: the same run made twice, once without a stop, once with `kill -9` and `--resume`.

    python bench/recording.py                  docs/img/resume.cast (asciinema 2) and docs/img/resume.svg

Every line is what the commands printed, in their order; added are what was typed, and the kill. Waits are cut so that
the whole takes `--seconds`, and the working folder's name is left out of the lines. Ends with 1 where the sums differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WIDTH, ROWS = 100, 24  # characters of the shown terminal
LINE, GLYPH, EDGE = 18, 7.83, 14  # pixels: line height, width of a character at 13 px, margin
END = 3.0  # seconds that the last screen stays
KILL_AT = '"stage":"critiques"'  # once a row of this stage is synced
SUMMED = ("records.jsonl", "adapter/adapter_model.safetensors", "eval/measured.json")
Line = tuple[float, str]  # seconds since the start, text without its end


class Recorder:
    """Runs commands in a folder and keeps each line that they print, with its time."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lines, self.began = folder, list[Line](), time.monotonic()

    def show(self, text: str) -> None:
        self.lines.append((time.monotonic() - self.began, text.replace(f"{self.folder}/", "").rstrip()))
        print(self.lines[-1][1], flush=True)

    def run(self, arguments: list[str], typed: str, kill: bool = False) -> None:
        """The runner with these arguments; `kill`: SIGKILL once KILL_AT stands in the run's log."""
        self.show(f"$ {typed}")
        command = [sys.executable, str(ROOT / "runner.py"), *arguments]
        at_once = os.environ | {"PYTHONUNBUFFERED": "1"}  # a line is shown when it is printed, as on a terminal
        with subprocess.Popen(
            command, cwd=self.folder, env=at_once, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            assert process.stdout is not None
            if kill:
                self._kill(process)
            for text in process.stdout:
                self.show(text)
        if kill and process.returncode != -signal.SIGKILL:
            raise SystemExit("the run ended before it could be killed: ask for more items")
        if not kill and process.returncode not in (0, 7):
            raise SystemExit(f"the run ended with {process.returncode}")

    def _kill(self, process: subprocess.Popen[str]) -> None:
        log = self.folder / "runs" / "latest" / "records.jsonl"
        before = os.path.realpath(log)
        while process.poll() is None:
            found = os.path.realpath(log)
            if found != before and Path(found).is_file() and KILL_AT in Path(found).read_text():
                process.kill()
                assert process.stdout is not None
                for text in process.stdout:
                    self.show(text)
                self.show(f"$ kill -9 {process.pid}   # while critiques are written")
                return
            time.sleep(0.01)

    def sums(self, run: Path) -> list[str]:
        """The first digits of each sum, as `sha256sum` would show the whole."""
        found = []
        for name in SUMMED:
            digest = hashlib.sha256((run / name).read_bytes()).hexdigest()
            found.append(digest)
            self.show(f"{digest[:32]}...  runs/{run.name}/{name}")
        return found


def record(folder: Path, arguments: list[str], typed: str) -> tuple[list[Line], bool]:
    """(what was shown, whether the sums agree)."""
    latest, recorder = folder / "runs" / "latest", Recorder(folder)
    recorder.run(arguments, f"{typed}  # once, without a stop")
    whole = latest.resolve()
    recorder.run(arguments, f"{typed}  # the same again", kill=True)
    stopped = latest.resolve()
    resume = ["cai.toml", "--resume", f"runs/{stopped.name}"]
    recorder.run(resume, f"python runner.py --resume runs/{stopped.name}")
    recorder.show("$ sha256sum runs/*/records.jsonl runs/*/adapter/*.safetensors runs/*/eval/measured.json")
    same = recorder.sums(whole) == recorder.sums(stopped)
    return recorder.lines, same


def cut_waits(lines: list[Line], seconds: float) -> list[Line]:
    """The same lines with the longest waits shortened to one common length, so that all takes `seconds` at most."""
    waits = [after - before for (before, _), (after, _) in zip([(0.0, ""), *lines], lines, strict=False)]
    low, high = 0.0, max(waits, default=0.0)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(min(wait, middle) for wait in waits) <= seconds else (low, middle)
    longest, now, found = high if sum(waits) <= seconds else low, 0.0, []
    for wait, (_, text) in zip(waits, lines, strict=True):
        now += min(wait, longest)
        found.append((now, text))
    return found


def folded(lines: list[Line]) -> list[tuple[float, str, bool]]:
    """As a terminal of WIDTH characters shows them, and whether a piece is of a line that was typed."""
    return [
        (at, text[place : place + WIDTH], text.startswith("$ "))
        for at, text in lines
        for place in range(0, max(len(text), 1), WIDTH)
    ]


def cast(lines: list[Line]) -> str:
    """asciinema's file, version 2."""
    header = {"version": 2, "width": WIDTH, "height": ROWS, "title": "Killed, resumed, the same bytes"}
    return (
        "\n".join(json.dumps(part) for part in (header, *([round(at, 3), "o", f"{t}\r\n"] for at, t in lines))) + "\n"
    )


def svg(lines: list[Line]) -> str:
    """One column of lines behind a window, moved up by a line whenever one is printed; no script."""
    pieces = folded(lines)
    total = pieces[-1][0] + END
    width, height = int(WIDTH * GLYPH + 2 * EDGE), ROWS * LINE + 2 * EDGE
    places = {at: (ROWS - count) * LINE for count, (at, *_) in enumerate(pieces, 1)}  # of lines at one time the last
    steps = "".join(f"{100 * at / total:.2f}%{{transform:translateY({y}px)}}" for at, y in places.items())
    last = (ROWS - len(pieces)) * LINE
    rows = "".join(
        f'<text y="{place * LINE + 13}"{TYPED if typed else ""}>{escape(text) or " "}</text>'
        for place, (_, text, typed) in enumerate(pieces)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img"><title>A run is killed with kill -9 and resumed; log and adapter have the same sums as those of a '
        f"run that was never stopped.</title><style>"
        f"text{{font:13px ui-monospace,Menlo,Consolas,monospace;fill:#d6deeb;white-space:pre}}.typed{{fill:#7fdbca}}"
        f"#all{{transform:translateY({last}px);animation:all {total:.1f}s steps(1,end) infinite}}"
        f"@keyframes all{{0%{{transform:translateY({ROWS * LINE}px)}}{steps}100%{{transform:translateY({last}px)}}}}"
        f"@media(prefers-reduced-motion:reduce){{#all{{animation:none}}}}</style>"
        f'<rect width="{width}" height="{height}" rx="8" fill="#10151f"/>'
        f'<svg x="{EDGE}" y="{EDGE}" width="{width - 2 * EDGE}" height="{ROWS * LINE}"><g id="all">{rows}</g></svg>'
        "</svg>\n"
    )


TYPED = ' class="typed"'


def lines_of(text: str) -> list[Line]:
    """The lines of a cast."""
    return [(at, shown.removesuffix("\r\n")) for at, _, shown in map(json.loads, text.splitlines()[1:])]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=ROOT / "docs" / "img", help="folder of resume.cast and resume.svg")
    parser.add_argument("--milestone", default="m0")
    parser.add_argument("--set", action="append", default=[], help="as runner.py takes it")
    parser.add_argument("--seconds", type=float, default=17.0, help="of the recording, its last screen not counted")
    parser.add_argument("--again", action="store_true", help="only draw resume.svg anew from resume.cast")
    options = parser.parse_args()
    if options.again:
        (options.to / "resume.svg").write_text(svg(lines_of((options.to / "resume.cast").read_text())))
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        for file in ("cai.toml", "constitution.yaml"):
            shutil.copy(ROOT / file, folder)
        shutil.copytree(ROOT / "prompts", folder / "prompts")
        sets = [word for text in options.set for word in ("--set", text)]
        arguments = ["cai.toml", "--milestone", options.milestone, *sets]
        lines, same = record(folder, arguments, " ".join(["python runner.py", *arguments]))
    lines = cut_waits(lines, options.seconds)
    options.to.mkdir(parents=True, exist_ok=True)
    (options.to / "resume.cast").write_text(cast(lines))
    (options.to / "resume.svg").write_text(svg(lines))
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
