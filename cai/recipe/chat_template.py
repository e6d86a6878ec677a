"""The base format as a chat template: the policy prompt's cues for transformers and vLLM (Jinja) and Ollama (Go). Pure.

Owns the text of both templates and of the Modelfile. Doesn't own how the policy prompt is rendered (`prompts`), which
it must repeat, nor which files an export writes. Invariant: for one user turn the Jinja template gives the very text of
`Prompt.render(format="base")`; each further turn is a repeated turn, and an assistant's turn ends with the end token,
as the texts of the training do.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from cai.engine.tokenizers import ByteTokenizer
from cai.recipe.prompts import PLACEHOLDER, Format, Prompt, after

GAP = "\n\n"  # between turns


def jinja_template(prompt: Prompt, eos: str) -> str:
    """chat_template.jinja of a base-format policy. A system turn stands where the prompt's preamble stands."""
    head, user, assistant = _opening(prompt), _cue(prompt.user_cue), _cue(prompt.assistant_cue)
    request = "".join(_literal(part) if literal else "{{ m.content|trim }}" for literal, part in _parts(prompt.final))
    close = after(prompt.assistant_cue, prompt.prefill) if prompt.prefill else prompt.assistant_cue
    return (
        f"{_literal(head)}"
        "{%- for m in messages %}"
        f"{{%- if m.role == 'system' %}}{{{{ m.content|trim }}}}{_literal(GAP)}"
        f"{{%- elif m.role == 'assistant' %}}{_literal(assistant)}{{{{ m.content|trim }}}}{_literal(eos + GAP)}"
        f"{{%- else %}}{_literal(user)}{request}{_literal(GAP)}"
        "{%- endif %}{%- endfor %}"
        f"{{%- if add_generation_prompt %}}{_literal(close)}{{%- endif %}}\n"
    )


def go_template(prompt: Prompt, eos: str) -> str:
    """The same as Ollama's TEMPLATE. Go's templates have no trim: the content stands as it was given."""
    user, assistant = _cue(prompt.user_cue), _cue(prompt.assistant_cue)
    request = "".join(_literal(part) if literal else "{{ .Content }}" for literal, part in _parts(prompt.final))
    close = after(prompt.assistant_cue, prompt.prefill) if prompt.prefill else prompt.assistant_cue
    return (
        f"{_literal(_opening(prompt))}"
        "{{- range .Messages }}"
        f'{{{{- if eq .Role "system" }}}}{{{{ .Content }}}}{_literal(GAP)}'
        f'{{{{- else if eq .Role "assistant" }}}}{_literal(assistant)}{{{{ .Content }}}}{_literal(eos + GAP)}'
        f"{{{{- else }}}}{_literal(user)}{request}{_literal(GAP)}"
        "{{- end }}{{- end }}"
        f"{_literal(close)}"
    )


def modelfile(weights: str, template: str, stops: Sequence[str]) -> str:
    """Ollama's Modelfile. `template` "": the one that the weights' file carries (chat format)."""
    lines = [f"FROM {weights}"]
    lines += [f'TEMPLATE """{template}"""'] if template else []
    return "\n".join([*lines, *(f"PARAMETER stop {_quoted(stop)}" for stop in stops)]) + "\n"


def stop_strings(prompt: Prompt, format: Format) -> tuple[str, ...]:
    """The strings at which measured answers end beside the end token: a base model writes the next turn itself."""
    tokenizer = ByteTokenizer()
    return prompt.render(dict.fromkeys(prompt.fields, "x"), format=format, tokenizer=tokenizer).stop


def _opening(prompt: Prompt) -> str:
    """What stands before the first turn: the preamble and the examples, if the policy prompt has any."""
    examples = prompt.examples if prompt.few_shot < 0 else prompt.examples[: prompt.few_shot]
    turns = (
        f"{after(prompt.user_cue, user)}{GAP}{after(prompt.assistant_cue, assistant)}{GAP}"
        for example in examples
        for user, assistant in example.turns
    )
    return (prompt.preamble + GAP if prompt.preamble else "") + "".join(turns)


def _cue(cue: str) -> str:
    return after(cue, "")


def _parts(final: str) -> list[tuple[bool, str]]:
    """(is it literal text?, the part): the request's wording around each place of the instruction."""
    parts = PLACEHOLDER.split(final)  # literal, name, literal, ...
    return [(i % 2 == 0, part) for i, part in enumerate(parts) if part]


def _literal(text: str) -> str:
    """A string literal of both languages: JSON's escapes are theirs; no surrogate pairs for what is beyond ASCII."""
    return "{{ " + json.dumps(text, ensure_ascii=False) + " }}" if text else ""


def _quoted(stop: str) -> str:
    """A value of a Modelfile, which knows no escapes: a line break stands in it as itself."""
    return f'"""{stop}"""' if '"' in stop else f'"{stop}"'
