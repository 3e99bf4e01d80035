#!/usr/bin/env python3
"""Makes a schedule, as `hpcssl schedule build` does: `make_schedule.py --slides TABLE --spec opal-3b --out SCHED`."""

import sys

from hpcssl.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["schedule", "build", *sys.argv[1:]]))
