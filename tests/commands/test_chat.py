"""--chat: every arm answers as it is measured, with or without a terminal, on every backend; the run stays as it is."""

from __future__ import annotations

import hashlib
import io
import shutil
import sys

import pytest
from support.runs import FAKE

import runner
from cai import errors
from cai.commands import chat
from cai.commands.streaming import Shown
from cai.run.folder import Run

QUESTION = "How do I keep bread fresh for a week?"


def sums(folder):
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }


def asked(monkeypatch, project, text, *argv):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return runner.main([str(project / "cai.toml"), "--chat", *(argv or ["runs/latest"])])


class Terminal(io.StringIO):
    def isatty(self):
        return True


def talked(monkeypatch, project, *lines):
    monkeypatch.setattr(sys, "stdin", Terminal())
    given = iter(lines)

    def read(prompt):
        try:
            return next(given)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    return runner.main([str(project / "cai.toml"), "--chat", "runs/latest"])


@pytest.fixture
def finished(run_fake):
    code, run = run_fake("--milestone", "m0")
    assert code == errors.DONE
    return run


@pytest.mark.runs
def test_one_question_on_standard_input_is_answered_by_base_and_tuned(finished, project, monkeypatch, capsys):
    before = sums(finished)
    capsys.readouterr()
    assert asked(monkeypatch, project, f"{QUESTION}\n") == errors.DONE
    out = capsys.readouterr().out
    base, tuned = out.split("[base]")[1].split("[tuned]")
    assert "how the" in base and "why the" in tuned  # the fake model's adapter changes that word
    assert out.count("ends by itself") == 2
    assert sums(finished) == before


@pytest.mark.runs
def test_nothing_of_the_run_changes_and_its_lock_is_not_needed(finished, project, monkeypatch, capsys):
    """In a talk with every command, beside a runner that holds the run."""
    with Run.open(finished):
        before = sums(finished)
        lines = (QUESTION, "/critique", "/critique base", "/principles", "/new", "/critique", "/help", "And in summer?")
        assert talked(monkeypatch, project, *lines) == errors.DONE
        assert sums(finished) == before
    out = capsys.readouterr().out
    assert "[critique of tuned by the base, " in out and "[critique of base by the base, " in out
    assert "(nothing was answered yet)" in out and "(a new talk)" in out and "/quit or Ctrl-D ends" in out
    assert "honest" in out  # a principle of the list


@pytest.mark.runs
def test_a_second_question_stands_behind_the_arms_own_talk(finished, project, monkeypatch):
    seen = []

    def draw(model, section, rendered, sampling, write):
        seen.append(rendered.text)
        return chat.Drawn(f"answer {len(seen)}", "eos", 3)

    monkeypatch.setattr(chat, "draw", draw)
    assert talked(monkeypatch, project, "one?", "two?", "/quit", "never asked") == errors.DONE
    assert seen[:2] == ["Instruction: one?\n\nResponse:"] * 2
    assert seen[2:] == [
        f"Instruction: one?\n\nResponse: answer {n}\n\nInstruction: two?\n\nResponse:" for n in (1, 2)
    ]  # fmt: skip


@pytest.mark.runs
def test_an_arm_for_each_adapter_and_the_base_alone_without_one(finished, project, monkeypatch, capsys):
    shutil.copytree(finished / "adapter", finished / "adapter-sft")
    assert asked(monkeypatch, project, QUESTION) == errors.DONE
    out = capsys.readouterr().out
    assert out.index("[base]") < out.index("[sft]") < out.index("[tuned]")
    for name in ("adapter", "adapter-sft"):
        shutil.rmtree(finished / name)
    assert asked(monkeypatch, project, QUESTION) == errors.DONE
    out = capsys.readouterr().out
    assert "the base answers alone" in out and "[tuned]" not in out


@pytest.mark.runs
def test_a_principle_can_be_named_and_a_wrong_name_is_told(finished, project, monkeypatch, capsys):
    assert talked(monkeypatch, project, QUESTION, "/critique respect", "/critique nonsense") == errors.DONE
    out = capsys.readouterr().out
    assert "by the base, respect]" in out and "no such principle" in out


