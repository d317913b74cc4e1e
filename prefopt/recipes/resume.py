"""Going on from a checkpoint: what has to be the same, and everything that is taken up."""

from __future__ import annotations

import hashlib
import json
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from prefopt import __version__, config, ranks
from prefopt.checkpoint import Checkpoint, Skipped, newest, read
from prefopt.checkpoint.tree import restore_random, state_of_random
from prefopt.data import Dataset
from prefopt.models.reference import weights_key
from prefopt.optimizer import Updater
from prefopt.recipes.folder import CHECKPOINTS
from prefopt.recipes.journal import Journal
from prefopt.records import InputError, text_of

# options that change nothing of what is trained, or name what is compared by its content
FREE = {
    *("out", "overwrite", "push_to_hub", "hub_private", "max_wait_minutes", "cache_dir", "save_completions", "track"),
    *("save_minutes", "save_every", "keep_checkpoints", "save_async", "max_failed_saves", "allow_inexact"),
    *("model", "data", "eval_data", "easier_data"),
}


class Stateful(Protocol):
    """What keeps something between updates."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any) -> None: ...


class RunState:
    """Everything of a run that changes, by name, and every generator of random numbers.

    parts: the updater's is the same on all processes unless its weights are sharded, and is then saved once.
    """

    def __init__(self, updater: Updater, parts: Mapping[str, Stateful | None]) -> None:
        self.updater = updater
        self.parts = {name: part for name, part in parts.items() if part is not None}

    def take(self) -> dict[str, Any]:
        """This process's state, as a tree."""
        own = ranks.is_main() or self.updater.sharded
        state = {name: part.state_dict() for name, part in self.parts.items()}
        return {**state, "updater": self.updater.state_dict() if own else None, "random": state_of_random()}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take up the state of `checkpoint`. InputError where its parts are not these.

        Where there are now more or fewer processes, what each had begun alone (its share of a rollout) is left out.
        """
        world = int(checkpoint.facts["surroundings"]["processes"])
        sharded = bool(checkpoint.facts["options"]["shard"])
        if sharded != self.updater.sharded or (sharded and world != ranks.world()):
            then = f"sharded over {world}" if sharded else f"whole on each of {world}"
            now = f"sharded over {ranks.world()}" if self.updater.sharded else "whole"
            raise InputError(
                f"{checkpoint.path}: its weights are {then} processes and here they are {now}; a sharded run goes on "
                "with shard=true and as many processes as before only"
            )
        rank = min(ranks.rank(), world - 1)
        state = read(checkpoint.path, f"rank-{rank}")
        updater = state.pop("updater")
        self.updater.load_state_dict(updater or read(checkpoint.path, "rank-0")["updater"])
        random = state.pop("random")
        if world != ranks.world() and state["source"].get("buffer"):
            state["source"]["buffer"] = None
        if world != ranks.world() and "rewards" in state:  # they are added up in the end, so each count has one owner
            state["rewards"] = _counted(checkpoint.path, range(ranks.rank(), world, ranks.world()))
        if state.keys() != self.parts.keys():
            different = ", ".join(sorted(state.keys() ^ self.parts.keys()))
            raise InputError(f"{checkpoint.path}: was written by another kind of run ({different})")
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        if world == ranks.world():
            restore_random(random)


def _counted(path: Path, those: Iterable[int]) -> dict[str, Counter[str]]:
    """What became of the reward's samples of so many processes together: name -> kind -> number."""
    found: dict[str, Counter[str]] = {}
    for rank in those:
        for name, counts in read(path, f"rank-{rank}")["rewards"].items():
            found.setdefault(name, Counter()).update(counts)
    return found


def find(out: Path) -> tuple[Checkpoint | None, list[Skipped]]:
    """The checkpoint that a run in `out` goes on from, the same on all processes, and those that cannot be used.

    InputError where there are some and none is whole.
    """
    found, skipped = ranks.from_main(newest(out / CHECKPOINTS) if ranks.is_main() else (None, []))
    if found is None and skipped:
        listed = "\n".join(f"  {one.path.name}: {one.why}" for one in skipped)
        raise InputError(f"{out}: no checkpoint is whole:\n{listed}\nbegin anew with overwrite=true")
    return found, skipped


# ---------------------------------------------------------------- what has to be the same


def options_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Every option that decides the result, and the objective's name, as JSON holds them."""
    values = {name: value for name, value in config.recorded(settings).items() if name not in FREE}
    if "reward" in settings:
        values["reward"] = [named(one) for one in settings["reward"].names]
    return dict(json.loads(json.dumps(values, default=str)))


