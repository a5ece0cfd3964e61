"""Runs that are killed, stopped, or meet a bad disk; `kill_runs.py` is the long form of the first."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import kill_runs
import pytest
from processes import RUNS, TINY, before, limit_files, run, send, tiny
from run_contents import differences

import optim
import train
from harness import checkpoint, files, machine, plots, scoring
from harness.interrupt import STOPPED_BY_TIME
from harness.run_folder import RunFolder

ARGV = {name: [*flags, *TINY] for name, flags in RUNS.items()}
ONE = ARGV["restarts, adam"]
STEP = train.Trainer.step  # two an epoch, five epochs


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each kind that nothing has happened to, made when it is first asked for."""

    class Runs(dict):
        def __missing__(self, name: str) -> Path:
            folder = tmp_path_factory.mktemp("reference") / "run"
            log = folder.parent / "log"
            assert run([*ARGV[name], "--out", str(folder)], log, tiny) == 0, log.read_text()
            self[name] = folder
            return folder

    return Runs()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def out(tmp_path: Path) -> list[str]:
    return ["--out", str(tmp_path / "run")]


def rows(folder: Path) -> int:
    """Epochs that a run folder holds; whatever it holds is whole."""
    state, warning = checkpoint.resume(folder)
    assert warning is None
    return len(state["rows"]) if state else 0


def says(log: Path, *words: str) -> None:
    """One error line, which contains the words, and no traceback."""
    lines = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in log.read_text(), log.read_text()
    assert all(word in lines[0] for word in words), lines[0]


def continues(folder: Path, reference: dict[str, Path], name: str = "restarts, adam") -> None:
    """The same command again brings the run to the end it would have come to."""
    log = folder.parent / "continued"
    assert run([*ARGV[name], "--out", str(folder)], log, tiny) == 0, log.read_text()
    assert differences(folder, reference[name]) == []


# killed


@pytest.mark.parametrize(
    ("name", "points"),
    [("cosine, sgd, averaged", range(1, 34, 11))]
    + [pytest.param(name, range(1 + i, 34, 3), marks=pytest.mark.slow) for i, name in enumerate(RUNS)],
)
def test_kill_in_writing(name: str, points: range, reference: dict[str, Path], tmp_path: Path) -> None:
    killed = kill_runs.kill_at_points(tmp_path / "runs", ARGV[name], reference[name], points)
    assert killed.total() >= len(points) - 2, killed


@pytest.mark.parametrize("tries", [3, pytest.param(8, marks=pytest.mark.slow)])
def test_kill_at_random_moments(tries: int, reference: dict[str, Path], tmp_path: Path, log: Path) -> None:
    name, chance, folder, kills = "cosine, sgd, averaged", random.Random(tries), tmp_path / "run", 0
    while kills < tries:
        kill = partial(signal.setitimer, signal.ITIMER_REAL, chance.uniform(0.05, 0.8))  # SIGALRM: no clean-up either
        before_it = rows(folder)
        if run([*ARGV[name], "--out", str(folder)], log, tiny, kill) == -signal.SIGALRM:
            kills += 1
            assert rows(folder) >= before_it
        else:
            continues(folder, reference, name)
            shutil.rmtree(folder)
    continues(folder, reference, name)


@pytest.mark.parametrize("point", [1, 2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4))])
def test_kill_while_overwriting(point: int, reference: dict[str, Path], out: list[str], tmp_path: Path) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    shutil.copytree(reference["cosine, sgd, averaged"], folder)
    watch = kill_runs.Points(point, tmp_path / "moment")
    assert run([*ONE, *out, "--overwrite"], log, tiny, watch) == -signal.SIGKILL
    steps = ("removing previous.pt", "renaming last.pt .overwritten.pt", "removing best.pt", "removing stage1.pt")
    assert (tmp_path / "moment").read_text() == f"after {steps[point - 1]}"
    assert rows(folder) == (4 if point == 1 else 0)
    if point == 1:
        assert run([*ONE, *out], log, tiny) == 1
        says(log, "holds a run with other settings")
        assert run([*ONE, *out, "--overwrite"], log, tiny) == 0
    continues(folder, reference)


