"""YAML and command-line words to a tree of dataclasses, and back; knows no field by name.

Every problem of a file is collected, so that one run of the command shows them all.
"""

import difflib
import functools
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from opd_jax._extras import require

T = TypeVar("T")

_NONE_WORDS = ("null", "none", "None", "~")


def read(cls: type[T], path: str | Path, overrides: Sequence[str] = (), hints: Mapping[str, str] = {}) -> T:
    """Reads `cls` from a YAML file, with `--dotted.key value` words written over it.

    Args:
        cls: dataclass whose fields are plain values or further dataclasses.
        path: YAML file.
        overrides: command-line words, `--key value` or `--key=value`.
        hints: what to say of keys that people try and that do not exist.

    Raises:
        FileNotFoundError: no such file.
        ValueError: everything that is wrong with it, one line each.
    """
    path = Path(path)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")])
        raise FileNotFoundError(
            f"no config file {path}" + (f"; did you mean {path.parent / near[0]}?" if near else "")
        )
    problems: list[str] = []
    tree, origins = parse(path.read_text(encoding="utf-8"), str(path))
    _override(cls, tree, origins, overrides, hints, problems)
    config = build(cls, tree, problems, origins=origins, hints=hints)
    raise_all(problems, f"{path} cannot be used")
    return config


def write(config: Any) -> str:
    """The YAML text of a dataclass tree; `read` gives back an equal tree."""
    yaml, (_, dumper) = require("yaml"), _yaml_classes()
    return yaml.dump(asdict(config), Dumper=dumper, sort_keys=False, allow_unicode=True, width=100)


def raise_all(problems: Sequence[str], title: str) -> None:
    """Raises one ValueError that lists all problems; none: does nothing."""
    if len(problems) == 1:
        raise ValueError(problems[0])
    if problems:
        raise ValueError(f"{title}:\n" + "\n".join(f"  - {problem}" for problem in problems))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} to {"a.b": 1}; an empty mapping stays a value."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


# ---- YAML


@functools.cache
def _yaml_classes() -> tuple[type, type]:
    """yaml's safe loader and dumper; 1e-6 is a number, as in YAML 1.2 but not in PyYAML."""
    yaml = require("yaml")

    class Loader(yaml.SafeLoader):
        pass

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data):  # a value used twice is written twice
            return True

    number = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")
    for each in (Loader, Dumper):  # the dumper must put quotes around the text "1e-6"
        each.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    return Loader, Dumper


