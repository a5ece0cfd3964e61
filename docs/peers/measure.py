"""What is measured of each peer: the same flags, clock and last line for all."""

import argparse
import json
import multiprocessing
import os
import re
import resource
import time
from pathlib import Path

TICKS = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
BEGAN = TICKS / os.sysconf("SC_CLK_TCK")  # when this process was started, in seconds since the machine was


def flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("pictures", help="folder that pictures.py has written")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def peak_kib(process: int) -> int:
    """The most memory that a process has held so far."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process}/status").read_text())[1])


class Epochs:
    """Call it after each epoch with the share of right answers; the last call's is the result."""

    def __init__(self, name: str, args: argparse.Namespace, parameters: int) -> None:
        self.result = {"peer": name, **vars(args), "parameters": parameters, "first_epoch_seconds": None}

    def __call__(self, accuracy: float) -> None:
        seconds = round(time.clock_gettime(time.CLOCK_BOOTTIME) - BEGAN, 1)
        self.result["first_epoch_seconds"] = self.result["first_epoch_seconds"] or seconds
        ended, still = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, multiprocessing.active_children()
        workers = max([ended, *(peak_kib(worker.pid) for worker in still)])
        memory = round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + workers) / 2**20, 2)
        self.result |= {"accuracy": round(accuracy, 4), "seconds": seconds, "peak_gib": memory}
        print(json.dumps(self.result), flush=True)
