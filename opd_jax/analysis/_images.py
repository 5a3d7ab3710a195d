"""The report and its figures on disk."""

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path

from opd_jax.analysis._figure import Figure, plain
from opd_jax.analysis._figures import figures
from opd_jax.analysis._pool import Progress
from opd_jax.analysis._report import page
from opd_jax.analysis._result import Result

FORMATS = ("png", "svg")
_INSTALL = "install Chromium or Chrome (Debian: apt install chromium) and run the same command again"


def write_report(
    result: Result, folder: str | Path, *, progress: Progress | None = None
) -> tuple[Path, tuple[str, ...]]:
    """Writes report.html into a folder, made if missing, and every figure as figures/NAME.png and .svg.

    Images need kaleido and a Chromium or Chrome; without, the report is written all the same.

    Args:
        result: of `analyze`, or read back from result.json.
        folder: the one that `Result.write` wrote into.
        progress: see `geometry`.

    Returns:
        The path of the report, and notes: what was not written, why, and what to install.

    Raises:
        ImportError: without plotly.
    """
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    drawn = figures(result)
    path = folder / "report.html"
    _write(path, page(result, drawn).encode())
    return path, write_images(drawn, folder / "figures", progress=progress)


def write_images(
    drawn: Sequence[Figure], folder: Path, *, progress: Progress | None = None
) -> tuple[str, ...]:
    """Writes each figure, of variants the first, as PNG and SVG.

    Returns:
        Notes: empty, or why there are no images.
    """
    from opd_jax._extras import require

    try:
        kaleido = require("kaleido", "analysis")
    except ImportError as error:
        return (f"no images of the figures: {error}",)
    folder.mkdir(parents=True, exist_ok=True)

    async def write() -> None:
        # No MathJax: it would come from the network.
        async with kaleido.Kaleido(mathjax=False) as browser:
            for i, (figure, kind) in enumerate((f, kind) for f in drawn for kind in FORMATS):
                options = {"format": kind, "width": 900, "height": 520, "scale": 2 if kind == "png" else 1}
                _write(folder / f"{figure.name}.{kind}", await browser.calc_fig(titled(figure), opts=options))
                if progress:
                    progress("images", i + 1, len(FORMATS) * len(drawn))

    errors: list[Exception] = []

    def run() -> None:  # a thread: in a notebook this one has a loop already
        try:
            asyncio.run(write())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if not errors:
        return ()
    if isinstance(errors[0], OSError):
        raise errors[0]
    if isinstance(errors[0], kaleido.errors.ChromeNotFoundError):
        return (f"no images of the figures: no browser was found; {_INSTALL}",)
    reason = str(errors[0]).strip().splitlines()[:1] or [type(errors[0]).__name__]
    return (f"no images of the figures: the browser failed ({reason[0][:200]}); {_INSTALL}",)


def titled(figure: Figure):
    """The plotly figure with its title, and what of its variants is drawn."""
    title = plain(figure.title)
    if figure.variants:
        title += f"<br><span style='font-size:.75em'>{plain(figure.variants[0][0])}</span>"
    drawn = figure.plotly()
    drawn.update_layout(
        title={"text": title, "x": 0.02, "y": 0.95, "yanchor": "top"}, margin={"t": 100, "b": 64}
    )
    return drawn


def _write(path: Path, content: bytes) -> None:
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    part.replace(path)
