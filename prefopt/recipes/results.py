"""What a run leaves: the model, the best one on the way, its critic."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from prefopt import ranks
from prefopt.checkpoint.commit import sync
from prefopt.metrics import find
from prefopt.models.adapters import is_adapted
from prefopt.models.policy import Policy
from prefopt.models.sharding import whole_state
from prefopt.optimizer import broken
from prefopt.recipes.folder import BEST, CHECKPOINTS
from prefopt.records import InputError


def save(actor: Any, tokenizer: Any, folder: Path, make_room: Callable[[], bool] = lambda: False) -> Path:
    """Write the model (or adapter) and tokenizer as a Hugging Face directory, from one process; whole or not at all.

    actor: a policy, or one with a critic, of which the policy is the result. make_room: called where it could not be
    written; whether it is worth another try.
    """
    policy: Policy = getattr(actor, "policy", actor)
    _refuse_broken(policy.model)
    sharded = any(hasattr(p, "full_tensor") for p in policy.model.parameters())
    extra: dict[str, Any] = {"state_dict": whole_state(policy.model)} if sharded else {}
    if is_adapted(policy.model):
        extra["selected_adapters"] = ["default"]
        if policy.scorer is not None:
            extra["save_embedding_layers"] = False  # they grew by the padding token at most, which is never read

    def write() -> None:
        with _whole(folder) as writing:
            with policy.ordinary() as model:
                model.save_pretrained(writing, **extra)
            tokenizer.save_pretrained(writing)

    while ranks.is_main():
        try:
            write()
            break
        except InputError:
            if not make_room():
                raise
    ranks.barrier()
    return folder


def _refuse_broken(model: Any) -> None:
    """InputError, on all processes, where trained weights are no numbers that a model can work with."""
    names = broken((name, p) for name, p in model.named_parameters() if p.requires_grad)
    if ranks.all_max(len(names)):
        first = next((name for own in ranks.gather(names) for name in own), "")
        raise InputError(
            f"the trained weights are no longer numbers (the first: {first}), so they were not saved; lower "
            "learning_rate or max_grad_norm"
        )


@contextlib.contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder to write into that becomes `folder` once all is on the disk. InputError where the disk takes it not."""
    writing = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(writing, ignore_errors=True)
    try:
        writing.mkdir(parents=True)
        yield writing
        for path in (*writing.rglob("*"), writing):
            sync(path)
        shutil.rmtree(folder, ignore_errors=True)
        writing.rename(folder)
        sync(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(writing, ignore_errors=True)
        raise InputError(
            f"{folder}: cannot be written ({error}); make room there, and the same command, without overwrite=true, "
            "goes on from the newest checkpoint, if there is one"
        ) from error


def save_critic(actor: Any, tokenizer: Any, folder: Path) -> None:
    """A critic with weights of its own, as it is after the last update, in the form of a reward model."""
    critic = getattr(actor, "critic", None)
    if critic is not None:
        _refuse_broken(critic.model)
    if critic is not None and ranks.is_main():
        with _whole(folder) as writing:
            with critic.ordinary() as model:
                model.save_pretrained(writing)
            tokenizer.save_pretrained(writing)


class Best:
    """Saves the weights whenever an evaluation beats every earlier one.

    step, metrics: of the evaluation whose weights are kept. make_room: as of `save`.
    """

    def __init__(self, metric: str, out: Path, policy: Any, tokenizer: Any) -> None:
        self.metric, self.out, self.policy, self.tokenizer = metric, out, policy, tokenizer
        self.sign = 1.0 if find(self.metric).sign == "lower" else -1.0
        self.value, self.step = math.inf, 0
        self.metrics: dict[str, float] = {}
        self.make_room: Callable[[], bool] = lambda: False

    def listen(self, step: int, metrics: dict[str, float]) -> None:
        if not any(name.startswith("eval/") for name in metrics):
            return
        if self.metric not in metrics:
            raise InputError(f"eval_metric: {self.metric} is not measured; choose one of {with_a_better_way(metrics)}")
        value = self.sign * metrics[self.metric]
        if value < self.value or not self.metrics:  # the first in any case: there must be a result
            self.value = math.inf if math.isnan(value) else value
            self.step, self.metrics = step, metrics
            save(self.policy, self.tokenizer, self._folder(step), self.make_room)
            if not (self.out / CHECKPOINTS).exists():
                self.forget([])

    def _folder(self, step: int) -> Path:
        return self.out / BEST / f"step-{step:08d}"

    def forget(self, kept: Sequence[Mapping[str, Any]]) -> None:
        """Remove weights that neither this run nor one that goes on from a kept checkpoint can choose."""
        # before what is wanted is asked: training may save the next ones at this moment
        there = list((self.out / BEST).glob("step-*"))
        wanted = {self._folder(step) for step in (self.step, *(facts["best"] for facts in kept)) if step is not None}
        for folder in there:
            if folder not in wanted and ranks.is_main():
                shutil.rmtree(folder, ignore_errors=True)

    def result(self) -> Path:
        """The folder of the weights that were kept, as the run's model."""
        folder = self.out / "model"
        if ranks.is_main():
            with _whole(folder) as writing:
                shutil.copytree(self._folder(self.step), writing, dirs_exist_ok=True)
        ranks.barrier()
        return folder

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "step": self.step, "metrics": self.metrics}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state. InputError where the weights that it counts on are gone."""
        self.value, self.step, self.metrics = state["value"], state["step"], state["metrics"]
        if self.metrics and not self._folder(self.step).is_dir():
            raise InputError(f"{self._folder(self.step)}: is gone, the best weights so far; begin anew, overwrite=true")


def with_a_better_way(names: Iterable[str]) -> str:
    """Those of the metrics by which weights can be chosen, each with the way that is better."""
    signs = {name: find(name).sign for name in sorted(names)}
    return ", ".join(f"{name} ({sign})" for name, sign in signs.items() if sign != "neither")
