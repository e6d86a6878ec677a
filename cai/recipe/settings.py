"""The recipe's sections as frozen pydantic models: every key a user can set, its type, range and default.

Owns names, ranges and defaults; `recipe.py` owns reading files, overlays and messages. Nothing here reads a file or
imports torch. Units are in the key names or the field's comment.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cai.store.jsonl import Row

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=0, le=1_000_000_000)]
Positive = Annotated[int, Field(ge=1, le=1_000_000_000)]
Slots = Annotated[int, Field(ge=1, le=500_000)]  # items; the numbers above are the held-out ones (data.slots.HELDOUT)
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what numpy takes
Prompted = Literal["few_shot", "constitution", "best_of_n"]  # arms that nobody trains: the base prompted well


class Section(BaseModel):
    """Base of every section: unknown keys refused, no coercion (an int may stand for a float), immutable."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSection(Section):
    """Which weights, and how they are loaded. `name`: hub id or a local folder."""

    name: str = Field("Qwen/Qwen2.5-32B", min_length=1)
    revision: str = Field("main", min_length=1)
    format: Literal["base", "chat"] = "base"
    quantization: Literal["nf4", "int8", "bf16", "fp32"] = "nf4"
    max_seq_length: Annotated[int, Field(ge=256, le=1_000_000)] = 4096
    backend: Literal["auto", "cuda", "cpu", "embedded", "fake"] = "auto"
    eos: str = ""  # end-of-text token; empty: <|endoftext|> for base, the tokenizer's for chat


class SamplingSection(Section):
    """How one stage draws: temperature (0 = greedy) and the longest completion in tokens."""

    temperature: Annotated[float, Field(ge=0.0, le=5.0)] = 0.7
    max_new_tokens: Annotated[int, Field(ge=1, le=32_768)] = 500


class SamplingSections(Section):
    """One table a stage, and rules for all of them.

    `min_p`: tokens less than this times as likely as the best are not drawn (0 = all may be). `no_repeat_ngram`: no
    sequence of so many tokens stands twice in a completion (0 = may).
    """

    min_p: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    no_repeat_ngram: Annotated[int, Field(ge=0, le=64)] = 0
    instructions: SamplingSection = SamplingSection(temperature=0.7, max_new_tokens=120)
    answers: SamplingSection = SamplingSection(temperature=0.7, max_new_tokens=500)
    critiques: SamplingSection = SamplingSection(temperature=0.3, max_new_tokens=300)
    revisions: SamplingSection = SamplingSection(temperature=0.7, max_new_tokens=500)


FewShot = Annotated[int, Field(ge=-1, le=10_000)]


class FewShotSection(Section):
    """How many of a prompt file's examples are shown; -1 = all. A small model copies from many.

    `by_topic`: a critique or revision is shown the examples of its principle's topic, those of its own pool last.
    `rotate`: items see the others in three orders, so that none stands last always.
    """

    by_topic: bool = False
    rotate: bool = False

    instructions: FewShot = -1
    answers: FewShot = -1
    critiques: FewShot = -1
    revisions: FewShot = -1
    reviews: FewShot = -1
    relevance: FewShot = -1


class PrinciplesSection(Section):
    """Which principle a round is about.

    `choice`: "relevant" draws among the `top` principles that the answer breaks most (by more than `threshold`),
    "uniform" deals them by item number. `by`: what says how much. "critic": how sure the critique is to begin with a
    fault, in spreads; "rule_check": yes or no to the rule, nats of log-odds over sound answers. `over`: whose spreads
    the critic's are: "run": of the run's own first answers, or with fewer than eight, as "known": of 26 shipped ones.
    Texts are read up to `max_text_tokens`.
    """

    choice: Literal["relevant", "uniform"] = "uniform"
    by: Literal["critic", "rule_check"] = "rule_check"
    over: Literal["run", "known"] = "known"
    top: Positive = 3
    threshold: Annotated[float, Field(ge=-20.0, le=20.0)] = 0.0
    max_text_tokens: Positive = 640


