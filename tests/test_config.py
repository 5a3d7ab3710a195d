"""Config: YAML in, YAML out, and every mistake named before a model is loaded."""

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from opd_jax import _config_checks, _config_io, _foresight_checks, _objective_checks
from opd_jax.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    MeshConfig,
    OptimizerConfig,
    StudentConfig,
    TeacherConfig,
    dump,
    load,
    make_schedule,
)

CONFIGS = Path(__file__).parents[1] / "configs"

VALID = Config(
    student=StudentConfig(path="small"),
    teacher=TeacherConfig(path="large"),
    data=DataConfig(source="arithmetic", options={"seed": 0}),
)


@pytest.fixture
def file(tmp_path):
    """Writes a config file and returns its path."""

    def write(text: str):
        path = tmp_path / "my.yaml"
        path.write_text(text)
        return path

    return write


def complaint(config: Config) -> str:
    with pytest.raises(ValueError) as error:
        config.validate()
    return str(error.value)


def refusal(path, *overrides: str) -> str:
    with pytest.raises(ValueError) as error:
        load(path, overrides)
    return str(error.value)


# ---- load and dump


def test_an_empty_file_gives_the_defaults(file):
    assert load(file("")) == replace(Config(), run_dir="runs/my")
    assert load(file("# nothing\nstudent:\n")) == replace(Config(), run_dir="runs/my")


def test_values_of_every_kind_are_read(file):
    config = load(
        file(
            "objective: grpo\nsteps: 1e3\nratio_clip: [0.2, 0.28]\nrun_dir: out/x\n"
            "student: {path: m, dtype: bfloat16, remat: block}\n"
            "data: {source: d.jsonl, verifier: null, options: {size: 10, nested: {a: [1, x]}}}\n"
            "optimizer:\n  learning_rate: 1e-6\n  clip_norm: .inf\n"
            "  schedule_options: {end_value: 2.5E-7}\n"
            "evaluation: {pass_k: [1, 4], samples: 4}\n"
        )
    )
    assert config.steps == 1000 and isinstance(config.steps, int)
    assert config.ratio_clip == (0.2, 0.28) and config.evaluation.pass_k == (1, 4)
    assert config.run_dir == "out/x"
    assert config.student == StudentConfig(path="m", dtype="bfloat16", remat="block")
    assert config.data.options == {"size": 10, "nested": {"a": [1, "x"]}}
    # YAML 1.1 reads 1e-6, without a point, as text.
    assert config.optimizer.learning_rate == 1e-6 and config.optimizer.clip_norm == float("inf")
    assert config.optimizer.schedule_options == {"end_value": 2.5e-7}


ODD = replace(
    VALID,
    objective="grpo",
    loss=None,
    ratio_clip=(0.1, 0.3),
    run_dir="runs/ü x",
    teacher=TeacherConfig(path="t", context="Q: {prompt}\n\n# A: '{answer}'\t: yes\n"),
    data=DataConfig(source="a:b", options={"x": None, "l": [1, {"y": 1e-7}], "no": "on", "d": {}}),
    optimizer=OptimizerConfig(learning_rate=1e-6, clip_norm=float("inf"), eps=1e-30),
    evaluation=EvaluationConfig(pass_k=(1, 2, 16), options={"x": "1e-3", "1": "null"}),
    logging=LoggingConfig(wandb="~"),
)


@pytest.mark.parametrize("config", [replace(Config(), run_dir="r"), replace(VALID, run_dir="r"), ODD])
def test_dump_and_load_round_trip(config, file):
    text = dump(config)
    assert load(file(text)) == config
    assert dump(load(file(text))) == text


def test_dump_writes_a_shared_value_twice(file):
    options = {"seed": 3}
    config = replace(VALID, data=DataConfig(options=options), evaluation=EvaluationConfig(options=options))
    assert "&" not in dump(config)