def test_overwrite_leaves_other_files_alone(reference: dict, out: list[str], tmp_path: Path, log: Path) -> None:
    shutil.copytree(reference["restarts, adam"], tmp_path / "run")
    foreign = [tmp_path / "run" / name for name in ("notes.txt", "own.png", ".own.tmp")]
    for path in foreign:
        path.write_text("kept")
    (tmp_path / "run" / ".views-stage3.png.tmp").write_text("left by a kill")
    assert run([*ONE, *out, "--overwrite", "--seed", "1"], log, tiny) == 0, log.read_text()
    assert not (tmp_path / "run" / ".views-stage3.png.tmp").exists()
    assert [path.read_text() for path in foreign] == ["kept"] * 3
    assert rows(tmp_path / "run") == 5


# stopped


MOMENTS = [(STEP, 1, 0), (STEP, 6, 2), (checkpoint.commit, 3, 3), (scoring.logits, 3, 3)]
SIGNALS = [signal.SIGINT, signal.SIGTERM] * 2


@pytest.mark.parametrize(
    ("moment", "call", "epochs", "number"),
    [(*moment, number) for moment, number in zip(MOMENTS, SIGNALS, strict=True)]
    + [
        pytest.param(*moment, number, marks=pytest.mark.slow)
        for moment, number in zip(MOMENTS, reversed(SIGNALS), strict=True)
    ],
)
def test_signal(
    number: int, moment: Callable, call: int, epochs: int, reference: dict[str, Path], out: list[str], log: Path
) -> None:
    folder = Path(out[1])
    assert run([*ONE, *out], log, tiny, partial(before, moment, call, partial(send, number))) == 128 + number
    text = log.read_text()
    assert f"{signal.Signals(number).name} received" in text and "the same command continues" in text
    assert ("the epoch in flight is dropped" in text) == (moment is STEP)
    assert "Traceback" not in text and rows(folder) == epochs
    assert (folder / "accuracy.png").exists() == (epochs > 0)
    continues(folder, reference)


def test_second_signal_ends_at_once(reference: dict[str, Path], out: list[str], log: Path) -> None:
    both = partial(send, signal.SIGTERM, signal.SIGINT, apart=0.6)  # or the second would pass for an echo
    assert run([*ONE, *out], log, tiny, partial(before, STEP, 4, both)) == -signal.SIGINT
    assert log.read_text().splitlines()[-1].startswith("epoch 1/5")
    continues(Path(out[1]), reference)


def test_signal_while_finishing_changes_nothing(reference: dict[str, Path], out: list[str], log: Path) -> None:
    finish = partial(before, RunFolder.finish, 1, partial(send, signal.SIGTERM))
    assert run([*ONE, *out], log, tiny, finish) == 0
    assert differences(Path(out[1]), reference["restarts, adam"]) == []


@pytest.mark.parametrize("moment", [machine.start_machine, optim.build_optimizer, RunFolder.resume])
def test_interrupted_before_the_first_step(
    moment: Callable, reference: dict[str, Path], out: list[str], log: Path
) -> None:
    status = run([*ONE, *out], log, tiny, partial(before, moment, 1, partial(send, signal.SIGINT)))
    assert status in (-signal.SIGINT, 130) and "Traceback" not in log.read_text()
    continues(Path(out[1]), reference)


def test_interrupted_while_loading_torch(tmp_path: Path) -> None:
    command = kill_runs.command(ONE, tmp_path, tmp_path / "run")
    not_ignored = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # as these tests may be, in the background
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, preexec_fn=not_ignored, **pipes) as process:
        maps, deadline = Path(f"/proc/{process.pid}/maps"), time.monotonic() + 60
        while "libtorch" not in maps.read_text() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.communicate()[0] == b"" and process.returncode == -signal.SIGINT
    assert list(tmp_path.iterdir()) == []


def test_time_limit(reference: dict[str, Path], out: list[str], log: Path) -> None:
    assert run([*ONE, *out, "--max-minutes", "0.0001"], log, tiny) == STOPPED_BY_TIME
    assert "--max-minutes 0.0001" in log.read_text() and rows(Path(out[1])) == 1
    continues(Path(out[1]), reference)


