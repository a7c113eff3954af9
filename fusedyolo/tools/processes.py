"""The processes that work for tuning and for the benchmark: Triton decides once whether it interprets kernels."""

from __future__ import annotations

import os
import tempfile
import traceback
import warnings
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from . import interpreter

Key = TypeVar("Key", bound=Hashable)


class Call(NamedTuple):
    """A function of a module's top level with its arguments, and the process it wants: one in which kernels are
    interpreted; one of its own, in which nothing was ever compiled.
    """

    function: Callable[[], Any]
    interpreted: bool = False
    alone: bool = False


class Failed(NamedTuple):
    """In place of a result: the traceback and the name of the error, or what a process that died had to say."""

    why: str
    error: str = ""


def run_all(
    calls: Mapping[Key, Call], jobs: int, done: Callable[[Key, Any], None] = lambda key, result: None
) -> dict[Key, Any]:
    """The results of calls in ``jobs`` processes at a time, or their :class:`Failed`; ``done`` is told of each."""
    idle: dict[bool, list[Worker]] = {True: [], False: []}
    threads = max(1, (os.cpu_count() or 1) // jobs)

    def run(call: Call) -> Any:
        ready = [] if call.alone else idle[call.interpreted]
        worker = ready.pop() if ready else Worker(call.interpreted, call.alone, threads)
        result = worker.run(call.function)
        if call.alone:
            worker.close()
        else:
            ready.append(worker)
        return result

    results: dict[Key, Any] = {}
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(run, call): key for key, call in calls.items()}
        for future in as_completed(futures):
            results[futures[future]] = future.result()
            done(futures[future], future.result())
    for worker in idle[True] + idle[False]:
        worker.close()
    return {key: results[key] for key in calls}


class Worker:
    """A process that does one call after another, and another process where one of them kills it."""

    def __init__(self, interpreted: bool = False, cold: bool = False, threads: int = 1):
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.settings = interpreted, cold, threads, self.folder.name
        self.process = self._start()

    def _start(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, get_context("spawn"), _begin, self.settings)

    def run(self, function: Callable[[], Any]) -> Any:
        """Its result, or :class:`Failed`."""
        try:
            return self.process.submit(function).result()
        except BrokenProcessPool:
            self.process = self._start()
            return Failed(Path(self.folder.name, "errors").read_text().strip() or "the process died")
        except Exception as error:  # whatever a call may raise
            return Failed("".join(traceback.format_exception(error)), type(error).__name__)

    def close(self) -> None:
        """End the process."""
        self.process.shutdown()
        self.folder.cleanup()


def _begin(interpreted: bool, cold: bool, threads: int, folder: str) -> None:
    for name in ("TRITON_INTERPRET", "FUSEDYOLO_DISABLE"):
        os.environ.pop(name, None)
    if interpreted:
        interpreter.prepare()
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR") * cold:
        os.environ[name] = os.path.join(folder, name)
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    with open(os.devnull, "w") as nothing, open(os.path.join(folder, "errors"), "w") as errors:
        os.dup2(nothing.fileno(), 1)  # what other libraries print
        os.dup2(errors.fileno(), 2)
