"""``python -m fusedyolo`` and the command ``fusedyolo``: ``env``, ``check``, ``tune``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit status."""
    from .tools import check, env, tune

    parser = argparse.ArgumentParser("fusedyolo", description="Training losses of one-stage detectors.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (env, check, tune):
        name, about = command.__name__.rpartition(".")[2], (command.__doc__ or "").split("\n\n")[0]
        command.add_arguments(commands.add_parser(name, help=about, description=about))
    options = parser.parse_args(argv)
    return options.run(options)


if __name__ == "__main__":
    sys.exit(main())
