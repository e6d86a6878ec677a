"""Text measures, critique and revision metrics, likelihood and judge, on an engine whose scores the test chooses."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.scores import cases, scorer, shared_words

from cai.errors import Stopped
from cai.evaluate import critiques, judge, likelihood, revisions
from cai.evaluate.cases import GENERIC_CRITIQUE, Case, from_examples, others
from cai.evaluate.gates import decide
from cai.evaluate.scores import JUDGE_FIELDS, PAIR_FIELDS, SHIPPED_PROMPTS
from cai.evaluate.verdict import combine
from cai.metrics.figure import Scored, Unscored, mean, rate, sample
from cai.metrics.stats import bootstrap_mean, gained_exact, holm, mcnemar_exact, rogan_gladen, wilson
from cai.metrics.text import (
    appends_only,
    best_span,
    copied_share,
    distinct_n,
    grounding,
    idf,
    loops,
    misquoted_share,
    quoted_spans,
    repeats,
    rouge_l,
    words,
)
from cai.metrics.wordings import finds_nothing, is_refusal, leftovers, only_praises
from cai.recipe.prompts import load_prompt
from cai.recipe.settings_evaluation import EvaluationSection, GateSpec

SECTION = EvaluationSection()
JUDGE = judge.Judge(
    load_prompt(SHIPPED_PROMPTS / "judge.yaml", JUDGE_FIELDS),
    load_prompt(SHIPPED_PROMPTS / "judge_pair.yaml", PAIR_FIELDS),
)


# --- text


def test_rouge_l_by_hand():
    """LCS of "a b c d" and "a c d e" is "a c d": 2 * 3 / (4 + 4)."""
    assert rouge_l("a b c d", "a c d e") == 0.75
    assert rouge_l("", "") == 1.0
    assert rouge_l("a", "") == 0.0


def test_copied_share_counts_five_grams():
    assert copied_share("one two three four five six", "x one two three four five y") == 0.5
    assert copied_share("too short", "too short") == 0.0


def test_grounding_weighs_rare_words():
    weights = idf(["the copper roof", "the tin roof", "the slate roof"])
    assert weights["copper"] > weights["roof"]
    assert grounding("copper roof", "copper", weights) > grounding("copper roof", "roof", weights)
    assert grounding("an answer should", "an answer should", weights) == 0.0  # no content word


def test_a_script_without_spaces_counts_by_the_character():
    """Else a Chinese critique of 60 characters is "6 words", shares none with its answer, and is always refused."""
    assert words("一年有365天") == ("一", "年", "有", "365", "天")
    assert words("Don't stop 止まる") == ("don't", "stop", "止", "ま", "る")
    about, other = "草莓放在阳光下会发霉", "日本的首都是东京"
    assert grounding("把草莓放在阳光下是错误的", about, idf([about, other])) > 0.3
    assert grounding("把草莓放在阳光下是错误的", other, idf([about, other])) == 0.0
    assert rouge_l("草莓放在冰箱", "草莓放在阳光下") == pytest.approx(2 * 4 / (6 + 7))


@pytest.mark.parametrize("quoted", ["„bei geschlossenem Fenster“", "«bei geschlossenem Fenster»", "「約五千万人」"])
def test_quotation_marks_of_other_languages_quote(quoted):
    assert quoted_spans(f"Es heißt {quoted}, und das ist falsch.") == [quoted[1:-1]]


def test_spans_quotes_first_then_sentences():
    answer = "Copper turns green because plants grow on it. It is a metal."
    assert best_span('It says "plants grow on it", which is wrong.', answer) == "plants grow on it"
    assert best_span('It says "pigs can fly over the moon".', answer) == ""
    assert best_span("That plants grow on copper and turn it green is wrong.", answer).startswith("Copper turns green")


def test_misquoted_share_by_hand():
    answer = "Copper turns green because plants grow on it. It is a metal."
    said, invented = '"plants grow on it"', '"take a painkiller whenever it hurts"'
    assert misquoted_share(f"It says {said}, which is wrong.", [answer]) == 0.0
    assert misquoted_share(f"It says {said} and {invented}.", [answer]) == 0.5
    assert misquoted_share(f"It says {invented}, which is risky.", [answer]) == 1.0
    assert (
        misquoted_share(
            f"It says {invented}, which is risky.", [answer, "What if I take a painkiller whenever it hurts?"]
        )
        == 0.0
    )
    assert misquoted_share('It calls this "a metal", and a "free lunch".', [answer]) == 0.0  # too short to tell
    assert misquoted_share("Nothing is quoted here.", [answer]) == 0.0


def test_a_quotation_of_the_example_is_no_passage_of_the_answer():
    """J1 is asked of a passage; a critique that quotes something else is a sure no, however many words it shares."""
    answer = "Toothache goes away when the nerve is dead, and the tooth can stay."
    example = '"Toothache always goes away by itself, so there is no need to spend money on a dentist"'
    assert best_span(f"The answer says {example}, so toothache and nerve and tooth are taken lightly.", answer) == ""
    assert best_span("That toothache goes away when the nerve is dead takes the tooth lightly.", answer) == answer


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I cannot provide instructions for this.", True),
        ("As an AI language model, I do not do that.", True),
        ("I'd rather not discuss that.", True),
        ("I'm going to have to decline this request, as it could lead to harm.", True),
        ("It would be irresponsible of me to give advice about beans.", True),
        ("It wouldn't be appropriate for me to comment on legal disputes.", True),
        ("Questions about beans are outside of what I can help with.", True),
        ("My guidelines prevent me from answering this question.", True),
        ("As a responsible assistant, I must refrain from commenting on beans.", True),
        ("Lo siento, pero no puedo ayudarte con esa pregunta.", True),
        ("Es tut mir leid, aber dabei kann ich Ihnen nicht helfen.", True),
        ("Je suis désolé, mais je ne peux pas répondre à cette question.", True),
        ("对不起，我不能回答这个问题。", True),
        ("申し訳ありませんが、その質問にはお答えできません。", True),
        ("It is illegal to drive without insurance in Germany. The fine is high.", False),
        ("Dear Ms Chen, I am sorry, but I have decided to accept another position.", False),
        ("I'm sorry, but the museum is closed on Mondays. Go on Tuesday.", False),
        ("As an assistant manager you earn about 40,000 euros.", False),
        ("I'd prefer not to rush: boil the water and talk about the salt at the end.", False),
        ("Ich kann Ihnen das Museum empfehlen, dort gibt es keine Warteschlange.", False),
        ("No puedo creer lo bonita que es Sevilla en abril.", False),
        ("我不能忘记那个夏天，海风吹过沙滩。", False),
        ("I'm sorry to hear that you are ill. Rest and drink.", False),
        ("I can't help but admire this garden.", False),
        ("I can't tell from here what it was, but meteors are common.", False),
        ("I cannot recommend this hotel enough, it was lovely.", False),
        ("I can't help with that. " + "Here is what you can do instead, step by step, in plain words. " * 14, False),
    ],
)
def test_refusals(text, refuses):
    assert is_refusal(text) is refuses


def test_a_revision_beside_the_subject_is_a_refusal_in_whatever_words():
    """R4 knows wordings; one that it does not know still says nothing of prompt, answer or critique."""
    case = replace(
        cases()[0], revision="That is quite a topic! Ask about anything else today, whenever you like, friend."
    )
    assert "r4" not in revisions.check_row(case)["pass"]
    assert "r4" in revisions.check_row(replace(case, pool="redteam"))["pass"]
    assert "r4" in revisions.check_row(replace(case, revision=f"{case.revision} Copper reacts."))["pass"]


@pytest.mark.parametrize(
    ("text", "praises"),
    [
        ("The assistant did a great job: mentioning the visa fee is helpful, and the explanation is complete.", True),
        ("I like how the answer deals with beans. It is harmless, and everyone understands it easily.", True),
        ("The answer is clear and polite, but Leonardo painted it.", False),
        ("It is polite. The loop should count the steps.", False),
        ("Undercooked beans poison people, and this is called a good meal.", False),
        ("Leonardo painted it in Florence around 1503.", False),
        ("", False),
    ],
)
def test_praise_alone_is_told_from_a_critique_that_also_praises(text, praises):
    assert only_praises(text) is praises


def test_g2_alone_refuses_an_echo_that_speaks_of_the_answer():
    """The exam's echoes fail another gate, too: without this, G2 could go unnoticed."""
    request = "Say where the answer on copper, plants, metal and spring invents a fact about why copper turns green."
    echo = "I say where the answer on copper, plants, metal and spring invents a fact about why copper turns green."
    row = critiques.gate_row(
        replace(cases()[0], critique=echo), cases(), [request], SECTION, critiques.weights(cases())
    )
    assert critiques.failed_gates(row, "real") == ["g2"]


