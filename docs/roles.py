"""For the API reference: Sphinx's roles in docstrings, such as ``:class:`~fusedyolo.Targets```, as links."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, NameResolutionError, Object

ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):`(~?)([\w.]+)`")


class Roles(Extension):
    """Links to what the reference has a heading for, by the names that a docstring's scope knows; else plain code."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite the docstring of an object."""
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(lambda role: _link(obj, role), obj.docstring.value)


def _link(scope: Object, role: re.Match[str]) -> str:
    short, name = role.groups()
    try:
        path = scope.resolve(name)
    except NameResolutionError:
        path = name
    shown = name.rpartition(".")[2] if short else name
    return f'<autoref identifier="{path}" optional>`{shown}`</autoref>'
