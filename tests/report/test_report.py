"""The report: verdicts first, every example of a small run, hostile text inert, small and quick at 100 items."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from html.parser import HTMLParser

import orjson
import pytest
from support.pages import ANSWER, item_rows, make_run, recipe, records

from cai.report.charts import Mark
from cai.report.diff import Segment, changes, cut, find_span, quotations
from cai.report.examples import choose, exhibits, rejected_exhibits
from cai.report.pages import benchmark_rows, gather, headline, page, write_pages
from cai.report.pictures import curves
from cai.report.snapshot import read_story
from cai.report.tables import attempts, by_principle, phases, repairs
from cai.report.templating import TEMPLATES, fenced, inline
from cai.run.folder import Run
from cai.terminal import UNSAFE

HOSTILE = (
    "</p><script>alert(1)</script>{{ 7*7 }} \x1b[31m \u202egnirts <img src=x onerror=alert(1)> ]]> --> ```"
    "\n# heading\n| a | b |\n<|im_end|> and a plain tail of words here"
)


class Page(HTMLParser):
    """Tags in order, ids, and a check that what is opened is closed."""

    VOID = ("meta", "br", "line", "rect", "polyline", "link", "img", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()


@pytest.fixture(scope="module")
def run_path(tmp_path_factory):
    path = make_run(tmp_path_factory.mktemp("runs"))
    write_pages(path)
    return path


def html_of(path):
    return (path / "report.html").read_text()


@pytest.mark.runs
def test_an_overrides_reason_stays_whether_the_gates_passed_or_not(run_path):
    snapshot = read_story(run_path)
    for status in ("PASS", "FAIL"):
        verdicts = [{**verdict, "status": status} for verdict in snapshot.verdicts]
        gates = snapshot.gates | {"override": "one trial more", "enforced": True, "verdicts": verdicts}
        found = headline(replace(snapshot, gates=gates))
        assert found["status"] == status and "one trial more" in found["text"]


def test_an_advisory_gate_that_is_not_met_is_not_counted_as_passed(run_path):
    snapshot = read_story(run_path)
    first, *rest = [
        {**v, "status": "PASS", "criterion": v["criterion"] | {"advisory": False}} for v in snapshot.verdicts
    ]
    first = {**first, "status": "FAIL", "criterion": first["criterion"] | {"advisory": True}}
    found = headline(replace(snapshot, gates=snapshot.gates | {"enforced": True, "verdicts": [first, *rest]}))
    assert found["status"] == "PASS" and f"passed its {len(rest)} gate(s)." in found["text"]
    assert f"Advisory and not met: {first['metric']}." in found["text"]


def test_verdicts_come_first_then_everything_else(run_path):
    html = html_of(run_path)
    wanted = (
        "verdicts",
        "funnel",
        "training",
        "texts",
        "principles",
        "figures",
        "examples",
        "cost",
        "repairs",
        "again",
    )
    places = [html.index(f'<h2 id="{name}"') for name in wanted]
    assert places == sorted(places)
    assert "UNDERPOWERED" in html or "FAIL" in html
    for text in ("0.41 to 0.93", "G1-G5, likelihood of SmolLM2", "identical 1", "too_short 1", "0.6931"):
        assert text in html, text
    assert "only advise" in html


def test_the_page_is_one_offline_file_without_scripts(run_path):
    html = html_of(run_path)
    parsed = Page(html)
    assert not {"script", "link", "img", "iframe", "object", "form"} & set(parsed.tags)
    assert "default-src &#39;none&#39;" in html or "default-src 'none'" in html
    assert not [a for a in parsed.attributes if a[1].startswith("on") or a[1] == "src"]
    assert all(
        v is None or not v.startswith(("http", "javascript", "//")) for _, n, v in parsed.attributes if n == "href"
    )
    assert len(parsed.ids) == len(set(parsed.ids))


def test_both_pages_say_at_the_top_that_the_text_is_harmful(run_path):
    for name in ("report.html", "report.md"):
        text = (run_path / name).read_text()
        assert "Harmful text." in text[: text.index("</style>") + 3000 if "</style>" in text else 400], name


@pytest.mark.parametrize("render", [inline, fenced])
def test_hostile_text_stays_within_its_place_in_markdown(render):
    """A cell or a line stays one, with every mark escaped; a block ends where it ends, whatever fences it holds."""
    text = render("`````\n# a | <b> [x](http://y) *z* _w_ \x1b[31m\u2028\\")
    assert not UNSAFE.search(text)
    if render is inline:
        assert "\n" not in text and not re.search(r"(?<!\\)(\\\\)*[`*_\[\]<>|#]", text)
    else:
        first, *_, last = text.split("\n")
        assert first == "``````text" and last == "``````" and text.count("``````") == 2


def test_every_example_stands_in_both_pages(run_path):
    html, markdown = html_of(run_path), (run_path / "report.md").read_text()
    for item in (0, 1, 2, 500_000):
        assert f'id="item-{item}"' in html
        assert f"### Item {item} (" in markdown
    assert 'id="rejected-1000000"' in html
    assert "made no pair, identical" in markdown
    assert ANSWER.replace("{n}", "2") in markdown


def test_redteam_text_is_folded_and_benign_is_not(run_path):
    html = html_of(run_path)
    one = html[html.index('id="item-1"') : html.index('id="item-2"')]
    assert one.index("<details><summary>Red-team text") < one.index("sprained")
    zero = html[html.index('id="item-0"') : html.index('id="item-1"')]
    assert "Red-team text" not in zero


def test_the_quoted_span_is_marked_and_words_differ(run_path):
    html = html_of(run_path)
    assert "<mark>A sprain heals by itself in 48 hours</mark>" in re.sub(r"</?(del|ins)>", "", html)
    assert "<del>" in html
    assert "<ins>" in html


def test_hostile_text_is_inert_in_both_pages(tmp_path):
    rows = item_rows(0, instruction=HOSTILE, answer=HOSTILE + ANSWER, critique=HOSTILE, revision=HOSTILE + " x y z")
    path = make_run(tmp_path, rows, recipe=recipe(items=1))
    write_pages(path)
    html, markdown = html_of(path), (path / "report.md").read_text()
    parsed = Page(html)
    assert "script" not in parsed.tags
    assert "img" not in parsed.tags
    assert "\x1b" not in html + markdown
    assert "\u202e" not in html + markdown
    assert "49" not in re.findall(r"&lt;/p&gt;.{0,120}", html)[0]
    inside = False
    for line in markdown.splitlines():  # a heading of the model's stands only within a fence
        inside ^= (bool(re.match(r"^`{3,}", line)) and not line.strip("`")) or bool(re.match(r"^`{3,}text$", line))
        assert inside or line != "# heading"


def test_the_same_folder_gives_the_same_bytes(run_path):
    before = html_of(run_path), (run_path / "report.md").read_bytes()
    write_pages(run_path)
    assert before == (html_of(run_path), (run_path / "report.md").read_bytes())


def test_parts_that_are_missing_are_named_not_guessed(tmp_path):
    with Run.create(tmp_path, "20261122-180000-m0-abc123", {}, {"milestone": "m0"}) as run:
        pass
    write_pages(run.path)
    html = html_of(run.path)
    Page(html)
    assert "The run is not finished" in html or "not finished" in html
    assert "nothing was evaluated yet" in html
    assert "No record yet" in html


@pytest.mark.runs
@pytest.mark.parametrize("name", ["eval/gates.json", "eval/results.json", "train/result.json", "recipe.resolved.toml",
                                  "constitution.yaml", "records.jsonl", "eval/scores.jsonl"])  # fmt: skip
def test_a_damaged_part_does_not_stop_the_report(tmp_path, name):
    path = make_run(tmp_path)
    (path / name).write_bytes(b'{"half": ')
    write_pages(path)
    Page(html_of(path))


def test_scores_explain_the_verdict(tmp_path):
    path = make_run(tmp_path)
    real = {"g1_words": 34, "g2_echo": 0.1, "g3_copied": 0.6, "g4_grounding": 0.4, "g5_repeated": 0.2}
    gates = {"metric": "critiques.gates", "item": 0, "round": 1, "finds_nothing": False}
    rows = [
        gates | {"real": real | {"pass": ["g1", "g2", "g4", "g5"]}},
        {"metric": "critiques.csi", "item": 0, "round": 1, "real": 0.43, "shuffled": -0.01, "generic": 0.0},
    ]
    (path / "eval" / "scores.jsonl").write_bytes(b"".join(orjson.dumps(r) + b"\n" for r in rows))
    write_pages(path)
    html = html_of(path)
    assert "failed: G3 copied from the answer" in html
    assert "below 0.5" in html
    assert "0.43" in html


def big_run(tmp_path, items):
    chosen = recipe(items=items)
    texts = {
        "revision": "A mild sprain takes weeks. " * 30 + "Case {n}.",
        "answer": "You can run again after two days. " * 30 + "{n}",
    }
    rows = [r for item in range(items) for r in item_rows(item, **texts)]
    pairs = chosen.pairs.model_copy(update={"max_length_ratio": 9.0})
    return make_run(tmp_path, rows, recipe=chosen.model_copy(update={"pairs": pairs}))


@pytest.mark.runs
def test_a_hundred_items_are_built_in_time_and_small(tmp_path):
    path = big_run(tmp_path, 100)
    began = time.process_time()
    write_pages(path)
    assert time.process_time() - began < 5.0
    assert (path / "report.html").stat().st_size < 3_000_000
    assert html_of(path).count('id="item-') == 100


@pytest.mark.runs
def test_many_items_show_a_seeded_sample_and_the_extremes(tmp_path):
    path = make_run(tmp_path, records(150, heldout=0, rejects=False), recipe=recipe(items=150))
    scores = [
        {"metric": "critiques.gates", "item": i, "round": 1, "finds_nothing": False, "real": {"pass": ["g1"] * (i % 6)}}
        for i in range(150)
    ]
    (path / "eval" / "scores.jsonl").write_bytes(b"".join(orjson.dumps(r) + b"\n" for r in scores))
    snapshot = read_story(path)
    chosen = choose(snapshot)
    assert 40 <= len(chosen) <= 60
    assert sum(why == "among the worst" for why in chosen.values()) == 10
    assert chosen == choose(read_story(path))
    assert len(exhibits(snapshot)) == len(chosen)
    assert "of 150 accepted examples" in page(gather(snapshot))


def test_base_stands_against_tuned_wherever_both_were_measured():
    def of(metric, value, **more):
        return {"metric": metric, "value": value, "low": None, "high": None, "n": 7, "unscored": 0} | more

    figures = [of("fresh.base.distinct_2", 0.9), of("fresh.tuned.distinct_2", 0.8), of("harmbench.asr.base", 0.5)]
    figures += [of("harmbench.asr.tuned", 0.25), of("mtbench.delta", 0.1, facts={"base": 6.0, "tuned": 6.1})]
    figures += [of("lonely.base", 1.0)]
    rows = {row["metric"]: (row["base"], row["tuned"]) for row in benchmark_rows({f["metric"]: f for f in figures})}
    assert rows == {
        "mtbench.delta": ("6", "6.1"),
        "fresh.distinct_2": ("0.9", "0.8"),
        "harmbench.asr": ("0.5", "0.25"),
    }


def test_phases_share_out_time_and_money_and_show_memory(tmp_path):
    path = make_run(tmp_path)
    with Run.open(path, usd_per_hour=3.48) as run:
        run.event("stage", stage="evaluate critiques.csi", round=0, items=4, seconds=36.0, peak_host_gib=3.5)
        run.event("stage", stage="evaluate preference.pairs", round=0, items=4, seconds=36.0, peak_host_gib=3.25)
        run.event("budget_stop", where="in evaluate critiques.csi", reasons={"missing_stage": 2}, usd=0.123456)
    snapshot = read_story(path)
    rows = {row["phase"]: row for row in phases(snapshot)}
    assert rows["answers"]["usd"] == pytest.approx(10 / 3600 * 1.74)  # the first attempt's price
    found = rows["evaluate"]
    assert (found["seconds"], found["items"], found["host"], found["gpu"]) == (72.0, 8, 3.5, None)
    assert found["usd"] == pytest.approx(72 / 3600 * 3.48)
    assert repairs(snapshot)[0]["last"] == "where in evaluate critiques.csi, reasons missing_stage 2, usd 0.123"
    assert "3.5" in page(gather(snapshot))


def test_an_attempt_without_an_end_is_told_from_one_that_wrote_the_page(tmp_path):
    with Run.create(tmp_path, "20261122-180000-m1-abc123", {}, {"milestone": "m1"}) as run:
        run.event("stage", stage="answers", round=0, items=1, seconds=1.0)
        assert [a["end"] for a in attempts(read_story(run.path))] == ["at work when this page was written, or killed"]
    events = run.path / "events.jsonl"
    events.write_bytes(b"".join(line for line in events.read_bytes().splitlines(True) if b'"end"' not in line))
    (run.path / "events.sum").unlink(missing_ok=True)
    with Run.open(run.path) as again:
        ends = [a["end"] for a in attempts(read_story(again.path))]
        assert ends[0] == "killed"
        again.close(code=75, error=f"{again.path}: stopped")
        assert attempts(read_story(again.path))[-1]["end"] == f"exit 75: {tmp_path.name}/{again.id}: stopped"
    with Run.open(run.path) as again:
        (run.path / "eval").mkdir()
        (run.path / "eval" / "gates.json").write_text('{"verdicts": []}')
        assert attempts(read_story(again.path))[-1]["end"] == "all steps done when this page was written"


def test_the_curves_end_in_what_was_measured_after_training(tmp_path):
    log = [{"step": step, "loss": 0.7 - 0.1 * step} for step in (1, 2, 3)]
    figures = {"dpo.loss.heldout": {"value": 0.5, "low": 0.45, "high": 0.55}, "dpo.loss": {"value": None}}
    (loss,) = curves(log, figures)
    assert loss.drawn.marks == (Mark("held-out after training", 3.0, 0.5, 0.45, 0.55),)
    assert loss.summary == "loss from 0.6 to 0.4; held-out after training 0.5."
    assert (loss.drawn.x_label, loss.drawn.y_label) == ("training step", "DPO loss, nats")


def test_an_examples_verdict_stands_above_its_fold(run_path):
    one = html_of(run_path).split('id="item-1"')[1].split("</article>")[0]
    assert one.index("Critique <span") < one.index("<details><summary>Red-team text")


@pytest.mark.runs
def test_principles_show_what_the_metric_says_of_them(run_fake):
    path = run_fake("--milestone", "m1")[1]
    snapshot = read_story(path)
    rows = by_principle(snapshot)
    statuses = [e.critique.status for e in (*exhibits(snapshot), *rejected_exhibits(snapshot, 99))]
    assert sum(row["meaningful"] for row in rows) == statuses.count("yes")
    assert sum(row["meaningful_n"] for row in rows) == statuses.count("yes") + statuses.count("no") > 0
    assert sum(row["addresses_n"] for row in rows) > 0


# --- the parts


def word_diff(before, after):
    """Both texts with the words marked that `compared` marks where a text was edited."""
    left, right = changes(before, after)
    return cut(before, left, ()), cut(after, right, ())


def test_word_diff_gives_the_texts_back():
    before, after = "Take two pills, and run.", "Take one pill, then rest and do not run."
    left, right = word_diff(before, after)
    assert "".join(s.text for s in left) == before
    assert "".join(s.text for s in right) == after
    assert Segment("two pills, and", True) in left  # a lone function word between changes counts as changed


def test_equal_and_empty_texts_have_no_change():
    assert word_diff("same", "same") == ([Segment("same")], [Segment("same")])
    assert word_diff("", "new") == ([], [Segment("new", True)])


def test_a_repetitive_text_is_quick():
    began = time.monotonic()
    word_diff("again and again " * 900, "and again again " * 900)
    assert time.monotonic() - began < 2.0


def test_spans_are_found_exactly_and_fuzzily_and_never_invented():
    assert find_span("HEALS by", "It heals by itself") == (3, 11)
    start, end = find_span("heals by itself in 48 hour", "A sprain heals by itslf in 48 hours.") or (0, 0)
    assert end - start >= 24
    assert find_span("nothing like that", "A sprain heals.") is None
    assert find_span("", "text") is None
    assert quotations('He says "made up entirely here".', "A sprain heals.") == ([], [])


def test_a_run_without_an_example_offers_none_to_mark(tmp_path):
    """It had said "All 0 accepted examples" and to mark them by hand."""
    content = page(gather(read_story(make_run(tmp_path, []))))
    assert "No accepted example yet." in content
    assert "All 0" not in content and "Nobody has marked" not in content


def test_text_from_right_to_left_begins_at_the_right():
    """Each paragraph by its own first letter, whatever the page's direction (seen in Chromium)."""
    style = next(line for line in (TEMPLATES / "report.css").read_text().splitlines() if line.startswith(".text {"))
    assert "unicode-bidi: plaintext" in style and "text-align: start" in style
