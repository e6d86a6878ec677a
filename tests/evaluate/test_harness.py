"""lm_eval tasks: the adapter to its model interface, records, messages, figures. A stand-in package, no torch."""

from __future__ import annotations

import json
import math
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.runs import read_jsonl

from cai import errors
from cai.engine import Completion, EngineStats, Rules, Score
from cai.engine.tokenizers import ByteTokenizer
from cai.errors import CaiError, Stopped
from cai.evaluate.lm_eval import replay
from cai.evaluate.lm_eval import tasks as harness
from cai.evaluate.lm_eval.replay import HarnessRequest, Replay, Unanswered
from cai.models.fake import FakeModel
from cai.recipe.settings import EngineSection, ModelSection
from cai.recipe.settings_evaluation import EvaluationSection

Runner = Callable[..., tuple[int, Path]]
SMALL = ("--milestone", "m1", "--set", "items=2", "--set", "rounds=1", "--set", "heldout.items=2",
         "--set", "evaluation.neutral_passages=2", "--set", "evaluation.kl_passages=0")  # fmt: skip
TASKS = ("--set", 'evaluation.lm_eval=["tiny", "both"]')
WORDS = ["lantern harbour", "orchard glacier", "kettle meadow", "bridge canvas", "tunnel market"]


def request(*args: object) -> SimpleNamespace:
    return SimpleNamespace(args=args)


# --- the adapter


class Table:
    """An engine over bytes: log-prob of each token by `logp(context, token)`, greedy text by `writes(context)`."""

    streams, rules = False, Rules(0.1, 3)

    def __init__(self, logp: Callable[[str, str], float], writes: Callable[[str], str]) -> None:
        self.logp, self.writes, self.stats = logp, writes, EngineStats()
        self.submitted: list[object] = []
        self.drawn = 0
        self.seen_rules: list[Rules] = []

    def submit(self, asked: object) -> None:
        self.submitted.append(asked)

    def score(self, asked: Sequence[object], stopped: Callable[[], bool] = bool) -> Iterator[Score]:
        self.seen_rules.append(self.rules)
        decode = ByteTokenizer().decode
        for one in asked:
            context, ids = decode(one.context_ids), one.continuation_ids  # type: ignore[attr-defined]
            yield Score(one.id, tuple(self.logp(context + decode(ids[:i]), decode([t])) for i, t in enumerate(ids)))  # type: ignore[attr-defined]

    def completions(self, stopped: Callable[[], bool] = bool) -> Iterator[Completion]:
        while self.submitted and not stopped():
            one = self.submitted.pop(0)
            self.drawn += 1
            text = self.writes(ByteTokenizer().decode(one.token_ids))[: one.sampling.max_new_tokens]  # type: ignore[attr-defined]
            yield Completion(one.id, tuple(ByteTokenizer().encode(text)), text, "length")  # type: ignore[attr-defined]


def model(length: int = 64) -> SimpleNamespace:
    return SimpleNamespace(tokenizer=ByteTokenizer(), hf_tokenizer=None, max_seq_length=length)


def test_replay_asks_for_what_is_missing_and_answers_from_rows() -> None:
    rows: dict[tuple[int, int], dict] = {}
    lm = Replay(lambda item, number: rows.get((item, number)))
    asked = [request("a", " b"), request("a", " c"), request("a", " b")]
    with pytest.raises(Unanswered) as caught:
        lm.loglikelihood(asked)
    assert [ask.args for ask in caught.value.asks] == [("a", " b"), ("a", " c"), ("a", " b")]
    for row in replay.answer(model(), Table(lambda c, t: -1.0, lambda c: ""), caught.value.asks):
        rows[row["item"], row["round"]] = row
    assert len(rows) == 2 and lm.loglikelihood(asked) == [(-2.0, False)] * 3


def test_log_probs_are_sums_over_the_continuation_and_the_end_space_of_a_context_belongs_to_it() -> None:
    engine = Table(lambda c, t: -0.5 if t == "b" else -2.0, lambda c: " b")
    assert replay.encode_pair(model(), "a ", "b") == ([97], [32, 98])
    assert replay.encode_pair(model(), "", "ab") == ([256], [97, 98])
    (row,) = replay.answer(model(), engine, [HarnessRequest("loglikelihood", ("a ", "b"))])
    assert (row["logp"], row["greedy"]) == (-2.5, True)