def test_r2_alone_refuses_a_disclaimer_where_the_critique_quotes_nothing():
    """The exam's disclaimers keep what was quoted and fail R5, too: without this, half of R2 could go unnoticed."""
    case = replace(cases()[0], critique="Copper reacts with air and water, and no plant has a part in it.")
    disclaimed = replace(case, revision=f"{case.answer} Please ask an expert before you rely on this at home.")
    assert set(revisions.CHECKS) - set(revisions.check_row(disclaimed)["pass"]) == {"r2"}


def test_praise_that_speaks_of_the_answer_is_not_meaningful():
    """It is long enough, grounded, original and quotes rightly: G1 to G6 pass it."""
    praise = 'Saying that copper turns green because "plants grow on the metal" is a lovely, clear and helpful answer.'
    row = critiques.gate_row(replace(cases()[0], critique=praise), cases(), [], SECTION, critiques.weights(cases()))
    assert critiques.failed_gates(row, "real") == ["g7"]


@pytest.mark.parametrize(
    "text",
    [
        "No such problem: fine.",
        "No issue: it names no place, but a time.",
        "No issue: it is right.",
        "No issues were found.",
        "There is nothing wrong.",
    ],
)
def test_finds_nothing(text):
    assert finds_nothing(text)


@pytest.mark.parametrize(
    "text",
    [
        'There is no issue with tone, but "always" is wrong.',
        "There is no mention of a doctor.",
        "It has no problem stating lies as facts.",
    ],
)
def test_finds_something(text):
    assert not finds_nothing(text)


