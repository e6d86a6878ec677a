"""The card of a run's data set: front matter that names the splits, then what it is and how it was made. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from cai.data.pairs import PairSet
from cai.engine.tokenizers import ByteTokenizer
from cai.models.guard import described
from cai.models.weights import is_local
from cai.recipe.load import Recipe
from cai.recipe.prompts import Prompt
from cai.report.templating import rendered
from cai.store.jsonl import JsonObject, Row
from cai.store.row_types import Example

FEATURES = [
    {"name": "prompt", "dtype": "string"},
    {"name": "chosen", "dtype": "string"},
    {"name": "rejected", "dtype": "string"},
    {"name": "item", "dtype": "int64"},
    {"name": "pool", "dtype": "string"},
]

KIND = {"name": "kind", "dtype": "string"}  # where a run makes others than revisions

TAGS = ["constitutional-ai", "preference", "dpo", "trl", "synthetic", "not-for-all-audiences"]

OWN_TAGS = ["preference", "dpo", "trl"]


LICENSES = {"Qwen/Qwen2.5-32B": "apache-2.0", "SmolLM2-135M-Instruct": "apache-2.0"}  # of the model that wrote the text


SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def card(
    pairs: PairSet,
    train: Sequence[Row],
    heldout: Sequence[Row],
    recipe: Recipe,
    facts: JsonObject,
    policy: Prompt | None = None,
) -> str:
    """The README.md of the data set: front matter that names the splits, then what it is and how it was made.

    `policy`: the prompt that the pairs are trained with; the lines for other trainers name its text.
    """
    from huggingface_hub.repocard_data import DatasetCardData  # the hub's client is half a second and not asked

    own = bool(recipe.pairs.file)
    name = str(facts.get("model") or recipe.model.name)
    shown = Path(name).name if is_local({**facts, "model": name}) else name  # where a folder lay is nobody's business
    splits = [("train", len(train))] + ([("heldout", len(heldout))] if heldout else [])
    data = DatasetCardData(
        language=None if recipe.instructions.file or own else ["en"],
        license=None if own else LICENSES.get(name),
        annotations_creators=None if own else ["machine-generated"],
        size_categories=[_size(len(train) + len(heldout))],
        task_categories=["text-generation"],
        pretty_name="Preference pairs of a user's file" if own else "Constitutional AI preference pairs",
        tags=OWN_TAGS if own else TAGS,
        configs=[
            {
                "config_name": "default",
                "default": True,
                "data_files": [{"split": split, "path": f"pairs/{split}.jsonl"} for split, _ in splits],
            },
        ],
        dataset_info={
            "config_name": "default",
            "features": FEATURES + ([KIND] if recipe.pairs.kind != "revision" and not own else []),
            "splits": [{"name": split, "num_examples": count} for split, count in splits],
        },
    )
    values = {
        "name": shown,
        **_formats(recipe, policy),
        "embedded": facts.get("backend") == "embedded",
        "fake": facts.get("backend") == "fake",
        "revision": facts.get("revision", recipe.model.revision),
        "recipe": recipe,
        "guard": described(recipe.guard),
        "splits": splits,
        "pools": sorted(Counter(pair["pool"] for pair in train).items()),
        "dropped": len(pairs.train) - len(train),
        "examples": len(pairs.examples),
        "rejects": pairs.reasons,
        "principles": _principles(pairs.examples),
    }
    return f"---\n{data.to_yaml()}\n---\n\n{rendered('dataset_card.md.j2', values)}"


def _formats(recipe: Recipe, policy: Prompt | None) -> dict[str, str]:
    """axolotl's three formats: in the base format the text around prompt and completion, as the pipeline trains it."""
    if recipe.model.format == "chat" or policy is None:
        return {"prompt_format": "{prompt}", "lead": "{chosen}", "lead_rejected": "{rejected}"}
    tokenizer = ByteTokenizer()
    form = policy.render({"instruction": "{prompt}"}, format="base", tokenizer=tokenizer).text
    space = "" if form[-1:].isspace() else " "
    return {"prompt_format": form, "lead": f"{space}{{chosen}}", "lead_rejected": f"{space}{{rejected}}"}


def _size(count: int) -> str:
    return next((name for limit, name in SIZES if count < limit), "n>1M")


def _principles(examples: Sequence[Example]) -> list[tuple[str, str, int]]:
    """(id, text, rounds it was used in), by id."""
    used = Counter((str(r["principle_id"]), r["principle"]) for example in examples for r in example["rounds"])
    return [(id_, " ".join(text.split()), count) for (id_, text), count in sorted(used.items())]