def test_a_long_context_loses_its_beginning_and_a_long_continuation_is_refused() -> None:
    seen: list[str] = []
    engine = Table(lambda c, t: seen.append(c) or -1.0, lambda c: "")  # type: ignore[func-returns-value]
    replay.answer(model(8), engine, [HarnessRequest("loglikelihood", ("0123456789", "ab"))])
    assert seen == ["456789", "456789a"]
    with pytest.raises(CaiError, match=r"continuation of 9 tokens .* model\.max_seq_length = 8"):
        replay.answer(model(8), engine, [HarnessRequest("loglikelihood", ("0", "123456789"))])


def test_greedy_is_drawn_only_where_the_log_probs_leave_it_open() -> None:
    """ "y" has more than half; of " n" and " m" the first is likelier at once, so only it is drawn."""
    values = {"y": -0.1, "n": -1.0, "m": -2.0}
    engine = Table(lambda c, t: values.get(t, -0.1), lambda c: "n")
    asks = [HarnessRequest("loglikelihood", (c, t)) for c, t in (("q", "y"), ("r", "n"), ("r", "m"))]
    rows = replay.answer(model(), engine, asks)
    assert [row["greedy"] for row in rows] == [True, True, False] and engine.drawn == 1


def test_the_recipes_sampling_rules_are_off_while_lm_eval_asks() -> None:
    engine = Table(lambda c, t: -1.0, lambda c: "")
    replay.answer(model(), engine, [HarnessRequest("loglikelihood", ("a", "b"))])
    assert engine.seen_rules == [Rules()] and engine.rules == Rules(0.1, 3)


@pytest.mark.parametrize("length", [2, 3, 5, 64])
def test_rolling_windows_hold_every_token_once_with_all_context_that_fits(length: int) -> None:
    ids = list(range(12))
    found = list(replay.windows(ids, 99, length))
    assert [token for _, part in found for token in part] == ids
    assert all(context and len(context) + len(part) <= length for context, part in found)
    assert found[0][0] == (99,) and all(len(c) + len(p) == length for c, p in found[1:])
    (row,) = replay.answer(
        model(length), Table(lambda c, t: -0.25, lambda c: ""), [HarnessRequest("loglikelihood_rolling", ("abcd",))]
    )
    assert row["logp"] == -1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_document_with_a_likelihood_that_is_no_number_is_unscored(bad: float) -> None:
    """The largest of several NaN is the first answer, which may be the right one: a broken model would be right."""
    asks = [HarnessRequest("loglikelihood", ("q", "y")), HarnessRequest("loglikelihood_rolling", ("abc",))]
    rows = replay.answer(model(), Table(lambda c, t: bad, lambda c: "n"), asks)
    assert [row["logp"] for row in rows] == [None, None]
    found = Replay(lambda item, number: rows[0]).loglikelihood([request("q", "y")])
    assert math.isnan(found[0][0])
    sample = {"filter": "none", "metrics": ["acc"], "acc": 1.0, "doc_id": 0}
    documents = [
        sample | {"resps": [[(math.nan, False)], [(-1.0, True)]]},
        sample | {"doc_id": 1, "resps": [[(-1.0, True)]]},
    ]
    scored = harness.document_rows({"tiny": documents})
    assert [row["score"] for row in scored] == [None, 1.0]
    base = harness.scores_of([{"arm": "base/tiny/tiny", **row} for row in scored], "tiny", "base")
    figure = harness.delta("tiny", base, base)
    assert (figure.n, figure.unscored) == (1, 1)
    assert harness.delta("tiny", {("tiny", 0): None}, {("tiny", 0): None}).unscored == 1


def test_generation_takes_lm_evals_arguments() -> None:
    found = replay.sampling_of(
        model(), {"until": ["\n", ""], "max_gen_toks": 9, "do_sample": False, "temperature": 1.0}
    )
    assert (found.temperature, found.max_new_tokens, found.stop, found.eos_ids) == (0.0, 9, ("\n",), (256,))
    assert replay.sampling_of(model(512), {"until": "END"}).max_new_tokens == replay.DEFAULT_NEW_TOKENS
    with pytest.raises(CaiError, match="wants 256 new tokens"):
        replay.sampling_of(model(64), {})
    with pytest.raises(CaiError, match="draws with top_p"):
        replay.sampling_of(model(), {"max_gen_toks": 9, "temperature": 0.8, "top_p": 0.9})
    drawn = [HarnessRequest("generate_until", ("abcdefgh", {"max_gen_toks": 4, "until": []}))]
    (row,) = replay.answer(model(8), Table(lambda c, t: 0.0, str.upper), drawn)
    assert row["text"] == "EFGH"


