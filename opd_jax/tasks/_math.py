"""math-verify in a process of its own, which a hard time limit can end.

Its own time-outs are signals: they work in the main thread only, take the signal away from whoever
else uses it, and cannot interrupt one huge multiplication (9^{9^{9^9}} is a short answer).
"""

import atexit
import contextlib
import importlib.util
import json
import select
import subprocess
import sys
import threading

_PARTS_S = 3  # math-verify's own limit for each of its three parts
_ANSWER_S = 4 * _PARTS_S
_START_S = 120
_MEMORY = 4 * 2**30


class _Worker:
    """Reads [reference, answer] pairs and writes verdicts, a JSON line each."""

    def __init__(self):
        self._process = subprocess.Popen(
            # -P: do not put this file's folder in front of the installed packages.
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the run to handle
        )
        if self._read(_START_S) != "ready":
            self.stop()
            raise RuntimeError("the math-verify process did not start; does math_verify import?")

    def equal(self, reference: str, answer: str) -> bool | None:
        """Whether the two are equal; None if the process died or took too long."""
        line = json.dumps([reference, answer]) + "\n"
        try:
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()
        except OSError:
            return None
        return self._read(_ANSWER_S)

    def _read(self, seconds: float):
        if not select.select([self._process.stdout], [], [], seconds)[0]:
            return None
        line = self._process.stdout.readline()
        return json.loads(line) if line else None

    def stop(self):
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()


_lock = threading.Lock()
_worker: _Worker | None = None


def equal(reference: str, answer: str) -> bool:
    """Whether `answer` states what `reference` does; False if that takes too long to find out.

    Raises:
        ImportError: if math-verify is not installed.
    """
    global _worker
    with _lock:
        if _worker is None:
            if importlib.util.find_spec("math_verify") is None:
                raise ImportError("the verifier `math` needs `pip install 'opd_jax[train]'`")
            _worker = _Worker()
        verdict = _worker.equal(reference, answer)
        if verdict is None:
            _stop()
        return bool(verdict)


@atexit.register
def _stop():
    global _worker
    if _worker is not None:
        _worker.stop()
        _worker = None


def _serve():
    import logging
    import os
    import resource

    with contextlib.suppress(ValueError, OSError):  # a lower limit is in force already
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    import math_verify

    logging.disable(logging.CRITICAL)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is not a verdict
    targets = [
        math_verify.LatexExtractionConfig(boxed_match_priority=0),
        math_verify.ExprExtractionConfig(),
    ]

    def parse(text):
        return math_verify.parse(text, targets, parsing_timeout=_PARTS_S)

    def verdict(reference, answer):
        if "$" not in reference and "\\boxed" not in reference:
            reference = f"\\boxed{{{reference}}}"  # plain LaTeX is found only within a delimiter
        return math_verify.verify(parse(reference), parse(answer), timeout_seconds=_PARTS_S)

    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        try:
            result = bool(verdict(*json.loads(line)))
        except BaseException:  # its TimeoutException is no Exception
            result = False
        print(json.dumps(result), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
