"""One tree of frozen dataclasses: what a run is. YAML in, YAML out."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from opd_jax import _config_checks, _config_io
from opd_jax._config_checks import make_schedule

__all__ = [
    "AllocateConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EarlyStopConfig",
    "EvaluationConfig",
    "ExtrapolateConfig",
    "ForesightConfig",
    "LoggingConfig",
    "LoraConfig",
    "MeshConfig",
    "OptimizerConfig",
    "ProjectConfig",
    "ReferenceConfig",
    "StudentConfig",
    "TeacherConfig",
    "TeacherMeshConfig",
    "TokensConfig",
    "TrackConfig",
    "dump",
    "load",
    "make_schedule",
]

Objective = Literal["opd", "sft", "grpo"]
Loss = Literal[
    "reverse_kl",
    "forward_kl",
    "jsd",
    "skew_kl",
    "skew_reverse_kl",
    "mixed_kl",
    "entropy_aware_kl",
    "total_variation",
    "sampled_reverse_kl",
    "sampled_tail_reverse_kl",
    "extrapolated_reverse_kl",
]


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """The model that is trained."""

    path: str = ""
    """A Hugging Face folder, a hub id, or a GGUF file."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Computation dtype; the trained weights and the optimiser's state stay float32."""
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    remat: Literal["none", "block", "offload"] = "none"
    """What the backward pass finds of the forward pass: all activations; each layer's input, the rest being
    computed again; or the same with the inputs in the host's memory (TPU, GPU)."""


@dataclass(frozen=True, kw_only=True)
class TeacherMeshConfig:
    """Sizes of the axes of a teacher's own mesh."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The fixed model that is distilled (opd), or the reference of the KL term (grpo)."""

    path: str = ""
    dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """`int8`: every matrix is rounded to int8 while it is read, with a float32 scale per output channel; the
    computation is bfloat16, at half of its memory."""
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    context: str | None = None
    """Template of a privileged prompt that only the teacher sees: `{prompt}`, `{answer}`,
    `{completion}` and metadata fields are filled in; None shows the student's own prompt."""
    ema: float | None = None
    """The teacher is an exponential moving average of the student with this decay (0: the student as it is);
    `path` is then the student's. None: the teacher does not change."""
    align: bool = False
    """The teacher has another tokenizer: log-probs are compared over pieces of text that both tokenizers
    delimit (loss sampled_reverse_kl)."""
    cache: str | None = None
    """Folder for the teacher's most likely tokens at every token of the data set's completions:
    `opd-jax cache-teacher` writes it, `train` reads it and loads no teacher (lmbda: 0)."""
    cache_top_k: int = 64
    """Tokens kept there at each position; the mass of all others is one more."""
    mesh: TeacherMeshConfig | None = None
    """Devices of the teacher's own, such as {fsdp: 4}: the last data * fsdp * tensor of all; `mesh` is then
    made of the others. Tokens go there, hidden states come back. None: it shares the student's."""


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """The model that `extrapolated_reverse_kl` measures progress from."""

    path: str = ""
    """Empty: the student as it starts."""
    dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """See `teacher.dtype`."""
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters: W + (alpha / rank) A B, of which only A and B are trained."""

    rank: int = 0
    """0: all weights are trained."""
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")
    """Names of the modules that are adapted."""
    save: Literal["merged", "adapter"] = "merged"
    """What the run's `model/` is: a whole model, or an adapter folder that `peft` loads."""


@dataclass(frozen=True, kw_only=True)
class TokensConfig:
    """Which tokens count, and how much."""

    weights: Literal["uniform", "prefix_drift", "high_entropy"] = "uniform"
    """`prefix_drift`: more where a completion has not drifted from the teacher yet (IW-OPD); `high_entropy`:
    only the tokens at which the student is least certain."""
    strength: float = 0.5
    """Of `prefix_drift`: the weight is 1 + strength at the first token and 1 at the last."""
    fraction: float = 0.2
    """Of `high_entropy`: share of the batch's tokens that count."""
    drop_truncated: bool = False
    """Leave out completions that ran into max_new_tokens."""