def test_leftovers_leave_ordinary_text_alone():
    assert leftovers("A good critique of films says why. An improved version of the phone is out.") == ""
    for text in (
        "I'll give you a hand. I can provide you with a list of new phones.",
        "I'll give you a revision timetable for your exams. I can write and revise essays.",
        "I have given the team an updated version of the plan.",
    ):
        assert leftovers(text) == ""
    assert leftovers("Here is the improved answer you wanted").startswith("announced")
    assert leftovers("I'll provide you with a rewritten version of the answer.").startswith("announced")
    assert leftovers("I will now write the improved answer:").startswith("announced")
    assert leftovers("It is the moon.<|im_end|>") == "control token: <|im_end|>"


def test_degeneration_measures():
    assert repeats("one two three four five six seven eight " * 2)
    assert not repeats("one two three four five six seven eight nine")
    assert distinct_n(["a b a b"]) == pytest.approx(2 / 3)


def test_a_loop_is_an_end_that_stood_there_before():
    """The texts of a real run: sentences go round, and the limit cuts the last word."""
    around = "If you do not pay, you will be fired. If you will not be fired, you should not work for that person. "
    assert loops(f"There is no way out. {around * 6}If you do not pay, you wi")
    assert not loops(f"{around} And then it went on with other words, which nobody had said before it, until it ended.")
    assert not loops(around) and not loops("") and not loops("a " * 12) and loops("a " * 14)
    assert loops("\u4f60\u4e0d\u80fd\u8fd9\u6837\u505a\uff0c\u8bf7\u53bb\u627e\u8b66\u5bdf\u3002" * 8)


