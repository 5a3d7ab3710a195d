"""Leading directions over checkpoints against numpy's SVD, PCA against its definition."""

import numpy as np
import pytest

from opd_jax import analysis
from opd_jax.analysis import _compute, _spectra

K = 5


def leading(dw, k=K):
    u, _, vt = np.linalg.svd(dw.astype(np.float64), full_matrices=False)
    return u[:, :k], vt[:k].T


@pytest.fixture(scope="module")
def followed(way):
    root, _ = way
    checkpoints = [(step, root / "run" / f"checkpoint-{step}") for step in (40, 10, 20)]
    return analysis.trajectory(root / "base", checkpoints, k=K, workers=2)


def test_directions_are_numpys(way, followed):
    _, tensors = way
    assert followed.steps == (10, 20, 40) and not followed.skipped
    assert len(followed.records) == sum(value.ndim == 2 for value in tensors[0].values())
    for record in followed.records:
        updates = [tensors[step][record.name] - tensors[0][record.name] for step in followed.steps]
        sides = [leading(dw) for dw in updates]
        norms = [np.linalg.norm(dw.astype(np.float64)) for dw in updates]
        np.testing.assert_allclose(record.norms, norms, rtol=1e-6)
        for side, mine, overlap in (
            (0, record.left, record.left_overlap),
            (1, record.right, record.right_overlap),
        ):
            last = sides[-1][side]
            for t in range(3):
                inner = sides[t][side].T @ last
                np.testing.assert_allclose(mine[t], np.abs(np.diag(inner)), atol=2e-6)
                np.testing.assert_allclose(overlap[t], np.sum(inner**2) / K, atol=2e-6)
        np.testing.assert_allclose(record.heat, np.abs(sides[0][0].T @ sides[-1][0]), atol=2e-6)


def test_the_way_of_the_first_direction_is_its_pca(way, followed):
    _, tensors = way
    for record in followed.records[:4]:
        updates = [tensors[step][record.name] - tensors[0][record.name] for step in followed.steps]
        first = np.stack([leading(dw)[0][:, 0] for dw in updates])
        first = first * np.sign(first @ first[-1])[:, None]
        np.testing.assert_allclose(record.cosines, first @ first.T, atol=1e-6)
        centred = first - first.mean(0)
        u, s, _ = np.linalg.svd(centred, full_matrices=False)
        expected = (u * s)[:, :2]
        points, explained = record.path()
        assert (points[-1] >= 0).all()
        np.testing.assert_allclose(points, expected * np.sign(expected[-1]), atol=3e-6)
        assert explained == pytest.approx(np.sum(s[:2] ** 2) / np.sum(s**2), abs=1e-6)


def test_means_and_lock_in(followed):
    blocks = [r for r in followed.records if r.kind in ("attention", "mlp")]
    np.testing.assert_allclose(followed.alignment(), np.mean([r.left for r in blocks], axis=0))
    np.testing.assert_allclose(followed.overlap("right"), np.mean([r.right_overlap for r in blocks], axis=0))
    squares = np.sum([r.norms**2 for r in followed.records], axis=0)
    np.testing.assert_allclose(followed.norms, np.sqrt(squares))
    means = followed.alignment()[:, :2].mean(1)
    assert means[0] < means[2] and means[1] < means[2]
    for threshold in (0.3, 0.6, 0.9, 0.99):
        stays = [step for i, step in enumerate(followed.steps) if (means[i:-1] >= threshold).all()]
        assert followed.lock_in(threshold, directions=2) == stays[0]
    with pytest.raises(ValueError, match="threshold"):
        followed.lock_in(1.5)


def test_a_direction_that_leaves_and_comes_back_is_not_locked_in():
    x, y = np.diag([1.0, 0, 0, 0]).astype(np.float32), np.diag([0, 0, 1.0, 0]).astype(np.float32)
    base = {"up": np.zeros((4, 4), np.float32)}
    found = analysis.trajectory(base, [(i, {"up": w}) for i, w in enumerate((x, y, x, y, x, 2 * x))], k=1)
    assert found.alignment()[:, 0].tolist() == [1, 0, 1, 0, 1, 1] and found.lock_in() == 4


def test_signs_say_nothing():
    x = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    base = {"up": np.zeros((7, 5), np.float32)}
    found = analysis.trajectory(base, [(i, {"up": w}) for i, w in enumerate((x, -x, 2 * x, -3 * x))], k=3)
    np.testing.assert_allclose(found.records[0].cosines, 1.0, atol=1e-6)
    np.testing.assert_allclose(found.records[0].left, 1.0, atol=1e-6)
    np.testing.assert_allclose(found.records[0].path()[0], 0.0, atol=1e-3)  # a root of rounding errors


def test_what_has_no_direction_is_nan(way):
    root, _ = way
    rank2 = (np.outer([1, 2, 3, 4], [1, 0, 0]) + np.outer([0, 0, 1, 0], [0, 5, 0])).astype(np.float32)
    zero = np.zeros_like(rank2)
    way_of_it = [(step, {"up": update}) for step, update in enumerate((zero, rank2, 2 * rank2))]
    found = analysis.trajectory({"up": zero}, way_of_it, k=9)
    (record,) = found.records
    assert record.left.shape == (3, 3)  # no more directions than columns
    assert np.isnan(record.left[0]).all() and np.isnan(record.left[1:, 2]).all()
    np.testing.assert_allclose(record.left[1:, :2], 1.0, atol=1e-6)
    points, explained = record.path()
    assert np.isnan(points[0]).all() and np.isnan(explained)  # the other two do not move
    np.testing.assert_allclose(points[1:], 0.0, atol=1e-6)
    assert found.lock_in() == 1
    same = analysis.trajectory(root / "base", [(1, root / "base"), (2, root / "base")])
    assert np.isnan(same.alignment()).all()