def test_a_missing_file_is_named_with_the_nearest(file):
    path = file("")
    with pytest.raises(FileNotFoundError, match=r"no config file .*myy.yaml; did you mean .*my.yaml"):
        load(path.with_name("myy.yaml"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("steps: [1, 2", "my.yaml:1: not valid YAML"),
        ("a: b: c", "my.yaml:1: not valid YAML"),
        ("- steps", "expected `key: value` lines"),
        ("steps", "expected `key: value` lines"),
        ("steps: 1\nseed: 0\nsteps: 2", "my.yaml:3: steps is given twice (first in line 1)"),
        ("data:\n  options:\n    a: 1\n    a: 2", "my.yaml:4: data.options.a is given twice"),
        ("data: &x\n  options: *x", "data.options contains itself"),
        ("steps: !!python/object/apply:os.getpid []", "could not determine a constructor"),
        ("optimizer: adamw", "my.yaml:1: optimizer: is a section of keys, got 'adamw'"),
    ],
)
def test_bad_yaml(text, says, file):
    assert says in refusal(file(text))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("step: 3", "unknown key 'step'; did you mean 'steps'?"),
        ("optimizer:\n  learnig_rate: 3", "my.yaml:2: unknown key 'optimizer.learnig_rate'; "
         "did you mean 'optimizer.learning_rate'?"),
        ("weight_decay: 0.1", "did you mean 'optimizer.weight_decay'?"),
        ("evaluation: {max_prompt_length: 3}", "did you mean 'data.max_prompt_length'?"),
        ("mesh: {zzz: 1}", "valid keys of mesh: mesh.data, mesh.fsdp, mesh.tensor"),
        ("zzz: 1", "valid keys: objective, loss, loss_options"),
        ("3: 1", "unknown key '3'"),
        ("lr: 1", "it is optimizer.learning_rate"),
        ("optimizer: {lr: 1}", "it is optimizer.learning_rate"),
        ("rollout: {temperature: 0.7}", "OPD scores the law it samples from"),
        ("temperature: 0.7", "see evaluation.temperature"),
        ("num_train_epochs: 3", "counted in steps"),
        ("loss: k1", "gradient of mean zero"),
        ("loss: k3", "gradient of the forward KL"),
        ("objective: odp", "did you mean 'opd'?"),
    ],
)  # fmt: skip
def test_unknown_keys_and_choices(text, says, file):
    assert says in refusal(file(text))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("steps: many", "steps: expected a whole number, got 'many'"),
        ("steps: 1.5", "steps: expected a whole number, got 1.5"),
        ("steps: .inf", "expected a whole number, got inf"),
        ("steps: .nan", "expected a whole number, got nan"),
        ("steps: true", "expected a whole number, got True"),
        ("steps: null", "expected a whole number, got None"),
        ("kl_coefficient: yes", "expected a number, got True"),
        ("evaluation: {teacher: 1}", "evaluation.teacher: expected true or false, got 1"),
        ("student: {remat: true}", "student.remat: expected one of 'none', 'block', 'offload', got True"),
        ("student: {remat: false}", "student.remat: expected one of 'none', 'block', 'offload', got False"),
        ("student: {path: 3}", "student.path: expected text, got 3"),
        ("student: {dtype: float16}", "expected one of 'float32', 'bfloat16', got 'float16'"),
        ("data: {chat: off}", "expected one of 'auto', 'never', got False"),
        ("data: {options: [1]}", "data.options: expected a mapping with text keys, got [1]"),
        ("data: {options: {1: 2}}", "expected a mapping with text keys"),
        ("data: {verifier: 3}", "data.verifier: expected text or null, got 3"),
        ("ratio_clip: 0.2", "ratio_clip: expected a list of 2 numbers, got 0.2"),
        ("ratio_clip: [0.2]", "expected a list of 2 numbers, got [0.2]"),
        ("evaluation: {pass_k: [1, x]}", "evaluation.pass_k: expected a whole number, got 'x'"),
    ],
)
def test_wrong_types(text, says, file):
    message = refusal(file(text))
    assert says in message and "my.yaml:1: " in message


def test_all_problems_are_reported_at_once(file):
    message = refusal(file("lr: 3\nsteps: x\nmesh:\n  tensr: 2\n"), "--seed", "y", "--nonsense=1")
    assert message.count("\n  - ") == 5
    for part in ("my.yaml:1", "my.yaml:2", "my.yaml:4", "--seed: expected", "--nonsense: unknown"):
        assert part in message


