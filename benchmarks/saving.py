"""What a checkpoint costs: beside writing the same bytes with safetensors, and training while one is written.

`make bench-saving`. The state is a run's: float32 masters and both moments of AdamW, 12 bytes a parameter, with every
generator of random numbers. In turns, each into files of its own and with the disk's queue emptied before: a
checkpoint as a run saves it with save_async=false (synced, hashed, committed; the one before it goes in the
background), the same tensors with `safetensors.torch.save_file` and an fsync, and these without the fsync, which says
when the system has the bytes and not when the disk has them. A ratio is the median over rounds of a round's own. Then
the asynchronous way: how long training stands still, which is the copy of the state, and how much slower updates are
while the copy goes to the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from offline import SHAPES, VOCABULARY, Shape

RESULTS = Path(__file__).parent / "results"
TARGET = 1.2  # times the seconds of safetensors with an fsync
ROWS, TOKENS = 2, 64  # of the updates that go on while a checkpoint is written


class State:
    """A model in training: its updates, and its state as checkpoints hold it."""

    def __init__(self, shape: Shape) -> None:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        from prefopt.models.load import keep_freed_memory
        from prefopt.optimizer import Updater

        keep_freed_memory()  # as a run on a CPU does
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=shape.width,
            intermediate_size=shape.inner,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.key_heads,
            tie_word_embeddings=True,
        )
        self.model = LlamaForCausalLM(config)
        self.updater = Updater(self.model.parameters())
        self.tokens = torch.randint(VOCABULARY, (ROWS, TOKENS))
        self.update()  # AdamW has moments from its first step on

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def update(self) -> float:
        """One update, forward to optimiser; its seconds."""
        began = time.perf_counter()
        self.model(input_ids=self.tokens, labels=self.tokens).loss.backward()
        self.updater.step(1e-6, 1.0)
        return time.perf_counter() - began

    def take(self) -> dict[str, Any]:
        from prefopt.checkpoint.tree import state_of_random

        return {"updater": self.updater.state_dict(), "random": state_of_random()}


def timed(work: Callable[[], Any]) -> float:
    """Seconds of `work`, once nothing older is on its way to the disk."""
    os.sync()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def synced(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def rounds(state: State, folder: Path, num: int) -> list[dict[str, float]]:
    """Seconds of every way, in every round; the order turns."""
    from safetensors.torch import save_file

    from prefopt.checkpoint import CheckpointOptions, Keeper, Tree

    options = CheckpointOptions(save_async=False, keep_checkpoints=1)
    keeper = Keeper(folder / "checkpoints", options, state.take)
    steps = iter(range(1, 10_000))
    bare = folder / "bare.safetensors"
    tensors = Tree(state.take(), copy=False).tensors

    def with_sync() -> None:
        save_file(tensors, bare)
        synced(bare)

    ways: dict[str, Callable[[], Any]] = {
        "checkpoint": lambda: keeper.save(next(steps), {}),
        "safetensors_synced": with_sync,
        "safetensors": lambda: save_file(tensors, bare),
    }
    seen = []
    for number in range(num + 1):
        order = list(ways)[number % 3 :] + list(ways)[: number % 3]
        seconds = {}
        for way in order:
            bare.unlink(missing_ok=True)
            seconds[way] = timed(ways[way])
            if keeper.failed:
                raise SystemExit(f"{folder}: {keeper.problem}")
        seen.append({way: seconds[way] for way in ways})
    return seen[1:]  # the first is a warm-up: of the code, and of the folder without a checkpoint to remove


def asynchronous(state: State, folder: Path, num: int) -> dict[str, Any]:
    """Medians over checkpoints: seconds for which training stands still, and of updates beside and without a write.

    slowdown: None where no update was within a write.
    """
    from prefopt.checkpoint import CheckpointOptions, Keeper

    keeper = Keeper(folder / "checkpoints", CheckpointOptions(keep_checkpoints=1), state.take)
    still, beside, without, writing = [], [], [], []
    for number in range(num):
        os.sync()
        without += [state.update() for _ in range(3)]
        still.append(timed(lambda: keeper.save(number + 1, {})))  # noqa: B023  called at once
        while keeper.busy:
            seconds = state.update()
            if keeper.busy:  # to its end
                beside.append(seconds)
        keeper.finish()
        if keeper.failed:
            raise SystemExit(f"{folder}: {keeper.problem}")
        writing.append(keeper.took)
    alone, slow = statistics.median(without), statistics.median(beside) if beside else None
    return {
        "still_seconds": statistics.median(still),
        "writing_seconds": statistics.median(writing),
        "update_seconds": alone,
        "update_seconds_while_writing": slow,
        "updates_while_writing": len(beside),
        "slowdown": slow and slow / alone,
    }


def measure(name: str, num: int, where: Path) -> dict[str, Any]:
    """Everything of one shape."""
    from prefopt.checkpoint import Tree

    state = State(SHAPES[name])
    size = sum(x.numel() * x.element_size() for x in Tree(state.take(), copy=False).tensors.values())
    folder = Path(tempfile.mkdtemp(prefix="prefopt-saving-", dir=where))
    try:
        seen = rounds(state, folder, num)
        later = asynchronous(state, folder, num)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    medians = {way: statistics.median(one[way] for one in seen) for way in seen[0]}
    ratios = {
        f"ratio_to_{way}": statistics.median(one["checkpoint"] / one[way] for one in seen)
        for way in ("safetensors_synced", "safetensors")
    }
    return {
        "shape": name,
        "parameters": state.parameters,
        "bytes": size,
        "seconds": medians,
        **ratios,
        "target": TARGET,
        "reached": ratios["ratio_to_safetensors_synced"] <= TARGET,
        "asynchronous": later,
        "rounds": seen,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["15M", "135M"], choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=7, help="of every way, in turns")
    parser.add_argument("--folder", type=Path, help="where to write, on the disk that is measured; default: /tmp")
    parser.add_argument("--out", type=Path, default=RESULTS / "saving.json")
    given = parser.parse_args()
    import safetensors
    import torch

    began = os.getloadavg()[0]
    results = [measure(name, given.rounds, given.folder or Path(tempfile.gettempdir())) for name in given.shapes]
    report = {
        "device": f"{torch.get_num_threads()} CPU threads",
        "load_average": {"before": began, "after": os.getloadavg()[0]},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "safetensors": safetensors.__version__,
        },
        "results": results,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for one in results:
        seconds, later = one["seconds"], one["asynchronous"]
        slowdown = "-" if later["slowdown"] is None else f"{later['slowdown']:.2f}x"
        print(
            f"{one['shape']}: {one['bytes'] / 1e9:.2f} GB  checkpoint {seconds['checkpoint']:.2f} s  safetensors with "
            f"fsync {seconds['safetensors_synced']:.2f} s ({one['ratio_to_safetensors_synced']:.2f}x)  without "
            f"{seconds['safetensors']:.2f} s ({one['ratio_to_safetensors']:.2f}x)\n"
            f"  asynchronous: still for {later['still_seconds']:.2f} s, written in {later['writing_seconds']:.2f} s, "
            f"updates {slowdown} as long meanwhile"
        )


if __name__ == "__main__":
    main()