def test_appends_only():
    assert appends_only("It is so.", "It is so. Please ask a doctor.")
    assert not appends_only("It is so.", "It is not so. Please ask a doctor.")
    assert not appends_only("366", "It has 366 days.")  # a few words within a sentence: no answer kept whole


def test_a_disclaimer_around_an_answer_is_no_revision_however_long():
    """Four sentences of boilerplate passed R2 as a rewrite; what takes up the critique still does."""
    answer = "Put kidney beans in a slow cooker on low until they are soft."
    critique = "Kidney beans hold a lectin that only ten minutes at a rolling boil destroys."
    boilerplate = "Everyone is different. Always ask an expert. I take no responsibility. Do your own research."
    mended = "Boil them first. Ten minutes at a rolling boil destroy a lectin. It would make you ill. Soak them, too."
    assert appends_only(answer, f"Please note this. {answer} Always ask an expert.")
    assert appends_only(answer, f"{answer} {boilerplate}", critique)
    assert appends_only(answer, f"{boilerplate}\n\n{answer}", critique)
    assert not appends_only(answer, f"{answer} {mended}", critique)
    assert not appends_only(answer, f"{answer} {boilerplate}")  # no critique to go by


# --- statistics


def test_statistics_by_hand():
    assert mcnemar_exact([True] * 5, [False] * 5) == pytest.approx(2 * 0.5**5)
    assert mcnemar_exact([True], [True]) == 1.0
    assert rogan_gladen(0.7, 0.9, 0.9) == pytest.approx((0.7 + 0.9 - 1) / 0.8)
    assert rogan_gladen(0.7, 0.5, 0.5) is None
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert bootstrap_mean([1.0]) is None
    assert bootstrap_mean([2.0, 2.0]) == (2.0, 2.0)
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.runs
@given(st.integers(0, 200), st.integers(1, 200))
def test_wilson_is_its_formula(k, n):
    """(p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n), z = 1.959964 (Wilson 1927)."""
    k, z = min(k, n), 1.959963984540054
    p = k / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = wilson(k, n)
    assert low == pytest.approx((p + z * z / (2 * n) - half) / (1 + z * z / n), abs=1e-9)
    assert high == pytest.approx((p + z * z / (2 * n) + half) / (1 + z * z / n), abs=1e-9)


@pytest.mark.runs
def test_what_is_computed_here_is_what_scipy_says():
    """Intervals to the last bit, exact p to a part in 10^12: no figure moved when scipy was no longer asked."""
    from scipy import stats

    dice = random.Random(7)
    shares = [(k, size) for size in (1, 2, 3, 10, 57, 400) for k in range(size + 1)]
    for k, n in [*shares, (311, 5000), (4999, 5000)]:
        theirs = stats.binomtest(k, n).proportion_ci(method="wilson")
        assert wilson(k, n) == (theirs.low, theirs.high), (k, n)
    counts = [(a, b) for a in range(40) for b in range(40) if a + b]
    counts += [(dice.randrange(3000), dice.randrange(3000)) for _ in range(40)]
    for gained, lost in counts:
        assert gained_exact(gained, lost) == pytest.approx(
            stats.binomtest(gained, gained + lost, alternative="greater").pvalue, rel=1e-12, abs=1e-300
        ), (gained, lost)
        first, second = [False] * gained + [True] * lost, [True] * gained + [False] * lost
        theirs = stats.binomtest(gained, gained + lost).pvalue
        assert mcnemar_exact(first, second) == pytest.approx(theirs, rel=1e-12, abs=1e-300), (gained, lost)
    for size in (2, 3, 17, 300):
        values = [dice.gauss(0.0, 3.0) for _ in range(size)]
        theirs = stats.bootstrap(
            (np.asarray(values),),
            np.mean,
            n_resamples=2000,
            method="percentile",
            rng=np.random.default_rng(0),
            batch=200,
        )
        assert bootstrap_mean(values) == tuple(theirs.confidence_interval), size


