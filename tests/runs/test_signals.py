"""Which signals ask a run to stop, and who hears of them once it is saved."""

import signal
from collections.abc import Iterator

import pytest

from moe.runs.signals import Interrupted, Signals


@pytest.fixture
def heard() -> Iterator[list[int]]:
    """SIGUSR2 as it came to a batch system's own handler."""
    numbers: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: numbers.append(number))
    yield numbers
    signal.signal(signal.SIGUSR2, before)


def test_a_batch_systems_handler_hears_of_its_signal_after_the_run(heard: list[int]) -> None:
    with pytest.raises(Interrupted, match="stopped by SIGUSR2 before it trained") as stop, Signals():
        signal.raise_signal(signal.SIGUSR2)
    assert heard == []
    stop.value.pass_on()
    assert heard == [signal.SIGUSR2]


def test_no_other_signal_is_passed_on_and_none_is_taken_that_nobody_handles(heard: list[int]) -> None:
    with Signals():
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    with pytest.raises(Interrupted, match="stopped by SIGTERM") as stop, Signals():
        signal.raise_signal(signal.SIGTERM)
    stop.value.pass_on()
    assert heard == []
    assert stop.value.exit_status == 143


@pytest.mark.parametrize("order", [(signal.SIGTERM, signal.SIGUSR2), (signal.SIGUSR2, signal.SIGTERM)])
def test_beside_sigterm_a_batch_systems_signal_counts(heard: list[int], order: tuple[int, int]) -> None:
    with Signals() as signals:
        signals.training = True
        for number in order:
            signal.raise_signal(number)
    assert signals.received == signal.SIGUSR2
