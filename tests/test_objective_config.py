"""Which options go together: every refusal is met by a config, and what the README names is accepted."""

import ast
import inspect
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from opd_jax import _objective_checks
from opd_jax import config as configs
from opd_jax.config import (
    Config,
    DataConfig,
    EarlyStopConfig,
    EvaluationConfig,
    LoraConfig,
    ReferenceConfig,
    StudentConfig,
    TeacherConfig,
    TeacherMeshConfig,
    TokensConfig,
)

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SECTION = README.split("### Objectives\n")[1].split("\n### ")[0]

SFT = dict(objective="sft", teacher=TeacherConfig())
GRPO = dict(objective="grpo", teacher=TeacherConfig(), samples_per_prompt=2)
SAMPLED = dict(loss="sampled_reverse_kl")
TOP_K = {"sampled_tail_reverse_kl": 2}
ESTIMATES = {"sampled_reverse_kl": 0, "extrapolated_reverse_kl": 0} | TOP_K
TAGGED = DataConfig(source="arithmetic", options={"seed": 0}, teacher="kind")
TWO = dict(teacher=TeacherConfig(), teachers={"a": {"path": "x"}, "b": {"path": "y"}}, data=TAGGED)
CACHED = dict(lmbda=0.0, teacher=TeacherConfig(path="large", cache="folder"))
EVALUATED = EvaluationConfig(prompts=8, options={"seed": 1}, teacher=True)


def make(**changes: Any) -> Config:
    base = Config(
        student=StudentConfig(path="small"),
        teacher=TeacherConfig(path="large"),
        data=DataConfig(source="arithmetic", options={"seed": 0}),
    )
    return replace(base, **changes)


def teacher(**changes: Any) -> dict:
    return dict(teacher=TeacherConfig(**{"path": "large"} | changes))


def own(**changes: Any) -> dict:
    """A teacher that is an average of the student."""
    return teacher(**dict(path="small", ema=0.9, context="{prompt}{answer}") | changes)


def several(**second: Any) -> dict:
    return TWO | dict(teachers={"a": {"path": "x"}, "b": second})


def complaints(config: Config) -> str:
    with pytest.raises(ValueError) as error:
        config.validate()
    return str(error.value)


