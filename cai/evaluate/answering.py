"""Answers of the loaded model under a prompt, cut where the transcript goes on.

Owns the one way in which measurements let the model write; which adapter is on, and what becomes of the texts, is the
caller's. Invariant: every number that was asked has a row; `skipped` says why one has no text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from cai.engine import Request, Sampling
from cai.recipe.ends import cut, signs_of
from cai.recipe.prompts import Prompt
from cai.run.context import Context
from cai.store.jsonl import Row

KEPT = ("text", "finish", "skipped")  # of such a row, where its tokens were counted already


def drawn(
    context: Context,
    prompt: Prompt,
    asked: Mapping[int, Mapping[str, str]],
    sampling: Sampling,
    where: str,
    seeds: Mapping[int, int] | None = None,
    bounded: bool = False,
) -> dict[int, Row]:
    """Number -> text, finish and tokens. `asked`: the prompt's fields; `bounded`: what leaves no room is skipped.

    Errors: Stopped, `where` says in what.
    """
    model, signs = context.model(), signs_of(prompt)
    engine, found = model.engine(context.recipe.engine), dict[int, Row]()
    for number, fields in asked.items():
        r = prompt.render(fields, format=model.format, tokenizer=model.tokenizer)
        if bounded and len(r.token_ids) + sampling.max_new_tokens > model.max_seq_length:
            found[number] = {"skipped": f"prompt_too_long: {len(r.token_ids)} tokens"}
            continue
        limits = replace(sampling, stop=(*r.stop, *sampling.stop), eos_ids=tuple(model.tokenizer.eos_ids))
        engine.submit(Request(number, r.token_ids, limits, (seeds or {}).get(number, 0), r.prefix_len))
    for done in engine.completions(context.stopped):
        text = cut(done.text, signs)
        finish = "stop" if text.marker else done.finish
        found[done.id] = {"text": text.text.strip(), "finish": finish, "tokens": len(done.token_ids)}
    context.check_stop(where)
    return found