# the disk


@pytest.mark.parametrize(
    ("moment", "call", "size", "names", "epochs"),
    [
        pytest.param(checkpoint.commit, 1, 50_000, "last.pt", 0, marks=pytest.mark.slow),
        (checkpoint.commit, 3, 50_000, "last.pt", 2),
        (checkpoint.save_weights, 1, 20_000, "best.pt", 1),
        pytest.param(files.write_text, 1, 100, "config.json", 0, marks=pytest.mark.slow),
        (files.write_text, 3, 100, "metrics.csv", 2),
        (files.write_text, 7, 100, "summary.json", 5),
    ],
)
def test_full_disk(
    moment: Callable, call: int, size: int, names: str, epochs: int, reference: dict, out: list[str], log: Path
) -> None:
    assert run([*ONE, *out], log, tiny, partial(before, moment, call, partial(limit_files, size))) == 1
    says(log, f"{out[1]}/{names}", "File too large")
    if names == "last.pt" and epochs:
        says(log, f"a copy of {out[1]}, given as --out, goes on after epoch {epochs}")
    assert rows(Path(out[1])) == epochs and list(Path(out[1]).glob(".*.tmp")) == []
    continues(Path(out[1]), reference)


@pytest.mark.parametrize(
    ("moment", "name"), [(RunFolder.finish, "accuracy.png"), (plots.sample_sheet, "views-stage1.png")]
)
def test_full_disk_while_plotting(moment: Callable, name: str, out: list[str], log: Path) -> None:
    full = partial(before, moment, 1, partial(limit_files, 100))
    argv = [*ONE, *out, "--epochs", "1", "0"]
    assert run(argv, log, partial(tiny, pictures=True), full) == 1
    says(log, f"{out[1]}/{name}", "File too large")
    assert rows(Path(out[1])) == (1 if name == "accuracy.png" else 0)
    assert run(argv, log, partial(tiny, pictures=True)) == 0


@pytest.fixture
def mounted(tmp_path: Path) -> Path:
    """A file system of one megabyte of our own."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path) -> None:
    with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def make_read_only(folder: Path) -> None:
    """Mount a folder over itself read-only: it cannot be remounted while the run has its lock file open."""
    subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)


def test_disk_that_fills(mounted: Path, reference: dict[str, Path], log: Path) -> None:
    folder = mounted / "run"
    assert run([*ONE, "--out", str(folder)], log, tiny, partial(before, STEP, 3, partial(fill, mounted))) == 1
    says(log, f"{folder}/last.pt", "No space left on device")
    assert rows(folder) == 1 and list(folder.glob(".*.tmp")) == []
    (mounted / "filler").unlink()
    continues(folder, reference)


def test_disk_that_becomes_read_only(mounted: Path, reference: dict[str, Path], log: Path) -> None:
    argv = [*ONE, "--out", str(mounted / "run")]
    assert run(argv, log, tiny, partial(before, STEP, 3, partial(make_read_only, mounted))) == 1
    says(log, f"{mounted}/run/last.pt", "Read-only file system")
    assert run(argv, log, tiny) == 1
    says(log, f"{mounted}/run", "Read-only file system")
    assert run([*ONE, "--out", str(mounted / "new")], log, tiny) == 1
    says(log, f"{mounted}/new", "Read-only file system")
    subprocess.run(["umount", str(mounted)], check=True)
    continues(mounted / "run", reference)


def test_folder_that_disappears(out: list[str], log: Path) -> None:
    assert run([*ONE, *out], log, tiny, partial(before, STEP, 3, partial(shutil.rmtree, out[1]))) == 1
    says(log, f"{out[1]}/last.pt", "No such file or directory")


def test_file_in_place_of_the_folder(out: list[str], log: Path) -> None:
    Path(out[1]).write_text("kept")
    assert run([*ONE, *out], log, tiny) == 1
    says(log, out[1], "File exists")
    assert run([*ONE, "--out", f"{out[1]}/below"], log, tiny) == 1
    says(log, f"{out[1]}/below", "Not a directory")
    assert Path(out[1]).read_text() == "kept"


@pytest.mark.parametrize("mode", [0o555, 0o000])
def test_folder_of_someone_else(mode: int, open_folder: Path, log: Path) -> None:
    folder = open_folder / "run"
    folder.mkdir()
    folder.chmod(mode)
    become_nobody = [partial(os.setuid, 65534)] if os.getuid() == 0 else []
    assert run([*ONE, "--out", str(folder)], log, tiny, *become_nobody) == 1
    says(log, str(folder), "Permission denied")
    folder.chmod(0o755)
    assert list(folder.iterdir()) == []


# other runs, outputs and places


def test_two_runs_in_one_folder(out: list[str], log: Path) -> None:
    folder = Path(out[1])
    folder.mkdir()
    with files.locked(folder, wait=False):
        assert run([*ONE, *out], log, tiny) == 1
        says(log, "another run is using", out[1])
    assert [path.name for path in folder.iterdir()] == [files.LOCK_FILE]
    assert run([*ONE, *out], log, tiny, partial(before, STEP, 1, partial(send, signal.SIGKILL))) == -signal.SIGKILL
    with files.locked(folder, wait=False):
        pass


# holds the folder that is named, on a file system without locks, and ends as by SIGKILL
WITHOUT_LOCKS = """
import errno, fcntl, os, sys
from pathlib import Path
def flock(*_):
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
fcntl.flock = flock
from harness.files import locked
with locked(Path(sys.argv[1]), wait=False):
    os._exit(9)
