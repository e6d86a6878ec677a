"""Every loss and gradient against TRL's own code on the same batch, in both layouts; weights and soft labels by hand.

TRL's trainer runs untouched but for its Triton kernel, which no CPU has.
"""

from __future__ import annotations

import math

import pytest
import torch
from support.child import plain_chunked
from support.training import LORA, FakePrompt, TinyModel, awake, dpo, make_pairs, run_train
from test_train import Events

from cai.errors import CaiError
from cai.recipe.settings import DpoSection
from cai.recipe.settings_sft import SftSection
from cai.training import adapter
from cai.training.attention import packed_batch
from cai.training.loss import padded_batch, padded_forward, pair_loss, sequence_logps
from cai.training.packed import PackedForward
from cai.training.token_rows import (
    PairRow,
    PairRows,
    first_loss,
    label_probabilities,
    pair_weights,
    revisions_only,
    token_counts,
    tokenize_pairs,
)

pytestmark = pytest.mark.slow
BETA = 0.3
CASES = [
    (("sigmoid",), {}),
    (("hinge",), {}),
    (("ipo",), {}),
    (("sft",), {}),
    (("sigmoid_norm",), {}),
    (("robust",), {"label_smoothing": 0.2}),
    (("apo_zero",), {}),
    (("apo_down",), {}),
    (("sigmoid",), {"ld_alpha": 0.4}),
    (("ipo",), {"ld_alpha": 0.0}),
    (("apo_zero", "sft"), {"ld_alpha": 0.7}),
    (("sigmoid", "sft"), {"loss_weights": (1.0, 0.2)}),
    (("sigmoid_norm", "sft"), {"loss_weights": (0.5, 2.0)}),
    (("robust", "apo_down", "hinge"), {"label_smoothing": 0.1, "loss_weights": (1.0, 0.3, 0.1)}),
]


def moved():
    """A tiny model whose adapter does something: B is not zero."""
    model = TinyModel()
    model.to_lora(LORA)
    return awake(model, 0.05)


def rows_of(model, pairs=None):
    pairs = make_pairs(4) if pairs is None else pairs
    return tokenize_pairs(pairs, FakePrompt(), format="base", tokenizer=model.tokenizer, max_length=400).rows


def gradients(hf):
    found = torch.cat([p.grad.flatten() for _, p in adapter.lora_parameters(hf)])
    hf.zero_grad()
    return found


@pytest.fixture(scope="module")
def trl(tmp_path_factory):
    """`trl(loss_type, facts)`: TRL's loss and gradient over the four pairs."""
    import trl.trainer.utils as utils
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    patch = pytest.MonkeyPatch()
    patch.setattr(utils, "_ChunkedLogProbFunction", plain_chunked())
    patch.setattr(DPOTrainer, "_prepare_dataset", lambda self, dataset, *_a, **_k: dataset)
    model = moved()
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [{name: list(getattr(row, name)) for name in names} for row in rows_of(model)]
    config = DPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")), beta=BETA, use_cpu=True, bf16=False, report_to="none",
        gradient_checkpointing=False,
    )  # fmt: skip
    trainer = DPOTrainer(
        model=model.hf, args=config, processing_class=model.hf_tokenizer, train_dataset=Dataset.from_list(rows)
    )
    model.hf.delete_adapter("ref")  # TRL's copy of a trained adapter; without it the reference is the base
    batch = trainer.data_collator(rows)

    def values(loss_type, facts):
        trainer.loss_types = list(loss_type)
        trainer.loss_weights = list(facts.get("loss_weights", ())) or [1.0] * len(loss_type)
        trainer.ld_alpha, trainer.label_smoothing = facts.get("ld_alpha"), facts.get("label_smoothing", 0.0)
        loss = trainer._compute_loss(model.hf, batch, False)
        loss.backward()
        return float(loss), gradients(model.hf)

    yield values
    patch.undo()


