"""How a run ends before its last epoch: by a signal, or at a time limit."""

import contextlib
import math
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

from harness import distributed

STOPPED_BY_TIME = 3  # exit status
ECHO = 3.0  # seconds in which torchrun passes on what a terminal has sent to all processes already


class Stopped(Exception):
    """The run ends before its last epoch; the arguments are the reason and the exit status."""


class Interrupt:
    """Notes SIGINT and SIGTERM for the end of the step, and watches the time limit.

    `max_minutes`: 0 is no limit; counted from when this is made. Signals are noted from `listen` on.
    """

    def __init__(self, max_minutes: float, world: int) -> None:
        self.max_minutes, self.world, self.received, self._came = max_minutes, world, 0, math.inf
        self.deadline = time.monotonic() + (max_minutes * 60 or math.inf)

    def listen(self) -> None:
        """From now on a signal is noted, and only a second one ends the process at once."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _: Any) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._came = number, now
        elif self.world == 1 or now > self._came + ECHO:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def stop_if_signalled(self) -> None:
        """Raise Stopped if a signal has come."""
        if self.received:
            name = signal.Signals(self.received).name
            raise Stopped(f"{name} came; the epoch in flight is dropped", 128 + self.received)

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
