"""Recipes that mend a run: its own options, changed as its findings say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from prefopt import config
from prefopt.detectors import Finding
from prefopt.detectors.finding import rank
from prefopt.records import InputError

REQUIRED = ("model", "data", "out")  # that a log of another trainer does not say
FIRST, THEN = "fixed-first", "fixed"  # names of the recipes


def mended(
    objective: str, options: Mapping[str, Any], findings: Sequence[Finding], given: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """One or two recipes, to be run one after the other: the run's options with the changes of its findings.

    Of notes (info) nothing is taken where there is anything worse. given: options that go before all others. InputError
    where nothing can be changed by options alone, with what to do.
    """
    lasting = [finding for finding in findings if finding.lasts]
    worst = max((rank(finding.level) for finding in lasting), default=0)
    chosen = [finding for finding in lasting if finding.level != "info" or rank("info") == worst]
    changes: dict[str, Any] = {}
    for finding in reversed(chosen):  # the worst has the last word
        changes |= finding.change
    before = next((finding.before for finding in chosen if finding.before), {})
    if not changes and not before and not given:
        raise InputError(_nothing(chosen))
    out = str(options.get("out", "run"))
    kept = _kept(objective, options, {**changes, **given})
    then = {"objective": objective, **kept, "out": f"{out}-fixed", **changes, **given}
    if not before:
        return [_fitting(then)]
    first = {**_kept(objective, options, before), **before, "out": f"{out}-first"}
    return [_fitting(first), _fitting({**then, "model": f"{out}-first/model"})]


def _kept(objective: str, options: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The options that still stand: with another objective its own learning rate and coefficients do not."""
    if changes.get("objective", objective) == objective:
        return dict(options)
    run = config.sections(objective)
    own = {option.key for option in config.describe({"objective": run["objective"]})} | {"learning_rate"}
    return {name: value for name, value in options.items() if name not in own}


def _nothing(findings: Sequence[Finding]) -> str:
    if not findings:
        return "nothing was found that lasts, so there is nothing to mend"
    return (
        f"no option alone mends this: {findings[0].remedy}. Give what it needs after --apply, such as easier_data=FILE "
        "or data=FILE"
    )


def _fitting(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The options that the recipe's objective has."""
    objective = str(recipe["objective"])
    own = {option.key for option in config.describe(config.sections(objective))}
    return {"objective": objective, **{name: value for name, value in recipe.items() if name in own}}


def check(recipe: Mapping[str, Any]) -> list[str]:
    """The required options that are still missing. InputError where an option cannot have its value."""
    missing = [name for name in REQUIRED if name not in recipe]
    options = {name: value for name, value in recipe.items() if name != "objective"}
    config.resolve(config.sections(str(recipe["objective"])), {**dict.fromkeys(missing, "x"), **options})
    return missing


def write(folder: Path, recipes: Sequence[Mapping[str, Any]]) -> list[Path]:
    """The recipes as files beside the run's own. InputError where they cannot be written."""
    names = [THEN] if len(recipes) == 1 else [FIRST, THEN]
    files = [folder / f"{name}.yaml" for name in names]
    for file, recipe in zip(files, recipes, strict=True):
        check(recipe)
        text = yaml.dump(dict(recipe), Dumper=config.Dumper, sort_keys=False, allow_unicode=True, width=10**6)
        try:
            file.write_text(text, encoding="utf-8")
        except OSError as error:
            raise InputError(f"{file}: cannot write: {error.strerror or error}") from None
    return files