@pytest.mark.parametrize(
    ("steps", "match"),
    [((5,), "at least two"), ((), "at least two"), ((5, 5), "both are of step 5"), ((5, None), "an integer")],
)
def test_what_a_trajectory_needs(way, steps, match):
    root, _ = way
    with pytest.raises(ValueError, match=match):
        analysis.trajectory(root / "base", [(step, root / "run" / "checkpoint-10") for step in steps])


def test_tensors_that_are_not_finite_are_named(way):
    _, tensors = way
    name = "model.layers.0.mlp.up_proj.weight"
    base = {"up": tensors[0][name], "down": tensors[0][name]}
    bad = {**base, "down": base["down"] * np.inf}
    found = analysis.trajectory(base, [(1, base), (2, bad)])
    assert [r.name for r in found.records] == ["up"]
    assert found.skipped[0][0] == "down" and "step 2" in found.skipped[0][1]


def test_trajectories_are_cached_and_leave_the_spectra(way, tmp_path, followed, monkeypatch):
    root, _ = way
    checkpoints = [(step, root / "run" / f"checkpoint-{step}") for step in (10, 20, 40)]
    first = analysis.trajectory(root / "base", checkpoints, k=K, cache=tmp_path)
    plain = analysis.geometry(root / "base", checkpoints[1][1])
    monkeypatch.setattr(_compute, "_compute", None)
    found = analysis.geometry(root / "base", checkpoints[1][1], cache=tmp_path)
    for a, b in zip(plain.records, found.records, strict=True):
        assert a.effective_rank == pytest.approx(b.effective_rank, rel=1e-9)
    monkeypatch.setattr(_spectra, "gram", None)
    second = analysis.trajectory(root / "base", checkpoints, k=K, cache=tmp_path)
    for a, b, c in zip(followed.records, first.records, second.records, strict=True):
        np.testing.assert_array_equal(a.left, b.left)
        np.testing.assert_array_equal(b.left, c.left)


@pytest.mark.parametrize("gap", [True, False])
def test_leading_vectors_of_large_matrices(gap):
    rng = np.random.default_rng(0)
    r, k = 1040, 4
    q = np.linalg.qr(rng.normal(size=(r, 12)))[0]
    # Without a gap Lanczos finds one vector of an eigenspace; all are wanted.
    values = np.array([9, 8, 7, 6, 1, 1, 1, 1, 1, 1, 1, 1.0]) if gap else np.array([5.0] * 6 + [1] * 6)
    g = (q * values**2) @ q.T
    s = np.concatenate([values, np.zeros(r - 12)])
    v = _spectra.leading_vectors(g, s, k)
    np.testing.assert_allclose(v.T @ v, np.eye(k), atol=1e-10)
    np.testing.assert_allclose(g @ v, v * s[:k] ** 2, atol=1e-9)


def test_lanczos_counts_only_if_its_values_are_the_known_ones(monkeypatch):
    import scipy.sparse.linalg as sparse

    g = np.diag(np.arange(1040.0, 0, -1))
    wrong = np.arange(1039.0, 1035, -1), np.eye(1040)[:, 1:5]  # the largest is missing
    monkeypatch.setattr(sparse, "eigsh", lambda *_, **__: wrong)
    found = _spectra.leading_vectors(g, np.sqrt(np.diag(g)), 4)
    np.testing.assert_allclose(np.abs(found), np.eye(1040)[:, :4], atol=1e-9)


def test_tsne_of_what_does_not_move(followed):
    checkpoints = [(i, {"up": np.diag([1.0, 0.1 * i, 0, 0]).astype(np.float32)}) for i in range(8)]
    way = analysis.trajectory({"up": np.zeros((4, 4), np.float32)}, checkpoints)
    with pytest.raises(ValueError, match="at least 4"):
        followed.records[0].tsne()
    try:
        import sklearn  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match=r"opd_jax\[analysis\]"):
            way.records[0].tsne()
        return
    np.testing.assert_array_equal(way.records[0].tsne(), np.zeros((8, 2)))


def _of_directions(u):
    """A matrix whose leading directions are the rows of u, of length 1."""
    none = np.zeros((len(u), 1))
    return analysis.MatrixTrajectory(
        "up", 0, "up", "mlp", none[:, 0], none, none, none[:, 0], none[:, 0], np.zeros((1, 1)), u @ u.T
    )


def test_tsne_keeps_neighbours_together():
    """Two tight groups of directions, far from each other, stay apart; and undefined ones stay undefined."""
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(0)
    groups = np.eye(2, 40).repeat(8, 0) + 0.02 * rng.normal(size=(16, 40))
    u = groups / np.linalg.norm(groups, axis=1, keepdims=True)
    u[3] = np.nan
    way = _of_directions(u)
    flat = way.tsne()
    assert flat.shape == (16, 2)
    np.testing.assert_array_equal(np.isnan(flat[:, 0]), np.arange(16) == 3)
    kept, group = flat[np.arange(16) != 3], np.delete(np.arange(16) // 8, 3)
    distances = np.linalg.norm(kept[:, None] - kept[None], axis=-1)
    np.fill_diagonal(distances, np.inf)
    np.testing.assert_array_equal(group[distances.argmin(1)], group)  # everybody's nearest is of its group
    np.testing.assert_array_equal(flat, way.tsne())  # the seed decides


def test_tsne_needs_four_directions():
    with pytest.raises(ValueError, match="at least 4 checkpoints with a direction; there are 3"):
        _of_directions(np.eye(3, 5)).tsne()
    with pytest.raises(ValueError, match="there are 0"):
        _of_directions(np.full((5, 5), np.nan)).tsne()
