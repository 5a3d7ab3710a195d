"""What the documentation shows runs: docstring examples, and the README's Python and YAML."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import yaml

import opd_jax
from opd_jax import config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODULES = sorted(module.name for module in pkgutil.walk_packages(opd_jax.__path__, "opd_jax."))


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert not failed


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)


def test_readme_python(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for code in _blocks("python"):
        exec(code.replace("/tmp/my_model", str(tmp_path / "model")), {})
    assert (tmp_path / "model" / "config.json").exists()
    assert ">" in capsys.readouterr().out  # the completions hold answers


def test_readme_yaml(tmp_path):
    (text,) = _blocks("yaml")
    path = tmp_path / "my.yaml"
    path.write_text(text)
    config.load(path).validate()
    assert yaml.safe_load(text)


def test_readme_names_every_objective():
    for name in ("reverse_kl", "sampled_reverse_kl", "sft", "grpo"):
        assert f"`{name}`" in README or f": {name}`" in README
