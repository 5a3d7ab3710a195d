"""Names that users type: nearest matches, `module:function`, keyword arguments."""

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def nearest(name: str, valid: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the valid name nearest to `name`, or nothing."""
    match = difflib.get_close_matches(name, list(valid), n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""


def entry_point(name: str) -> Any:
    """What `package.module:attribute` names; the working directory may hold the module.

    Raises:
        ValueError: if it cannot be imported or found.
    """
    module_name, _, attribute = name.partition(":")
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)  # last, so that nothing there hides an installed module
    try:
        target = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(
            f"{name!r}: importing {module_name!r} failed: {type(error).__name__}: {error} "
            f"(looked in the working directory {here} too)"
        ) from error
    for part in attribute.split("."):
        if not hasattr(target, part):
            raise ValueError(f"{name!r}: {module_name!r} has no {attribute!r}{nearest(part, dir(target))}")
        target = getattr(target, part)
    if not callable(target):
        raise ValueError(f"{name!r} is {type(target).__name__}, not a function")
    return target


def check_options(what: str, options: Mapping[str, Any], valid: Iterable[str]) -> None:
    """Raises ValueError for an option that is not valid, naming the nearest that is."""
    valid = list(valid)
    for name in options:
        if name not in valid:
            raise ValueError(
                f"{what} has no option {name!r}{nearest(name, valid)}; "
                f"it has {', '.join(sorted(valid)) or 'none'}"
            )


def call(what: str, function: Callable, options: Mapping[str, Any]) -> Any:
    """`function(**options)`; options that it does not take, or lacks, raise ValueError."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some callables written in C have none
        return function(**options)
    if not any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        check_options(what, options, signature.parameters)
    try:
        signature.bind(**options)
    except TypeError as error:
        raise ValueError(f"{what}: {error}") from error
    return function(**options)
