"""Tests of signals: which ones stop a run, and which ones are passed on to other handlers after the run is saved."""

import signal
from collections.abc import Iterator

import pytest

from moe.runs.signals import Interrupted, Signals


@pytest.fixture
def received() -> Iterator[list[int]]:
    """Install a batch system's handler for SIGUSR2 and return the list of signals that it receives."""
    numbers: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: numbers.append(number))
    yield numbers
    signal.signal(signal.SIGUSR2, before)


def test_a_batch_systems_handler_receives_its_signal_after_the_run_has_stopped(received: list[int]) -> None:
    with pytest.raises(Interrupted, match="stopped by SIGUSR2 before it trained") as stop, Signals():
        signal.raise_signal(signal.SIGUSR2)
    assert received == []
    stop.value.pass_on()
    assert received == [signal.SIGUSR2]


def test_sigterm_is_not_passed_on_and_sigusr_signals_without_a_handler_are_left_alone(received: list[int]) -> None:
    with Signals():
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    with pytest.raises(Interrupted, match="stopped by SIGTERM") as stop, Signals():
        signal.raise_signal(signal.SIGTERM)
    stop.value.pass_on()
    assert received == []
    assert stop.value.exit_status == 143


@pytest.mark.parametrize("order", [(signal.SIGTERM, signal.SIGUSR2), (signal.SIGUSR2, signal.SIGTERM)])
def test_with_sigterm_and_a_batch_systems_signal_the_latter_is_recorded(
    received: list[int], order: tuple[int, int]
) -> None:
    with Signals() as signals:
        signals.training = True
        for number in order:
            signal.raise_signal(number)
    assert signals.received == signal.SIGUSR2


def test_another_sigterm_leaves_time_to_write_the_end_of_a_run() -> None:
    """Linux sends one for each thread of a parent that is killed."""
    with Signals() as signals:
        with pytest.raises(Interrupted, match="stopped by SIGTERM"):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signals.received == signal.SIGTERM
