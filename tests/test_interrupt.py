"""How a run is stopped: by real signals to this process or one forked from it, and by a clock that the tests set."""

import contextlib
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator

import pytest

from harness import interrupt
from harness.distributed import PeerLost
from harness.interrupt import STOPPED_BY_TIME, Interrupt, Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Stands for the module `time`, and stands still."""
    clock = types.SimpleNamespace(now=1000.0)
    clock.monotonic, clock.sleep = (lambda: clock.now), (lambda seconds: None)
    monkeypatch.setattr(interrupt, "time", clock)
    return clock


@pytest.fixture(autouse=True)
def handlers_restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("ipykernel", "IPython"):  # another test may have loaded them
        monkeypatch.delitem(sys.modules, name, raising=False)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@contextlib.contextmanager
def listening(world: int = 1) -> Iterator[Interrupt]:
    either = Interrupt(0.0, world)
    with either.listening():
        yield either


def signals(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


def ended_by(work: Callable[[], None]) -> int:
    """How a process ends in `work`: 0 at its end, 1 by an exception, -n by signal n."""
    child = os.fork()
    if not child:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_noted_and_stops_the_run_when_it_is_asked_for(number: int, status: int):
    with listening() as either:
        either.stop_if_signalled()
        signals(number)
        with pytest.raises(Stopped) as stop:
            either.stop_if_signalled()
    reason, code = stop.value.args
    assert reason.startswith(f"{signal.Signals(number).name} received") and code == status


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
def test_a_second_signal_ends_the_process_at_once(first: int, second: int, clock: types.SimpleNamespace):
    def work() -> None:
        with listening():
            signals(first)
            clock.now += 0.6
            signals(second)

    assert ended_by(work) == -second


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    "world, seconds, ended",
    [(1, 0.0, 0), (1, 0.4, 0), (2, 0.0, 0), (2, 2.9, 0), (2, 3.1, -signal.SIGINT)],
)
def test_the_echo_of_a_signal_is_none(world: int, seconds: float, ended: int, clock: types.SimpleNamespace):
    """Torchrun's, and in a single process a notebook's."""

    def work() -> None:
        with listening(world):
            signals(signal.SIGINT)
            clock.now += seconds
            signals(signal.SIGINT)

    assert ended_by(work) == ended


def test_a_second_stop_ends_a_notebook_s_cell_and_not_its_kernel(clock: types.SimpleNamespace, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    with listening():
        signals(signal.SIGINT)
        clock.now += 0.6
        with pytest.raises(KeyboardInterrupt):
            signals(signal.SIGINT)


def test_a_run_leaves_the_handlers_as_they_were():
    before = [signal.getsignal(number) for number in SIGNALS]
    for _ in range(2):
        with listening() as either:
            signals(signal.SIGINT)
            with pytest.raises(Stopped):
                either.stop_if_signalled()
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_an_echo_that_comes_when_the_run_has_ended_is_still_one(clock: types.SimpleNamespace):
    """The end waits for the rest of the half second; what comes meanwhile is an echo."""
    waited = []

    def work() -> None:
        clock.sleep = lambda seconds: (waited.append(seconds), signals(signal.SIGINT))
        with listening():
            signals(signal.SIGINT)
            clock.now += 0.2
        assert waited == [pytest.approx(0.3)]

    assert ended_by(work) == 0


def test_outside_the_main_thread_signals_are_left_alone():
    before, there = [signal.getsignal(number) for number in SIGNALS], []

    def work() -> None:
        with listening():
            there.extend(signal.getsignal(number) for number in SIGNALS)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert there == before


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
    with listening(world=2) as either:
        with pytest.raises(PeerLost), either.before_peer_loss():
            raise PeerLost("gone")
        signals(signal.SIGTERM)
        with pytest.raises(Stopped), either.before_peer_loss():
            raise PeerLost("gone")
        with pytest.raises(ValueError), either.before_peer_loss():
            raise ValueError("another matter")


def test_what_a_shell_has_ignored_stays_ignored() -> None:
    """As for a run in the background, whose terminal's Ctrl-C is meant for another one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with listening() as either:
        signals(signal.SIGINT)
        assert either.received == 0
        signals(signal.SIGTERM)
        assert either.received == signal.SIGTERM
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_torchruns_echo_may_come_when_the_run_has_ended(clock: types.SimpleNamespace):
    def work() -> None:
        with listening(world=2):
            signals(signal.SIGINT)
        clock.now += 2.9
        signals(signal.SIGINT)

    assert ended_by(work) == 0
