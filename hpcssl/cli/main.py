"""Entry point of `hpcssl`: finds the command, turns errors into one line and an exit code."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

import hpcssl
from hpcssl.core.errors import UserError, describe_os_error

COMMANDS = ("demo", "doctor", "store", "schedule", "pretrain", "embed", "splits", "mccv", "report")
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 when the work was done, 2 for a user's error, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser(arguments[0] if arguments and arguments[0] in COMMANDS else None)
    args = parser.parse_args(arguments)
    if not getattr(args, "run", None):
        parser.print_help()
        return EXIT_USER_ERROR
    try:
        return int(args.run(args))
    except UserError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(describe_os_error(error))
    except KeyboardInterrupt:
        print("\nhpcssl: stopped; the same command goes on where it was", file=sys.stderr)
        return EXIT_INTERRUPTED


def _parser(wanted: str | None) -> argparse.ArgumentParser:
    """Build the parser; of the commands, import only the wanted one (all of them for the overview)."""
    parser = argparse.ArgumentParser(prog="hpcssl", description=hpcssl.__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"hpcssl {hpcssl.__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name in [wanted] if wanted else COMMANDS:
        module = importlib.import_module(f"hpcssl.cli.{name}")
        _add_command(subparsers, name, module)
    return parser


def _add_command(subparsers: argparse._SubParsersAction, name: str, module: ModuleType) -> None:
    command = subparsers.add_parser(
        name,
        help=module.SUMMARY,
        description=module.SUMMARY,
        epilog=f"example:\n  {module.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.set_defaults(run=module.run)
    module.add_arguments(command)


def _fail(message: str) -> int:
    print(f"hpcssl: error: {' '.join(message.split())}", file=sys.stderr)
    return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
