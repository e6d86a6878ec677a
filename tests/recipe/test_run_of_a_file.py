"""Whole runs over a user's own files: what is said, pools, files read once, and a file that grew."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from support.runs import FAKE, PAPERS_WAY, ROOT, read_jsonl

import runner
from cai import errors
from cai.commands import cli
from cai.inputs import read_inputs

Runner = Callable[..., tuple[int, Path]]
ASKED = [
    "Why is the sea salty?",
    "How do bees find their way home?",
    "Write a poem about a lost glove.",
    "Which screws hold a heavy mirror?",
    "Name three rivers of Spain.",
    "Explain compound interest to a child.",
]
MINE = ("--milestone", "m1", "--set", "instructions.file=mine.txt")


def instructions(run: Path) -> list[str]:
    return [row["text"] for row in read_jsonl(run / "records.jsonl") if row["stage"] == "instructions"]


def write(project: Path, lines: list[str]) -> Path:
    (project / "mine.txt").write_text("\n".join(lines) + "\n")
    return project / "mine.txt"


def test_a_run_and_a_dry_run_begin_with_counts_pools_first_lines_and_what_is_short(
    run_fake: Runner, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(project, ASKED[:4])
    wanted = [
        "mine.txt: 4 requests, 4 benign, 0 redteam (plain text, one a line)",
        "line 1, benign: Why is the sea salty?",
        "line 3, benign: Write a poem",
        'instructions.pool = "redteam"',
        "short by 2: 6 items want a request each",
    ]
    for how in ("--dry-run", "--until=instructions"):
        run_fake(*MINE, "--set", "items=6", how)
        out = capsys.readouterr().out
        assert all(text in out for text in wanted) and "line 4" not in out


def test_the_dry_run_shows_the_users_own_first_request_and_tells_a_line_that_is_too_long(
    run_fake: Runner, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(project, [ASKED[0], "stone " * 9000])
    run_fake(*MINE, "--dry-run")
    out = capsys.readouterr().out
    assert f"Instruction: {ASKED[0]}" in out and "bicycle" not in out
    assert "line 2 is too long: ~" in out and "passed over" in out


@pytest.mark.runs
def test_declined_red_team_requests_without_a_pool_end_with_a_line_that_names_the_pool(
    run_fake: Runner, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(project, ASKED[:2])
    declines = ("--set", "model.backend=fake", "--set", "model.name=fake:refusing")
    code, _ = run_fake(*MINE, "--set", "items=2", "--until", "pairs", fake=declines)
    assert code == errors.QUALITY
    text = capsys.readouterr().err
    assert 'requests are in the pool "benign"' in text and 'instructions.pool = "redteam"' in text
    code, run = run_fake(
        *MINE, "--set", "items=2", "--set", "instructions.pool=redteam", "--until", "pairs", fake=declines
    )
    assert code == errors.DONE and len(read_jsonl(run / "dataset/pairs/train.jsonl")) == 2
    assert "0 benign, 2 redteam" in capsys.readouterr().out


def test_a_run_of_before_these_keys_has_the_same_identity(run_fake: Runner, project: Path) -> None:
    write(project, ASKED)
    _, run = run_fake(*MINE, "--until", "instructions")
    manifest = json.loads((run / "manifest.json").read_text())
    assert not {"instructions.pool", "instructions.key"} & manifest["identity"].keys()
    assert not {"instructions.pool", "instructions.key"} & manifest["stages"]["instructions"].keys()
    code, _ = run_fake("--resume", "runs/latest", "--set", "instructions.pool=redteam")
    assert code == errors.DRIFT


@pytest.mark.runs
def test_a_file_that_grew_is_no_drift_and_its_new_lines_fill_the_slots_that_were_short(
    run_fake: Runner, project: Path
) -> None:
    write(project, ASKED[:2])
    _, run = run_fake(*MINE, "--set", "items=4", "--until", "answers")
    before = (run / "records.jsonl").read_bytes()
    write(project, [ASKED[2], *ASKED[:2], ASKED[3]])  # in front and behind
    code, _ = run_fake("--resume", "runs/latest", "--until", "answers")
    assert code == errors.DONE
    assert (run / "records.jsonl").read_bytes().startswith(before)
    assert sorted(instructions(run)) == sorted(ASKED[:4])
    assert (run / "instructions.file").read_bytes() == (project / "mine.txt").read_bytes()
    assert runner.main([str(project / "cai.toml"), "--verify", "runs/latest"]) == errors.DONE
    assert run_fake("--resume", "runs/latest")[0] == errors.DONE


def test_a_file_whose_used_line_changed_is_drift(run_fake: Runner, project: Path) -> None:
    write(project, ASKED[:2])
    _, run = run_fake(*MINE, "--set", "items=2", "--until", "answers")
    before = (run / "manifest.json").read_bytes(), (run / "instructions.file").read_bytes()
    for lines in ([ASKED[0] + "!", *ASKED[1:4]], ASKED[1:4], ASKED[1::-1]):  # changed, gone, in another order
        write(project, lines)
        assert run_fake("--resume", "runs/latest")[0] == errors.DRIFT
    assert before == ((run / "manifest.json").read_bytes(), (run / "instructions.file").read_bytes())


@pytest.mark.runs
def test_a_fork_over_a_file_that_grew_keeps_all_records(
    run_fake: Runner, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(project, ASKED[:2])
    _, run = run_fake(*MINE, "--set", "items=2", "--until", "pairs")
    rows = len(read_jsonl(run / "records.jsonl"))
    write(project, ASKED)
    capsys.readouterr()
    run_fake(*MINE, "--set", "items=4", "--fork", "runs/latest")
    assert f"{rows} records stay, 0 are made again" in capsys.readouterr().out


@pytest.mark.runs
def test_after_training_a_file_that_grew_changes_nothing(
    run_fake: Runner, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(project, ASKED[:2])
    _, run = run_fake(*MINE, "--set", "items=2")
    before = (run / "records.jsonl").read_bytes(), (run / "instructions.file").read_bytes()
    write(project, ASKED)
    code, _ = run_fake("--resume", "runs/latest")
    assert code != errors.DRIFT
    assert "has grown since training began; this run goes on with its own copy" in capsys.readouterr().out
    assert before == ((run / "records.jsonl").read_bytes(), (run / "instructions.file").read_bytes())


def test_a_shortage_is_told_once_and_at_the_end_how_many_lines_there_were(
    run_fake: Runner, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(project, ASKED[:2])
    run_fake(*MINE, *PAPERS_WAY, "--set", "items=4", "--until", "pairs")
    said = capsys.readouterr()
    assert said.err.count("no line is left for") == 1 and "passed over" not in said.err
    assert "pairs: 2 of 4 wanted; the bound of tries is reached; instructions.file has 2 lines.\n" in said.out


@pytest.mark.runs
def test_a_request_that_leaves_no_room_for_an_answer_is_not_tried_with_other_seeds(
    run_fake: Runner, project: Path
) -> None:
    write(project, ["stone " * 9000, *ASKED])
    _, run = run_fake(*MINE, "--set", "items=2", "--until", "pairs")
    rows = read_jsonl(run / "records.jsonl")
    assert sum(str(row["reason"]).startswith("prompt_too_long") for row in rows) == 1
    assert sum(text.startswith("stone") for text in instructions(run)) == 1
    assert len(read_jsonl(run / "dataset/pairs/train.jsonl")) == 2


def _pipe(data: bytes) -> str:
    """The path of a pipe that gives these bytes once, as a shell's <(...) makes it."""
    out, into = os.pipe()
    threading.Thread(target=lambda: (os.write(into, data), os.close(into))).start()
    return f"/dev/fd/{out}"


