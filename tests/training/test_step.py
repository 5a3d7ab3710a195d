"""The update against plain references: one forward pass over rows packed by numpy, losses written out."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from opd_jax import models
from opd_jax.config import Config, OptimizerConfig
from opd_jax.parallel import batch_sharding, make_mesh, param_shardings
from opd_jax.training._objectives import Tokens, make_objective, statistics, token_weights, weight_bounds
from opd_jax.training._optimizer import init_optimizer, make_optimizer
from opd_jax.training._step import Batch, State, make_score, make_update

pytestmark = pytest.mark.usefixtures("quick_compilation")

V, B, P, N = 32, 8, 8, 6
RATE = 0.1
CONFIGS = {
    "reverse_kl": Config(),
    "sampled_reverse_kl": Config(loss="sampled_reverse_kl", importance_clip=1.5),
    "sft": Config(objective="sft"),
    "grpo": Config(objective="grpo", kl_coefficient=0.3),
}


@pytest.fixture(scope="module")
def student(make_model):
    return nnx.split(make_model(0))


@pytest.fixture(scope="module")
def teacher(make_model):
    return nnx.split(make_model(1))


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, P + 1, B).astype(np.int32)
    lengths[:2] = 1, P
    counts = rng.integers(1, N + 1, B)
    counts[2:4] = 1, N
    mask = np.arange(N) < counts[:, None]
    mask[3, 2] = False  # any mask will do
    prompts = np.where(np.arange(P) < lengths[:, None], rng.integers(0, V, (B, P)), 0).astype(np.int32)
    completions = np.where(np.arange(N) < counts[:, None], rng.integers(0, V, (B, N)), 0).astype(np.int32)
    return Batch(
        prompts,
        lengths,
        completions,
        mask,
        weights=np.asarray(token_weights(mask, Config())),
        rollout_log_probs=rng.normal(-3.5, 0.7, (B, N)).astype(np.float32),
        advantages=rng.normal(0, 1, (B, N)).astype(np.float32),
    )


def pack(prompts, lengths, completions):
    """Rows without a gap between prompt and completion, and the places that predict the completion."""
    rows = np.full((len(prompts), prompts.shape[1] + N), 5, np.int32)
    for row, prompt, length, completion in zip(rows, prompts, lengths, completions, strict=True):
        row[:length], row[length : length + N] = prompt[:length], completion
    return rows, (lengths[:, None] - 1 + np.arange(N))[..., None]


def _log_probs(graphdef, params, rows, places):
    logits, _ = nnx.merge(graphdef, params)(rows)
    return jax.nn.log_softmax(jnp.take_along_axis(logits, places, axis=1))


log_probs = jax.jit(_log_probs, static_argnums=0)


@jax.jit(static_argnums=0)
def pull_back(graphdef, params, rows, places, slope):
    """The gradient of sum(slope * log_probs) in the parameters."""
    return jax.grad(lambda params: jnp.sum(slope * _log_probs(graphdef, params, rows, places)))(params)


def written_out(name, p, q, batch):
    """The loss of each token [B, N], from log-probs [B, N, V]; stop-gradients as the formulas say."""
    stop = jax.lax.stop_gradient
    mine, theirs = (jnp.take_along_axis(a, batch.completions[..., None], -1)[..., 0] for a in (p, q))
    ratio = jnp.exp(mine - batch.rollout_log_probs)
    if name == "sft":
        return -mine
    kl = jnp.sum(jnp.exp(p) * (p - q), -1)
    if name == "reverse_kl":
        return kl
    if name == "sampled_reverse_kl":
        estimate = stop(jnp.minimum(ratio, 1.5) * (mine - theirs))
        return estimate * mine + stop(estimate * (1 - mine))
    surrogate = jnp.minimum(ratio * batch.advantages, jnp.clip(ratio, 0.8, 1.2) * batch.advantages)
    return -surrogate + 0.3 * kl


def reference(name, student, teacher, batch, teacher_rows=None):
    """(loss, gradient) of the whole batch."""
    rows = pack(batch.prompts, batch.prompt_lengths, batch.completions)
    p = log_probs(*student, *rows)
    q = log_probs(*teacher, *pack(*(teacher_rows or batch[:2]), batch.completions))

    def loss(p):
        return jnp.sum(jnp.where(batch.mask, written_out(name, p, q, batch), 0) * batch.weights)

    value, slope = jax.jit(jax.value_and_grad(loss))(p)
    return value, pull_back(*student, *rows, slope)


@cache
def compiled(name, student, teachers, options):
    """The update, which leaves its gradient in the optimiser's state; equal arguments compile once."""
    keep = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda grads, state, params=None: (jax.tree.map(lambda g: -RATE * g, grads), grads),
    )
    config = CONFIGS[name]
    return make_update(
        student, teachers, keep, make_objective(config), weight_bounds=weight_bounds(config), **dict(options)
    )