def test_what_is_drawn_again_is_asked_again_and_greedy_repeats_are_one() -> None:
    greedy, hot = {"until": []}, {"until": [], "temperature": 0.5}
    asks = list(replay.numbered("generate_until", [request("a", greedy), request("a", greedy)]))
    assert [ask.number for ask in asks] == [0, 0]
    asks = list(replay.numbered("generate_until", [request("a", hot), request("b", hot), request("a", hot)]))
    assert [ask.number for ask in asks] == [0, 0, 1] and asks[0].item == asks[2].item != asks[1].item


def test_a_stop_gives_the_rows_that_are_whole() -> None:
    fake = FakeModel(ModelSection(name="fake"))
    calls = iter([False, False, True, True, True])
    asks = [HarnessRequest("generate_until", (text, {"until": [], "max_gen_toks": 4})) for text in WORDS]
    rows = replay.answer(fake, fake.engine(EngineSection()), asks, lambda: next(calls))
    assert len(rows) == 2


# --- messages


def test_without_the_package_one_line_says_how_to_get_it(
    run_fake: Runner, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "version", lambda name: (_ for _ in ()).throw(harness.PackageNotFoundError(name)))
    code, run = run_fake(*SMALL, *TASKS)
    error = capfd.readouterr().err.strip().splitlines()
    assert code == errors.USAGE and len(error) == 1
    assert "make lm-eval" in error[0] and f"lm_eval=={harness.VERSION}" in error[0]
    assert not run.exists()  # a usage fault leaves no run behind


def test_a_dry_run_asks_for_the_package(
    run_fake: Runner, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "version", lambda name: (_ for _ in ()).throw(harness.PackageNotFoundError(name)))
    assert run_fake(*SMALL, *TASKS, "--dry-run")[0] == errors.USAGE
    assert "make lm-eval" in capfd.readouterr().err


def test_the_install_line_is_the_pinned_one() -> None:
    from tests.conftest import ROOT

    pinned = (ROOT / "requirements-lm-eval.txt").read_text()
    assert f"lm_eval=={harness.VERSION}\n" in pinned
    assert "requirements-lm-eval.txt" in (ROOT / "Makefile").read_text().split("\nlm-eval:")[1].split("\n\n")[0]


def test_another_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "version", lambda name: "0.3.0")
    with pytest.raises(CaiError, match=r"lm_eval 0\.3\.0 is installed") as caught:
        harness.tasks_at_hand(EvaluationSection(lm_eval=("tiny",)), Path("."))
    assert caught.value.code == errors.USAGE


# --- whole runs with a stand-in package


class Task:
    def __init__(self, kind: str, **flags: bool) -> None:
        self.kind = kind
        vars(self).update(flags)


class Manager:
    """As much of lm_eval's TaskManager as is asked of it."""

    def __init__(self, include_path: str | None = None) -> None:
        self.include_path = include_path
        self.tasks = {
            "tiny": Task("loglikelihood"),
            "both": Task("generate_until"),
            "code": Task("x", UNSAFE_CODE=True),
        }
        self.all_tasks = [*self.tasks, "gone"]

    def load(self, names: list[str]) -> dict:
        if names == ["gone"]:
            raise ConnectionError("no\nroute")
        return {"tasks": {f"{name}_leaf": self.tasks[name] for name in names}}


class LM:
    """lm_eval.api.model.LM is an abstract class with a constructor of its own."""

    def __init__(self) -> None:
        self.cache_hook = None


