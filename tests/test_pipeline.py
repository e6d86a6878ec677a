"""The whole pipeline on the fake model: every milestone's shape, resume, drift, retries, and what a run leaves."""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.runs import FAKE, PAPERS_WAY, ROOT, read_jsonl

import runner
from cai import errors
from cai.commands import cli, verify
from cai.data import chain, slots
from cai.engine import Completion, never
from cai.inputs import read_inputs
from cai.models.fake import FakeEngine
from cai.report.snapshot import read_story

Runner = Callable[..., tuple[int, Path]]
RECORD_KEYS = {
    "v",
    "stage",
    "item",
    "round",
    "principle",
    "text",
    "status",
    "reason",
    "finish",
    "tokens",
    "seed",
    "prompt_sha",
}


@pytest.fixture
def run_fake(run_paper: Runner) -> Runner:
    return run_paper


@pytest.mark.runs
def test_m1_ends_with_its_ten_pairs_and_leaves_the_files_it_promises(run_fake: Runner) -> None:
    code, run = run_fake("--milestone", "m1")
    assert code == errors.DONE
    names = {"recipe.toml", "recipe.resolved.toml", "manifest.json", "records.jsonl", "events.jsonl", "status.json"}
    names |= {"dataset", "train", "adapter", "eval", "report.html", "report.md", "constitution.yaml", "prompts"}
    assert names <= {path.name for path in run.iterdir()}
    assert len(read_jsonl(run / "dataset/pairs/train.jsonl")) == 10
    assert oct(run.stat().st_mode)[-3:] == "700"


@pytest.mark.runs
def test_the_example_is_in_the_users_format(run_fake: Runner) -> None:
    _, run = run_fake("--milestone", "m1")
    for example in read_jsonl(run / "dataset/examples.jsonl"):
        head = ["instruction", "initial_answer", "principle", "critique", "revised_answer", "preference_pair"]
        assert list(example)[:6] == head
        pair = example["preference_pair"]
        assert list(pair) == ["prompt", "chosen", "rejected"]
        assert (pair["chosen"], pair["rejected"]) == (example["revised_answer"], example["initial_answer"])
        assert [r["principle_id"] for r in example["rounds"]] and len(example["rounds"]) == 2
        assert example["principle"] == example["rounds"][-1]["principle"]


@pytest.mark.runs
def test_every_record_stands_once_with_every_field(run_fake: Runner) -> None:
    _, run = run_fake("--milestone", "m1")
    rows = read_jsonl(run / "records.jsonl")
    keys = [(row["stage"], row["item"], row["round"]) for row in rows]
    assert len(keys) == len(set(keys))
    assert all(set(row) >= RECORD_KEYS for row in rows)
    for row in rows:
        assert (row["status"] == "ok") == (row["reason"] is None)


@pytest.mark.runs
def test_principles_of_an_item_differ_and_are_balanced(run_fake: Runner) -> None:
    _, run = run_fake("--milestone", "m1", "--set", "items=30")
    rows = [row for row in read_jsonl(run / "records.jsonl") if row["stage"] == "critiques" and row["item"] < slots.TRY]
    by_item: dict[int, list[str]] = {}
    for row in rows:
        by_item.setdefault(row["item"], []).append(row["principle"])
    assert all(len(set(ids)) == 2 for ids in by_item.values())
    counts = [sum(row["principle"] == name for row in rows) for name in {row["principle"] for row in rows}]
    assert len(counts) == 18 and max(counts) - min(counts) <= 1


