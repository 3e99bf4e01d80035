"""Commands that have actions, such as `store build`: each action has its own arguments, example and function."""

from __future__ import annotations

import argparse
from collections.abc import Callable


class Actions:
    """The actions of a command; the command line must name one, unless it is not `required`."""

    def __init__(self, parser: argparse.ArgumentParser, *, required: bool = True):
        self._parsers = parser.add_subparsers(title="actions", metavar="ACTION", required=required)

    def add(
        self, name: str, run: Callable[[argparse.Namespace], int], text: str, example: str
    ) -> argparse.ArgumentParser:
        """Add an action; returns its parser, for its arguments."""
        parser: argparse.ArgumentParser = self._parsers.add_parser(
            name, help=text, description=text, epilog=f"example: {example}", allow_abbrev=False
        )
        parser.set_defaults(run=run)
        return parser
