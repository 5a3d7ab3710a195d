"""The transform against hand-worked cases and against the host's search."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from opd_jax.transforms import ExtrapolateState, extrapolate, extrapolation

SHAPES = {"up": {"kernel": (6, 4)}, "down": {"kernel": (2, 4, 8)}, "norm": {"scale": (4,)}, "embed": (5, 4)}


def make(seed, scale=1.0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(scale * rng.normal(size=shape), dtype),
        SHAPES,
        is_leaf=lambda x: type(x) is tuple,
    )


START, GOAL = make(0), make(1)


def closeness(params):
    """[6]: of each row of `up` to its goal."""
    return -jnp.sum((params["up"]["kernel"] - GOAL["up"]["kernel"]) ** 2, 1)


def total(params):
    return closeness(params).mean()


def get(state, name):
    return np.asarray(optax.tree.get(state, f"extrapolate_{name}"))


def stepper(tx, **extra_args):
    """A compiled step of plain SGD on a pull towards the goal, keyword call."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        grads = jax.tree.map(lambda p, g: p - g, params, GOAL)
        updates, state = tx.update(updates=grads, state=state, params=params, **extra_args)
        return optax.apply_updates(params, updates), state

    return step


def assert_close(tree, other):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), tree, other)


def copied(params):
    return jax.tree.map(jnp.copy, params)


def scalar(**options):
    """The worked example: W from 0 in steps of 1, best at `best`; returns W and the state after each step."""
    best = options.pop("best", 5.5)
    steps = options.pop("steps", 1)
    tx = optax.chain(optax.sgd(1.0), extrapolate(lambda p: -jnp.sum((p["up"] - best) ** 2), **options))
    params = {"up": jnp.zeros((1, 1))}
    state = tx.init(params)
    out = []
    for _ in range(steps):
        updates, state = tx.update({"up": -jnp.ones((1, 1))}, state, params)
        params = optax.apply_updates(params, updates)
        out.append((float(params["up"][0, 0]), state[1]))
    return out


@pytest.mark.parametrize("batched", [False, True])
def test_hand_worked(batched):
    """1: W 1, candidates 3, 5, 7 (fails) -> 5. 2: W 6, anchor 5, 8 fails. 4: W 8, anchor 6, 12 fails."""
    out = scalar(batched=batched, steps=4)
    assert [w for w, _ in out] == [5, 6, 7, 8]
    first, last = out[0][1], out[-1][1]
    np.testing.assert_array_equal(first.extrapolate_scores, [-20.25, -6.25, -0.25, -2.25, np.nan, np.nan])
    assert first.extrapolate_factor == 4 and first.extrapolate_accepted == 2
    assert first.extrapolate_evaluations == (6 if batched else 4)
    assert [float(s.extrapolate_anchor["up"][0, 0]) for _, s in out] == [5, 6, 6, 8]
    assert last.extrapolate_factor == 0 and last.extrapolate_count == 4
    assert last.extrapolate_searches == 3 and last.extrapolate_accepted == 2
    np.testing.assert_array_equal(last.extrapolate_scores[:3], [-6.25, -42.25, np.nan])


def test_raw_anchor():
    """1: -> 5, anchor 1. 2: W 6, step 5 from the anchor, 16 fails. 4: W 8, anchor 6, 12 fails."""
    out = scalar(anchor="raw", steps=4)
    assert [w for w, _ in out] == [5, 6, 7, 8]
    assert [float(s.extrapolate_anchor["up"][0, 0]) for _, s in out] == [1, 6, 6, 8]
    assert float(out[1][1].extrapolate_scores[1]) == -((16 - 5.5) ** 2)


def test_raw_and_accepted_anchors_go_apart():
    """Best far away: 1 -> 11; raw goes on from 12 by 10 (12 - 1), accepted by 10 (12 - 11)."""
    assert scalar(anchor="raw", best=1e3, steps=2)[-1][0] == 12 + 110
    assert scalar(anchor="accepted", best=1e3, steps=2)[-1][0] == 12 + 10