class CritiquesSection(Section):
    """`transcript`: "joint" draws a revision behind its critique (prompts/reviews.yaml), "separate" by its own prompt.

    `found`: "compared" criticises every answer, from a quotation on, and lets the comparison of the revision with its
    original decide whether that was right (`pairs.label` "judge"); "calibrated" decides by likelihood beforehand, at a
    bar that `false_alarms` of sound answers pass; "drawn" leaves it to what is drawn.
    `no_issue`: where a critique finds nothing, "keep" leaves the text as it is, "revise" goes on all the same.
    """

    transcript: Literal["separate", "joint"] = "separate"
    found: Literal["compared", "calibrated", "drawn"] = "drawn"
    false_alarms: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    no_issue: Literal["keep", "revise"] = "revise"


class EngineSection(Section):
    """Bulk generation. `batch_size` 0 = found from free memory (CUDA) or 16 (CPU)."""

    backend: Literal["auto", "reference", "static", "native"] = "auto"
    batch_size: Count = 0
    linears: Literal["auto", "bnb", "bf16", "fused", "fp8", "int8"] = "auto"  # in 8 bits: only where data are made
    kv: Literal["auto", "int8"] = "auto"  # keys and values of rows that are drawn; in 8 bits: only where data are made
    max_gpu_gb: Annotated[float, Field(ge=0.0)] = 0.0  # 10^9 bytes this process may use; 0 = the card

    @property
    def exact(self) -> EngineSection:
        """The same without 8 bits: for everything that measures."""
        linears = "auto" if self.rounded_products else self.linears
        return self.model_copy(update={"linears": linears, "kv": "auto"}) if self.rounded else self

    @property
    def rounded(self) -> bool:
        """Whether data are drawn through 8 bits: products, or keys and values."""
        return self.rounded_products or self.kv == "int8"

    @property
    def rounded_products(self) -> bool:
        return self.linears in ("fp8", "int8")


class InstructionsSection(Section):
    """Where instructions come from: `file` (JSON, CSV or plain text; `intake`), or the model over a seeded grid.

    `key`: the key or column that holds the request, where it has a name of its own. `pool`: of rows that name none.
    """

    file: str = ""
    key: str = ""
    pool: Literal["", "benign", "redteam"] = ""
    red_team_share: Fraction = 0.5
    max_tries: Positive = 4
    similarity_threshold: Annotated[float, Field(gt=0.0, le=1.0)] = 0.8


class PairsSection(Section):
    """What makes a pair, and how often what fails is tried again.

    `file`: pairs of your own (prompt, chosen, rejected); then nothing is generated and the rest says nothing.
    `redraws`: a refused completion, with new seeds; `retries`: a refused pair, the same instruction again;
    `replacements`: then a fresh instruction. `label`: "judge" refuses a pair whose chosen text the model itself does
    not find better (`not_better`), "always" takes the revision for the better one. `by`: each text is asked about by
    itself ("answer"), or both are compared in both orders ("comparison"). `false_labels`: better means by a
    margin that so many of the revisions pass that are known to be no better; 0: both orders must prefer it. `kind`:
    "sampled" pairs are two answers to one instruction, ordered by the model's own judgement; "both" makes either kind
    of each instruction. `reject_unrepaired`: a revision that is much as before and leaves all that its critique quotes
    is refused, and drawn again. `mended_refusals`: `max_length_ratio` says nothing of help where a benign request was
    refused, or any under a principle with `refusal_is_fault`. `max_added_repetition`: by how much the share of 8-word
    sequences that stand twice may grow.
    """

    file: str = ""
    kind: Literal["revision", "sampled", "both"] = "revision"
    label: Literal["judge", "always"] = "always"
    by: Literal["comparison", "answer"] = "comparison"
    false_labels: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    redraws: Count = 2
    retries: Count = 1
    replacements: Count = 2
    reject_limit: bool = True
    reject_refusal_of_benign: bool = True
    reject_near_identical: bool = True
    reject_unrepaired: bool = False
    max_similarity: Annotated[float, Field(gt=0.0, le=1.0)] = 0.95
    min_length_ratio: Annotated[float, Field(ge=0.0)] = 0.4
    max_length_ratio: Annotated[float, Field(gt=0.0)] = 2.5
    mended_refusals: bool = False
    max_added_repetition: Fraction = 1.0

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of pairs that are made of an item; a file's own pairs stand for revisions."""
        return ("revision", "sampled") if self.kind == "both" else (self.kind,)

    @property
    def revised(self) -> bool:
        """Whether critiques and revisions are made."""
        return not self.file and "revision" in self.kinds


