"""Every objective that a config can name, against the loss function of that name on plain arrays."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from opd_jax import losses
from opd_jax.config import Config, EarlyStopConfig, TeacherConfig, TokensConfig
from opd_jax.training import _batches
from opd_jax.training._objectives import DIVERGENCES, Completions, Tokens, make_objective, token_weights
from opd_jax.training._step import Batch, State, make_log_probs, make_measure, make_score, make_update

pytestmark = pytest.mark.usefixtures("quick_compilation")

B, N, V = 3, 4, 11
OPTIONS = {
    "entropy_aware_kl": {"threshold": 1.5},
    "jsd": {"beta": 0.2, "scaled": True},
    "skew_kl": {"skew": 0.3},
}


def distribution(seed, *shape):
    return jax.nn.log_softmax(np.random.default_rng(seed).normal(0, 1.5, shape).astype(np.float32))


@pytest.fixture
def tokens():
    rng = np.random.default_rng(7)
    return Tokens(
        ids=jnp.asarray(rng.integers(0, V, (B, N))),
        mask=jnp.asarray(rng.random((B, N)) < 0.7),
        student=distribution(0, B, N, V),
        teacher=distribution(1, B, N, V),
        rollout_log_probs=jnp.asarray(rng.normal(-2.5, 0.3, (B, N)), jnp.float32),
    )


def masked(tokens, values):
    return np.where(tokens.mask, values, 0)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences(name, tokens):
    options = OPTIONS.get(name, {})
    (term,) = make_objective(Config(loss=name, loss_options=options))
    expected = getattr(losses, name)(tokens.student, tokens.teacher, **options)
    np.testing.assert_allclose(term.loss(tokens), masked(tokens, expected), rtol=1e-6)
    assert not term.whole


@pytest.mark.parametrize("support", ["student", "teacher", "union"])
def test_top_k_with_its_tail(support, tokens):
    (term,) = make_objective(Config(loss="forward_kl", loss_top_k=3, loss_support=support))
    expected = losses.top_k(losses.forward_kl, tokens.student, tokens.teacher, k=3, support=support)
    np.testing.assert_allclose(term.loss(tokens), masked(tokens, expected), rtol=1e-6)
    full = masked(tokens, losses.forward_kl(tokens.student, tokens.teacher))
    assert np.all(term.loss(tokens) <= full + 1e-6)


def test_a_cached_teacher_that_knows_all_tokens_is_the_teacher(tokens):
    (term,) = make_objective(Config(loss="reverse_kl", teacher=TeacherConfig(cache="folder")))
    order = jnp.argsort(-tokens.teacher, axis=-1)[..., : V - 1]
    known = jnp.take_along_axis(tokens.teacher, order, -1)
    rest = jnp.log1p(-jnp.exp(known).sum(-1, keepdims=True))
    cached = tokens._replace(
        teacher=None, support=order, support_log_probs=jnp.concatenate([known, rest], -1)
    )
    expected = losses.reverse_kl(tokens.student, tokens.teacher)
    np.testing.assert_allclose(term.loss(cached), masked(tokens, expected), atol=2e-5)


def completions(tokens, **changes):
    mine, theirs = (tokens.log_probs(a) for a in (tokens.student, tokens.teacher))
    return Completions(tokens.mask, mine, theirs, tokens.rollout_log_probs, **changes)


def test_forms_of_the_sampled_token(tokens):
    batch = completions(tokens)
    options = dict(discount=0.5, level="sequence", beyond="mask")
    (term,) = make_objective(Config(loss="sampled_reverse_kl", loss_options=options, importance_clip=2.0))
    expected = losses.sampled_reverse_kl(
        batch.student, batch.teacher, batch.rollout, 2.0, where=batch.mask, **options
    )
    assert term.whole
    np.testing.assert_allclose(term.loss(batch), expected)
    (term,) = make_objective(Config(loss="sampled_tail_reverse_kl", loss_top_k=2))
    expected = losses.sampled_tail_reverse_kl(
        tokens.student, tokens.teacher, tokens.ids, k=2,
        rollout_log_probs=tokens.rollout_log_probs, where=tokens.mask,
    )  # fmt: skip
    np.testing.assert_allclose(term.loss(tokens), expected)


def test_extrapolation_at_scale_one_is_plain_distillation(tokens):
    batch = completions(tokens, reference=tokens.log_probs(distribution(2, B, N, V)))
    (one,) = make_objective(Config(loss="extrapolated_reverse_kl", loss_options={"scale": 1.0}))
    (plain,) = make_objective(Config(loss="sampled_reverse_kl"))
    np.testing.assert_allclose(one.loss(batch), plain.loss(batch), rtol=1e-5, atol=1e-6)
    (more,) = make_objective(Config(loss="extrapolated_reverse_kl", loss_options={"scale": 1.5}))
    weight = np.minimum(np.exp(batch.student - batch.rollout), 5)
    advantage = 1.5 * (batch.teacher - batch.reference) - (batch.student - batch.reference)
    np.testing.assert_allclose(more.loss(batch), masked(tokens, -weight * advantage), rtol=1e-5, atol=1e-6)


def test_a_task_beside_the_distillation(tokens):
    advantages = jnp.asarray([[1.0] * N, [-1.0] * N, [0.0] * N])
    distillation, task = make_objective(Config(task_weight=0.5, samples_per_prompt=3))
    assert (distillation.name, task.name) == ("distillation", "task")
    batch = completions(tokens, advantages=advantages)
    gradient = jax.grad(lambda p: task.loss(batch._replace(student=p)).sum())(batch.student)
    weight = np.minimum(np.exp(batch.student - batch.rollout), 5)
    np.testing.assert_allclose(gradient, masked(tokens, -0.5 * weight * advantages), rtol=1e-5)


def test_aggregations():
    mask = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    grpo = Config(objective="grpo", samples_per_prompt=3, max_new_tokens=4)
    np.testing.assert_allclose(token_weights(mask, dataclasses.replace(grpo, aggregation="token")), mask / 4)
    constant = token_weights(mask, dataclasses.replace(grpo, aggregation="constant"))
    np.testing.assert_allclose(constant, mask / 12, rtol=1e-6)


# ---- in the compiled update


@pytest.fixture(scope="module")
def three(make_model):
    return [nnx.split(make_model(seed)) for seed in range(3)]


def update_of(config, student, teachers, **options):
    keep = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda grads, state, params=None: (grads, grads)
    )
    return make_update(student[0], [t[0] for t in teachers], keep, make_objective(config), **options)


def start(params, ema=None):
    params = jax.tree.map(jnp.copy, params)  # the state is donated
    return State(params, jax.tree.map(jnp.zeros_like, params), ema)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(3)
    mask = np.arange(6) < rng.integers(1, 7, 4)[:, None]
    return Batch(
        rng.integers(0, 32, (4, 8), dtype=np.int32),
        np.array([8, 3, 5, 1], np.int32),
        rng.integers(0, 32, (4, 6), dtype=np.int32),
        mask,
        weights=np.asarray(token_weights(mask, Config())),
        rollout_log_probs=rng.normal(-3, 0.5, (4, 6)).astype(np.float32),
    )


def test_each_row_learns_from_its_own_teacher(three, batch):
    """The gradient with two teachers is the sum over the rows of each."""
    student, *teachers = three
    rows = np.array([0, 1, 1, 0], np.int32)
    hidden = tuple(make_score(t[0], 1)(t[1], batch) for t in teachers)
    options = dict(micro_batches=2, loss_chunk=8)
    both = update_of(Config(), student, teachers, **options)
    theirs = tuple(t[1] for t in teachers)
    state, metrics = both(start(student[1]), theirs, batch._replace(teacher_rows=rows), hidden)
    one = update_of(Config(), student, teachers[:1], **options)  # the two have one architecture
    total, loss = None, 0
    for i, each in enumerate(teachers):
        part = batch._replace(weights=batch.weights * (rows == i)[:, None])
        alone, found = one(start(student[1]), (each[1],), part, hidden[i : i + 1])
        total = alone.opt_state if total is None else jax.tree.map(jnp.add, total, alone.opt_state)
        loss += found["loss"]
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(total), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1e-2, np.abs(b).max()))


def test_an_averaged_teacher(three, batch):
    """The teacher is the average, which then moves; temperature divides the logits of both."""
    student, other = three[:2]
    average = jax.tree.map(jnp.copy, other[1])
    update = update_of(Config(), student, [student], ema=0.9, temperature=2.0)
    hidden = (make_score(student[0], 1, jnp.float32)(average, batch),)
    state, metrics = update(start(student[1], average), (), batch, hidden)
    logits = [
        nnx.merge(student[0], p).unembed(make_score(student[0], 1)(p, batch)) / 2
        for p in (student[1], other[1])
    ]
    kl = losses.reverse_kl(*map(jax.nn.log_softmax, logits))
    np.testing.assert_allclose(metrics["loss"], np.sum(kl * batch.weights), rtol=1e-4)
    assert metrics["sampler_difference"] > 0  # at temperature 1, whatever that of the loss
    moved = jax.tree.map(lambda a, p: 0.9 * a + 0.1 * p, other[1], state.params)
    for a, b in zip(jax.tree.leaves(state.ema), jax.tree.leaves(moved), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_looks_before_the_update(three, batch):
    student, teacher = three[:2]
    hidden = (make_score(teacher[0], 1)(teacher[1], batch),)
    measure = make_measure(student[0], [teacher[0]], micro_batches=2, loss_chunk=8)
    measured = measure(student[1], (teacher[1],), batch, hidden)
    for name, (graphdef, params) in dict(student=student, teacher=teacher).items():
        rows = (batch.prompts, batch.prompt_lengths, batch.completions)
        expected = make_log_probs(graphdef, 2, 8)(params, *rows)
        logits = nnx.merge(graphdef, params).unembed(make_score(graphdef, 1)(params, batch))
        dense = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.completions[..., None], -1)[..., 0]
        np.testing.assert_allclose(expected, dense, atol=1e-5)
        np.testing.assert_allclose(measured[f"{name}_log_probs"], dense, atol=1e-5)


# ---- which tokens count


class _Setup:
    def __init__(self, config, mesh):
        self.config, self.mesh = config, mesh


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((1, 1), ("data", "fsdp"), devices=jax.devices()[:1])


def test_weighing(batch, mesh):
    rng = np.random.default_rng(0)
    mask = batch.mask
    measured = {
        name: rng.random(mask.shape).astype(np.float32)
        for name in ("top16_overlap", "student_entropy", "student_log_probs", "teacher_log_probs")
    }

    def weigh(**changes):
        weighed, metrics = _batches.weigh(_Setup(Config(**changes), mesh), batch, measured)
        return np.asarray(weighed.mask), np.asarray(weighed.weights), metrics

    keep, weights, metrics = weigh(tokens=TokensConfig(weights="high_entropy", fraction=0.25))
    wanted = np.sort(measured["student_entropy"][mask])[::-1][: int(np.ceil(0.25 * mask.sum()))]
    np.testing.assert_array_equal(keep, mask & (measured["student_entropy"] >= wanted[-1]))
    np.testing.assert_allclose(weights, keep / keep.sum(), rtol=1e-6)
    assert metrics["counted_tokens"] == keep.sum() and metrics["tokens"] == mask.sum()

    keep, weights, _ = weigh(tokens=TokensConfig(weights="prefix_drift", strength=0.5))
    np.testing.assert_array_equal(keep, mask)
    drift = np.where(mask, np.abs(measured["teacher_log_probs"] - measured["student_log_probs"]), 0).cumsum(1)
    before = np.pad(drift[:, :-1], ((0, 0), (1, 0)))
    expected = mask / mask.sum() * (1 + 0.5 * (1 - before / drift[:, -1:]))
    np.testing.assert_allclose(weights, expected, rtol=1e-5)

    measured["top16_overlap"][:] = 0.9
    measured["top16_overlap"][2, 1] = 0.1
    keep, _, metrics = weigh(early_stop=EarlyStopConfig(overlap=0.5, window=1))
    row = mask[2] & (np.arange(6) < 2)
    np.testing.assert_array_equal(keep, np.stack([mask[0], mask[1], row, mask[3]]))
    assert metrics["cut_rate"] == (0.25 if mask[2].sum() > 2 else 0)


def test_the_horizon_grows_to_all_tokens():
    setup = _Setup(Config(max_new_tokens=10, early_stop=EarlyStopConfig(horizon=2, horizon_steps=4)), None)
    assert [_batches._horizon(setup, step) for step in range(6)] == [2, 4, 6, 8, 10, 10]
