"""The first screen: a sentence that claims what was checked, tiles, one picture, one before and after, one example."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace

import pytest
from support.pages import item_rows, make_run, probe_rows, recipe, records

from cai.commands import cli
from cai.report import before_after, examples
from cai.report.charts import forest, pool_map
from cai.report.diff import compared, sentences
from cai.report.pages import gather, headline, page, write_pages
from cai.report.result import PHRASES, over_prompting, result
from cai.report.snapshot import read_story
from cai.report.tables import by_pool, by_principle


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    found = make_run(tmp_path_factory.mktemp("runs"), [*records(), *probe_rows()])
    write_pages(found)
    return found


@pytest.fixture(scope="module")
def story(path):
    return read_story(path)


@pytest.fixture(scope="module")
def html(path):
    return (path / "report.html").read_text()


def with_verdicts(story, *statuses):
    """The story with gates of these statuses, by metric."""
    rows = [
        {"metric": metric, "status": status, "reason": "", "criterion": {"at_least": 0.5}, "measured": None}
        for metric, status in statuses
    ]
    return replace(story, gates={"milestone": "m1", "enforced": True, "verdicts": rows})


def said(story):
    return result(story, headline(story), [])


def test_every_shipped_gate_has_its_words():
    from cai.recipe.load import Recipe

    gates = Recipe().gates
    wanted = {gate.metric for name in ("m0", "m1", "m2", "m3") for gate in gates.of(name, from_sft=True)}
    assert wanted <= set(PHRASES)


def test_the_sentence_says_what_passed_and_what_did_not_and_what_next(story):
    found = said(with_verdicts(story, ("critiques.meaningful", "FAIL"), ("dpo.loss_fall", "PASS")))
    assert found.sentence == "The pipeline works; too few critiques pass the checks of form."
    assert found.told[:2] == ["Passed: the loss falls.", "Not passed: too few critiques pass the checks of form."]
    assert found.told[2].startswith("Next: read these critiques")
    assert found.tag == "not passed, 1 of 2 gates met"


def test_too_few_is_no_failure_and_asks_for_more_items(story):
    found = said(with_verdicts(story, ("critic.recall", "UNDERPOWERED"), ("dpo.loss_fall", "PASS")))
    assert found.sentence == "The pipeline works; 1 of 2 gates could not be decided."
    assert "Too few to tell whether: the critic finds planted flaws." in found.told
    assert f"--resume {story.path.parent.name}/{story.run_id} --set items=6" in found.told[-1]


def failed(metric, *, reason="the value misses the criterion", status="FAIL", **measured):
    criterion = {"metric": metric, "at_least": 0.7}
    return {"metric": metric, "status": status, "reason": reason, "criterion": criterion, "measured": measured}


def test_what_failed_has_its_counts_and_its_worst_texts(story):
    """A 3 of 14 was told as "critiques do not pass", and "read these critiques" named none."""
    worst = [{"item": 3, "round": 0}, {"item": 3, "round": 1}]
    rows = [failed("critiques.meaningful", value=3 / 14, n=14, worst=worst), failed("dpo.loss_fall", value=-0.1, n=5)]
    found = said(replace(story, gates={"milestone": "m1", "enforced": True, "verdicts": rows}))
    assert "too few critiques pass the checks of form (3 of 14)" in found.told[0] and "fall." in found.told[0]
    assert next(line for line in found.told if line.startswith("Next")).endswith("The worst: item 3, item 3 (round 2).")


def test_a_figure_that_is_no_better_than_its_control_is_not_called_too_low(story):
    reason = "the control critiques.meaningful.shuffled has 0.8: ahead by 0.1, wanted 0.2"
    rows = [failed("critiques.meaningful", value=0.9, n=14, reason=reason)]
    found = said(replace(story, gates={"milestone": "m1", "enforced": True, "verdicts": rows}))
    assert found.sentence.endswith("critiques pass the checks of form, but hardly more than a control does.")


def test_what_was_not_decided_says_why_and_is_not_called_unmeasured_beside_its_figure(story):
    why = "1 of 3 unscored, more than 10%"
    rows = [failed("critic.false_alarms", status="UNMEASURED", reason=why, value=0.5, n=2), failed("dpo.loss_fall")]
    found = said(replace(story, gates={"milestone": "m1", "enforced": True, "verdicts": rows}))
    assert f"Not decided whether: the critic leaves sound answers alone ({why})." in found.told
    assert forest("Gates", rows, {}).drawn.gates[0].word == "not decided"
    assert forest("Gates", [failed("critic.recall", status="UNMEASURED")], {}).drawn.gates[0].word == "not measured"


def test_a_warning_stands_on_the_first_screen(story):
    found = said(replace(story, warnings=["the adapter barely moved: KL 0.0006; raise dpo.learning_rate"]))
    assert "Warning: the adapter barely moved: KL 0.0006." in found.told


def test_pairs_that_are_missing_are_told_with_what_was_wanted(story):
    rejects = len(story.pairs.rejects)
    assert said(story).tiles[0] == ("4", f"pairs from {4 + rejects} tries")
    more = replace(story, recipe=story.recipe.model_copy(update={"items": 9}))
    assert said(more).tiles[0] == ("4 of 10", f"pairs wanted, from {4 + rejects} tries")


def test_where_all_passed_the_telling_ones_are_named_and_the_next_milestone(story):
    gates = [(metric, "PASS") for metric in ("dpo.loss_fall", "critiques.meaningful", "revisions.addresses")]
    found = said(with_verdicts(story, *gates))
    assert found.sentence == (
        "All 3 gates passed: critiques pass the checks of form and revisions answer their critiques."
    )
    assert (found.tag, found.told[-1]) == ("passed, 3 of 3 gates met", "Next: make m2")


def test_the_command_for_more_items_can_be_pasted_as_it_stands(story):
    found = said(with_verdicts(story, ("dpo.loss_fall", "PASS"), ("critiques.meaningful", "UNDERPOWERED")))
    line = next(text for text in found.told if text.startswith("Next: more items: "))
    words = shlex.split(line.partition("python runner.py ")[2])
    assert words[-1] == f"items={2 * story.recipe.items}" and cli.parse(words).resume.endswith(story.run_id)


def test_a_gate_of_ones_own_is_named_by_its_metric(story):
    found = said(with_verdicts(story, ("labels.margin", "FAIL"), ("dpo.loss_fall", "PASS")))
    assert "labels.margin is not met" in found.sentence


def test_a_run_that_trained_nothing_does_not_claim_that_it_works(story):
    found = said(replace(with_verdicts(story, ("pairs.kept", "FAIL")), training={}))
    assert found.sentence.startswith("The pipeline did not get through; no pair came through")


def test_the_run_id_is_a_caption_and_the_result_the_headline(html, story):
    heading = re.search(r"<h1>(.*?)</h1>", html)[1]
    assert story.run_id not in heading and heading.startswith("The pipeline works")
    assert story.run_id in re.search(r'<p class="dim small kicker">(.*?)</p>', html)[1]
    first = html[html.index("<h1>") : html.index('<h2 id="verdicts">')]
    places = [first.index(text) for text in ('class="tiles"', "Next:", "<svg", "before and after", "One example")]
    assert places == sorted(places)
    assert first.count("<svg") == 2, "one forest plot, wide and for a phone"
    assert first.index("Harmful text.") > first.index('class="tag"')


def test_words_claim_what_was_checked(html):
    assert "meaningful: " not in html and "every check passed" not in html.lower()
    assert re.search(r"passes \d of \d checks of form|not scored", html)


def test_what_was_not_measured_is_not_listed(path):
    story = read_story(path)
    blank = {"metric": "preference.p1", "value": None, "n": 0, "unscored": 0, "note": "no held-out pair"}
    content = gather(replace(story, figures=story.figures | {"preference.p1": blank}))
    assert content["left_out"] == 1
    assert "preference.p1" not in [row["metric"] for row in content["figures"]]
    shown = page(content)
    assert "1 figure that m1 does not measure is not listed" in shown


def test_m0_draws_nothing(tmp_path, monkeypatch):
    """Drawing takes seconds, in each test that runs the pipeline too."""
    monkeypatch.setattr("cai.report.pages.inline", lambda *a: pytest.fail("M0 has nothing to draw"))
    path = make_run(
        tmp_path, records(1, heldout=0), recipe=recipe(milestone="m0", items=1), manifest={"milestone": "m0"}
    )
    write_pages(path)
    text = (path / "report.html").read_text()
    assert "<svg" not in text and "<h1>" in text


# --- before and after


def test_probes_stand_beside_each_other_and_red_team_ones_are_folded(html, story):
    found = before_after.probed(story.rows)
    assert [probe.id for probe in found] == ["boss", "same", "phone"]
    assert [probe.same for probe in found] == [False, True, False]
    section = html[html.index('<h2 id="probes">') : html.index('<h2 id="funnel">')]
    assert "2 of 3 answers changed" in section and "the same answer, word for word" in section
    folded = section[section.index("Red-team probe 3") :]
    assert folded.index("<details><summary>Red-team text") < folded.index("unlock")
    assert "<del>" in section and "<ins>" in section


def test_an_answer_that_ran_to_its_limit_is_marked_in_both_reports(tmp_path):
    """report.md showed 300 tokens of an answer as if it ended in mid-sentence."""
    rows = [row | ({"finish": "length"} if row["arm"] == "base" else {}) for row in probe_rows()]
    run = make_run(tmp_path, [*records(), *rows])
    write_pages(run)
    markdown, html = (run / "report.md").read_text(), (run / "report.html").read_text()
    assert markdown.count("Base (cut at the limit):") == 3 and markdown.count("\nTuned:") == 3
    assert "Base (cut at the limit)" in html and "Tuned (cut at the limit)" not in html


def test_the_loss_that_fell_stands_beside_the_one_on_held_out_pairs(story):
    figures = {"dpo.loss.heldout": {"metric": "dpo.loss.heldout", "value": 2.571, "n": 44}}
    found = replace(story, figures=figures, training={"first_loss": 0.693, "last_loss": 0.024, "steps": 100})
    assert ("0.69 \u2192 0.02", "DPO loss, 100 steps; 2.57 on held-out pairs") in said(found).tiles
    assert ("0.69 \u2192 0.02", "DPO loss, 100 steps") in said(replace(found, figures={})).tiles


def test_the_first_one_shown_is_benign_and_changed(story):
    found = before_after.probed(story.rows)
    assert before_after.first_shown(found).id == "boss"
    assert before_after.first_shown(found[1:]).id == "same"
    assert before_after.first_shown(found[2:]) is None


def test_of_two_adapters_the_last_ones_answers_are_shown(story):
    again = [row | {"round": 2, "text": "Another text altogether."} for row in probe_rows() if row["round"] == 1][:2]
    found = before_after.probed([*story.rows, *again])
    assert [probe.id for probe in found] == ["boss", "same"]
    assert "".join(s.text for s in found[0].both.after) == "Another text altogether."


def test_the_last_lines_mark_what_changed_and_fold_red_team(story):
    text = "\n".join(before_after.lines(before_after.probed(story.rows), "report.html"))
    assert "(2 of 3 answers changed; [-left out-], {+new+})" in text
    assert "[-sorry, but-]" in text and "{+afraid+}" in text and "both:" in text
    assert "unlock" not in text and "1 red-team probe, 1 answered otherwise: folded, read in report.html" in text
    assert before_after.lines([], "x") == []


def test_a_difference_far_on_in_two_long_answers_is_what_the_last_lines_show():
    """They showed 220 equal characters of both and called them different."""
    head = "I am here to help with anything that is about medicine, as far as I can. " * 5
    rows = [
        row | {"text": head + ("Ask a nurse." if row["arm"] == "base" else "See a doctor.")} for row in probe_rows()
    ]
    text = "\n".join(before_after.lines(before_after.probed(rows)[:1], "report.html"))
    shown = before_after.first_shown(before_after.probed(rows)).both
    assert all(side[0].text.startswith("…") and side[1].changed for side in (shown.before, shown.after))
    assert "[-Ask a nurse-]" in text and "{+See a doctor+}" in text and text.count("…") == 2


# --- by words, by sentence, not at all


def test_an_edited_text_is_marked_by_words():
    found = compared("Take two pills and rest for a week.", "Take one pill and rest for a week.")
    assert found.by == "words" and 0.1 < found.share < 0.6


def test_a_text_written_anew_is_marked_by_sentence():
    kept = "Ice helps."
    before = f"Run again after two days, there is nothing to fear from it at all. {kept}"
    after = f"{kept} A mild sprain needs weeks, so walk only once nothing hurts, and ask somebody who knows."
    found = compared(before, after)
    assert found.by == "sentences" and found.share > 0.6
    assert [s.text.strip() for s in found.before if not s.changed and s.text.strip()] == [kept]
    assert [s.text.strip() for s in found.after if not s.changed and s.text.strip()] == [kept]
    assert "".join(s.text for s in found.before) == before and "".join(s.text for s in found.after) == after


def test_where_no_sentence_stayed_nothing_is_marked():
    found = compared("The cat sat on a mat. It slept.", "Compound interest grows quickly! Save early.")
    assert found.by == "nothing" and not any(s.changed for s in (*found.before, *found.after))


def test_equal_texts_have_share_zero():
    assert compared("One. Two.", "One. Two.").share == 0.0


def test_sentences_end_at_signs_and_lines():
    text = 'First one. "Second!" Third\n- a list\n- 3.5 mm wide'
    assert [text[a:b] for a, b in sentences(text)] == ["First one.", '"Second!"', "Third", "- a list", "- 3.5 mm wide"]


# --- examples and principles


def test_examples_are_found_by_principle_pool_and_verdict_without_scripts(html, story):
    shown = examples.exhibits(story)
    choices = examples.filters(shown)
    assert [choice.name for choice in choices][:2] == ["principle", "pool"]
    assert "<select" in html and "<script" not in html
    for one in shown:
        classes = examples.classes(one, choices).split()
        assert f"pool-{one.pool}" in classes and sum(name.startswith("principle-") for name in classes) == 2
        assert f'<article class="example {" ".join(classes)}" id="item-{one.item}"' in html
    for choice in choices:
        for name, _ in choice.options:
            assert f'#by-{choice.name} option[value="{name}"]:checked) .example:not(.{name})' in html


def test_the_principle_table_leads_to_its_examples(html):
    table = html[html.index('<h2 id="principles">') : html.index('<h2 id="figures">')]
    links = re.findall(r'<a href="#(principle-\d+)">([\w-]+)</a>', table)
    assert [name for _, name in links] == ["honesty", "no-harm"]
    for target, _ in links:
        assert f'class="only" id="{target}"' in html and f"#{target}:target) .example:not(.{target})" in html


def test_principles_by_pool_are_counted_and_drawn(story):
    pools, rows = by_pool(story)
    assert pools == ("benign", "redteam")
    used = sum(row["stage"] == "critiques" and row["status"] == "ok" for row in story.rows)
    assert sum(hits for row in rows for hits, _ in row["cells"]) == used
    chart = pool_map("Pools", pools, rows)
    assert chart.drawn.columns == ("benign", "red-team") and "honesty: benign" in chart.summary
    assert pool_map("Pools", ("benign",), rows) is None


def test_judged_better_is_a_column_where_labels_were_checked(tmp_path):
    label = {"first": 1.0, "second": -1.0, "margin": 1.0, "used": ["honesty"]}
    rows = [*item_rows(0), *item_rows(2)]
    from support.pages import row

    rows += [row("labels", 0, 0, "", **label), row("labels", 2, 0, "", **(label | {"first": -1.0}))]
    found = by_principle(read_story(make_run(tmp_path, rows, recipe=recipe(items=3))))
    assert sum(one["better"] for one in found) == 1 and sum(one["better_n"] for one in found) == 2


def test_a_column_of_empty_cells_is_left_out(html):
    funnel = html[html.index('<h2 id="funnel">') : html.index('<h2 id="training">')]
    assert "ran to the limit" not in funnel


def test_the_sentence_says_ahead_behind_and_undecided():
    def figure(arm, value, low, high):
        return {f"preference.over.{arm}.length_controlled": {"value": value, "low": low, "high": high, "n": 50}}

    found = (
        figure("few_shot", 0.7, 0.56, 0.81)
        | figure("constitution", 0.5, 0.37, 0.63)
        | figure("best_of_n", 0.2, 0.1, 0.3)
    )
    said = over_prompting(found)
    assert "70% of 50 (95% 56% to 81%) against the base that is shown pairs of this run" in said
    assert "which decides nothing) against the base that is given the principles" in said
    assert "which is less) against the best of several" in said
    assert over_prompting({}) == ""


def test_an_sft_stage_is_advised_where_a_base_models_answers_do_not_end():
    from types import SimpleNamespace

    from cai.report.result import sft_advised

    def told(value, form="base", start="base"):
        recipe = SimpleNamespace(model=SimpleNamespace(format=form), dpo=SimpleNamespace(start=start))
        figures = {"fresh.tuned.stops": {"value": value, "n": 40}}
        return sft_advised(SimpleNamespace(figures=figures, recipe=recipe, training={"seconds": 600.0}))

    assert "25% of the tuned model's 40 fresh answers end by themselves" in told(0.25)
    assert "--set dpo.start=sft" in told(0.25) and "about half of the 10 min" in told(0.25)
    assert told(0.95) == told(None) == told(0.25, form="chat") == told(0.25, start="sft") == ""


def test_where_no_critique_found_anything_no_revision_is_shown(tmp_path):
    """The unchanged answer stood there as a revision, "passed" or "not scored"."""
    keep = recipe(items=1, rounds=1, critiques=recipe().critiques.model_copy(update={"no_issue": "keep"}))
    rows = [
        one for one in item_rows(0, rounds=1, critique="No issue: all of it is right.") if one["stage"] != "revisions"
    ]
    path = make_run(tmp_path, rows, recipe=keep)
    write_pages(path)
    markdown, html = (path / "report.md").read_text(), (path / "report.html").read_text()
    assert "No revision: the critique found nothing, the text stays." in markdown and "\nRevision:" not in markdown
    assert "None: the critique found nothing, the text stays." in html
    assert 'Revision <span class="tag nothing">none</span>' in html
