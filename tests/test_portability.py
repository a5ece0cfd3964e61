"""Machines that are not a bare Linux shell without a GPU: an emulated CUDA device, a notebook's kernel, Windows."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from test_distributed import LOOPBACK

PROJECT = Path(__file__).parents[1]
COMMANDS = ("train", "evaluate", "predict", "export", "compare", "benchmark")
TINY = "--demo --epochs 2 1 --crop-size 32 32 --eval-size 32 40 --batch 32 32 --planes 4 4 8 --threads 1".split()
CLOCKS = ("seconds", "samples_per_second")
# Python without the modules that only POSIX systems have
WITHOUT_POSIX = """
import sys
for name in ("fcntl", "resource", "pwd", "grp", "termios", "tty"):
    sys.modules[name] = None
"""
# runs the script that is named next
SCRIPT = """
import runpy, sys
sys.path.insert(0, "")
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# asks each command that is named for its help, in a process of its own, forked when PyTorch has been imported
HELP = """
import os, runpy, sys
import torch
sys.path.insert(0, "")
commands = {}
for command in sys.argv[1:]:
    commands[child := os.fork()] = command
    if not child:
        sys.argv = [f"{command}.py", "--help"]
        runpy.run_path(sys.argv[0], run_name="__main__")
ends = [os.wait() for _ in commands]
sys.exit(", ".join(commands[child] for child, status in ends if status) or 0)
"""


def python(*arguments: object, program: str = "", **environment: str) -> subprocess.CompletedProcess:
    """Run Python in the project's folder, by `program` where one is given."""
    command = [*([program] if program else []), sys.executable, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True)


def rows(run: Path) -> list[dict[str, str]]:
    with open(run / "metrics.csv", newline="") as file:
        return [{key: value for key, value in row.items() if key not in CLOCKS} for row in csv.DictReader(file)]


@pytest.mark.slow
def test_a_card_s_rows_are_the_cpu_s_in_every_digit(emulated_card: str, tmp_path: Path):
    flags = [*TINY, "--precision", "fp32", "--no-compile", "--data-dir", tmp_path]
    for device, program in (("cpu", ""), ("cuda", emulated_card)):
        done = python("train.py", *flags, "--device", device, "--out", tmp_path / device, program=program)
        assert done.returncode == 0, done.stderr
    assert '"device": "cuda:0"' in (tmp_path / "cuda" / "config.json").read_text()
    assert rows(tmp_path / "cuda") == rows(tmp_path / "cpu") != []


START = """
from harness import cli, machine
m = machine.start_machine(cli.Runtime())
print(m.device, m.precision, m.compile)
"""
OLDER_BUILD = "import torch; torch.cuda.get_arch_list = lambda: ['sm_50', 'sm_60']"  # as of PyTorch for CUDA 12


@pytest.mark.slow
@pytest.mark.parametrize(
    "capability, precision, compiled, build",
    [
        ("90", "torch.bfloat16", True, ""),
        ("75", "torch.float16", True, ""),
        ("61", "torch.float32", False, OLDER_BUILD),
    ],
    ids=["90", "75", "61"],
)
def test_a_card_s_generation_decides_precision_and_compilation(
    emulated_card: str, capability: str, precision: str, compiled: bool, build: str
):
    done = python("-c", build + START, program=emulated_card, FAKE_CUDA_CAPABILITY=capability)
    said = done.stdout.splitlines()
    assert said[-1].split() == ["cuda:0", precision, str(compiled)], done.stderr
    assert compiled == (said[0] == said[-1]) and (compiled or "cards below capability 7.0" in said[0])


@pytest.mark.slow
def test_a_card_without_kernels_is_refused_in_a_sentence(emulated_card: str, tmp_path: Path):
    done = python("train.py", "--demo", "--out", tmp_path / "run", program=emulated_card, FAKE_CUDA_CAPABILITY="35")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    refusal = done.stderr.splitlines()[-1]
    assert refusal.startswith("error: ") and "has no kernels for a card of capability 3.5" in refusal
    assert "--device cpu" in refusal and not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_commands_start_where_a_notebook_names_a_backend_that_is_not_installed():
    done = python("-c", HELP, *COMMANDS, MPLBACKEND="module://not_installed_here.backend_inline")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("usage:") == len(COMMANDS)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_commands_start_without_the_modules_of_posix():
    done = python("-c", WITHOUT_POSIX + HELP, *COMMANDS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage:") == len(COMMANDS)


@pytest.mark.slow
def test_a_run_goes_from_drawing_to_plots_without_the_modules_of_posix(tmp_path: Path):
    done = python("-c", WITHOUT_POSIX + SCRIPT, "train.py", *TINY, "--data-dir", tmp_path, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "accuracy.png").exists()
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    for command, flags in {
        "evaluate": [],
        "predict": [tmp_path / "red.png", "--sheet", tmp_path / "sheet.png"],
        "export": ["--format", "weights", "--out", tmp_path / "export"],
        "compare": [],
    }.items():
        done = python("-c", WITHOUT_POSIX + SCRIPT, f"{command}.py", tmp_path / "run", *flags)
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_two_cards_rows_are_those_of_two_cpu_processes(emulated_card: str, tmp_path: Path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    flags = [*TINY, "--precision", "fp32", "--no-compile", "--data-dir", tmp_path]
    for device, program in (("cpu", ""), ("cuda", emulated_card)):
        place = {"FAKE_CUDA_DEVICES": "2", **LOOPBACK}
        command = [*torchrun, *flags, "--device", device, "--out", tmp_path / device]
        done = python(*command, program=program, **place)
        assert done.returncode == 0, done.stderr
    assert '"device": "cuda:0"' in (tmp_path / "cuda" / "config.json").read_text()
    assert rows(tmp_path / "cuda") == rows(tmp_path / "cpu") != []
