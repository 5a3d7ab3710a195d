"""Where tasks come from: files, reasoning-gym, entry points, the built-in arithmetic."""

import dataclasses
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from opd_jax._extras import require
from opd_jax.tasks import arithmetic
from opd_jax.tasks._names import call, check_options, entry_point, nearest
from opd_jax.tasks._render import with_template
from opd_jax.tasks._task import Example, Task
from opd_jax.tasks._verifiers import Verifier, get_verifier

_GYM = "reasoning-gym:"
_GYM_SEED_STRIDE = 2**20
_FILES = (".jsonl", ".parquet")
_COLUMNS = {  # names that are looked for, the first one present wins
    "prompt": ("prompt", "question", "problem", "messages"),
    "answer": ("answer", "ground_truth", "solution"),
    "completion": ("completion", "response"),
}


def load(source: str, *, options: Mapping[str, Any] | None = None, verifier: str | None = None) -> Task:
    r"""The task that `source` names.

    - `arithmetic`: see `opd_jax.tasks.arithmetic.make`, whose arguments are the options.
    - `FILE.jsonl`, `FILE.parquet`: one example a row. Columns: a prompt (`prompt`, `question`,
      `problem` or `messages`: text, or chat messages, of which a last one by the assistant is the
      demonstration), `answer` (or `ground_truth`, `solution`), `completion` (or `response`);
      the rest is metadata. verl's layout (`reward_model.ground_truth`) is known.
      Options: `prompt`, `answer`, `completion` name other columns; `system` puts a system message
      in front; `template`, with fields such as `{prompt}`, replaces the last user message;
      `start`, `stop` take a part of the rows.
    - `reasoning-gym:NAME`: options `size` (500), `seed` (0), those of the data set, and
      `system_prompt`: the name of one of reasoning_gym's own (default "default": think step by
      step, answer within <answer> tags), any other text, or None. Rewards are the data set's.
      reasoning_gym makes item i from seed + i, so that data sets of neighbouring seeds share all
      but one item; here seeds (below 4096) are spread by 2^20 and share none.
    - `package.module:function`: called with the options; returns a `Task`. The working directory
      may hold the module.

    Args:
        source: one of the above.
        options: keyword arguments of the source.
        verifier: `exact`, `contains`, `math` or `package.module:function`, which takes
            (completion, example) and returns a reward in [0, 1]; None: the source's own (of a file:
            `math` in verl's layout, else `exact`).

    Returns:
        A `Task`.

    Raises:
        ValueError: for an unknown source, option or verifier (naming the nearest), a missing, empty
            or malformed file (naming the line), or an entry point that cannot be imported.

    Example:
        >>> len(load("arithmetic", options={"size": 3}))
        3
    """
    options = dict(options or {})
    if source == "arithmetic":
        task = call(source, arithmetic.make, options)
    elif source.startswith(_GYM):
        task = _gym(source.removeprefix(_GYM), options)
    elif source.endswith(_FILES):
        check_options(source, options, [f.name for f in dataclasses.fields(_FileOptions)])
        task = _file(source, _FileOptions(**options))
    elif ":" in source:
        task = call(source, entry_point(source), options)
        if missing := [a for a in ("__len__", "__getitem__", "verify") if not hasattr(task, a)]:
            raise ValueError(
                f"{source!r} returned {type(task).__name__}, which is not a Task: it lacks "
                f"{', '.join(missing)}"
            )
    else:
        raise ValueError(
            f"unknown source {source!r}{nearest(source, ['arithmetic', _GYM])}; it must be "
            "'arithmetic', 'reasoning-gym:NAME', 'package.module:function', or a path that ends "
            f"in {' or '.join(_FILES)}"
        )
    return task if verifier is None else _Verified(task, get_verifier(verifier))


class _Verified:
    """A task with another verifier."""

    def __init__(self, task: Task, verifier: Verifier):
        self._task = task
        self.name = getattr(task, "name", type(task).__name__)
        self.verify = verifier

    def __len__(self) -> int:
        return len(self._task)

    def __getitem__(self, index: int) -> Example:
        return self._task[index]