@pytest.fixture(scope="module", params=["packed", "padded"])
def ours(request, tmp_path_factory):
    """The same by our trainer, whose batches, reference and loss are those of a training."""
    from cai.training.forward import Layout
    from cai.training.guards import TrainingPlan
    from cai.training.trainers import PairTrainer

    model = moved()
    rows = rows_of(model)
    layouts = {
        "packed": Layout("packed", packed_batch, PackedForward(), True, False),
        "padded": Layout("padded", lambda r: padded_batch(r, 0), padded_forward, False, True),
    }
    layout = layouts[request.param]
    plan = TrainingPlan(
        rows=rows, refs=[], order=range(4), steps=1, micro_batch=4, accumulation=1, checkpointing=False, dpo=dpo(),
        seed=1, folder=tmp_path_factory.mktemp("ours"), seal_facts={}, forward=layout.forward, collate=layout.collate,
        event=lambda *a, **k: None, stopped=lambda: False, progress=lambda *a: None,
    )  # fmt: skip
    trainer = PairTrainer(model.hf, model.hf_tokenizer, plan, model.device)

    def values(loss_type, facts):
        plan.dpo = DpoSection(max_steps=1, beta=BETA, loss_type=loss_type, **facts)
        with torch.no_grad(), model.adapter(False):
            sums, _ = sequence_logps(model.hf, layout.collate(rows), layout.forward, plan.dpo.ld_alpha)
        plan.refs = [tuple(pair) for pair in sums.T.tolist()]
        loss = trainer._compute_loss(model.hf, trainer._collate(range(4)))
        loss.backward()
        return float(loss), gradients(model.hf)

    return values


@pytest.mark.parametrize(("loss_type", "facts"), CASES, ids=str)
def test_loss_and_gradient_are_trls(trl, ours, loss_type, facts):
    (expected, expected_grad), (found, grad) = trl(loss_type, facts), ours(loss_type, facts)
    assert found == pytest.approx(expected, abs=1e-5, rel=1e-5)
    assert (grad - expected_grad).norm() <= 1e-4 * expected_grad.norm()


# --- the first loss, weights and soft labels


@pytest.mark.parametrize(("loss_type", "facts"), CASES, ids=str)
def test_the_first_loss_is_known_where_it_hangs_on_no_text(loss_type, facts):
    zeros, lengths = torch.zeros(2, 2), [3, 4, 5, 2]
    value = pair_loss(
        zeros, zeros, torch.full((14,), -1.0), lengths, beta=BETA, loss_type=loss_type,
        loss_weights=facts.get("loss_weights", ()), label_smoothing=facts.get("label_smoothing", 0.0),
    )  # fmt: skip
    expected = first_loss(DpoSection(max_steps=1, loss_type=loss_type, **facts), None, [0, 1])
    assert (expected is None) == bool({"ipo", "sft"} & set(loss_type))
    if expected is not None:
        assert float(value) == pytest.approx(expected, abs=1e-6)


def row(item, margin):
    return PairRow(item, (1,), (2, 3), (4,), margin=margin)


def test_weights_are_margins_cut_to_0_4_over_their_mean():
    """Margins -1, 1, 3, 9 count 0, 1, 3, 4: mean 2."""
    rows = [row(0, -1.0), row(1, 1.0), row(2, 3.0), row(3, 9.0)]
    assert pair_weights(rows, DpoSection(max_steps=1, weight="margin")) == [0.0, 0.5, 1.5, 2.0]
    assert pair_weights(rows, DpoSection(max_steps=1)) is None
    with pytest.raises(CaiError, match="no pair has a margin above 0"):
        pair_weights(rows[:1], DpoSection(max_steps=1, weight="margin"))


def test_soft_labels_are_the_margins_probability():
    """Odds 3 to 1 are 0.75; log-odds without bound do not overflow."""
    rows = [row(0, 0.0), row(1, math.log(3)), row(2, -1e9)]
    found = label_probabilities(rows, DpoSection(max_steps=1, soft_labels=True))
    assert found == pytest.approx([0.5, 0.75, 0.0]) and label_probabilities(rows, DpoSection(max_steps=1)) is None


@pytest.mark.parametrize("margin", [None, float("nan")])
@pytest.mark.parametrize("asked", [{"weight": "margin"}, {"soft_labels": True}])
def test_a_pair_without_a_margin_ends_it_before_training(margin, asked):
    config = DpoSection(max_steps=1, **asked)
    with pytest.raises(CaiError, match=r"1 of 2 pairs have no number in `margin` \(the first is item 7\)"):
        pair_weights([row(1, 1.0), row(7, margin)], config), label_probabilities([row(1, 1.0), row(7, margin)], config)


