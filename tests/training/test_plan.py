"""Plans: of the demo on virtual devices, of a tiny run on a TPU slice, and what is refused."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import yaml
from flax import nnx

from opd_jax import cli, config, models, training
from opd_jax.config import MeshConfig
from opd_jax.parallel import CHIPS, make_mesh
from opd_jax.parallel._cost import Cost
from opd_jax.training import _plan, _plan_advice
from opd_jax.training._memory import shard_bytes
from opd_jax.training._plan_programs import _forward, programs, shapes

ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / "configs" / "demo.yaml")
ALIGN = ["--teacher.align", "true", "--loss", "sampled_reverse_kl", "--evaluation.teacher", "false"]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def demo():
    os.chdir(ROOT)
    said = []
    found = training.plan(config.load(DEMO), jax.devices()[:8], progress=said.append)
    return found, said


def test_the_demo_on_eight_devices(demo):
    found, said = demo
    assert [each.name for each in found.programs] == ["prefill", "decode", "score", "update"]
    assert len(said) == 4 and "compiling update for 8 x cpu" in said
    assert found.mesh == dict(data=1, fsdp=8, tensor=1) and found.prompt_width == 16
    assert found.chip is None and found.fits is None and found.bound is None
    for each in found.programs:
        assert each.peak == each.arguments + each.temporaries + each.outputs + each.others > 0
        assert each.collectives and each.intensity == each.flops / each.bytes


def test_flops_are_those_of_the_mathematics(demo):
    """All are counted, and little is done twice: the score pass is weights, attention and one-hot lookup."""
    score = next(each for each in demo[0].programs if each.name == "score")
    assert 0.95 < score.flops / score.useful < 1.6


def test_forward_flops_are_two_a_weight():
    sizes = models.load_config("configs/models/qwen3_8b")
    weights = 8.19e9 - 2 * 151936 * 4096  # the published number, less embedding and head
    assert _forward(sizes, 1, 1, logits=0) == pytest.approx(2 * weights, rel=0.001)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mesh.tensor", "3"], "8 devices cannot be divided by the 3.*nearest that works is .*tensor=2"),
        (["--mesh.fsdp", "2"], "needs 2 devices, but there are 8; fsdp=-1 takes what the others leave"),
        (["--batch_size", "12"], "12: so many rows do not spread evenly .* make it a multiple of 8"),
        (ALIGN, r"teacher\.align is not planned"),
        (["--teacher.mesh.fsdp", "4"], r"teacher\.mesh is not planned"),
    ],
)
def test_what_does_not_fit_together(words, message):
    with pytest.raises(ValueError, match=message):
        training.plan(config.load(DEMO, words), jax.devices()[:8])


def test_an_int8_teacher_is_planned(demo):
    """Its weights are arguments as they are stored; its states, and the student, are what they would be."""
    settings = config.load(DEMO, ["--teacher.dtype", "int8"])
    run = shapes(settings, make_mesh(devices=jax.devices()[:8]))
    score, update = list(programs(run))[2:]
    assert update.arguments[3][0].dtype == jnp.bfloat16
    ours, theirs = (
        sum(map(shard_bytes, jax.tree.leaves(nnx.state(each.teachers[0]))))
        for each in (run, shapes(config.load(DEMO), run.mesh))
    )
    assert 0.25 < ours / theirs < 0.35  # of float32; the scales are not split over fsdp
    compiled = score.lower(None).compile().memory_analysis().argument_size_in_bytes
    before = next(each for each in demo[0].programs if each.name == "score").arguments
    assert compiled == pytest.approx(before - theirs + ours, rel=0.01)


def test_an_axis_that_does_not_divide(tmp_path):
    sizes = json.loads(Path("configs/models/qwen3_1.7b/config.json").read_text()) | dict(
        num_attention_heads=6
    )
    sizes |= dict(num_key_value_heads=2)
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    odd = config.load(DEMO, ["--student.path", str(tmp_path), "--mesh.tensor", "4"])
    with pytest.raises(ValueError, match=r"mesh\.tensor is 4, .* the 6 attention heads .* that does is 3"):
        training.plan(odd, jax.devices()[:8])


def test_candidates_divide_everything():
    qwen = ["--student.path", "configs/models/qwen3_1.7b", "--teacher.path", "configs/models/qwen3_8b"]
    settings = config.load("configs/qwen3_1.7b_from_8b.yaml", qwen)
    found = list(_plan.candidates(settings, 64))
    assert {each.mesh.tensor for each in found} == {1, 2, 4, 8}
    assert {each.micro_batches for each in found if each.mesh.tensor == 1} == {1, 2, 4, 8, 16}
    assert MeshConfig(data=1, fsdp=16, tensor=4) in [each.mesh for each in found]


def eight_rows_at_once(words=()):
    """The demo's shapes on 8 devices, of whose 64 rows 8 are sampled at once, and its first programs."""
    settings = config.load(DEMO, ["--batch_size", "64", "--rollout_batch", "8", *words])
    run = shapes(settings, make_mesh(devices=jax.devices()[:8]))
    found = programs(run)
    return run, next(found), next(found)


