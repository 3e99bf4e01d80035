#!/usr/bin/env python3
"""The benchmark on its own: `python tools/run_mccv.py --help`; the same as `hpcssl mccv`."""

import sys

from hpcssl.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["mccv", *sys.argv[1:]]))
