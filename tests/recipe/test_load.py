"""The recipe: overlays, messages that name key and remedy, identities."""

from __future__ import annotations

from pathlib import Path

import pytest

from cai.data.chain import stage_identity
from cai.errors import USAGE, CaiError
from cai.evaluate import scores
from cai.evaluate.benchmarks import suite
from cai.recipe import load as recipes
from cai.recipe.identity import LATER_KEYS, identity
from cai.recipe.load import Recipe, read, resolve
from cai.recipe.settings import PairsSection
from cai.recipe.settings_evaluation import GatesSection, HygieneSection

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "cai.toml"


def fault(table: str, tmp_path: Path, **options: object) -> str:
    path = tmp_path / "cai.toml"
    path.write_text(table)
    with pytest.raises(CaiError) as caught:
        resolve(read(path), **options)  # type: ignore[arg-type]
    assert caught.value.code == USAGE
    return str(caught.value)


M0 = "[milestones.m0]\n"


@pytest.mark.parametrize("embedded", [False, True])
@pytest.mark.parametrize("milestone", ["m0", "m1", "m2", "m3"])
def test_every_shipped_milestone_resolves(milestone: str, embedded: bool) -> None:
    recipe = resolve(read(SHIPPED), milestone=milestone, embedded=embedded)
    assert recipe.milestone == milestone
    assert recipe.model.format == ("chat" if embedded else "base")


def test_what_the_user_fixed() -> None:
    """Model, sampling, LoRA and DPO as the user's plan has them."""
    recipe = resolve(read(SHIPPED), milestone="m2")
    assert recipe.model.name == "Qwen/Qwen2.5-32B"
    assert (recipe.model.quantization, recipe.model.max_seq_length) == ("nf4", 4096)
    drawn = recipe.sampling
    assert (drawn.answers.temperature, drawn.answers.max_new_tokens) == (0.7, 500)
    assert (drawn.critiques.temperature, drawn.critiques.max_new_tokens) == (0.3, 300)
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.dpo.beta, recipe.dpo.learning_rate) == (32, 64, 0.1, 5e-6)
    items = [resolve(read(SHIPPED), milestone=m) for m in ("m0", "m1", "m2", "m3")]
    assert [(r.items, r.rounds) for r in items] == [(1, 1), (10, 2), (100, 2), (5000, 2)]


def test_the_shipped_recipe_shows_gates_and_hygiene_as_they_are_without_it() -> None:
    """A recipe of one's own that leaves them out is held to the same bars."""
    recipe = resolve(read(SHIPPED), milestone="m1")
    assert recipe.gates == GatesSection()
    assert recipe.hygiene == HygieneSection()
    table = read(SHIPPED).table
    assert set(HygieneSection.model_fields) - set(table["hygiene"]) == {"enabled"}
    assert {"m0", "m1", "m2"} <= set(table["gates"])


def test_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    assert fault(M0 + "[dpo]\nbta = 0.1\nmax_steps = 1\n", tmp_path).endswith(
        "dpo.bta: unknown key. Did you mean dpo.beta?"
    )


def test_unknown_key_in_an_overlay_names_the_overlay(tmp_path: Path) -> None:
    assert "milestones.m0.dpo.bta: unknown key. Did you mean milestones.m0.dpo.beta?" in fault(
        M0 + "dpo.bta = 1\n", tmp_path
    )


@pytest.mark.parametrize("key", recipes.RETIRED)
def test_a_key_that_became_a_constant_is_passed_over_with_its_value_and_told_with_another(
    key: str, tmp_path: Path
) -> None:
    fixed = recipes.RETIRED[key]
    assert recipes.flatten(resolve(read(SHIPPED)).model_dump()).keys().isdisjoint(recipes.RETIRED)
    assert resolve(read(SHIPPED), sets=[f"{key}={str(fixed).lower()}"]) == resolve(read(SHIPPED))
    section, name = key.split(".")
    assert f"{key}: no setting any more, fixed at {fixed!r}" in fault(f"[{section}]\n{name} = 7\n" + M0, tmp_path)


def test_constants_are_what_their_settings_were_fixed_at() -> None:
    retired = {key.removeprefix("evaluation."): value for key, value in recipes.RETIRED.items()}
    assert {name: retired[name] for name in scores.CONSTANTS} == scores.CONSTANTS
    assert retired["benchmarks.judge_max_new_tokens"] == suite.JUDGE_TOKENS