class HeldoutSection(Section):
    """Prompts that go through every stage and are never trained on."""

    items: Annotated[int, Field(ge=0, le=500_000)] = 0


class LoraSection(Section):
    """Low-rank adapters on all linear projections, trained in fp32."""

    rank: Annotated[int, Field(ge=1, le=8192)] = 32  # no matrix of a model is wider
    alpha: Positive = 64
    dropout: Fraction = 0.0
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )


LossName = Literal["sigmoid", "sft", "ipo", "hinge", "sigmoid_norm", "robust", "apo_zero", "apo_down"]
NOT_TRAINED = {"save_steps", "save_minutes", "gradient_checkpointing", "first_loss_tolerance", "seeds", "eval_steps",
               "keep", "also_from_base"}  # fmt: skip
# as they stand they leave the weights alone
ADDED = {"start", "label_smoothing", "ld_alpha", "weight", "soft_labels", "end_weight"}


class DpoSection(Section):
    """TRL's DPO. Exactly one of `max_steps` (> 0) and `epochs` (> 0) decides the length.

    `start`: the policy, and with it the reference, is the base, or the LoRA of an SFT stage ([sft]) that DPO trains on
    (then `also_from_base` trains DPO alone beside it), or the adapter of the round before ([on_policy]).
    `label_smoothing`: robust's share of wrong labels. `ld_alpha`: what the tokens beyond the shorter completion count
    (1 = as the others). `weight`, `soft_labels`: what a pair's `margin` (log-odds of its label check) decides.
    `end_weight`: what the end token counts in the mean of an `sft` term (1 = as every other token).
    `save_minutes`: checkpoints by time (0 = each `save_steps`). `eval_steps`: the loss of held-out pairs each so many
    steps (0 = never); `keep`: which weights become the adapter, the last or those of the best held-out loss.
    """

    max_steps: Count = 0
    epochs: Annotated[float, Field(ge=0.0)] = 0.0
    start: Literal["base", "sft", "adapter"] = "base"
    also_from_base: bool = False
    loss_type: tuple[LossName, ...] = ("sigmoid",)
    loss_weights: tuple[float, ...] = ()
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    ld_alpha: Fraction = 1.0
    weight: Literal["none", "margin"] = "none"
    soft_labels: bool = False
    end_weight: Annotated[float, Field(ge=1.0, le=100.0)] = 1.0
    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 5e-6
    beta: Annotated[float, Field(gt=0.0, le=100.0)] = 0.1
    batch_size: Positive = 1
    gradient_accumulation: Positive = 1
    warmup_ratio: Fraction = 0.1
    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    max_grad_norm: Annotated[float, Field(gt=0.0)] = 1.0
    max_length: Annotated[int, Field(ge=64, le=1_000_000)] = 2048
    save_steps: Positive = 10
    save_minutes: Annotated[float, Field(ge=0.0)] = 0.0
    eval_steps: Count = 0
    keep: Literal["last", "best"] = "last"
    gradient_checkpointing: Literal["auto", "on", "off"] = "auto"
    first_loss_tolerance: Annotated[float, Field(gt=0.0)] = 0.01
    seeds: tuple[Seed, ...] = (0,)

    @model_validator(mode="after")
    def _fits_together(self) -> DpoSection:
        if (self.max_steps > 0) == (self.epochs > 0):
            raise ValueError("set exactly one of dpo.max_steps and dpo.epochs above 0")
        if self.loss_weights and len(self.loss_weights) != len(self.loss_type):
            raise ValueError("dpo.loss_weights needs one weight for each entry of dpo.loss_type")
        if len(set(self.seeds)) != len(self.seeds) or not self.seeds:
            raise ValueError("dpo.seeds needs at least one seed and no seed twice")
        if ("robust" in self.loss_type) != (self.label_smoothing > 0.0):
            raise ValueError('dpo.label_smoothing above 0 and "robust" in dpo.loss_type need each other')
        if self.end_weight != 1.0 and "sft" not in self.loss_type:
            raise ValueError('dpo.end_weight counts in an "sft" term: add one to dpo.loss_type, or set sft.end_weight')
        if "robust" in self.loss_type and self.soft_labels:
            raise ValueError("dpo.soft_labels says how sure each label is, dpo.label_smoothing one figure for all: one")
        if self.also_from_base and self.start == "base":
            raise ValueError('dpo.also_from_base: DPO starts from the base already. It goes with dpo.start = "sft"')
        if self.keep == "best" and not self.eval_steps:
            raise ValueError('dpo.keep = "best" needs a held-out loss to choose by: set dpo.eval_steps above 0')
        return self

    def deciding(self) -> Row:
        """The keys that decide the trained weights; a key that older versions lack only where it does something."""
        values = self.model_dump(mode="json", exclude=NOT_TRAINED)
        return {k: v for k, v in values.items() if k not in ADDED or v != type(self).model_fields[k].default}