def test_a_rollout_in_parts_runs_more_often():
    run, *rollout = eight_rows_at_once()
    whole = programs(dataclasses.replace(run, config=dataclasses.replace(run.config, rollout_batch=0)))
    for part, once in zip(rollout, whole, strict=False):
        assert (part.runs, once.runs) == (8, 1) and part.useful == once.useful  # of a step, both
        assert part.arguments[1].shape[0] == 8 and once.arguments[1].shape[0] == 64
        one = training.ProgramPlan(part.name, runs=part.runs)
        _plan._price(one, Cost(3.0, 5.0, {"all-gather": [2, 7.0]}), CHIPS[1])
        assert (one.flops, one.bytes, one.collectives) == (24.0, 40.0, {"all-gather": [16, 56.0]})
        assert one.seconds["links"] == 56.0 / CHIPS[1].links


def test_advice_samples_fewer_at_once():
    run, *_ = eight_rows_at_once(["--batch_size", "96", "--rollout_batch", "48"])
    cache = _plan_advice.cache_bytes(run)  # of 6 rows a device, of 12; there is room for 5 and half as much
    one = training.ProgramPlan("prefill", fits=False, limit=7.5 / 6 * cache, others=0)
    assert "sample fewer at once (rollout_batch 32 may fit)" in _plan_advice.advice(one, run)
    one.limit = cache / 6
    said = _plan_advice.advice(one, run)
    assert "more chips" in said and "rollout_batch" not in said


def test_advice_on_chunks_counts_tokens_of_a_device():
    run, *_ = eight_rows_at_once(["--loss_chunk", "16"])
    one = training.ProgramPlan("update", fits=True, bottleneck="memory")
    tokens = 64 // run.config.micro_batches // 8 * run.config.max_new_tokens
    assert f"each of the {-(-tokens // 16)} chunks" in _plan_advice.advice(one, run)


def test_search_ranks(monkeypatch):
    def fake(settings, devices, **_):
        bound = {1: 3.0, 2: 2.0}.get(settings.mesh.tensor, 1.0) + settings.micro_batches / 100
        one = training.ProgramPlan("update", fits=settings.mesh.tensor < 4, bound=bound)
        mesh = dataclasses.asdict(settings.mesh)
        return training.Plan(8, "x", None, mesh, 64, settings.micro_batches, 16, [one])

    monkeypatch.setattr(_plan, "plan", fake)
    demo = config.load(DEMO)
    demo = dataclasses.replace(
        demo, student=dataclasses.replace(demo.student, path="configs/models/qwen3_8b")
    )
    demo = dataclasses.replace(
        demo, teacher=dataclasses.replace(demo.teacher, path="configs/models/qwen3_8b")
    )
    found = _plan.search(demo, [None] * 8)
    assert (found[0].mesh["tensor"], found[0].micro_batches) == (2, 1)
    assert found[-1].fits is False


def test_what_xla_says_of_memory():
    text = "the total memory required for HLO temporaries (32.50G) exceeds available HBM (15.75G)"
    assert _plan._needed(text) == 32.5 * 2**30
    assert _plan._needed("Used 512.00M of 15.75G hbm") == 2**29


def test_the_command(capsys):
    assert cli.main(["plan", DEMO]) == 1
    assert "--topology v5e:4x4, or --devices N" in capsys.readouterr().err
    assert cli.main(["plan", DEMO, "--topology", "v5p-64"]) == 1
    assert "no topology 'v5p-64'" in capsys.readouterr().err
    assert cli.main(["plan", DEMO, "--devices", "9"]) == 1
    assert "--devices is 9, but there are 8" in capsys.readouterr().err


@pytest.mark.tpu
def test_a_plan_for_a_tpu_slice(tmp_path):
    """In its own process: libtpu reads the environment when it is loaded."""
    pytest.importorskip("libtpu")
    sizes = json.loads(Path("configs/models/qwen3_1.7b/config.json").read_text())
    sizes |= dict(vocab_size=1024, hidden_size=256, num_hidden_layers=2, intermediate_size=512)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2)
    for name in ("student", "teacher"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(sizes))
    config = dict(student={"path": str(tmp_path / "student")}, teacher={"path": str(tmp_path / "teacher")})
    config |= dict(data={"source": "arithmetic"}, batch_size=8, max_new_tokens=112, mesh={"tensor": 2})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "opd_jax.cli", "plan", str(tmp_path / "run.yaml")]
    command += ["--topology", "v5e:2x4", "--json", "--prompt-tokens", "16"]
    path = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    environment = os.environ | dict(JAX_PLATFORMS="cpu", PYTHONPATH=path)
    done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE)
    found = json.loads(done.stdout)
    assert found["kind"] == "TPU v5 lite" and found["fits"] is True and found["bound"] > 0
    assert [each["name"] for each in found["programs"]] == ["prefill", "decode", "score", "update"]
    for each in found["programs"]:
        assert each["unknown"] == [] and each["bottleneck"] in ("compute", "memory", "links")
    score = found["programs"][2]
    assert 1 < score["flops"] / score["useful"] < 1.6  # the kernel visits whole blocks