# ---- the command line


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--steps", "7"], "steps", 7),
        (["--steps=7"], "steps", 7),
        (["--run_dir", "runs/1e5"], "run_dir", "runs/1e5"),
        (["--run-dir", "x"], "run_dir", "x"),
        (["--student.path", "123"], "student.path", "123"),
        (["--evaluation.teacher"], "evaluation.teacher", True),
        (["--evaluation.teacher", "--steps", "3"], "evaluation.teacher", True),
        (["--evaluation.teacher", "false"], "evaluation.teacher", False),
        (["--student.remat", "none"], "student.remat", "none"),
        (["--loss", "sampled_reverse_kl"], "loss", "sampled_reverse_kl"),
        (["--loss", "null"], "loss", None),
        (["--loss", "none"], "loss", None),
        (["--data.verifier", "None"], "data.verifier", None),
        (["--data.verifier", "math"], "data.verifier", "math"),
        (["--teacher.context", "{prompt} = {answer}"], "teacher.context", "{prompt} = {answer}"),
        (["--teacher.context=--x=y"], "teacher.context", "--x=y"),
        (["--optimizer.learning_rate", "3e-5"], "optimizer.learning_rate", 3e-5),
        (["--mesh.fsdp", "-1"], "mesh.fsdp", -1),
        (["--evaluation.pass_k", "[1, 2]"], "evaluation.pass_k", (1, 2)),
        (["--evaluation.pass_k", "1,2"], "evaluation.pass_k", (1, 2)),
        (["--evaluation.pass_k=4"], "evaluation.pass_k", (4,)),
        (["--data.options", "{size: 3, kinds: [add]}"], "data.options",
         {"size": 3, "kinds": ["add"]}),
        (["--data.options.seed", "3"], "data.options", {"size": 9, "seed": 3}),
        (["--data.options.a.b", "null"], "data.options", {"size": 9, "a": {"b": None}}),
        (["--steps", "1", "--steps", "2"], "steps", 2),
    ],
)  # fmt: skip
def test_overrides(words, key, value, file):
    config: Any = load(file("steps: 1\nloss: reverse_kl\ndata: {options: {size: 9}}\n"), words)
    for part in key.split("."):
        config = getattr(config, part)
    assert config == value and type(config) is type(value)


def test_an_override_repairs_a_bad_value_of_the_file(file):
    assert load(file("steps: many"), ["--steps", "3"]).steps == 3
    assert load(file("optimizer: adamw"), ["--optimizer.b1=0.5"]).optimizer.b1 == 0.5


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--steps"], "--steps needs a value"),
        (["--steps", "--seed", "1"], "--steps needs a value"),
        (["steps"], "'steps' is not an option"),
        (["--steps.x", "1"], "--steps.x: unknown key 'steps.x'"),
        (["--optimizer.lr", "1"], "it is optimizer.learning_rate"),
        (["--stpes=1"], "did you mean 'steps'?"),
        (["--steps", "x"], "--steps: expected a whole number, got 'x'"),
        (["--data.options", "{a: 1"], "not valid YAML"),
        (["--optimizer", "adamw"], "--optimizer: is a section of keys, got 'adamw'"),
    ],
)
def test_bad_overrides(words, says, file):
    assert says in refusal(file(""), *words)


# ---- validate


def test_a_valid_config_of_each_objective_passes():
    VALID.validate()
    replace(VALID, loss="sampled_reverse_kl", importance_clip=2.0).validate()
    replace(VALID, objective="sft", teacher=TeacherConfig()).validate()
    replace(VALID, objective="grpo", samples_per_prompt=8, teacher=TeacherConfig()).validate()
    replace(VALID, objective="grpo", samples_per_prompt=8, kl_coefficient=0.1).validate()
    context = TeacherConfig(path="small", context="{prompt} is {answer}, {{braces}}")
    replace(VALID, teacher=context).validate()


