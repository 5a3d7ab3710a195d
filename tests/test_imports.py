"""The library is light to import, and its parts depend one way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import opd_jax

PACKAGE = Path(opd_jax.__file__).parent

# Each part and the parts it may import. `_extras` imports nothing and is open to all.
MAY_IMPORT = {
    "losses": set(),
    "transforms": set(),
    "parallel": set(),
    "config": {"losses"},
    "demo": set(),
    "models": {"parallel"},
    "rollout": {"models", "parallel"},
    "tasks": {"rollout", "models", "parallel"},
    "training": {"losses", "transforms", "parallel", "config", "models", "rollout", "tasks"},
    "analysis": {"transforms", "models"},
}
MAY_IMPORT["cli"] = set(MAY_IMPORT)
PART_OF = {
    "_config_io": "config",
    "_config_checks": "config",
    "_objective_checks": "config",
    "_foresight_checks": "config",
    "_analyze_cli": "cli",
    "_intervene_cli": "cli",
    "_intervene_score": "cli",
    "_plan_cli": "cli",
}

# fmt: off
HEAVY = {
    "orbax", "grain", "transformers", "tokenizers", "tyro", "torch", "safetensors", "gguf",
    "huggingface_hub", "yaml", "rich", "pyarrow", "jinja2", "reasoning_gym", "math_verify",
    "tensorboardX", "wandb", "matplotlib", "plotly", "kaleido", "sklearn",
}
# fmt: on
LIGHT = (
    "opd_jax",
    "opd_jax.losses",
    "opd_jax.transforms",
    "opd_jax.analysis",
    "opd_jax.models",
    "opd_jax.rollout",
    "opd_jax.parallel",
    "opd_jax.tasks",
    "opd_jax.config",
)  # fmt: skip


def loaded_by(module: str) -> set[str]:
    """Heavy top-level modules that importing `module` loads beyond what its base loads anyway."""
    code = (
        "import sys, chex, flax.nnx, jax, numpy, optax; before = set(sys.modules); "
        f"import {module}; print(*{{name.split('.')[0] for name in set(sys.modules) - before}})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split()) & HEAVY


@pytest.mark.parametrize("module", LIGHT)
def test_importing_is_light(module):
    assert not loaded_by(module)


def part_of(module: str) -> str | None:
    """The part a module of the project belongs to; None for opd_jax itself and `_extras`."""
    names = module.split(".")
    if len(names) < 2 or names[1] in ("_extras", "__main__"):
        return None
    return PART_OF.get(names[1], names[1])


def imports(path: Path, name: str) -> set[tuple[int, str]]:
    """(line, module) of everything of the project that a file imports, at any depth."""
    found = set()
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {(node.lineno, alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            # `from opd_jax import models` imports a part; `from opd_jax import __version__` none.
            below = [a.name for a in node.names if not a.name.startswith("__")]
            found |= {(node.lineno, f"{base}.{each}" if base == "opd_jax" else base) for each in below}
    return {(line, module) for line, module in found if module.split(".")[0] == "opd_jax"}


def violations(path: Path, name: str) -> list[str]:
    """What a file imports that its part must not."""
    part, found = part_of(name), []
    for line, module in sorted(imports(path, name)):
        other = part_of(module)
        if other is None or other == part:
            continue
        if part is not None and other not in MAY_IMPORT[part]:
            allowed = ", ".join(sorted(MAY_IMPORT[part])) or "nothing of the project"
            found.append(f"{name}:{line} imports {module}; {part} may import {allowed}")
        if name == "opd_jax._extras":
            found.append(f"{name}:{line} imports {module}; _extras may import nothing")
    return found


FILES = {
    ".".join(("opd_jax", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def test_every_part_has_its_place():
    unknown = {part_of(name) for name in FILES} - set(MAY_IMPORT) - {None}
    assert not unknown, f"say in MAY_IMPORT what {unknown} may import"


def test_parts_import_one_way():
    assert not [line for name, path in FILES.items() for line in violations(path, name)]


def test_no_circles():
    done: set[str] = set()
    while rest := set(MAY_IMPORT) - done:
        free = {part for part in rest if not (MAY_IMPORT[part] & rest) - {"cli"}}
        assert free, f"{rest} import one another"
        done |= free


@pytest.mark.parametrize(
    ("line", "name", "bad"),
    [
        ("from opd_jax.models import load", "opd_jax.losses._x", True),
        ("from opd_jax import models", "opd_jax.losses._x", True),
        ("import opd_jax.training._step", "opd_jax.models._x", True),
        ("from ..training import _step", "opd_jax.models._x", True),
        ("def f():\n    from opd_jax import cli", "opd_jax.training._x", True),
        ("from ._y import f", "opd_jax.losses._x", False),
        ("from . import _y", "opd_jax.losses._x", False),
        ("from opd_jax import __version__", "opd_jax.losses._x", False),
        ("from opd_jax._extras import require", "opd_jax.losses._x", False),
        ("from opd_jax.models import load", "opd_jax.training._x", False),
        ("import opd_jaxx.cli", "opd_jax.losses._x", False),
    ],
)
def test_the_check_sees_every_form_of_import(line, name, bad, tmp_path):
    path = tmp_path / "_x.py"
    path.write_text(line)
    assert bool(violations(path, name)) is bad
