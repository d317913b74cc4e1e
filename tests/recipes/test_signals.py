"""The first signal asks a run to stop, and what signals did before it does again afterwards."""

from __future__ import annotations

import signal
import threading

import pytest

from prefopt.recipes.signals import EXIT_CODE, Paused, Signals

BOTH = [signal.SIGTERM, signal.SIGINT]


@pytest.mark.parametrize("number", BOTH)
def test_the_first_signal_asks_and_says_so(number):
    said: list[str] = []
    with Signals(said.append) as signals:
        assert not signals.asked
        signal.raise_signal(number)
        assert signals.asked == number.name
    assert said == [f"{number.name}: stopping after this update, with a checkpoint; once more to stop at once"]


@pytest.mark.parametrize("first", BOTH)
def test_the_second_one_does_what_it_did_before(first):
    taken: list[int] = []
    before = {number: signal.signal(number, lambda number, frame: taken.append(number)) for number in BOTH}
    try:
        with Signals(lambda text: None):
            signal.raise_signal(first)
            assert taken == []
            for number in BOTH:
                signal.raise_signal(number)
            assert taken == BOTH
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("asked", [False, True])
def test_afterwards_signals_are_what_they_were(asked):
    before = [signal.getsignal(number) for number in BOTH]
    with pytest.raises(ZeroDivisionError), Signals(lambda text: None):
        if asked:
            signal.raise_signal(signal.SIGTERM)
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in BOTH] == before


def test_elsewhere_than_in_the_main_thread_nothing_is_taken():
    before = signal.getsignal(signal.SIGTERM)
    found: list[object] = []

    def work() -> None:
        with Signals(lambda text: None) as signals:
            found.extend([signal.getsignal(signal.SIGTERM), signals.asked])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before, ""]


def test_paused_is_an_exit_with_75_and_words():
    with pytest.raises(SystemExit) as error:
        raise Paused("stopped after update 3 of 9.")
    assert error.value.code == EXIT_CODE == 75 and str(error.value) == "stopped after update 3 of 9."
