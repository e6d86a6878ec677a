"""Rules of the security list that a call may break: no code of strangers is run, nothing reports home."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest
from support.runs import ROOT

from cai.errors import CaiError
from cai.models import policy
from cai.recipe.settings import ModelSection

SOURCES = [ROOT / "runner.py", *sorted((ROOT / "cai").rglob("*.py"))]


def calls() -> list[tuple[str, ast.Call]]:
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                found.append((f"{path.name}:{node.lineno} {ast.unparse(node.func)}", node))
    return found


def values(name: str) -> list[tuple[str, object]]:
    """What each call passes as `name`."""
    return [
        (where, keyword.value.value if isinstance(keyword.value, ast.Constant) else ast.unparse(keyword.value))
        for where, node in calls()
        for keyword in node.keywords
        if keyword.arg == name
    ]


@pytest.mark.slow
def test_no_code_of_a_model_is_ever_trusted() -> None:
    given = values("trust_remote_code")
    assert len(given) >= 3 and not [where for where, value in given if value is not False]


@pytest.mark.slow
def test_only_safe_readers_are_used() -> None:
    """Every yaml.load names a loader that derives from a safe one; no pickle, no eval, no torch.load of any file."""
    names = [where.split(" ", 1)[1] for where, _ in calls()]
    assert not {"pickle.load", "pickle.loads", "eval", "exec", "torch.load", "yaml.unsafe_load"} & set(names)
    loaders = {value for where, value in values("Loader") if "yaml.load" in where}
    assert loaders == {"_FastLoader", "_Loader"}
    from cai.recipe import yaml_files

    for loader in (yaml_files._FastLoader, yaml_files._Loader):
        assert {"SafeLoader", "CSafeLoader"} & {base.__name__ for base in loader.__mro__}


@pytest.mark.slow
def test_nothing_reports_home(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {value for _, value in values("report_to")} == {"none"}
    assert False in {value for where, value in values("push_to_hub")}
    names = ("UNSLOTH_DISABLE_STATISTICS", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    policy.prepare_environment()
    assert [os.environ[name] for name in names] == ["1", "1", "1"]


@pytest.mark.slow
def test_no_average_stands_for_a_nan() -> None:
    """Fact 5: with transformers' filter a NaN loss is logged as the mean of the others."""
    assert {value for _, value in values("logging_nan_inf_filter")} == {False}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "adapter_model.bin"])
def test_a_folder_of_pickled_weights_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(CaiError, match=rf"^model\.name: .*{name} is a pickle.*safetensors\.$"):
        policy.resolve_name(ModelSection(name=str(tmp_path)), print)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert policy.resolve_name(ModelSection(name=str(tmp_path)), print) == str(tmp_path)


def test_templates_trust_no_text() -> None:
    from cai.report.templating import environment

    jinja = environment()
    assert jinja.autoescape is True and jinja.undefined.__name__ == "StrictUndefined"
    for path in sorted((ROOT / "cai" / "templates").glob("*.html*")):
        text = path.read_text()
        assert "|safe" not in text.replace(" ", "") and "autoescape" not in text, path.name
