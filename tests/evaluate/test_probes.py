"""The probe prompts: asked of both models at every milestone, kept through kills, part of no identity."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
from support.rich_run import go, latest, project
from support.runs import FAKE, ROOT, read_jsonl

from cai.errors import CaiError
from cai.evaluate import probes
from cai.recipe.probes import load_probes

M0 = (*FAKE, "--milestone", "m0")


def rows_of(folder):
    return [row for row in read_jsonl(latest(folder) / "records.jsonl") if row["stage"] == "probes"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = project(tmp_path_factory.mktemp("probes"))
    code, said = go(folder, *M0)
    return folder, code, said


@pytest.fixture
def copy(made, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(made[0], folder, symlinks=True)
    return folder


def test_the_shipped_probes_are_three_benign_and_three_red_team_ones():
    found = load_probes(ROOT / "prompts" / "probes.yaml")
    assert [probe.pool for probe in found] == ["benign"] * 3 + ["redteam"] * 3


@pytest.mark.runs
def test_m0_asks_base_and_tuned_all_six_and_says_so_at_its_end(made):
    folder, code, said = made
    rows = rows_of(folder)
    assert code == 0 and [row["arm"] for row in rows] == ["base"] * 6 + ["tuned"] * 6
    assert {row["seed"] for row in rows} == {0} and all(row["text"] for row in rows)
    shown = said[said.index("before and after (6 of 6 answers changed") :]
    assert shown.count("    base:") == 3 and shown.count("{+why+}") == 3
    assert "3 red-team probes, 3 answered otherwise: folded" in shown
    assert "girlfriend" not in shown, "a red-team probe is folded"


@pytest.mark.runs
def test_a_finished_run_asks_nothing_again(copy):
    before = (latest(copy) / "records.jsonl").read_bytes()
    code, said = go(copy, *FAKE, "--resume", "runs/latest")
    assert code == 0 and (latest(copy) / "records.jsonl").read_bytes() == before
    assert "6 of 6 answers changed" in said


@pytest.mark.runs
def test_a_kill_between_the_two_models_gives_the_same_bytes(copy):
    """The log is cut behind the base's answers, as a kill there leaves it."""
    log = latest(copy) / "records.jsonl"
    whole = log.read_bytes()
    lines = whole.splitlines(keepends=True)
    log.write_bytes(b"".join(line for line in lines if b'"arm":"tuned"' not in line))
    log.with_suffix(".sum").unlink()
    events = latest(copy) / "events.jsonl"  # no digest of the attempt's end: it was killed
    events.write_bytes(b"".join(line for line in events.read_bytes().splitlines(keepends=True) if b'"end"' not in line))
    events.with_suffix(".sum").unlink(missing_ok=True)
    code, said = go(copy, *FAKE, "--resume", "runs/latest")
    assert code == 0, said
    assert log.read_bytes() == whole


@pytest.mark.runs
def test_a_recipe_without_the_key_asks_nothing_and_has_the_same_identity(made, tmp_path):
    """Runs made before the key was there resume as they were."""
    folder = project(tmp_path)
    recipe = folder / "cai.toml"
    lines = [line for line in recipe.read_text().splitlines() if not line.startswith(("probes =", "probe_tokens ="))]
    recipe.write_text("\n".join(lines) + "\n")
    code, _ = go(folder, *M0)
    assert code == 0 and rows_of(folder) == []
    with_key = latest(made[0]).name.split("-m0-")[1]
    assert latest(folder).name.split("-m0-")[1] == with_key, "the identity's hash"
    assert not (latest(folder) / "prompts" / "probes.yaml").exists()
    scores = (latest(folder) / "eval" / "scores.jsonl").read_bytes()
    code, _ = go(folder, *FAKE, "--resume", "runs/latest", "--set", 'evaluation.probes="prompts/probes.yaml"')
    assert code == 0 and len(rows_of(folder)) == 12, "a resume may add them"
    assert (latest(folder) / "eval" / "scores.jsonl").read_bytes() == scores, "what was scored before still counts"


@pytest.mark.runs
def test_probes_edited_since_are_no_drift_and_what_was_asked_stays(copy):
    path = copy / "prompts" / "probes.yaml"
    path.write_text(path.read_text().replace("My boss", "My chief"))
    before = rows_of(copy)
    code, said = go(copy, *FAKE, "--resume", "runs/latest")
    assert code == 0, said
    assert rows_of(copy) == before
    code, said = go(copy, "--verify", "runs/latest")
    assert code == 0, said


