"""Training in processes forked from one that has PyTorch loaded, and what can be made to happen in them."""

import contextlib
import functools
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

import train  # noqa: E402
from data import DataSet, Split, split_indices  # noqa: E402
from harness import demo_shapes, errors  # noqa: E402
from harness.images import load_images  # noqa: E402

SMALL = "--demo --threads 1 --precision fp32 --layers 1 1 1 --planes 4 4 4 --crop-size 32 32 --eval-size 32 32".split()
RUNS = {  # flags of runs that differ in what they keep
    "restarts, adam": [*SMALL, "--epochs", "3", "2", "--cycle", "2", "--batch", "64", "32"],
    "cosine, sgd, averaged": [*SMALL, "--planes", "4", "4", "30", "--epochs", "2", "2", "--lr", "0.05", "0.02"]
    + "--optimizer sgd --schedule cosine --average 0.9 --no-decay-norms --label-smoothing 0.1 --mixup 0.2".split(),
    "cosine, muon, wide": [*SMALL, "--epochs", "2", "2", "--lr", "0.05", "0.02", "--network", "wide"]
    + "--optimizer muon --schedule cosine --average 0.9 --no-decay-norms --precision bf16".split(),
}
TINY = ("--batch", "16", "16")  # after a run's flags: for the 32 training images of `tiny`

Prepare = Callable[[], object]


def run(argv: Sequence[str], log: Path, *prepare: Prepare) -> int:
    """Train in a process of its own after calling `prepare` there. Returns its status, negative if a signal ended it.

    What it prints goes into `log`, which begins afresh. After two minutes it is ended by SIGALRM.
    """
    server = _server()
    pickle.dump((list(argv), log, prepare), server.stdin)
    server.stdin.flush()
    return int(server.stdout.readline())


def environment() -> dict[str, str]:
    """That of a process which imports the program and these helpers, and has one thread."""
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


@functools.cache
def _server() -> subprocess.Popen:
    """A process that has PyTorch loaded and one thread only, so that it may be forked."""
    command = [sys.executable, "-c", "import processes; processes.serve()"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment())


def serve() -> None:
    """Fork a process for each request on stdin, one after the other, and print how it ended, until stdin ends."""
    errors.before_imports()  # as a command does: without it a bar's lock needs a process from Python 3.14 on
    torch.optim.SGD([torch.zeros(1)])  # the first optimiser loads a thousand modules
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
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # as they would be of a process that begins with these
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)
    status = 99
    try:
        for function in prepare:
            function()
        status = errors.report(functools.partial(train.main, argv))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


# what is prepared there


def tiny(pictures: bool = False) -> None:
    """Train on 32 and validate on 8 of the demo's pictures: half a second. A plot's file holds its title only."""
    torch.set_num_threads(1)
    dataset = DataSet(*demo_shapes.draw_shapes("train", 5), demo_shapes.DEMO_CLASSES)
    parts = split_indices(dataset.labels)
    replace(load_images, lambda *_: Split(dataset, *parts))
    if not pictures:
        Figure.savefig = lambda figure, path, **_: path.write_text(figure.get_suptitle())


def before(function: Callable, call: int, action: Prepare) -> None:
    """Have `action` happen before the `call`-th call, from 1, of a function or method of the program."""
    calls = 0

    @functools.wraps(function)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            action()
        return function(*args, **kwargs)

    replace(function, replacement)


def replace(function: Callable, replacement: Callable) -> None:
    """Put another in the place of a function or method, in every module that has it under its name."""
    *owner, name = function.__qualname__.split(".")
    if owner:
        holders = [functools.reduce(getattr, owner, sys.modules[function.__module__])]
    else:
        modules = list(sys.modules.values())
        holders = [module for module in modules if getattr(module, "__dict__", {}).get(name) is function]
    assert holders, f"{function} is nowhere"
    for holder in holders:
        setattr(holder, name, replacement)


def limit_files(size: int) -> None:
    """Let no file grow beyond `size` bytes: what writes more meets an error, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def send(*numbers: int, apart: float = 0.0) -> None:
    """Send signals to this process, so many seconds apart."""
    for number in numbers:
        os.kill(os.getpid(), number)
        time.sleep(apart)
