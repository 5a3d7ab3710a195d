"""What loading a checkpoint takes of the host's memory."""

import importlib.util
from pathlib import Path

import pytest

_SCRIPT = Path(__file__).parents[2] / "scripts" / "measure_loading.py"


@pytest.mark.slow
@pytest.mark.parametrize(("fsdp", "tensor"), [(8, 1), (2, 4)])
def test_loading_takes_little_more_than_the_model(tmp_path, fsdp, tensor):
    """On eight virtual devices, whose memory is the host's. Of two layers a stacked kernel is a fifth of
    the model, and its copy on the host an eighth of that: a whole one would be seen."""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    spec = importlib.util.spec_from_file_location("measure_loading", _SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    sizes = script.SIZES | dict(vocab_size=8192, num_hidden_layers=2, intermediate_size=4096)
    script.make_checkpoint(tmp_path / "model", sizes)
    found = script.measure(tmp_path / "model", fsdp, tensor)
    assert found["model"] > 120e6
    assert 0.95 < found["anonymous"] / found["model"] < 1.15, found  # the sampler has seen the model itself
