"""The command line: ``funcavg bench``, ``doctor``, ``mean``. A user's mistake is one line, never a traceback."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Sequence
from typing import NoReturn

from funcavg import __version__
from funcavg._errors import FuncavgError
from funcavg.cli import bench, doctor, mean
from funcavg.cli.environment import CliError, rank_of
from funcavg.cli.jobs import AgreedError

__all__ = ["main"]

COMMANDS = {"bench": bench, "doctor": doctor, "mean": mean}


class _Parser(argparse.ArgumentParser):
    """One line for a mistake, too."""

    def error(self, message: str) -> NoReturn:
        raise CliError(f"{message} (`{self.prog} --help` shows what there is)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="funcavg",
        description="Measure averaging on this machine, find out what works on it, and average checkpoints.",
    )
    parser.add_argument("--version", action="version", version=f"funcavg {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar=" | ".join(COMMANDS))
    for name, command in COMMANDS.items():
        raw = argparse.RawDescriptionHelpFormatter
        command.add_arguments(
            commands.add_parser(
                name, help=command.ABOUT, description=command.ABOUT, epilog=command.HOW, formatter_class=raw
            )
        )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 for success."""
    argv = sys.argv[1:] if argv is None else list(argv)
    command = "funcavg"
    try:
        args = _parser().parse_args(argv, argparse.Namespace(argv=argv))
        command = f"funcavg {args.command}"
        return int(COMMANDS[args.command].run(args))
    except (CliError, FuncavgError) as error:
        rank = rank_of(os.environ)
        if rank > 0 and not isinstance(error, AgreedError):
            time.sleep(1)  # if rank 0 fails alike, it has spoken for all, and the launcher ends this one
            command = f"{command}: rank {rank}"
        if rank == 0 or not isinstance(error, AgreedError):
            print(f"{command}: {error}", file=sys.stderr)
        if isinstance(error, FuncavgError):
            _abort_mpi(2)
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception:
        if "mpi4py.MPI" in sys.modules:
            traceback.print_exc()
            _abort_mpi(1)
        raise


def _abort_mpi(code: int) -> None:
    """End the other ranks of an MPI job, which would wait for this one."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.COMM_WORLD.size > 1:
        mpi.COMM_WORLD.Abort(code)
