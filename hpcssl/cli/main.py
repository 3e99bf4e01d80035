"""Entry point of `hpcssl`: finds the command, turns errors into one line and an exit code."""

from __future__ import annotations

import argparse
import difflib
import importlib
import re
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import NoReturn

import hpcssl
from hpcssl.core.errors import UserError, describe_os_error

COMMANDS = {
    "demo": "hpcssl.cli.demo_command",
    "doctor": "hpcssl.cli.doctor_command",
    "tile": "hpcssl.cli.tile_command",
    "store": "hpcssl.cli.store_command",
    "schedule": "hpcssl.cli.schedule_command",
    "plan": "hpcssl.cli.plan_command",
    "pretrain": "hpcssl.cli.pretrain_command",
    "jobs": "hpcssl.cli.jobs_command",
    "export": "hpcssl.cli.export_command",
    "embed": "hpcssl.cli.embed_command",
    "splits": "hpcssl.cli.splits_command",
    "mccv": "hpcssl.cli.mccv_command",
    "knn": "hpcssl.cli.knn_command",
    "report": "hpcssl.cli.report_command",
}
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 when the work was done, 2 for a user's error, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser(arguments[0] if arguments and arguments[0] in COMMANDS else None)
    args = parser.parse_args(arguments)
    if not getattr(args, "run", None):
        parser.print_help(sys.stderr)
        return EXIT_USER_ERROR
    try:
        return int(args.run(args))
    except UserError as error:
        return _fail(str(error))
    except BrokenPipeError:  # whoever read our output has seen enough
        sys.stdout = None
        return 0
    except OSError as error:
        return _fail(describe_os_error(error))
    except KeyboardInterrupt:
        print("\nhpcssl: stopped; the same command goes on where it was", file=sys.stderr)
        return EXIT_INTERRUPTED


class _Parser(argparse.ArgumentParser):
    """A parser that tells a wrong command line in one line."""

    def error(self, message: str) -> NoReturn:
        """End with exit code 2; of an unknown option, name the nearest."""
        unknown = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        if unknown:
            near = difflib.get_close_matches(unknown[1], [o for p in _below(self) for o in p._option_string_actions], 1)
            message += f"; did you mean {near[0]}?" if near else ""
        sys.exit(_fail(f"{message}; see {self.prog} --help"))


def _below(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Yield a parser and those of its commands and actions."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from _below(child)


def _parser(command: str | None) -> argparse.ArgumentParser:
    """Build the parser of one command, and import no other; of all of them for the overview."""
    parser = _Parser(prog="hpcssl", description=hpcssl.__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"hpcssl {hpcssl.__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name in [command] if command else COMMANDS:
        module = importlib.import_module(COMMANDS[name])
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
    if hasattr(module, "run"):  # else its actions have
        command.set_defaults(run=module.run)
    module.add_arguments(command)


def _fail(message: str) -> int:
    print(f"hpcssl: error: {' '.join(message.split())}", file=sys.stderr)
    return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
