"""Guards: formats, drop rules, records, resume, what is said without the configured guard, alarm."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2
import pytest
from support import read_jsonl

from cai import errors, plan
from cai import guard as guards
from cai.auxiliary import Auxiliary
from cai.engine import Completion, EngineStats, Request, Rules, Score, ScoreRequest, never
from cai.errors import CaiError
from cai.guard import Exchange, Judgement, LlamaGuard, QwenGuard, llama_category, llama_pieces, qwen_category, verdict
from cai.prompts import ByteTokenizer
from cai.recipe import read, resolve
from cai.settings_m3 import GuardSection

Runner = Callable[..., tuple[int, Path]]
ON = ("--set", "guard.enabled=true", "--set", "guard.model=stand-in")
ROOT = Path(__file__).resolve().parents[1]

# Our own small templates with the shapes of the published ones: the 1B's takes parts, the 8B's plain text.
PLAIN = (
    "<|im_start|>Task\nS1: Violent Crimes.\nS6: Specialized Advice.\nS14: Code Interpreter Abuse.\n"
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}END<|im_end|>"
)
PARTS = (
    "<|im_start|>Task\n{% for k in ['S1', 'S6', 'S14'] %}{% if k not in excluded_category_keys %}{{ k }}: x.\n"
    "{% endif %}{% endfor %}{% for m in messages %}{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ m['role'] }}: {{ c['text'] }}\n{% endfor %}{% endfor %}END"
)


class Template:
    """The part of a transformers tokenizer that a guard uses."""

    def __init__(self, text: str) -> None:
        self.template = jinja2.Environment().from_string(text)

    def apply_chat_template(self, messages: Any, tokenize: bool = False, **more: Any) -> str:
        return self.template.render(messages=messages, **more)


class Engine:
    """Unsafe where the reply says BAD; categories as a guard writes them."""

    name, streams, rules = "scripted", False, Rules()

    def __init__(self, categories: str) -> None:
        self.categories, self.stats, self.queue = categories, EngineStats(batch_size=4), []
        self.tokenizer, self.prompts = ByteTokenizer(), []

    def submit(self, request: Request) -> None:
        self.queue.append(request)

    def completions(self, stopped: Callable[[], bool] = never) -> Iterator[Completion]:
        while self.queue:
            yield Completion(self.queue.pop(0).id, (1,), self.categories, "eos")

    def score(self, requests: Sequence[ScoreRequest], stopped: Callable[[], bool] = never) -> Iterator[Score]:
        for request in requests:
            context = self.tokenizer.decode(request.context_ids)
            word = self.tokenizer.decode(request.continuation_ids).strip().lower()
            self.prompts.append(context)
            bad = "BAD" in context
            yield Score(request.id, (0.0 if (word in ("unsafe", "yes")) == bad and word != "controversial" else -9.0,))

    def close(self) -> None:
        """Nothing is held."""


class Going:
    @staticmethod
    def stopped() -> bool:
        return False


def auxiliary(engine: Engine, template: str = PLAIN, limit: int = 100_000) -> Auxiliary:
    return Auxiliary("scripted", engine, engine.tokenizer, Template(template), limit, {"of": "real"})


BAD, FINE = Exchange("how?", "BAD words"), Exchange("how?", "fine words")


@pytest.mark.parametrize("template", [PLAIN, PARTS])
def test_llama_guard_takes_plain_and_listed_content_and_leaves_excluded_categories_out(template: str) -> None:
    engine = Engine("S1,S14\n")
    guard = LlamaGuard(auxiliary(engine, template), GuardSection(style="llama-guard", excluded=("S6",)))
    bad, fine = guard.judge([BAD, FINE], Going)  # type: ignore[arg-type]
    assert (bad.label, bad.category) == ("unsafe", "S1 Violent Crimes") and bad.unsafe == pytest.approx(1.0, abs=1e-3)
    assert (fine.label, fine.category) == ("safe", "") and fine.unsafe == pytest.approx(0.0, abs=1e-3)
    prompt = next(text for text in engine.prompts if "BAD" in text)
    assert "S1:" in prompt and "S14:" in prompt and "S6:" not in prompt
    assert "user: how?" in prompt and "assistant: BAD words" in prompt
    assert prompt.rstrip("\n") + "\n\n" == prompt or prompt.endswith("\n\n")


def test_a_control_token_in_a_reply_is_plain_text_to_the_guard() -> None:
    pieces = llama_pieces(Template(PLAIN), Exchange("a", "<|im_end|>safe"), ())
    tokenizer = ByteTokenizer()
    ids = [id_ for p in pieces for id_ in (tokenizer.encode_template if p.turn is None else tokenizer.encode)(p.text)]
    assert sum(id_ >= 256 for id_ in ids) == 2  # the template's own two


def test_a_template_that_drops_the_turns_is_refused() -> None:
    with pytest.raises(CaiError, match=r"guard\.model"):
        llama_pieces(Template("nothing"), BAD, ())


def test_qwen3guard_reads_label_category_and_refusal() -> None:
    engine = Engine(" Jailbreak, Violent\nRefusal: No")
    guard = QwenGuard(auxiliary(engine), GuardSection())
    bad, fine = guard.judge([BAD, FINE], Going)  # type: ignore[arg-type]
    assert (bad.label, bad.category, bad.refuses) == ("Unsafe", "Jailbreak", True)
    assert (fine.label, fine.category, fine.refuses) == ("Safe", "", False)


def test_a_text_beyond_the_guards_window_is_unscored() -> None:
    guard = QwenGuard(auxiliary(Engine(""), limit=60), GuardSection())
    long, short = guard.judge([Exchange("q", "x" * 99), Exchange("q", "")], Going)  # type: ignore[arg-type]
    assert long.unsafe is None and str(long.reason).startswith("too_long") and short.unsafe is not None


@pytest.mark.parametrize(
    ("text", "category"),
    [("S10,S2", "S10 Hate"), ("\nS1", "S1 Violent Crimes"), ("S99", "unparsed"), ("", ""), ("oops", "unparsed")],
)
def test_llama_categories(text: str, category: str) -> None:
    assert llama_category(text) == category


def test_qwen_categories() -> None:
    assert qwen_category(" PII, Violent\n") == "PII" and qwen_category("None of these") == "unparsed"


@pytest.mark.parametrize(
    ("pool", "chosen", "rejected", "reason"),
    [
        ("benign", 0.6, 0.9, "chosen_unsafe: Violent 0.60"),
        ("redteam", 0.2, 0.9, ""),
        ("redteam", 0.2, 0.2, "not_safer: 0.200 against 0.200"),
        ("redteam", 0.3, 0.2, "not_safer: 0.300 against 0.200"),
        ("benign", 0.3, 0.2, ""),
        ("benign", None, 0.2, "unscored: too_long"),
        ("redteam", 0.1, None, "unscored: too_long"),
    ],
)
def test_drop_rules(pool: str, chosen: float | None, rejected: float | None, reason: str) -> None:
    def said(value: float | None) -> Judgement:
        return Judgement(value, "x", "Violent", None, None if value is not None else "too_long")

    assert verdict(pool, said(chosen), said(rejected), GuardSection())[0] == reason


def test_style_is_told_by_the_name_or_asked_for() -> None:
    names = {"Qwen/Qwen3Guard-Gen-4B": "qwen3guard", "meta-llama/Llama-Guard-3-8B": "llama-guard"}
    assert {name: guards.style_of(GuardSection(model=name)) for name in names} == names
    with pytest.raises(CaiError, match=r"guard\.style"):
        guards.style_of(GuardSection(model="some/model"))
    with pytest.raises(ValueError, match="S15"):
        GuardSection(excluded=("S15",))


# --- whole runs


def test_every_kept_pair_has_a_guard_row_and_dropped_slots_are_tried_again(run_fake: Runner) -> None:
    code, run = run_fake("--milestone", "m1", *ON)
    assert code == errors.DONE
    rows = [row for row in read_jsonl(run / "records.jsonl") if row["stage"] == "guard"]
    ok = {row["item"] for row in rows if row["status"] == "ok"}
    dropped = [row for row in rows if row["status"] == "rejected"]
    assert len(ok) == len(read_jsonl(run / "dataset/pairs/train.jsonl")) and dropped
    assert {row["reason"].split(":")[0] for row in dropped} <= {"chosen_unsafe", "not_safer"}
    assert any(plan.try_of(row["item"]) for row in rows)
    figure = json.loads((run / "eval/guard.json").read_text())["figures"]["guard.dropped"]
    assert figure["n"] == len(rows) and figure["judge"].startswith("STAND-IN") and figure["facts"]["stand_in"]
    assert sum(figure["facts"]["reasons"].values()) == len(dropped)


def test_a_run_cut_in_the_guard_stage_resumes_to_the_same_bytes(run_fake: Runner) -> None:
    _, whole = run_fake("--milestone", "m1", *ON)
    lines = (whole / "records.jsonl").read_bytes().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if b'"stage":"guard"' in line)
    for keep in (at, at + 3):
        _, run = run_fake("--milestone", "m1", "--until", "answers", *ON)
        (run / "records.jsonl").write_bytes(b"".join(lines[:keep])[: -1 if keep == at else None])
        (run / "records.sum").unlink()
        code, _ = run_fake("--resume", f"runs/{run.name}", fake=())
        assert code == errors.DONE
        for name in ("records.jsonl", "dataset/examples.jsonl", "eval/guard.json"):
            assert (run / name).read_bytes() == (whole / name).read_bytes(), (keep, name)


@pytest.mark.parametrize("model", ["./no-such-guard", "nobody-here/no-such-guard-model"])
def test_without_the_configured_guard_nothing_is_generated(
    run_fake: Runner, capsys: pytest.CaptureFixture[str], model: str
) -> None:
    name = ("--set", "guard.enabled=true", "--set", f"guard.model={model}", "--set", "guard.style=qwen3guard")
    code, run = run_fake("--milestone", "m0", *name)
    text = capsys.readouterr().err
    assert code == errors.USAGE and not read_jsonl(run / "records.jsonl")
    assert "guard.model" in text and "guard.enabled=false" in text and "HF_TOKEN" in text
    assert len(text.strip().splitlines()) == 1


def test_the_alarm_is_said_aloud(run_fake: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    run_fake("--milestone", "m1", *ON, "--set", "guard.alarm=0.01")
    assert "guard: ALARM, more than 1% dropped" in capsys.readouterr().out


def test_the_shipped_m3_filters_with_the_default_guard() -> None:
    source = read(ROOT / "cai.toml")
    recipe = resolve(source, milestone="m3")
    assert recipe.guard.enabled and recipe.guard.model == "Qwen/Qwen3Guard-Gen-4B" and not recipe.benchmarks.judge
    assert not resolve(source, milestone="m2").guard.enabled
    embedded = resolve(source, milestone="m3", embedded=True)
    assert embedded.guard.model == embedded.benchmarks.judge == "stand-in"
