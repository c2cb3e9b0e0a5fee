"""Runs `fgbench` as `python -m fastgen.cli.bench`."""

import sys

from fastgen.cli.bench.benchmark import main

sys.exit(main())
