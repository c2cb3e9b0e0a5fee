"""Random calls of the library end with documented errors, and never with a crash or a wrong token."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent / "support" / "fuzz_library.py"


def test_fuzz() -> None:
    """FUZZ_CALLS and FUZZ_SEED say how many and which. In a process of its own: a crash is a result, and there the
    library alone checks the types of arguments."""
    calls, seed = os.environ.get("FUZZ_CALLS", "250"), os.environ.get("FUZZ_SEED", "0")
    command = [sys.executable, str(SCRIPT), calls, seed]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-4000:]}"
