"""What a command meets before and beside its work: Ctrl-C, odd terminals and environments, and too little memory."""

import ast
import errno
import importlib.util
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from harness import checkpoint, errors
from harness.errors import is_out_of_memory
from harness.text import printable, table, width

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ROOT / "weights" / "cpu-long-seed0.pt"
COMMANDS = ("evaluate", "predict", "export", "compare", "benchmark")


def command(name: str, *arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / f"{name}.py"), *arguments]


def one_line(stderr: str) -> str:
    """The only error line, of an output without a traceback."""
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in stderr, stderr
    return lines[0]


# Ctrl-C


@pytest.mark.parametrize("name", COMMANDS)
def test_interrupted_while_loading_torch(name: str, tmp_path: Path) -> None:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    not_ignored = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # as these tests may be, in the background
    with subprocess.Popen(command(name, "--help"), cwd=tmp_path, preexec_fn=not_ignored, **pipes) as process:
        maps, deadline = Path(f"/proc/{process.pid}/maps"), time.monotonic() + 60
        while "libtorch" not in maps.read_text() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.communicate()[0] == b"" and process.returncode == -signal.SIGINT
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ("train", *COMMANDS))
def test_an_older_python_is_one_line(name: str) -> None:
    code = f"import runpy, sys; sys.version_info = (3, 10, 12); runpy.run_path('{name}.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert one_line(done.stderr) == "error: this needs Python 3.11 or newer, but this is 3.10; use another environment"


@pytest.mark.parametrize(
    "file",
    [*(f"{name}.py" for name in ("train", *COMMANDS)), *(f"harness/{n}.py" for n in ("__init__", "errors", "text"))],
)
def test_an_older_python_can_read_as_far_as_that(file: str) -> None:
    ast.parse((ROOT / file).read_text(encoding="utf-8"), feature_version=(3, 8))


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("before", [signal.SIG_DFL, signal.default_int_handler])
def test_interrupted_later(before, capsys: pytest.CaptureFixture) -> None:
    kept = signal.signal(signal.SIGINT, before)
    try:
        assert errors.report(interrupt) == 130
        assert signal.getsignal(signal.SIGINT) is before
    finally:
        signal.signal(signal.SIGINT, kept)
    assert capsys.readouterr().err == "error: interrupted\n"


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_ctrl_c_ends_a_loop_in_the_shell() -> None:
    code = "import time; from harness import errors; "
    code += "errors.end_process(errors.report(lambda: print('begun', flush=True) or time.sleep(60)))"
    loop = f"for seed in 0 1; do {shlex.quote(sys.executable)} -c {shlex.quote(code)}; done"
    shell = subprocess.Popen(
        ["bash", "-c", loop], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # as these tests may be, in the background
    )  # fmt: skip
    assert shell.stdout.readline() == "begun\n"
    os.killpg(shell.pid, signal.SIGINT)
    assert shell.communicate() == ("", "error: interrupted\n")
    assert shell.returncode == -signal.SIGINT


@pytest.mark.parametrize("status, ended", [(130, -signal.SIGINT), (143, -signal.SIGTERM), (3, 3), (0, 0)])
def test_what_a_signal_has_stopped_ends_by_it(status: int, ended: int) -> None:
    code = f"from harness import errors; print('said'); errors.end_process({status})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert (done.returncode, done.stdout) == (ended, "said\n")
    code = "import sys; sys.modules['ipykernel'] = sys; " + code  # a kernel goes on
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert (done.returncode, done.stdout) == (status, "said\n")


def test_a_shell_that_ignores_ctrl_c_is_obeyed() -> None:
    code = "import signal, harness.errors as e; e.before_imports(); print(signal.getsignal(2) is signal.SIG_IGN)"
    shell = f"trap '' INT; exec {shlex.quote(sys.executable)} -c '{code}'"
    result = subprocess.run(["sh", "-c", shell], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "True\n"


# the environment


def test_packages_that_are_missing_are_named_with_the_way_out(monkeypatch, capsys: pytest.CaptureFixture) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("torch", "PIL") else find(name))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as stop:
        errors.before_imports()
    assert stop.value.code == 1
    said = one_line(capsys.readouterr().err)
    assert f"torch and PIL cannot be imported by {sys.executable}: activate" in said and "requirements.txt" in said