# ---- reasoning-gym


class _Gym:
    def __init__(self, name: str, dataset: Any, system_prompt: str | None):
        self.name = _GYM + name
        self._dataset = dataset
        self._system_prompt = system_prompt
        self._extract = require("reasoning_gym.utils").extract_answer

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        entry = self._dataset[index]
        prompt = entry["question"]
        if self._system_prompt is not None:
            prompt = (
                {"role": "system", "content": self._system_prompt},
                {"role": "user", "content": prompt},
            )
        metadata = {"entry": entry}
        # Some puzzles have many solutions and come without a reference.
        answer = None if entry["answer"] is None else str(entry["answer"])
        return Example(prompt, answer, metadata=metadata)

    def verify(self, completion: str, example: Example) -> float:
        """The data set's own score of what is within the last <answer> tags."""
        answer = self._extract(completion)
        if answer is None and self._system_prompt is None:
            answer = completion.strip()  # nobody asked for tags
        try:
            score = self._dataset.score_answer(answer, example.metadata["entry"])
        except Exception as error:  # a malformed answer must not end a run
            warnings.warn(f"{self.name}: scoring {answer!r} failed: {error!r}", stacklevel=2)
            return 0.0
        return min(max(float(score), 0.0), 1.0)


def _gym(name: str, options: dict[str, Any]) -> _Gym:
    gym = require("reasoning_gym")
    registry = require("reasoning_gym.factory").DATASETS
    prompts = require("reasoning_gym.utils").SYSTEM_PROMPTS
    source = _GYM + name
    if name not in registry:
        raise ValueError(
            f"reasoning-gym has no data set {name!r}{nearest(name, registry)}; "
            f"it has {len(registry)}, such as chain_sum"
        )
    fields = [f.name for f in dataclasses.fields(registry[name][1])]
    check_options(source, options, [*fields, "system_prompt"])
    options = {"size": 500, "seed": 0, "system_prompt": "default"} | options
    size, seed, system_prompt = (options.pop(k) for k in ("size", "seed", "system_prompt"))
    if not (isinstance(size, int) and 1 <= size <= _GYM_SEED_STRIDE):
        raise ValueError(f"{source}: size must be 1 to {_GYM_SEED_STRIDE}, not {size!r}")
    if not isinstance(seed, int):
        raise ValueError(f"{source}: seed must be an integer, not {seed!r}")
    if system_prompt is not None and system_prompt not in prompts and " " not in system_prompt:
        raise ValueError(
            f"{source}: unknown system_prompt {system_prompt!r}{nearest(system_prompt, prompts)}; "
            f"it must be one of {', '.join(prompts)}, a text of several words, or None"
        )
    spread = seed * _GYM_SEED_STRIDE % 2**32
    try:
        dataset = gym.create_dataset(name, size=size, seed=spread, **options)
    except (AssertionError, TypeError, ValueError) as error:  # the data set's own checks
        raise ValueError(f"{source}: bad options {options}: {error}") from error
    return _Gym(name, dataset, prompts.get(system_prompt, system_prompt))


# ---- files


@dataclasses.dataclass(frozen=True)
class _FileOptions:
    prompt: str | None = None
    answer: str | None = None
    completion: str | None = None
    system: str | None = None
    template: str | None = None
    start: int = 0
    stop: int | None = None


