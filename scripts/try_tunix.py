"""opd_jax's transforms inside Tunix's own DistillationTrainer, end to end on the demo models.

    python -m venv tunix && tunix/bin/pip install -e '.[train]' google-tunix
    tunix/bin/python scripts/try_tunix.py

A tiny teacher is distilled into its base by Tunix; `track_subspace` watches, `extrapolate` searches after
steps 1, 2, 4 and 8. The script fails if the loss does not fall, or if what was tracked is not there.
"""

import os
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.distillation import distillation_trainer, strategies
from tunix.distillation.distillation_trainer import TrainingConfig, TrainingInput

import opd_jax
from opd_jax import losses, models, tasks, transforms

FOLDER = Path(opd_jax.__file__).parent / "demo"
STEPS, ROWS, LENGTH = 10, 16, 40


def batches():
    """Demonstrations of the demo's task, one array of tokens and mask a step."""
    task = tasks.load("arithmetic", options=dict(seed=0, size=STEPS * ROWS), verifier=None)
    tokenizer = models.load_tokenizer(FOLDER / "base")
    for step in range(STEPS):
        tokens, mask = (np.zeros((ROWS, LENGTH), np.int32) for _ in range(2))
        for row in range(ROWS):
            example = task[step * ROWS + row]
            ids = tokenizer(example.text + example.completion)["input_ids"][:LENGTH]
            tokens[row, : len(ids)], mask[row, : len(ids)] = ids, 1
        yield TrainingInput(input_tokens=tokens, input_mask=mask)


def forward(model, input_tokens, input_mask):
    logits, _ = model(input_tokens)
    return logits


def main():
    student, teacher = (models.load(FOLDER / name) for name in ("base", "teacher"))
    held_out = next(iter(batches()))
    graphdef = nnx.graphdef(student)
    wanted = jax.nn.log_softmax(forward(teacher, held_out.input_tokens, None))

    def score(params):
        """-KL to the teacher on one batch; higher is better."""
        logits = forward(nnx.merge(graphdef, params), held_out.input_tokens, None)
        return -jnp.mean(losses.reverse_kl(jax.nn.log_softmax(logits), wanted, where=mask[..., None]))

    mask = jnp.asarray(held_out.input_mask, bool)
    before = float(score(nnx.state(student, nnx.Param)))
    optimizer = optax.chain(
        optax.adamw(3e-5),
        transforms.track_subspace(rank=4, every=1),  # the one line
        transforms.extrapolate(score),
    )
    strategy = strategies.LogitStrategy(
        student_forward_fn=forward,
        teacher_forward_fn=forward,
        labels_fn=lambda input_tokens, input_mask: jax.nn.one_hot(input_tokens, 19),
        temperature=1.0,
        alpha=1.0,
    )
    config = TrainingConfig(eval_every_n_steps=10**6, max_steps=STEPS)
    trainer = distillation_trainer.DistillationTrainer(student, teacher, strategy, optimizer, config)
    trainer.train(batches())

    after = float(score(nnx.state(student, nnx.Param)))
    opt_state = trainer.optimizer.opt_state
    summary = transforms.subspace_summary(opt_state, nnx.state(student, nnx.Param))
    searched = opt_state[-1]
    print(f"KL to the teacher {-before:.4f} -> {-after:.4f} in {STEPS} steps")
    print(
        f"searches: {int(searched.extrapolate_searches[...])}, accepted candidates in the last: "
        f"factor {float(searched.extrapolate_factor[...]):g}"
    )
    for name in ("attention", "mlp"):
        measures = {k: float(summary[f"{name}/{k}"]) for k in ("spectral_ratio", "energy", "overlap")}
        print(name, {k: round(v, 3) for k, v in measures.items()})
        assert all(0 < value <= 1 for value in measures.values()), measures
    assert int(searched.extrapolate_searches[...]) == 4
    assert after > before, "the KL to the teacher did not fall"


if __name__ == "__main__":
    main()