def parse(text: str, name: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Parses a YAML mapping; also returns where each dotted key stands, as `file:line`.

    Raises:
        ValueError: on bad YAML, a duplicate key, or anything but a mapping at the top.
    """
    yaml, (loader, _) = require("yaml"), _yaml_classes()
    try:
        node = yaml.compose(text, Loader=loader)
        if node is None:
            return {}, {}
        if not isinstance(node, yaml.MappingNode):
            raise ValueError(f"{name}: expected `key: value` lines, found {node.value!r}")
        origins = dict(_walk(node, "", name, set()))
        return yaml.load(text, Loader=loader), origins
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ValueError(
            f"{name}{line}: not valid YAML: {getattr(error, 'problem', None) or error}"
        ) from error


def _walk(node, prefix: str, name: str, above: set[int]) -> Iterator[tuple[str, str]]:
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        if key in seen:
            raise ValueError(f"{name}:{line}: {prefix}{key} is given twice (first in line {seen[key]})")
        seen[key] = line
        yield prefix + key, f"{name}:{line}"
        if value_node.id == "mapping":
            if id(value_node) in above:
                raise ValueError(f"{name}:{line}: {prefix}{key} contains itself")
            yield from _walk(value_node, f"{prefix}{key}.", name, above | {id(value_node)})


# ---- the command line


def _override(cls, tree, origins, words, hints, problems) -> None:
    words = list(words)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            problems.append(f"{word!r} is not an option; options are `--dotted.key value`")
            continue
        key, equals, text = word[2:].partition("=")
        key = key.replace("-", "_")
        hint, known = _find(cls, key)
        if not equals:
            if words and not words[0].startswith("--"):
                text = words.pop(0)
            elif hint is bool:
                text = "true"
            elif known:
                problems.append(f"--{key} needs a value: `--{key} VALUE` or `--{key}=VALUE`")
                continue
        if not known:
            problems.append(f"--{key}: {unknown(cls, key, hints)}")
            continue
        try:
            value = _parse_word(text, hint, key)
        except ValueError as error:
            problems.append(str(error))
            continue
        *sections, last = key.split(".")
        place = tree
        for section in sections:
            if not isinstance(place.get(section), dict):
                place[section] = {}
            place = place[section]
        place[last] = value
        origins[key] = f"--{key}"


def _find(cls, key: str) -> tuple[Any, bool]:
    """The type of a dotted key, and whether it exists; keys below a dict are free."""
    hint: Any = cls
    for part in key.split("."):
        if section := _section(hint):
            hint = get_type_hints(section).get(part)
            if hint is None:
                return None, False
        elif get_origin(hint) is dict or hint is Any:
            hint = Any
        else:
            return None, False
    return hint, True


def _parse_word(text: str, hint: Any, key: str) -> Any:
    kinds = [kind for kind in _alternatives(hint) if kind is not type(None)]
    optional = len(kinds) < len(_alternatives(hint))
    if optional and text in _NONE_WORDS:
        return None
    # Text stays as typed: a template such as "{prompt}" or a path such as "1e5" is not YAML.
    if kinds == [str] or get_origin(kinds[0]) is Literal:
        return text
    if get_origin(kinds[0]) is tuple and not text.lstrip().startswith("["):
        text = f"[{text}]"
    return parse(f"value: {text}", f"--{key}")[0]["value"]


# ---- values to dataclasses


def build(
    cls: type[T],
    tree: Mapping[str, Any],
    problems: list[str],
    *,
    prefix: str = "",
    origins: Mapping[str, str] = {},
    hints: Mapping[str, str] = {},
    root: type | None = None,
) -> T | None:
    """Makes a `cls` of nested mappings; adds to `problems` and returns None if it cannot."""
    root = root or cls
    types_of, values, before = get_type_hints(cls), {}, len(problems)
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        origin = origins.get(dotted)
        label = "" if origin is None else f"{origin}: "
        name = "" if origin == f"--{dotted}" else f"{dotted}: "
        hint = types_of.get(key)
        if hint is None:
            problems.append(label + unknown(root, dotted, hints))
        elif (section := _section(hint)) and not (value is None and section is not hint):
            left_empty = value is None and dotted in origins  # `student:` with nothing below it
            if not left_empty and not isinstance(value, Mapping):
                problems.append(f"{label}{name}is a section of keys, got {value!r}")
                continue
            values[key] = build(
                section, value or {}, problems,
                prefix=f"{dotted}.", origins=origins, hints=hints, root=root,
            )  # fmt: skip
        else:
            try:
                values[key] = convert(value, hint)
            except ValueError as error:
                why = hints.get(f"{dotted}={value}")
                problems.append(f"{label}{name}{error}" + (f" ({why})" if why else ""))
    return cls(**values) if len(problems) == before else None


def convert(value: Any, hint: Any) -> Any:
    """`value` as the type `hint`; ValueError says what was expected."""
    kinds = _alternatives(hint)
    if value is None and type(None) in kinds:
        return None
    kind = next(kind for kind in kinds if kind is not type(None))
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, (int, float)) and not isinstance(value, bool):
        if value == value and abs(value) != float("inf") and int(value) == value:
            return int(value)
    elif (kind in (bool, str) and isinstance(value, kind)) or (
        origin is Literal and isinstance(value, str) and value in args
    ):
        return value
    elif origin is dict and isinstance(value, Mapping) and all(isinstance(k, str) for k in value):
        return dict(value)
    elif origin is tuple and isinstance(value, (list, tuple)):
        wanted = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(wanted) == len(value):
            return tuple(convert(item, each) for item, each in zip(value, wanted, strict=True))
    message = f"expected {_describe(hint)}, got {value!r}"
    if origin is Literal and isinstance(value, str):
        near = difflib.get_close_matches(value, args, n=1)
        message += f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(message)


def _section(hint: Any) -> type | None:
    """The dataclass of a section of keys, which may be one that null leaves out."""
    return next((kind for kind in _alternatives(hint) if is_dataclass(kind)), None)


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _describe(hint: Any) -> str:
    kinds = _alternatives(hint)
    if len(kinds) > 1:
        return " or ".join("null" if kind is type(None) else _describe(kind) for kind in kinds)
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(repr(arg) for arg in args)
    if origin is tuple:
        one = "whole numbers" if args[0] is int else "numbers"
        return f"a list of {one}" if args[-1] is Ellipsis else f"a list of {len(args)} {one}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return names.get(hint, "a mapping with text keys")


# ---- keys that do not exist


def keys(cls: type, prefix: str = "") -> Iterator[str]:
    """All dotted keys of a dataclass tree."""
    hints = get_type_hints(cls)
    for each in fields(cls):
        section = _section(hints[each.name])
        if section:
            yield from keys(section, f"{prefix}{each.name}.")
        if section is not hints[each.name]:  # a plain value, or a section that may be null
            yield prefix + each.name


def unknown(cls: type, key: str, hints: Mapping[str, str] = {}) -> str:
    """What to say of a key that does not exist: a hint, the nearest key, or the valid ones."""
    section, _, name = key.rpartition(".")
    for tried in (key, name):
        if tried in hints:
            return f"unknown key {key!r}: {hints[tried]}"
    valid = list(keys(cls))
    beside = [each for each in valid if each.rpartition(".")[0] == section]
    same_name = [each for each in valid if each.rpartition(".")[2] == name]
    near = (
        difflib.get_close_matches(key, beside, n=1, cutoff=0.75)
        or same_name[:1]
        or difflib.get_close_matches(key, valid, n=1, cutoff=0.6)
    )
    if near:
        return f"unknown key {key!r}; did you mean {near[0]!r}?"
    below = [each for each in valid if each.startswith(f"{section}.")] if section else []
    listed = below or [each.name for each in fields(cls)]
    return f"unknown key {key!r}; valid keys{f' of {section}' if below else ''}: " + ", ".join(listed)