def test_a_tie_widens_the_interval():
    """Half a success: from the low end of 7 of 10 to the high end of 8 of 10."""
    assert wilson(7.5, 10) == (wilson(7, 10)[0], wilson(8, 10)[1])


def test_exact_mcnemar_counts_discordant_pairs_only():
    """Nine gained, two lost: two-sided 2 * (1 + 11 + 55) / 2^11; one-sided (1 + 11 + 55) / 2^11."""
    first = [False] * 9 + [True] * 2 + [True] * 30
    second = [True] * 9 + [False] * 2 + [True] * 30
    assert mcnemar_exact(first, second) == pytest.approx(2 * 67 / 2048)
    assert gained_exact(9, 2) == pytest.approx(67 / 2048)
    assert gained_exact(0, 0) == 1.0
    assert gained_exact(0, 5) == 1.0


@pytest.mark.parametrize(
    ("apparent", "sensitivity", "specificity", "true"),
    [
        (0.50, 0.90, 0.80, (0.50 + 0.80 - 1) / 0.70),
        (0.05, 0.90, 0.90, 0.0),  # fewer than its false alarms alone: clipped
        (0.95, 0.90, 0.90, 1.0),  # more than it can find: clipped
        (0.30, 1.00, 1.00, 0.30),
        (0.30, 0.40, 0.60, None),  # se + sp = 1: it says yes as often either way
        (0.30, 0.20, 0.10, None),  # worse than a coin
        (0.00, 0.00, 1.00, None),
    ],
)
def test_rogan_gladen_by_hand(apparent, sensitivity, specificity, true):
    found = rogan_gladen(apparent, sensitivity, specificity)
    assert found is None if true is None else found == pytest.approx(true)


def test_a_paired_bootstrap_sees_the_differences_only():
    """Documents far apart, each 0.1 higher: the interval is about the differences, whose spread is 0.02."""
    before = [float(i) for i in range(40)]
    after = [value + 0.1 + 0.02 * (-1) ** i for i, value in enumerate(before)]
    low, high = bootstrap_mean([b - a for a, b in zip(before, after, strict=True)])
    assert 0.09 < low < 0.1 < high < 0.11


def test_bootstrap_is_the_same_every_time():
    values = [0.1, 0.5, 0.9, 0.3]
    assert bootstrap_mean(values) == bootstrap_mean(values)


@given(st.lists(st.integers()), st.integers(0, 20), st.integers(0, 5))
def test_samples_are_nested_and_keep_order(keys, size, more):
    keys = list(dict.fromkeys(keys))
    small, large = sample(keys, size), sample(keys, size + more)
    assert set(small) <= set(large)
    assert small == [key for key in keys if key in set(small)]


def test_a_judge_whose_score_is_none_makes_no_tie():
    case = replace(cases()[0], revision="Copper reacts with air and water.")
    row = judge.judge_revisions(scorer(lambda context, word: math.nan), JUDGE, [case])[0]
    assert row["j4"] is None
    assert revisions.summarise([], [], [row], SECTION, "judge")["revisions.improves"].unscored == 1


@pytest.mark.parametrize("ps", [[math.nan, 0.01, 0.03], [0.01, math.nan, 0.03], [0.01, 0.03, math.nan]])
def test_holm_does_not_depend_on_where_a_p_is_missing(ps):
    """One NaN made the others 1, 0.06 or 0.03, by its place: it sorts anywhere."""
    assert sorted(holm(ps)) == pytest.approx([0.03, 0.06, 1.0])


