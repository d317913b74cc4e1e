"""`python -m prefopt.sandbox` says how safely model-written code runs on this machine, and why not more safely."""

from __future__ import annotations

import sys

from prefopt.records import InputError
from prefopt.sandbox import machine


def main() -> int:
    """Print the level and its reasons; 1 if model-written code is refused here."""
    try:
        print("\n".join(machine.find().describe()))
    except InputError as error:
        print(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
