"""Lists of requests that a person calls plain are read as they stand; tables without a header never are.

Each case is a file: sentences with commas, tabs, numbers, quotation marks, code, verse, in several languages. The line
between the two is drawn by what stands around a delimiter, never by how often it occurs.
"""

from __future__ import annotations

import pytest

from cai.errors import CaiError
from cai.recipe.intake import instructionfile

PLAIN = {
    "one comma each": [
        "When milk turns sour, can it still be used?",
        "If a tyre is flat, how do I change it?",
        "After a run, what should I eat?",
    ],
    "two commas each": [
        "Compare tea, coffee, and cocoa.",
        "Compare oak, pine, and birch.",
        "Describe Rome, Athens, and Cairo.",
    ],
    "names first": ["Marie Curie, who was she?", "Alan Turing, who was he?", "Ada Lovelace, who was she?"],
    "vocatives": ["Please, tell me a joke.", "Well, what is a quark?", "Now, explain gravity."],
    "quotations first": ['"Carpe diem", what does it mean?', '"Sapere aude", who said it?', '"Cogito", what follows?'],
    "quotations last": ['Explain "break the ice".', 'Explain "spill the beans".', 'Explain "bite the bullet".'],
    "quotations inside": ['She said "no", so what now?', 'He wrote "yes", so what next?', 'They sang "oh", but why?'],
    "dialogue": [
        '"Stay," she said. Go on with the story.',
        '"Leave," he said. Go on with the story.',
        '"Why," they asked. Go on with the story.',
    ],
    "curly quotes": [
        "What does “touché” mean, and where is it from?",
        "What does “kitsch” mean, and where is it from?",
    ],
    "german quotes": [
        "Was heißt „Fernweh“, und woher kommt das Wort?",
        "Was heißt „Heimat“, und woher kommt das Wort?",
    ],
    "guillemets": ["Que veut dire « dépaysement », et d'où vient-il ?", "Que veut dire « flâner », et d'où vient-il ?"],
    "thousands": ["What is 3,000 plus 4,500?", "What is 1,200 minus 900?", "How far is 10,000 m in miles?"],
    "decimal commas": ["Ist 3,5 mehr als 3,45?", "Ist 1,2 mehr als 1,19?"],
    "sequences": ["2, 4, 8, 16: what comes next?", "1, 1, 2, 3: what comes next?", "3, 6, 9, 12: what comes next?"],
    "years first": ["1984, who wrote it?", "2001, who directed it?", "1917, what happened then?"],
    "numbers first": ["3 ways to boil an egg", "10 gifts for a gardener", "5 games for a rainy day"],
    "times first": ["10:30 or 11:00, which is the better hour to meet?", "7:15 or 8:00, which train is fuller?"],
    "money": ["Is $1,500 too much for a sofa?", "Is €2,300 too much for a bike?"],
    "dates": ["What happened on July 4, 1776?", "What happened on May 8, 1945?", "What happened on June 6, 1944?"],
    "letters": ["Dear Anna, thank you for the vase. Answer this note.", "Dear Tom, I can't come. Answer this note."],
    "calls": ["What does f(a,b) return?", "What does g(x,y) return?", "What does max(1,2) return?"],
    "lists in code": ["What is the sum of [1,2,3]?", "What is the sum of [4,5,6]?"],
    "json asked about": ['Is {"a": 1} valid JSON?', 'Is {"b": [1]} valid JSON?', "What is JSON?"],
    "for loops": ["What does for(i=0;i<n;i++) do?", "What does for(j=9;j>0;j--) do?"],
    "statements": ["What does `x = 1; y = 2` do?", "What does `a += 1; b -= 1` do?"],
    "sql": ["SELECT a, b FROM t: what does it return?", "SELECT c, d FROM u: what does it return?"],
    "sql insert": ["INSERT INTO t VALUES (1): what does it do?", "How do I undo an INSERT?"],
    "regex": ["What does a|b match?", "What does c|d match?", "What does x|y match?"],
    "pipes": ["What does ls | wc -l print?", "What does cat f | sort do?", "What does ps | head show?"],
    "paths": ["What is in /etc/hosts on Linux?", "What is in C:\\Windows\\System32?"],
    "urls": ["What does https://example.org/?a=1&b=2 mean as an address?", "Is http://localhost:8000 safe?"],
    "python": ["def f(x): return x: what is f(2)?", "lambda a, b: a + b, explain it."],
    "docstrings": ['What does """ mean in Python?', "How do I write a comment in C?"],
    "brackets": ["What is a[0] of a = [1, 2]?", "What is b[1] of b = [3, 4]?"],
    "markdown inside": [
        "Turn *this* into HTML.",
        "Turn **that** into HTML.",
        "What does `code` look like in Markdown?",
    ],
    "latex inside": ["Solve $x^2 = 9$, and check it.", "Solve $2x = 8$, and check it."],
    "equations": ["x + y = 5, x - y = 1: solve it.", "a + b = 9, a - b = 3: solve it."],
    "poem first lines": [
        "Go on: Two roads met in a wood,",
        "Go on: The fog came in on quiet feet,",
        "Go on: I wandered by the grey canal,",
    ],
    "slashed poem": [
        "Roses are red / violets are blue / finish the poem",
        "The sea is wide / the night is long / finish the poem",
    ],
    "semicolons": ["Write a haiku; make it sad.", "Write a limerick; make it clean.", "Write a fable; end it well."],
    "colons": [
        "Translate into French: good morning",
        "Translate into Latin: good night",
        "Summarise: the tortoise and the hare",
    ],
    "dashes": ["Tea or coffee - which has more caffeine?", "Cats or dogs - which live longer?"],
    "em dashes": ["Honey—does it ever spoil?", "Salt—does it ever spoil?"],
    "parentheses": ["Explain osmosis (briefly, for a child).", "Explain inertia (briefly, for a child)."],
    "lower case": ["how do i boil rice", "what is a quark", "tell me a story about a fox"],
    "mixed case": [
        "How do I get a red wine stain out of a white shirt",
        "what is rust",
        "can dogs eat grapes",
        "Why is the sky blue in the daytime and red in the evening",
    ],
    "capitals": ["HOW DO I RESET MY ROUTER", "WHY IS MY BILL SO HIGH", "WHERE IS MY PARCEL"],
    "one word": ["Photosynthesis", "Gravity", "Democracy"],
    "two words": ["Explain gravity", "Define entropy", "Describe osmosis"],
    "chinese": ["为什么天空是蓝色的，而晚霞是红色的？", "怎么煮米饭，才不会粘锅？"],
    "japanese": ["なぜ空は青いのですか、教えてください。", "ご飯の炊き方を、教えてください。"],
    "arabic": ["لماذا السماء زرقاء، ولماذا يحمر الغروب؟", "كيف أطبخ الأرز، من دون أن يلتصق؟"],
    "hindi": ["आसमान नीला क्यों है, और शाम लाल क्यों?", "चावल कैसे पकाएँ, ताकि चिपके नहीं?"],
    "spanish": ["¿Por qué el cielo es azul, y el ocaso rojo?", "¡Cuéntame un chiste, por favor!"],
    "emoji": ["What does 🙏 mean, thanks or a prayer?", "What does 🙃 mean, joy or irony?"],
    "indented by tabs": ["\tWhat is rust?", "\tWhy do cats purr?", "\tHow are bells cast?"],
    "tabs at the end": ["What is rust?\t", "Why do cats purr?\t"],
    "a tab inside one": ["Put a tab between a\tb and explain it.", "What is a tab?"],
    "indented by spaces": ["   What is rust?", "   Why do cats purr?"],
    "grouped questions": ["What is rust?", "What is verdigris?", "", "Why do cats purr?", "Why do dogs bark?"],
    "hashtags inside": ["What does #throwback mean, and who began it?", "Is C# older than F#?"],
    "mail and handles": ["Is a@b.c a valid address?", "What does @ mean in a handle?"],
    "typed without spaces": [
        "Why do cats purr when stroked,and why do lions not?",
        "Why do bees hum in flight,and why do moths not?",
    ],
    "apostrophes": [
        "'Twas brillig: what does it mean?",
        "What's 'til short for?",
        "Don't bees, like wasps, sting twice?",
    ],
    "brackets first": ["(a + b)^2: expand it.", "(x - y)^2: expand it."],
    "with a greeting": ["Hi! Can you, in one line, explain rain?", "Hey! Can you, in one line, explain snow?"],
    "long": [
        "I have a balcony that faces north, gets two hours of sun in summer and is windy: which herbs will grow there?",
        "I have three hours in Lisbon, a small child, and rain: where should we go?",
    ],
    "one line": ["Why is the sky blue, and the sunset red?"],
    "percent": ["Is 5% of 80 more than 4?", "Is 10% off, then 10% on, the same price?"],
    "ellipsis": ["Once upon a time, in a small village... go on.", "Far away, behind the hills... go on."],
    "plus and equals": ["Why is 0.1 + 0.2 == 0.3 false in Python?", "Why is NaN != NaN true?"],
    "html asked about": ["What is the difference between <b> and <strong>?", "When do I use <div>, when <span>?"],
    "version numbers": ["Python 3.11, what is new in it?", "Java 21, what is new in it?"],
    "ratios": ["Mix 1:2 or 1:3, which mortar is stronger?", "Mix 2:1 or 3:1, which syrup is sweeter?"],
    "words without spaces": ["Sort red,green,blue by wavelength.", "Sort oak,elm,ash by height."],
    "yes or no": ["Yes or no: is rain wet?", "Yes or no, is ice cold?"],
    "who said": ['Who said: "I think, therefore I am"?', 'Who said: "I came, I saw, I won"?'],
    "companies": ["Write a tagline for Acme, Inc.", "Write a slogan for Beta, Ltd."],
    "questions in groups, long": [
        "What is rust?",
        "Is it poisonous?",
        "",
        "Why do cats purr?",
        "Do lions purr, too?",
        "",
        "What is a quark?",
    ],
}
MARKED = {  # marks of a list are taken off
    "word list, tabs": (
        ["1.\tWhat is rust?", "2.\tWhy do cats purr?", "3.\tHow are bells cast?"],
        ["What is rust?", "Why do cats purr?", "How are bells cast?"],
    ),
    "word bullets, tabs": (["•\tWhat is rust?", "•\tWhy do cats purr?"], ["What is rust?", "Why do cats purr?"]),
    "brackets and tabs": (["1)\tWhat is rust?", "2)\tWhy do cats purr?"], ["What is rust?", "Why do cats purr?"]),
    "dash list": (
        ["- What is rust, and why?", "- Why do cats purr, and how?"],
        ["What is rust, and why?", "Why do cats purr, and how?"],
    ),
}
TABLES = {
    "question,label": ["How do I fix a tap?,home", "Why is the sky blue?,science", "What is a quark?,physics"],
    "label,question": ["home,How do I fix a tap?", "science,Why is the sky blue?"],
    "lower label,question": ["bicycle theft,how do I prevent it?", "water damage,how do I repair it?"],
    "id,question": ["1,How do I fix a tap?", "2,Why is the sky blue?"],
    "id space question": ["1, How do I fix a tap?", "2, Why is the sky blue?", "3, What is rust?"],
    "id from 0": ["0,How do I fix a tap?", "1,Why is the sky blue?"],
    "quoted": ['"How do I fix a tap, cheaply?","home"', '"Why is the sky blue, really?","science"'],
    "quoted with spaces": ['"How do I fix a tap, cheaply?", "home"', '"Why is the sky blue, really?", "science"'],
    "half quoted": ['"How do I fix a tap, cheaply?",home', '"Why is the sky blue, really?",science'],
    "tsv": ["How do I fix a tap?\thome", "Why is the sky blue?\tscience"],
    "tsv question answer": [
        "How do I fix a tap?\tTurn off the water first.",
        "Why is the sky blue?\tBlue light scatters more.",
    ],
    "tsv id": ["1\tHow do I fix a tap?", "2\tWhy is the sky blue?"],
    "tsv three": ["1\tHow do I fix a tap?\thome", "2\tWhy is the sky blue?\tscience"],
    "semicolons": ["How do I fix a tap?;home", "Why is the sky blue?;science"],
    "pipes": ["How do I fix a tap?|home", "Why is the sky blue?|science"],
    "pipes spaced id": ["1 | How do I fix a tap?", "2 | Why is the sky blue?"],
    "question,answer": [
        "How do I fix a tap?,Turn off the water first.",
        "Why is the sky blue?,Blue light scatters more.",
    ],
    "question,flag": ["How do I fix a tap?,0", "How do I break a lock?,1"],
    "no marks": ["fix a tap,home", "pick a lock,crime", "bake bread,kitchen"],
    "three": ["fix a tap at home,home,easy", "pick a lock at night,crime,hard"],
    "other header": ["title,body", "Taps,How do I fix a tap?"],
    "header of others": ["Category\tSentence", "home\tHow do I fix a tap?"],
    "repeated label": ["animals at home,why do cats purr all day?", "animals at home,why do dogs bark at night?"],
    "float": ["How do I fix a tap?,0.75", "Why is the sky blue?,0.5"],
    "date": ["2024-01-01,How do I fix a tap?", "2024-01-02,Why is the sky blue?"],
}


def read(lines: list[str], end: str = "\n") -> list[str]:
    return [one.text for one in instructionfile.read((end.join(lines) + end).encode(), "mine.txt").requests]


@pytest.mark.parametrize("lines", PLAIN.values(), ids=PLAIN)
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["unix", "windows"])
def test_a_plain_list_is_read_as_it_stands(lines: list[str], end: str) -> None:
    assert read(lines, end) == [line.strip() for line in lines if line.strip()]


@pytest.mark.parametrize(("lines", "wanted"), MARKED.values(), ids=MARKED)
def test_a_lists_marks_are_taken_off(lines: list[str], wanted: list[str]) -> None:
    assert read(lines) == wanted


@pytest.mark.parametrize("lines", TABLES.values(), ids=TABLES)
def test_a_table_without_a_header_for_requests_is_refused(lines: list[str]) -> None:
    """Its labels and answers would be trained on as requests."""
    with pytest.raises(CaiError, match=r"a table|quoted texts|in quotes") as refused:
        read(lines)
    assert "\n" not in str(refused.value)