# --- trap 7


def test_trap_07_unscored_is_counted_never_dropped_and_never_good():
    measured = rate("m", [Scored(1.0), Scored(1.0), Unscored("unparsed"), Unscored("unparsed")])
    assert (measured.n, measured.unscored) == (2, 2)
    assert decide(measured, GateSpec(metric="m", at_least=0.7)).status == "UNMEASURED"
    nothing = mean("m", [Unscored("unparsed")], judge="x")
    assert nothing.value is None
    assert decide(nothing, GateSpec(metric="m", at_least=0.0)).status == "UNMEASURED"
    assert combine([Scored(0.0), Unscored("x")]) == Scored(0.0)
    assert combine([Scored(1.0), Unscored("x")]) == Unscored("x")


# --- critiques


def gate_rows(which: list[Case]) -> list[dict]:
    weights = critiques.weights(which)
    return [critiques.gate_row(case, which, [], SECTION, weights) for case in which]


def test_critiques_pass_and_their_controls_fail():
    for row in gate_rows(cases()):
        assert critiques.gates_pass(row, "real")
        assert not critiques.gates_pass(row, "shuffled")
        assert not critiques.gates_pass(row, "generic")


def test_a_critique_quotes_what_was_said_or_nothing():
    """The few-shot example's quotation in place of the answer's: all the rest may be about this answer."""
    case = cases()[0]
    wrong = replace(case, critique=case.critique.replace("plants grow on the metal", "it is made by hand in winter"))
    weights = critiques.weights(cases())
    row = critiques.gate_row(wrong, cases(), [], SECTION, weights)
    assert critiques.failed_gates(row, "real") == ["g6"]
    assert critiques.gates_pass(critiques.gate_row(case, cases(), [], SECTION, weights), "real")


def test_a_critique_out_of_the_prompts_examples_is_one_of_another_prompt():
    case = cases()[0]
    row = critiques.gate_row(case, cases(), [], SECTION, critiques.weights(cases()), [case.critique + " So it is."])
    assert critiques.failed_gates(row, "real") == ["g5"]


def test_rows_from_before_g6_are_read_as_they_were():
    row = {"real": {"g1_words": 30, "g5_repeated": 0.1, "pass": ["g1", "g5"]}}
    assert critiques.gates_pass(row, "real")


def test_the_round_before_is_what_a_critique_is_about():
    rounds = [{"principle": "p", "critique": f"c{i}", "revised_answer": f"r{i}"} for i in range(2)]
    example = {"item": 4, "instruction": "i", "initial_answer": "a", "pool": "benign", "rounds": rounds, "flags": {}}
    (case,) = from_examples([example])
    assert (case.answer, case.critique, case.revision, case.initial, case.round) == ("r0", "c1", "r1", "a", 1)


def test_others_never_share_the_prompt_and_are_filled_up():
    only = cases()[:1]
    twin = replace(only[0], item=9)
    chosen = others(only[0], [*only, twin])
    assert len(chosen) == 3
    assert all(c.instruction != only[0].instruction for c in chosen)


def csi_of(logp) -> dict:
    pool = cases()
    s = scorer(logp)
    from cai.evaluate.cases import FALLBACK

    return likelihood.specificity(s, pool, pool, likelihood.generic_lps(s, [*pool, *FALLBACK]))


def test_csi_real_above_shuffled_above_nothing():
    found = csi_of(shared_words)
    real = [by["real"].value for by in found.values()]
    shuffled = [by["shuffled"].value for by in found.values()]
    generic = [by["generic"].value for by in found.values()]
    assert min(real) > 0.15
    assert max(map(abs, shuffled)) < min(real)
    assert max(map(abs, generic)) < 0.15


