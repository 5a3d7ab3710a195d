"""Results on disk by the content of what they are computed from, so that nothing is computed twice."""

import contextlib
import hashlib
import io
import os
import sqlite3
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from opd_jax.analysis._checkpoints import Checkpoint

VERSION = 1
"""Of what results mean: results of another version are not found."""

Results = dict[str, np.ndarray]


def default_folder() -> Path:
    """Where results are kept unless told: opd_jax/analysis under $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "opd_jax" / "analysis"


class Cache:
    """Arrays by key, and digests of tensors by file, in one SQLite file; for use by several threads.

    Every result is on disk when `store` returns. A file that is damaged is set aside, with a warning.

    Args:
        folder: made if missing.

    Raises:
        OSError: if the folder cannot be made or written.

    Example:
        >>> import tempfile, numpy as np
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cache = Cache(folder)
        ...     cache.store("key", {"x": np.arange(3)})
        ...     print(cache.load("key")["x"], cache.load("other"))
        ...     cache.close()
        [0 1 2] None
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "results.sqlite"
        self._lock = threading.Lock()
        try:
            self._database = _connect(self.path)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):  # no room, no right to write, locked
                raise OSError(f"{self.path} cannot be written: {error}") from error
            aside = self.path.with_suffix(f".damaged-{os.getpid()}")
            self.path.rename(aside)
            warnings.warn(f"{self.path} is damaged ({error}); it is now {aside.name}", stacklevel=2)
            self._database = _connect(self.path)

    def load(self, key: str) -> Results | None:
        """What was stored under the key; None if nothing was."""
        rows = self._query("SELECT value FROM results WHERE key = ?", (key,))
        if not rows:
            return None
        try:
            with np.load(io.BytesIO(rows[0][0]), allow_pickle=False) as stored:
                return dict(stored)
        except (ValueError, OSError, KeyError, EOFError, zlib_error()):
            return None  # damaged: compute it again

    def store(self, key: str, results: Results) -> None:
        """Keeps the results under the key."""
        buffer = io.BytesIO()
        np.savez(buffer, **results)
        self._query("INSERT OR REPLACE INTO results VALUES (?, ?)", (key, buffer.getvalue()))

    def digest(self, checkpoint: Checkpoint, name: str) -> str:
        """The digest of a tensor; read again only if its file has changed."""
        identity = checkpoint.identity(name)
        if identity is None:
            return checkpoint.digest(name)
        identity = hashlib.sha256(identity.encode()).hexdigest()
        rows = self._query("SELECT digest FROM digests WHERE identity = ?", (identity,))
        if rows:
            return rows[0][0]
        digest = checkpoint.digest(name)
        self._query("INSERT OR REPLACE INTO digests VALUES (?, ?)", (identity, digest))
        return digest

    def close(self) -> None:
        """Closes the file."""
        with self._lock:
            self._database.close()

    def _query(self, statement: str, values: tuple[Any, ...]) -> list[tuple]:
        try:
            with self._lock, self._database:
                return self._database.execute(statement, values).fetchall()
        except sqlite3.DatabaseError as error:
            raise OSError(f"{self.path}: {error}; free some room, or delete the file") from error


def zlib_error() -> type[Exception]:
    """What a damaged zip member raises."""
    import zipfile

    return zipfile.BadZipFile


def _connect(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=60, check_same_thread=False)
    with database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = NORMAL")
        database.execute("CREATE TABLE IF NOT EXISTS results (key TEXT PRIMARY KEY, value BLOB)")
        database.execute("CREATE TABLE IF NOT EXISTS digests (identity TEXT PRIMARY KEY, digest TEXT)")
    return database


@contextlib.contextmanager
def opened(cache: "Cache | str | Path | None") -> Iterator[Cache | None]:
    """The cache itself, or one opened for the time being."""
    if cache is None or isinstance(cache, Cache):
        yield cache
        return
    own = Cache(cache)
    try:
        yield own
    finally:
        own.close()


def key_of(*parts: Any) -> str:
    """The key of a result that depends on these."""
    return hashlib.sha256("|".join(map(str, (VERSION, *parts))).encode()).hexdigest()


def cached(cache: Cache | None, key: str | None, compute: Callable[[], Results]) -> Results:
    """What is stored under the key, or else computed and stored."""
    if cache is None or key is None:
        return compute()
    results = cache.load(key)
    if results is None:
        results = compute()
        cache.store(key, results)
    return results