def loss_of(name, logps, **more):
    zeros, each, lengths = torch.zeros(2, 2), torch.tensor([-1.0] * 5 + [-2.0] * 5), [2, 3, 4, 1]
    settings = {"beta": 1.0, "loss_type": (name,), "loss_weights": ()} | more
    return float(pair_loss(torch.tensor(logps), zeros, each, lengths, **settings))


def test_a_weighted_loss_by_hand():
    """Margins 1 and -2 weigh 0.5 and 1.5; NLL 1 a token over 2 and 3 tokens: (0.5 x 2 + 1.5 x 3) / 5."""
    soft = [math.log1p(math.exp(-1.0)), math.log1p(math.exp(2.0))]
    weights = torch.tensor([0.5, 1.5])
    found = loss_of("sigmoid", [[2.0, 0.0], [1.0, 2.0]], weights_B=weights)
    assert found == pytest.approx((0.5 * soft[0] + 1.5 * soft[1]) / 2)
    assert loss_of("sft", [[0.0, 0.0], [0.0, 0.0]], weights_B=weights) == pytest.approx(1.1)
    assert loss_of("sft", [[0.0, 0.0], [0.0, 0.0]], weights_B=torch.ones(2)) == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "ipo", "sigmoid_norm", "apo_zero", "apo_down"])
def test_a_soft_label_is_the_expectation_over_both_orders(name):
    """Sure labels give the plain loss, the reverse the loss of swapped texts, 0.75 three quarters of the way."""
    logps = [[2.0, 0.5], [1.0, 2.0]]
    plain, half = loss_of(name, logps), loss_of(name, logps, labels_B=torch.tensor([0.75, 0.75]))
    assert loss_of(name, logps, labels_B=torch.ones(2)) == pytest.approx(plain)
    other = float(
        pair_loss(torch.tensor(logps[::-1]), torch.zeros(2, 2), torch.zeros(10), [4, 1, 2, 3], beta=1.0,
                  loss_type=(name,), loss_weights=())
    )  # fmt: skip
    assert loss_of(name, logps, labels_B=torch.zeros(2)) == pytest.approx(other)
    assert half == pytest.approx(0.75 * plain + 0.25 * other)


def with_margins(*margins):
    return [{**pair, "margin": margin} for pair, margin in zip(make_pairs(len(margins)), margins, strict=True)]


def test_a_training_by_weights_and_soft_labels(tmp_path):
    """The first loss is log 2 times the weight of the first step, known before it; other margins: another training."""
    config = dpo(weight="margin", soft_labels=True)
    events = Events()
    result = run_train(tmp_path, pairs=with_margins(0.5, 3.0, 1.0, 4.0, -1.0, 2.0), config=config, event=events)
    (first,) = events.of("first_loss")
    assert result.first_loss == pytest.approx(first["expected"], abs=1e-5) != pytest.approx(math.log(2), abs=1e-3)
    assert result.expected_first_loss == first["expected"]
    assert result.last_loss < result.first_loss
    (tmp_path / "train" / "result.json").unlink()
    with pytest.raises(CaiError, match="margins: "):
        run_train(tmp_path, pairs=with_margins(0.5, 3.0, 1.0, 4.0, -1.0, 1.0), config=config)


def test_margins_that_nothing_asks_for_change_nothing(tmp_path):
    plain, carried = run_train(tmp_path / "a"), run_train(tmp_path / "b", pairs=with_margins(*[1.0] * 6))
    assert plain.log == carried.log


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"label_smoothing": 0.1}, "need each other"),
        ({"loss_type": ("robust",)}, "need each other"),
        ({"loss_type": ("robust",), "label_smoothing": 0.1, "soft_labels": True}, "one figure for all"),
        ({"keep": "best"}, "set dpo.eval_steps above 0"),
        ({"end_weight": 3.0}, 'counts in an "sft" term'),
    ],
)
def test_keys_that_contradict_each_other_are_refused(changes, line):
    with pytest.raises(ValueError, match=line):
        DpoSection(max_steps=1, **changes)