def test_a_key_of_another_section_is_found(tmp_path: Path) -> None:
    assert "Did you mean budget.usd_per_hour?" in fault("usd_per_hour = 1.0\n" + M0, tmp_path)


def test_all_faults_at_once(tmp_path: Path) -> None:
    text = fault("items = 0\n[lora]\nrnk = 1\n[dpo]\nbeta = -1.0\nmax_steps = 1\n" + M0, tmp_path)
    assert len(text.splitlines()) == 3
    assert "items: input should be greater than or equal to 1 (found 0)" in text
    assert "dpo.beta" in text and "lora.rnk" in text


def test_wrong_type_is_refused_not_coerced(tmp_path: Path) -> None:
    assert "items: input should be a valid integer (found '3')" in fault('items = "3"\n' + M0, tmp_path)


def test_syntax_error_has_line_and_column(tmp_path: Path) -> None:
    assert "line 2, column" in fault("items = 1\n= 3\n", tmp_path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CaiError, match="no such recipe file"):
        read(tmp_path / "none.toml")


def test_unknown_milestone_lists_the_known(tmp_path: Path) -> None:
    assert "Known: m0." in fault(M0, tmp_path, milestone="zebra")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_non_finite_numbers_are_refused(tmp_path: Path, value: str) -> None:
    assert "dpo.beta" in fault(f"[dpo]\nbeta = {value}\nmax_steps = 1\n" + M0, tmp_path)


def test_set_overrides_everything_and_takes_toml_values() -> None:
    recipe = resolve(read(SHIPPED), milestone="m1", sets=["dpo.beta=0.2", "model.name=./local", "dpo.seeds=[1, 2]"])
    assert (recipe.dpo.beta, recipe.model.name, recipe.dpo.seeds) == (0.2, "./local", (1, 2))


@pytest.mark.parametrize("text", ["dpo.beta", "=3", "dpo..beta=3"])
def test_malformed_set(text: str) -> None:
    with pytest.raises(CaiError, match="expected KEY=VALUE"):
        resolve(read(SHIPPED), milestone="m0", sets=[text])


def test_a_second_line_in_a_value_is_refused_and_not_passed_over() -> None:
    with pytest.raises(CaiError, match=r"--set dpo\.beta: more than one line"):
        resolve(read(SHIPPED), milestone="m0", sets=["dpo.beta=0.3\nitems = 5"])


def test_a_length_of_training_replaces_the_other() -> None:
    recipe = resolve(read(SHIPPED), milestone="m3")
    assert (recipe.dpo.max_steps, recipe.dpo.epochs) == (0, 3.0)
    with pytest.raises(CaiError, match=r"exactly one of dpo\.max_steps and dpo\.epochs"):
        resolve(read(SHIPPED), milestone="m0", sets=["dpo.max_steps=0"])


def test_dump_resolves_to_itself(tmp_path: Path) -> None:
    recipe = resolve(read(SHIPPED), milestone="m2")
    path = tmp_path / "resolved.toml"
    path.write_bytes(recipes.dump(recipe) + b"\n[milestones.m2]\n")
    assert resolve(read(path), milestone="m2") == recipe


def changed(**update: object) -> Recipe:
    return resolve(read(SHIPPED), milestone="m1").model_copy(update=update)


def test_identity_covers_what_makes_the_data_and_nothing_else() -> None:
    recipe = changed()
    same = identity(recipe, {})
    assert identity(changed(items=99), {}) == same
    assert identity(changed(budget=recipe.budget.model_copy(update={"usd_per_hour": 9.0})), {}) == same
    assert identity(changed(dpo=recipe.dpo.model_copy(update={"beta": 0.9})), {}) == same
    assert identity(changed(dpo=recipe.dpo.model_copy(update={"beta": 0.9})), {}, training=True) != identity(
        recipe, {}, training=True
    )
    assert identity(changed(seed=5), {}) != same
    assert identity(changed(engine=recipe.engine.model_copy(update={"batch_size": 3})), {}) != same
    assert identity(recipe, {"prompts/answers.yaml": "x"}) != same


