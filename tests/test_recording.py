"""The recording of a kill and a resume: its waits, its two files, and the whole of it on the fake model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import recording  # noqa: E402

CAST = ROOT / "docs" / "img" / "resume.cast"
LINES = [(0.0, "$ one"), (4.0, "two"), (4.2, "x" * 250), (104.2, "$ <last> & done")]


def test_long_waits_become_one_length_and_short_ones_stay() -> None:
    found = recording.cut_waits(LINES, 4.2)
    assert [round(at, 3) for at, _ in found] == [0.0, 2.0, 2.2, 4.2]
    assert [text for _, text in found] == [text for _, text in LINES]
    assert recording.cut_waits(LINES, 200.0) == LINES


def test_the_cast_is_asciinemas_second_version() -> None:
    head, *rows = map(json.loads, recording.cast(LINES).splitlines())
    assert head["version"] == 2 and head["width"] == recording.WIDTH
    assert rows == [[at, "o", f"{text}\r\n"] for at, text in LINES]


def test_the_picture_is_svg_with_every_line_and_no_script() -> None:
    text = recording.svg(LINES)
    root = ElementTree.fromstring(text)
    shown = ["".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert shown == ["$ one", "two", "x" * 100, "x" * 100, "x" * 50, "$ <last> & done"]
    typed = [node.get("class") for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert typed == ["typed", None, None, None, None, "typed"]
    assert "<script" not in text and "href" not in text and "prefers-reduced-motion" in text


def test_the_committed_recording_ends_with_equal_sums_and_takes_twenty_seconds() -> None:
    _, *rows = map(json.loads, CAST.read_text().splitlines())
    text = "".join(row[2] for row in rows)
    sums = re.findall(r"^([0-9a-f]{32})\.\.\.  runs/(\S+?)/(\S+)\r$", text, re.MULTILINE)
    assert [name for _, _, name in sums] == list(recording.SUMMED) * 2
    asked = sums[0][1], sums[len(recording.SUMMED)][1]
    first, second = ({name: digest for digest, run, name in sums if run == one} for one in asked)
    assert first == second and asked[0] != asked[1]
    assert (ROOT / "docs/img/resume.svg").read_text() == recording.svg(recording.lines_of(CAST.read_text()))
    assert text.count("critic's exam") > 2 and text.count("measuring: ") > 10 and "--set" not in text, "with evaluation"
    first, second = (" ".join(part.split()) for part in text.split("$ kill -9", 1))
    assert "measuring: " in first and "measuring: " in second and "--resume" in second
    assert "$ kill -9" in text and "embedded SmolLM2" in text and rows[-1][0] + recording.END <= 20.5
    assert all((ROOT / "docs/img" / name).stat().st_size < 150_000 for name in ("resume.cast", "resume.svg"))


@pytest.mark.slow
def test_a_kill_and_a_resume_are_recorded_on_the_fake_model(tmp_path: Path) -> None:
    sets = "model.backend=fake model.name=fake items=6 evaluation.critic_items=4".split()
    words = [word for text in sets for word in ("--set", text)]
    command = [sys.executable, str(ROOT / "bench/recording.py"), "--to", str(tmp_path), "--milestone", "m1", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    assert "kill -9" in (tmp_path / "resume.cast").read_text() and (tmp_path / "resume.svg").is_file()
    assert "/tmp" not in (tmp_path / "resume.cast").read_text()
