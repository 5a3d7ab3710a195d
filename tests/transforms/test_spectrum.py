"""spectrum against numpy's SVD in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.transforms import spectrum

M, N, K = 96, 160, 16
step = jax.jit(spectrum.subspace_step)
orthonormal = jax.jit(spectrum.cholesky_qr2)
estimate = jax.jit(spectrum.effective_rank_estimate, static_argnames=("probes", "steps"))


def with_spectrum(seed, values, m=M, n=N):
    rng = np.random.default_rng(seed)
    u = np.linalg.qr(rng.normal(size=(m, len(values))))[0]
    v = np.linalg.qr(rng.normal(size=(n, len(values))))[0]
    return (u * values) @ v.T


def svd(x):
    return np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)


def iterate(x, steps, k=K):
    x = jnp.asarray(x, jnp.float32)
    v = jnp.broadcast_to(spectrum.init_basis(x.shape[-1], k), (*x.shape[:-2], x.shape[-1], k))
    for _ in range(steps):
        found = step(x, v)
        v = found.right
    return found


def angle(u, v):
    """The largest between two spans, degrees, in float64."""
    u, v = (np.linalg.qr(np.asarray(a, np.float64))[0] for a in (u, v))
    sines = np.linalg.svd(u - v @ (v.T @ u), compute_uv=False)
    return np.degrees(np.arcsin(min(sines[0], 1.0)))


def assert_orthonormal(q, atol=2e-6):
    q = np.asarray(q, np.float64)
    gram = np.swapaxes(q, -1, -2) @ q
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(q.shape[-1]), gram.shape), atol=atol)


POWER = np.arange(1, M + 1.0) ** -1
GAP = np.concatenate([np.linspace(3, 2, 8), np.linspace(1.5, 0.1, M - 8)])


def test_orthonormal_columns():
    """Of columns that are anything: dependent, zero, of very different length."""
    rng = np.random.default_rng(0)
    u = np.linalg.qr(rng.normal(size=(M, K)))[0]
    w = np.linalg.qr(rng.normal(size=(K, K)))[0]
    cases = [
        rng.normal(size=(M, K)),
        u * np.logspace(0, -6, K) @ w,
        np.outer(u[:, 0], w[0]),
        np.zeros((M, K)),
        np.tile(u[:, :1], (1, K)),
        1e-30 * u,
        1e30 * u,
        u * np.logspace(0, -20, K),
        np.where(np.arange(K) % 2, u, 0),
    ]
    q = orthonormal(jnp.asarray(np.stack(cases), jnp.float32))
    assert_orthonormal(q)
    for i in (0, 5, 6):  # full rank: the span is kept
        assert angle(q[i], cases[i]) < 1e-3
    assert_orthonormal(spectrum.cholesky_qr2(jnp.ones((3, 3), jnp.bfloat16)))
    np.testing.assert_allclose(jnp.abs(spectrum.cholesky_qr2(jnp.full((1, 1), -2.0))), [[1.0]], rtol=1e-6)


def test_init_basis():
    basis = spectrum.init_basis(M, K, 3)
    assert_orthonormal(basis)
    np.testing.assert_array_equal(basis, spectrum.init_basis(M, K, 3))
    assert spectrum.subspace_overlap(basis, spectrum.init_basis(M, K, 4)) < 0.5


@pytest.mark.parametrize("values", [POWER, POWER**0.5, GAP])
def test_drifting_matrices(values):
    """One iteration for each of a sequence of matrices that change by 0.3% each."""
    rng, x = np.random.default_rng(1), with_spectrum(0, values)
    v = spectrum.init_basis(N, K)
    for _ in range(12):
        found = step(jnp.asarray(x, jnp.float32), v)
        v, exact = found.right, svd(x)
        noise = rng.normal(size=x.shape)
        x = x + 0.003 * np.linalg.norm(x) / np.linalg.norm(noise) * noise
    u, s, vt = exact
    assert_orthonormal(found.left)
    assert_orthonormal(found.right)
    np.testing.assert_allclose(found.singular_values[0], s[0], rtol=0.01)
    np.testing.assert_allclose(found.singular_values[:8], s[:8], rtol=0.02)
    assert np.all(np.asarray(found.singular_values) <= s[:K] * (1 + 1e-5))
    norm = np.linalg.norm(s)
    ratio = spectrum.spectral_ratio(found.singular_values[0], jnp.float32(norm))
    np.testing.assert_allclose(ratio, s[0] / norm, rtol=0.01)
    if s[7] / s[8] > 1.2:
        assert angle(found.left[:, :8], u[:, :8]) < 5
        assert angle(found.right[:, :8], vt[:8].T) < 5


@pytest.mark.slow
def test_converges_to_the_svd():
    """Stacked, wide and tall; vectors where gaps are wide."""
    values = 2.0 ** -np.arange(24.0)
    x = np.stack([with_spectrum(seed, values) for seed in range(3)])
    for y in (x, np.swapaxes(x, -1, -2)):
        found = iterate(y, 6)
        u, s, vt = svd(y)
        np.testing.assert_allclose(found.singular_values[:, :10], s[:, :10], rtol=1e-4)
        cosines = spectrum.column_alignment(found.left[..., :8], u[..., :8])
        np.testing.assert_allclose(cosines, 1, atol=1e-5)
        cosines = spectrum.column_alignment(found.right[..., :8], np.swapaxes(vt, -1, -2)[..., :8])
        np.testing.assert_allclose(cosines, 1, atol=1e-5)
    again = spectrum.subspace_iteration(jnp.asarray(x, jnp.float32), K, steps=6)
    np.testing.assert_allclose(again.singular_values[:, :10], svd(x)[1][:, :10], rtol=1e-4)


def test_special_matrices():
    """Zero, of low rank, of any scale, in bfloat16: one stack of each."""
    rng = np.random.default_rng(2)
    low = with_spectrum(0, np.array([3.0, 2.0, 1.0]))
    x = np.stack([np.zeros((M, N)), low, 1e-25 * low, 1e25 * low, rng.normal(size=(M, N))])
    found = iterate(x, 4)
    assert_orthonormal(found.left)
    assert_orthonormal(found.right)
    np.testing.assert_array_equal(found.singular_values[0], 0)
    for i, scale in ((1, 1.0), (2, 1e-25), (3, 1e25)):
        np.testing.assert_allclose(found.singular_values[i, :3], scale * np.array([3, 2, 1]), rtol=1e-5)
        assert np.all(found.singular_values[i, 3:] < 1e-5 * scale)
    values = np.asarray(found.singular_values)  # descending but for rounding errors
    assert np.all(np.diff(values) <= 1e-6 * values[:, :1])
    norms = np.asarray(spectrum.frobenius_norm(jnp.asarray(x, jnp.float32)))
    np.testing.assert_allclose(
        norms, np.sqrt(14) * np.array([0, 1, 1e-25, 1e25, norms[4] / 14**0.5]), rtol=1e-5
    )
    rounded = jnp.asarray(low, jnp.bfloat16)
    found = step(rounded, iterate(rounded, 2).right)
    assert found.left.dtype == found.singular_values.dtype == jnp.float32
    exact = svd(np.asarray(rounded.astype(jnp.float32)))[1]
    np.testing.assert_allclose(found.singular_values[:3], exact[:3], rtol=1e-4)


@pytest.mark.parametrize("shape", [(1, 40), (40, 1), (1, 1)])
def test_vectors(shape):
    x = np.random.default_rng(3).normal(size=shape)
    found = iterate(x, 1, k=1)
    np.testing.assert_allclose(found.singular_values, [np.linalg.norm(x)], rtol=1e-6)
    lifted = found.left * found.singular_values @ found.right.T
    np.testing.assert_allclose(lifted, x, atol=1e-5)
    np.testing.assert_allclose(spectrum.effective_rank(found.singular_values), 1, rtol=1e-6)


@pytest.mark.slow
def test_spectral_norm_without_a_gap():
    x = np.random.default_rng(4).normal(size=(M, N))
    np.testing.assert_allclose(spectrum.spectral_norm(jnp.asarray(x)), svd(x)[1][0], rtol=0.01)


def test_from_the_spectrum():
    """Formulas of paper.md, section 5, in numpy."""
    for s in (POWER, GAP, svd(np.random.default_rng(5).normal(size=(M, N)))[1]):
        p = s / s.sum()
        np.testing.assert_allclose(spectrum.effective_rank(s), np.exp(-(p * np.log(p)).sum()), rtol=1e-5)
        for fraction in (0.01, 0.1, 1.0):
            k = int(np.ceil(fraction * len(s)))
            exact = np.sqrt((s[:k] ** 2).sum() / (s**2).sum())
            np.testing.assert_allclose(spectrum.top_norm_ratio(s, fraction), exact, rtol=1e-5)
        norm = np.linalg.norm(s)
        np.testing.assert_allclose(spectrum.energy(s[:8], norm), (s[:8] ** 2).sum() / norm**2, rtol=1e-5)
    s = np.array([[2.0, 2.0, 0.0, 0.0], [0.0] * 4])
    np.testing.assert_allclose(spectrum.effective_rank(s), [2, 0], atol=1e-6)
    np.testing.assert_allclose(spectrum.top_norm_ratio(s, 0.5), [0.5**0.5, 0], atol=1e-6)  # 1 of rank 2
    np.testing.assert_allclose(spectrum.top_norm_ratio(s, 0.5, rank=4)[0], 1, atol=1e-6)
    np.testing.assert_allclose(spectrum.energy(s, np.array([8**0.5, 0.0])), [1, 0], atol=1e-6)
    assert spectrum.spectral_ratio(0.0, 0.0) == 0


def test_numerical_rank():
    x = np.stack([with_spectrum(i, np.ones(i)) if i else np.zeros((M, N)) for i in (0, 1, 7, M)])
    found = spectrum.numerical_rank(spectrum.singular_values(x), (M, N))
    np.testing.assert_array_equal(found, [np.linalg.matrix_rank(part.astype(np.float32)) for part in x])
    assert spectrum.numerical_rank(np.array([1.0, 0.1, 0.01]), (3, 3), tol=0.05) == 2


@pytest.mark.parametrize("theta", [1e-4, 0.3, 1.2, np.pi / 2])
def test_principal_angles(theta):
    """A plane turned in two other directions: by theta and by theta / 3."""
    u = np.eye(8)[:, :2]
    c, s = np.cos([theta, theta / 3]), np.sin([theta, theta / 3])
    v = np.concatenate([np.diag(c), np.diag(s), np.zeros((4, 2))])
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(2, 2)))[0]
    basis = np.linalg.qr(np.random.default_rng(1).normal(size=(8, 8)))[0]
    found = spectrum.principal_angles(basis @ u, basis @ v @ turn)
    np.testing.assert_allclose(found, [theta / 3, theta], rtol=2e-3 if theta < 1e-3 else 1e-4)
    overlap = spectrum.subspace_overlap(basis @ u, basis @ v @ turn)
    np.testing.assert_allclose(overlap, (c**2).mean(), atol=1e-6)
    found = spectrum.principal_angles(basis @ u, basis @ v[:, :1])
    np.testing.assert_allclose(found, [theta], rtol=2e-3 if theta < 1e-3 else 1e-4)
    np.testing.assert_allclose(spectrum.column_alignment(u, -v), c, atol=1e-6)


def test_factored():
    rng = np.random.default_rng(6)
    a, b = rng.normal(size=(2, 40, 4)), rng.normal(size=(2, 4, 30))
    found = spectrum.factored(a, b)
    np.testing.assert_allclose(found.singular_values, svd(a @ b)[1][:, :4], rtol=1e-5)
    lifted = (found.left * found.singular_values[:, None]) @ jnp.swapaxes(found.right, 1, 2)
    np.testing.assert_allclose(lifted, a @ b, atol=1e-4)
    assert np.all(spectrum.factored(0 * a, b).singular_values == 0)


@pytest.mark.slow
def test_estimated_effective_rank():
    """Within 5%, with and without directions that are known; one program for all."""
    rng, size = np.random.default_rng(7), 256
    spectra = [np.arange(1, size + 1.0) ** -power for power in (0.5, 1.0)]
    x = [with_spectrum(0, s, size, size) for s in spectra]
    x += [rng.normal(size=(size, size)), np.zeros((size, size)), x[0] * 1e-20]
    x = np.stack(x)
    exact = np.asarray(spectrum.effective_rank(svd(x)[1]))
    known = iterate(x, 4)
    np.testing.assert_allclose(estimate(x.astype(np.float32), known, probes=8, steps=16), exact, rtol=0.05)
    np.testing.assert_allclose(
        estimate(x.astype(np.float32), None, probes=8, steps=16)[2], exact[2], rtol=0.05
    )
    wide = np.concatenate([x[0], np.zeros((size, 64))], axis=1)
    found = estimate(wide.astype(np.float32), None, probes=16, steps=16)
    np.testing.assert_allclose(found, exact[0], rtol=0.05)
    small = with_spectrum(0, np.array([4.0, 2.0, 1.0, 0.5]), 4, 6)
    all_known = iterate(small, 3, k=4)
    found = spectrum.effective_rank_estimate(small.astype(np.float32), all_known)
    np.testing.assert_allclose(found, spectrum.effective_rank(svd(small)[1]), rtol=1e-3)


def test_bad_arguments():
    x = jnp.ones((4, 6))
    for call, message in (
        (lambda: spectrum.init_basis(4, 5), "k must be from 1 to 4, got 5"),
        (lambda: spectrum.init_basis(4, 0), "got 0"),
        (lambda: spectrum.cholesky_qr2(x), "6 columns of length 4"),
        (lambda: spectrum.subspace_iteration(x, 5), "from 1 to 4 for a matrix of 4 x 6, got 5"),
        (lambda: spectrum.subspace_iteration(x, 2, steps=0), "steps must be at least 1"),
        (lambda: spectrum.top_norm_ratio(x, 0.0), "fraction must be in"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
