"""One tree of frozen dataclasses: what a run is. YAML in, YAML out."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from opd_jax import _config_checks, _config_io
from opd_jax._config_checks import make_schedule

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "LoggingConfig",
    "MeshConfig",
    "OptimizerConfig",
    "StudentConfig",
    "TeacherConfig",
    "dump",
    "load",
    "make_schedule",
]

Objective = Literal["opd", "sft", "grpo"]


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """The model that is trained."""

    path: str = ""
    """A Hugging Face folder, a hub id, or a GGUF file."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Computation dtype; the trained weights and the optimiser's state stay float32."""
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    remat: bool = False
    """Recompute each layer in the backward pass instead of storing its activations."""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The fixed model that is distilled (opd), or the reference of the KL term (grpo)."""

    path: str = ""
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    context: str | None = None
    """Template of a privileged prompt that only the teacher sees: `{prompt}`, `{answer}`,
    `{completion}` and metadata fields are filled in; None shows the student's own prompt."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where prompts come from."""

    source: str = ""
    """`arithmetic`, `reasoning-gym:NAME`, `package.module:function`, a .jsonl or .parquet file."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the source."""
    verifier: str | None = None
    """`exact`, `contains`, `math` or `package.module:function`; None: the source's own."""
    chat: Literal["auto", "never"] = "auto"
    """Whether prompts pass through the tokenizer's chat template."""
    max_prompt_length: int = 512
    too_long: Literal["drop", "error"] = "drop"


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW behind a global-norm clip."""

    learning_rate: float = 1e-6
    schedule: str = "constant_schedule"
    """Name of an optax schedule; the learning rate is its `value`, `init_value` or `peak_value`."""
    schedule_options: dict[str, Any] = field(default_factory=dict)
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    """Largest global norm of the gradient; `.inf`: no clip."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Sampled accuracy on held-out prompts, before, during and after training."""

    source: str | None = None
    """None: `data.source`; give `options` that differ (a seed) to hold prompts out."""
    options: dict[str, Any] = field(default_factory=dict)
    """Written over `data.options`; with a `source` of its own, they stand alone."""
    prompts: int = 0
    """How many held-out prompts; 0: no evaluation."""
    every: int = 0
    """Steps between evaluations during training; 0: only before and after."""
    samples: int = 1
    temperature: float = 1.0
    pass_k: tuple[int, ...] = (1,)
    batch_size: int = 64
    teacher: bool = False
    """Also evaluate the teacher, once, on the same prompts."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Saved state, from which a stopped run goes on."""

    every: int = 100
    """Steps between checkpoints; one is also written at the end and on Ctrl-C."""
    keep: int = 2
    """How many of the newest are kept."""


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the mesh axes; -1 takes the devices that the other axes leave."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Where metrics go besides metrics.jsonl, and how often."""

    every: int = 1
    """Steps between lines of metrics."""
    samples: int = 2
    """Completions printed and written at each evaluation."""
    tensorboard: bool = False
    wandb: str | None = None
    """Weights & Biases project; None: off."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run of `opd-jax train`."""

    objective: Objective = "opd"
    loss: Literal["reverse_kl", "sampled_reverse_kl"] | None = None
    """Only for `opd`; None: reverse_kl, the full-vocabulary form."""
    steps: int = 100
    batch_size: int = 64
    """Completions a step."""
    samples_per_prompt: int = 1
    """Completions a prompt (the group size of grpo); divides batch_size."""
    micro_batches: int = 1
    """Equal parts a batch is split into, one after the other; does not change the result."""
    max_new_tokens: int = 256
    importance_clip: float = 5.0
    """Upper bound of the importance weight (sampled_reverse_kl)."""
    ratio_clip: tuple[float, float] = (0.2, 0.2)
    """grpo: the policy ratio is kept within [1 - low, 1 + high]."""
    kl_coefficient: float = 0.0
    """grpo: weight of KL(student || teacher), the teacher being the reference model."""
    loss_chunk: int = 512
    """Tokens whose logits exist at a time."""
    max_bad_steps: int = 5
    """Stop after so many steps in a row with a non-finite loss or gradient."""
    seed: int = 0
    run_dir: str = ""
    """Empty: runs/<name of the config file>."""
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @property
    def evaluation_data(self) -> tuple[str, dict[str, Any]]:
        """Source and options of the held-out prompts."""
        if self.evaluation.source is not None:
            return self.evaluation.source, dict(self.evaluation.options)
        return self.data.source, {**self.data.options, **self.evaluation.options}

    def validate(self) -> None:
        """Checks everything that needs neither a model nor data.

        Raises:
            ValueError: all that is wrong, one line each: key, value, and what would be right.

        Example:
            >>> Config(
            ...     student=StudentConfig(path="small"),
            ...     teacher=TeacherConfig(path="large"),
            ...     data=DataConfig(source="arithmetic"),
            ...     batch_size=0,
            ... ).validate()
            Traceback (most recent call last):
                ...
            ValueError: batch_size is 0; it must be at least 1
        """
        problems: list[str] = []
        _config_io.build(Config, asdict(self), problems, hints=_config_checks.HINTS)
        if not problems:  # the checks of values rely on the types
            problems = list(_config_checks.problems(self, Config()))
        _config_io.raise_all(problems, "the config cannot be used")


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a config from a YAML file, with command-line words written over it.

    `run_dir` becomes `runs/<name of the file>` if neither gives one. Call `validate` on the
    result: `load` checks keys and types, `validate` the values.

    Args:
        path: YAML file.
        overrides: `--dotted.key value` or `--dotted.key=value` words; numbers, lists, mappings
            and null are written as in YAML. A mapping replaces the one in the file;
            `--data.options.seed 3` sets one entry of it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: bad YAML, unknown or duplicate keys, values of the wrong type: all at once,
            each with its line and the nearest valid key.
    """
    config = _config_io.read(Config, path, overrides, _config_checks.HINTS)
    return config if config.run_dir else replace(config, run_dir=f"runs/{Path(path).stem}")


def dump(config: Config) -> str:
    """The YAML text of a config: `load` of it gives an equal config."""
    return _config_io.write(config)