score = cache(make_score)


def step(name, student, teacher, batch, **options):
    """(new params, gradient, metrics) of one update by plain gradient descent."""
    graphdefs, params, hidden = (), (), ()
    if name != "sft":
        graphdefs, params = (teacher[0],), (teacher[1],)
        hidden = (score(teacher[0], options.get("micro_batches", 1))(teacher[1], batch),)
    update = compiled(name, student[0], graphdefs, tuple(sorted(options.items())))
    old = jax.tree.map(jnp.copy, student[1])  # the state is donated
    state, metrics = update(State(old, jax.tree.map(jnp.zeros_like, old)), params, batch, hidden)
    return state.params, state.opt_state, metrics


def close(a, b, tolerance=1e-5):
    """Equal up to rounding, relative to the largest element of each array."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(np.abs(y).max(), 1e-2))


def identical(a, b):
    """Bitwise equal trees."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def same_metrics(a, b, rtol=1e-5):
    assert set(a) == set(b)
    for name, value in b.items():
        np.testing.assert_allclose(a[name], value, rtol=rtol, atol=1e-6, err_msg=name)


@pytest.fixture(scope="module")
def plain(student, teacher, batch):
    return step("reverse_kl", student, teacher, batch)


SPLIT = dict(loss_chunk=16, micro_batches=2)  # two chunks, the second one half padding


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradient(name, student, teacher, batch):
    batch = batch._replace(weights=np.asarray(token_weights(batch.mask, CONFIGS[name])))
    params, gradient, metrics = step(name, student, teacher, batch, **SPLIT)
    loss, expected = reference(name, student, teacher, batch)
    close(gradient, expected)
    close(params, jax.tree.map(lambda p, g: p - RATE * g, student[1], gradient), 1e-6)
    norm = optax.tree.norm(expected)
    for metric, value in dict(loss=loss, gradient_norm=norm, update_norm=RATE * norm, finite=1).items():
        np.testing.assert_allclose(metrics[metric], value, rtol=1e-5, err_msg=metric)


@pytest.mark.parametrize(("micro_batches", "loss_chunk"), [(4, 2), (2, 16)])
def test_no_split_changes_anything(student, teacher, batch, plain, micro_batches, loss_chunk):
    _, gradient, metrics = step(
        "reverse_kl", student, teacher, batch, micro_batches=micro_batches, loss_chunk=loss_chunk
    )
    same_metrics(metrics, plain[2])
    close(gradient, plain[1])


def test_padding_counts_for_nothing(student, teacher, batch, plain):
    """A wider bucket, and other tokens behind prompts and completions."""
    behind = np.arange(N) >= (batch.mask * np.arange(1, N + 1)).max(-1, keepdims=True)
    prompts = np.pad(batch.prompts, ((0, 0), (0, 8)))
    dirty = batch._replace(
        prompts=np.where(np.arange(P + 8) < batch.prompt_lengths[:, None], prompts, 29).astype(np.int32),
        completions=np.where(behind, 17, batch.completions).astype(np.int32),
    )
    _, gradient, metrics = step("reverse_kl", student, teacher, dirty)
    same_metrics(metrics, plain[2])
    close(gradient, plain[1])