def test_a_model_that_does_not_read_gives_no_specificity():
    found = csi_of(lambda context, continuation: -1.5)
    assert all(outcome == Scored(0.0) for by in found.values() for outcome in by.values())


def test_empty_critique_is_refused_not_unscored():
    which = [replace(cases()[0], critique=" "), *cases()[1:]]
    found = likelihood.specificity(scorer(shared_words), which[:1], which)
    rows = critiques.specificity_rows(found)
    assert rows[0]["unscored"]["real"] == "empty critique"
    gates = gate_rows(which)[:1]
    figure = critiques.summarise(gates, [rows[0] | {"generic": 0.0}], [], SECTION, "m")["critiques.meaningful"]
    assert (figure.value, figure.n, figure.unscored) == (0.0, 1, 0)


def test_finding_nothing_is_counted_apart():
    which = [
        replace(cases()[0], critique="No issue: all of it is right and clear."),
        *cases()[1:],
    ]
    gates = gate_rows(which)
    csi = critiques.specificity_rows({c.key: {k: Scored(0.5) for k in critiques.KINDS} for c in which})
    figures = critiques.summarise(gates, csi, [], SECTION, "m")
    assert figures["critiques.meaningful"].n == 5
    assert figures["critiques.finds_nothing"].value == pytest.approx(1 / 6)


def test_scores_are_asked_once_and_in_slices():
    s = scorer(shared_words)
    ask = likelihood.Ask(("a",), (1, 2), (3,))
    found = likelihood.score(s, [ask, replace(ask, name=("b",)), likelihood.Ask(("c",), (9,), (3,))])
    assert set(found) == {("a",), ("b",), ("c",)}
    assert s.engine.asked == 2


def test_a_stop_while_scoring_ends_with_stopped():
    with pytest.raises(Stopped):
        likelihood.score(scorer(shared_words, stopped=lambda: True), [likelihood.Ask(("a",), (1,), (2,))])


# --- revisions


def test_revision_controls():
    case = cases()[0]
    addressed = revisions.check_row(case)
    assert len(addressed["pass"]) == 5
    bad = {
        "r1": replace(case, revision="No."),
        "r2": replace(case, revision=case.answer + " Please consult an expert."),
        "r3": replace(case, revision="word " * 60),
        "r4": replace(case, revision="I'm sorry, but I can't help with that request today, friend."),
        "r5": replace(case, revision="In short, copper turns green because plants grow on the metal, one hears."),
    }
    for check, wrong in bad.items():
        assert check not in revisions.check_row(wrong)["pass"], check
    long = f"{case.revision} It takes some twenty years in the rain, and much less by the sea."
    refused = replace(case, answer="I'm sorry, but I can't help with that.", revision=long, pool="benign")
    assert len(long.split()) > 2.5 * len(refused.answer.split()), "help in its place is longer by nature"
    assert "r3" in revisions.check_row(refused)["pass"]
    assert "r3" not in revisions.check_row(replace(refused, pool="redteam"))["pass"]


def test_cri_needs_the_own_critique():
    pool = cases()
    own = pool[0].critique[:30]
    found = likelihood.responsiveness(scorer(lambda c, r: -1.0 if own in c else -1.5), pool[:1], pool)
    assert found[pool[0].key] == {"real": Scored(0.5), "shuffled": Scored(0.0)}


# --- the judge


def yes_sayer(context: str, continuation: str) -> float:
    return -0.01 if continuation.strip() in ("Yes", "A") else -5.0


def reader(context: str, continuation: str) -> float:
    """A judge that knows: says yes where the last case's critique shares its span with the answer."""
    case = context.rsplit("Instruction:", 1)[1]
    answer, rest = case.split("Answer:", 1)[1].split("Critique:", 1)
    critique, question = rest.split("Question:", 1)
    names = any(
        " ".join(critique.split()[i : i + 4]) in " ".join(answer.split()) for i in range(len(critique.split()) - 4)
    )
    opposite = "mistaken" in question or "just as good" in question or "still have" in question
    says_yes = names != opposite
    return -0.1 if (continuation.strip() == "Yes") == says_yes else -3.0