"""


def test_a_killed_run_leaves_no_lock_where_the_file_system_has_none(tmp_path: Path) -> None:
    for _ in range(2):
        command = [sys.executable, "-c", WITHOUT_LOCKS, str(tmp_path)]
        ended = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
        assert ended.returncode == 9, ended.stderr
        assert all(path.read_bytes() == b"" for path in tmp_path.iterdir())  # it names no process that holds it


def onto(path: str, number: int, mode: int = os.O_RDWR) -> None:
    """Let descriptor `number` write to (or read from) a device."""
    os.dup2(os.open(path, mode), number)


def broken_pipe() -> None:
    reader, writer = os.pipe()
    os.dup2(writer, 1)
    os.close(reader)


@pytest.mark.parametrize(
    ("prepare", "cause"),
    [
        (partial(onto, "/dev/full", 1), "No space left on device"),
        (broken_pipe, "Broken pipe"),
        (partial(onto, os.devnull, 1, os.O_RDONLY), "Bad file descriptor"),
    ],
)
def test_output_that_takes_nothing(prepare: partial, cause: str, reference: dict, out: list[str], log: Path) -> None:
    assert run([*ONE, *out], log, tiny, prepare) == 1
    says(log, "cannot write the output", cause)
    continues(Path(out[1]), reference)


def close(name: str) -> None:
    setattr(sys, name, None)  # as Python does where the descriptor is closed


@pytest.mark.parametrize("name", ["stdout", "stderr", pytest.param("stdin", marks=pytest.mark.slow)])
def test_stream_closed_from_the_start(name: str, reference: dict, out: list[str], log: Path) -> None:
    assert run([*ONE, *out], log, tiny, partial(close, name)) == 0, log.read_text()
    assert differences(Path(out[1]), reference["restarts, adam"]) == []


def test_another_place_and_umask(tmp_path: Path, reference: dict[str, Path], log: Path) -> None:
    place = tmp_path / "ein Ordner — 目録"
    place.mkdir()
    prepare = (partial(os.chdir, place), partial(os.umask, 0o027))
    assert run([*ONE, "--out", "läufe/a b/run"], log, tiny, *prepare) == 0, log.read_text()
    folder = place / "läufe" / "a b" / "run"
    assert differences(folder, reference["restarts, adam"]) == []
    written = [path for path in folder.iterdir() if path.name != files.LOCK_FILE]  # which old filelocks make readable
    assert {path.stat().st_mode & 0o777 for path in written} == {0o640}
    assert folder.stat().st_mode & 0o777 == 0o750
