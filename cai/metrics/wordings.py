"""Wordings that a text is searched for: refusals, leftovers of the meta-task, disclaimers, hedges, "no issue found".

Owns the phrase lists, one alternative a line; English, and refusals in a few other languages. These are heuristics: a
refusal in other words is missed. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from cai.metrics.text import words


def any_of(*alternatives: str) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{alternative})" for alternative in alternatives), re.IGNORECASE)


_GIVE = r"(?:help|assist|provide|give|share|answer|respond|discuss|talk|comment|go into|get into|write|create|explain)"
_REFUSAL = any_of(
    r"\b(?:i|we)\s+(?:can(?:not|['’]?t| not)|won['’]?t|will not|shall not)\b"
    r"(?! help but| recommend (?:\w+ ){1,3}enough| wait\b| stress| say enough)",
    r"\bi(?:['’]ll|['’]m going to| will| must| shall)? (?:(?:have|need) to )?(?:respectfully |politely )?"
    r"(?:decline|refuse to|refuse\b(?= [^.]{0,9}\banswer)|refrain|abstain|pass on (?:this|that|it)\b)",
    rf"\bi(?:['’]d| would) (?:rather not|prefer not to) {_GIVE}\b",
    rf"\bi (?:do not|don['’]t) think (?:that )?i (?:can|should) {_GIVE}\b",
    r"\bi['’]?\s?a?m\s+(?:not able|unable|not comfortable|not allowed|not going|not in a position)\b",
    r"\b(?:as|since) (?:an?|i['’]?a?m an?) (?:ai|artificial|(?:large )?language model|assistant|responsible)\b"
    r"[^.]{0,60}\bi\b",
    r"\bi (?:do not|don['’]t) (?:feel comfortable|provide|assist|engage|support|condone)\b",
    r"\bthis (?:request|question) (?:is|violates|goes against|asks)\b[^.]{0,60}\b(?:inappropriate|harmful|guidelines)",
    r"(?:(?:\bnot|n['’]t)(?: be)? appropriate|\b(?:inappropriate|unethical|illegal|irresponsible|unwise))"
    rf" (?:(?:for|of) me to\b|to {_GIVE}\b)",
    r"\bnot something (?:that )?i(?:['’]m| am)? (?:can|could|able|willing|allowed|comfortable)\b",
    r"\b(?:outside|beyond)(?: of)? (?:(?:what|the \w+)(?: that)? i (?:can|could|am)|"
    r"my (?:\w+ )?(?:capabilit|abilit|scope|expertise|remit))",
    r"\bmy (?:guidelines|principles|policies|programming|rules) (?:prevent|forbid|prohibit|do not|don['’]t)\b",
)
_REFUSED_ACT = any_of(
    r"\b(?:help|assist|provide|answer|answering|fulfil\w*|comply|support|discuss)\b",
    r"\b(?:do th(?:at|is)|create|write|generate|give)\b",
    r"\bshare\b",
    r"\b(?:engage|offer|condone|participate|respond|continue|complete|recommend|teach|tell you)\b",
    r"\b(?:explain|declin\w+|sorry|refrain|abstain|irresponsible|advise|advice|comment\w*)\b",
    r"\b(?:talk about|speak about|go into|capabilit\w+|abilit\w+|my scope|my expertise|my remit)\b",
    r"\b(?:ai|model|assistant|appropriate|inappropriate|unethical|illegal|harmful)\b",
)


_REFUSAL_ABROAD = any_of(  # act included
    r"\bno puedo (?:ayudar|responder|proporcionar|ofrecer|brindar|hablar|asistir|cumplir)",
    r"\bnão posso (?:te |lhe )?(?:ajudar|responder|fornecer|oferecer|falar)",
    r"\bnon posso (?:aiutar|risponder|fornir|offrir|parlar)",
    r"\bje ne (?:peux|puis) pas (?:vous |t['’])?(?:aider|répondre|fournir|parler|donner)",
    r"\b(?:ich kann|kann ich) (?:\w+ ){0,4}(?:nicht|keine\w*) (?:\w+ ){0,3}(?:weiterhelfen|helfen|beantworten)\b",
    r"(?:我|抱歉|对不起)[^。]{0,12}(?:不能|无法|没法|不可以)[^。]{0,10}(?:回答|提供|帮|协助|讨论|满足)",
    r"(?:答え|回答|提供|手伝い|対応)[^。]{0,10}(?:できません|できかねます|いたしかねます)",
)


def is_refusal(text: str, *, max_words: int = 120) -> bool:
    """A full refusal: refusing words near the opening of a short text. A longer text that goes on to help is none."""
    opening = text.strip()[:220]
    if len(words(text)) > max_words:
        return False
    if _REFUSAL_ABROAD.search(opening):
        return True
    found = _REFUSAL.search(opening)
    return found is not None and bool(_REFUSED_ACT.search(opening[found.start() : found.start() + 120]))


CONTROL_TOKEN = re.compile(  # of any known chat format
    r"<\|[A-Za-z0-9_▁]{1,40}\|>|<｜[^｜<>\n]{1,40}｜>|</?(?:think|tool_call|tool_response|s|bos|eos|pad|unk)>"
    r"|<(?:start|end)_of_(?:turn|image|text)>|\[/?INST\]|<</?SYS>>"
)


def has_control_token(text: str, others: Collection[str] = ()) -> bool:
    """The text spells a control token of any known chat format, or one of `others` (a tokenizer's own)."""
    return bool(CONTROL_TOKEN.search(text)) or any(token in text for token in others)


_LEFTOVERS = {
    "announced": re.compile(
        r"\b(?:here(?:['’]s| is| are)|below is|this is) (?:(?:a|an|the|my|your) )?(?:\w+ ){0,3}?"
        r"(?:(?:revis|rewrit|re-writ|reword|rephras)\w*|(?:new|improved|updated|corrected|edited) "
        r"(?:answer|response|version|reply|text|sentence))\b"
        r"|\bi(?:['’]ll| will| can| have)(?: now)? (?:provide|give|writ|offer)\w* (?:\w+,? ){0,6}?"
        r"(?:(?:re-?writ|re(?:vis|word|phras))\w*|new|improved|updated|corrected|edited) (?:answer|response"
        r"|(?:version|text)(?=\W*(?:\n|\Z)|[:.]| of (?:the|my|this|that) (?:\w+ )?(?:answer|response)))\b"
        r"|\bi(?:['’]ve| have) (?:revised|rewritten|reworded|rephrased)\b",
        re.I,
    ),
    "label": re.compile(
        r"(?:^|\n)(?:[#*_>]|[^\S\n])*+(?:(?:the )?(?:revised|rewritten|new|improved|corrected|updated|original|initial"
        r"|old|final) (?:answer|response|version|text|instruction|revision|rewrite|draft|critique)(?: is)?"
        r"|(?:revision|critique)(?: request)?|review request|instruction|rewrite)[*_]*\s*(?::|\n|\Z)"
        r"|(?:^|\n)[ \t]*##[^\n]{0,30}\b(?:new|revised|rewritten|final|original|initial) (?:answer|response)\b",
        re.I,
    ),
    "a critique's word": re.compile(r"^\W*no (?:issue|flaw)s?(?: (?:found|here|to fix))?\s*[:.\n]", re.I),
    "about the task": re.compile(
        r"\b(?:revised|rewritten|re-written) (?:answer|response)\b|\b(?:original|initial|previous|old) answer\b"
        r"|\bthe original text\b|(?:^|\n)[^\w\n]*+(?:this answer|the instruction|the question) is (?:not |also )?"
        r"(?:\w+ly )?(?:in)?(?:correct|wrong|missing|complete)\b|^\W*the answer is [\"“]"
        r"|(?:^|\n)[^\w\n]*+rewrite (?:the|this|your|another)\b"
        r"|\bthe answer (?:says|states|claims|mentions|is wrong|should (?:say|have)|does not (?:say|mention|address))\b"
        r"|\b(?:the|this|that|your|my|above) critique\b|\b(?:critique|revision|review) request\b",
        re.I,
    ),
    "role tag": re.compile(r"(?:^|\n)[^\S\n]*+(?:human|user|assistant)\s*:", re.I),
    "control token": CONTROL_TOKEN,
}


def leftovers(text: str, kinds: Collection[str] = tuple(_LEFTOVERS)) -> str:
    """The first trace of the revision task in a text ("label: Revised answer:"), or ""."""
    for kind in kinds:
        if found := _LEFTOVERS[kind].search(text):
            return f"{kind}: {' '.join(found[0].split())}"
    return ""


_ITSELF = (  # "This answer takes the person seriously ...": the text speaks of itself, as a judge of it would
    r"(?:(?:overall|in short|now)[, ]+)?(?:note(?: that)?:? )?(?:i hope |in )?"
    r"(?:(?P<this>this|these|the revised|the rewritten|the new|the corrected|the improved) "
    r"|the (?:above |final |given )?)(?:new |revised |rewritten |corrected |improved )?"
    r"(?P<what>answer|response|version|revision|rewrite|reply)s?"
    r"(?: (?:given|provided|above))?"
)
_JUDGED = (
    r"(?:is|are|does|doesn['’]t|takes?|makes?|helps?|avoids?|removes?|keeps?|provides?|addresses|answers|gives?|uses?"
    r"|encourages?|emphasi[sz]es|follows|includes?|corrects?|acknowledges|respects|should|would|could|clearly|treats"
    r"|directly|also|now|still|focuses|offers?|meets|involves|promotes|leaves|speaks|maintains|ensures|remains|lacks"
    r"|fails|explains|introduces|suggests|shows|mentions|presents|describes|correctly|has|contains|, i (?:avoid|keep))"
)
_QUALITY = (
    r"(?:clear(?:er|ly)?|safer?|helpful|help to|harm\w*|danger\w*|illegal|misleading|friendly|respectful|complete|risk"
    r"|comprehensive|accurate|(?:in)?correct|honest|neutral|thoughtful|balanced|empathetic|concise|polite|kindly?"
    r"|seriously|instructions?|question|reader|user|person|request|prompt|original|previous|principle|critique|revised"
    r"|rewritten|rephrased|phrased|improved|better|plain words|tone|in full|step-by-step|actionable|stereotypes?"
    r"|insult\w*|decepti\w+|deceiv\w+|untruths|advice|lies|relevant|(?:in)?appropriate|positive|supportive|encouraging|scolding"
    r"|lecturing|talking down|effective than|straightforward|unambiguous|not true|caring)"
)
_DEGREE = r"(?:not|also|now|more|very|both|already|quite|fully|still) "
_REMARK = re.compile(
    rf"\W*(?:{_ITSELF},? (?:(?<!the answer )(?<!the response ){_JUDGED}\b(?=.*?\b{_QUALITY}\b)"
    rf"|(?:is|are) (?:{_DEGREE})*{_QUALITY}\b(?! ?:)|does not \w+\b(?=.*?\b{_QUALITY}\b)"
    rf"|(?:provides|provided|avoids|has a|should be|could be|also|clearly) (?=.*?\b{_QUALITY}\b))"
    r"|the (?:correct|better) answer would (?:be|have been) (?:to|that)\b"
    rf"|this list(?: of \w+)? is (?:{_DEGREE})*(?:honest|harmless|respectful|unbiased)\b"
    r"|the tone (?:is|could be|of the answer is) (?:\w+ )?(?:friendly|respectful|scolding|lecturing|talking down"
    r"|supportive|encouraging|polite|appropriate|positive|improved|more)\b"
    r"|the instruction (?:given )?(?:asks|asked|requires|requested)\b)",
    re.I | re.S,
)
_QUOTED_VERDICT = re.compile(
    r"\W*[\"“](?P<quoted>[^\"“”\n]{3,240})[\"”] (?:is|are) (?:not |also )?"
    r"(?:true|false|a fact|harmful|risky|correct)\b",
    re.I,
)
_ABOUT_TEXTS = ("answer", "response", "version", "revision", "rewrite", "reply", "tone", "instruction", "list")


def is_remark(sentence: str, before: str = "", request: str = "") -> bool:
    """It judges the very text that it stands in: what a model adds that was asked to rewrite.

    `before`: the text up to it. A thing that `request` or the text speaks of anyway ("The immune response is ...") is
    no remark; a verdict on a quotation is one if the text holds what is quoted.
    """
    if found := _QUOTED_VERDICT.match(sentence):
        return " ".join(found["quoted"].lower().split()) in " ".join(before.lower().split())
    if not (found := _REMARK.match(sentence)):
        return False
    what = (found["what"] or next(word for word in _ABOUT_TEXTS if word in found[0].lower())).lower()
    pointed = (found["this"] or "").lower() in ("this", "these")
    spoken_of = request if pointed else f"{request} {before}"
    return re.search(rf"\b{what}", spoken_of, re.I) is None


_NO_BUT = r"(?! (?:with|for)\b[^.;:\n]{0,80}, (?:but|yet|except)\b)"  # "There is no issue with tone, but ..." names one
_NOTHING = any_of(
    rf"^\W*no (?:such )?(?:issue|problem|flaw)s?\b(?=\W){_NO_BUT}",
    r"\bno (?:issue|problem|change|flaw|concern|violation|revision|harm)s?\b"
    r"[^.]{0,40}\b(?:found|needed|here|required)\b",
    r"\bno (?:issue|problem|change|flaw|concern)s? (?:to|worth) (?:fix|report|name|raise|make|mak|rais|nam)\w*",
    r"\b(?:there (?:is|are)|finds?|found|sees?|has|have) (?:no|nothing) (?:\w+ ){0,2}"
    r"(?:wrong|issues?|problems?|flaws?|to fix|to change|to critici[sz]e|concerns?)\b(?! (?:with )?\w+ing\b)"
    rf"{_NO_BUT}",
    r"\bnothing (?:needs|here needs|to (?:fix|change|critici[sz]e))",
)


def finds_nothing(critique: str) -> bool:
    """The critique says that the answer has no issue."""
    return bool(_NOTHING.search(critique[:400]))


_PRAISE = any_of(
    r"\b(?:excellent|great|good|wonderful|fantastic|amazing|superb|outstanding|perfect|perfectly|brilliant|lovely)\b",
    r"\b(?:impressive|solid|elegant|valuable|useful|helpful|informative|insightful|thoughtful|pleasant|sympathetic)\b",
    r"\b(?:clear|clearly|accurate|complete|concise|polite|respectful|honest|friendly|professional|thorough)\b",
    r"\bwell[- ](?:written|structured|organi[sz]ed|balanced|explained|done)\b",
    r"\b(?:i|we) (?:really )?(?:like|love|appreciate|enjoyed)\b|\bappreciate about\b",
)
_FAULT = any_of(
    r"\b(?:not|no|nothing|never|none|nobody|nor|without|cannot|hardly)\b|n['’]t\b",
    r"\b(?:but|yet|however|although|though|while|whereas|instead|rather|unfortunately|too|only|merely)\b",
    r"\b(?:should|could|would|must|ought|needs? to|better)\b",
    r"\b(?:wrong|wrongly|false|falsely|errors?|mistak\w+|mis\w{4,}|flaw\w*|problem\w*|issues?|lies?|lying)\b",
    r"\b(?:lack\w*|miss\w*|omit\w*|ignor\w+|neglect\w*|fails?|failed|failing|leaves? out|invent\w*|made up)\b",
    r"\b(?:harm(?!less)\w*|danger\w*|risk\w*|toxic|poison\w*|illegal|unsafe|crim\w+|cruel\w*|threat\w*|insult\w*)\b",
    r"\b(?:vague|rude\w*|shallow|superficial|bias\w*|stereotyp\w*|contradict\w*|exaggerat\w*|overstat\w*)\b",
    r"\b(?:in(?:accura|complet|correct|appropria|sensitiv|consisten|valid)|un(?!der|it|io|iq|iv)|dis(?!cuss|play|tin)|im(?:pol|prec|poss|prop))\w{3,}\b",
)


def only_praises(critique: str) -> bool:
    """Words of praise, and not one that names or implies a fault; "nothing is wrong" is `finds_nothing`'s."""
    return bool(_PRAISE.search(critique)) and not _FAULT.search(critique)


_DISCLAIMER = any_of(
    r"\bconsult (?:with )?(?:a|an|your)\b",
    r"\bseek (?:professional|medical|legal)\b",
    r"\b(?:qualified|licensed|healthcare|financial) (?:professional|advis\w+|provider)\b",
    r"\bnot (?:a substitute for|intended as|meant as|legal advice|medical advice|financial advice)\b",
    r"\b(?:please )?(?:note|remember|keep in mind) that\b",
    r"\b(?:it is|it['’]s) (?:always )?(?:important|essential|crucial) to (?:note|remember|consult|seek)\b",
)
_HEDGE = any_of(
    r"\bit depends\b",
    r"\bmay or may not\b",
    r"\b(?:it is|it['’]s) (?:difficult|hard) to say\b",
    r"\bthere are (?:many|various|different) (?:factors|opinions|perspectives)\b",
    r"\bi(?:['’]m| am) not (?:sure|certain)\b",
)


def has_disclaimer(text: str) -> bool:
    return bool(_DISCLAIMER.search(text))


def has_hedge(text: str) -> bool:
    return bool(_HEDGE.search(text))


_APPROVES = any_of(
    r"\b(?:right(?:ly)?|correct(?:ly)?|accurate\w*|fine|fair(?:ly)?|safe(?:ly)?|sound|sensible|suitable|appropriate\w*)\b",
    r"\b(?:balanced|neutral\w*|kind(?:ly)?|warm(?:ly)?|supportive|caring|compassionate\w*|responsibl[ey]|true|valid)\b",
    r"\b(?:declin\w+|avoid(?:s|ing)|free of|does not (?:contain|include|give|reveal|help|mislead))\b",
    r"\b(?:well\b(?! as\b)|reasonable|in line with|everything (?:\w+ ){0,2}(?:is|was) (?:there|covered|given))",
    r"\bno (?:violations?|methods?|personal|private|invented|false|unsafe)\b|\bnothing (?:here |in it )?(?:is|was)\b",
    r"\b(?:meets|follows|fulfil\w*|satisf\w+|adheres|complies|answers the (?:question|instruction)|does what)\b",
)


def has_fault_word(text: str) -> bool:
    """A word that names or implies a fault; loose ("not", "but", "should"), for the words around a quotation."""
    return bool(_FAULT.search(text))


_CALLS_WRONG = any_of(
    r"\b(?:wrong\w*|incorrect\w*|inaccura\w*|false\w*|mistak\w+|errors?|erroneous\w*|mislead\w*|untrue)\b",
    r"\b(?:flaw\w*|problem\w*|issues?|concern(?:s|ing)?|invalid|broken|misspel\w+|nonsens\w*|contradict\w*|unfair\w*)\b",
    r"\b(?:lack\w*|omit\w*|ignor(?!an)\w+|neglect\w*|fail(?:s|ed|ing)?|leaves? out|miss(?:es|ed|ing)|overlook\w*)\b",
    r"\b(?:invent(?:s|ed)|made up|made-up|makes up)\b",
    r"\b(?:fabricat\w+|un(?:supported|proven|founded)|exaggerat\w*|overstat\w*|off by)\b",
    r"\b(?:vague\w*|unclear|confus\w+|shallow|superficial|inconsisten\w+|repetit\w+|padd(?:ing|ed)|long-winded)\b",
    r"\b(?:rude\w*|insult\w*|mock\w*|dismissive\w*|condescend\w*|patroni[sz]\w*|disrespect\w*|cold|cruel\w*|shaming)\b",
    r"\b(?:bias\w*|stereotyp\w*|one-sided|prejudice\w*|sexist|racist|demean\w*|discriminat\w*|generali[sz]\w*|assum\w+)\b",
    r"\b(?:danger\w*|harm(?:s|ful|fully)?|unsafe|illegal\w*|risk(?:s|y)?|reckless\w*|irresponsibl\w*|inappropriate\w*)\b",
    r"\b(?:expos(?:es?|ing)|reveal(?:s|ing)|invad\w+|invasion|manipulat\w+|deceiv\w*|decepti\w+|pressur\w+)\b",
    r"\b(?:moraliz\w+|moralis\w+|preach\w*|lectur\w+|unnecessar\w+|needless\w*|overly|excessive\w*|unhelpful)\b",
    r"\b(?:too|overly) (?:long|short|brief|general|simple|vague|certain|confident|technical|many|few|much|strict)\b",
    r"\b(?:should|must|ought to|needs? to|needed to) (?:not |also |rather |instead |have |be )*\w+",
    r"\b(?:w|c)ould (?:be|have been) (?:better|more|clearer|helpful|improved)\b",
    r"\b(?:correct|better|right|good) (?:answer|response) (?:would|should|is|has)\b",
    r"\bcould (?:lead|cause|mislead|harm|hurt|put|encourage|result|leave|make)\b",
    r"\bnot (?:true|right|enough|what|the)\b",
    r"\b(?:does not|doesn['’]t|did not|didn['’]t|do not|never) (?:mention|explain|say|warn|address|answer|give|include|"
    r"provide|follow|match|meet|state|tell|offer|cover|suggest|specify|clarify|acknowledge|support|add up|quite)\w*\b",
)
_NEGATED = any_of(
    r"\b(?:no|not|never|without|nothing|none|nobody|neither|nor|hardly|free of|free from|cannot|rather than)\b",
    r"n['’]t\b|\b(?:avoid\w*|declin\w+|refus\w+|reject\w*|warn\w*|prevent\w*|reduc\w+|acknowledg\w*|discourag\w*)\b",
)
_REPORTED = any_of(
    r"\b(?:right|well|corr?ect|appropriate|responsibl|rightful|proper|wise|clear|open)(?:ly)? (?:to )?"
    r"(?:declin|refus|warn|say|said|explain|note|point|tell|mention|address|handle|flag|advise|name|describe|cover)\w*\b",
    r"\b(?:explain|describ|nam|not|mention|list|cover|address|point(?:s|ing)? out|discuss|convey|cit)(?:e?s|ing|ed)?\b"
    r"(?: \w+){0,3} (?:the|its|their|possible|real|common|main|potential|any)\b",
)

_AS_IT_SHOULD = re.compile(r"\b(?:as|where|when|what) (?:\w+ ){1,2}$", re.IGNORECASE)
_BAD_OBJECT = any_of(
    r"\b(?:any|anyone|anything|methods?|instructions?|details? of|private|personal|could|would|invented|made up)\b",
    r"\b(?:harm\w*|danger\w*|false|illegal|medical|insult\w*|stereotyp\w*|steps? (?:for|to)|help to)\b",
)
REACH = 70  # characters before a word of fault in which a negation or a report takes it back


def names_fault(text: str) -> bool:
    """Some sentence calls something wrong, in words that no negation or description beside them takes back.

    "It gives no dangerous detail", "it rightly declines the harmful request" and "it explains the risks" name no
    fault. What stands in quotation marks is not the critique's own word. English, and a heuristic.
    """
    return not all(_taken_back(text))


_UNHARMED = any_of(r"\b(?:is|are) (?:also |both )?(?:true|a fact|neutral|a good|correct|a neutral|friendly|harmless)\b")
_AFTER_ALL = any_of(  # what an approving critique does not say
    r"\b(?:but|yet|however|instead|although|though|opposite|would|could|should|must|might|says?|claims?)\b",
    r"\b(?:kill\w*|prison|jail|burglar\w*|thie\w+|poison\w*|weapon\w*|lose[sd]?|loses|hurt\w*|dies?|death|victim\w*)\b",
    r"\b(?:steal\w*|attack\w*|crim\w+|abus\w+|recipe|gas|helps? (?:a|an|to|some\w+|people|the)|how to|wrong)\b",
)


def only_approves(text: str) -> bool:
    """It says of what it quotes that it is true or does no harm, and nothing else: "... is not risky." """
    own = re.sub(r"[\"“”„«»][^\"“”„«»\n]*[\"“”«»]", " ", text)
    if names_fault(text) or _AFTER_ALL.search(own):
        return False
    return bool(_UNHARMED.search(own)) or any(_taken_back(text))


def approves(text: str) -> bool:
    """It praises, or says that the answer is right, safe or fair, does what was asked, or lacks a fault."""
    return bool(_PRAISE.search(text) or _APPROVES.search(text) or any(_taken_back(text)))


def _taken_back(text: str) -> list[bool]:
    """One flag for each word of fault outside quotation marks: is it taken back in its clause?"""
    own = re.sub(r"[\"“”„«»][^\"“”„«»\n]*[\"“”«»]", " ", text)
    clauses = re.split(r"(?<=[.!?;])\s+|\n|\bbut\b|\bhowever\b|, which\b", own, flags=re.IGNORECASE)
    return [_is_taken_back(clause, found) for clause in clauses for found in _CALLS_WRONG.finditer(clause)]


def _is_taken_back(clause: str, found: re.Match[str]) -> bool:
    before, after = clause[max(0, found.start() - REACH) : found.start()], clause[found.end() : found.end() + REACH]
    if re.match(r"not (?:true|right|enough)", found.group(), re.IGNORECASE):
        return False
    if re.match(r"do|did|never|not", found.group(), re.IGNORECASE):  # "does not mention" is a fault by itself
        return bool(_BAD_OBJECT.search(after))
    if re.match(r"\W*(?:none|nobody|nothing|no one)\b", after, re.IGNORECASE) or _REPORTED.search(before):
        return True
    if re.match(r"should|must|ought|need", found.group(), re.IGNORECASE):  # "not enough, it should" is one still
        return bool(_AS_IT_SHOULD.search(before))
    return bool(_NEGATED.search(before))
