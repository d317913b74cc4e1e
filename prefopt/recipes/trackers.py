"""Metrics sent to tracking services, each from a thread of its own: training never waits for one, nor ends with it.

metrics.jsonl has every line, whatever becomes of them here.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from prefopt.records import InputError, discreet

FOLDER = "tracking"  # in the run's folder: by what a service knows the run, and what services keep here
PROJECT = "prefopt"  # where runs are filed, unless the service's own environment variable says otherwise
ROOM = 10_000  # lines that wait for one service before further ones are left out
PAUSE = 60.0  # seconds until a service that could not be opened is tried again
LAST = 15.0  # seconds, at the end of a run, for what still waits

Metrics = Mapping[str, float]


class Service(Protocol):
    """A tracking service with this run open. Both calls may raise, and take as long as they like.

    where: how to look at the run, for the log; empty where that is not known.
    """

    where: str

    def log(self, step: int, metrics: Metrics) -> None: ...

    def close(self, failed: bool) -> None: ...


class Run(NamedTuple):
    """What services are told of a run. folder: where they may keep something. settings: every option, by name."""

    name: str
    folder: Path
    settings: dict[str, Any]

    def identity(self, service: str, made: Callable[[], str]) -> str:
        """By what the service knows this run: as it was before a resume, or what `made` gives."""
        file = self.folder / f"{service}.id"
        if not file.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = file.with_suffix(".tmp")
            temporary.write_text(made(), encoding="utf-8")
            os.replace(temporary, file)
        return file.read_text(encoding="utf-8")


Opener = Callable[[Run, int], Service]


class TensorBoard:
    """Event files in the run's own folder: `tensorboard --logdir RUN`."""

    def __init__(self, run: Run, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.where = f"tensorboard --logdir {run.folder.parent}"
        # what an earlier part of the run wrote of this step and later ones is going to happen again
        self.writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=step)

    def log(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self, failed: bool) -> None:
        self.writer.close()


class Wandb:
    """Weights & Biases, in the project that WANDB_PROJECT names; `wandb login`, or WANDB_MODE=offline, before."""

    def __init__(self, run: Run, step: int) -> None:
        import wandb

        # nothing is asked at the terminal; what the run prints, and its command line, stay here
        settings = wandb.Settings(silent=True, console="off", x_disable_meta=True, init_timeout=20)
        wandb.setup(settings)
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            id=run.identity("wandb", lambda: uuid.uuid4().hex),
            resume="allow",
            dir=str(run.folder),
            config=run.settings,
            settings=settings,
        )
        self.where = f"wandb sync {self.run.settings.sync_dir}" if self.run.offline else str(self.run.url)
        # a resumed run tells some updates again, which its own count of lines would refuse
        self.run.define_metric("update")
        self.run.define_metric("*", step_metric="update")

    def log(self, step: int, metrics: Metrics) -> None:
        self.run.log({**metrics, "update": step})

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class Trackio:
    """Trackio, in the project that TRACKIO_PROJECT names, on this machine unless TRACKIO_SPACE_ID says otherwise."""

    def __init__(self, run: Run, step: int) -> None:
        import trackio

        self.where = ""  # it says so itself
        self.run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=run.identity("trackio", lambda: f"{run.name}-{uuid.uuid4().hex[:8]}"),
            resume="allow",
            space_id=os.environ.get("TRACKIO_SPACE_ID"),
            config=run.settings,
        )

    def log(self, step: int, metrics: Metrics) -> None:
        self.run.log(dict(metrics), step=step)

    def close(self, failed: bool) -> None:
        self.run.finish()


class Mlflow:
    """MLflow, in the experiment that MLFLOW_EXPERIMENT_NAME names, where MLFLOW_TRACKING_URI says."""

    LONGEST = 250  # characters of a parameter's value, and
    MOST = 100  # parameters in one request, that every server takes

    def __init__(self, run: Run, step: int) -> None:
        from mlflow import MlflowClient

        self.where = ""
        self.client = MlflowClient()
        self.id = run.identity("mlflow", lambda: self._begun(run))
        self.client.update_run(self.id, status="RUNNING")

    def _begun(self, run: Run) -> str:
        from mlflow.entities import Param

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self.client.get_experiment_by_name(name)
        where = found.experiment_id if found else self.client.create_experiment(name)
        made: str = self.client.create_run(where, run_name=run.name).info.run_id
        told = [Param(key, str(value)[: self.LONGEST]) for key, value in run.settings.items()]
        for at in range(0, len(told), self.MOST):
            self.client.log_batch(made, params=told[at : at + self.MOST])
        return made

    def log(self, step: int, metrics: Metrics) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        named = {re.sub(r"[^\w.:/ -]", "_", name): value for name, value in metrics.items()}
        self.client.log_batch(self.id, metrics=[Metric(name, value, now, step) for name, value in named.items()])

    def close(self, failed: bool) -> None:
        self.client.set_terminated(self.id, "FAILED" if failed else "FINISHED")


class Function:
    """A function of the user's, called with (step, metrics) for every line."""

    where = ""

    def __init__(self, function: Callable[[int, dict[str, float]], Any]) -> None:
        self.function = function

    def log(self, step: int, metrics: Metrics) -> None:
        self.function(step, dict(metrics))

    def close(self, failed: bool) -> None:
        """Nothing to do: it is told of lines alone."""