def test_a_checkpoint_of_before_these_keys_is_still_resumed():
    """The identity names a new key only where it does something, in both sections."""
    plain = DpoSection(max_steps=1).deciding()
    assert not set(plain) & {"start", "label_smoothing", "ld_alpha", "weight", "soft_labels", "eval_steps", "keep"}
    assert DpoSection(max_steps=1, ld_alpha=0.5).deciding() == {**plain, "ld_alpha": 0.5}
    odd = DpoSection(max_steps=1, ld_alpha=0.5, weight="margin", soft_labels=True, eval_steps=1, keep="best")
    assert set(SftSection().recipe(odd).deciding()) == set(plain)


def test_an_end_token_s_weight_by_hand():
    """NLL 1 a token, 2 of the first end; ends count 3: (1 + 3 x 2 + 1 + 1 + 3) / 9."""
    counts = torch.tensor([1.0, 3.0, 1.0, 1.0, 3.0])
    zeros, each = torch.zeros(2, 2), torch.tensor([-1.0, -2.0, -1.0, -1.0, -1.0] + [-9.0] * 5)
    settings = {"beta": 1.0, "loss_type": ("sft",), "loss_weights": ()}
    found = pair_loss(zeros, zeros, each, [2, 3, 4, 1], counts_C=counts, **settings)
    assert float(found) == pytest.approx((1 + 3 * 2 + 1 + 1 + 3) / 9)
    weighted = pair_loss(
        zeros, zeros, each, [2, 3, 4, 1], counts_C=counts, weights_B=torch.tensor([2.0, 0.0]), **settings
    )
    assert float(weighted) == pytest.approx(2 * (1 + 3 * 2) / 9)


def test_only_an_end_that_was_not_cut_counts_more():
    assert token_counts(PairRow(0, (1,), (2, 3, 4), ()), 5.0) == [1.0, 1.0, 5.0]
    assert token_counts(PairRow(0, (1,), (2, 3, 4), (), truncated=True, chosen_cut=True), 5.0) == [1.0, 1.0, 1.0]


def test_a_whole_text_beside_a_rejected_one_that_was_cut_has_its_end():
    model, prompt = TinyModel(), FakePrompt()
    pair = {"item": 0, "prompt": "ab", "chosen": "cd", "rejected": "efghijkl" * 40}

    def counts(pair):
        found = tokenize_pairs([pair], prompt, format="base", tokenizer=model.tokenizer, max_length=64)
        return found.truncated, token_counts(found.rows[0], 5.0)

    assert counts(pair)[0] == 1 and counts(pair)[1][-2:] == [1.0, 5.0]
    assert counts(pair | {"chosen": pair["rejected"]})[1][-1] == 1.0


def test_the_sft_trainer_s_loss_counts_ends_whatever_the_micro_batch(tmp_path_factory):
    from cai.training.guards import TrainingPlan
    from cai.training.sft_trainer import RevisionTrainer

    model = moved()
    rows = revisions_only(PairRows(rows_of(model), [])).rows

    def loss_of_step(micro_batch, weight):
        plan = TrainingPlan(
            rows=rows, refs=[], order=range(4), steps=1, micro_batch=micro_batch, accumulation=4 // micro_batch,
            checkpointing=False, dpo=DpoSection(max_steps=1, loss_type=("sft",), end_weight=weight), seed=1,
            folder=tmp_path_factory.mktemp("sft"), seal_facts={}, forward=padded_forward,
            collate=lambda r: padded_batch(r, 0), event=lambda *a, **k: None, stopped=lambda: False,
            progress=lambda *a: None,
        )  # fmt: skip
        trainer = RevisionTrainer(model.hf, model.hf_tokenizer, plan, model.device)
        starts = range(0, 4, micro_batch)
        with torch.no_grad():
            losses = [
                float(trainer.compute_loss(model.hf, trainer._collate(range(s, s + micro_batch)))) for s in starts
            ]
        return sum(losses) / len(losses)

    with torch.no_grad():
        _, each = sequence_logps(model.hf, padded_batch(rows, 0), padded_forward)
    ends = [sum(len(r.chosen_ids) for r in rows[: i + 1]) - 1 for i in range(4)]
    total, last = -float(each.sum()), -float(each[ends].sum())
    for weight in (1.0, 6.0):
        expected = (total + (weight - 1) * last) / (len(each) + (weight - 1) * 4)
        assert loss_of_step(4, weight) == pytest.approx(expected, rel=1e-5)
        assert loss_of_step(2, weight) == pytest.approx(expected, rel=1e-5)
