#!/usr/bin/env python3
"""Submit a pretraining run: `python launch/submit_pretrain.py --help`; as `hpcssl pretrain --cluster slurm`."""

import sys

from hpcssl.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", "--cluster", "slurm", *sys.argv[1:]]))
