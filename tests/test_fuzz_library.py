"""Random calls of the library end with documented errors, and never with a crash or a wrong token."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent / "support" / "fuzz_library.py"


def test_fuzz() -> None:
    """FUZZ_CALLS and FUZZ_SEED choose the calls. They run in a process that may crash and has no type checks."""
    calls, seed = os.environ.get("FUZZ_CALLS", "250"), os.environ.get("FUZZ_SEED", "0")
    command = [sys.executable, str(SCRIPT), calls, seed]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert process.returncode == 0, f"{process.stdout}\n{process.stderr[-4000:]}"
