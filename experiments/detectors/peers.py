"""What two published watchers find in the same runs, with their own defaults.

    pip install rldoctor==0.2.0 rlwatch==0.5.1       # in an environment of their own; neither needs torch
    python experiments/detectors/peers.py            # reads runs/detectors, writes peers.json beside this file

Both look at reinforcement learning. Metrics reach them under the names that TRL gives them. post-training-toolkit is on
the package index as an empty placeholder (0.0.1), so there is nothing of it to run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
NAMES = {
    "loss": "loss",
    "reward": "reward",
    "reward_std": "reward_std",
    "eval/reward": "eval_reward",
    "entropy": "entropy",
    "kl_reference": "kl",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "clip_fraction/low": "clip_ratio/low_mean",
    "clip_fraction/high": "clip_ratio/high_mean",
    "completion_length": "completions/mean_length",
}


def records(result: dict[str, Any]) -> list[dict[str, float]]:
    """A line for every update, in TRL's names; an evaluation is part of the update before it."""
    found: dict[int, dict[str, float]] = {}
    for step, metrics in result["lines"]:
        line = found.setdefault(step, {"step": step})
        line |= {theirs: metrics[ours] for ours, theirs in NAMES.items() if ours in metrics}
        if "finished" in metrics:
            line["completions/clipped_ratio"] = 1 - metrics["finished"]
        same = [metrics[name] for name in ("zero_variance/failed", "zero_variance/solved") if name in metrics]
        if same:
            line["frac_reward_zero_std"] = sum(same)
    return [found[step] for step in sorted(found)]


def doctor(lines: list[dict[str, float]], result: dict[str, Any]) -> list[str]:
    """Names of what rldoctor calls a warning or critical."""
    from rl_doctor import Severity, diagnose, run_from_records

    config = {"num_generations": result["run"]["options"].get("num_completions"), **result["run"]["options"]}
    found = diagnose(run_from_records(lines, config={k: v for k, v in config.items() if v is not None}))
    return sorted({each.detector for each in found.findings if each.severity >= Severity.WARNING})


def watch(lines: list[dict[str, float]]) -> list[str]:
    """Names of what rlwatch alerts to."""
    from rlwatch.config import RLWatchConfig
    from rlwatch.detectors import DetectorSuite

    suite, found = DetectorSuite(RLWatchConfig()), set()
    for line in lines:
        if line["step"] == 0:
            continue
        alerts = suite.check_step(
            int(line["step"]),
            entropy=line.get("entropy"),
            kl_divergence=line.get("kl"),
            reward_mean=line.get("reward"),
            reward_std=line.get("reward_std"),
            loss=line.get("loss"),
            grad_norm=line.get("grad_norm"),
        )
        found |= {alert.detector for alert in alerts}
    return sorted(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/detectors"), help="folder of finished runs")
    given = parser.parse_args()
    found = {}
    for file in sorted(given.out.glob("*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        if result["spec"]["intent"] == "remedy":
            continue
        lines = records(result)
        found[file.stem] = {"rldoctor": doctor(lines, result), "rlwatch": watch(lines)}
    (HERE / "peers.json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"{len(found)} runs")


if __name__ == "__main__":
    main()
