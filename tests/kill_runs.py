#!/usr/bin/env python3
"""Kill training runs at every point of their lives, continue them, and compare what they leave with a run left alone.

    python3 tests/kill_runs.py                # 60 kills at random moments of real runs, then at each step of writing
    python3 tests/kill_runs.py --tries 300    # more of the former

`test_faults.py` runs a short form of both. Everything happens on the CPU with one thread, in a temporary folder.
"""

import argparse
import itertools
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from processes import ROOT, RUNS, TINY, run, tiny
from run_contents import differences

from harness import checkpoint

# kills at every step of every write


def _name(path: Path) -> str:
    """A file's name, without what makes a temporary file's unique."""
    return re.sub(r"\.[0-9a-f]{8}\.tmp$", ".tmp", path.name)


class Points:
    """Counts the states that writing leaves a disk in, one after the other, and kills the process in the n-th.

    They are: a file half written, written whole, renamed, removed. What was killed is noted in the file `log`.
    """

    def __init__(self, kill_at: int, log: Path) -> None:
        self.kill_at, self.log, self.passed = kill_at, log, 0

    def __call__(self) -> None:
        """Watch this process."""
        Path.write_bytes = self._watched(Path.write_bytes, "writing")
        Path.write_text = self._watched(Path.write_text, "writing")
        os.replace = self._watched(os.replace, "renaming")
        Path.unlink = self._watched(Path.unlink, "removing")

    def _watched(self, original: Callable, what: str) -> Callable:
        def replacement(*args: Any, **kwargs: Any) -> Any:
            paths = [arg for arg in args if isinstance(arg, Path)]
            missing = what == "removing" and not paths[0].exists()
            result = original(*args, **kwargs)
            what_and_where = " ".join([what, *map(_name, paths)])
            if what == "writing":
                self._halve(paths[0], f"half-way of {what_and_where}")
            if not missing:
                self._pass(f"after {what_and_where}")
            return result

        return replacement

    def _halve(self, path: Path, moment: str) -> None:
        with path.open("r+b") as file:
            content = file.read()
            file.truncate(len(content) // 2)
            self._pass(moment)
            file.seek(0)
            file.write(content)

    def _pass(self, moment: str) -> None:
        self.passed += 1
        if self.passed == self.kill_at:
            with self.log.open("w", encoding="utf-8") as file:
                file.write(moment)
            os.kill(os.getpid(), signal.SIGKILL)


def kill_at_points(folder: Path, argv: Sequence[str], reference: Path, points: Iterable[int]) -> Counter:
    """Kill one run at the n-th point of each process, for each n in `points`; start another whenever one is finished.

    Returns how often what was interrupted. Raises AssertionError where a run is not the `reference` in the end.
    """
    killed: Counter = Counter()
    log, moment, number = folder / "log", folder / "moment", 0
    folder.mkdir()

    def finish(out: Path) -> None:
        assert run([*argv, "--out", str(out)], log, tiny) == 0, log.read_text()
        assert not differences(out, reference), (moment.read_text(), differences(out, reference))

    rows = 0
    for point in points:
        out = folder / str(number) / reference.name
        status = run([*argv, "--out", str(out)], log, tiny, Points(point, moment))
        if status == -signal.SIGKILL:
            killed[moment.read_text()] += 1
            state, warning = checkpoint.resume(out)
            left = len(state["rows"]) if state else 0
            assert warning is None and left >= rows, f"{moment.read_text()}: {rows} epochs before, {left} after"
            rows = left
        else:
            finish(out)
            number, rows = number + 1, 0
    finish(folder / str(number) / reference.name)
    return killed


# kills at random moments of real runs


def command(flags: Sequence[str], data_dir: Path, out: Path) -> list[str]:
    """The command line of a real run."""
    return [sys.executable, str(ROOT / "train.py"), *flags, "--data-dir", str(data_dir), "--out", str(out)]


def start(argv: Sequence[str], log: Path) -> subprocess.Popen:
    """Start a real run whose output is added to `log`."""
    with log.open("ab") as file:
        return subprocess.Popen(argv, stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"})


def kill_at_random(folder: Path, flags: Sequence[str], kills: int, chance: random.Random) -> Counter:
    """Kill real runs `kills` times, at moments spread evenly over their whole lives, and continue each to its end.

    Returns how often what was interrupted. Raises AssertionError where a run is not what one left alone is.
    """
    folder.mkdir()
    reference, log = folder / "reference" / "run", folder / "log"
    life = _seconds(start(command(flags, folder, reference), log), None, log)
    killed: Counter = Counter()
    number = 0
    while (so_far := killed.total()) < kills:
        out = folder / str(number) / "run"
        delay: float | None = life * (so_far + chance.random()) / kills
        while not (seconds := _seconds(start(command(flags, folder, out), log), delay, log)):
            killed[_phase(out)] += 1
            delay = life * chance.random() if chance.random() < 1 / 2 and killed.total() < kills else None
        if killed.total() == so_far:  # it ended before its time: the machine has less to do than before
            life = seconds
        assert not differences(out, reference), differences(out, reference)
        number += 1
    return killed


def _seconds(process: subprocess.Popen, limit: float | None, log: Path) -> float:
    """How long a process takes to end well; 0 where it has not after `limit` seconds and is killed."""
    began = time.monotonic()
    try:
        status = process.wait(limit)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return 0.0
    text = log.read_text(encoding="utf-8")
    assert status == 0 and "Traceback" not in text, f"status {status}\n{text}"
    return time.monotonic() - began


def _phase(out: Path) -> str:
    """What a killed run was about."""
    if not (out / "config.json").exists():
        return "start-up"
    writing = sorted(map(_name, out.glob(".*.tmp")))
    if writing:
        return f"writing {writing[0]}"
    state, _ = checkpoint.resume(out)
    return f"after {len(state['rows']) if state else 0} epochs"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tries", type=int, default=60, metavar="N", help="kills at random moments (default: 60)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of those moments (default: 0)")
    asked = parser.parse_args(argv)
    chance = random.Random(asked.seed)
    with tempfile.TemporaryDirectory() as temporary:
        for number, (name, flags) in enumerate(RUNS.items()):
            folder = Path(temporary) / str(number)
            folder.mkdir()
            began = time.monotonic()
            killed = kill_at_random(folder / "random", flags, (asked.tries + number) // len(RUNS), chance)
            report(f"{name}: killed at random moments", killed, time.monotonic() - began)
            began, argv = time.monotonic(), [*flags, *TINY]
            reference = folder / "reference" / "run"
            assert run([*argv, "--out", str(reference)], folder / "log", tiny) == 0, (folder / "log").read_text()
            killed = Counter()
            for point in itertools.count(1):
                new = kill_at_points(folder / f"point{point}", argv, reference, [point])
                if not new:
                    break
                killed += new
            report(f"{name}: killed at each step of each write", killed, time.monotonic() - began)
    return 0


def report(title: str, killed: Counter, seconds: float) -> None:
    """Print how often what was interrupted."""
    print(f"{title}: {killed.total()} times, lost: 0 ({seconds:.0f} seconds)")
    for what, count in sorted(killed.items()):
        print(f"  {count:4} {what}", flush=True)


if __name__ == "__main__":
    import kill_runs  # under the name by which the server knows its functions

    sys.exit(kill_runs.main())
