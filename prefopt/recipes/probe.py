"""A few updates of a recipe in a process of their own, and what they took: `python -m prefopt.recipes.probe RECIPE`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from prefopt import config
from prefopt.records import InputError


def main(recipe: str) -> None:
    """Train as the recipe says, and print the peak of memory and the seconds of an update."""
    layer = config.read_recipe(recipe)
    resolved = config.resolve(config.sections(str(layer.pop("objective"))), layer)
    from prefopt.recipes.train import train

    options = config.flat({name: section for name, section in resolved.items() if name != "objective"})
    found = train(objective=resolved["objective"], **options).summary
    updates = int(found["steps"])
    seconds = float(found["seconds"]["training"]) / updates
    print("PROBED " + json.dumps({"peak": peak_bytes(), "per_update": seconds, "updates": updates}))


def peak_bytes() -> int:
    """The most this process ever held: resident, or allocated where there is a GPU."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    # not ru_maxrss: it begins with what the process held that this one was started from
    held = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert held is not None, "Linux says what a process held"
    return int(held[1]) * 1024


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except InputError as error:
        sys.exit(str(error))
