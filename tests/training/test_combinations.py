"""Options together: no split of a batch and no padding of a vocabulary changes a loss; nothing is ignored."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import opd_jax
from opd_jax import config as configs
from opd_jax import losses, models, tasks
from opd_jax.config import Config, EarlyStopConfig, TeacherConfig, TokensConfig
from opd_jax.parallel import make_mesh
from opd_jax.training import _batches, _retokenize, _setup, _step
from opd_jax.training._heads import unembedder
from opd_jax.training._logging import Display
from opd_jax.training._objectives import make_objective, token_weights
from opd_jax.training._retokenize import Retokenize
from opd_jax.training._step import Batch, State, make_log_probs, make_score, make_update
from tests.training.test_teachers import permuted

pytestmark = pytest.mark.usefixtures("quick_compilation")

DEMO = Path(opd_jax.__file__).parent / "demo"
V, B, N, K = 32, 4, 6, 5


@pytest.fixture(scope="module")
def student(make_model):
    return nnx.split(make_model(0, layers=1))


@pytest.fixture(scope="module")
def teacher(make_model):
    return nnx.split(make_model(1, layers=1))


@pytest.fixture(scope="module")
def batch():
    """What every objective needs; two of the student's tokens are one span, a mask of one token a row."""
    rng = np.random.default_rng(0)
    mask = np.arange(N) < np.array([6, 1, 4, 5])[:, None]
    known = np.argsort(rng.random((B, N, V)), axis=-1)[..., :K].astype(np.int32)
    normal = lambda *shape: rng.normal(-3, 0.7, shape).astype(np.float32)  # noqa: E731
    return Batch(
        rng.integers(0, V, (B, 8), dtype=np.int32),
        np.array([8, 3, 5, 1], np.int32),
        rng.integers(0, V, (B, N), dtype=np.int32),
        mask,
        weights=np.asarray(token_weights(mask, Config())),
        rollout_log_probs=normal(B, N),
        advantages=rng.normal(0, 1, (B, N)).astype(np.float32),
        reference_log_probs=normal(B, N),
        spans=np.tile(np.array([0, 0, 1, 2, 3, -1], np.int32), (B, 1)),
        teacher_spans=np.tile(np.array([0, 1, 2, 3], np.int32), (B, 1)),
        support=known,
        support_log_probs=jax.nn.log_softmax(normal(B, N, K + 1)),
    )


def update(student, teachers, objective, **options):
    """A step that leaves the gradient in the optimiser's place."""
    keep = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda grads, state, params=None: (grads, grads)
    )
    return make_update(student[0], [t[0] for t in teachers], keep, objective, **options)


def start(params):
    return State(jax.tree.map(jnp.copy, params), jax.tree.map(jnp.zeros_like, params))  # it is donated


def close(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5 * max(1e-2, float(np.abs(y).max())))


OBJECTIVES = {
    "sequence": Config(
        loss="sampled_reverse_kl", loss_options={"level": "sequence", "discount": 0.9}, importance_clip=2.0
    ),
    "tail": Config(loss="sampled_tail_reverse_kl", loss_top_k=3),
    "extrapolated": Config(loss="extrapolated_reverse_kl"),
    "cached": Config(loss="forward_kl", teacher=TeacherConfig(cache="folder")),
}


@pytest.mark.slow
def test_no_split_changes_what_needs_whole_completions(student, teacher, batch):
    """Sequence weights, discounted sums, supports, temperature: in one part, and in two of uneven chunks."""
    terms = tuple(make_objective(c)[0]._replace(name=name) for name, c in OBJECTIVES.items())
    hidden = (make_score(teacher[0], 1)(teacher[1], batch),)
    found = []
    for sizes in (dict(micro_batches=1, loss_chunk=512), dict(micro_batches=2, loss_chunk=9)):
        step = update(student, [teacher], terms, temperature=1.5, **sizes)
        state, metrics = step(start(student[1]), (teacher[1],), batch, hidden)
        found.append((state.opt_state, metrics))
    (whole, one), (parts, two) = found
    for name in OBJECTIVES:
        assert abs(one[f"loss_{name}"]) > 1e-3
        np.testing.assert_allclose(one[f"loss_{name}"], two[f"loss_{name}"], rtol=2e-5, err_msg=name)
    close(parts, whole)


