"""Wordings that a text is searched for: refusals, leftovers of the meta-task, disclaimers, hedges, "no issue found".

Owns the phrase lists, one alternative a line; English, and refusals in a few other languages. These are heuristics: a
refusal in other words is missed. Pure.
"""

from __future__ import annotations

import re

from cai.metrics.text import words


def _any_of(*alternatives: str) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{alternative})" for alternative in alternatives), re.IGNORECASE)


_GIVE = r"(?:help|assist|provide|give|share|answer|respond|discuss|talk|comment|go into|get into|write|create|explain)"
_REFUSAL = _any_of(
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
_REFUSED_ACT = _any_of(
    r"\b(?:help|assist|provide|answer|answering|fulfil\w*|comply|support|discuss)\b",
    r"\b(?:do th(?:at|is)|create|write|generate|give)\b",
    r"\bshare\b",
    r"\b(?:engage|offer|condone|participate|respond|continue|complete|recommend|teach|tell you)\b",
    r"\b(?:explain|declin\w+|sorry|refrain|abstain|irresponsible|advise|advice|comment\w*)\b",
    r"\b(?:talk about|speak about|go into|capabilit\w+|abilit\w+|my scope|my expertise|my remit)\b",
    r"\b(?:ai|model|assistant|appropriate|inappropriate|unethical|illegal|harmful)\b",
)


_REFUSAL_ABROAD = _any_of(  # act included
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


_LEFTOVERS = {
    "meta": _any_of(
        r"\b(?:here(?:['’]s| is| are)|below is|this is) (?:a|an|the|my|your) (?:\w+ ){0,3}(?:revis|rewrit|re-writ)\w*",
        r"\b(?:here(?:['’]s| is)|below is) (?:a|an|the|my|your) (?:\w+ ){0,3}(?:improved|updated|edited|corrected)\b",
        r"^\W*(?:sure|certainly|of course|okay|ok)\b[^.\n]{0,60}\b(?:revis|rewrit|re-writ)\w*",
        r"\b(?:revised|rewritten|corrected|original|initial|previous) (?:answer|response)\b",
        r"\b(?:the|this|your|my|above) critique\b",
        r"\b(?:critique|revision) request\b",
    ),
    "role tag": _any_of(
        r"(?:^|\n)\s*(?:human|user|assistant|critique|revision|revised \w+)\s*:",
        r"^\s*(?:question|answer|response|reply|instruction|principle|system)\s*:",
    ),
    "control token": _any_of(r"<\|(?:im_start|im_end|endoftext)\|>", r"</?think>", r"\[/?INST\]"),
}


def leftovers(text: str) -> str:
    """The first trace of the meta-task in a text ("meta: here is the revised"), or ""."""
    for kind, pattern in _LEFTOVERS.items():
        if found := pattern.search(text):
            return f"{kind}: {found.group().strip()}"
    return ""


def has_control_tokens(text: str) -> bool:
    return bool(_LEFTOVERS["control token"].search(text))


_NOTHING = _any_of(
    r"^\W*no (?:issue|problem|flaw)s?\b(?=\W)",
    r"\bno (?:issue|problem|change|flaw|concern|violation|revision|harm)s?\b"
    r"[^.]{0,40}\b(?:found|needed|here|required)\b",
    r"\bno (?:issue|problem|change|flaw|concern)s? (?:to|worth) (?:fix|report|name|raise|make|mak|rais|nam)\w*",
    r"\b(?:there (?:is|are)|finds?|found|sees?|has|have) (?:no|nothing) (?:\w+ ){0,2}"
    r"(?:wrong|issues?|problems?|flaws?|to fix|to change|to critici[sz]e|concerns?)\b(?! (?:with )?\w+ing\b)",
    r"\bnothing (?:needs|here needs|to (?:fix|change|critici[sz]e))",
)


def finds_nothing(critique: str) -> bool:
    """The critique says that the answer has no issue."""
    return bool(_NOTHING.search(critique[:400]))


_PRAISE = _any_of(
    r"\b(?:excellent|great|good|wonderful|fantastic|amazing|superb|outstanding|perfect|perfectly|brilliant|lovely)\b",
    r"\b(?:impressive|solid|elegant|valuable|useful|helpful|informative|insightful|thoughtful|pleasant|sympathetic)\b",
    r"\b(?:clear|clearly|accurate|complete|concise|polite|respectful|honest|friendly|professional|thorough)\b",
    r"\bwell[- ](?:written|structured|organi[sz]ed|balanced|explained|done)\b",
    r"\b(?:i|we) (?:really )?(?:like|love|appreciate|enjoyed)\b|\bappreciate about\b",
)
_FAULT = _any_of(
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


_DISCLAIMER = _any_of(
    r"\bconsult (?:with )?(?:a|an|your)\b",
    r"\bseek (?:professional|medical|legal)\b",
    r"\b(?:qualified|licensed|healthcare|financial) (?:professional|advis\w+|provider)\b",
    r"\bnot (?:a substitute for|intended as|meant as|legal advice|medical advice|financial advice)\b",
    r"\b(?:please )?(?:note|remember|keep in mind) that\b",
    r"\b(?:it is|it['’]s) (?:always )?(?:important|essential|crucial) to (?:note|remember|consult|seek)\b",
)
_HEDGE = _any_of(
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