REFUSED = [
    # The loss and its options.
    (dict(loss="jsd", loss_options={"betta": 0.5}),
     "loss_options.betta: jsd has no such option; did you mean 'beta'"),
    (dict(loss="jsd", loss_options={"zzz": 0.5}), "jsd takes beta, scaled"),
    (dict(loss_options={"zzz": 1}), "reverse_kl takes none"),
    (dict(loss="jsd", loss_options={"axis": 0}), "loss_options.axis: jsd has no such option"),
    (dict(loss_options={"k": 3}), "it is the key loss_top_k"),
    (dict(loss_options={"temperature": 2.0}), "it is the key loss_temperature"),
    (dict(SAMPLED, loss_options={"importance_clip": 2.0}), "it is the key importance_clip"),
    (dict(loss="extrapolated_reverse_kl", loss_options={"lam": 2.0}), "did you mean 'scale'?"),
    (dict(SAMPLED, loss_options={"lambda": 2.0}), "kl takes discount, level, beyond"),
    (dict(loss="entropy_aware_kl"), "loss_options lacks threshold, which entropy_aware_kl needs"),
    (dict(loss="jsd", loss_options={"beta": 1.0}), "jsd does not take {'beta': 1.0}: beta must be"),
    (dict(loss="mixed_kl", loss_options={"forward_weight": 2.0}), "must be in [0, 1], got 2.0"),
    (dict(loss="skew_kl", loss_options={"skew": 1.0}), "skew must be in [0, 1)"),
    (dict(loss="entropy_aware_kl", loss_options={"threshold": -1.0}), "an entropy in nats, >= 0, got -1.0"),
    (dict(SAMPLED, loss_options={"discount": 2.0}), "discount must be in [0, 1], got 2.0"),
    (dict(SAMPLED, loss_options={"level": "word"}), "level must be 'token' or 'sequence'"),
    (dict(loss="extrapolated_reverse_kl", loss_options={"scale": -1.0}), "scale must be >= 0, got -1.0"),
    (dict(loss="sampled_tail_reverse_kl"), "exact on that many tokens and needs at least 1"),
    # One teacher.
    (teacher(path="small"), "so the loss is zero; name another model"),
    (dict(teacher(path="small"), loss="extrapolated_reverse_kl"), "so the loss is zero"),
    (dict(SAMPLED, **own(align=True)), "teacher.ema and teacher.align exclude each other"),
    (dict(SAMPLED, **own(ema=0.0, align=True)), "teacher.ema and teacher.align exclude each other"),
    (dict(SAMPLED, **teacher(align=True, cache="folder")), "align and teacher.cache exclude each other"),
    (own(ema=1.0), "teacher.ema is 1.0; it must be in [0, 1)"),
    (own(path="large"), "teacher.path is 'large'; it must be student.path, 'small'"),
    (own(context=None), "teacher.ema needs teacher.context"),
    (own(dtype="bfloat16"), "an averaged teacher takes the student's"),
    (own(attention="xla"), "an averaged teacher takes the student's"),
    (dict(own(), evaluation=EVALUATED), "with teacher.ema the teacher starts as the student"),
    (dict(own(), lmbda=0.5, off_policy="teacher"), "(teacher.ema) writes no completions"),
    (teacher(align=True), "set loss: sampled_reverse_kl, without loss_options"),
    (dict(SAMPLED, **teacher(align=True), loss_options={"discount": 1.0}), "without loss_options"),
    (dict(SAMPLED, **teacher(align=True), tokens=TokensConfig(weights="prefix_drift")),
     "teacher.align goes with tokens.weights: uniform"),
    (dict(SAMPLED, **teacher(align=True), early_stop=EarlyStopConfig(overlap=0.5)),
     "teacher.align goes with tokens.weights: uniform"),
    (dict(SAMPLED, **teacher(align=True), evaluation=EVALUATED), "the prompts are in the student's tokens"),
    (dict(CACHED, lmbda=1.0), "the data set's completions alone: set lmbda: 0"),
    (dict(CACHED, off_policy="teacher"), "the data set's completions alone: set lmbda: 0"),
    (dict(CACHED, **SAMPLED), "teacher.cache holds top-k log-probs: set loss to a divergence"),
    (dict(CACHED, loss_top_k=4), "and loss_top_k to 0"),
    (dict(CACHED, **teacher(cache="folder", cache_top_k=0)), "teacher.cache_top_k is 0"),
    (dict(CACHED, tokens=TokensConfig(weights="high_entropy")), "teacher.cache goes with tokens.weights"),
    (dict(CACHED, evaluation=EVALUATED), "evaluation.teacher: false"),
    # On devices of its own.
    (teacher(mesh=TeacherMeshConfig(fsdp=-1)), "teacher.mesh.fsdp is -1; it must be at least 1"),
    (dict(CACHED, **teacher(cache="folder", mesh=TeacherMeshConfig())),
     "teacher.mesh and teacher.cache exclude each other"),
    # Several.
    (dict(TWO, data=DataConfig(source="arithmetic")), "teachers is set but data.teacher is not"),
    (dict(data=TAGGED), "data.teacher is set but teachers is not"),
    *((dict(TWO, **teacher(**{"path": "", **given})), "teacher and teachers are both set") for given in (
        dict(path="large"), dict(context="{prompt}"), dict(ema=0.5), dict(align=True), dict(cache="folder"),
        dict(dtype="bfloat16"), dict(attention="xla"))),
    (dict(TWO, evaluation=EVALUATED), "there are several; evaluate them with `opd-jax evaluate`"),
    (dict(TWO, lmbda=0.5, off_policy="teacher"), "off_policy is teacher, but there are several"),
    (TWO | dict(teachers={"a": "x"}), "teachers.a must be a mapping with a path"),
    (several(dtype="bfloat16"), "teachers.b must be a mapping with a path"),
    (several(path=3), "teachers.b must be a mapping with a path"),
    (several(path="y", context="{prompt}"), "teachers.b.context: unknown key; a teacher has path, dtype, a"),
    (several(path="y", dtype="float16"), "b.dtype is 'float16'; it must be one of float32, bfloat16"),
    (several(path="y", attention="flash"), "teachers.b.attention is 'flash'; it must be one of auto, xla"),
    # Who writes the completions.
    (dict(lmbda=1.5), "lmbda is 1.5; it is the share of steps"),
    (dict(lmbda=float("nan")), "lmbda is nan"),
    (dict(SFT, off_policy="teacher"), "the teacher writes what sft imitates"),
    *((dict(lmbda=0.5, loss=loss, loss_top_k=top_k), f"but {loss} is an estimate from what the student")
      for loss, top_k in ESTIMATES.items()),
    (dict(lmbda=0.5, task_weight=1.0, samples_per_prompt=2), "task_weight needs what the student itself"),
    # The task.
    (dict(task_weight=-1.0), "task_weight is -1.0; it must be at least 0"),
    (dict(task_weight=float("nan")), "task_weight is nan"),
    (dict(task_weight=float("inf"), samples_per_prompt=2), "task_weight is inf"),
    (dict(task_weight=1.0), "task_weight compares the completions of a prompt and needs at least 2"),
    (dict(GRPO, overlong_buffer=-1), "overlong_buffer is -1; it must be from 0 to max_new_tokens"),
    (dict(GRPO, overlong_buffer=257), "overlong_buffer is 257"),
    (dict(GRPO, dynamic_sampling=-1), "dynamic_sampling is -1"),
    # What counts.
    (dict(tokens=TokensConfig(weights="prefix_drift", strength=-1.0)), "tokens.strength is -1.0"),
    (dict(tokens=TokensConfig(weights="high_entropy", fraction=0.0)), "tokens.fraction is 0.0"),
    *((dict(SAMPLED, loss_options=options, tokens=TokensConfig(weights="high_entropy")), "whole completions")
      for options in ({"discount": 0.5}, {"level": "sequence"})),
    (dict(early_stop=EarlyStopConfig(overlap=1.5)), "early_stop.overlap is 1.5; it must be from 0 to 1"),
    (dict(early_stop=EarlyStopConfig(overlap=0.5, window=0)), "early_stop.window is 0"),
    (dict(early_stop=EarlyStopConfig(horizon=8)), "early_stop.horizon is 8 and horizon_steps 0"),
    (dict(early_stop=EarlyStopConfig(horizon=256, horizon_steps=4)), "from 1 to max_new_tokens - 1 = 255"),
    (dict(loss_top_k=-1), "loss_top_k is -1; it must be at least 0"),
    *((dict(loss_temperature=t), f"loss_temperature is {t}; it must be above 0")
      for t in (0.0, float("nan"), float("inf"))),
    # Adapters.
    (dict(lora=LoraConfig(rank=-1)), "lora.rank is -1; it must be at least 0"),
    (dict(lora=LoraConfig(rank=2, alpha=0.0)), "lora.alpha is 0.0; it must be above 0"),
    (dict(lora=LoraConfig(rank=2, targets=())), "lora.targets is empty; name modules"),
]  # fmt: skip

