"""Streams of metrics for detectors: what sick, healthy and misleading runs log."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping

from prefopt.detectors import Detector, Finding, Run, Watch

UNKNOWN = Run()
Stream = Iterable[tuple[int, Mapping[str, float]]]


def updates(number: int, **metrics: Callable[[int], float] | float) -> list[tuple[int, dict[str, float]]]:
    """Lines of so many updates from 1 on; a metric is a number or a function of the step. `a__b` is `a/b`."""
    return [
        (step, {n.replace("__", "/"): m(step) if callable(m) else m for n, m in metrics.items()})
        for step in range(1, number + 1)
    ]


def noisy(value: Callable[[int], float] | float, spread: float, seed: int = 0) -> Callable[[int], float]:
    """A metric that scatters, the same at every call."""
    return lambda step: (
        (value(step) if callable(value) else value) + spread * random.Random(f"{seed}/{step}").uniform(-1, 1)
    )


def between(start: float, end: float, steps: int) -> Callable[[int], float]:
    """A straight line from the first step to the last."""
    return lambda step: start + (end - start) * (step - 1) / max(steps - 1, 1)


def merged(*streams: Stream) -> list[tuple[int, Mapping[str, float]]]:
    """Several streams as one, by step; of equal steps the first comes first."""
    return sorted((line for stream in streams for line in stream), key=lambda line: line[0])


def watched(detector: Detector, stream: Stream, run: Run = UNKNOWN) -> Watch:
    """A watch with one detector that was told of the stream."""
    watch = Watch(run, [detector])
    for step, values in stream:
        watch.listen(step, values)
    return watch


def found(detector: Detector, stream: Stream, run: Run = UNKNOWN) -> Finding | None:
    """What lasts at the end of the stream."""
    finding = watched(detector, stream, run).find(detector.name)
    return finding if finding is not None and finding.lasts else None
