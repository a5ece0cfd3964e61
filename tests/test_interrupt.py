"""How a run is stopped: by real signals to this process or one forked from it, and by a clock that the tests set."""

import os
import signal
import types
from collections.abc import Callable

import pytest

from harness import interrupt
from harness.distributed import PeerLost
from harness.interrupt import STOPPED_BY_TIME, Interrupt, Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Stands for the module `time`, and stands still."""
    clock = types.SimpleNamespace(now=1000.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(interrupt, "time", clock)
    return clock


def listening(world: int = 1) -> Interrupt:
    either = Interrupt(0.0, world)
    either.listen()
    return either


def signals(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


def ended_by(work: Callable[[], None]) -> int | None:
    """The signal that ends a process in `work`, or None if it comes to its end."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(0)
    status = os.waitpid(child, 0)[1]
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else None


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_noted_and_stops_the_run_when_it_is_asked_for(number: int, status: int):
    either = listening()
    either.stop_if_signalled()
    signals(number)
    with pytest.raises(Stopped) as stop:
        either.stop_if_signalled()
    reason, code = stop.value.args
    assert reason.startswith(f"{signal.Signals(number).name} came") and code == status


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
def test_a_second_signal_ends_the_process_at_once(first: int, second: int):
    def work() -> None:
        listening()
        signals(first, second)

    assert ended_by(work) == second


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("seconds, ended", [(0.0, None), (2.9, None), (3.1, signal.SIGINT)])
def test_under_torchrun_the_echo_of_a_signal_is_none(seconds: float, ended: int | None, clock: types.SimpleNamespace):
    def work() -> None:
        listening(world=2)
        signals(signal.SIGINT)
        clock.now += seconds
        signals(signal.SIGINT)

    assert ended_by(work) == ended


def test_a_run_stops_before_an_epoch_that_would_end_too_late(clock: types.SimpleNamespace):
    either = Interrupt(2.0, 1)
    clock.now += 100
    either.stop_if_out_of_time(19.9)
    with pytest.raises(Stopped) as stop:
        either.stop_if_out_of_time(20.1)
    assert stop.value.args == ("another epoch would overrun --max-minutes 2", STOPPED_BY_TIME)


def test_without_a_limit_there_is_always_time(clock: types.SimpleNamespace):
    either = Interrupt(0.0, 1)
    clock.now += 1e9
    either.stop_if_out_of_time(1e9)


def test_who_has_a_signal_stops_by_it_rather_than_by_losing_the_others():
    either = listening(world=2)
    with pytest.raises(PeerLost), either.before_peer_loss():
        raise PeerLost("gone")
    signals(signal.SIGTERM)
    with pytest.raises(Stopped), either.before_peer_loss():
        raise PeerLost("gone")
    with pytest.raises(ValueError), either.before_peer_loss():
        raise ValueError("another matter")