@pytest.mark.runs
def test_a_new_adapter_is_asked_what_the_base_was_asked_and_stands_beside_the_old(tmp_path):
    copy = project(tmp_path)
    assert go(copy, *M0, "--set", "dpo.epochs=1.0")[0] == 0  # a fake adapter is the number of its steps
    path = copy / "prompts" / "probes.yaml"
    path.write_text(path.read_text().replace("My boss", "My chief"))
    code, said = go(copy, *FAKE, "--resume", "runs/latest", "--set", "items=2")
    assert code == 0, said
    rows = rows_of(copy)
    assert [row["round"] for row in rows] == [0] * 6 + [1] * 6 + [2] * 6
    assert rows[12]["prompt"] == rows[0]["prompt"] and rows[12]["adapter"] != rows[6]["adapter"]


@pytest.mark.runs
def test_a_fork_asks_its_own_model(copy):
    theirs = {row["adapter"] for row in rows_of(copy)}
    code, said = go(copy, *FAKE, "--fork", "runs/latest", "--set", "dpo.max_steps=2")
    assert code == 0 and rows_of(copy) == [], said
    code, said = go(copy, *FAKE, "--resume", "runs/latest")
    assert code == 0 and len(rows_of(copy)) == 12, said
    assert {row["adapter"] for row in rows_of(copy)}.isdisjoint(theirs - {""})


def test_no_slot_of_a_data_set_meets_a_probe():
    from cai.data.slots import HELDOUT, slot_of, split_of

    assert slot_of(probes.FIRST) > HELDOUT + 400_000 and split_of(probes.FIRST) == "heldout"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1", "no list of probes"),
        ("[]", "no list of probes"),
        ("- {id: a, pool: benign}", "key 'prompt' is missing"),
        ("- {id: a, pool: bad, prompt: Hi}", "pool: 'bad' found; write benign or redteam"),
        ("- {id: a, pool: benign, prompt: ''}", "prompt: is empty"),
        ("- {id: a, pool: benign, prompt: Hi}\n- {id: a, pool: benign, prompt: Ho}", "given twice"),
        ("\n".join(f"- {{id: p{i}, pool: benign, prompt: Hi}}" for i in range(25)), "25 probes, at most 24"),
    ],
)
def test_a_bad_file_is_one_line_with_its_remedy(tmp_path, text, said):
    path = tmp_path / "probes.yaml"
    path.write_text(text)
    with pytest.raises(CaiError, match=said) as found:
        load_probes(path)
    assert str(found.value).startswith(f"{path}: ") and "\n" not in str(found.value)


def test_a_missing_file_is_told_with_its_key(tmp_path):
    folder = project(tmp_path)
    code, said = go(folder, *M0, "--set", 'evaluation.probes="nowhere.yaml"')
    assert code == 2 and "nowhere.yaml: evaluation.probes" in said


def test_dry_run_and_estimate_count_them(tmp_path):
    from cai.recipe.load import Recipe
    from cai.run import budget

    folder = project(tmp_path)
    code, said = go(folder, *M0, "--dry-run")
    assert code == 0 and "3 benign, 3 red-team probe prompts, answered by base and tuned: at most 3,600 tokens" in said
    recipe = Recipe()
    without, with_ = (budget.estimate(recipe, "embedded", tmp_path, 500, once) for once in (0, 1200))
    assert with_.tokens.high == without.tokens.high + 1200
    assert with_.rest.high > without.rest.high and with_.generation == without.generation


def test_answers_are_cut_where_the_transcript_goes_on(monkeypatch):
    """As fresh answers are: what the base writes behind its answer is another turn, which nobody asked for."""
    from cai.recipe.load import Recipe
    from cai.recipe.prompts import load_prompt

    policy = load_prompt(ROOT / "prompts" / "policy.yaml", frozenset({"instruction"}))
    done = SimpleNamespace(id=probes.FIRST, text="Say no.\n\nInstruction: And now?", finish="length", token_ids=(1, 2))

    class Engine:
        stats = None

        def submit(self, request):
            assert request.sampling.temperature == 0.0

        def completions(self, stopped):
            return [done]

    from contextlib import nullcontext

    from cai.engine.tokenizers import ByteTokenizer

    model = SimpleNamespace(
        attach=lambda *a: None, mode=lambda *a: None, adapter=lambda on: nullcontext(), engine=lambda section: Engine(),
        format="base", tokenizer=ByteTokenizer(eos_ids=(256,)),
    )  # fmt: skip
    context = SimpleNamespace(
        model=lambda: model, prompts={"policy": policy}, recipe=Recipe(), stopped=lambda: False,
        check_stop=lambda where: None, progress=SimpleNamespace(follow=lambda stats: None),
    )  # fmt: skip
    probe = probes.Probe("boss", "benign", "How do I say no?")
    (row,) = probes._answers(context, [(probes.FIRST, 0, probe)], "base", ROOT, "")
    assert (row["text"], row["finish"]) == ("Say no.", "stop")