def test_files_from_pipes_are_read_once_hashed_and_copied_whole(run_fake: Runner, project: Path) -> None:
    constitution, lines = (project / "constitution.yaml").read_bytes(), ("\n".join(ASKED) + "\n").encode()
    pipes = ("--set", f"constitution={_pipe(constitution)}", "--set", f"instructions.file={_pipe(lines)}")
    code, run = run_fake("--milestone", "m1", "--set", "items=3", *pipes, "--until", "answers")
    assert code == errors.DONE
    assert (run / "constitution.yaml").read_bytes() == constitution
    assert (run / "instructions.file").read_bytes() == lines
    assert runner.main([str(project / "cai.toml"), "--verify", "runs/latest"]) == errors.DONE
    again = read_inputs(cli.parse([str(run / "recipe.toml"), "--resume", str(run)]))
    assert again.hashes == json.loads((run / "manifest.json").read_text())["files"]


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null"])
@pytest.mark.parametrize("key", ["instructions.file", "constitution"])
def test_a_device_is_refused_and_leaves_no_run(
    run_fake: Runner, project: Path, key: str, device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _ = run_fake("--milestone", "m1", "--set", f"{key}={device}")
    text = capsys.readouterr().err
    assert code == errors.USAGE and f"{device}: {key}: is a device" in text and text.count("\n") == 1
    assert not (project / "runs").exists()


@pytest.mark.runs
def test_a_resume_whose_files_are_gone_goes_on_with_the_runs_own_copies(
    run_fake: Runner, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(project, ASKED[:2])
    _, run = run_fake(*MINE, "--set", "items=2", "--until", "answers")
    for name in ("mine.txt", "constitution.yaml"):
        (project / name).unlink()
    shutil.rmtree(project / "prompts")
    assert run_fake("--resume", "runs/latest")[0] == errors.DONE
    assert "mine.txt is gone; this run goes on with its own copy" in capsys.readouterr().out
    code, _ = run_fake("--resume", "runs/latest", "--set", "constitution=typo.yaml")
    assert code == errors.USAGE and "typo.yaml" in capsys.readouterr().err
    assert run.is_dir()


def test_milestone_may_be_set_like_any_key(run_fake: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    run_fake("--set", "milestone=m2", "--dry-run")
    assert "milestone m2" in capsys.readouterr().out
    assert run_fake("--set", "milestone=zzz", "--dry-run")[0] == errors.USAGE
    assert "zzz: no such milestone" in capsys.readouterr().err
    assert run_fake("--milestone", "m1", "--set", "milestone=m2", "--dry-run")[0] == errors.USAGE
    assert "says another milestone than --milestone" in capsys.readouterr().err


@pytest.mark.runs
def test_home_is_meant_in_every_path(
    run_fake: Runner, project: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    (home / "mine.txt").write_text("\n".join(ASKED))
    shutil.copy(project / "constitution.yaml", home / "c.yaml")
    shutil.copytree(project / "prompts", home / "p")
    keys = ("runs=~/runs", 'instructions.file="~/mine.txt"', "constitution=~/c.yaml", "prompts=~/p")
    argv = [str(project / "cai.toml"), *FAKE, "--milestone", "m1", "--set", "items=2"]
    argv += [word for key in keys for word in ("--set", key)]
    assert runner.main([*argv, "--until", "answers"]) == errors.DONE
    assert (home / "runs" / "latest" / "records.jsonl").is_file() and not (project / "~").exists()
    assert runner.main([*argv, "--resume", "latest"]) == errors.DONE
    code = runner.main([*argv, "--export", "latest", "--to=~/out"])
    assert code == errors.DONE and (home / "out" / "adapter").is_dir() and not (project / "~").exists()


@pytest.mark.parametrize(
    ("key", "wanted"),
    [
        ("items=9223372036854775808", "items: input should be less than or equal to 500000"),
        ("items=" + "9" * 31, "items: input should be"),
        ("items=" + "9" * 5000, "--set items: "),
        ("heldout.items=1000000000000", "heldout.items: input should be less than or equal to 500000"),
        ("dpo.max_steps=99999999999999999999", "dpo.max_steps: input should be"),
        ("items=" + "[" * 3000, "--set items: nested too deeply"),
        (".".join("a" * 500) + "=1", "expected KEY=VALUE"),
        ("dpo.learning_rate=.00005", "Write 5e-05"),
        ("dpo.learning_rate=0,00005", "Write 5e-05"),
        ("gates.enforce=True", "Write true"),
        ("gates.enforce=no", "Write false"),
        ("benchmarks.run=xstest", 'Write ["xstest"]: --set \'benchmarks.run=["xstest"]\''),
        ("lora.target_modules=q_proj,v_proj", 'Write ["q_proj", "v_proj"]'),
        ("dpo.seeds=3", "Write [3]"),
        ("model.revision=1e5", 'Write "1e5": --set \'model.revision="1e5"\''),
        ("items=1e3", "Write 1000"),
        ('items="5"', "Write 5"),
        ("items=1,000", "Write 1000"),
        ("instructions.pool=red-team", "instructions.pool: input should be '', 'benign' or 'redteam'"),
        ("runs=~nobodyhere/x", "no such user's folder"),
    ],
)
def test_a_value_that_is_none_is_one_line_that_says_how_to_write_it(
    run_fake: Runner, key: str, wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_fake("--dry-run", "--milestone", "m1", "--set", key)[0] == errors.USAGE
    text = capsys.readouterr().err
    assert wanted in text and text.count("\n") == 1 and len(text) < 500


@pytest.mark.parametrize(
    ("table", "wanted"),
    [
        ("items = " + "9" * 5000, "TOML syntax: Exceeds the limit"),
        ("items = " + "[" * 3000, "TOML syntax: nested too deeply"),
        (".".join("a" * 500) + " = 1", "TOML syntax: nested too deeply"),
        ("items = 9223372036854775808", "items: input should be less than or equal to 500000"),
        ("items = True", "TOML syntax"),
    ],
)
def test_a_recipe_of_huge_or_deep_values_is_one_line(
    project: Path, table: str, wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "odd.toml").write_text(table + "\n[milestones.m0]\ndpo.max_steps = 1\n")
    assert runner.main([str(project / "odd.toml"), *FAKE, "--dry-run"]) == errors.USAGE
    text = capsys.readouterr().err
    assert wanted in text and text.count("\n") == 1


def test_a_recipe_with_a_mark_or_the_line_ends_of_windows_is_read(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "cai.toml").read_bytes()
    for data in (b"\xef\xbb\xbf" + text, text.replace(b"\n", b"\r\n")):
        (project / "cai.toml").write_bytes(data)
        assert runner.main([str(project / "cai.toml"), *FAKE, "--dry-run"]) == errors.DONE


def test_a_recipe_from_a_pipe_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.main([_pipe(b"items = 1\n"), "--dry-run"]) == errors.USAGE
    assert "is a pipe" in capsys.readouterr().err


@pytest.mark.runs
def test_a_language_whose_refusals_are_not_known_is_told_at_the_start_in_the_dry_run_and_in_the_report(
    run_fake: Runner, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = "2 of 2 requests are in a language whose refusals the rules do not know (Hebrew, Arabic; known: English"
    write(project, ["איך אני מתקן ברז מטפטף במטבח?", "متى أسقي النباتات في الشتاء؟"])
    for how in ("--dry-run", "--until=pairs"):
        _, run = run_fake(*MINE, "--set", "items=2", how)
        assert wanted in capsys.readouterr().out
    run_fake("--report", "latest")
    page = (run / "report.html").read_text()
    assert wanted in page and wanted in (run / "report.md").read_text()
    assert '<p class="text" dir="auto">' in page and "<bdi>איך" in page and '<p class="text">' not in page
    assert "language: en" not in (run / "dataset" / "README.md").read_text()