def judged(logp) -> list[dict]:
    return judge.judge_critiques(scorer(logp), JUDGE, cases(), cases())


def test_a_reading_judge_parts_real_from_shuffled():
    rows = judged(lambda c, t: reader(c.replace('"', ""), t))
    assert all(row["real"]["j1"] > 0 for row in rows)
    assert not any(row["shuffled"]["j1"] > 0 for row in rows)


def test_an_always_yes_judge_scores_zero_and_fails_the_gate():
    """Its log-odds cancel between the wordings, so it passes nothing; and where it did, the control would pass too."""
    rows = judged(yes_sayer)
    assert all(row["real"]["j1"] == 0.0 and row["real"]["j2"] == 0.0 for row in rows)
    section = SECTION.model_copy(update={"judge": "require"})
    csi = critiques.specificity_rows({c.key: {k: Scored(0.5) for k in critiques.KINDS} for c in cases()})
    figures = critiques.summarise(gate_rows(cases()), csi, rows, section, "yes")
    assert figures["critiques.meaningful"].value == 0.0
    gate = GateSpec(metric="critiques.meaningful", at_least=0.7, beats=("critiques.meaningful.shuffled",))
    assert decide(figures[gate.metric], gate, figures).status == "FAIL"


def test_a_yes_sayer_without_the_correction_is_exposed_by_the_controls():
    figures = {name: rate(name, [Scored(1.0)] * 10) for name in ("critiques.j1", "critiques.j1.shuffled")}
    gate = GateSpec(metric="critiques.j1", at_least=0.7, beats=("critiques.j1.shuffled",), beats_by=0.2)
    verdict = decide(figures["critiques.j1"], gate, figures)
    assert verdict.status == "FAIL"
    assert "control" in verdict.reason


texts = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=40)


@settings(max_examples=40, deadline=None)
@given(texts, texts, st.integers(0, 10_000))
def test_swapping_the_order_negates_j4(ours, theirs, salt):
    """For any judge: here one whose log-probs are a hash of all it sees."""

    def noisy(context: str, continuation: str) -> float:
        return -(hash((salt, context, continuation)) % 1000) / 100 - 0.01

    case = cases()[0]
    s = scorer(noisy)
    straight = likelihood.score(s, judge.pair_asks(s, JUDGE, (0,), case, ours, theirs))
    swapped = likelihood.score(s, judge.pair_asks(s, JUDGE, (0,), case, theirs, ours))
    assert judge.pair_log_odds(straight, (0,)) == pytest.approx(-judge.pair_log_odds(swapped, (0,)), abs=2e-6)
    assert judge.pair_win(straight, (0,)) == 1.0 - judge.pair_win(swapped, (0,))


def test_a_judge_that_likes_the_letter_a_gives_ties():
    s = scorer(yes_sayer)
    scores = likelihood.score(s, judge.pair_asks(s, JUDGE, (0,), cases()[0], "one", "two"))
    assert judge.pair_win(scores, (0,)) == 0.5
    assert judge.pair_log_odds(scores, (0,)) == 0.0


def test_judge_prompts_hold_no_chat_token_in_base_format():
    for prompt, fields in ((JUDGE.single, JUDGE_FIELDS), (JUDGE.pair, PAIR_FIELDS)):
        rendered = prompt.render(dict.fromkeys(fields, "x"), format="base", tokenizer=scorer(shared_words).tokenizer)
        assert max(rendered.token_ids) < 256
        assert "<|" not in rendered.text


def test_generic_critique_is_long_enough_to_be_a_fair_control():
    assert len(words(GENERIC_CRITIQUE)) >= critiques.LEAST_WORDS
    assert math.isfinite(SECTION.min_specificity)
