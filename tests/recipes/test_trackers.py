"""Tracking services that work, fail, hang and come back; what is sent to them, and what is said of the rest."""

from __future__ import annotations

import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest

from prefopt.recipes import trackers
from prefopt.recipes.trackers import Sender, Trackers
from prefopt.records import InputError

SETTINGS = {"objective": "dpo", "beta": 0.1}
LINES = [(0, {"eval/loss": 0.7}), (1, {"loss": 0.6}), (2, {"loss": 0.5})]


class Seen:
    """A service that keeps what it is told. fails: the first calls that raise; holds: waits before every call."""

    where = ""

    def __init__(self, fails: int = 0, holds: threading.Event | None = None) -> None:
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.fails, self.holds, self.ended = fails, holds, []

    def log(self, step: int, metrics: Any) -> None:
        if self.holds:
            self.holds.wait(60)
        if self.fails:
            self.fails -= 1
            raise ConnectionError("no route to https://user:Planted-Secret@host/x")
        self.lines.append((step, dict(metrics)))

    def close(self, failed: bool) -> None:
        self.ended.append(failed)


def told(open_service: Any, lines: Any = LINES, seconds: float = 10.0) -> list[str]:
    """What is said of a service that is told these lines."""
    said: list[str] = []
    sender = Sender("fake", open_service, said.append)
    for line in lines:
        sender.put(*line)
    sender.end(failed=False)
    sender.wait(seconds)
    return said


def test_every_line_arrives_in_order_and_the_service_is_closed() -> None:
    seen = Seen()
    assert told(lambda step: seen) == []
    assert (seen.lines, seen.ended) == (LINES, [False])


def test_lines_that_fail_are_warned_of_once_and_counted_at_the_end() -> None:
    seen = Seen(fails=2)
    first, last = told(lambda step: seen)
    assert first.startswith("track: fake fails (ConnectionError: ") and "training goes on" in first
    assert "did not get 2 of 3 lines" in last and "metrics.jsonl has all" in last
    assert seen.lines == LINES[2:]
    assert "Planted-Secret" not in first + last


def test_a_service_that_hangs_holds_up_nobody_and_is_left_at_the_end() -> None:
    holds = threading.Event()
    [said] = told(lambda step: Seen(holds=holds), seconds=0.05)
    holds.set()
    assert said == "track: fake did not get 3 of 3 lines (it takes too long); metrics.jsonl has all"


def test_lines_wait_for_a_service_that_comes_up_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "PAUSE", 0.001)
    seen, tries, up, said = Seen(), [], threading.Event(), []

    def opened(step: int) -> Seen:
        tries.append(step)
        if len(tries) < 3:
            raise OSError("down")
        up.set()
        return seen

    sender = Sender("fake", opened, said.append)
    for line in LINES:
        sender.put(*line)
    assert up.wait(10)
    sender.end(failed=False)
    sender.wait(10)
    assert len(said) == 1 and "OSError: down" in said[0]
    assert seen.lines == LINES and tries == [0, 0, 0]


def test_a_service_that_never_comes_up_is_said_twice_at_most() -> None:
    def opened(step: int) -> Any:
        raise SystemExit("a library that gives up")

    first, last = told(opened)
    assert "SystemExit" in first and "did not get 3 of 3 lines" in last


def test_what_waits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "ROOM", 5)
    holds, seen, said = threading.Event(), Seen(), []

    def opened(step: int) -> Seen:
        holds.wait(60)
        return seen

    sender = Sender("fake", opened, said.append)
    for step in range(20):
        sender.put(step, {"loss": 1.0})
        assert len(sender.lines) <= 5
    holds.set()
    sender.end(failed=True)
    sender.wait(10)
    assert len(seen.lines) in (5, 6) and seen.ended == [True]
    assert f"did not get {20 - len(seen.lines)} of 20 lines" in said[-1]


# ---------------------------------------------------------------- the services themselves, by stand-ins


def module(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    made = types.ModuleType(name)
    made.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]  # find_spec looks for one
    vars(made).update(content)
    monkeypatch.setitem(sys.modules, name, made)


def twice(name: str, out: Path) -> None:
    """A run, and what it is after a resume."""
    for part in (LINES[:2], LINES[2:]):
        tracked = Trackers([name], out, SETTINGS, lambda text: pytest.fail(text) if "fail" in text else None)
        for line in part:
            tracked.listen(*line)
        tracked.close(failed=False)


