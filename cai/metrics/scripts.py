"""What a word is in every script: combining marks, scripts without spaces; and whether the rules know a language.

Owns the ranges of Unicode and the few words that tell a language. Python's `\\w` leaves out combining marks, so that it
cuts Hindi, Tamil, Thai and vowelled Arabic at every vowel sign. Pure.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

# Combining marks (categories Mn, Mc, Me) of the Basic Multilingual Plane as ranges; letters in between are in them
# too. tests/metrics/test_scripts.py holds them against unicodedata, which takes 0.1 s to ask at every start.
MARKS = (
    "\u0300-\u036f\u0483-\u0489\u0591-\u05bd\u05bf\u05c1-\u05c2\u05c4-\u05c5\u05c7\u0610-\u061a\u064b-\u065f\u0670"
    "\u06d6-\u06dc\u06df-\u06e8\u06ea-\u06ed\u0711-\u074a\u07a6-\u07b0\u07eb-\u07f3\u07fd\u0816-\u082d\u0859-\u085b"
    "\u0898-\u089f\u08ca-\u08e1\u08e3-\u0903\u093a-\u0963\u0981-\u0983\u09bc-\u09e3\u09fe-\u0a03\u0a3c-\u0a75"
    "\u0a81-\u0a83\u0abc-\u0ae3\u0afa-\u0b03\u0b3c-\u0b63\u0b82\u0bbe-\u0bd7\u0c00-\u0c04\u0c3c-\u0c63\u0c81-\u0c83"
    "\u0cbc-\u0d03\u0d3b-\u0d4d\u0d57-\u0d63\u0d81-\u0d83\u0dca-\u0df3\u0e31-\u0e3a\u0e47-\u0e4e\u0eb1-\u0ecd"
    "\u0f18-\u0f19\u0f35\u0f37\u0f39\u0f3e-\u0f3f\u0f71-\u0f84\u0f86-\u0fbc\u0fc6\u102b-\u103e\u1056-\u109d"
    "\u135d-\u135f\u1712-\u1734\u1752-\u1773\u17b4-\u17d3\u17dd\u180b-\u180d\u180f\u1885-\u18a9\u1920-\u193b"
    "\u1a17-\u1a1b\u1a55-\u1a7f\u1ab0-\u1ace\u1b00-\u1b04\u1b34-\u1b44\u1b6b-\u1b73\u1b80-\u1bad\u1be6-\u1bf3"
    "\u1c24-\u1c37\u1cd0-\u1cd2\u1cd4-\u1cf9\u1dc0-\u1dff\u20d0-\u20f0\u2cef-\u2cf1\u2d7f\u2de0-\u2dff\u302a-\u302f"
    "\u3099-\u309a\ua66f-\ua672\ua674-\ua67d\ua69e-\ua69f\ua6f0-\ua6f1\ua802-\ua827\ua82c\ua880-\ua881\ua8b4-\ua8c5"
    "\ua8e0-\ua8f1\ua8ff-\ua92d\ua947-\ua953\ua980-\ua983\ua9b3-\ua9c0\ua9e5\uaa29-\uaa4d\uaa7b-\uaa7d\uaab0-\uaac1"
    "\uaaeb-\uaaef\uaaf5-\uaaf6\uabe3-\uabea\uabec-\uabed\ufb1e\ufe00-\ufe0f\ufe20-\ufe2f"
)
JOINERS = "\u200c\u200d"  # within a word of Persian or Hindi
# Kana and ideographs, Thai, Lao, Myanmar, Khmer: written without spaces
NO_SPACES = (
    "\u3005-\u3007\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e01-\u0e2f\u0e32-\u0e46\u0e81-\u0ec6"
    "\u1000-\u109f\u1780-\u17b3"
)


def word_of(leaving_out: str = "") -> str:
    """The pattern of one word: letters, digits and the marks that belong to them. `leaving_out`: signs of no word."""
    return rf"(?:[^\W{leaving_out}]++[{MARKS}]*+(?:[{JOINERS}](?=\w))?+)++"


def composed(text: str) -> str:
    """NFC: an accent or a Hangul syllable is the same whether its file wrote one sign or several."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


