"""The command line ``resnet-fused``, one module per command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import resnet_fused
from resnet_fused.cli import bench, check, demo, families, info, train, tune
from resnet_fused.cli.common import UserError

COMMANDS = (info, check, bench, tune, train, families, demo)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as for every other error; --help has the rest."""
        print(f"{self.prog}: error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    top = _Parser(prog="resnet-fused", description=resnet_fused.__doc__)
    top.add_argument("--version", action="version", version=f"resnet-fused {resnet_fused.__version__}")
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line on ``argv`` (``sys.argv`` when None) and return the exit code.

    0: all is well; 1: a check failed; 2: the request cannot be met, with one line on stderr that says why.
    """
    from torch import OutOfMemoryError

    from resnet_fused.testing.compare import ComparisonError
    from resnet_fused.testing.models import ModelError
    from resnet_fused.training import TrainingError

    args = parser().parse_args(argv)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except (UserError, ModelError, ComparisonError, TrainingError, OutOfMemoryError) as error:
        print(f"resnet-fused: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, `head` say, has enough; what is still buffered must not raise at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