def widen(model, more=5):
    """The same model with a larger vocabulary, noise in the new rows."""
    config, rng = nnx.merge(*model).config, np.random.default_rng(3)
    config = dataclasses.replace(config, vocab_size=V + more)
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: models.Decoder(config, rngs=nnx.Rngs(0))))

    def fill(old, new):
        pad = [(0, n - o) for o, n in zip(old.shape, new.shape, strict=True)]
        noise = rng.normal(0, 1, new.shape).astype(np.float32)
        return jnp.asarray(np.where(np.pad(np.ones(old.shape, bool), pad), np.pad(old, pad), noise))

    return graphdef, jax.tree.map(fill, model[1], shapes)


def test_a_padded_student_of_a_cached_teacher(student, batch):
    """The cache ranges over the teacher's vocabulary: what the student has beyond is left out."""
    fields = {name: getattr(batch, name) for name in ("mask", "support", "support_log_probs")}
    fields["ids"] = batch.completions
    hidden = jnp.asarray(np.random.default_rng(1).normal(0, 1, (B, N, 16)), jnp.float32)
    (term,) = make_objective(OBJECTIVES["cached"])

    def loss(hidden, model, vocab_size):
        heads = [unembedder(nnx.merge(*model), len(hidden))]
        return term.loss(_step._tokens(heads, vocab_size, hidden, (), None, fields)).sum()

    expected = jax.value_and_grad(loss)(hidden, student, None)
    value, gradient = jax.value_and_grad(loss)(hidden, widen(student), V)
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    close(gradient, expected[1])


def test_a_padded_reference(student, batch):
    rows, wide = (batch.prompts, batch.prompt_lengths, batch.completions), widen(student)
    plain = make_log_probs(student[0], 1, 8)(student[1], *rows)
    np.testing.assert_allclose(make_log_probs(wide[0], 1, 8, V)(wide[1], *rows), plain, atol=2e-6)


# ---- which completions count


def drawn(monkeypatch, setup):
    """Completions 0 and 2 of four ran to the limit."""

    def sample(setup, model, prompts, key, on_progress, limit=None):
        mask = np.ones((4, 3), bool)
        tokens = Batch(np.ones((4, 2), np.int32), np.full(4, 2), np.ones((4, 3), np.int32), mask)
        return _batches._Drawn(tokens._replace(rollout_log_probs=np.zeros((4, 3))), np.array([0, 1, 0, 2]))

    monkeypatch.setattr(_batches, "_sample", sample)
    mesh = jax.make_mesh((1, 1), ("data", "fsdp"), devices=jax.devices()[:1])
    task = SimpleNamespace(name="task", verify=lambda text, example: 1.0)
    prompts = SimpleNamespace(examples=[None] * 4, task=task)
    setup = SimpleNamespace(
        mesh=mesh,
        prompts=type("Steps", (), {"__getitem__": lambda self, step: prompts, "task": task})(),
        model=lambda params: None,
        teacher=None,
        retokenize=None,
        tokenizer=models.load_tokenizer(DEMO / "base"),
        **setup,
    )
    return setup


DROP = TokensConfig(drop_truncated=True)
SIZES = dict(batch_size=4, max_new_tokens=3, tokens=DROP)
RISING = EarlyStopConfig(horizon=1, horizon_steps=4)


@pytest.mark.parametrize(
    ("changes", "step", "counted"),
    [
        (dict(), 0, [0, 3, 0, 3]),
        (dict(lmbda=0.0, off_policy="teacher"), 0, [0, 3, 0, 3]),
        (dict(objective="sft", off_policy="teacher"), 0, [0, 3, 0, 3]),
        (dict(early_stop=RISING), 0, [3] * 4),  # the horizon is no reason to drop what it cuts
        (dict(early_stop=RISING), 4, [0, 3, 0, 3]),
        (dict(task_weight=1.0, samples_per_prompt=2, early_stop=RISING), 0, [3] * 4),
        (dict(task_weight=1.0, samples_per_prompt=2, early_stop=RISING), 4, [0, 3, 0, 3]),
    ],
)
def test_truncated_completions_are_dropped_whoever_wrote_them(monkeypatch, changes, step, counted):
    setup = drawn(monkeypatch, dict(config=Config(**SIZES | changes)))
    batch, metrics = _batches.make_batch(setup, None, step, jax.random.key(0), lambda _: None)
    assert np.asarray(batch.mask).sum(-1).tolist() == counted and metrics["tokens"] == sum(counted)
    np.testing.assert_allclose(np.asarray(batch.weights).sum(), 1, rtol=1e-6)