OURS = "objective {} does not use it"
UNUSED = {
    "loss": (dict(SFT, loss="jsd"), OURS.format("sft")),
    "loss_options": (dict(GRPO, loss_options={"beta": 0.5}), OURS.format("grpo")),
    "task_weight": (dict(GRPO, task_weight=1.0), OURS.format("grpo")),
    "lmbda": (dict(SFT, lmbda=0.5), OURS.format("sft")),
    "teacher.path": (dict(SFT, **teacher()), "objective sft has no teacher"),
    "teacher.dtype": (dict(SFT, teacher=TeacherConfig(dtype="bfloat16")), "objective sft has no teacher"),
    "teacher.mesh": (dict(SFT, teacher=TeacherConfig(mesh=TeacherMeshConfig())), "sft has no teacher"),
    "teacher.attention": (dict(SFT, teacher=TeacherConfig(attention="xla")), "objective sft has no teacher"),
    "teacher.context": (dict(GRPO, **teacher(context="{prompt}"), kl_coefficient=1.0), "no other prompt"),
    "teacher.ema": (dict(GRPO, **own(), kl_coefficient=1.0), OURS.format("grpo")),
    "teacher.align": (dict(GRPO, **teacher(align=True), kl_coefficient=1.0), OURS.format("grpo")),
    "teacher.cache": (dict(SFT, **teacher(cache="folder"), off_policy="teacher"), OURS.format("sft")),
    "teachers": (SFT | TWO | SFT, OURS.format("sft")),
    "data.teacher": (dict(GRPO, data=TAGGED), OURS.format("grpo")),
    "teacher.cache_top_k": (teacher(cache_top_k=8), "teacher.cache is not set"),
    "ratio_clip": (dict(ratio_clip=(0.1, 0.1)), OURS.format("opd")),
    "kl_coefficient": (dict(kl_coefficient=0.1), OURS.format("opd")),
    "dynamic_sampling": (dict(dynamic_sampling=2), OURS.format("opd")),
    "normalise_advantages": (dict(normalise_advantages=False), "no task reward is used"),
    "overlong_buffer": (dict(overlong_buffer=8), "no task reward is used"),
    "samples_per_prompt": (dict(SFT, samples_per_prompt=2), OURS.format("sft")),
    "importance_clip": (dict(importance_clip=2.0), "has no importance weight"),
    "loss_temperature": (dict(SAMPLED, loss_temperature=2.0), "the law that was sampled, at temperature 1"),
    "loss_top_k": (dict(SAMPLED, loss_top_k=4), "looks at the sampled token alone"),
    "loss_support": (dict(loss_support="union"), "the whole vocabulary counts"),
    "reference.path": (dict(reference=ReferenceConfig(path="x")), "only loss extrapolated_reverse_kl has"),
    "reference.dtype": (dict(reference=ReferenceConfig(dtype="bfloat16")), "only loss extrapolated"),
    "reference.attention": (dict(reference=ReferenceConfig(attention="xla")), "only loss extrapolated"),
    "off_policy": (dict(off_policy="teacher"), "the student writes all completions"),
    "tokens.weights": (dict(GRPO, tokens=TokensConfig(weights="high_entropy")), OURS.format("grpo")),
    "tokens.strength": (dict(tokens=TokensConfig(strength=1.0)), "tokens.weights is uniform"),
    "tokens.fraction": (dict(tokens=TokensConfig(weights="prefix_drift", fraction=0.5)), "is prefix_drift"),
    "rollout_batch": (dict(SFT, rollout_batch=8), "no completion is sampled"),
    "tokens.drop_truncated": (
        dict(lmbda=0.0, tokens=TokensConfig(drop_truncated=True)), "data set's are whole"
    ),
    "early_stop.overlap": (dict(GRPO, early_stop=EarlyStopConfig(overlap=0.5)), OURS.format("grpo")),
    "early_stop.window": (dict(early_stop=EarlyStopConfig(window=8)), "early_stop.overlap is 0"),
    "early_stop.horizon": (dict(lmbda=0.0, early_stop=EarlyStopConfig(horizon=8, horizon_steps=2)),
                           "nothing is sampled from the student"),
    "early_stop.horizon_steps": (dict(early_stop=EarlyStopConfig(horizon_steps=8)), "stop.horizon is 0"),
    "lora.alpha": (dict(lora=LoraConfig(alpha=8.0)), "lora.rank is 0: no adapters"),
    "lora.targets": (dict(lora=LoraConfig(targets=("q",))), "lora.rank is 0: no adapters"),
    "lora.save": (dict(lora=LoraConfig(save="adapter")), "lora.rank is 0: no adapters"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "says"), REFUSED)