def test_8_bit_drawing_is_part_of_what_made_the_data_and_the_exact_ways_are_not() -> None:
    """Records of both would be mixed by a resume; and what earlier runs noted must stay equal."""
    recipe = changed()
    fp8, int8, fused = (
        resolve(read(SHIPPED), milestone="m1", sets=[f"engine.linears={way}"]) for way in ("fp8", "int8", "fused")
    )
    assert identity(int8, {}) == identity(recipe, {}) | {"engine.linears": "'int8'"}
    assert (int8.engine.exact.linears, fp8.engine.exact.linears, fused.engine.exact.linears) == (
        "auto",
        "auto",
        "fused",
    )
    assert identity(fused, {}) == identity(recipe, {}) and "engine.linears" not in identity(recipe, {})
    assert identity(fp8, {}) == identity(recipe, {}) | {"engine.linears": "'fp8'"}
    kv = resolve(read(SHIPPED), milestone="m1", sets=["engine.kv=int8", "engine.linears=fused"])
    assert identity(kv, {}) == identity(recipe, {}) | {"engine.kv": "'int8'"} and "engine.kv" not in identity(fp8, {})
    assert kv.engine.rounded and (kv.engine.exact.kv, kv.engine.exact.linears) == ("auto", "fused")
    assert not recipe.engine.rounded and recipe.engine.exact is recipe.engine
    first, later = (stage_identity(fp8, stage, {}) for stage in ("instructions", "answers"))
    assert first == stage_identity(recipe, "instructions", {}) | {"engine.linears": "'fp8'"}
    assert later == stage_identity(recipe, "answers", {})  # a fork at a stage compares all stages before it, too


@pytest.mark.parametrize(
    ("gate", "wanted"),
    [
        ('metric = "dpo.loss_fall"\nabove = 0\nminumum_n = 20', "gates.m0.0.minumum_n: unknown key. Did you mean"),
        ('metric = "dpo.loss_fal"\nabove = 0', "gates.m0: metric: 'dpo.loss_fal' is no figure"),
        ('metric = "dpo.loss_fall"\nabove = 0\nbeats = ["dpo.los"]', "gates.m0: beats: 'dpo.los' is no figure"),
        ('metric = "dpo.loss_fall"\nabove = 0\nbeats = ["dpo.loss_fall"]', "a figure cannot beat itself"),
        ('metric = "dpo.loss_fall"\nabove = 0\nbeats = "dpo.loss"', "gates.m0.0.beats: input should be a valid list"),
        ('metric = "dpo.loss_fall"', "set exactly one of at_least, at_most, above, below"),
        ('metric = "dpo.loss_fall"\nabove = nan', "gates.m0.0.above"),
        ('metric = "dpo.loss_fall"\nabove = 0\nminimum_n = 0', "gates.m0.0.minimum_n"),
        ("above = 0", "gates.m0.0.metric: field required"),
    ],
)
def test_a_faulty_gate_is_one_clear_line(gate: str, wanted: str, tmp_path: Path) -> None:
    """A key that is misspelt inside a list of tables counts like any other: it was dropped without a word."""
    line = fault(f"{M0}[dpo]\nmax_steps = 1\n[[gates.m0]]\n{gate}\n", tmp_path)
    assert wanted in line and "\n" not in line and "tuple" not in line


def test_gates_that_are_no_list_of_tables(tmp_path: Path) -> None:
    head = f"{M0}[dpo]\nmax_steps = 1\n"
    assert "gates.m0: input should be a valid list" in fault(f'{head}[gates.m0]\nmetric = "a"\n', tmp_path)
    assert "gates.m0.0: input should be a valid table" in fault(f"{head}[gates]\nm0 = [1]\n", tmp_path)


FIRST_OF_PAIRS = {  # the keys that [pairs] began with: every run has them in its identity
    "redraws", "retries", "replacements", "reject_limit", "reject_refusal_of_benign", "reject_near_identical",
    "max_similarity", "min_length_ratio", "max_length_ratio",
}  # fmt: skip


def test_a_key_of_pairs_that_came_later_is_off_by_default_and_in_no_run_of_before() -> None:
    """A run made before would not resume: `pairs.x: (absent) -> 'False'`."""
    later = {name: field.default for name, field in PairsSection.model_fields.items() if name not in FIRST_OF_PAIRS}
    assert {f"pairs.{name}": value for name, value in later.items()} == {
        key: value for key, value in LATER_KEYS.items() if key.startswith("pairs.")
    }