@pytest.mark.parametrize("rule", ["paper", "reference", "margin"])
@pytest.mark.parametrize("batched", [False, True])
def test_as_the_host_searches(rule, batched):
    """Eight steps: the same factors, scores and parameters as plain steps with `search` in between."""
    tx = optax.chain(optax.sgd(0.03), extrapolate(closeness, rule=rule, batched=batched))
    step, plain = stepper(tx), stepper(optax.sgd(0.03))
    params, state = copied(START), tx.init(START)
    ours, theirs, anchor = copied(START), optax.sgd(0.03).init(START), START
    accepted = 0
    for t in range(1, 9):
        params, state = step(params, state)
        ours, theirs = plain(ours, theirs)
        if extrapolation.is_checkpoint(t):
            found = extrapolation.search(closeness, ours, anchor, rule=rule)
            ours = copied(found.params)
            anchor, accepted = found.params, accepted + found.accepted
            assert get(state, "factor") == found.factor
            scores = get(state, "scores")
            np.testing.assert_allclose(scores[: len(found.scores)], found.scores, rtol=2e-5)
            assert np.isnan(scores[len(found.scores) :]).all()
        assert_close(params, ours)
    assert get(state, "accepted") == accepted >= 5
    np.testing.assert_array_equal(params["embed"], ours["embed"])  # does not move


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rejected_updates_pass_bit_for_bit(dtype):
    """Through Adam, compiled or not; the anchor is then what `apply_updates` gives."""
    tx = optax.chain(
        optax.adam(0.01), extrapolate(lambda p: jnp.sum(p["up"]["kernel"]) * 0, rule="reference")
    )
    plain = optax.adam(0.01)
    params, grads = make(0, dtype=dtype), make(2, dtype=dtype)
    for update, plain_update in ((tx.update, plain.update), (jax.jit(tx.update), jax.jit(plain.update))):
        updates, state = update(grads, tx.init(params), params)
        expected, _ = plain_update(grads, plain.init(params), params)
        assert get(state, "searches") == 1 and get(state, "factor") == 0
        jax.tree.map(np.testing.assert_array_equal, updates, expected)
        jax.tree.map(
            np.testing.assert_array_equal, state[1].extrapolate_anchor, optax.apply_updates(params, expected)
        )


def test_accepted_parameters_are_the_anchor_in_mixed_precision():
    """bfloat16 parameters with float32 updates and the reverse: what is applied is what is remembered."""
    for params_dtype, update_dtype in ((jnp.bfloat16, jnp.float32), (jnp.float32, jnp.bfloat16)):
        tx = extrapolate(lambda p: jnp.sum(p["up"]["kernel"].astype(jnp.float32) ** 2), factors=(2.0, 3.0))
        params = make(0, dtype=params_dtype)
        updates = make(0, 0.1, update_dtype)  # outwards: the score grows
        out, state = tx.update(updates, tx.init(params), params)
        assert state.extrapolate_factor == 3
        assert all(u.dtype == update_dtype for u in jax.tree.leaves(out))
        after = optax.apply_updates(params, out)
        jax.tree.map(np.testing.assert_array_equal, state.extrapolate_anchor, after)
        raw = optax.apply_updates(params, updates)
        wanted = extrapolation.propose(params, raw, 3.0)
        for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), rtol=2**-7)
        np.testing.assert_array_equal(out["norm"]["scale"], updates["norm"]["scale"])


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_that_are_not_finite(batched, bad):
    """The second candidate's, 5; and the start's, 1."""

    def score(params, at):
        w = params["up"].sum()
        return jnp.where(w == at, bad, w)

    params = {"up": jnp.zeros((1, 1))}
    tx = extrapolate(score, batched=batched)
    updates, state = tx.update(
        {"up": jnp.ones((1, 1))}, tx.init(params), params, at=5.0, unknown="passed over"
    )
    assert updates["up"] == 3 and state.extrapolate_factor == 2 and state.extrapolate_failures == 1
    assert np.isfinite(state.extrapolate_scores).tolist() == [True, True] + [False] * 4
    updates, state = tx.update({"up": jnp.ones((1, 1))}, tx.init(params), params, at=1.0)
    assert updates["up"] == 1 and state.extrapolate_factor == 0 and state.extrapolate_failures == 1


@pytest.mark.parametrize("batched", [False, True])
def test_trust_bound(batched):
    """Squared distances of 3, 5, 7 from W = 1: 4, 16, 36."""
    tx = extrapolate(
        lambda p: p["up"].sum(),
        max_kl=20.0,
        divergence_fn=lambda p, q, scale: scale * jnp.sum((p["up"] - q["up"]) ** 2),
        batched=batched,
    )
    params = {"up": jnp.zeros((1, 1))}
    for scale, factor, failures in ((1.0, 4, 0), (0.1, 10, 0), (np.nan, 0, 1)):
        _, state = tx.update({"up": jnp.ones((1, 1))}, tx.init(params), params, scale=scale)
        assert state.extrapolate_factor == factor and state.extrapolate_failures == failures
    assert np.isnan(state.extrapolate_scores[1:]).all()


