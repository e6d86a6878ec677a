"""Chat templates as transformers renders them, bounded, with a fixed date, and with or without a system role."""

from __future__ import annotations

import time
from datetime import UTC, datetime

import orjson
import pytest
from support.models import CHATML, NO_SYSTEM

from cai.engine.tokenizers import HFTokenizer, Turn
from cai.errors import CaiError
from cai.models import chat_environment
from cai.models.tokenizer_file import TokenizerFile, check_template, template_of
from cai.recipe.settings import ModelSection

TURNS = [
    {"role": "user", "content": "a\u00e9 <&>"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
]
DATED = "{{ 'Today is ' + strftime_now('%d %b %Y') }}" + CHATML
TEMPLATES = {
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}[{{ m.role }}]{{ m.content }}\n{% endif %}{% endfor %}",
    "loop control": "{% for m in messages %}{% if loop.index0 > 1 %}{% break %}{% endif %}"
    "{{ m.content }}\n{% endfor %}",
    "tojson": "{% for m in messages %}{{ m | tojson(indent=1) }}{{ m.content | tojson }}{% endfor %}",
    "date": DATED,
    "chatml": CHATML,
    "no system": NO_SYSTEM,
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_it_is_what_transformers_renders(name):
    from transformers.utils.chat_template_utils import render_jinja_template

    values = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}
    theirs = render_jinja_template([TURNS], chat_template=TEMPLATES[name], **values)[0][0]
    assert chat_environment.render(TEMPLATES[name], TURNS, **values) == theirs


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'x' * 999999999 * 99 }}",
        "{{ [1] * 999999999 }}",
        "{{ 99999 ** 99999 ** 9 }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
        "x" * (chat_environment.MOST_TEMPLATE + 1),
        "{% set n = namespace(s='xx') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
        "{% set n = namespace(s='xx') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        "{% set n = namespace(s=[1]) %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
        "{% set n = namespace(s=9) %}{% for i in range(60) %}{% set n.s = n.s * n.s %}{% endfor %}",
        "{% set r = range(9999)|list %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}",
        "{% set r = range(99999)|list %}{% for a in r %}{{ r|map('string')|list|length }}{% endfor %}",
        "{{ 'x'|center(9999999999) }}",
        "{{ 'x'.ljust(9999999999) }}",
        "{{ '{:>9999999999}'.format(1) }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ '%9999999999d'|format(1) }}",
        "{% set a = 'x' * 99999 %}{{ a|replace('x', a) }}",
        "{% set a = 'x' * 99999 %}{{ a.replace('x', a) }}",
        "{% set a = 'x' * 9999999 %}{{ ([a] * 999)|join }}",
        "{% set a = 'x' * 9999999 %}{{ ''.join([a] * 999) }}",
        "{{ ('a\n' * 99999)|indent(9999999) }}",
        "{{ messages|tojson(indent=9999999999) }}",
        "{{ ([[1] * 999999] * 999)|sum(start=[])|length }}",
    ],
    ids=range(24),
)
def test_a_template_without_bounds_is_refused_at_once(template, tmp_path):
    began = time.process_time()
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(CaiError, match=r"model\.format: the chat template of x: .*the chat template") as caught:
        check_template(ModelSection(name="x", format="chat"), tmp_path)
    assert time.process_time() - began < 5 and "\n" not in str(caught.value)


def test_of_named_templates_the_default_one_is_taken(tmp_path):
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    (tmp_path / "tokenizer_config.json").write_bytes(orjson.dumps({"chat_template": named}))
    assert template_of(tmp_path) == "D"
    (tmp_path / "chat_template.jinja").write_text("F")
    assert template_of(tmp_path) == "F"


def test_a_chat_model_without_a_template_is_told_before_anything_is_loaded(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(CaiError, match=r"has no chat template; set format = .base."):
        check_template(ModelSection(name="x", format="chat"), tmp_path)
    check_template(ModelSection(name="x", format="base"), tmp_path)  # needs none


class Rendering:
    added_tokens_decoder = {0: "<s>"}  # noqa: RUF012
    eos_token_id = 0

    def __init__(self, template):
        self.chat_template = template

    def apply_chat_template(self, messages, tokenize, add_generation_prompt, **more):
        return chat_environment.render(
            self.chat_template, messages, add_generation_prompt=add_generation_prompt, bos_token="<s>", **more
        )


SYSTEM_PASSED_OVER = "{% for m in messages if m.role != 'system' %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"


@pytest.mark.parametrize("template", [NO_SYSTEM, SYSTEM_PASSED_OVER])
def test_a_template_without_a_system_role_takes_the_preamble_into_the_first_request(template):
    turns = [Turn("system", "Be brief."), Turn("user", "one"), Turn("assistant", "uno"), Turn("user", "two")]
    pieces = HFTokenizer(Rendering(template)).chat(turns)
    assert "Be brief.\n\none" in "".join(piece.text for piece in pieces)
    assert [piece.turn for piece in pieces if piece.turn is not None] == [0, 1, 2, 3]
    alone = HFTokenizer(Rendering(template)).chat(turns[1:])
    assert "Be brief" not in "".join(piece.text for piece in alone)


def test_another_fault_of_a_template_is_still_told():
    broken = "{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}{{ messages[0].content }}"
    with pytest.raises(CaiError, match="one turn only"):
        HFTokenizer(Rendering(broken)).chat([Turn("system", "s"), Turn("user", "a"), Turn("assistant", "b")])


def test_the_date_of_a_run_stands_in_its_prompts_tomorrow_too():
    tokenizer = HFTokenizer(Rendering(DATED))
    tokenizer.date = datetime(2024, 2, 29, tzinfo=UTC)
    assert tokenizer.chat([Turn("user", "x")])[0].text.startswith("Today is 29 Feb 2024")


def test_the_dry_runs_tokenizer_renders_with_the_given_date(tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_bytes(orjson.dumps({"chat_template": DATED}))
    tokenizer = HFTokenizer(TokenizerFile(tmp_path))
    tokenizer.date = datetime(2024, 2, 29, tzinfo=UTC)
    assert "29 Feb 2024" in tokenizer.chat([Turn("user", "x")])[0].text
