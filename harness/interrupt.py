"""How a run ends before its last epoch: by a signal, or at a time limit."""

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

from harness import distributed, errors
from harness.text import duration

STOPPED_BY_TIME = 3  # exit status
# Seconds within which the same request to stop may come twice: torchrun passes on what a terminal has sent to all
# processes already, and a notebook's Stop goes both to a command that a cell runs and to its group of processes.
TORCHRUN_ECHO, ECHO = 3.0, 0.5


class Stopped(Exception):
    """The run ends before its last epoch; the arguments are the reason and the exit status."""


class Interrupt:
    """Notes SIGINT and SIGTERM for the end of the step, and watches the time limit.

    `max_minutes`: 0 means no limit; counted from when this object is created.
    """

    def __init__(self, max_minutes: float, world: int) -> None:
        self.max_minutes, self.world, self.received, self._came = max_minutes, world, 0, -math.inf
        self.deadline = time.monotonic() + (max_minutes * 60 or math.inf)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Meanwhile a signal is noted, and only a second one ends the process at once (in a session: the command).

        A signal that is ignored, as a shell has Ctrl-C ignored for background jobs, stays ignored.

        Outside the main thread, where Python allows no handler, signals keep their current effect.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {
            number: signal.signal(number, self._on_signal)
            for number in (signal.SIGINT, signal.SIGTERM)
            if signal.getsignal(number) is not signal.SIG_IGN
        }
        try:
            yield
        finally:
            if self.world == 1:  # an echo may reach one of torchrun's processes seconds later
                time.sleep(max(0.0, self._came + ECHO - time.monotonic()))
                for number, handler in before.items():
                    signal.signal(number, handler or signal.SIG_DFL)

    def _on_signal(self, number: int, _: Any) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._came = number, now
        elif now > self._came + (ECHO if self.world == 1 else TORCHRUN_ECHO):
            if errors.in_a_session():  # the process is the notebook's or the prompt's, with all that it holds
                raise KeyboardInterrupt
            errors.die_of(number)
            os._exit(128 + number)

    def stop_if_signalled(self, epoch_in_flight: bool = True) -> None:
        """Raise Stopped if a signal has come."""
        if self.received:
            lost = "; the epoch in flight is dropped" if epoch_in_flight else ""
            raise Stopped(f"{signal.Signals(self.received).name} received{lost}", 128 + self.received)

    def shortage(self, seconds: float) -> str:
        """What to say before the first epoch, which is trained in any case, if one takes `seconds`; "" if it fits."""
        if time.monotonic() + seconds <= self.deadline:
            return ""
        return f"an epoch takes {duration(seconds)}, more than --max-minutes {self.max_minutes:g} leaves: one is run"

    def stop_if_out_of_time(self, seconds: float) -> None:
        """Raise Stopped if an epoch of `seconds`, or of what any other process expects, would end too late.

        None of several processes goes on before the leader has committed the epoch.
        """
        if distributed.max_over_ranks(time.monotonic() + seconds > self.deadline):
            raise Stopped(f"another epoch would overrun --max-minutes {self.max_minutes:g}", STOPPED_BY_TIME)

    @contextlib.contextmanager
    def before_peer_loss(self) -> Iterator[None]:
        """If others are lost after a signal came, stop for the signal: it may have ended them a step earlier."""
        try:
            yield
        except distributed.PeerLost:
            self.stop_if_signalled()
            raise