@pytest.mark.runs
def test_two_runs_give_the_same_bytes(run_fake: Runner) -> None:
    _, one = run_fake("--milestone", "m1")
    _, two = run_fake("--milestone", "m1")
    assert one != two
    for name in ("records.jsonl", "dataset/examples.jsonl", "adapter/adapter_model.safetensors"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


@pytest.mark.runs
def test_a_finished_run_resumes_to_nothing_without_loading_a_model(
    run_fake: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    _, run = run_fake("--milestone", "m1")
    before = {name: (run / name).read_bytes() for name in ("records.jsonl", "eval/scores.jsonl", "eval/gates.json")}
    capsys.readouterr()
    code, again = run_fake("--resume", "runs/latest", fake=())
    assert (code, again) == (errors.DONE, run)
    assert "loaded in" not in capsys.readouterr().out
    assert before == {name: (run / name).read_bytes() for name in before}


@pytest.mark.runs
@pytest.mark.parametrize("cut", [0, 1, 900, 5_000, 14_000])
def test_a_run_cut_anywhere_resumes_to_the_same_bytes(run_fake: Runner, project: Path, cut: int) -> None:
    """What a kill leaves: the log up to some byte, nothing derived from it."""
    _, whole = run_fake("--milestone", "m1")
    _, run = run_fake("--milestone", "m1", "--until", "answers")
    data = (whole / "records.jsonl").read_bytes()
    (run / "records.jsonl").write_bytes(data[:cut])
    (run / "records.sum").unlink(missing_ok=True)
    code, _ = run_fake("--resume", f"runs/{run.name}", fake=())
    assert code == errors.DONE
    for name in ("records.jsonl", "dataset/examples.jsonl", "adapter/adapter_model.safetensors"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.fixture
def slices(monkeypatch: pytest.MonkeyPatch, project: Path) -> list[tuple[list[int], int]]:
    """For each slice that is generated: its items, and how many rows stand in the newest run's log by then."""
    seen: list[tuple[list[int], int]] = []
    real = FakeEngine.completions

    def completions(self: FakeEngine, stopped: Callable[[], bool] = never) -> Iterator[Completion]:
        log = (project / "runs" / "latest" / "records.jsonl").read_bytes()
        seen.append(([request.id for request in self._queue], log.count(b"\n")))
        return real(self, stopped)

    monkeypatch.setattr(FakeEngine, "completions", completions)
    return seen


def test_g2_each_slice_is_committed_before_the_next_begins(
    run_fake: Runner, slices: list[tuple[list[int], int]]
) -> None:
    _, run = run_fake("--milestone", "m1", "--set", "engine.batch_size=3", "--until", "answers")
    rows = read_jsonl(run / "records.jsonl")
    before = len([row for row in rows if row["stage"] != "answers"])
    items = [row["item"] for row in rows if row["stage"] == "answers"]
    assert slices[-4:] == [(items[at : at + 3], before + at) for at in range(0, 10, 3)]


def test_g4_a_slice_of_which_a_part_is_on_disk_is_generated_whole(
    run_fake: Runner, slices: list[tuple[list[int], int]]
) -> None:
    """What a row is drawn beside changes its last bits: alone, it would differ from that of the run left alone."""
    _, run = run_fake("--milestone", "m1", "--set", "engine.batch_size=3", "--until", "answers")
    whole, done = (run / "records.jsonl").read_bytes(), slices[-4:]
    (run / "records.jsonl").write_bytes(b"".join(whole.splitlines(keepends=True)[:-5]))
    del slices[:]
    run_fake("--resume", str(run), "--until", "answers", fake=())
    assert [items for items, _ in slices] == [items for items, _ in done[1:]]
    assert (run / "records.jsonl").read_bytes() == whole


def test_rejected_pairs_are_retried_then_replaced_and_the_bound_is_kept(
    run_fake: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that always refuses: every benign item is rejected, tried again and replaced, then exit 6 says why."""
    fake = (
        "--set",
        "model.backend=fake",
        "--set",
        "model.name=fake:refusing",
        "--set",
        "instructions.red_team_share=0.0",
        "--set",
        "pairs.replacements=2",
    )
    code, run = run_fake("--milestone", "m0", fake=fake)
    assert code == errors.QUALITY
    assert "rejected" in capsys.readouterr().err
    rows = read_jsonl(run / "records.jsonl")
    tries = sorted({slots.try_of(row["item"]) for row in rows})
    assert tries == list(range((1 + 1) * (1 + 2)))
    assert all(slots.slot_of(row["item"]) == 0 for row in rows)


@pytest.mark.parametrize("behaviour", ["empty", "looping"])
def test_degenerate_output_ends_with_exit_6_and_reasons(
    run_fake: Runner, behaviour: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = ("--set", "model.backend=fake", "--set", f"model.name=fake:{behaviour}")
    code, run = run_fake("--milestone", "m0", fake=fake)
    assert code == errors.QUALITY
    assert all(row["status"] == "rejected" for row in read_jsonl(run / "records.jsonl"))


@pytest.mark.parametrize("redraws", [0, 2])
def test_a_faulty_draw_is_drawn_again_as_often_as_the_recipe_says(
    run_fake: Runner, project: Path, redraws: int
) -> None:
    (project / "given.txt").write_text("\n".join(f"What are {n} lanterns good for?" for n in range(9)))
    empty = ("model.backend=fake", "model.name=fake:empty", "instructions.file=given.txt", f"pairs.redraws={redraws}")
    _, run = run_fake("--milestone", "m0", fake=tuple(word for key in empty for word in ("--set", key)))
    answers = [row for row in read_jsonl(run / "records.jsonl") if row["stage"] == "answers"]
    assert answers and {row.get("draws", 1) for row in answers} == {redraws + 1}


def test_near_duplicate_instructions_are_rejected_with_their_similarity(run_fake: Runner) -> None:
    fake = ("--set", "model.backend=fake", "--set", "model.name=fake:copying")
    code, run = run_fake("--milestone", "m1", "--until", "instructions", fake=fake)
    rows = read_jsonl(run / "records.jsonl")
    assert code == errors.DONE
    assert sum(row["status"] == "ok" for row in rows) == 1
    assert {row["reason"].split(":")[0] for row in rows if row["status"] != "ok"} == {"near_duplicate"}
    assert len(rows) == 1 + 9 * 4  # one accepted at once, the other nine tried max_tries times


@pytest.mark.runs
def test_instructions_from_a_file(run_fake: Runner, project: Path) -> None:
    lines = ['{"instruction": "How do bees find their way home?", "pool": "benign"}', "Why is the sea salty?"]
    lines.append("Why is the sea salty??")  # a near-duplicate is passed over
    lines.append('{"instruction": "Write a poem about a lost glove."}')
    (project / "mine.jsonl").write_text("\n".join(lines))
    _, run = run_fake("--milestone", "m1", "--set", "instructions.file=mine.jsonl", "--set", "items=3")
    examples = read_jsonl(run / "dataset/examples.jsonl")
    assert [e["instruction"] for e in examples] == [
        "How do bees find their way home?",
        "Why is the sea salty?",
        "Write a poem about a lost glove.",
    ]


@pytest.mark.runs
def test_a_file_with_too_few_lines_is_told(run_fake: Runner, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "mine.txt").write_text("Why is the sea salty?\nWhy is the sea salty??\nWhy is the sea so salty?")
    run_fake("--milestone", "m1", "--set", "instructions.file=mine.txt", "--set", "items=3")
    assert "no line is left for 2 of 3 items that want a new one; 2 passed over as too like" in capsys.readouterr().err


@pytest.mark.runs
def test_a_run_over_a_file_is_made_again_and_resumed_from_its_own_copies(
    run_fake: Runner, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The lines that report and --status print work when the file of instructions was changed or is gone."""
    (project / "mine.txt").write_text("Why is the sea salty?\nHow do bees find their way home?")
    _, run = run_fake("--milestone", "m1", "--set", "instructions.file=mine.txt", "--set", "items=2")
    (project / "mine.txt").write_text("Something else.")
    again = shlex.split(re.search(r"python runner.py ([^<]*)</code>", (run / "report.html").read_text())[1])
    assert runner.main(again) == errors.DONE
    second = (project / "runs" / "latest").resolve()
    assert second != run
    assert (second / "records.jsonl").read_bytes() == (run / "records.jsonl").read_bytes()
    (project / "mine.txt").unlink()
    assert runner.main([str(run / "recipe.toml"), "--resume", f"runs/{run.name}"]) == errors.DONE
    (run / "instructions.file").unlink()  # as a run of an older program left it: the original is looked for
    assert runner.main([str(run / "recipe.toml"), "--resume", f"runs/{run.name}"]) == errors.USAGE
    assert f"{project}/mine.txt: instructions.file: cannot read it" in capsys.readouterr().err


@pytest.mark.parametrize("runs", ["../elsewhere", "a/b", "{tmp}/absolute"])
def test_data_files_of_a_runs_own_recipe_lie_where_the_original_is(project: Path, runs: str) -> None:
    """Wherever the runs lie: a copy in a run folder means relative paths as the recipe did that began it."""
    runs = runs.format(tmp=project.parent)
    argv = [str(project / "cai.toml"), *FAKE, "--milestone", "m0", "--set", f"runs={runs}", "--until", "instructions"]
    assert runner.main(argv) == errors.DONE
    copy = (project / runs / "latest").resolve() / "recipe.toml"
    assert read_inputs(cli.parse([str(copy), "--resume", str(copy.parent)])).folder == project


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no instruction in it"),
        ('{"instruction": 3}', 'line 1: no text under "instruction"'),
        ("{x", "line 1: not a JSON object"),
    ],
)
def test_bad_instruction_files(
    run_fake: Runner, project: Path, content: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "mine.jsonl").write_text(content)
    code, _ = run_fake("--milestone", "m1", "--set", "instructions.file=mine.jsonl")
    assert code == errors.USAGE
    text = capsys.readouterr().err
    assert message in text and "mine.jsonl" in text and "Traceback" not in text


@pytest.mark.parametrize(
    ("edit", "named"),
    [("prompts/critiques.yaml", "prompts/critiques.yaml"), ("constitution.yaml", "constitution.yaml")],
)
def test_an_edited_input_is_drift(
    run_fake: Runner, project: Path, edit: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, run = run_fake("--milestone", "m1", "--until", "answers")
    path = project / edit
    path.write_text(path.read_text() + "\n# edited\n")
    code, _ = run_fake("--resume", f"runs/{run.name}", fake=())
    text = capsys.readouterr().err
    assert code == errors.DRIFT and named in text and "--fork" in text
    end = read_jsonl(run / "events.jsonl")[-1]
    assert end["kind"] == "end" and end["code"] == errors.DONE and end["attempt"] == 1, "a refusal leaves no trace"
    code, _ = run_fake("--resume", f"runs/{run.name}", fake=())
    assert code == errors.DRIFT  # still


def test_g8_other_weights_under_the_same_name_are_drift(run_fake: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    """The hub's `main` moved on, or a local copy was exchanged: known once the weights are loaded, before any row."""
    _, run = run_fake("--milestone", "m0", "--until", "instructions")
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["model"]["revision"] = "0123abcd"
    del manifest["sums"]  # the weights are others; the manifest is as it was
    (run / "manifest.json").write_text(json.dumps(manifest))
    before = (run / "records.jsonl").read_bytes()
    capsys.readouterr()
    assert run_fake("--resume", str(run), fake=())[0] == errors.DRIFT
    assert "revision: '0123abcd' -> 'none'" in capsys.readouterr().err
    assert (run / "records.jsonl").read_bytes() == before


@pytest.mark.runs
def test_a_run_continues_from_its_own_copies(run_fake: Runner, project: Path) -> None:
    """The remedy that the drift message names works: the run folder holds recipe, constitution and prompts."""
    import runner

    _, run = run_fake("--milestone", "m1", "--until", "answers")
    (project / "constitution.yaml").write_text("- nonsense")
    assert runner.main([str(run / "recipe.toml"), "--resume", str(run)]) == errors.DONE
    assert len(read_jsonl(run / "dataset/pairs/train.jsonl")) == 10


@pytest.mark.runs
def test_more_items_may_be_asked_for_before_training_and_after_it(run_fake: Runner) -> None:
    _, run = run_fake("--milestone", "m1", "--until", "revisions")
    code, _ = run_fake("--resume", f"runs/{run.name}", "--set", "items=12", fake=())
    assert code == errors.DONE
    assert len(read_jsonl(run / "dataset/pairs/train.jsonl")) == 12
    code, _ = run_fake("--resume", f"runs/{run.name}", "--set", "items=14", fake=())
    assert code == errors.DONE and len(read_jsonl(run / "dataset/pairs/train.jsonl")) == 14


@pytest.mark.runs
def test_what_a_resume_sets_holds_for_the_next_one(run_fake: Runner) -> None:
    _, run = run_fake("--milestone", "m1", "--until", "revisions", "--set", "seed=3")
    assert run_fake("--resume", str(run), "--set", "items=12", "--set", "dpo.beta=0.3")[0] == 0
    assert run_fake("--resume", str(run))[0] == 0  # not a drift back to 10 items
    sets = json.loads((run / "manifest.json").read_text())["sets"]
    assert sets == ["seed=3", "items=12", "dpo.beta=0.3", *(FAKE + PAPERS_WAY)[1::2]]
    assert len(read_jsonl(run / "dataset" / "pairs" / "train.jsonl")) == 12


@pytest.mark.runs
def test_a_trial_of_few_items_stays_one_when_it_is_resumed(run_fake: Runner) -> None:
    _, run = run_fake("--milestone", "m1", "--limit", "2")
    assert run_fake("--resume", str(run))[0] == 0
    assert len(read_jsonl(run / "dataset" / "pairs" / "train.jsonl")) == 2


@pytest.mark.runs
def test_held_out_prompts_are_never_trained_on(run_fake: Runner) -> None:
    _, run = run_fake("--milestone", "m1", "--set", "heldout.items=5")
    train = {row["prompt"] for row in read_jsonl(run / "dataset/pairs/train.jsonl")}
    held = {row["prompt"] for row in read_jsonl(run / "dataset/pairs/heldout.jsonl")}
    assert len(held) == 5 and not train & held
    rows = read_jsonl(run / "records.jsonl")
    assert {row["split"] for row in rows if row["stage"] == "instructions" and row["item"] >= slots.HELDOUT} == {
        "heldout"
    }


@pytest.mark.runs
@pytest.mark.parametrize("run_id", ["../../etc", "no-such-run", "UPPER", "runs/../..", "/etc"])
def test_wrong_run_ids_are_one_clear_line(run_fake: Runner, run_id: str, capsys: pytest.CaptureFixture[str]) -> None:
    run_fake("--milestone", "m0")
    capsys.readouterr()
    code, _ = run_fake("--resume", run_id)
    text = capsys.readouterr().err
    assert code == errors.USAGE and len(text.strip().splitlines()) == 1


@pytest.mark.parametrize("flags", [["--watch"], ["--write"], ["--rater", "ann"], ["--terminal"], ["--to", "out"],
                                   ["--merged"], ["--push", "me/cai"]])  # fmt: skip
def test_a_flag_without_its_command_starts_no_run(
    project: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    import runner

    assert runner.main([str(project / "cai.toml"), *FAKE, *flags]) == errors.USAGE
    assert f"{flags[0]}: goes with --" in capsys.readouterr().err
    assert not (project / "runs").exists()


@pytest.mark.parametrize("runs", ["x" * 300, "abcdefghi/" * 500, "a\\u0000b", "cai.toml"])
def test_a_runs_folder_that_cannot_be_is_one_clear_line(
    run_fake: Runner, capsys: pytest.CaptureFixture[str], runs: str
) -> None:
    for argv in (("--milestone", "m0"), ("--status", "latest"))[: 1 if "\\" in runs else 2]:
        code, _ = run_fake(*argv, "--set", f'runs="{runs}"')
        said = capsys.readouterr().err
        assert code == errors.USAGE and len(said.strip().splitlines()) == 1 and "cai.toml: runs: " in said


@pytest.mark.slow
def test_too_few_open_files_are_one_clear_line_wherever_they_run_out(run_fake: Runner, tmp_path: Path) -> None:
    """From one descriptor that is free to enough of them; in forked children, since a failed run keeps some open."""
    whole = run_fake("--milestone", "m0")[1]  # and everything is imported
    free = os.dup(0)
    os.close(free)
    codes, said = [], []
    for more in range(1, 30, 2):
        if (child := os.fork()) == 0:
            sys.stderr = (tmp_path / "said").open("w")
            resource.setrlimit(resource.RLIMIT_NOFILE, (free + more, free + more))
            code, _ = run_fake("--milestone", "m0")
            sys.stderr.flush()
            os._exit(code)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        said.append((tmp_path / "said").read_text())
        if codes[-1] == errors.DONE:
            break
    assert codes[-1] == errors.DONE and set(codes) <= {errors.USAGE, errors.IO, errors.DONE}, said
    assert any("ulimit -n" in text for text in said) and not any("Traceback" in text for text in said), said
    newest = (tmp_path / "runs" / "latest").resolve()
    assert newest != whole and (newest / "records.jsonl").read_bytes() == (whole / "records.jsonl").read_bytes()


def test_unknown_flag_and_missing_recipe(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import runner

    assert runner.main(["--mileston", "m1"]) == errors.USAGE
    assert runner.main([str(project / "none.toml")]) == errors.USAGE
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.runs
def test_a_failed_gate_ends_7_when_enforced_blocks_the_next_milestone_and_can_be_overridden(
    run_fake: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    code, run = run_fake("--milestone", "m1", "--set", "gates.enforce=true")
    gates = json.loads((run / "eval/gates.json").read_text())
    assert not gates["passed"] and code == errors.GATE  # the fake model's critiques are not meaningful
    two = ("--milestone", "m2", "--set", "items=2", "--set", "heldout.items=1", "--set", "dpo.max_steps=2")
    code, _ = run_fake(*two)
    assert code == errors.GATE and "--override-gate" in capsys.readouterr().err
    code, run = run_fake(*two, "--override-gate", "a trial")
    assert code == errors.DONE
    assert "a trial" in (run / "report.md").read_text()
    code, _ = run_fake("--resume", run.name, "--set", "evaluation.exam_sensitivity=0.7")  # decided and written again
    assert code == errors.DONE
    assert json.loads((run / "eval/gates.json").read_text())["override"] == "a trial"
    assert "a trial" in (run / "report.md").read_text()
    capsys.readouterr()
    run_fake("--status")
    assert "a trial" in capsys.readouterr().out


@pytest.mark.runs
def test_a_failed_gate_blocks_the_next_milestone_though_an_overlay_changes_what_it_is_made_with(
    run_fake: Runner, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """[milestones.m2] (as [embedded.milestones.m2] does) sets another length: it is the same recipe all the same."""
    path = project / "cai.toml"
    overlay = "[milestones.m2]\nsampling.answers.max_new_tokens = 90\ndpo.max_length = 512\n"
    path.write_text(path.read_text().replace("[milestones.m2] ", overlay + "# "))
    code, _ = run_fake("--milestone", "m1", "--set", "gates.enforce=true")
    assert code == errors.GATE
    two = ("--milestone", "m2", "--set", "items=2", "--set", "heldout.items=1", "--until", "answers")
    assert run_fake(*two)[0] == errors.GATE
    assert "m1 did not pass its gate, so m2 does not start" in capsys.readouterr().err
    assert run_fake(*two, "--set", "seed=7")[0] == errors.DONE  # another recipe, which m1 never tried


@pytest.mark.parametrize("manifest", [b"[]", b'{"schema": 1, "backend": "fake", "items": null}', b"\xff"])
@pytest.mark.parametrize("gates", [b"[]", b"3", b"{}"])
def test_a_damaged_run_beside_it_hinders_no_run(run_fake: Runner, project: Path, manifest: bytes, gates: bytes) -> None:
    """The estimate and the gate of the milestone before look into the other runs."""
    other = project / "runs" / "20260101-000000-m0-abcdef"
    (other / "eval").mkdir(parents=True)
    (other / "manifest.json").write_bytes(manifest)
    (other / "eval" / "gates.json").write_bytes(gates)
    stage = b'{"attempt":1,"n":0,"s":1.0,"kind":"stage","stage":"answers","tokens":"x","seconds":{}}'
    (other / "events.jsonl").write_bytes(stage + b"\n")
    assert run_fake("--milestone", "m1", "--set", "items=1", "--until", "instructions")[0] == errors.DONE


@pytest.mark.runs
def test_no_gate_is_said_and_is_no_pass(run_fake: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_fake("--milestone", "m0", "--set", "gates.m0=[]")[0] == errors.DONE
    assert "m0: done, the recipe sets no gate for it." in capsys.readouterr().out


@pytest.mark.runs
def test_an_advisory_gate_that_is_not_met_is_named(run_fake: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    gate = '[{metric = "pairs.kept", at_least = 99.0, advisory = true}]'
    assert run_fake("--milestone", "m0", "--set", f"gates.m0={gate}", "--set", "gates.enforce=true")[0] == errors.DONE
    assert "m0: PASS (advisory and not met: pairs.kept)" in capsys.readouterr().out


def test_an_override_wants_a_reason(run_fake: Runner, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_fake("--milestone", "m0", "--override-gate", "  ")[0] == errors.USAGE
    assert "--override-gate" in capsys.readouterr().err
    assert not (project / "runs").exists()


def test_dry_run_writes_nothing(run_fake: Runner, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(path for path in project.rglob("*"))
    import runner

    assert runner.main([str(project / "cai.toml"), "--milestone", "m1", "--dry-run", *FAKE]) == errors.DONE
    assert sorted(path for path in project.rglob("*")) == before
    assert "critiques" in capsys.readouterr().out


def test_too_many_rounds_for_the_constitution(run_fake: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    code, _ = run_fake("--milestone", "m1", "--set", "rounds=99")
    assert code == errors.USAGE and "18 principles" in capsys.readouterr().err


@pytest.mark.runs
def test_a_users_constitution_of_one_principle_works(run_fake: Runner, project: Path) -> None:
    (project / "constitution.yaml").write_text(
        "- id: brief\n  principle: Be brief.\n"
        "  critique_request: Find needless words.\n  revision_request: Shorten it.\n"
    )
    code, run = run_fake("--milestone", "m0")
    assert code == errors.DONE
    assert read_jsonl(run / "dataset/examples.jsonl")[0]["principle"] == "Be brief."


@pytest.mark.runs
def test_a_moved_run_folder_still_has_nothing_left_to_do(run_fake: Runner, project: Path) -> None:
    _, run = run_fake("--milestone", "m0")
    moved = run.with_name("moved")
    shutil.move(run, moved)
    code, _ = run_fake("--resume", "runs/moved", fake=())
    assert code == errors.DONE
    assert not [
        row for row in read_jsonl(moved / "events.jsonl") if row["attempt"] == 2 and row["kind"] == "model_loaded"
    ]


@pytest.mark.runs
def test_a_run_of_a_users_file_goes_on_from_its_folder_alone(run_fake: Runner, project: Path, tmp_path_factory) -> None:
    """Copied to another machine without the project: recipe, prompts, constitution and instructions lie in the run."""
    import runner

    (project / "mine.txt").write_text("Why is the sea salty?\nHow do bees find their way home?\n")
    _, whole = run_fake("--milestone", "m1", "--set", "instructions.file=mine.txt", "--set", "items=2")
    _, run = run_fake(
        "--milestone", "m1", "--set", "instructions.file=mine.txt", "--set", "items=2", "--until", "answers"
    )
    there = tmp_path_factory.mktemp("machine") / "runs" / run.name
    shutil.copytree(run, there)
    shutil.rmtree(project / "prompts")
    (project / "mine.txt").unlink()
    assert runner.main([str(there / "recipe.toml"), "--resume", str(there)]) == errors.DONE
    for name in ("records.jsonl", "dataset/pairs/train.jsonl", "adapter/adapter_model.safetensors"):
        assert (there / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.runs
def test_a_model_of_random_weights_brings_its_own_parser_and_the_core_verifies_its_run(
    run_fake: Runner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """bench/noise.py; without its parser the same fake model, which only repeats itself, makes no pair."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import noise

    fake = ("--set", "model.backend=fake", "--set", "model.name=fake:looping")
    code, run = run_fake("--milestone", "m0", fake=fake)
    assert code == errors.QUALITY
    for name in ("CHAIN", "INSTRUCTIONS"):
        monkeypatch.setattr(chain, name, getattr(chain, name))  # put back after the test
    noise.accept()
    code, run = run_fake(
        "--milestone",
        "m1",
        "--set",
        "gates.m1=[]",
        *(part for one in noise.LOOSE for part in ("--set", one)),
        fake=fake,
    )
    assert code == errors.DONE and "the recipe sets no gate for it" in capsys.readouterr().out
    monkeypatch.undo()
    assert verify.sound(verify.verify(run))


@pytest.mark.runs
def test_a_run_made_when_a_constant_was_a_setting_resumes_and_another_value_does_not(
    run_fake: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its resolved recipe and its identity name the key; set to something else then, it is drift."""
    run = run_fake("--milestone", "m0")[1]
    resolved, manifest = run / "recipe.resolved.toml", json.loads((run / "manifest.json").read_text())
    text = resolved.read_text().replace("[pairs]\n", "[pairs]\naccept_noise = false\n")
    resolved.write_text(text.replace("[evaluation]\n", "[evaluation]\npermutations = 200\n"))
    assert "permutations" in resolved.read_text() and "accept_noise" in resolved.read_text()
    assert manifest["identity"]["pairs.accept_noise"] == "False"
    assert run_fake("--resume", "latest")[0] == errors.DONE
    assert not [gap for gap in read_story(run).gaps if "recipe" in gap] and verify.sound(verify.verify(run))
    manifest["identity"]["pairs.accept_noise"] = "True"
    del manifest["sums"]  # as such a run has it
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert run_fake("--resume", "latest")[0] == errors.DRIFT
    capsys.readouterr()
    assert run_fake("--milestone", "m0", "--set", "pairs.accept_noise=true")[0] == errors.USAGE
    assert "pairs.accept_noise: no setting any more, fixed at False" in capsys.readouterr().err


@pytest.mark.runs
def test_the_manifest_tells_peak_memory_by_phase(run_fake):
    _, run = run_fake("--milestone", "m0")
    found = json.loads((run / "manifest.json").read_text())["memory"]
    assert {"answers", "revisions", "train"} <= set(found)
    assert all(0 < found[phase]["peak_host_gib"] < 100 for phase in ("answers", "revisions", "train"))
