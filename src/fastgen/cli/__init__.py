"""The command-line tools. Importing this package, before torch, limits how long idle OpenMP threads spin."""

import os

SPIN_COUNT = "1000"  # some tens of microseconds; libgomp's default, 300,000, burns the time of a busy machine's cores

# libgomp reads its variables once, when torch is imported. See docs/troubleshooting.md.
if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
    os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
