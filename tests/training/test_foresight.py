"""What a config's `foresight` section does to a run."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from opd_jax import config as configs
from opd_jax import training
from opd_jax.training import _extrapolation
from tests.training.runs import assert_same, read_metrics, read_weights

pytestmark = pytest.mark.usefixtures("quick_compilation")


def foresight(**sections) -> configs.ForesightConfig:
    kinds = dict(
        track=configs.TrackConfig,
        extrapolate=configs.ExtrapolateConfig,
        allocate=configs.AllocateConfig,
        project=configs.ProjectConfig,
    )
    return configs.ForesightConfig(**{name: kinds[name](**keys) for name, keys in sections.items()})


def kernels(weights):
    """The matrices whose displacement is tracked, by module."""
    names = dict(q_proj="attention.q", down_proj="mlp.down")
    return {f"layers.{ours}.kernel": [w for n, w in weights.items() if hf in n] for hf, ours in names.items()}


@pytest.mark.slow
def test_the_tracked_subspace_is_that_of_the_displacement(make, folders):
    """Against the SVD of the difference of the two saved models."""
    settings = make(foresight=foresight(track=dict(rank=4, every=1, of="displacement")), steps=6)
    training.train(settings)
    plain = make("plain", steps=6)
    training.train(plain)
    before, after = (read_weights(Path(p)) for p in (folders[0], f"{settings.run_dir}/model"))
    assert_same(after, read_weights(Path(plain.run_dir) / "model"))  # watching changes nothing
    line = read_metrics(settings.run_dir)[-1]
    for name, old in kernels(before).items():
        values = [
            np.linalg.svd((new - start).astype(np.float64), compute_uv=False)
            for start, new in zip(old, kernels(after)[name], strict=True)
        ]
        norms = [np.linalg.norm(v) for v in values]
        expected = dict(
            spectral_norm=np.mean([v[0] for v in values]),
            spectral_ratio=np.mean([v[0] / n for v, n in zip(values, norms, strict=True)]),
        )
        for measure, value in expected.items():
            np.testing.assert_allclose(line[f"subspace/{name}/{measure}"], value, rtol=0.01)


SEARCH = dict(schedule="powers_of_two", prompts=8, rule="reference")


def test_extrapolation_resumes_bitwise_and_reports_its_cost(make, capsys):
    settings = make("whole", foresight=foresight(extrapolate=SEARCH), steps=5, optimizer__learning_rate=1e-3)
    result = training.train(settings)
    lines = [line for line in read_metrics(settings.run_dir) if "extrapolate_factor" in line]
    assert [line["step"] for line in lines] == [1, 2, 4]
    assert any(line["extrapolate_factor"] for line in lines)
    for line in lines:
        assert line["extrapolate_score"] >= line["extrapolate_start"]
    accepted, seconds, tokens = result.searches
    assert accepted == sum(line["extrapolate_factor"] > 0 for line in lines) and seconds > 0
    assert tokens == sum(line["extrapolate_tokens"] for line in lines)
    stopped = dataclasses.replace(settings, run_dir=settings.run_dir + "2", steps=2)
    training.train(stopped)
    training.train(dataclasses.replace(stopped, steps=5))
    assert_same(*(read_weights(Path(c.run_dir) / "model") for c in (settings, stopped)))


@pytest.mark.slow
def test_an_interrupted_search_is_done_again(make, monkeypatch):
    settings = make("whole", foresight=foresight(extrapolate=SEARCH), steps=3, optimizer__learning_rate=1e-3)
    training.train(settings)
    stopped = dataclasses.replace(settings, run_dir=settings.run_dir + "2")
    search = _extrapolation.Extrapolation.search
    calls = []

    def interrupted(self, state):
        calls.append(1)
        if len(calls) == 2:
            raise training.Interrupted
        return search(self, state)

    monkeypatch.setattr(_extrapolation.Extrapolation, "search", interrupted)
    with pytest.raises(training.Interrupted):
        training.train(stopped)
    training.train(stopped)
    assert_same(*(read_weights(Path(c.run_dir) / "model") for c in (settings, stopped)))


def test_a_search_that_accepts_nothing_is_plain_distillation(make):
    """With factors so large that every candidate is worse."""
    hopeless = foresight(extrapolate=SEARCH | dict(factors=(1e4,)))
    settings = make("hopeless", foresight=hopeless, steps=4)
    training.train(settings)
    plain = make("plain", steps=4)
    training.train(plain)
    assert_same(*(read_weights(Path(c.run_dir) / "model") for c in (settings, plain)))


def test_accuracy_as_the_score_and_a_bound_on_the_way(make):
    options = SEARCH | dict(score="accuracy", rule="paper", max_kl=1e-9, moves="all")
    settings = make(foresight=foresight(extrapolate=options), steps=2)
    training.train(settings)
    lines = [line for line in read_metrics(settings.run_dir) if "extrapolate_factor" in line]
    # The base solves nothing, 0 >= 0 would be accepted: only the bound forbids it.
    assert all(line["extrapolate_factor"] == 0 and line["extrapolate_evaluated"] == 1 for line in lines)


@pytest.mark.slow
def test_frozen_modules_stay_have_no_moments_and_survive_a_resume(make, folders):
    frozen = foresight(allocate=dict(steps=2, mode="freeze", fraction=0.5))
    settings = make("whole", foresight=frozen, steps=2)
    training.train(settings)
    early = read_weights(Path(settings.run_dir) / "model")
    settings = dataclasses.replace(settings, steps=5)
    training.train(settings)
    late = read_weights(Path(settings.run_dir) / "model")
    still = {n.split(".")[-2] for n in early if np.array_equal(early[n], late[n])}
    moved = {n.split(".")[-2] for n in early if not np.array_equal(early[n], late[n])}
    modules = {"embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(still & modules) == 4 and not still & moved
    whole = make("at_once", foresight=frozen, steps=5)
    training.train(whole)
    assert_same(late, read_weights(Path(whole.run_dir) / "model"))


def test_no_gradient_is_computed_of_what_stays(make_model):
    """The compiled update with everything but norms and head frozen takes far fewer operations."""
    from flax import nnx

    from opd_jax.config import Config
    from opd_jax.training._objectives import make_objective
    from opd_jax.training._step import Batch, State, make_update

    graphdef, params = nnx.split(make_model(0, width=64, ff_width=256, layers=4))
    kernels = [
        ".".join(str(k.key) for k in path if hasattr(k, "key"))
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if leaf.ndim == 3
    ]
    batch = Batch(jnp.ones((2, 16), int), jnp.full(2, 16), jnp.ones((2, 16), int), jnp.ones((2, 16), bool))
    batch = batch._replace(weights=jnp.ones((2, 16)))

    def flops(still):
        optimizer = optax.sgd(0.1)
        update = make_update(graphdef, (), optimizer, make_objective(Config(objective="sft")), still=still)
        state = State(params, optimizer.init(params))
        return update.lower(state, (), batch, ()).compile().cost_analysis()["flops"]

    assert flops(kernels) < 0.8 * flops(())


@pytest.mark.slow
def test_adamw_in_the_subspace(make):
    """Fewer moments; the loss still falls."""
    settings = make(foresight=foresight(project=dict(rank=4, refresh=5)), steps=25, batch_size=32)
    training.train(settings)
    lines = read_metrics(settings.run_dir)
    assert lines[-1]["kl"] < 0.7 * lines[0]["kl"]