def test_score_as_an_extra_argument():
    """It goes before the constructor's; another transform of the chain is not disturbed."""
    params, updates = {"up": jnp.zeros((1, 1))}, {"up": -jnp.ones((1, 1))}
    for tx in (extrapolate(), extrapolate(lambda p: -p["up"].sum())):
        chain = optax.chain(optax.sgd(1.0), tx)
        out, state = chain.update(
            updates,
            chain.init(params),
            params,
            score_fn=lambda p, goal: -jnp.sum((p["up"] - goal) ** 2),
            goal=5.5,
        )
        assert out["up"] == 5 and state[1].extrapolate_factor == 4


def test_one_compilation_and_scores_only_when_due(compilations):
    calls = []

    def score(params):
        jax.debug.callback(lambda: calls.append(1))
        return total(params)

    tx = optax.chain(optax.sgd(0.03), extrapolate(score, schedule=(3, 9)))
    step = stepper(tx)
    params, state = copied(START), tx.init(START)
    params, state = step(params, state)
    with compilations() as compiled:
        for _ in range(11):
            params, state = step(params, state)
    jax.effects_barrier()
    assert not compiled
    assert get(state, "searches") == 2 and len(calls) == get(state, "evaluations") > 2


def test_scan():
    tx = optax.chain(optax.sgd(0.03), extrapolate(total))
    step = stepper(tx)
    params, state = copied(START), tx.init(START)
    for _ in range(5):
        params, state = step(params, state)

    @jax.jit
    def run(params, state):
        return jax.lax.scan(lambda carry, _: (step(*carry), None), (params, state), length=5)[0]

    scanned, scan_state = run(START, tx.init(START))
    assert_close(params, scanned)
    assert get(scan_state, "accepted") == get(state, "accepted") > 0


def compositions():
    part = {"up": "a", "down": "a", "norm": "b", "embed": "b"}
    multi = optax.MultiSteps(optax.sgd(0.03), 2).gradient_transformation()
    inject = optax.inject_hyperparams(extrapolate, static_args=("score_fn",))
    chain = functools.partial(optax.chain, optax.sgd(0.03))
    return {
        "named_chain": optax.named_chain(("sgd", optax.sgd(0.03)), ("jump", extrapolate(total))),
        "partition": optax.partition({"a": chain(extrapolate(total)), "b": optax.sgd(0.03)}, part),
        "masked": chain(optax.masked(extrapolate(total), {k: k != "norm" for k in SHAPES})),
        "apply_if_finite": optax.apply_if_finite(chain(extrapolate(total)), 3),
        "inject_hyperparams": chain(inject(total, rule="paper", margin=1.5)),
        "multi_steps_inside": optax.chain(multi, extrapolate(total, micro_steps=2)),
        "multi_steps_around": optax.MultiSteps(chain(extrapolate(total)), 2),
    }


@pytest.mark.parametrize("name", compositions())
def test_composition(name):
    """Each is the chain of its plain parts: a search after the first update, all five factors accepted."""
    tx = compositions()[name]
    micro = 2 if "multi" in name else 1
    step, params, state = stepper(tx), copied(START), tx.init(START)
    for _ in range(micro):
        params, state = step(params, state)
    assert get(state, "searches") == 1 and get(state, "factor") == 10
    expected = jax.tree.map(lambda p, g: p - 0.03 * (p - g), START, GOAL)
    expected = extrapolation.propose(START, expected, 10.0)
    assert_close(params, expected)
    _, state = step(params, state)  # half a step under accumulation
    assert get(state, "searches") == 3 - micro


def test_map_params_eval_shape_and_leafless():
    tx = optax.chain(optax.adam(0.1), extrapolate(total))
    state = tx.init(START)
    assert isinstance(state[1], ExtrapolateState)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    named = optax.tree.map_params(tx, lambda _, name: name, state, jax.tree.map(lambda _: "p", START))
    assert set(jax.tree.leaves(named[1].extrapolate_anchor)) == {"p"}
    shapes = jax.eval_shape(tx.init, jax.eval_shape(lambda: START))
    assert jax.tree.structure(shapes) == jax.tree.structure(state)
    for wanted, leaf in zip(jax.tree.leaves(shapes), jax.tree.leaves(state), strict=True):
        assert (wanted.shape, wanted.dtype) == (leaf.shape, leaf.dtype)
    updates, after = tx.update({}, tx.init({}), {})
    assert updates == {} and jax.tree.structure(after) == jax.tree.structure(tx.init({}))