@pytest.mark.parametrize(
    ("variable", "value"),
    [("TQDM_MININTERVAL", "abc"), ("TQDM_NCOLS", "wide"), ("TQDM_BAR_FORMAT", "{nothing}"), ("TQDM_MINITERS", "1,5")],
)
def test_tqdm_variables_that_tqdm_cannot_use(variable: str, value: str) -> None:
    """They are read at import, or when the first bar is shown."""
    result = subprocess.run(
        command("predict", "--help"), env=os.environ | {variable: value}, capture_output=True, text=True
    )
    assert result.returncode == 1 and result.stdout == ""
    assert f"{variable} from the environment (" in one_line(result.stderr) and "unset it" in result.stderr


# a GPU that fails, and memory


def test_a_gpu_that_fails_is_a_line_and_a_bug_is_not(capsys: pytest.CaptureFixture) -> None:
    def main(words: str) -> None:
        raise torch.AcceleratorError(f"CUDA error: {words}\nCUDA kernel errors might be asynchronously reported …")

    assert errors.report(partial(main, "uncorrectable ECC error encountered")) == 1
    said = one_line(capsys.readouterr().err)
    assert "the GPU failed (CUDA error: uncorrectable ECC error encountered); start the same command again" in said
    with pytest.raises(torch.AcceleratorError):
        errors.report(partial(main, "device-side assert triggered"))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        torch.AcceleratorError("CUDA error: out of memory"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("FIND was unable to find an engine to execute this computation"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you …"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried to …"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        RuntimeError("could not create a primitive"),
        RuntimeError(
            "Caught RuntimeError in DataLoader worker process 0.\nunable to allocate shared memory(shm) for …"
        ),
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
        RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"),
    ],
)
def test_out_of_memory_is_recognised(error: BaseException, capsys: pytest.CaptureFixture) -> None:
    def main() -> None:
        raise error

    assert is_out_of_memory(error)
    assert errors.report(main) == 1
    said = one_line(capsys.readouterr().err)
    of_a_gpu = type(error) is torch.OutOfMemoryError or any(word in str(error) for word in ("CUDA", "CUDNN", "engine"))
    assert ("the GPU does not have enough memory" if of_a_gpu else "there is not enough memory") in said
    assert ("--device cpu" in said) == of_a_gpu


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("size mismatch for conv1.weight"),
        RuntimeError("could not create a primitive descriptor for a convolution forward propagation primitive"),
        OSError(errno.ENOSPC, "No space left on device"),
        KeyError("out of memory"),
        RuntimeError("No valid triton configs. OutOfResources: out of resource: shared memory, Required: 81920"),
        errors.RunError("out of memory"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    ],
)
def test_other_errors_are_not_of_memory(error: BaseException) -> None:
    assert not is_out_of_memory(error)


def test_windows_own_words_for_too_little_memory_are_known(capsys: pytest.CaptureFixture) -> None:
    """Windows gives that number, which Python translates into EINVAL."""
    error = OSError(errno.EINVAL, "The paging file is too small for this operation to complete")
    error.winerror = 1455
    test_out_of_memory_is_recognised(error, capsys)


