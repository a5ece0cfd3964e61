"""Two processes that train together, on the CPU: against one process, and against runs that nothing happened to."""

import functools
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from pathlib import Path

import picture_folders
import processes
import pytest
import torch
from picture_folders import fill
from processes import ROOT, RUNS, TINY
from run_contents import differences
from torch import nn

import augment
import train
from harness import checkpoint, distributed, errors
from harness.interrupt import Interrupt
from harness.machine import Machine
from harness.run_folder import best_row
from model import build_model
from recipes import RECIPES, Stage, build_network

CONTEXT = multiprocessing.get_context("forkserver")
LIMIT = 100  # seconds
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}  # whatever the host's name leads to
FLAGS = [*RUNS["cosine, sgd, averaged"], *TINY]  # four epochs of two steps
LOST = "has lost the other 1"


@pytest.fixture(scope="module", autouse=True)
def server() -> None:
    """The process that others are forked from: it has PyTorch loaded, and one thread only."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("PYTHONPATH", "OMP_NUM_THREADS"):
            patch.setenv(name, processes.environment()[name])
        CONTEXT.set_forkserver_preload(["processes", "torch._dynamo"])  # the latter is loaded by the first optimiser
        forkserver.ensure_running()


def together(world: int, target: Callable, *arguments: object) -> list[int]:
    """Call `target(rank, *arguments)` in processes as torchrun starts them. Returns their statuses in order of rank."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {"WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    place["TORCHELASTIC_USE_AGENT_STORE"] = True  # so rank 0 does not open one
    processes = [CONTEXT.Process(target=_begin, args=(rank, place, target, arguments)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(LIMIT)
    return [process.exitcode for process in processes]


def _begin(rank: int, place: dict[str, object], target: Callable, arguments: Sequence) -> None:
    signal.alarm(LIMIT)
    torch.set_num_threads(1)
    os.environ |= {name: str(value) for name, value in (place | {"RANK": rank, "LOCAL_RANK": rank}).items()} | LOOPBACK
    target(rank, *arguments)


def _train(rank: int, argv: list[str], log: Path, faulty: dict[int, Sequence[processes.Prepare]]) -> None:
    output = os.open(log.with_name(f"{log.name}{rank}"), os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    processes.tiny()
    for function in faulty.get(rank, ()):
        function()
    status = errors.report(functools.partial(train.main, argv))
    sys.stderr.flush()
    os._exit(status)


def run(
    out: Path, faulty: dict[int, Sequence[processes.Prepare]] | None = None, *more: str, world: int = 2
) -> list[int]:
    """Train into `out`, after calling what `faulty` holds for a rank in its process; each logs into `out`.log RANK."""
    out.parent.mkdir(exist_ok=True)
    return together(world, _train, [*FLAGS, *more, "--out", str(out)], out.with_suffix(".log"), faulty or {})


def log(out: Path, rank: int) -> str:
    return out.with_suffix(f".log{rank}").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two processes to which nothing happened."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert run(out) == [0, 0], log(out, 0) + log(out, 1)
    return out


def test_leaves_what_an_ordinary_run_leaves(whole: Path, tmp_path: Path) -> None:
    ordinary = tmp_path / "run"
    assert run(ordinary, world=1) == [0]
    assert sorted(path.name for path in whole.iterdir()) == sorted(path.name for path in ordinary.iterdir())
    ours, theirs = checkpoint.load(whole / "last.pt"), checkpoint.load(ordinary / "last.pt")
    assert list(ours["model"]) == list(theirs["model"])
    assert ours.keys() == theirs.keys() and len(ours["rows"]) == len(theirs["rows"]) == 4
    assert checkpoint.load_network(whole).epoch == 4
    assert checkpoint.load_network(whole, best=True).epoch == best_row(ours["rows"])["epoch"]
    assert "epoch 4/4" in log(whole, 0) and log(whole, 1) == ""


def at_step(number: int, *actions: processes.Prepare) -> tuple[processes.Prepare, ...]:
    """Have the actions happen in the `number`-th step of the run, from 1."""
    return tuple(functools.partial(processes.before, train.Trainer.step, number, action) for action in actions)


TERM, KILL = (functools.partial(processes.send, number) for number in (signal.SIGTERM, signal.SIGKILL))
TERM_AND_ECHO = functools.partial(processes.send, signal.SIGTERM, signal.SIGTERM, apart=1.0)  # as torchrun passes it on
SMALL_DISK = functools.partial(processes.limit_files, 1000)
FAULTS = {
    "SIGTERM, noticed in different steps": ({0: at_step(4, TERM), 1: at_step(3, TERM)}, [], [143, 143]),
    "SIGTERM, noticed by the leader first": ({0: at_step(3, TERM), 1: at_step(4, TERM)}, [], [143, 143]),
    "SIGTERM while the leader saves and the follower waits": (
        {
            0: (functools.partial(processes.before, checkpoint.save, 1, TERM),),
            1: (functools.partial(processes.before, Interrupt.stop_if_out_of_time, 1, TERM),),
        },
        [],
        [143, 143],
    ),
    "SIGTERM, passed on by torchrun once more": (
        {rank: at_step(4, TERM_AND_ECHO) for rank in (0, 1)},
        [],
        [143, 143],
    ),
    "time limit": ({}, ["--max-minutes", "0.00001"], [3, 3]),
    "leader killed": ({0: at_step(4, KILL)}, [], [-9, 1]),
    "follower killed": ({1: at_step(4, KILL)}, [], [1, -9]),
    "leader killed while saving": (
        {0: (functools.partial(processes.before, checkpoint.save, 3, KILL),)},
        [],
        [-9, 1],
    ),
    "disk full": ({0: at_step(4, SMALL_DISK)}, [], [1, 1]),
}


LONG_FORM = ("noticed by the leader first", "leader saves", "passed on", "leader killed")


@pytest.mark.parametrize(
    "fault",
    [pytest.param(n, marks=[pytest.mark.slow] if any(part in n for part in LONG_FORM) else []) for n in FAULTS],
)
def test_stopped_run_ends_in_all_processes_and_continues_bit_for_bit(fault: str, whole: Path, tmp_path: Path) -> None:
    out, (faulty, flags, statuses) = tmp_path / "run", FAULTS[fault]
    assert run(out, faulty, *flags) == statuses, log(out, 0) + log(out, 1)
    said = [log(out, rank) for rank in (0, 1)]
    assert "Traceback" not in said[0] + said[1]
    for rank, status in enumerate(statuses):
        if status == 1:
            cause = "cannot write" if fault == "disk full" and rank == 0 else LOST
            assert said[rank].splitlines()[-1].startswith("error: ") and cause in said[rank]
    assert 1 <= len(checkpoint.load(out / "last.pt")["rows"]) < 4
    assert run(out) == [0, 0], log(out, 0) + log(out, 1)
    assert differences(out, whole) == []


def test_starting_over_is_one_decision_of_all_processes(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    assert run(out, None, "--overwrite") == [0, 0], log(out, 0) + log(out, 1)
    assert "4 of 4 epochs" not in log(out, 0) and "epoch 1/4" in log(out, 0)
    assert differences(out, whole) == []


def test_all_processes_go_back_to_the_state_before_a_damaged_one(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    os.truncate(out / "last.pt", 1000)
    assert run(out) == [0, 0], log(out, 0) + log(out, 1)
    assert "continuing from the state before it (previous.pt)" in log(out, 0) and log(out, 1) == ""
    assert differences(out, whole) == []


def _spoil_views() -> None:
    processes.replace(augment.normalise, lambda x, inplace=False: x * math.nan)


def _see_no_state() -> None:
    processes.replace(checkpoint.resume, lambda folder: (None, None))


def test_processes_that_see_different_folders_do_not_train_together(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(out, None, "--max-minutes", "0.00001") == [3, 3], log(out, 0) + log(out, 1)
    before = (out / "last.pt").read_bytes()
    assert run(out, {1: (_see_no_state,)}) == [1, 1], log(out, 0) + log(out, 1)
    assert f"{out} is not the same folder for all processes" in log(out, 1)
    assert (out / "last.pt").read_bytes() == before


def _read_other_weights() -> None:
    take = checkpoint.take_weights

    def other(net: nn.Module, source: str) -> checkpoint.TrainedNetwork:
        trained = take(net, source)
        net.fc.bias.data += 1
        return trained

    processes.replace(take, other)


def test_processes_that_read_different_weights_do_not_train_together(whole: Path, tmp_path: Path) -> None:
    out, flags = tmp_path / "run", ["--init", str(whole / "last.pt"), "--seed", "1"]
    assert run(out, {1: (_read_other_weights,)}, *flags) == [1, 1], log(out, 0) + log(out, 1)
    for rank in (0, 1):
        assert "the processes cannot train together, as they have read different weights" in log(out, rank)
    assert not (out / "last.pt").exists()


def _restarted() -> None:
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"


def test_what_torchrun_restarts_goes_on_also_with_overwrite(whole: Path, tmp_path: Path) -> None:
    out, flags = tmp_path / "run", ["--overwrite"]
    assert run(out, {1: at_step(4, KILL)}, *flags) == [1, -9], log(out, 0) + log(out, 1)
    assert len(checkpoint.load(out / "last.pt")["rows"]) == 1
    assert run(out, dict.fromkeys((0, 1), (_restarted,)), *flags) == [0, 0], log(out, 0) + log(out, 1)
    assert "1 of 4 epochs done" in log(out, 0)
    assert differences(out, whole) == []


def test_the_rank_is_among_all_processes_and_not_on_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert distributed.rank_and_world() == (3, 4, 1)


def test_a_place_to_meet_that_is_not_named_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(errors.RunError, match="WORLD_SIZE is set, but .*MASTER_ADDR.*; start with torchrun, or unset"):
        distributed.join(torch.device("cpu"))


def test_nan_in_one_share_ends_all_processes(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(out, {1: (_spoil_views,)}) == [1, 1], log(out, 0) + log(out, 1)
    assert all("the loss of step 1 of epoch 1 is not a finite number" in log(out, rank) for rank in (0, 1))
    assert not (out / "last.pt").exists()


def test_batch_that_cannot_be_shared_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(out, None, "--batch", "15", "16") == [2, 2]
    assert "--batch 15 cannot be divided equally among 2 processes" in log(out, 0)
    assert not out.exists()


def _one_step(rank: int, folder: Path, world: int) -> None:
    """One step of a network without BatchNorm over a batch of 8; its gradients, loss and hits go into a file."""
    without_norms = build_model((1, 1, 1), planes=(4, 4, 4), norm_layer=nn.Identity)
    processes.replace(build_network, lambda *_: without_norms)
    distributed.join(torch.device("cpu"))
    recipe, stage = RECIPES["original"], Stage(epochs=1, crop_size=(32,), eval_size=32, batch=8, lr=0.1)
    mine = train.Trainer(recipe, 10, Machine(torch.device("cpu"), torch.float32, False, rank=rank, world=world))
    mine.begin_stage(stage, 8)
    gradients: dict[str, torch.Tensor] = {}

    def keep() -> None:
        gradients.update({name: p.grad.clone() for name, p in mine.net.named_parameters()})

    mine.optimizer.step = keep
    images = torch.randint(256, (8, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    draws = augment.draw_epoch(torch.arange(8), 1, 8, recipe.augmentation, (0, 0, 0))
    result = mine.train_epoch(images, torch.arange(8), draws, stage, 32, lambda: None)
    torch.save((gradients, result.losses, result.hits, result.samples), folder / f"{rank} of {world}")


def test_averaged_gradient_is_that_of_the_whole_batch(tmp_path: Path) -> None:
    assert together(1, _one_step, tmp_path, 1) == [0] and together(2, _one_step, tmp_path, 2) == [0, 0]
    expected, loss, hits, samples = torch.load(tmp_path / "0 of 1")
    for rank in (0, 1):
        gradients, *figures = torch.load(tmp_path / f"{rank} of 2")
        torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(figures, [loss, hits, samples])
    assert max(gradient.abs().max() for gradient in expected.values()) > 1e-3  # there is something to compare


def test_half_an_environment_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(errors.RunError, match="start with torchrun"):
        distributed.rank_and_world()


@pytest.mark.parametrize(("world", "said"), [("1", "before\nend of the interpreter\n"), ("2", "before\n")])
def test_one_of_several_processes_ends_without_the_interpreters_end(world: str, said: str) -> None:
    code = "import atexit; from harness.distributed import end_process; "
    code += "atexit.register(print, 'end of the interpreter'); print('before'); end_process(3)"
    surroundings = processes.environment() | {"WORLD_SIZE": world}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=surroundings, capture_output=True, text=True, timeout=LIMIT)
    assert (done.returncode, done.stdout, done.stderr) == (3, said, "")


@pytest.mark.slow
def test_torchrun(tmp_path: Path) -> None:
    flags = [*picture_folders.TINY, "--epochs", "1", "0", "--images", str(fill(tmp_path / "pictures", 5))]
    flags += ["--out", str(tmp_path / "run")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    how = {"env": os.environ | LOOPBACK, "capture_output": True, "text": True, "timeout": LIMIT}
    done = subprocess.run([*command, str(ROOT / "train.py"), *flags], **how)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 1/1") == 1 and "Traceback" not in done.stderr
    assert (tmp_path / "run" / "summary.json").exists()


def _decide_alone(rank: int) -> None:
    distributed.join(torch.device("cpu"))
    alone = [torch.distributed.new_group([each], backend="gloo") for each in range(2)]
    torch.distributed.barrier()  # the leader's end would take away the store with which the other makes its group
    distributed._decisions = alone[rank]
    assert distributed.sum_over_ranks(torch.ones(1)).item() == 1
    assert distributed.max_over_ranks(rank) == rank


def test_decisions_travel_in_a_group_of_their_own() -> None:
    """The other one is NCCL's on CUDA, which takes no tensors of the CPU."""
    assert together(2, _decide_alone) == [0, 0]


def _find_what_the_leader_made(rank: int, folder: Path) -> None:
    distributed.join(torch.device("cpu"))
    with distributed.leader_first():
        if rank:
            assert (folder / "made").exists()
        else:
            (folder / "made").touch()


def test_the_leader_goes_first(tmp_path: Path) -> None:
    assert together(2, _find_what_the_leader_made, tmp_path) == [0, 0]
