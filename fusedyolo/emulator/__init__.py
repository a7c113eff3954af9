"""Triton kernels executed as they were compiled, without a GPU: the PTX of every launch, interpreted in numpy.

``with Device(90, seed=0) as device:`` compiles each launch on CPU tensors for sm_90 and runs its threads, warps and
programs in an order drawn from the seed. Every access is checked: bounds, alignment, written before read, and races, by
happens-before. ``device.check()`` raises what was found.

``compile`` makes PTX of a launch, ``ptx`` reads it, ``translate`` and ``operands`` write it again as functions of numpy
whose arithmetic is in ``arithmetic`` and ``warp``; ``engine`` runs them on ``memory``, ``order`` knows what happened
before what, ``report`` holds what was found, and ``compare`` runs a computation on all that against float64. How long
instructions wait for one another is modelled in ``chains``, where that is asked for.

Not modelled: weak memory order itself (values are those of some interleaving; order is checked by happens-before
instead), caches, what ptxas does with the PTX (but see ``contract``), time, occupancy, forward progress, two kernels at
once. A thread's own accesses in the same interval as its releasing atomic count as unordered for whoever acquires. Of a
byte the last writer, and the last two readers by thread and by program, are remembered. Textures, tensor cores,
asynchronous copies, ``.local`` memory, calls and parts of a warp in a shuffle raise :class:`Fault`. float32 ``fma``
rounds twice in rare ties, float64 through 80 bits.
"""

from .device import Device
from .engine import run
from .memory import Buffer, Pointer
from .ptx import Program
from .report import Fault, Report

__all__ = ["Buffer", "Device", "Fault", "Pointer", "Program", "Report", "run"]