def test_an_anchor_that_was_never_filled_accepts_nothing():
    """From shapes alone there is no W_0: the first search fails, the second has an anchor."""
    tx = optax.chain(optax.sgd(0.03), extrapolate(total))
    step, params = stepper(tx), copied(START)
    state = tx.init(jax.eval_shape(lambda: START))
    params, state = step(params, state)
    assert get(state, "failures") == 1 and get(state, "factor") == 0
    params, state = step(params, state)
    assert get(state, "factor") == 10


@pytest.mark.parametrize("batched", [False, True])
def test_explicit_mesh(batched):
    """Types of all of the state and of the updates are kept, and values are those without a mesh."""
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    specs = {
        "up": {"kernel": jax.P("fsdp", "tensor")},
        "down": {"kernel": jax.P(None, "fsdp", "tensor")},
        "norm": {"scale": jax.P("tensor")},
        "embed": jax.P(None, "tensor"),
    }
    tx = optax.chain(optax.sgd(0.03), extrapolate(closeness, rule="margin", batched=batched))
    expected, expected_state = jax.jit(tx.update)(START, tx.init(START), START)
    with jax.set_mesh(mesh):
        params = jax.tree.map(lambda x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec)), START, specs)
        state = tx.init(params)
        updates, after = jax.jit(tx.update)(params, state, params)
        assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
        assert jax.tree.map(jax.typeof, updates) == jax.tree.map(jax.typeof, params)
    assert get(after, "factor") == get(expected_state, "factor")
    assert_close(updates, expected)


def test_nnx_optimizer_on_an_auto_mesh():
    """Variables with sharding metadata: their containers in the optimiser's state are others."""
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("fsdp", "tensor"))
        model = nnx.Linear(4, 8, kernel_init=init, use_bias=False, rngs=nnx.Rngs(0))
        start = jnp.copy(model.kernel[...])
        score = lambda params: -jnp.sum(jax.tree.leaves(params)[0] ** 2)  # noqa: E731
        optimizer = nnx.Optimizer(model, optax.chain(optax.sgd(0.01), extrapolate(score)), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            optimizer.update(model, nnx.grad(lambda m: jnp.sum(m.kernel[...] ** 2) / 2)(model))

        step(model, optimizer)
    assert model.kernel[...].sharding.spec == jax.P("fsdp", "tensor")
    np.testing.assert_allclose(model.kernel[...], start * (0.99 - 10 * 0.01), rtol=1e-5)


def test_what_must_be_given():
    params = {"up": jnp.ones((2, 2))}
    tx = extrapolate(lambda p, batch, scale=1.0: jnp.sum(p["up"]) * scale)
    with pytest.raises(ValueError, match="pass `params`"):
        tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match="score_fn needs batch"):
        tx.update(params, tx.init(params), params)
    with pytest.raises(ValueError, match="extrapolate has no score"):
        extrapolate().update(params, extrapolate().init(params), params)
    with pytest.raises(ValueError, match="nothing moves among the 1 parameters"):
        tx.init({"norm": jnp.ones(3)})
    with pytest.raises(ValueError, match="at least 2 examples"):
        extrapolate(lambda p: p["up"].sum(), rule="margin").update(params, tx.init(params), params)


def test_parameters_that_are_not_those_of_init():
    tx = extrapolate(lambda p: jnp.sum(p["up"]))
    params = {"up": jnp.ones((2, 2))}
    state = tx.init(params)
    more = params | {"down": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match="state of `init` has 1 leaves, the parameters 2"):
        tx.update(more, state, more)
    other = {"up": jnp.ones((2, 3))}
    with pytest.raises(ValueError, match=r"float32\[2, 2\] where the parameters have float32\[2, 3\], at up"):
        tx.update(other, state, other)
    with pytest.raises(ValueError, match="the updates are no tree like the parameters"):
        tx.update({"down": jnp.ones((2, 2))}, state, params)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": 0}, "schedule must be"),
        ({"schedule": "often"}, "schedule must be"),
        ({"factors": ()}, "factors must be"),
        ({"rule": "best"}, "rule must be"),
        ({"margin": -1}, "margin must be"),
        ({"anchor": "first"}, "anchor must be"),
        ({"micro_steps": 0}, "micro_steps must be"),
        ({"micro_steps": 1.5}, "micro_steps must be"),
        ({"max_kl": 1.0}, "belong together"),
        ({"score_fn": 3.0}, "score_fn must be a function"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        extrapolate(**options)
