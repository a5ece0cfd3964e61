#!/usr/bin/env python3
"""Kill training runs at every point of their lives, continue them, and compare what they leave with a run left alone.

    python3 tests/faults.py                # 60 kills at random moments of real runs, then one at every step of a write
    python3 tests/faults.py --tries 300    # more of the former

`test_faults.py` runs a short form of both. Everything happens on the CPU with one thread, in a temporary folder.
"""

import argparse
import contextlib
import csv
import functools
import hashlib
import importlib
import itertools
import json
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import checkpoint  # noqa: E402
import dataset  # noqa: E402
import demo  # noqa: E402
import errors  # noqa: E402
import plots  # noqa: E402

import data  # noqa: E402
import train  # noqa: E402

CLOCK = ("seconds", "samples_per_second")
SMALL = "--demo --threads 1 --layers 1 1 1 --planes 4 4 4 --crop-size 32 32 --eval-size 32 32".split()
RECIPES = {
    "restarts, adam": [*SMALL, "--epochs", "3", "2", "--cycle", "2", "--batch", "64", "32"],
    "cosine, sgd, averaged": [*SMALL, "--planes", "4", "4", "30", "--epochs", "2", "2", "--lr", "0.05", "0.02"]
    + "--optimizer sgd --schedule cosine --average 0.9 --no-decay-norms --label-smoothing 0.1 --mixup 0.2".split(),
    "cosine, muon, wide": [*SMALL, "--epochs", "2", "2", "--lr", "0.05", "0.02", "--network", "wide"]
    + "--optimizer muon --schedule cosine --average 0.9 --no-decay-norms".split(),
}
TINY = ("--batch", "16", "16")  # after a recipe's flags: for the 32 training images of `tiny`

Prepare = Callable[[], object]


# what a run leaves


def remains(folder: Path) -> dict[str, Any]:
    """All that must be the same in two runs: weights, optimiser state, rows, pictures … but no times."""
    found = {}
    for name in ("last.pt", "previous.pt", "best.pt"):
        if (folder / name).exists():
            found |= flat(checkpoint.load(folder / name), name)
    with open(folder / "metrics.csv", encoding="utf-8", newline="") as file:
        found |= flat(list(csv.DictReader(file)), "metrics.csv")
    found |= flat(json.loads((folder / "summary.json").read_text(encoding="utf-8")), "summary.json")
    found |= {path.name: path.read_bytes() for path in folder.glob("*.png")}
    return found | {"files": sorted(path.name for path in folder.iterdir())}


def flat(value: Any, name: str) -> dict[str, Any]:
    if isinstance(value, torch.Tensor):
        return {name: (value.dtype, value.shape, value.contiguous().flatten().view(torch.uint8).numpy().tobytes())}
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        parts = [flat(part, f"{name}/{key}") for key, part in items if key not in CLOCK]
        return functools.reduce(dict.__or__, parts, {f"{name}/": len(value)})
    return {name: value}


def tensors(value: Any) -> list[torch.Tensor]:
    """All tensors in nested dicts and lists."""
    if isinstance(value, dict | list | tuple):
        parts = value.values() if isinstance(value, dict) else value
        return [tensor for part in parts for tensor in tensors(part)]
    return [value] if isinstance(value, torch.Tensor) else []


def hashes(folder: Path, pattern: str = "*") -> dict[str, str]:
    """MD5 of each file in a folder, to see that none has changed."""
    return {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.glob(pattern) if path.is_file()}


def differences(folder: Path, reference: Path) -> list[str]:
    """Names of what differs between two finished runs."""
    ours, theirs = remains(folder), remains(reference)
    return sorted(name for name in ours | theirs if ours.get(name) != theirs.get(name))


# runs in processes forked from one that has PyTorch loaded


def run(argv: Sequence[str], log: Path, *prepare: Prepare) -> int:
    """Train in a process of its own after calling `prepare` there. Returns its status, negative if a signal ended it.

    What it prints goes into `log`, which begins anew. After two minutes it is ended by SIGALRM.
    """
    server = _server()
    pickle.dump((list(argv), log, prepare), server.stdin)
    server.stdin.flush()
    return int(server.stdout.readline())


@functools.cache
def _server() -> subprocess.Popen:
    """A process that has PyTorch loaded and one thread only, so that it may be forked."""
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "import faults; faults.serve()"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)


def serve() -> None:
    """Fork a process for each request on stdin, one after the other, and print how it ended, until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(EOFError):
        while True:
            argv, log, prepare = pickle.load(sys.stdin.buffer)
            reader, writer = os.pipe()  # rather than a file, on which a child's limits would bear
            child = os.fork()
            if not child:
                _train(argv, writer, prepare)
            os.close(writer)
            with open(reader, "rb") as output:
                log.write_bytes(output.read())
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _train(argv: list[str], output: int, prepare: Iterable[Prepare]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.alarm(120)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    status = 99
    try:
        for function in prepare:
            function()
        status = errors.report(functools.partial(train.main, argv))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def tiny(pictures: bool = False) -> None:
    """Train on 32 and validate on 8 of the demo's pictures: half a second. A plot's file holds its title only."""
    torch.set_num_threads(1)
    images, labels = demo.draw("train", 5)
    classes = torch.from_numpy(labels).long() - 1
    found = data.DataSet(torch.from_numpy(images.swapaxes(2, 3).copy()), classes, demo.DEMO_CLASSES)
    parts = data.split_indices(found.labels)
    dataset.load = lambda *_: (found, *parts)
    if not pictures:
        plots.Figure.savefig = lambda figure, path, **_: path.write_text(figure.get_suptitle())


def before(name: str, call: int, action: Prepare) -> None:
    """Have `action` happen before the `call`-th call, from 1, of `module.function` or `module.Class.method`."""
    module, *owners, attribute = name.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    original, calls = getattr(owner, attribute), 0

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            action()
        return original(*args, **kwargs)

    setattr(owner, attribute, replacement)


def limit_files(size: int) -> None:
    """Let no file grow beyond `size` bytes: what writes more meets an error, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def send(*numbers: int) -> None:
    """Send signals to this process."""
    for number in numbers:
        os.kill(os.getpid(), number)


# kills at every step of every write


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
            what_and_where = " ".join([what, *(path.name for path in paths)])
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
    writing = sorted(path.name for path in out.glob(".*.tmp"))
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
        for number, (name, flags) in enumerate(RECIPES.items()):
            folder = Path(temporary) / str(number)
            folder.mkdir()
            began = time.monotonic()
            killed = kill_at_random(folder / "random", flags, (asked.tries + number) // len(RECIPES), chance)
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
    import faults  # under the name by which the server knows its functions

    sys.exit(faults.main())
