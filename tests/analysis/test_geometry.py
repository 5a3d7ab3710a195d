"""Measures against plain numpy; the cache; what cannot be compared."""

import threading

import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import analysis
from opd_jax.analysis import _checkpoints, _compute, _geometry, _pool, _spectra
from opd_jax.transforms import spectrum
from tests.analysis.folders import random_tensors, write_folder

RTOL = 1e-5


def with_values(rng, m, n, values):
    r = min(m, n)
    u, v = (np.linalg.qr(rng.normal(size=(size, r)))[0] for size in (m, n))
    return ((u * values) @ v.T).astype(np.float32)


def structured(kind, m, n, seed=0):
    rng, r = np.random.default_rng(seed), min(m, n)
    i = np.arange(1, r + 1)
    if kind == "gaussian":
        return rng.normal(size=(m, n)).astype(np.float32)
    if kind == "rank 3":  # exactly: products and sums of small integers
        return (rng.integers(-3, 4, (m, 3)) @ rng.integers(-3, 4, (3, n))).astype(np.float32)
    if kind == "rank 3, rounded":
        return (rng.normal(size=(m, 3)) @ rng.normal(size=(3, n))).astype(np.float32)
    if kind == "few rows":
        return rng.normal(size=(m, n)).astype(np.float32) * (np.arange(m) < r // 3)[:, None]
    if kind == "tiny":
        return (1e-30 * rng.normal(size=(m, n))).astype(np.float32)
    if kind == "orthogonal":
        return with_values(rng, m, n, np.ones(r))
    if kind == "decay":
        return with_values(rng, m, n, np.exp(-i * 16 / r))
    floor = {"power law": 1e-3, "floor 1e-5": 1e-5, "floor 1e-7": 1e-7, "no floor": 0.0}
    return with_values(rng, m, n, np.where(i < 9, 1 / i, floor[kind]))


KINDS = (
    "gaussian",
    "rank 3",
    "rank 3, rounded",
    "few rows",
    "tiny",
    "orthogonal",
    "power law",
    "floor 1e-5",
    "floor 1e-7",
    "no floor",
    "decay",
)


def reference(dw, w):
    """By the definitions, from an SVD with vectors in float64."""
    x = dw.astype(np.float64)
    s = np.linalg.svd(x, full_matrices=False)[1]
    p = s / s.sum()
    rank = np.linalg.matrix_rank(x, tol=max(x.shape) * np.finfo(np.float32).eps * s[0])
    shares = np.cumsum(s**2) / np.sum(s**2)

    def leading(fraction):
        return shares[int(np.ceil(round(fraction * rank, 9))) - 1]

    return {
        "frobenius": np.linalg.norm(x),
        "relative": np.linalg.norm(x) / np.linalg.norm(w.astype(np.float64)),
        "spectral": np.linalg.norm(x, 2),
        "ratio": np.linalg.norm(x, 2) / np.linalg.norm(x),
        "effective_rank": np.exp(-np.sum(p[p > 0] * np.log(p[p > 0]))),
        "top1_ratio": np.sqrt(leading(0.01)),
        "numerical_rank": rank,
        "energy": [leading(fraction) for fraction in analysis.FRACTIONS],
        "top_ratio": np.sqrt(leading(0.07)),
    }


@pytest.mark.parametrize("block", [500, 1 << 21])
@pytest.mark.parametrize("small", [0, 1 << 17])
@pytest.mark.parametrize("shape", [(150, 60), (60, 150), (80, 80), (2, 9)])
def test_every_measure_is_numpys(monkeypatch, shape, small, block):
    monkeypatch.setattr(_checkpoints, "BLOCK", block)
    monkeypatch.setattr(_spectra, "_BLOCK", block)
    monkeypatch.setattr(_compute, "_SMALL", small)
    kinds = [kind for kind in KINDS if min(shape) > 20 or kind not in ("floor 1e-7", "no floor", "few rows")]
    rng = np.random.default_rng(9)
    base = {kind: np.zeros(shape, np.float32) for kind in kinds}
    updates = {kind: structured(kind, *shape) for kind in kinds}
    base["gaussian"] = rng.normal(size=shape).astype(np.float32)
    tuned = {kind: base[kind] + updates[kind] for kind in kinds}
    found = {record.name: record for record in analysis.geometry(base, tuned, workers=2).records}
    for kind in kinds:
        expected = reference(tuned[kind] - base[kind], np.ones(1) if kind != "gaussian" else base[kind])
        for measure, value in expected.items():
            mine = found[kind].top_ratio(0.07) if measure == "top_ratio" else getattr(found[kind], measure)
            if measure == "relative" and kind != "gaussian":
                assert np.isnan(mine)
                continue
            np.testing.assert_allclose(mine, value, rtol=RTOL, err_msg=f"{measure} of {kind}")


@pytest.mark.parametrize("shape", [(150, 60), (60, 150)])
def test_all_singular_values_of_stacks(shape):
    stack = np.stack([structured(kind, *shape) for kind in KINDS])
    found = analysis.singular_values(stack)
    for kind, x, values in zip(KINDS, stack, found, strict=True):
        exact = np.linalg.svd(x.astype(np.float64), compute_uv=False)
        np.testing.assert_allclose(values, exact, rtol=0, atol=2e-8 * exact[0], err_msg=kind)
        large = exact > 1e-3 * exact[0]
        np.testing.assert_allclose(values[large], exact[large], rtol=1e-8, err_msg=kind)


def test_doubtful_spectra_are_found_and_no_others():
    gram = {}
    for kind in KINDS:
        x = structured(kind, 300, 120).astype(np.float64)
        exact = np.linalg.svd(x, compute_uv=False)
        rough = np.sqrt(np.maximum(np.linalg.eigvalsh(x.T @ x), 0))[::-1]
        error = abs(_spectra.effective_rank(rough) / _spectra.effective_rank(exact) - 1)
        gram[kind] = bool(_spectra._doubtful(rough[None])[0])
        assert gram[kind] or error < 1e-6, kind
    deficient = {"rank 3", "rank 3, rounded", "few rows", "floor 1e-7", "no floor"}
    assert {kind for kind in KINDS if gram[kind]} == deficient


def test_the_measures_are_those_of_the_transforms():
    for kind in ("gaussian", "power law", "rank 3, rounded"):
        x = structured(kind, 60, 40)
        mine = analysis.geometry({"w": np.zeros_like(x)}, {"w": x}).records[0]
        s = jnp.asarray(mine.singular_values)
        assert float(spectrum.effective_rank(s)) == pytest.approx(mine.effective_rank, rel=RTOL)
        assert float(spectrum.frobenius_norm(x)) == pytest.approx(mine.frobenius, rel=RTOL)
        assert int(spectrum.numerical_rank(s, x.shape)) == mine.numerical_rank
        top = spectrum.top_norm_ratio(s, 0.07, rank=jnp.asarray(mine.numerical_rank))
        assert float(top) == pytest.approx(mine.top_ratio(0.07), rel=RTOL)
        leading = s[: int(np.ceil(0.1 * mine.numerical_rank))]
        share = spectrum.energy(leading, mine.frobenius)
        assert float(share) == pytest.approx(mine.energy[analysis.FRACTIONS.index(0.1)], rel=RTOL)


def test_means_over_modules_and_layers(way):
    root, tensors = way
    found = analysis.geometry(root / "base", root / "run" / "checkpoint-40")
    assert found.step == 40 and not found.unchanged and not found.skipped
    norms = {n: np.linalg.norm((tensors[40][n] - tensors[0][n]).astype(np.float64)) for n in tensors[0]}
    blocks = [n for n in norms if "proj" in n]
    assert found.mean()["matrices"] == len(blocks) == 8
    assert found.mean()["frobenius"] == pytest.approx(np.mean([norms[n] for n in blocks]), rel=RTOL)
    q = [norms[n] for n in blocks if "q_proj" in n]
    assert found.by_module()["q"]["frobenius"] == pytest.approx(np.mean(q), rel=RTOL)
    first = [norms[n] for n in blocks if ".0.mlp" in n]
    assert found.by_layer(("mlp",))[0]["norm"] == pytest.approx(np.linalg.norm(first), rel=RTOL)
    matrices = [v for n, v in norms.items() if tensors[0][n].ndim == 2]
    assert found.norm == pytest.approx(np.linalg.norm(matrices), rel=RTOL)


def test_what_cannot_be_compared_is_named(tmp_path, way):
    root, tensors = way
    changed = dict(tensors[40])
    up, down = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"
    changed[up] = changed[up].copy()
    changed[up][3, 4] = np.nan
    changed[down] = changed[down].copy()
    changed[down][0, 0] = -np.inf
    changed["model.embed_tokens.weight"] = np.ones((33, 16), np.float32)
    changed["lm_head.weight"] = tensors[0]["lm_head.weight"]
    changed["extra.weight"] = np.ones((3, 3), np.float32)
    del changed["model.layers.1.self_attn.k_proj.weight"]
    found = analysis.geometry(root / "base", write_folder(tmp_path / "a", changed), cache=tmp_path / "cache")
    why = dict(found.skipped)
    assert set(why) == {
        up,
        down,
        "model.embed_tokens.weight",
        "extra.weight",
        "model.layers.1.self_attn.k_proj.weight",
    }
    assert "NaN" in why[up] and str(tmp_path / "a") in why[down]
    assert why["model.embed_tokens.weight"] == "32 x 16 in the base, 33 x 16 here"
    assert found.unchanged == ("lm_head.weight",) and len(found.records) == 6
    assert "5 skipped" in found.summary() and up not in {r.name for r in found.records}
    nothing = analysis.geometry(root / "base", root / "base")
    assert "all of them equal" in nothing.summary() and nothing.norm == 0
    assert nothing.records[0].effective_rank == nothing.records[0].ratio == nothing.records[0].relative == 0
    assert nothing.mean()["matrices"] == 0
    bad = dict.fromkeys(tensors[0], np.full((4, 4), np.nan, np.float32))
    with pytest.raises(ValueError, match=r"no matrix of .* can be compared: .*NaN"):
        analysis.geometry(*[write_folder(tmp_path / n, bad) for n in "bc"])


def test_different_architectures(tmp_path, way):
    root, _ = way
    other = {name.replace("model.layers", "gpt_neox.layers"): v for name, v in random_tensors(0).items()}
    folder = write_folder(tmp_path, other, architectures=["GPTNeoXForCausalLM"])
    with pytest.raises(ValueError, match=r"LlamaForCausalLM.*GPTNeoXForCausalLM.*different architectures"):
        analysis.geometry(root / "base", folder)


def count_computations(monkeypatch):
    lock, counted = threading.Lock(), []

    def spy(function):
        def run(*arguments):
            with lock:
                counted.append(function.__name__)
            return function(*arguments)

        return run

    monkeypatch.setattr(_compute, "_compute", spy(_compute._compute))
    monkeypatch.setattr(_checkpoints, "hash_of", spy(_checkpoints.hash_of))
    monkeypatch.setattr("opd_jax.analysis._sources.hash_of", spy(_checkpoints.hash_of))
    return counted


def test_a_second_call_reads_and_computes_nothing(tmp_path, way, monkeypatch):
    root, _ = way
    plain = analysis.geometry(root / "base", root / "run" / "checkpoint-20")
    first = analysis.geometry(root / "base", root / "run" / "checkpoint-20", cache=tmp_path)
    counted = count_computations(monkeypatch)
    monkeypatch.setattr("opd_jax.analysis._sources._raw", None)  # no file is read
    second = analysis.geometry(root / "base", root / "run" / "checkpoint-20", cache=tmp_path)
    assert not counted and first == second
    for a, b, c in zip(plain.records, first.records, second.records, strict=True):
        assert a == b
        np.testing.assert_array_equal(b.singular_values, c.singular_values)


def test_an_interrupted_call_goes_on(tmp_path, way, monkeypatch):
    root, _ = way
    monkeypatch.setattr(_compute, "_SMALL", 0)  # one matrix a job
    compute, done = _compute._compute, []

    def failing(*arguments):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(arguments[2])
        return compute(*arguments)

    arguments = (root / "base", root / "run" / "checkpoint-20")
    monkeypatch.setattr(_compute, "_compute", failing)
    with pytest.raises(KeyboardInterrupt):
        analysis.geometry(*arguments, cache=tmp_path, workers=1)
    monkeypatch.setattr(_compute, "_compute", compute)
    counted = count_computations(monkeypatch)
    found = analysis.geometry(*arguments, cache=tmp_path)
    assert counted.count("_compute") == len(found.records) - 4


def test_equal_content_is_computed_once(tmp_path, monkeypatch):
    layer, update = np.random.default_rng(0).normal(size=(2, 6, 5)).astype(np.float32)
    base = {"layers": {str(i): {"up": layer} for i in range(5)}}
    tuned = {"layers": {str(i): {"up": layer + update} for i in range(5)}}
    monkeypatch.setattr(_compute, "_SMALL", 0)
    counted = count_computations(monkeypatch)
    found = analysis.geometry(base, tuned, cache=tmp_path)
    assert counted.count("_compute") == 1
    assert {record.layer for record in found.records} == set(range(5))
    assert {record.spectral for record in found.records} == {found.records[0].spectral}
    assert analysis.geometry(base, base, cache=tmp_path).norm == 0
    assert counted.count("_compute") == 1  # equal digests say enough


def test_a_changed_file_is_read_again(tmp_path, way):
    root, tensors = way
    folder = write_folder(tmp_path / "a", tensors[20])
    first = analysis.geometry(root / "base", folder, cache=tmp_path / "cache")
    write_folder(folder, tensors[40])
    second = analysis.geometry(root / "base", folder, cache=tmp_path / "cache")
    assert second.norm > 2 * first.norm


def test_a_damaged_cache_is_set_aside(tmp_path, way):
    root, _ = way
    (tmp_path / "results.sqlite").write_bytes(b"x" * 5000)
    with pytest.warns(UserWarning, match="damaged"):
        analysis.geometry(root / "base", root / "run" / "checkpoint-20", cache=tmp_path)
    store = analysis.Cache(tmp_path)
    store._query("UPDATE results SET value = ?", (b"PK rubbish",))
    store.close()
    found = analysis.geometry(root / "base", root / "run" / "checkpoint-20", cache=tmp_path)
    assert found == analysis.geometry(root / "base", root / "run" / "checkpoint-20")


def test_jobs_keep_within_the_budget():
    lock, inside, most, order = threading.Lock(), [0], [0], []

    def job(size):
        def run():
            with lock:
                inside[0] += size
                most[0] = max(most[0], inside[0])
                order.append(size)
            threading.Event().wait(0.01)
            with lock:
                inside[0] -= size
            return size

        return _pool.Job(run, size, float(size))

    sizes = [1, 4, 2, 9, 3, 3, 1, 2]
    reports = []
    found = _pool.run_jobs(
        [job(s) for s in sizes], "x", budget=6, workers=4, progress=lambda *report: reports.append(report)
    )
    assert found == sizes
    assert most[0] == 9 and order[0] == 9  # what is over the budget runs alone
    assert reports[0] == ("x", 0.0, 25.0) and reports[-1] == ("x", 25.0, 25.0)


def test_blas_threads_are_one_inside_and_as_before_after():
    library = _pool._openblas()
    if library is None:
        pytest.skip("numpy's BLAS is not OpenBLAS")
    get, set_ = library
    before = get()
    set_(2)
    try:
        with _pool.one_blas_thread():
            with _pool.one_blas_thread():
                assert get() == 1
            assert get() == 1
        assert get() == 2
    finally:
        set_(before)


def test_progress_in_lines(capsys):
    with analysis.Bar(interval=0.0) as bar:
        bar._began["work"] = -100.0  # long ago
        for done in (0.0, 1.0, 4.0):
            bar("work", done, 4.0)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "25%" in lines[0] and "100%, 0:00 left" in lines[1]


def test_lists_give_lists_and_steps(way):
    root, _ = way
    found = analysis.geometry(root / "base", [root / "run" / f"checkpoint-{s}" for s in (10, 20)])
    assert [g.step for g in found] == [10, 20] and found[0].norm < found[1].norm
    kept = _geometry.record("up", (9, 5), 2.0, 1.0, np.array([2.0, 1.0]))
    with pytest.raises(ValueError, match="only 2 singular values"):
        kept.top_ratio(0.5)
