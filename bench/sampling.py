"""Some programs of a launch that stand for all of it: which, what they say of the others, and doing without those."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import _disable_current_modes

import fusedyolo
from fusedyolo.drivers.protocol import Known
from fusedyolo.targets import Targets
from fusedyolo.tools.registry import Case, Workload


class Plan:
    """Which programs of a launch to run, and what they say of the others.

    ``kinds`` and ``effort`` have an entry for each program. Of each kind at least ``least`` are run, ``most`` in all if
    that allows, whose efforts are spread over those of all, and the one of the largest effort; between two of them what
    a program costs is interpolated by effort. The first and the last program of a launch always run, and stand for
    themselves, and so does the last of the ``adding`` ones, the first programs of a launch, all of them if None, whose
    sums the last one of them adds up: it is the last to run. What is left out is not computed, so later launches must
    not need it. Of programs that share a tile, so many ``together``, all are run or none.
    """

    def __init__(
        self,
        kinds: Sequence[Any],
        effort: Sequence[float],
        most: int,
        least: int,
        together: int = 1,
        adding: int | None = None,
    ):
        self.adding = len(kinds) if adding is None else adding
        self.effort = np.asarray(effort, float)
        first, tiles = self.effort[::together], len(kinds) // together
        members: dict[Any, list[int]] = {}
        alone = {0, tiles - 1, self.adding // together - 1}
        for tile in sorted(set(range(tiles)) - alone):
            members.setdefault(kinds[tile * together], []).append(tile)
        ordered = [np.array(m)[np.argsort(first[m], kind="stable")] for m in members.values()]
        chosen = set(alone)
        for each in ordered:
            few = min(len(each), max(least, round(most * len(each) / tiles)))
            chosen |= {int(each[int((i + 0.5) * len(each) / few)]) for i in range(few)}
            if first[each[0]] < first[each[-1]]:
                chosen.add(int(each[-1]))
        self.members = [each * together + part for each in ordered for part in range(together)]
        chosen_programs = [tile * together + part for tile in sorted(chosen) for part in range(together)]
        self.chosen = sorted(chosen_programs, key=lambda program: program == self.adding - 1)

    def estimate(self, executed: Mapping[int, int]) -> np.ndarray:
        """What every program costs, from what those do that ran."""
        found = np.zeros(len(self.effort))
        for each in self.members:
            ran = [p for p in each.tolist() if p in executed]
            efforts, group = np.unique(self.effort[ran], return_inverse=True)
            means = np.bincount(group, [executed[p] for p in ran]) / np.bincount(group)
            found[each] = np.interp(self.effort[each], efforts, means)
        found[list(executed)] = list(executed.values())
        return found


class Sample:
    """The programs of the launches of a step that are run, see :class:`Plan`."""

    def __init__(self, case: Case, work: Workload, targets: Any, most: int, least: int):
        work = replace(work, layout="")
        preds = [pred.detach() for pred in case.predictions(work)]
        rows = targets.rows if isinstance(targets, Targets) else targets

        def assign() -> Any:
            criterion = case.build(work.classes, "torch")
            return fusedyolo.assign(criterion, case.pack(preds, work), targets, **case.geometry(work))

        each = torch.bincount(rows[:, 0].long(), minlength=work.batch).tolist()
        self.driver, self.most, self.least = case.driver, most, least
        self.known = Known(case.head(work.classes), preds, each, assign)

    def plan(self, kernel: str, programs: int, arguments: Mapping[str, Any]) -> Plan:
        """Of a launch."""
        kinds = self.driver.kinds(kernel, programs, arguments)
        with _disable_current_modes():  # not to be counted
            efforts = self.driver.efforts(kernel, kinds, arguments, self.known)
            together, adding = self.driver.together(kernel, arguments), self.driver.adding(kernel, arguments)
            return Plan(*efforts, self.most, self.least, together, adding)

    @contextmanager
    def completed(self) -> Iterator[None]:
        """After a launch of which a part was run, what the rest would have left for later launches is put there."""
        from fusedyolo.ops.launch import Launch

        run = Launch.run

        def run_and_complete(launch: Launch) -> None:
            run(launch)
            with _disable_current_modes():
                self.driver.complete(launch.kernel.__name__, launch.arguments, self.known)

        with mock.patch.object(Launch, "run", run_and_complete):
            yield


def pretend_others_finished(run: int, adding: int) -> None:
    """Before the last of the ``adding`` programs, of which ``run`` others ran: those left out never added to the
    counter of finished programs, where there is one."""
    from fusedyolo.ops.launch import done_counter

    done = done_counter(torch.device("cpu"))
    if int(done[0]) == run:
        done[0] = adding - 1