KNOWN_SCRIPTS = ("LATIN", "CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "IDEOGRAPHIC", "FULLWIDTH", "HALFWIDTH")
LANGUAGES = {  # in Latin script: a few of the commonest words; first those whose refusals are known
    "English": "a an the of to in is are my i me you your how what why which who when where can do does for and with "
    "write explain give tell make this it or not on at from that be",
    "Spanish": "el la los las de que en un una como por para con es mi tu se qué cómo cuál dónde puedo y del hacer",
    "French": "le la les des du de et est une je un mon ma comment pourquoi quel dans pour avec sur ce que qui au en",
    "German": "der die das und ist ich ein eine wie was warum mein meine mir mit für auf im den dem zu kann nicht in",
    "Portuguese": "o a os as de do da em um uma como por para com é meu minha quais qual e que não no na",
    "Italian": "il lo la gli di che un una come perché mio mia per con quale sono è del della nel in",
    "Swedish": "jag du är det en ett att och i på för med som inte hur vad varför min mitt kan av till när",
    "Danish": "jeg du er det en et at og i på for med som ikke hvordan hvad hva hvorfor min mit kan af til når",
    "Dutch": "ik je is het een de en van in op voor met dat niet hoe wat waarom mijn kan aan te zijn waar",
    "Polish": "ja to jest w z na do i nie się jak co dlaczego mój moja mi czy dla jaki jakie gdzie od",
    "Czech": "já to je v z na do a se jak co proč můj moje mi pro jaký jaké kde není mám si",
    "Turkish": "ben bir bu ve için ile nasıl ne neden benim mi mı da de bana hangi nerede yaz olan",
    "Indonesian": "saya yang di dan untuk dengan bagaimana apa mengapa ini itu dari ke cara tidak bisa adalah buat",
    "Vietnamese": "tôi là và của có không cho làm thế nào một ở như với được các tại sao hãy viết cách",
    "Romanian": "eu un o este și de la în cu pentru cum ce care mea meu să nu pe din sunt unde",
    "Finnish": "minä on ja ei miten mikä mitä miksi minun voin se että kun missä kuinka olen tai",
    "Hungarian": "én egy a az és hogyan mi miért nem van hogy meg egyik milyen kell ki hol vagy",
}  # fmt: skip
WORDS_OF = {name: frozenset(text.split()) for name, text in LANGUAGES.items()}
KNOWN = ("English", "Spanish", "French", "German", "Portuguese", "Italian")
ENGLISH = re.compile(r"\b(?:the|how|what|why|my|is|are|you|your|of|and|write)\b", re.IGNORECASE)
LATIN_WORDS = 4  # a shorter text tells no language
NO_WORD = "no common word"
TOLD_SHARE = 0.1  # of the requests: below, a strange line is not worth a word


def unknown_language(text: str) -> str:
    """The script of a text in which no refusal is known ("Latin" for another language in it); "" where one may be.

    `NO_WORD`: a text in plain letters with no common word of any of these languages.
    """
    if text.isascii() and (len(text.split()) < LATIN_WORDS or ENGLISH.search(text)):
        return ""  # nearly every request of most files
    scripts = Counter(unicodedata.name(sign, "?").split()[0] for sign in text if sign.isalpha())
    if not scripts:
        return ""
    most = scripts.most_common(1)[0][0]
    if most not in KNOWN_SCRIPTS:
        return most.capitalize()
    own = re.findall(word_of(), composed(text).lower())
    if most != "LATIN" or len(own) < LATIN_WORDS:
        return ""
    hits = {name: sum(word in some for word in own) for name, some in WORDS_OF.items()}
    best = max(hits, key=lambda name: (hits[name], name in KNOWN))
    if not hits[best] and text.isascii():
        return NO_WORD
    return "" if best in KNOWN and hits[best] else "Latin"


def language_note(texts: Iterable[str]) -> str:
    """The line that says in how many requests a refusal would not be seen; "" where nearly all languages are known."""
    found = [unknown_language(text) for text in texts]
    if 2 * found.count(NO_WORD) <= len(found):  # "Compare trains, buses, planes"
        found = ["" if name == NO_WORD else name for name in found]
    unknown = Counter(name for name in found if name)
    if not unknown or unknown.total() < TOLD_SHARE * len(found):
        return ""
    most = [name for name, _ in unknown.most_common(4)]
    names = ", ".join(dict.fromkeys("others in Latin script" if name in ("Latin", NO_WORD) else name for name in most))
    return (
        f"{unknown.total():,} of {len(found):,} requests are in a language whose refusals the rules do not know "
        f"({names}; known: English, Spanish, Portuguese, Italian, French, German, Chinese, Japanese): "
        "a benign request that is declined can become a chosen text, and figures about refusals count none of these"
    )
