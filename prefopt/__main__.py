"""`python -m prefopt`, also under `accelerate launch -m prefopt`."""

import sys

from prefopt.cli import main

if __name__ == "__main__":
    sys.exit(main())
