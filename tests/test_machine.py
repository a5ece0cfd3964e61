"""Choosing a device, its precision, and whether steps are compiled."""

import dataclasses
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from harness import machine as machine_module
from harness.cli import Runtime
from harness.errors import RunError
from harness.machine import Machine, choose_device, start_machine

CPU = torch.device("cpu")


@pytest.fixture
def restored():
    """Leaves the settings of the process as they were."""
    threads, filled = torch.get_num_threads(), torch.utils.deterministic.fill_uninitialized_memory
    machine_module.own_threads.cache_clear()
    yield
    machine_module.own_threads.cache_clear()
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("asked", ["auto", "bf16", "fp32"])
@pytest.mark.parametrize("native", [False, True])
def test_precision_is_bf16_where_the_hardware_has_it_or_the_user_asks(restored, monkeypatch, asked, native):
    monkeypatch.setattr(machine_module, "has_native_bf16", lambda device: native)
    bf16 = asked == "bf16" or (asked == "auto" and native)
    machine = start_machine(Runtime(device="cpu", precision=asked, threads=1))
    assert machine == Machine(CPU, torch.bfloat16 if bf16 else torch.float32, compile=False)
    assert torch.get_num_threads() == 1
    with machine.autocast():
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == machine.precision


def test_deterministic_is_set_where_asked_for(restored):
    for asked in (False, True, False):  # as one notebook's runs
        start_machine(Runtime(device="cpu", deterministic=asked))
        assert torch.are_deterministic_algorithms_enabled() == asked


def test_a_run_s_threads_are_not_those_of_the_next(restored, monkeypatch: pytest.MonkeyPatch):
    """In one process, as a notebook's cells are."""
    monkeypatch.setattr(machine_module, "usable_cores", lambda: 8)
    torch.set_num_threads(2)
    for asked, threads in ((1, 1), (None, 2), (3, 3), (None, 2)):
        start_machine(Runtime(device="cpu", threads=asked))
        assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    "there, built_for, why",
    [
        (True, "12.6", "PyTorch sees 1 CUDA device"),
        (False, "12.6", "PyTorch sees no CUDA device here"),
        (False, None, r"PyTorch was built without CUDA \(pip uninstall torch, then install one with it: pytorch.org\)"),
    ],
)
def test_a_device_that_is_not_there_is_a_sentence(
    there: bool, built_for: str | None, why: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(there))
    monkeypatch.setattr(torch.version, "cuda", built_for)
    with pytest.raises(RunError, match=f"--device cuda:7: {why}; use --device cpu"):
        start_machine(Runtime(device="cuda:7"))


