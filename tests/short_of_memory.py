"""Commands in processes that may take so many bytes more than they have: prints JSON, [status, output] for each limit.

    short_of_memory.py MEBIBYTES,… predict WEIGHTS PICTURE
    short_of_memory.py MEBIBYTES,… resume FOLDER

Each limit has a child of this process, which has PyTorch loaded and nothing else in its memory.
"""

import json
import os
import resource
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

import predict
from harness import checkpoint, errors


def limited(margin: int, main: Callable[[], object]) -> tuple[int, str]:
    """Status and output of `main` in a child that may take `margin` bytes more than it has."""
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if not child:
            try:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (used + margin, used + margin))
                status = errors.report(main)
                sys.stderr.flush()
            except BaseException:
                traceback.print_exc()
                status = 99
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        return status, output.read()


def main(margins: str, command: str, *arguments: str) -> None:
    torch.set_num_threads(1)

    def work() -> int:
        if command == "predict":
            return predict.main([*arguments, "--threads", "1"])
        checkpoint.resume(Path(arguments[0]))
        return 0

    print(json.dumps([limited(int(margin) << 20, work) for margin in margins.split(",")]))


if __name__ == "__main__":
    main(*sys.argv[1:])