NOTHING = TeacherConfig()
INVALID = [
    ({"student": StudentConfig()}, "student.path is missing"),
    ({"data": DataConfig()}, "data.source is missing"),
    ({"teacher": NOTHING}, "teacher.path is missing: objective opd learns from a teacher"),
    ({"teacher": TeacherConfig(path="small")}, "teacher.path is student.path ('small')"),
    ({"objective": "sft"}, "teacher.path is set but objective sft has no teacher"),
    ({"objective": "sft", "samples_per_prompt": 2}, "samples_per_prompt is set but objective sft"),
    ({"objective": "sft", "loss": "reverse_kl"}, "loss is set but objective sft does not use it"),
    ({"objective": "sft", "teacher": TeacherConfig(context="{prompt}")}, "teacher.context is set"),
    ({"ratio_clip": (0.1, 0.2)}, "ratio_clip is set but objective opd does not use it"),
    ({"kl_coefficient": 0.1}, "kl_coefficient is set but objective opd"),
    ({"importance_clip": 2.0}, "importance_clip is set but loss reverse_kl sums over"),
    ({"objective": "grpo"}, "samples_per_prompt is 1; objective grpo compares"),
    ({"objective": "grpo", "samples_per_prompt": 2}, "but kl_coefficient is 0"),
    ({"objective": "grpo", "kl_coefficient": 0.1, "teacher": NOTHING}, "needs a reference model"),
    ({"objective": "grpo", "loss": "reverse_kl"}, "loss is set but objective grpo"),
    ({"steps": 0}, "steps is 0; it must be at least 1"),
    ({"seed": -1}, "seed is -1; it must be at least 0"),
    ({"seed": 2**32}, "it must be below 2**32"),
    ({"steps": "3"}, "steps: expected a whole number, got '3'"),
    ({"mesh": None}, "mesh: is a section of keys"),
    ({"optimizer": OptimizerConfig(learning_rate=float("nan"))}, "learning_rate is nan"),
    ({"optimizer": OptimizerConfig(learning_rate=float("inf"))}, "learning_rate is inf"),
    ({"optimizer": OptimizerConfig(b2=1.0)}, "optimizer.b2 is 1.0; it must be in [0, 1)"),
    ({"optimizer": OptimizerConfig(clip_norm=0)}, "optimizer.clip_norm is 0; it must be above 0"),
    ({"objective": "grpo", "ratio_clip": (1.5, 0.2)}, "ratio_clip is [1.5, 0.2]; the low side"),
    ({"batch_size": 10, "samples_per_prompt": 4},
     "samples_per_prompt 4 does not divide batch_size 10; batch_size 12 would do"),
    ({"batch_size": 10, "micro_batches": 3}, "micro_batches 3 does not divide batch_size 10"),
    ({"mesh": MeshConfig(data=0)}, "mesh.data is 0; it must be at least 1, or -1"),
    ({"mesh": MeshConfig(data=-1)}, "mesh.data and mesh.fsdp are -1; only one axis"),
    ({"evaluation": EvaluationConfig(pass_k=(1, 4))}, "pass@4 needs at least 4 samples"),
    ({"evaluation": EvaluationConfig(pass_k=())}, "evaluation.pass_k is empty"),
    ({"evaluation": EvaluationConfig(pass_k=(0,))}, "each k must be at least 1"),
    ({"objective": "sft", "teacher": NOTHING, "evaluation": EvaluationConfig(teacher=True)},
     "evaluation.teacher is true but teacher.path is missing"),
    ({"evaluation": EvaluationConfig(prompts=8)}, "nothing is held out"),
    ({"evaluation": EvaluationConfig(prompts=8, options={"seed": 0})}, "nothing is held out"),
    ({"teacher": TeacherConfig(path="t", context="{prompt")}, "teacher.context is not a template"),
    ({"teacher": TeacherConfig(path="t", context="{}")}, "fields are plain names"),
    ({"teacher": TeacherConfig(path="t", context="{prompt.__class__}")}, "fields are plain names"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "says"), INVALID)
def test_invalid_values_are_named(changes, says):
    assert says in complaint(replace(VALID, **changes))


def test_validate_reports_all_problems_at_once():
    message = complaint(Config(steps=0, batch_size=3, micro_batches=2))
    assert message.startswith("the config cannot be used:\n") and message.count("\n  - ") == 5


def test_held_out_prompts():
    EVALUATION = EvaluationConfig(prompts=8, options={"seed": 1})
    config = replace(VALID, evaluation=EVALUATION)
    config.validate()
    assert config.evaluation_data == ("arithmetic", {"seed": 1})
    # A source of its own brings its own options, and may be the training data on purpose.
    config = replace(VALID, evaluation=EvaluationConfig(prompts=8, source="arithmetic"))
    config.validate()
    assert config.evaluation_data == ("arithmetic", {})


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("cosine", {}, "'cosine' is no optax schedule"),
        ("cosine_decay", {}, "did you mean 'cosine_decay_schedule'?"),
        ("zzz", {}, "optax has constant_schedule, "),
        ("join_schedules", {}, "is no optax schedule"),
        ("constant_schedule", {"value": 1.0}, "the value of constant_schedule is "
         "optimizer.learning_rate; set that"),
        ("constant_schedule", {"x": 1.0}, "no such argument; it takes none"),
        ("cosine_decay_schedule", {}, "lacks decay_steps, which cosine_decay_schedule needs"),
        ("cosine_decay_schedule", {"decay_step": 3}, "did you mean 'decay_steps'?"),
        ("cosine_decay_schedule", {"decay_steps": 0}, "does not take these values"),
        ("warmup_cosine_decay_schedule", {"decay_steps": 9}, "lacks init_value, warmup_steps"),
    ],
)  # fmt: skip
def test_bad_schedules(name, options, says):
    optimizer = OptimizerConfig(schedule=name, schedule_options=options)
    assert says in complaint(replace(VALID, optimizer=optimizer))


