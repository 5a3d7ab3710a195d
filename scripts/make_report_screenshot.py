"""Makes docs/report.png: 16 steps of the demo, analysed beside the demo's teacher, opened in a Chromium.

    python scripts/make_report_screenshot.py

About two minutes on two CPU cores. Needs `pip install -e '.[dev]'` and a Chromium; CHROMIUM=PATH if it is
not on the PATH.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from opd_jax import analysis
from opd_jax.cli import main as opd_jax

ROOT = Path(__file__).parents[1]
SIZE = {"width": 1200, "height": 1180}
LIMIT = 300_000
STEPS = 16
RUN = f"--steps {STEPS} --checkpoint.every 2 --checkpoint.keep {STEPS} --evaluation.every 2".split()


def report(folder: Path) -> Path:
    """The report of a short run of the demo, and of its teacher."""
    opd_jax(["train", "configs/demo.yaml", *RUN, "--run_dir", str(folder / "opd")])
    runs = {"opd": [folder / "opd"], "rl (the teacher)": [Path("opd_jax/demo/teacher")]}
    steps = {"rl (the teacher)": [100]}  # of grpo, see scripts/make_demo_models.py
    result = analysis.analyze("opd_jax/demo/base", runs, steps=steps, cache=None)
    path = folder / "report.html"
    path.write_text(analysis.report(result), encoding="utf-8")
    return path


def shoot(path: Path, out: Path) -> None:
    """The first screen of a report as PNG."""
    browser = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = opened.new_page(viewport=SIZE, color_scheme="light")
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-drawn=all]", state="attached")
        page.screenshot(path=out)
        opened.close()


def main() -> None:
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        out = ROOT / "docs" / "report.png"
        out.parent.mkdir(exist_ok=True)
        shoot(report(Path(folder)), out)
    size = out.stat().st_size
    print(f"{out.relative_to(ROOT)}: {size} bytes")
    sys.exit(size > LIMIT)


if __name__ == "__main__":
    main()
