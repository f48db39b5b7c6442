"""`torch.cuda` as far as capturing uses it, emulated on a CPU: a graph does its operations again.

What only Python does is done once, in the capture, as on a card; what this cannot show are the
card's own operations, its memory and its random numbers.
"""

import contextlib
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dreamer

# The host waits for the device in these, or a shape depends on data.
FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")


class Refuse(TorchDispatchMode):
    """Raises at what a graph cannot hold."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert not any(word in name for word in FORBIDDEN), f"{function} in the gradient step"
        return function(*args, **(kwargs or {}))


class Graph(Refuse):
    """The operations of what ran inside it, below autograd, with the tensors that they used."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = super().__torch_dispatch__(function, types, args, kwargs)
        self.operations.append((function, args, kwargs or {}, output))
        return output

    @torch.no_grad()
    def replay(self) -> None:
        """Does them again, each into the memory of what it gave in the recording."""
        for function, args, kwargs, output in self.operations:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(output), tree_leaves(again)):
                if isinstance(old, torch.Tensor) and not shares_memory(old, new):
                    old.copy_(new)


def shares_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Of a view, and of what an operation changed in place."""
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


@contextlib.contextmanager
def nothing(*arguments, **named):
    yield


@contextlib.contextmanager
def graph(operations: Graph, **named):
    """As on a card, where a failed capture's end raises too, and says less."""
    try:
        with operations:
            yield
    except RuntimeError as error:
        raise RuntimeError("operation failed due to a previous error") from error


def install(monkeypatch) -> None:
    """Puts the emulation in the place of `torch.cuda` for a test."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    fakes = {
        "device": nothing, "stream": nothing, "graph": graph, "CUDAGraph": Graph,
        "Stream": lambda *device: stream, "current_stream": lambda *device: stream,
        "set_stream": nothing,
        "synchronize": nothing,
        "get_rng_state": lambda device: torch.get_rng_state(),
        "set_rng_state": lambda state, device: torch.set_rng_state(state),
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)


class CapturingDreamer(dreamer.Dreamer):
    """An agent that captures, on a CPU, where the emulation is installed."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.captures = True
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group.update(lr=torch.tensor(group["lr"]), capturable=True)


class EagerDreamer(dreamer.Dreamer):
    """An agent that does not, with learning rates rounded as those that lie on a card are."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = torch.tensor(group["lr"]).item()

    def model_rate(self, number: int) -> float:
        return torch.tensor(super().model_rate(number)).item()
