"""Words in every script, one text in two encodings, and languages whose refusals the rules do not know."""

from __future__ import annotations

import itertools
import re
import time
import unicodedata

import pytest
from rapidfuzz import fuzz

from cai.data.near import NearDuplicates, in_order, normalise
from cai.metrics.scripts import MARKS, language_note, unknown_language
from cai.metrics.text import content_words, rouge_l, span_match, words

HINDI = (
    "मेरी बेटी अगले महीने परीक्षा देने वाली है और वह गणित से बहुत डरती है, उसके लिए पढ़ाई की एक योजना बनाइए।",
    "हमारे मोहल्ले में तीन हफ़्तों से कचरा नहीं उठाया गया है, नगर निगम को एक विनम्र पत्र लिखिए।",
    "मैं पहली बार अकेले ट्रेन से जयपुर जा रहा हूँ, मुझे बताइए कि वहाँ क्या देखना चाहिए।",
)
TAMIL = (
    "என் மகள் அடுத்த மாதம் தேர்வு எழுதப் போகிறாள், அவளுக்கு ஒரு திட்டம் தயாரித்துக் கொடுங்கள்.",
    "எங்கள் தெருவில் மூன்று வாரங்களாகக் குப்பை அள்ளப்படவில்லை, ஒரு கடிதம் எழுதுங்கள்.",
)


def test_the_ranges_of_marks_are_those_of_unicode() -> None:
    mark = re.compile(f"[{MARKS}]")
    for code in itertools.chain(range(0x300, 0xD800), range(0xF900, 0x10000)):
        sign = chr(code)
        kind = unicodedata.category(sign)
        if kind.startswith("M"):
            assert mark.fullmatch(sign), f"U+{code:04X} is a mark and in no range"
        elif mark.fullmatch(sign):  # a range may run over letters and what is not assigned, never over punctuation
            assert kind[0] in "LN" or kind == "Cn" or sign.isalnum(), f"U+{code:04X} {kind}"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("घर पर रोटी नहीं", ("घर", "पर", "रोटी", "नहीं")),
        ("என் மகள்", ("என்", "மகள்")),
        ("كَيْفَ أَصْنَعُ", ("كَيْفَ", "أَصْنَعُ")),
        ("שָׁלוֹם עוֹלָם", ("שָׁלוֹם", "עוֹלָם")),
        ("می‌روم", ("می‌روم",)),
        ("it's naïve", ("it's", "naïve")),
        ("ข้าวผัด", ("ข้า", "ว", "ผั", "ด")),
        ("炒饭 yes", ("炒", "饭", "yes")),
    ],
)
def test_marks_belong_to_their_word(text: str, wanted: tuple[str, ...]) -> None:
    assert words(text) == wanted


def test_words_that_differ_in_a_vowel_sign_differ() -> None:
    assert words("नहीं") != words("नहा") and rouge_l("मैं नहीं जाता", "मैं नहा जाता") < 1


@pytest.mark.parametrize(
    "text",
    [
        "Tôi không thể giúp bạn việc đó",
        "L'été à la plage, déjà vu",
        "도와드릴 수 없습니다",
        "كَيْفَ أَصْنَعُ خُبْزًا",
        "ばびぶべぼ",
    ],
)
def test_one_text_in_two_encodings_is_one_text(text: str) -> None:
    apart = unicodedata.normalize("NFD", text)
    assert apart != text and rouge_l(text, apart) == 1.0 and content_words(text) == content_words(apart)
    assert span_match(text, f"... {apart} ...") == 1.0
    assert NearDuplicates([text], 0.99).nearest(apart) == 1.0


@pytest.mark.parametrize("texts", [HINDI, TAMIL])
def test_unrelated_requests_of_a_script_with_marks_are_as_far_apart_as_english_ones(texts: tuple[str, ...]) -> None:
    for a, b in itertools.combinations(texts, 2):
        assert (
            fuzz.ratio(in_order(normalise(a)), in_order(normalise(b))) < 60
        )  # English 52 to 54; cut at marks: 74 to 79


def test_texts_without_a_word_are_compared_by_their_signs() -> None:
    known = NearDuplicates(["👩‍🍳🍞❓", "🚲🔧❓", "???"], 0.8)
    assert known.nearest("👨‍👩‍👧‍👦🏖️❓") == 0.0 and known.nearest("!!!") == 0.0
    assert known.nearest("🚲🔧❓") == 1.0 and known.nearest("? ? ?") == 1.0


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Как починить кран на кухне?", "Cyrillic"),
        ("كيف أصلح صنبور المطبخ؟", "Arabic"),
        ("घर पर रोटी कैसे बनाऊँ?", "Devanagari"),
        ("부엌 수도꼭지를 어떻게 고치나요?", "Hangul"),
        ("Πώς φτιάχνω μια βρύση;", "Greek"),
        ("Jag behöver hjälp att laga en kran i köket", "Latin"),
        ("Tôi muốn nấu phở bò ở nhà thì làm thế nào?", "Latin"),
        ("Bagaimana cara memperbaiki keran yang bocor?", "Latin"),
        ("How do I fix a tap?", ""),
        ("Wie repariere ich einen tropfenden Hahn?", ""),
        ("Como conserto uma torneira em casa?", ""),
        ("怎样修水龙头？", ""),
        ("蛇口の直し方は？", ""),
        ("🚲🔧❓", ""),
    ],
)
def test_languages_whose_refusals_are_not_known(text: str, wanted: str) -> None:
    assert unknown_language(text) == wanted


def test_a_strange_line_among_many_is_no_news_and_a_file_of_them_is() -> None:
    english, russian = ["How do I fix a tap?"] * 19, "Как починить кран на кухне?"
    assert language_note([*english, russian]) == ""
    assert language_note(["Compare trains, buses, planes", *english]) == ""
    note = language_note([*english[:3], russian])
    assert note.startswith("1 of 4 requests are in a language whose refusals the rules do not know (Cyrillic; known: ")


def test_words_take_time_in_proportion_to_the_text() -> None:
    text = "a" * 200_000 + "\u0301" * 200_000 + "'" * 200_000
    began = time.process_time()
    words(text)
    assert time.process_time() - began < 1