def test_selected_tokens_would_change_discounted_sums():
    """Why high_entropy is refused there: a reward that does not count as a token still counts for others."""
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(-2, 1, (2, 1, 4)).astype(np.float32)
    chosen = np.array([[1, 0, 1, 0]], bool)
    for options in (dict(discount=1.0), dict(level="sequence")):
        rollout = student + rng.normal(0, 0.3, student.shape).astype(np.float32)
        full = losses.sampled_reverse_kl(student, teacher, rollout, **options)
        cut = losses.sampled_reverse_kl(student, teacher, rollout, where=chosen, **options)
        assert np.abs(np.where(chosen, full - cut, 0)).max() > 0.1


# ---- another tokenizer


@pytest.fixture
def aligned(monkeypatch):
    """A `Retokenize` of prompts, of which one is far too long, and these."""
    tokenizer = models.load_tokenizer(DEMO / "base")
    examples = [tasks.Example(prompt=text) for text in ("1" * 300, "1+2=", "3+4=")]
    task = type(
        "Task", (), dict(name="t", verify=None, __len__=lambda s: 3, __getitem__=lambda s, i: examples[i])
    )()
    prompts = tasks.Prompts(task, tokenizer, batch_size=2, max_prompt_length=8, shuffle=False)
    config = Config(max_new_tokens=16, teacher=TeacherConfig(path=str(DEMO / "teacher"), align=True))
    stops = models.stop_token_ids(DEMO / "base", tokenizer)
    return Retokenize(config, tokenizer, stops, prompts), prompts


def test_a_prompt_that_was_dropped_is_not_the_teachers_either(aligned):
    retokenize, prompts = aligned
    assert prompts.dropped == 1
    batch = prompts[0]
    ids = np.repeat(np.array([[3, 4, 5]], np.int32), 2, axis=0)
    out = retokenize(Batch(batch.tokens, batch.lengths, ids, np.ones((2, 3), bool)), batch)
    assert out.teacher_prompts.shape == (2, 16)
    for row, length, example in zip(
        out.teacher_prompts, out.teacher_prompt_lengths, batch.examples, strict=True
    ):
        assert tasks.decode(prompts.tokenizer, [row[:length].tolist()])[0] == example.prompt


def test_the_width_follows_from_the_batch_alone(aligned, monkeypatch):
    """A run that is resumed has not seen the batches before: its sums must be of the same shape."""
    retokenize, prompts = aligned
    batch, needed = prompts[0], iter([32, 16, 128, None])
    original = tasks.retokenize

    def wide(*args, **options):
        return (
            original(*args, **options)
            if "width" in options
            else original(*args, width=next(needed), **options)
        )

    monkeypatch.setattr(_retokenize.tasks, "retokenize", wide)
    rows = Batch(batch.tokens, batch.lengths, np.full((2, 16), 3, np.int32), np.ones((2, 16), bool))
    assert [retokenize(rows, batch).teacher_completions.shape[1] for _ in range(4)] == [
        32,
        16,
        59,
        32,
    ]  # 5 of 64 are the prompt


# ---- other models than the run's


def settings_of(**changes) -> Config:
    return Config(
        student=configs.StudentConfig(path=str(DEMO / "base")),
        teacher=TeacherConfig(path=str(DEMO / "teacher")),
        data=configs.DataConfig(source="arithmetic", options=dict(seed=1, size=8), max_prompt_length=16),
        **dict(batch_size=8, max_new_tokens=32) | changes,
    )


def fewer_positions(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    settings = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(settings | dict(max_position_embeddings=40)))
    return target


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (permuted, "the reference does not fit the student:\n  - their vocabularies differ in"),
        (fewer_positions, "together more than the 40 positions of the reference"),
    ],
)
def test_a_reference_that_does_not_fit_is_refused_before_loading(change, says, tmp_path):
    reference = configs.ReferenceConfig(path=str(change(DEMO / "teacher", tmp_path / "other")))
    settings = settings_of(loss="extrapolated_reverse_kl", reference=reference)
    with pytest.raises(ValueError, match=says), Display(0) as display:
        _setup.read_data(settings, make_mesh(devices=jax.devices()[:1]), display)


def test_a_cache_of_another_teacher_is_refused(monkeypatch):
    """Moved folders are told from other models by scoring again, which finds the same weights."""
    monkeypatch.chdir(DEMO)
    cache = SimpleNamespace(folder="cache", teacher="teacher")
    _setup._check_writer(settings_of(), cache)
    cache.teacher = ""  # written by no config
    _setup._check_writer(settings_of(), cache)
    cache.teacher = "base"
    with pytest.raises(ValueError, match=r"was written by the teacher base, but teacher\.path is .*teacher;"):
        _setup._check_writer(settings_of(), cache)