@pytest.mark.parametrize("name", ["sampled_reverse_kl", "grpo"])
def test_anything_may_stand_where_the_mask_is_zero(name, student, teacher, batch):
    dirty = batch._replace(
        rollout_log_probs=np.where(batch.mask, batch.rollout_log_probs, np.nan).astype(np.float32),
        advantages=np.where(batch.mask, batch.advantages, np.inf).astype(np.float32),
    )
    clean, got = (step(name, student, teacher, b, **SPLIT) for b in (batch, dirty))
    assert got[2]["finite"] == 1
    identical(got, clean)


def test_a_masked_row_counts_for_nothing(student, teacher, batch):
    """Row 3 without mask: what its completion says changes nothing."""
    mask = batch.mask.copy()
    mask[3] = False
    part = batch._replace(mask=mask, weights=np.asarray(token_weights(mask, Config())))
    other = part._replace(completions=np.where(np.arange(B)[:, None] == 3, 9, batch.completions))
    got, expected = (step("reverse_kl", student, teacher, b) for b in (other, part))
    same_metrics(got[2], expected[2])
    close(got[1], expected[1], 1e-6)
    loss, gradient = reference("reverse_kl", student, teacher, part)
    np.testing.assert_allclose(got[2]["loss"], loss, rtol=1e-5)
    close(got[1], gradient)


def widen(model):
    """The same model with a vocabulary of V + 5, noise in the new rows."""
    config, rng = nnx.merge(*model).config, np.random.default_rng(3)
    config = dataclasses.replace(config, vocab_size=V + 5)
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: models.Decoder(config, rngs=nnx.Rngs(0))))

    def fill(old, new):
        pad = [(0, n - o) for o, n in zip(old.shape, new.shape, strict=True)]
        noise = rng.normal(0, 1, new.shape).astype(np.float32)
        return jnp.asarray(np.where(np.pad(np.ones(old.shape, bool), pad), np.pad(old, pad), noise))

    return graphdef, jax.tree.map(fill, model[1], shapes)


def test_another_teacher_with_other_prompts_and_a_padded_vocabulary(student, make_model, batch):
    """Of another size; it sees prompts of its own; the noise behind its vocabulary changes nothing."""
    teacher = nnx.split(make_model(2, layers=1, width=24))
    rng = np.random.default_rng(2)
    lengths = rng.integers(1, 12, B).astype(np.int32)
    prompts = rng.integers(0, V, (B, 12)).astype(np.int32)
    own = batch._replace(teacher_prompts=prompts, teacher_prompt_lengths=lengths)
    _, gradient, metrics = step("reverse_kl", student, widen(teacher), own, **SPLIT)
    loss, expected = reference("reverse_kl", student, teacher, own, (prompts, lengths))
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    close(gradient, expected)


def test_a_student_with_a_padded_vocabulary(student, teacher, batch, plain):
    """More rows in head and embedding change neither loss nor gradient, and receive no gradient."""
    _, gradient, metrics = step("reverse_kl", widen(student), teacher, batch)
    metrics, expected = dict(metrics), dict(plain[2])
    # The sampler's log-probs are over the student's whole vocabulary.
    del metrics["sampler_difference"], expected["sampler_difference"]
    same_metrics(metrics, expected)
    cut = jax.tree.map(lambda g, old: g[tuple(map(slice, old.shape))], gradient, student[1])
    close(cut, plain[1])
    np.testing.assert_allclose(optax.tree.norm(gradient), optax.tree.norm(cut), rtol=1e-6)


def test_a_student_equal_to_its_teacher(student, batch):
    params, _, metrics = step("reverse_kl", student, student, batch)
    assert abs(metrics["loss"]) < 1e-6 and metrics["gradient_norm"] < 1e-5
    assert metrics["kl"] < 1e-6 and metrics["top16_overlap"] == 1
    close(params, student[1], 1e-6)


