"""Functions run in a process without Triton's interpreter, which the tests' own process has chosen.

One such process serves all tests of a pytest process, for to import PyTorch and Triton takes longer than most of
what is asked for. What a function changes there, it must put back.
"""

import atexit
import importlib
import json
import os
import subprocess
import sys
import traceback
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


@cache
def _server() -> subprocess.Popen[str]:
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command, pipe = [sys.executable, __file__], subprocess.PIPE
    server = subprocess.Popen(command, cwd=ROOT, env=env, stdin=pipe, stdout=pipe, text=True)
    atexit.register(server.communicate)  # it ends when there is nothing more to read
    return server


def call(module: str, function: str, *args: Any) -> Any:
    """``module.function(*args)``; arguments and result as JSON has them. A failure there is a failure here."""
    server = _server()
    try:
        print(json.dumps([module, function, args]), file=server.stdin, flush=True)
        answer = server.stdout.readline()
    except BrokenPipeError:
        answer = ""
    if not answer:  # it died: the next call gets another one
        _server.cache_clear()
        raise AssertionError(f"{module}.{function}: the process ended with {server.wait()}")
    result, error = json.loads(answer)
    assert error is None, error
    return result


def _serve() -> None:
    import torch

    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what else is printed
    for line in sys.stdin:
        module, function, args = json.loads(line)
        try:
            answer = [getattr(importlib.import_module(module), function)(*args), None]
        except Exception as error:
            answer = [None, "".join(traceback.format_exception(error))[-3000:]]
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