def test_refused(changes, says):
    assert says in complaints(make(**changes))


@pytest.mark.parametrize("key", UNUSED)
def test_an_option_that_is_not_used_is_refused(key):
    changes, why = UNUSED[key]
    lines = complaints(make(**changes)).splitlines()
    (line,) = [
        line for line in lines if f"{key} is set but " in f" {line}" and line.endswith(f"remove {key}")
    ]
    assert why in line


@pytest.mark.parametrize("key", ["loss_temperature", "loss_top_k"])
@pytest.mark.parametrize("objective", [SFT, GRPO])
def test_the_reason_is_that_of_the_objective(key, objective):
    assert OURS.format(objective["objective"]) in complaints(make(**objective, **{key: 2}))


def test_every_rule_is_met_by_some_config():
    """Each `yield` of the checks runs for a config of the tables above, and each key that may go unused."""
    source = Path(_objective_checks.__file__)
    inside = [f for f in ast.walk(ast.parse(source.read_text())) if isinstance(f, ast.FunctionDef)]
    wanted = {n.lineno for f in inside for n in ast.walk(f) if isinstance(n, ast.Yield)}
    seen = set()

    def trace(frame, event, _):
        if frame.f_code.co_filename != str(source):
            return None
        seen.add(frame.f_lineno)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        for changes, _ in REFUSED:
            list(_objective_checks.problems(make(**changes)))
    finally:
        sys.settrace(before)
    lines, start = inspect.getsourcelines(_objective_checks.used)
    wanted -= set(range(start, start + len(lines)))  # all of these always run
    assert not wanted - seen
    keys = [key for keys, _, _ in _objective_checks.used(make()) for key in keys]
    assert sorted(keys) == sorted(UNUSED)