def test_the_bare_protocol(bare_model, batch):
    """A user's own model that returns logits and knows no hidden states, as student and as teacher."""
    pair = nnx.split(bare_model), nnx.split(type(bare_model)(nnx.Rngs(1)))
    _, gradient, metrics = step("reverse_kl", *pair, batch, **SPLIT)
    loss, expected = reference("reverse_kl", *pair, batch)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    close(gradient, expected)


def test_bfloat16_computation_keeps_float32_weights(student, teacher, batch, plain):
    params, gradient, metrics = step("reverse_kl", student, teacher, batch, dtype=jnp.bfloat16)
    assert {a.dtype for a in jax.tree.leaves((params, gradient))} == {jnp.dtype("float32")}
    np.testing.assert_allclose(metrics["loss"], plain[2]["loss"], rtol=0.02)
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(g)]) for g in (gradient, plain[1]))
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.995


ADAMW = OptimizerConfig(learning_rate=1e-2, weight_decay=0.01)


@pytest.fixture(scope="module")
def adamw(student, teacher):
    """(update, a fresh state) with the optimiser of a run."""
    return on_mesh(student, teacher, student[1])


def on_mesh(student, teacher, params):
    optimizer = make_optimizer(ADAMW)
    state = State(params, init_optimizer(optimizer, params))
    update = make_update(
        student[0],
        teacher[:1],
        optimizer,
        make_objective(CONFIGS["reverse_kl"]),
        shardings=jax.tree.map(lambda a: a.sharding, state),
        **SPLIT,
    )
    return update, lambda: jax.tree.map(jnp.copy, state)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["weights", "teacher"])
def test_a_step_that_is_not_finite_changes_nothing(adamw, teacher, batch, where, value):
    update, fresh = adamw
    hidden = (score(teacher[0], 2)(teacher[1], batch),)
    state, _ = update(fresh(), teacher[1:], batch, hidden)
    before = jax.tree.map(np.array, state)
    if where == "weights":
        weights = batch.weights.copy()
        weights[0, 0] = value
        state, metrics = update(state, teacher[1:], batch._replace(weights=weights), hidden)
    else:
        state, metrics = update(state, teacher[1:], batch, (hidden[0].at[1, 0, 0].set(value),))
    assert metrics["finite"] == 0
    identical(state, before)
    state, metrics = update(state, teacher[1:], batch, hidden)  # and training goes on
    assert metrics["finite"] == 1 and np.isfinite(jax.tree.leaves(state.params)[0]).all()


def test_a_broken_student_is_not_finite(adamw, teacher, batch):
    update, fresh = adamw
    hidden = (score(teacher[0], 2)(teacher[1], batch),)
    state = fresh()
    broken = jax.tree.map(lambda p: p.at[(0,) * p.ndim].set(jnp.nan), state.params)
    _, metrics = update(state._replace(params=broken), teacher[1:], batch, hidden)
    assert metrics["finite"] == 0 and np.isnan(metrics["loss"])


def test_the_state_is_donated(adamw, teacher, batch):
    update, fresh = adamw
    state = fresh()
    update(state, teacher[1:], batch, (score(teacher[0], 2)(teacher[1], batch),))
    assert all(a.is_deleted() for a in jax.tree.leaves(state.params))