def surroundings() -> dict[str, Any]:
    """Versions, processes, threads and device: each can change the last digits of a result."""
    import numpy
    import peft
    import transformers

    return {
        "python": platform.python_version(),
        "prefopt": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "numpy": numpy.__version__,
        "processes": ranks.world(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "instructions": torch.backends.cpu.get_cpu_capability(),  # by which kernels are chosen
    }


def contents(data: Mapping[str, Dataset | None], rewards: Sequence[str]) -> dict[str, Any]:
    """Hashes of the rows of each data set as they are trained on, and of the files that rewards come from."""
    rows = {name: rows_key(one) if one is not None else None for name, one in data.items()}
    return {**rows, **{f"reward {place} {named(one)}": file_key(one) for place, one in enumerate(rewards, 1)}}


def named(reward: str) -> str:
    """A reward's name without the folder that its file is in: files are compared by what they hold."""
    return reward.rpartition("/")[2]


def rows_key(data: Dataset) -> str:
    """Hash of tokens, scores, flags and other columns, order included."""
    digest = hashlib.sha256(data.fingerprint.encode())
    for example, row in zip(data.examples, data.rows, strict=True):
        for flags in example.trained:
            digest.update(bytes(flags))
        own = [example.scores, example.steps, text_of(row.prompt or ""), row.extra]
        digest.update(json.dumps(own, default=str, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def file_key(reward: str) -> str | None:
    """Hash of a reward's own file, of FILE.py:NAME or of every file of a directory; None of one that comes with us."""
    path = Path(reward.rpartition(".py:")[0] + ".py") if ".py:" in reward else Path(reward)
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        if file.is_file():
            digest.update(file.name.encode())
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:16]


def weights(actor: Any) -> str:
    """Hash of the weights that a run began with, its critic's among them."""
    policy, critic = getattr(actor, "policy", actor), getattr(actor, "critic", None)
    return " ".join(weights_key(one.model) for one in (policy, critic) if one is not None)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is not as it was, a line each."""
    lines = []
    for name in sorted(before.keys() | now.keys()):
        if isinstance(before.get(name), Mapping) and isinstance(now.get(name), Mapping):
            lines += differences(before[name], now[name])
        elif before.get(name) != now.get(name):
            lines.append(f"{name}: {_short(before.get(name))} then, {_short(now.get(name))} now")
    return lines


def _short(value: Any) -> str:
    return config.shown(value) if value is not None else "none"


def refuse(checkpoint: Checkpoint, lines: list[str], allowed: bool) -> list[str]:
    """The differences, where they are allowed. InputError, listing them, where they are not."""
    if not lines or allowed:
        return lines
    listed = "\n".join(f"  {line}" for line in lines)
    raise InputError(
        f"{checkpoint.path.parent.parent}: holds an unfinished run, at update {checkpoint.step}, and this is not the "
        f"same:\n{listed}\n"
        "put them back as they were, or go on all the same with --allow-inexact (allow_inexact=true), begin anew with "
        "overwrite=true, or choose another out"
    )


class Earlier:
    """The unfinished run in a folder, if there is one, and whether this one is the same.

    checkpoint: that is gone on from; None at the start of a run. facts: what is noted with every checkpoint of this
    run. resumed: the updates from which it has gone on. inexact: what has changed in between, where that was allowed.
    """

    def __init__(self, checkpoint: Checkpoint | None, settings: dict[str, Any], words: list[str]) -> None:
        self.checkpoint, self.settings, self.words = checkpoint, settings, words
        self.facts: dict[str, Any] = {}
        self.resumed: list[int] = [checkpoint.step] if checkpoint else []
        self.inexact: list[str] = []
        self._same("options", options_of(settings))
        self._same("surroundings", surroundings())

    @classmethod
    def find(cls, out: Path, settings: dict[str, Any]) -> Earlier:
        """What is in `out`. InputError where it holds a run that is not this one, or no whole checkpoint of it."""
        if settings["run"].overwrite:
            return cls(None, settings, [])
        checkpoint, skipped = find(out)
        return cls(checkpoint, settings, [f"checkpoint {one.path.name} left out: {one.why}" for one in skipped])

    def describe(self, journal: Journal) -> None:
        """Say where the run goes on."""
        journal.say("\n".join(self.words))
        if self.checkpoint is not None:
            exact = "exactly" if not self.inexact else "not exactly, as asked:\n  " + "\n  ".join(self.inexact)
            journal.say(f"resuming after update {self.checkpoint.step}, {exact}")

    def compare_rows(self, plan: Any) -> None:
        """InputError where the rows, or a reward's file, are not those that the run began with."""
        data = {"data": plan.data, "eval_data": plan.held_out, "easier_data": plan.easier}
        names = self.settings["reward"].names if "reward" in self.settings else []
        if "probe" in self.settings and self.settings["probe"].probe_reward:  # evaluations ask it again
            names = [*names, self.settings["probe"].probe_reward]
        self._same("contents", contents(data, names))

    def compare_weights(self, actor: Any, reference: Any) -> None:
        """InputError where the model, or the reference_model if there is one, is not the one the run began with."""
        own = {"reference_model": weights_key(reference.model)} if reference is not None else {}
        self._same("weights", {"model": weights(actor), **own})

    def _same(self, name: str, now: dict[str, Any]) -> None:
        self.facts[name] = now
        if self.checkpoint is not None:
            lines = differences(self.checkpoint.facts[name], now)
            self.inexact += refuse(self.checkpoint, lines, self.settings["checkpoint"].allow_inexact)

    def state_dict(self) -> dict[str, Any]:
        return {"resumed": list(self.resumed), "inexact": list(self.inexact)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.resumed = [*state["resumed"], *self.resumed]
        self.inexact = [*state["inexact"], *self.inexact]