@dataclass(frozen=True, kw_only=True)
class EarlyStopConfig:
    """Rollouts that are cut before their end; off by default."""

    overlap: float = 0.0
    """Cut a completion where the mean overlap of student's and teacher's 16 most likely tokens over `window`
    tokens falls below this (Prune-OPD); 0: never."""
    window: int = 32
    horizon: int = 0
    """Sample so many tokens at first, growing evenly to max_new_tokens (TOPD); 0: always all."""
    horizon_steps: int = 0
    """Steps that the growth takes."""


@dataclass(frozen=True, kw_only=True)
class TrackConfig:
    """Watching the subspace into which updates concentrate (`opd_jax.transforms.track_subspace`)."""

    rank: int = 0
    """Singular directions followed in every matrix; 0: off."""
    every: int = 10
    """Steps between probes."""
    of: Literal["updates", "gradients", "displacement"] = "displacement"
    """What is probed; the displacement is the sum of updates, W - W_0."""


@dataclass(frozen=True, kw_only=True)
class ExtrapolateConfig:
    """EffOPD: after some steps, go on from the best of W + f (W - anchor)."""

    schedule: Literal["off", "powers_of_two", "every", "steps"] = "off"
    """After steps 1, 2, 4, 8, ...; after every `every`-th; or after the `steps` listed."""
    every: int = 4
    steps: tuple[int, ...] = ()
    factors: tuple[float, ...] = (2.0, 4.0, 6.0, 8.0, 10.0)
    """f of the candidates, tried in order until one fails."""
    rule: Literal["paper", "reference", "margin"] = "reference"
    """A candidate is accepted if its score is >= the best (paper), > the best (the authors' code), or better
    by `margin` standard errors of the paired difference."""
    margin: float = 2.0
    score: Literal["kl", "accuracy"] = "kl"
    """-KL to the teacher on fixed rollouts of the untrained student, or sampled accuracy (the paper)."""
    prompts: int = 50
    """Training prompts that are scored."""
    anchor: Literal["accepted", "raw"] = "accepted"
    """W at the last search: as it went on (the authors' code), or before its jump."""
    moves: Literal["blocks", "all"] = "blocks"
    """Attention and MLP matrices, or every parameter."""
    max_kl: float | None = None
    """Nats: a candidate that is further from the policy before the jump fails; null: no bound."""
    reset_moments: bool = False
    """Start the optimiser's moments anew after an accepted jump."""


@dataclass(frozen=True, kw_only=True)
class AllocateConfig:
    """Measuring which modules training moves, and using it (`opd_jax.transforms.allocate_modules`). A module
    is a kernel such as attention.q with all its layers, or the embedding."""

    steps: int = 0
    """Steps that are measured; 0: off."""
    mode: Literal["report", "scale", "freeze"] = "report"
    """Log the measures; scale learning rates by them, with mean 1; or freeze the modules that moved least."""
    measure: Literal["relative_update", "loss_decrease"] = "relative_update"
    fraction: float = 0.5
    """Share of the modules that is frozen."""


@dataclass(frozen=True, kw_only=True)
class ProjectConfig:
    """AdamW in the coordinates of the gradients' subspace (`opd_jax.transforms.project_to_subspace`)."""

    rank: int = 0
    """Directions kept of each matrix; 0: off."""
    sides: Literal["auto", "left", "right", "both"] = "auto"
    refresh: int = 200
    """Steps between refreshes of the bases."""
    residual: Literal["drop", "error_feedback"] = "drop"
    stop_after_lock_in: float | None = None
    """Stop refreshing once successive bases overlap by this; null: never."""