OPTIONS = {"entropy_aware_kl": {"threshold": 1.0}}
DIVERGENCES = [
    name for name in get_args(configs.Loss) if "sampled" not in name and "extrapolated" not in name
]
ACCEPTED = [
    *(dict(loss=name, loss_options=OPTIONS.get(name, {}), loss_top_k=TOP_K.get(name, 0))
      for name in get_args(configs.Loss)),
    *(dict(loss=name, loss_options=OPTIONS.get(name, {}), **more) for name in DIVERGENCES for more in (
        dict(loss_top_k=4, loss_support="union", loss_temperature=2.0), CACHED, dict(lmbda=0.5),
        dict(lmbda=0.0, off_policy="teacher"), own(), TWO)),
    *(dict(loss=name, loss_top_k=top_k, importance_clip=2.0, task_weight=0.5, samples_per_prompt=2)
      for name, top_k in ESTIMATES.items()),
    *(dict(tokens=TokensConfig(weights=weights), early_stop=EarlyStopConfig(overlap=0.3))
      for weights in get_args(TokensConfig.__annotations__["weights"])),
    dict(importance_clip=2.0, task_weight=0.5, samples_per_prompt=2, overlong_buffer=8),
    dict(SAMPLED, **teacher(align=True), task_weight=0.5, samples_per_prompt=2, lora=LoraConfig(rank=4)),
    dict(SAMPLED, loss_options={"level": "sequence"}, tokens=TokensConfig(weights="prefix_drift")),
    dict(loss="extrapolated_reverse_kl", reference=ReferenceConfig(path="base"), **teacher(path="small")),
    dict(teacher(path="small"), task_weight=1.0, samples_per_prompt=2),  # held back by where it started
    dict(lmbda=0.0, off_policy="teacher", tokens=TokensConfig(drop_truncated=True)),
    dict(objective="sft", off_policy="teacher", tokens=TokensConfig(drop_truncated=True)),
    dict(tokens=TokensConfig(drop_truncated=True), early_stop=EarlyStopConfig(horizon=8, horizon_steps=2)),
    dict(GRPO, tokens=TokensConfig(drop_truncated=True), normalise_advantages=False, dynamic_sampling=2),
    several(path="y", dtype="bfloat16", attention="xla"),
]  # fmt: skip


