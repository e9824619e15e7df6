"""`python -m selectune`, and what accelerate and torchrun start."""

import sys

from selectune.cli import main

if __name__ == "__main__":
    sys.exit(main())