class ReportSection(Section):
    """Where steps and figures go beside the run folder. Part of no identity: a resume may change it."""

    tracker: Literal["none", "tensorboard", "trackio", "wandb", "mlflow"] = "none"


class HealthSection(Section):
    """What DPO's training watches. A sign is logged, warned of and, named in `stop`, ends it (exit 6) resumably.

    Judged on the mean of the last `window` steps; truncation before the first. What is never tolerated is no choice:
    a non-finite step, and a first loss that is not log 2 (`dpo.first_loss_tolerance`).
    """

    window: Positive = 8
    max_chosen_fall: Annotated[float, Field(ge=0.0)] = 0.3  # nats a token that the chosen texts may lose
    max_loss_rise: Annotated[float, Field(ge=0.0)] = 0.2  # over the first loss
    max_truncated: Fraction = 0.02  # share of the pairs
    max_heldout_rise: Annotated[float, Field(ge=0.0)] = 0.05  # of the held-out loss over its lowest
    min_margin: Annotated[float, Field(ge=0.0)] = 0.05  # below these three the adapter barely moved: beta x margin, ...
    min_kl: Annotated[float, Field(ge=0.0)] = 0.002  # ... nats a token on neutral text, ...
    max_same_answers: Fraction = 0.5  # ... and the share of fresh answers that are the base's, from which it is one
    max_kl: Annotated[float, Field(ge=0.0)] = 0.1  # above it moved too far; as the gates have it
    stop: tuple[Literal["displacement", "rising_loss", "truncation", "heldout_rise"], ...] = ()


class BudgetSection(Section):
    """Money and time. 0 = no limit or price unknown."""

    usd_per_hour: Annotated[float, Field(ge=0.0)] = 0.0
    max_usd: Annotated[float, Field(ge=0.0)] = 0.0
    max_hours: Annotated[float, Field(ge=0.0)] = 0.0
    target_hours: Annotated[float, Field(ge=0.0)] = 0.0

    @model_validator(mode="after")
    def _priced(self) -> BudgetSection:
        if self.max_usd and not self.usd_per_hour:
            raise ValueError("budget.max_usd: needs a price to hold. Set budget.usd_per_hour, or budget.max_hours")
        return self