@dataclass(frozen=True, kw_only=True)
class ForesightConfig:
    """What the dynamics of training are watched and used for; all off by default."""

    track: TrackConfig = field(default_factory=TrackConfig)
    allocate: AllocateConfig = field(default_factory=AllocateConfig)
    project: ProjectConfig = field(default_factory=ProjectConfig)
    extrapolate: ExtrapolateConfig = field(default_factory=ExtrapolateConfig)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where prompts come from."""

    source: str = ""
    """`arithmetic`, `reasoning-gym:NAME`, `package.module:function`, a .jsonl or .parquet file."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the source."""
    verifier: str | None = None
    """`exact`, `contains`, `math` or `package.module:function`; None: the source's own. Of many processes
    each verifies a share: a function of yours must not use JAX there."""
    teacher: str | None = None
    """Column that names each example's teacher, one of `teachers`."""
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
    mu_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the first moment; bfloat16 saves 2 of the 12 bytes that a trained weight has in the state. The
    second moment stays float32: with b2 0.999 it falls by a thousandth a step, which bfloat16 rounds away."""
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
    target: float | None = None
    """Accuracy whose first evaluation at or above it is reported, with steps and tokens so far."""


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
    loss: Loss | None = None
    """Only for `opd`; None: reverse_kl, the full-vocabulary form."""
    loss_options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the function of that name in `opd_jax.losses`, such as {beta: 0.5} of jsd;
    of `extrapolated_reverse_kl`: {scale: 1.25}, ExOPD's lambda."""
    loss_temperature: float = 1.0
    """Divides the logits of student and teacher in a divergence (not in the sampling)."""
    loss_top_k: int = 0
    """Tokens of the vocabulary told apart in a divergence, the rest being one more; 0: all."""
    loss_support: Literal["student", "teacher", "union"] = "student"
    """Whose most likely tokens these are."""
    task_weight: float = 0.0
    """opd: weight of the task's group-relative advantage, beside the distillation."""
    lmbda: float = 1.0
    """opd: share of steps whose completions the student samples (GKD's lambda)."""
    off_policy: Literal["data", "teacher"] = "data"
    """Who wrote the completions of the other steps, and of sft: the data set, or the teacher
    (sequence-level distillation)."""
    steps: int = 100
    batch_size: int = 64
    """Completions a step."""
    samples_per_prompt: int = 1
    """Completions a prompt (the group size of grpo); divides batch_size."""
    rollout_batch: int = 0
    """Completions sampled at once, which bounds the KV cache; 0: all of a step's. No change of results."""
    micro_batches: int = 1
    """Equal parts a batch is split into, one after the other; does not change the result."""
    max_new_tokens: int = 256
    importance_clip: float = 5.0
    """Upper bound of the importance weight (sampled_reverse_kl)."""
    ratio_clip: tuple[float, float] = (0.2, 0.2)
    """grpo: the policy ratio is kept within [1 - low, 1 + high]."""
    normalise_advantages: bool = True
    """Divide a group's advantages by their standard deviation (GRPO); false: Dr. GRPO."""
    aggregation: Literal["token", "sequence", "constant"] | None = None
    """Mean over the batch's tokens (DAPO), over each completion's tokens and then completions (GRPO), or sum
    divided by max_new_tokens (Dr. GRPO); None: sequence for grpo, token otherwise."""
    dynamic_sampling: int = 0
    """grpo: at most so many more rounds of sampling, to replace groups whose rewards are all equal (DAPO)."""
    overlong_buffer: int = 0
    """Completions within so many tokens of max_new_tokens lose reward, up to 1 (DAPO); 0: none."""
    kl_coefficient: float = 0.0
    """grpo: weight of KL(student || teacher), the teacher being the reference model."""
    loss_chunk: int = 512
    """Tokens whose logits exist on a device at a time. Each chunk reads the unembedding matrices, so that
    small ones are slow; does not change the result."""
    max_bad_steps: int = 5
    """Stop after so many steps in a row with a non-finite loss or gradient."""
    seed: int = 0
    run_dir: str = ""
    """Empty: runs/<name of the config file>."""
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    teachers: dict[str, Any] = field(default_factory=dict)
    """Several teachers, name: {path, dtype, attention}; `data.teacher` tells which one an example has."""
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    tokens: TokensConfig = field(default_factory=TokensConfig)
    early_stop: EarlyStopConfig = field(default_factory=EarlyStopConfig)
    foresight: ForesightConfig = field(default_factory=ForesightConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @property
    def all_teachers(self) -> dict[str, TeacherConfig]:
        """The teachers by name; a single one has the name ""."""
        if self.teachers:
            return {name: TeacherConfig(**options) for name, options in self.teachers.items()}
        return {"": self.teacher} if self.teacher.path else {}

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
