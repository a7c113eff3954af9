"""The processes that work for tuning and for the benchmark: Triton decides once whether it interprets kernels."""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, NamedTuple, TypeVar

import torch

from . import interpreter

Key = TypeVar("Key", bound=Hashable)


class Call(NamedTuple):
    """A function of a module's top level with its arguments, and whether it wants a process in which kernels are
    interpreted.
    """

    function: Callable[[], Any]
    interpreted: bool = False


class Failed(NamedTuple):
    """In place of a result: the traceback and the name of the error, or that the process died."""

    why: str
    error: str = ""


def run_all(calls: Mapping[Key, Call], jobs: int) -> Iterator[tuple[Key, Any]]:
    """The results of calls as they come, or their :class:`Failed`, ``jobs`` processes at a time.

    A process is a pool of its own, for one that dies takes its pool with it.
    """
    idle: dict[bool, list[ProcessPoolExecutor]] = {True: [], False: []}
    threads = max(1, (os.cpu_count() or 1) // jobs)

    def run(call: Call) -> Any:
        ready, settings = idle[call.interpreted], (call.interpreted, threads)
        process = ready.pop() if ready else ProcessPoolExecutor(1, get_context("spawn"), _begin, settings)
        try:
            result = process.submit(call.function).result()
        except BrokenProcessPool:
            return Failed("the process died")
        except Exception as error:  # whatever a call may raise
            result = Failed("".join(traceback.format_exception(error)), type(error).__name__)
        ready.append(process)
        return result

    pool = ThreadPoolExecutor(jobs)
    try:
        futures = {pool.submit(run, call): key for key, call in calls.items()}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:  # on Ctrl-C, too: what has not begun does not
        pool.shutdown(wait=False, cancel_futures=True)
        for process in idle[True] + idle[False]:
            process.shutdown()


def _begin(interpreted: bool, threads: int) -> None:
    for name in ("TRITON_INTERPRET", "FUSEDYOLO_DISABLE"):
        os.environ.pop(name, None)
    if interpreted:
        interpreter.prepare()
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    with open(os.devnull, "w") as nothing:  # for what other libraries print
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
