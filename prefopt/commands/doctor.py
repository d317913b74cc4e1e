"""`prefopt doctor`: what is wrong with a run, and the recipe that mends it."""

from __future__ import annotations

import shlex

from prefopt import config
from prefopt.commands.given import readable
from prefopt.doctor import Diagnosis, diagnose, read
from prefopt.doctor.mend import check, mended, write
from prefopt.records import InputError
from prefopt.terminal import Parser, as_json, complain, say

DOCTOR = """\
prefopt doctor RUN [--apply [key=value ...]] [--json]

Explains a run, finished or still going, in plain words: what is found in its metrics, from which update on, the number
and the threshold, and what to do. RUN is one of

  a run's folder of prefopt          metrics.jsonl and config.yaml
  trainer_state.json                 of TRL or transformers; or the folder or checkpoint that has one
  TensorBoard events                 a file or a folder of them; needs `pip install tensorboard`
  FILE.jsonl or FILE.csv             logs of verl and OpenRLHF, exports of Weights & Biases

  --apply                write the recipe that mends it, fixed.yaml, beside the run's own; where another run has to come
                         first (SFT before ORPO), fixed-first.yaml too. Options after it go before the remedy's own:
                         `--apply easier_data=easy.jsonl`
  --json                 print the findings as JSON, on stdout

Levels: sick means that going on is a waste, warn that something is probably wrong, info that it is worth a look. The
thresholds were set on small runs with known outcomes (docs/watch.md); a finding is a reason to look, with its numbers
beside it. Nothing is judged by the loss alone. Of TRL's logs fewer things can be judged than of prefopt's: whether
failed groups failed or were solved, and how far the policy has gone, is not in them."""


def doctor(words: list[str]) -> None:
    """Read a log, say what is found, and write the recipe that mends it."""
    given = doctor_parser().read(words)
    if given.help:
        return say(DOCTOR)
    if not given.words:
        raise InputError("doctor needs a run: its folder, or its log; `prefopt doctor --help` shows which")
    run, *overrides = given.words
    if overrides and not given.apply:
        raise InputError(f"{overrides[0]}: options are for the recipe that --apply writes; add --apply")
    with readable():
        found = diagnose(read(run))
    say(as_json(found.summary()) if given.json else found.text())
    if given.apply:
        complain(_applied(found, overrides))


def doctor_parser() -> Parser:
    parser = Parser("doctor", DOCTOR)
    parser.add_argument("words", nargs="*")
    for flag in ("--apply", "--json"):
        parser.add_argument(flag, action="store_true")
    return parser


def _applied(found: Diagnosis, overrides: list[str]) -> str:
    """Write the recipes; what to run, in words."""
    run, folder = found.log.run, found.log.folder
    given = config.parse_overrides(overrides)
    objective = str(given.pop("objective", None) or run.objective or "")
    if not objective:
        raise InputError("the log does not say its objective; give it after --apply, such as objective=dpo")
    recipes = mended(objective, found.log.recipe, found.findings, given)
    check({"objective": recipes[-1]["objective"], **given})  # an option that it has not would be left out unseen
    files = write(folder, recipes)
    lines = []
    for file, recipe in zip(files, recipes, strict=True):
        missing = " ".join(f"--{name} {_example(name)}" for name in check(recipe))
        lines.append(f"wrote {file}; run `prefopt train {shlex.quote(str(file))}{f' {missing}' if missing else ''}`")
    return "\n".join(lines)


def _example(name: str) -> str:
    return {"model": "DIR", "data": "FILE", "out": "RUN"}[name]