def test_wandb_is_given_the_run_again_after_a_resume(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    begun: list[dict[str, Any]] = []
    logged: list[dict[str, float]] = []
    run = types.SimpleNamespace(
        define_metric=lambda *names, **how: None,
        log=logged.append,
        offline=False,
        url="https://w",
        finish=lambda **how: 0,
    )
    module(
        monkeypatch,
        "wandb",
        init=lambda **given: begun.append(given) or run,
        setup=lambda settings: None,
        Settings=lambda **given: given,
    )
    twice("wandb", tmp_path / "run")
    assert begun[0]["id"] == begun[1]["id"] and begun[0]["resume"] == "allow"
    assert begun[0]["config"] == SETTINGS and begun[0]["name"] == "run"
    assert logged == [{**metrics, "update": step} for step, metrics in LINES]
    # its command line may hold secrets, and the program's output is not its own
    assert begun[0]["settings"]["x_disable_meta"] and begun[0]["settings"]["console"] == "off"


def test_trackio_is_given_the_run_again_after_a_resume(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    begun: list[dict[str, Any]] = []
    logged: list[tuple[dict[str, float], int]] = []
    run = types.SimpleNamespace(log=lambda metrics, step: logged.append((metrics, step)), finish=lambda: None)
    module(monkeypatch, "trackio", init=lambda **given: begun.append(given) or run)
    twice("trackio", tmp_path / "run")
    assert begun[0]["name"] == begun[1]["name"] and begun[0]["resume"] == "allow"
    assert logged == [(metrics, step) for step, metrics in LINES]


def test_mlflow_is_given_the_run_again_after_a_resume(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[tuple[Any, ...]] = []

    class Client:
        def get_experiment_by_name(self, name: str) -> None:
            return None

        def create_experiment(self, name: str) -> str:
            return "7"

        def create_run(self, where: str, run_name: str) -> Any:
            calls.append(("create", where, run_name))
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r-1"))

        def update_run(self, run: str, status: str) -> None:
            calls.append(("update", run, status))

        def log_batch(self, run: str, **what: Any) -> None:
            calls.append(("batch", run, what))

        def set_terminated(self, run: str, status: str) -> None:
            calls.append(("end", run, status))

    module(monkeypatch, "mlflow", MlflowClient=Client)
    module(
        monkeypatch, "mlflow.entities", Param=lambda *of: of, Metric=lambda name, value, when, step: (name, value, step)
    )
    twice("mlflow", tmp_path / "run")
    assert [call for call in calls if call[0] == "create"] == [("create", "7", "run")]
    assert {call[1] for call in calls if call[0] != "create"} == {"r-1"}
    sent = [metric for call in calls if call[0] == "batch" for metric in call[2].get("metrics", [])]
    assert sent == [(name, value, step) for step, metrics in LINES for name, value in metrics.items()]
    assert calls[-1] == ("end", "r-1", "FINISHED")


def test_tensorboard_hides_what_a_resumed_run_tells_again(tmp_path: Path) -> None:
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for begin in (0, 4):
        tracked = Trackers(["tensorboard"], tmp_path, SETTINGS, lambda text: None)
        for step in range(begin, 6):
            tracked.listen(step, {"loss": float(begin + step)})
        tracked.close(failed=False)
    events = reading.EventAccumulator(str(tmp_path / "tracking" / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert found == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 8), (5, 9)]


def test_a_run_that_begins_anew_is_another_one_to_the_services(tmp_path: Path) -> None:
    tracked = Trackers([], tmp_path, SETTINGS, print)
    first = tracked.run.identity("wandb", lambda: "one")
    assert (first, tracked.run.identity("wandb", lambda: "two")) == ("one", "one")
    tracked.forget()
    assert tracked.run.identity("wandb", lambda: "two") == "two"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("wandbb", "track: 'wandbb' is not one; choose from tensorboard, wandb, trackio, mlflow, file.py:function"),
        ("missing.py:send", "missing.py: no such file"),
        ("broken.py:send", "cannot be loaded: ZeroDivisionError"),
        ("fine.py:sent", "has no function 'sent'"),
    ],
)
def test_what_cannot_be_told_is_refused_at_once(
    name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.py").write_text("1 / 0")
    Path("fine.py").write_text("def send(step, metrics): ...")
    with pytest.raises(InputError, match=f".*{said}.*"):
        Trackers([name], tmp_path, SETTINGS, print)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="mlflow is not installed; pip install mlflow"):
        Trackers(["mlflow"], tmp_path, SETTINGS, print)
