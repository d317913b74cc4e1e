"""`prefopt quickstart`: the main job on an embedded task."""

from __future__ import annotations

from pathlib import Path

from prefopt.records import InputError
from prefopt.terminal import Parser, as_json, libraries, say


def quickstart(words: list[str]) -> None:
    """Build, train and compare a small model."""
    help_text = """\
prefopt quickstart [grpo] [--out DIR] [--seed N] [--json]

Builds a small tokenizer and model, teaches it a task whose true reward is known (SFT), then prefers better
answers (DPO), and shows what changed on held-out prompts. A few minutes on two CPU cores, no network.

With `grpo` the model learns from rewards: sheets of sums, a point only where all of a sheet is right. Longer sheets
are too hard to earn a single point; the run says so, and easier prompts mixed in solve them.

  --out DIR    the run's folder (runs/quickstart, runs/quickstart-grpo)
  --seed N     of everything random (0)
  --json       print only the summary, as JSON, on stdout"""
    parser = Parser("quickstart", help_text)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    given = parser.read(words)
    if given.help:
        return say(parser.help_text)
    if given.words not in ([], ["grpo"]):
        raise InputError(f"quickstart {' '.join(given.words)}: there is `prefopt quickstart`, alone or with `grpo`")
    with libraries(given.json):
        from prefopt.recipes import quickstart as recipe

        rewarded = bool(given.words)
        folder = given.out or Path("runs/quickstart-grpo" if rewarded else "runs/quickstart")
        summary = (recipe.run_grpo if rewarded else recipe.run)(folder, given.seed)
    if given.json:
        say(as_json(summary))
