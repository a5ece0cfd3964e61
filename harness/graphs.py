"""CUDA graphs: what a step launches is recorded once and then launched as one.

On a GPU a step is hundreds of kernels of a few microseconds, and Python takes longer to launch each than the GPU to
run it. A graph launches all of them at once. It needs no compiler, so it helps where `torch.compile` cannot.
"""

import contextlib
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

from harness.errors import is_out_of_memory, reason
from harness.machine import Machine

Result = TypeVar("Result")
# eager calls before a function is captured: kernels are compiled and chosen, optimisers create their states
WARM_CALLS = 3


class Graphs:
    """Runs functions of tensors on a machine, on CUDA as graphs; anywhere else it just calls them.

    A function's effects on tensors that outlive the call (weights, optimiser states) are part of its graph, so these
    must stay where they are: after anything that replaces them, `forget` the graphs. What a function returns is
    overwritten by its next call. A failed capture executes nothing, and the function is then just called.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine, self.enabled = machine, machine.device.type == "cuda" and machine.graphs
        self._refused: set[str] = set()  # names of functions
        self._size = 0
        self.forget()

    def forget(self) -> None:
        """Drop all graphs, and with them their memory."""
        self._graphs: dict[Hashable, _Graph] = {}
        self._calls: dict[Hashable, int] = {}
        # Where graphs read their inputs: one place for each function and shapes, as each call refills it.
        self._inputs: dict[Hashable, list[Tensor]] = {}
        # Memory and a stream of their own: the default stream of captures has one workspace for all, which graphs of
        # another run in this process would take with them when they go.
        self._pool: Any = None
        self._stream: Any = None

    def keep_only(self, size: int) -> None:
        """Drop the graphs for views of any other size."""
        if size != self._size:
            self.forget()
        self._size = size

    def run(
        self, function: Callable[..., Any], tensors: tuple[Tensor, ...], *constants: Hashable, warm: int = WARM_CALLS
    ) -> Any:
        """`function(*tensors, *constants)`: one graph for each function, shapes of the tensors, and constants."""
        if not self.enabled or function.__name__ in self._refused:
            return function(*tensors, *constants)
        place = (function.__name__, tuple(tensor.shape for tensor in tensors))
        key = (*place, constants)
        if key in self._graphs:
            return self._graphs[key].replay(tensors)
        self._calls[key] = self._calls.get(key, 0) + 1
        if self._calls[key] <= warm:
            return function(*tensors, *constants)
        stream = torch.cuda.current_stream()
        try:
            if self._pool is None:
                self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
            if place not in self._inputs:
                self._inputs[place] = [tensor.clone() for tensor in tensors]
            self._graphs[key] = _Graph(function, self._inputs[place], constants, self._pool, self._stream)
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # or the capture's would stay the current one
            _stop_recording(self._pool)
            self.forget()  # plain calls need less memory, and the pool may no longer be usable
            self._refused.add(function.__name__)
            what, why = function.__name__.replace("_", " "), reason(error.__context__ or error)
            self.machine.note(f"{what} could not be captured as a CUDA graph ({why}), so it runs slower")
        if function.__name__ in self._refused:  # called out here, where the exception no longer holds memory
            return function(*tensors, *constants)
        return self._graphs[key].replay(tensors)

    def making_room(self, work: Callable[[], Result]) -> Result:
        """`work()`; if that runs out of memory, again without the graphs, whose memory nothing else can use."""
        try:
            return work()
        except RuntimeError as error:
            if not (self._graphs and is_out_of_memory(error)):
                raise
        self.forget()  # out here, where the exception no longer holds memory
        return work()


def _stop_recording(pool: Any) -> None:
    """End an allocator's recording into the pool of a failed capture, which PyTorch before 2.14 may leave running.

    While recording, it would free no cached memory (PyTorch issue 180395).
    """
    # it has ended already, or this PyTorch has other functions, or no CUDA
    with contextlib.suppress(RuntimeError, AttributeError, TypeError, AssertionError):
        device = torch.cuda.current_device()
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)


class _Graph:
    """One captured call: `replay` copies its inputs to where the graph reads them, and returns what it computes."""

    def __init__(
        self, function: Callable[..., Any], inputs: list[Tensor], constants: tuple, pool: Any, stream: Any
    ) -> None:
        self.inputs = inputs
        self.graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(self.graph, pool=pool, stream=stream):
            self.outputs = function(*self.inputs, *constants)

    def replay(self, tensors: tuple[Tensor, ...]) -> Any:
        for mine, given in zip(self.inputs, tensors, strict=True):
            mine.copy_(given, non_blocking=True)
        self.graph.replay()
        return self.outputs
