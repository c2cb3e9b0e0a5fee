"""`python -m fastgen TOOL` runs one of the tools: `python -m fastgen run "What is the capital of France?"`."""

import sys

from fastgen.cli.scripts import main

if __name__ == "__main__":
    sys.exit(main())