SERVICES: dict[str, Opener] = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio, "mlflow": Mlflow}


def opener(name: str) -> Opener:
    """What opens the service. InputError where it is none, its package is missing, or the function is not there."""
    file, colon, function = name.rpartition(":")
    if colon and file.endswith(".py"):
        made = Function(_function(Path(file), function))
        return lambda run, step: made
    if name not in SERVICES:
        raise InputError(f"track: {name!r} is not one; choose from {', '.join(SERVICES)}, file.py:function")
    if importlib.util.find_spec(name) is None:
        raise InputError(f"track: {name} is not installed; pip install {name}, or leave it out of track")
    return SERVICES[name]


def _function(file: Path, name: str) -> Callable[[int, dict[str, float]], Any]:
    spec = importlib.util.spec_from_file_location(f"prefopt_track_{file.stem}", file)
    if spec is None or spec.loader is None or not file.is_file():
        raise InputError(f"track: {file}: no such file; give a function as file.py:function")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's own file raises
        raise InputError(f"track: {file} cannot be loaded: {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise InputError(f"track: {file} has no function {name!r}; it is called with (step, metrics)")
    return found


class Sender:
    """One service, and the thread that tells it. told, sent: lines so far. open: takes the first line's step."""

    def __init__(self, name: str, open: Callable[[int], Service], say: Callable[[str], None]) -> None:
        self.name, self.open, self.say = name, open, say
        self.lines: deque[tuple[int, dict[str, float]]] = deque()
        self.told = self.sent = 0
        self.why = ""
        self.ending = self.failed = False
        self.change = threading.Condition()
        self.thread = threading.Thread(target=self._work, daemon=True, name=f"prefopt-track-{name}")

    def put(self, step: int, metrics: Metrics) -> None:
        """Hand over a line; it is left out where too many wait."""
        with self.change:
            self.told += 1
            if len(self.lines) < ROOM:
                self.lines.append((step, dict(metrics)))
            self.change.notify()
        if self.told == 1:
            self.thread.start()

    def end(self, failed: bool) -> None:
        """Nothing more comes. failed: the run ended by an error."""
        with self.change:
            self.ending, self.failed = True, failed
            self.change.notify()

    def wait(self, seconds: float) -> None:
        """Give it so long for what it still has, and say what it did not get."""
        if not self.told:
            return
        self.thread.join(max(seconds, 0.0))
        if left := self.told - self.sent:
            why = self.why or "it takes too long"
            self.say(f"track: {self.name} did not get {left:,} of {self.told:,} lines ({why}); metrics.jsonl has all")
        elif self.thread.is_alive():
            self.say(f"track: {self.name} got every line and is still at work; it is not waited for")

    # -- in the thread

    def _work(self) -> None:
        service: Service | None = None
        while line := self._next():
            service = service or self._opened(line[0])
            if service is None:
                return
            self.sent += self._tried(service.log, *line)
        if service is not None:
            self._tried(service.close, self.failed)

    def _next(self) -> tuple[int, dict[str, float]] | None:
        """The line that has waited longest; None once there are no more to come."""
        with self.change:
            self.change.wait_for(lambda: self.lines or self.ending)
            return self.lines.popleft() if self.lines else None

    def _opened(self, step: int) -> Service | None:
        """The service, tried again and again while lines wait; None where it cannot be opened before the run ends."""
        while True:
            try:
                service = self.open(step)
                if service.where:
                    self.say(f"track: {self.name}: {service.where}")
                return service
            except BaseException as error:  # whatever a library does, training goes on; Ctrl-C never comes here
                self._complain(error)
            if self.ending:
                return None
            with self.change:
                self.change.wait_for(lambda: self.ending, PAUSE)

    def _tried(self, call: Callable[..., None], *given: Any) -> bool:
        try:
            call(*given)
            return True
        except BaseException as error:
            self._complain(error)
            return False

    def _complain(self, error: BaseException) -> None:
        """Say what is wrong, the first time."""
        first = not self.why
        self.why = discreet(" ".join(f"{type(error).__name__}: {error}".split())[:300])
        if first:
            self.say(f"track: {self.name} fails ({self.why}); training goes on, and metrics.jsonl has every line")


class Trackers:
    """The services of a run. InputError, before anything is loaded, where one cannot be had here at all."""

    def __init__(
        self, names: Sequence[str], out: Path, settings: Mapping[str, Any], say: Callable[[str], None]
    ) -> None:
        self.run = Run(out.resolve().name, (out / FOLDER).resolve(), dict(settings))
        self.senders = [Sender(name, partial(opener(name), self.run), say) for name in dict.fromkeys(names)]

    def listen(self, step: int, metrics: Metrics) -> None:
        """Hand the metrics of an update or an evaluation to all of them."""
        for sender in self.senders:
            sender.put(step, metrics)

    def forget(self) -> None:
        """Begin anew: the services shall not take this run for an earlier one in the same folder."""
        shutil.rmtree(self.run.folder, ignore_errors=True)

    def close(self, failed: bool) -> None:
        """Wait a little for what was not sent yet, and say what never will be."""
        for sender in self.senders:
            sender.end(failed)
        until = time.monotonic() + LAST
        for sender in self.senders:
            sender.wait(until - time.monotonic())