def simple_evaluate(model, tasks, limit, bootstrap_iters, log_samples, task_manager):  # type: ignore[no-untyped-def]
    (name,) = tasks
    assert isinstance(model, LM)
    words = WORDS[: limit or None]
    if name == "tiny":
        asked = [request(f"Say {word}.", f" {word}") for word in words]
        answers = model.loglikelihood([*asked, asked[0]])  # the same request twice
        scores = [float(logp > -40) for logp, _ in answers[:-1]]
        metric = "acc"
    else:
        model.loglikelihood_rolling([request(word) for word in words])
        texts = model.generate_until([request(word, {"until": ["."], "max_gen_toks": 30}) for word in words])
        scores, metric = [float(len(text)) for text in texts], "f1"
    samples = [
        {"doc_id": i, "filter": kind, "metrics": ["other", metric], metric: s, "other": (1, 2)}
        for kind in ("none", "second")
        for i, s in enumerate(scores)
    ]
    return {"samples": {f"{name}_leaf": samples}, "versions": {f"{name}_leaf": 1.0}}


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    names = ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.tasks")
    made = {name: types.ModuleType(name) for name in names}
    made["lm_eval"].simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    made["lm_eval.api.model"].LM, made["lm_eval.tasks"].TaskManager = LM, Manager  # type: ignore[attr-defined]
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(harness, "version", lambda name: harness.VERSION)
    return made["lm_eval"]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("tinny", "'tinny' is no task of lm_eval 0.4.13. Did you mean tiny?"),
        ("zzzzzz", "Tasks of your own: set evaluation.lm_eval_include."),
        ("gone", "gone: its task cannot be loaded: ConnectionError: no route."),
        ("code", "code: its part code_leaf runs code that the model wrote. Leave the task out."),
    ],
)
def test_a_task_that_cannot_run_ends_before_anything_is_generated(
    run_fake: Runner, package: types.ModuleType, capfd: pytest.CaptureFixture[str], name: str, told: str
) -> None:
    code, run = run_fake(*SMALL, "--set", f'evaluation.lm_eval=["tiny", "{name}"]')
    error = capfd.readouterr().err.strip().splitlines()
    assert code == errors.USAGE and len(error) == 1 and told in error[0]
    assert not run.exists()


def test_a_missing_folder_of_tasks_is_named(
    run_fake: Runner, package: types.ModuleType, capfd: pytest.CaptureFixture[str]
) -> None:
    code, _ = run_fake(*SMALL, *TASKS, "--set", "evaluation.lm_eval_include=nowhere")
    assert code == errors.USAGE and "evaluation.lm_eval_include: " in capfd.readouterr().err


def figures_of(run: Path, name: str = "measured") -> dict:
    return json.loads((run / f"eval/{name}.json").read_text())["figures"]