class _File:
    """Rows of a file as examples; a row is converted when it is asked for."""

    def __init__(self, path: str, rows: Sequence[dict], columns: Sequence[str], options: _FileOptions):
        if not len(rows):
            raise ValueError(f"{path} has no rows")
        self.name = os.path.basename(path)
        self._path, self._rows, self._options = path, rows, options
        for name, value in (("start", options.start), ("stop", options.stop)):
            if value is not None and not isinstance(value, int):
                raise ValueError(f"{path}: {name} must be an integer, not {value!r}")
        self._range = range(len(rows))[options.start : options.stop]
        if not self._range:
            raise ValueError(
                f"{path} has {len(rows)} rows; start {options.start} and stop {options.stop} leave none"
            )
        self._verl = "reward_model" in columns and options.answer is None
        self._columns = {name: self._column(name, columns, getattr(options, name)) for name in _COLUMNS}
        if self._columns["prompt"] is None:
            raise ValueError(
                f"{path} has no prompt column: looked for {', '.join(_COLUMNS['prompt'])}; found "
                f"{', '.join(columns)} (the option `prompt` names another)"
            )
        self.verify = get_verifier("math" if self._verl else "exact")
        self[0]  # a layout that is not understood shows at once

    def _column(self, name: str, columns: Sequence[str], wanted: str | None) -> str | None:
        if wanted is not None and wanted not in columns:
            raise ValueError(
                f"{self._path} has no column {wanted!r} (option {name!r}){nearest(wanted, columns)}; "
                f"found {', '.join(columns)}"
            )
        present = [c for c in _COLUMNS[name] if c in columns]
        return wanted or next(iter(present), None)

    def __len__(self) -> int:
        return len(self._range)

    def __getitem__(self, index: int) -> Example:
        if index < 0:
            raise IndexError(f"example {index}")
        row = self._range[index]
        try:
            return self._example(self._rows[row])
        except ValueError as error:
            raise ValueError(f"{self._path}, row {row + 1}: {error}") from error

    def _example(self, row: Mapping[str, Any]) -> Example:
        used = set(self._columns.values())
        metadata = {key: value for key, value in row.items() if key not in used}
        prompt = _prompt(row.get(self._columns["prompt"]))
        completion = _text(row.get(self._columns["completion"]))
        if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
            completion = prompt[-1]["content"] if completion is None else completion
            prompt = prompt[:-1]
        answer = row.get(self._columns["answer"])
        if self._verl:
            answer = (metadata.pop("reward_model") or {}).get("ground_truth")
        if self._options.system is not None:
            system = {"role": "system", "content": self._options.system}
            user = {"role": "user", "content": prompt}
            prompt = (system, *((user,) if isinstance(prompt, str) else prompt))
        example = Example(prompt, _text(answer), completion, metadata)
        return with_template(example, self._options.template)


def _prompt(value: Any) -> str | tuple[dict[str, str], ...]:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise ValueError(f"the prompt must be text or a list of messages, not {value!r:.80}")
    for message in value:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (0, 0)
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError(f"a message must have a role and a content, both text, not {message!r:.80}")
    return tuple({"role": m["role"], "content": m["content"]} for m in value)


def _text(value: Any) -> str | None:
    """A cell as text; structures as JSON."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def _file(path: str, options: _FileOptions) -> _File:
    if not os.path.isfile(path):
        raise ValueError(f"data file not found: {path} (working directory {os.getcwd()})")
    rows, columns = _jsonl(path) if path.endswith(".jsonl") else _parquet(path)
    return _File(path, rows, columns, options)


def _jsonl(path: str) -> tuple[list[dict], list[str]]:
    rows, columns = [], {}
    with open(path, encoding="utf-8-sig") as file:  # a byte order mark is no part of the JSON
        try:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (json.JSONDecodeError, RecursionError) as error:
                    raise ValueError(f"{path}:{number}: not JSON: {error}") from error
                if not isinstance(row, dict):
                    raise ValueError(
                        f"{path}:{number}: expected an object such as "
                        f'{{"prompt": "...", "answer": "..."}}, found {type(row).__name__}'
                    )
                rows.append(row)
                columns.update(dict.fromkeys(row))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    return rows, list(columns)


class _ParquetRows:
    """Rows of an Arrow table as dicts, made when asked for."""

    def __init__(self, table: Any):
        self._table = table

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: int) -> dict:
        return self._table.slice(index, 1).to_pylist()[0]


def _parquet(path: str) -> tuple[_ParquetRows, list[str]]:
    arrow = require("pyarrow")
    try:
        table = require("pyarrow.parquet").read_table(path)
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable Parquet file: {error}") from error
    return _ParquetRows(table), table.column_names