@pytest.mark.parametrize("changes", ACCEPTED)
def test_accepted(changes):
    make(**changes).validate()


# ---- the README's tables


def _tables() -> list[list[list[str]]]:
    """Cells of each table of the README's section, without its head."""
    found, rows = [], []
    for line in [*SECTION.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif rows:
            found.append(rows[2:])
            rows = []
    return found


LOSSES, OBJECTIVES, MORE = _tables()


def test_readme_names_each_loss_once():
    names = [name for cells in LOSSES for name in re.findall(r"`(\w+)`", cells[0]) if name != "loss_top_k"]
    assert sorted(names) == sorted(get_args(configs.Loss))


@pytest.mark.parametrize("cells", LOSSES, ids=lambda cells: cells[0])
def test_readme_lists_the_options_of_each_loss(cells):
    listed = re.findall(r"\{(.*?)\}", cells[0])
    for name in re.findall(r"`(\w+)`", cells[0]):
        if name != "loss_top_k":
            refusal = complaints(make(loss=name, loss_options={"zzz": 1}, loss_top_k=TOP_K.get(name, 0)))
            assert f"{name} takes {listed[0] if listed else 'none'}" in refusal


# What a row of the tables leaves to its reader.
COMPANIONS = {
    "sft": "teacher: {path: ''}",
    "grpo": "{teacher: {path: ''}, samples_per_prompt: 8, max_new_tokens: 1024}",
    "task_weight": "samples_per_prompt: 8",
    "off_policy": "lmbda: 0.5",
    "teacher.ema": "teacher: {path: small, context: '{prompt}{answer}'}",
    "teachers": "teacher: {path: ''}",
    "teacher.align": "loss: sampled_reverse_kl",
}


def _variants(cell: str) -> list[dict[str, Any]]:
    """The configs that a cell stands for: `key: value` pairs that belong together, with alternatives."""
    variants: list[dict[str, Any]] = [{}]
    key = "objective"
    for before, text in re.findall(r"([^`]*)`([^`]*)`", cell):
        pair = yaml.safe_load(text if ": " in text and text[0] != "{" else f"{key}: {text}")
        if text in ("tokens.drop_truncated",):  # a switch, named alone
            pair = {text: True}
        (key,) = pair
        fresh = [{**each, **pair} for each in variants]
        variants = variants + fresh if before.strip() == "or" else fresh
    return variants


ROWS = [cells[0] for cells in (*OBJECTIVES, *MORE)]


@pytest.mark.parametrize("cell", ROWS)
def test_readme_snippets_are_valid_configs(cell, tmp_path):
    path = tmp_path / "my.yaml"
    for variant in _variants(cell):
        words = []
        for name, value in variant.items():
            for known, text in COMPANIONS.items():
                if known in (name, value):
                    words += _words(yaml.safe_load(text))
        words += _words(variant)
        path.write_text("student: {path: small}\nteacher: {path: large}\ndata: {source: arithmetic}\n")
        configs.load(path, words).validate()


def _words(tree: dict[str, Any], prefix: str = "--") -> list[str]:
    """Words of a command line, a mapping's entries one by one."""
    words = []
    for key, value in tree.items():
        if isinstance(value, dict) and key != "teachers":
            words += _words(value, f"{prefix}{key}.")
        else:
            words.append(f"{prefix}{key}={value if isinstance(value, str) else json.dumps(value)}")
    return words


def test_readme_snippets_are_read():
    """The table above is not empty: its rows give these keys."""
    keys = {key for cell in ROWS for variant in _variants(cell) for key in variant}
    assert keys >= {
        "objective",
        "lmbda",
        "off_policy",
        "teacher.ema",
        "teachers",
        "lora",
        "early_stop",
        "teacher",
    }
    assert {"tokens.weights", "tokens.drop_truncated", "aggregation", "dynamic_sampling"} <= keys