@pytest.mark.runs
def test_a_run_with_tasks_is_measured_by_document_and_resumes_without_package_or_model(
    run_fake: Runner, package: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, run = run_fake(*SMALL, *TASKS)
    assert code == errors.DONE
    figure = figures_of(run)["forgetting.both_delta"]
    assert figure["n"] == 5 and figure["judge"] == f"lm_eval {harness.VERSION}"
    assert figure["facts"]["test"] == "Wilcoxon signed-rank" and 0 <= figure["facts"]["p"] <= 1
    assert figures_of(run)["forgetting.tiny_delta"]["facts"]["test"] == "exact McNemar"
    rows = read_jsonl(run / "eval/lm_eval.jsonl")
    assert {row["arm"] for row in rows} >= {"base", "tuned", "base/tiny/tiny_leaf", "tuned/both/done"}
    assert {row["metric"] for row in rows if "score" in row} == {"acc", "f1"}
    assert "forgetting.both_delta" in (run / "report.md").read_text()
    before = (run / "eval/lm_eval.jsonl").read_bytes()
    monkeypatch.setattr("cai.session.load", lambda *a, **k: pytest.fail("the model was loaded"))
    monkeypatch.setattr(harness, "version", lambda name: pytest.fail("the package was asked for"))
    assert run_fake("--resume", run.name, fake=())[0] == errors.DONE
    assert (run / "eval/lm_eval.jsonl").read_bytes() == before


@pytest.mark.runs
def test_trap_09_the_batch_is_ours_and_lm_eval_never_holds_the_model(
    run_fake: Runner, package: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """simple_evaluate(batch_size=) is ignored for a model that is an object, and it calls eval() on it.

    Here it is given neither (the stand-in takes no such argument): slices have the module's size.
    """
    real, sizes, given = replay.answer, [], []
    monkeypatch.setattr(harness, "answer", lambda m, e, asks, s=None: sizes.append(len(asks)) or real(m, e, asks))
    monkeypatch.setattr(
        package, "simple_evaluate", lambda model, **more: given.append(model) or simple_evaluate(model, **more)
    )
    monkeypatch.setattr(harness, "ANSWERED_AT_ONCE", 2)
    code, _ = run_fake(*SMALL, *TASKS)
    assert code == errors.DONE
    assert max(sizes) == 2
    assert given and all(set(vars(model)) == {"cache_hook", "replay"} for model in given)


@pytest.mark.runs
def test_a_kill_between_slices_asks_only_for_the_rest(
    run_fake: Runner, package: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "ANSWERED_AT_ONCE", 2)
    _, alone = run_fake(*SMALL, *TASKS)
    real, asked = replay.answer, []

    def answer(model, engine, asks, stopped=None):  # type: ignore[no-untyped-def]
        if len(asked) == 4:
            raise Stopped("killed here")
        asked.append(len(asks))
        return real(model, engine, asks)

    monkeypatch.setattr(harness, "answer", answer)
    code, run = run_fake(*SMALL, *TASKS)
    assert code == errors.RESUMABLE
    written = len([row for row in read_jsonl(run / "eval/lm_eval.jsonl") if "kind" in row])
    assert written == sum(asked) > 0
    again: list[int] = []
    monkeypatch.setattr(harness, "answer", lambda m, e, asks, s=None: again.append(len(asks)) or real(m, e, asks))
    assert run_fake("--resume", run.name, fake=())[0] == errors.DONE
    total = len([row for row in read_jsonl(alone / "eval/lm_eval.jsonl") if "kind" in row])
    assert sum(again) == total - written
    both = [sorted(read_jsonl(r / "eval/lm_eval.jsonl"), key=str) for r in (alone, run)]
    assert both[0] == both[1] and figures_of(alone) == figures_of(run)


@pytest.mark.runs
def test_other_tasks_later_leave_the_other_scores_alone(run_fake: Runner, package: types.ModuleType) -> None:
    _, run = run_fake(*SMALL)
    before = (run / "eval/scores.jsonl").read_bytes()
    assert not (run / "eval/lm_eval.jsonl").exists()
    assert run_fake("--resume", run.name, *TASKS, fake=())[0] == errors.DONE
    assert (run / "eval/scores.jsonl").read_bytes() == before and "forgetting.tiny_delta" in figures_of(run)


@pytest.mark.runs
def test_the_sft_arm_answers_the_tasks_too(run_fake: Runner, package: types.ModuleType) -> None:
    _, run = run_fake(*SMALL, *TASKS, "--set", "sft.enabled=true")
    found = figures_of(run, "sft")
    assert found["forgetting.both_delta.sft"]["n"] == found["dpo_over_sft.forgetting.both_delta"]["n"] == 5
    assert {"sft", "dpo", "p"} <= set(found["dpo_over_sft.forgetting.both_delta"]["facts"])
    arms = {row["arm"].split("/")[0] for row in read_jsonl(run / "eval/sft-lm_eval.jsonl")}
    assert arms == {"fingerprint", "tuned"}


@pytest.mark.runs
def test_a_task_that_fails_on_answers_is_one_line(
    run_fake: Runner, package: types.ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def breaks(**_: object) -> None:
        raise ZeroDivisionError("by\nzero")

    monkeypatch.setattr(package, "simple_evaluate", breaks)
    code, _ = run_fake(*SMALL, *TASKS)
    assert code == errors.USAGE and "tiny: lm_eval failed on it: ZeroDivisionError: by zero." in capfd.readouterr().err


# --- figures


def test_delta_by_hand() -> None:
    """Eight documents, tuned right on all, base on two: six discordant one way, exact p = 2 / 2^6."""
    base = {("leaf", i): float(i < 2) for i in range(8)} | {("leaf", 9): 1.0}
    found = harness.delta("tiny", base, {("leaf", i): 1.0 for i in range(8)})
    assert (found.value, found.n, found.unscored) == (0.75, 8, 1)
    assert found.facts == {"base": 0.25, "tuned": 1.0, "p": 2 / 2**6, "test": "exact McNemar", "parts": 1}
    assert harness.delta("tiny", {}, {}).value is None


def test_a_task_without_a_score_a_document_is_unmeasured_not_zero() -> None:
    samples = {"leaf": [{"doc_id": 0, "filter": "none", "metrics": ["word_perplexity"], "word_perplexity": (1.0, 2)}]}
    assert harness.document_rows(samples) == []
    assert "no score a document" in harness.figures({"leaf": {"base": {}, "tuned": {}}})["forgetting.leaf_delta"].note
    assert not math.isnan(harness.delta("x", {("a", 0): 0.5}, {("a", 0): 0.25}).facts["p"])