@pytest.mark.runs
def test_what_cannot_be_asked_is_one_line(finished, project, monkeypatch, capsys):
    assert asked(monkeypatch, project, "  \n") == errors.USAGE
    assert "no question on standard input" in capsys.readouterr().err
    assert asked(monkeypatch, project, "x " * 40_000) == errors.USAGE
    assert "leave no room for an answer" in capsys.readouterr().err
    assert talked(monkeypatch, project, "x " * 40_000, QUESTION) == errors.DONE  # the talk goes on
    assert "ends by itself" in capsys.readouterr().out
    (finished / "prompts" / "policy.yaml").unlink()
    assert asked(monkeypatch, project, QUESTION) == errors.CORRUPT


@pytest.mark.runs
def test_hostile_text_reaches_the_terminal_inert(project, run_fake, monkeypatch, capsys):
    code, _ = run_fake(
        "--milestone", "m0", fake=(*FAKE[:2], "--set", "model.name=fake:hostile", "--set", "gates.enforce=false")
    )
    if code not in (errors.DONE, errors.QUALITY):
        pytest.fail(f"exit {code}")
    capsys.readouterr()
    assert asked(monkeypatch, project, QUESTION) == errors.DONE
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\u202e" not in out and "\\x1b" in out


@pytest.mark.parametrize("cuts", [1, 2, 3, 7])
def test_a_stream_never_shows_the_beginning_of_a_stop_string(cuts):
    said = []
    shown = Shown(("\nInstruction:", "\nResponse:"), said.append)
    whole = " A loaf keeps.\nIn a bag.\nInstruction: next"
    for end in range(cuts, len(whole), cuts):
        if "\nInstruction:" in whole[:end]:
            break
        shown.grow(whole[:end])
        assert "\nInst" not in "".join(said)
    shown.end(whole.split("\nInstruction:")[0])
    assert "".join(said) == "A loaf keeps.\nIn a bag."


@pytest.mark.slow
def test_the_embedded_model_streams_what_its_engine_draws(project, monkeypatch, capsys, tmp_path):
    """Tokens come one by one; the text is the engine's greedy one, with the adapter and without."""
    pytest.importorskip("torch")
    from support.pages import make_run, recipe

    from cai.engine import Request, Rules, Sampling
    from cai.models.policy import load
    from cai.recipe.settings import EngineSection, LoraSection, ModelSection, SamplingSection, SamplingSections
    from cai.training import adapter

    section = ModelSection(format="base", quantization="fp32", max_seq_length=512)
    lora = LoraSection(rank=4, alpha=8)
    short = SamplingSections(answers=SamplingSection(max_new_tokens=24), critiques=SamplingSection(max_new_tokens=8))
    made = recipe(model=section, lora=lora, sampling=short, rounds=1)
    run = make_run(project / "runs", recipe=made)
    shutil.copytree(project / "prompts", run / "prompts")
    model = load(section, "embedded")
    model.to_lora(lora, seed=1)
    import torch

    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.hf.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.02)
    adapter.export(model.hf, run / "adapter", "SmolLM2-135M-Instruct")
    said: list[str] = []
    monkeypatch.setattr("cai.models.policy.load", lambda *given, **more: model)
    before = sums(run)
    talk = chat.open_talk(run, said.append)
    chat.ask(talk, QUESTION)
    chat.criticise(talk, [])
    assert sums(run) == before
    assert len(said) > 10  # pieces, not one text
    policy = talk.prompts["policy"].render({"instruction": QUESTION}, format="base", tokenizer=model.tokenizer)
    model.rules = Rules()
    for arm, on in (("base", False), ("tuned", True)):
        with model.adapter(on):
            engine = model.engine(EngineSection())
            engine.submit(Request(0, policy.token_ids, Sampling(0.0, 24, policy.stop, tuple(model.tokenizer.eos_ids))))
            text = next(engine.completions()).text.strip()
        assert talk.history[arm][0].assistant == text
        assert text in "".join(said)
