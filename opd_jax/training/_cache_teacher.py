"""The command that lets a teacher score a data set once."""

from pathlib import Path

import jax
import numpy as np

from opd_jax import models
from opd_jax.config import Config
from opd_jax.parallel import batch_sharding, make_mesh
from opd_jax.training._logging import Display
from opd_jax.training._setup import load_model, read_data
from opd_jax.training._teacher_cache import write_cache


def cache_teacher(config: Config) -> Path:
    """Writes `teacher.cache`: the teacher's most likely tokens at every token of the data's completions.

    Called again it goes on where it was stopped.

    Args:
        config: of the run that will read it (objective opd, lmbda 0).

    Returns:
        The folder.

    Raises:
        ValueError: if the config, the data, the models or what the folder holds do not fit together.
    """
    config.validate()
    if config.teacher.cache is None:
        raise ValueError("teacher.cache is missing: the folder to write, such as runs/cache")
    with Display(0) as display:
        mesh = make_mesh(**vars(config.mesh))
        tokenizer, _, prompts, _ = read_data(config, mesh, display)
        teacher = load_model("teacher", config.teacher, mesh, display, tokenizer)
        report = display.task("scoring by the teacher", len(prompts))
        rows, size = np.arange(len(prompts)), config.batch_size
        width = models.load_config(config.student.path).vocab_size
        with jax.set_mesh(mesh):  # activations are laid out on it
            write_cache(
                config.teacher.cache,
                model=teacher,
                batches=(prompts.take(rows[i : i + size]) for i in range(0, len(rows), size)),
                top_k=config.teacher.cache_top_k,
                tokenizer=tokenizer,
                teacher=config.teacher.path,
                vocab_size=min(width, teacher.config.vocab_size),
                temperature=config.loss_temperature,
                loss_chunk=config.loss_chunk,
                sharding=batch_sharding(mesh),
                progress=lambda examples, _tokens: report(examples, len(prompts)),
            )
    return Path(config.teacher.cache)