def test_auto_is_the_first_cuda_device_or_the_cpu(monkeypatch: pytest.MonkeyPatch):
    for there, device in ((True, torch.device("cuda", 0)), (False, CPU)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        monkeypatch.setattr(torch.cuda, "device_count", lambda there=there: int(there))
        assert choose_device("auto") == device


def test_compile_needs_a_compiler(restored, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RunError, match="C\\+\\+ compiler"):
        start_machine(Runtime(device="cpu", compile=True))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_share_each_batch_equally(world: int):
    machines = [Machine(CPU, torch.float32, compile=False, rank=rank, world=world) for rank in range(world)]
    for step in range(3):
        shares = [range(100)[machine.share_of_batch(step, 8)] for machine in machines]
        assert [row for share in shares for row in share] == list(range(8 * step, 8 * step + 8))
        assert {len(share) for share in shares} == {8 // world}
    assert [machine.leads for machine in machines] == [True] + [False] * (world - 1)


def test_what_is_recorded_of_a_machine_is_in_its_words(restored, capsys):
    torch.set_num_threads(1)
    machine = Machine(CPU, torch.bfloat16, compile=False, world=2)
    assert str(machine) == f"{machine.name}, bf16" and machine.name.endswith(", 1 thread")
    machine.note("it is slow")
    machine.note("it is slow")
    assert machine.as_dict() == {
        "machine": machine.name,
        "device": "cpu",
        "threads": 1,
        "precision": "bf16",
        "compile": False,
        "graphs": False,
        "processes": 2,
        "notes": ["it is slow"],
    }
    assert capsys.readouterr().out == "note: it is slow\n"
    dataclasses.replace(machine, rank=1).note("only the leader speaks")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "name, precision", [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_precisions_are_named_in_words(name: str, precision: torch.dtype):
    machine = Machine(CPU, precision, compile=False)
    assert str(machine).endswith(f", {name}") and machine.as_dict()["precision"] == name


@pytest.mark.parametrize(
    ("names", "capability", "build"),
    [
        (["gfx90a", "gfx1100"], (11, 0), None),  # AMD's: whether a kernel runs is what tells
        (["sm_80", "sm_90a", "compute_90"], (9, 0), None),
        (["sm_80", "compute_80"], (7, 5), "its build for CUDA 12.6"),
        (["sm_50", "sm_90"], (12, 0), "a newer build"),
    ],
)
def test_a_card_is_tried_where_the_build_may_have_its_kernels(names, capability, build, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: names)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    if build is None:
        machine_module._try_kernel(CPU)
    else:
        major, minor = capability
        with pytest.raises(RunError, match=rf"a card cannot be used: .*capability {major}\.{minor}; install {build}"):
            machine_module._try_kernel(CPU)


@pytest.mark.parametrize(
    ("device", "there", "obstacle"),
    [
        ("cpu", ("cl",), ""),
        ("cpu", ("g++", "gcc"), "Visual Studio"),
        ("cuda", (), ""),  # Triton for Windows has a compiler with it
    ],
)
def test_windows_compiles_with_its_own_compilers(device, there, obstacle, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setattr(shutil, "which", lambda name: name if name in there else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(machine_module.importlib.util, "find_spec", lambda name: "found")
    found = machine_module._obstacle_to_compiling(torch.device(device))
    assert obstacle in found and bool(found) == bool(obstacle)


@pytest.mark.parametrize(
    "words, said",
    [
        ("CUDA error: out of memory", "a card has no free memory: stop other programs on it, or use --device cpu"),
        (
            "CUDA error: devices are busy\nand more",
            "a card cannot be used: CUDA error: devices are busy; stop other",
        ),
    ],
)
def test_a_card_that_fails_its_first_kernel_is_a_sentence(words, said, monkeypatch):
    def fail(*_, **__) -> None:
        raise RuntimeError(words)

    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_90"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(torch, "ones", fail)
    with pytest.raises(RunError, match=said):
        machine_module._try_kernel(CPU)


def test_images_that_fit_go_to_the_card(monkeypatch: pytest.MonkeyPatch):
    machine = Machine(torch.device("cuda", 0), torch.float32, compile=False)
    with FakeTensorMode():
        images = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * images.nbytes, 10**9))
        assert machine.hold(images).device == machine.device and machine.notes == []


def test_images_that_would_fill_a_card_stay_where_they_are(monkeypatch: pytest.MonkeyPatch):
    images = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * images.nbytes - 1, 10**9))
    machine = Machine(torch.device("cuda", 0), torch.float32, compile=False)
    assert machine.hold(images) is images
    assert len(machine.notes) == 1 and "stay in the host's memory" in machine.notes[0]


@pytest.mark.parametrize(
    "card, precision",
    [("GeForce GTX 1660 Ti", "fp32"), ("Quadro T1000", "fp32"), ("Tesla T4", "fp16"), ("GeForce RTX 2080", "fp16")],
)
def test_fp16_is_for_cards_with_tensor_cores(card: str, precision: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card)
    chosen = machine_module._precision(torch.device("cuda", 0), "auto")
    assert machine_module.PRECISIONS[chosen] == precision


@pytest.mark.parametrize(
    "files, cpus",
    [
        ({"cpu.max": "250000 100000\n"}, 2.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "150000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_a_containers_share_of_the_cores_is_read(files: dict[str, str], cpus: float | None, tmp_path: Path):
    """As Linux writes it, in version 2 and in version 1."""
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert machine_module.cpu_quota(tmp_path) == cpus


@pytest.mark.parametrize("quota, threads", [(None, 8), (2.5, 2), (0.5, 1), (64.0, 8)])
def test_threads_are_no_more_than_the_container_may_use(quota, threads, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)))
    monkeypatch.setattr(machine_module, "cpu_quota", lambda groups: quota)
    assert machine_module.own_threads.__wrapped__() == threads
    assert machine_module.usable_cores() == (16 if quota is None else max(1, min(16, int(quota))))
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert machine_module.own_threads.__wrapped__() == 8


def test_more_processes_than_cards_are_refused(restored, monkeypatch):
    for name, value in {"RANK": 2, "WORLD_SIZE": 3, "LOCAL_RANK": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(machine_module, "choose_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(RunError, match="this machine has 2: torchrun --nproc-per-node 2"):
        start_machine(Runtime())
    with pytest.raises(RunError, match="--device cuda:1: each process takes a GPU of its own; give --device cuda"):
        start_machine(Runtime(device="cuda:1"))


@pytest.mark.parametrize("world, place, card", [(1, (0, 1), 0), (4, (3, 4), 1)])
def test_each_process_has_the_card_of_its_place_on_its_machine(world, place, card, restored, monkeypatch):
    """Several capture no graphs, which could not wait for each other's gradients."""
    for name, value in {"RANK": 3, "WORLD_SIZE": world, "LOCAL_RANK": 1}.items():
        monkeypatch.setenv(name, str(value))
    for name in ("benchmark", "allow_tf32"):  # put back afterwards
        monkeypatch.setattr(torch.backends.cudnn, name, getattr(torch.backends.cudnn, name))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    current, joined = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(machine_module.distributed, "join", joined.append)
    monkeypatch.setattr(machine_module, "_try_kernel", lambda device: None)
    monkeypatch.setattr(machine_module, "_obstacle_to_compiling", lambda device: "")
    monkeypatch.setattr(machine_module, "has_native_bf16", lambda device: True)
    machine = start_machine(Runtime(device="cuda", threads=1))
    assert current == joined == [machine.device] == [torch.device("cuda", card)]
    assert (machine.rank, machine.world) == place
    assert machine.compile and machine.graphs == (world == 1)
