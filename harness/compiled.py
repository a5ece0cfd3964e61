"""A network in the form that training steps take: compiled, or eager if compiling fails."""

import gc
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from harness.distributed import is_peer_loss
from harness.errors import RunError, is_out_of_memory, reason
from harness.machine import Machine

Result = TypeVar("Result")


class CompiledForm(nn.Module):
    """`net`, compiled if the machine compiles; its weights are the net's.

    `net` stays as it was, eager and with its own state_dict: scoring, copies and checkpoints see no difference.
    """

    def __init__(self, net: nn.Module, machine: Machine) -> None:
        super().__init__()
        self.net, self.machine = net, machine
        self._compiled: Callable[[Tensor], Tensor] | None = None
        self._compiled_for: set[tuple[int, ...]] = set()  # shapes of batches
        if machine.compile:
            torch._dynamo.config.recompile_limit = 64  # one graph for each shape of a batch
            self._compiled = torch.compile(net, dynamic=False)

    @property
    def compiles(self) -> bool:
        """Whether steps are compiled: not if the machine does not compile, nor once compiling has failed."""
        return self._compiled is not None

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K) of normalised images (N, 3, H, W)."""
        return self.net(x) if self._compiled is None else self._compiled(x)

    def attempt(self, step: Callable[[], Result], shape: tuple[int, ...]) -> Result:
        """Run `step`, a forward and backward pass; if compiling for batches of `shape` fails, run it again uncompiled.

        One of several processes cannot: it raises RunError. By then the step has changed only running statistics,
        which are restored, and gradients, which are cleared.
        """
        if self._compiled is None or shape in self._compiled_for:
            return step()
        kept = [buffer.clone() for buffer in self.net.buffers()]
        try:
            result = step()
        except Exception as error:  # Inductor, Triton and their compilers raise anything
            if is_out_of_memory(error) or is_peer_loss(error) or isinstance(error, RunError):
                raise
            if self.machine.world > 1:  # the others are in this step's exchanges: one alone cannot repeat it
                raise RunError(f"compiling the step failed ({reason(error)}); add --no-compile") from error
            self._compiled = None
            for buffer, value in zip(self.net.buffers(), kept, strict=True):
                buffer.copy_(value)
            self.net.zero_grad()
            self.machine.note(f"compiling the step failed, so it goes on uncompiled and slower: {reason(error)}")
        else:
            self._compiled_for.add(shape)
            return result
        gc.collect()  # a compiler's exception may hold what the failed step left: no graph could be captured over it
        return step()
