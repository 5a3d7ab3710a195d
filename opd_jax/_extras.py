"""Imports of optional packages, with an error that says how to install them."""

import importlib
from types import ModuleType


def require(name: str, extra: str = "train") -> ModuleType:
    """Imports the optional module `name`, which comes with `opd_jax[extra]`.

    Raises:
        ImportError: if it is not installed, naming the command that installs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{name} could not be imported ({error}); it comes with `pip install 'opd_jax[{extra}]'`"
        ) from error