def test_devices_do_not_matter(adamw, student, teacher, batch, compilations):
    """Three updates on a 2 x 2 x 2 mesh and on one device; one compilation; no sharding drifts."""
    mesh = make_mesh(2, 2, 2)
    mine, theirs = (jax.device_put(m[1], param_shardings(m[1], mesh)) for m in (student, teacher))
    (update, fresh), (update_alone, fresh_alone) = on_mesh(student, teacher, mine), adamw
    state, alone, placed = fresh(), fresh_alone(), jax.device_put(batch, batch_sharding(mesh))
    shardings = jax.tree.map(lambda a: a.sharding, state)
    assert len({s.spec for s in jax.tree.leaves(shardings)}) > 2
    for number in range(3):
        hidden = (score(teacher[0], 2)(teacher[1], batch),)
        alone, expected = update_alone(alone, teacher[1:], batch, hidden)
        with compilations() as compiled:
            state, metrics = update(state, (theirs,), placed, (score(teacher[0], 2)(theirs, placed),))
        assert number == 0 or not compiled
        same_metrics(metrics, expected, rtol=1e-4)
        for got, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
            assert got.sharding.is_equivalent_to(wanted, got.ndim)
    close(state.params, alone.params, 1e-4)


def test_scores_stand_in_the_order_of_the_rows(teacher, batch):
    expected = log_probs(*teacher, *pack(*batch[:3]))
    for parts in (1, 2):
        hidden = score(teacher[0], parts)(teacher[1], batch)
        assert hidden.shape == (B, N, 16)
        got = jax.nn.log_softmax(nnx.merge(*teacher).unembed(hidden))
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_token_weights():
    mask = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    np.testing.assert_allclose(token_weights(mask, Config()), mask / 4, rtol=1e-6)
    np.testing.assert_allclose(token_weights(mask, CONFIGS["sft"]), mask / 4, rtol=1e-6)
    by_row = mask / np.array([[3], [1], [1]]) / 3
    np.testing.assert_allclose(token_weights(mask, CONFIGS["grpo"]), by_row, rtol=1e-6)
    assert not np.any(token_weights(np.zeros((2, 3), bool), Config()))


def test_statistics():
    rng = np.random.default_rng(4)
    p, q = (np.asarray(jax.nn.log_softmax(rng.normal(0, 2, (2, 3, 40))), np.float64) for _ in range(2))
    ids = rng.integers(0, 40, (2, 3))
    own = np.take_along_axis(p, ids[..., None], -1)[..., 0]
    rollout = own + rng.normal(0, 0.5, (2, 3))
    arrays = [jnp.asarray(a, jnp.float32) for a in (p, q, rollout)]
    tokens = Tokens(jnp.asarray(ids), jnp.ones((2, 3), bool), *arrays)
    got = statistics(tokens, (0.8, 1.25))
    shared = [
        [sorted(set(np.argsort(-a)[:16]) & set(np.argsort(-b)[:16])) for a, b in zip(x, y, strict=True)]
        for x, y in zip(p, q, strict=True)
    ]
    weight = np.exp(own - rollout)
    expected = dict(
        student_entropy=-(np.exp(p) * p).sum(-1),
        teacher_entropy=-(np.exp(q) * q).sum(-1),
        kl=(np.exp(p) * (p - q)).sum(-1),
        top16_overlap=[[len(s) / 16 for s in row] for row in shared],
        top16_mass=[[np.exp(p[i, j])[s].sum() for j, s in enumerate(row)] for i, row in enumerate(shared)],
        sampler_difference=np.abs(own - rollout),
        clip_rate=(weight < 0.8) | (weight > 1.25),
    )
    assert set(got) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_statistics_of_small_vocabularies_and_of_what_is_missing():
    p = jax.nn.log_softmax(jnp.array([[[1.0, 2.0, -jnp.inf]]]))
    ids, mask = jnp.zeros((1, 1), int), jnp.ones((1, 1), bool)
    got = statistics(Tokens(ids, mask, p), (0, 5))
    assert set(got) == {"student_entropy"} and np.isfinite(got["student_entropy"]).all()
    assert statistics(Tokens(ids, mask, p, p), (0, 5))["top16_overlap"] == 1


def test_bounds_of_the_weights():
    assert weight_bounds(Config(importance_clip=3.0)) == (0.0, 3.0)
    assert weight_bounds(Config(objective="grpo", ratio_clip=(0.25, 0.5))) == (0.75, 1.5)
