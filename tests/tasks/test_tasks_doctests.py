import doctest
import importlib

import pytest

MODULES = ["_task", "arithmetic", "_render", "_prompts", "_verifiers", "_sources", "_evaluate"]


@pytest.mark.parametrize("module", MODULES)
def test_examples(module):
    failed, _ = doctest.testmod(importlib.import_module(f"opd_jax.tasks.{module}"))
    assert not failed