@pytest.mark.parametrize(
    ("name", "options", "first", "last"),
    [
        ("constant_schedule", {}, 0.5, 0.5),
        ("linear_schedule", {"end_value": 0.0, "transition_steps": 10}, 0.5, 0.0),
        ("cosine_decay_schedule", {"decay_steps": 10}, 0.5, 0.0),
        ("warmup_constant_schedule", {"init_value": 0.0, "warmup_steps": 10}, 0.0, 0.5),
    ],
)
def test_schedules_start_from_the_learning_rate(name, options, first, last):
    optimizer = OptimizerConfig(learning_rate=0.5, schedule=name, schedule_options=options)
    replace(VALID, optimizer=optimizer).validate()
    schedule = make_schedule(optimizer)
    assert float(schedule(0)) == pytest.approx(first) and float(schedule(10)) == pytest.approx(last)


# ---- tables that name keys, and files that hold them


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_configs_of_the_repository_are_valid(path):
    config = load(path)
    config.validate()
    assert config.run_dir == f"runs/{path.stem}"


def test_the_tables_name_existing_keys():
    keys = set(_config_io.keys(Config))
    tables = (*_objective_checks.used(VALID), *_foresight_checks.used(VALID))
    named = {key for used, *_ in tables for key in used}
    assert named | set(_config_checks._AT_LEAST) <= keys
    assert not keys & set(_config_checks.HINTS), "a hint for a key that exists"


def test_every_field_is_frozen_and_keyword_only():
    def check(cls):
        assert cls.__dataclass_params__.frozen
        assert all(field.kw_only for field in dataclasses.fields(cls))

    check(Config)
    for field in dataclasses.fields(Config):
        if dataclasses.is_dataclass(field.default_factory):
            check(field.default_factory)


FORESIGHT = [
    ({"track": {"rank": 0, "every": 3}}, "foresight.track.every is set but foresight.track.rank is 0"),
    ({"track": {"rank": -1}}, "foresight.track.rank is -1; it must be at least 0"),
    ({"extrapolate": {"factors": [2.0]}}, "foresight.extrapolate.factors is set but"),
    ({"extrapolate": {"schedule": "steps"}}, "give the steps to search after"),
    ({"extrapolate": {"schedule": "every", "every": 0}}, "foresight.extrapolate.every is 0"),
    ({"extrapolate": {"schedule": "every", "factors": []}}, "factors is []; give positive numbers"),
    ({"extrapolate": {"schedule": "every", "rule": "margin", "prompts": 1}}, "needs at least 2"),
    ({"extrapolate": {"schedule": "every", "margin": 3.0}}, "margin is set but the rule has none"),
    ({"allocate": {"steps": 200}}, "but the run has 100 steps"),
    ({"allocate": {"steps": 2, "mode": "freeze"}, "project": {"rank": 4}}, "does not go with"),
    ({"project": {"rank": 4, "refresh": 0}}, "foresight.project.refresh is 0"),
]


@pytest.mark.parametrize(("sections", "says"), FORESIGHT)
def test_the_foresight_section(sections, says, file):
    import yaml

    text = yaml.dump(
        dict(
            student={"path": "small"},
            teacher={"path": "large"},
            data={"source": "arithmetic"},
            foresight=sections,
        )
    )
    assert says in complaint(load(file(text)))


def test_a_score_by_kl_needs_a_fixed_teacher(file):
    text = "student: {path: a}\ndata: {source: arithmetic}\nobjective: sft\n"
    text += "foresight: {extrapolate: {schedule: every}}"
    assert "set score: accuracy" in complaint(load(file(text)))