def test_a_sessions_own_way_to_stop_a_command_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setenv("MATPLOTLIBRC", os.devnull)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for session in ("ipykernel", "IPython", "ps1", None):
            with monkeypatch.context() as patch:
                for name in ("ipykernel", "IPython"):
                    patch.delitem(sys.modules, name, raising=False)
                if session == "ps1":
                    patch.setattr(sys, "ps1", ">>> ", raising=False)
                elif session:
                    patch.setitem(sys.modules, session, sys)
                errors.before_imports()
                assert signal.getsignal(signal.SIGINT) is (signal.default_int_handler if session else signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_the_allocators_really_raise() -> None:
    for allocate in (lambda: torch.empty(2**60), lambda: bytearray(2**60), lambda: torch.zeros(2**45) + 1):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            allocate()
        assert is_out_of_memory(caught.value)


def test_an_error_that_follows_from_one_of_memory_is_one() -> None:
    """zipfile's: closing the half-written archive fails in its turn."""
    with pytest.raises(ValueError) as caught, io.BytesIO() as file:
        try:
            raise MemoryError
        finally:
            file.close()
            file.write(b"")
    assert is_out_of_memory(caught.value)


def short_of_memory(margins: Sequence[int], *command: object) -> list[tuple[int, str]]:
    """Status and output of a command that may take so many MiB more than PyTorch alone does, for each of `margins`."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, ROOT / "tests" / "short_of_memory.py", ",".join(map(str, margins)), *command]
    done = subprocess.run([str(part) for part in program], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc and a limit on address space")
def test_good_weights_are_not_called_damaged_where_memory_is_short(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    Image.new("RGB", (40, 40)).save(picture)
    outcomes = []
    for status, said in short_of_memory((1, 2, 4, 8, 12, 20, 1000), "predict", WEIGHTS, picture):
        assert "damaged" not in said and "does not fit" not in said and "Traceback" not in said
        outcomes.append((status, "not enough memory" in said))
    assert outcomes[0] == (1, True) and outcomes[-1] == (0, False), outcomes
    assert all(outcome in ((1, True), (0, False)) for outcome in outcomes), outcomes


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc and a limit on address space")
def test_a_run_does_not_fall_back_where_memory_is_short(tmp_path: Path) -> None:
    """A last.pt that cannot be read for lack of memory is not damaged: previous.pt must not take its place."""
    payload = {"kind": "run", "recipe": {}, "epoch": 2, "rows": [], "weights": torch.zeros(4 << 20)}
    checkpoint.save(tmp_path / "last.pt", payload)
    shutil.copy(tmp_path / "last.pt", tmp_path / "previous.pt")
    ((status, said),) = short_of_memory([8], "resume", tmp_path)
    assert status == 1 and "there is not enough memory" in one_line(said)
    assert (tmp_path / "last.pt").exists() and (tmp_path / "previous.pt").exists()


# text


def test_what_cannot_be_printed_is_escaped() -> None:
    assert printable(Path("ü b")) == "ü b" and printable("目録 ×") == "目録 ×"
    names = ["9.41\u202fAM.png", "a\xa0b", "\u06af\u0644\u200c\u0647\u0627", "\U0001f469\u200d\U0001f52c", "\uf022"]
    assert [printable(name) for name in names] == names and width(names[2]) == 4
    assert printable("a\u202egnp.b\u2028") == r"a\u202egnp.b\u2028"
    assert printable(os.fsdecode(b"caf\xe9")) == r"caf\xe9"
    assert printable("a\udce9\x1b[31m\n\ud800") == r"a\xe9\x1b[31m\n\ud800"


def test_columns_align_on_a_terminal() -> None:
    assert [width(text) for text in ("cat", "猫", "cafe\u0301", "ｱ", "Ａ", "👍")] == [3, 2, 4, 1, 2, 2]
    lines = table(["file", "class"], [["a.png", "猫"], ["図.png", "cafe\u0301"]]).splitlines()
    assert [width(line) for line in lines] == [13, 13, 13]
    assert lines[1] == "a.png      猫"


def test_an_error_is_one_line_whatever_the_file_is_called(capsys: pytest.CaptureFixture) -> None:
    def main() -> None:
        raise errors.RunError("cannot read a\nb\x1b[2J\udce9")

    assert errors.report(main) == 1
    assert capsys.readouterr().err == "error: cannot read a\\nb\\x1b[2J\\xe9\n"


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_help_on_any_terminal(encoding: str) -> None:
    result = subprocess.run(
        command("train", "--help"), env=os.environ | {"PYTHONIOENCODING": encoding}, capture_output=True
    )
    assert (result.returncode, result.stderr) == (0, b"") and len(result.stdout.decode(encoding)) > 1000
