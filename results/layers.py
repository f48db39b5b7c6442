"""How near to the matrix product's rate do the convolutions come, one by one?

    python results/layers.py

On the CPU, in fp32, at the `full` sizes: of every convolution the forward pass, the gradient of
its input and that of its weights. Three rounds, each with its own matrix product, since a
machine's speed drifts.
"""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dreamer
import utils

CPU, ROUNDS, REPEATS = torch.device("cpu"), 3, 3


def convolutions(config: dreamer.Config) -> dict[str, tuple[nn.Module, torch.Tensor]]:
    """Every convolution by name, with what it is given in a gradient step."""
    agent, inputs = dreamer.Dreamer(config, 1, CPU), {}
    hooks = [
        layer.register_forward_pre_hook(
            lambda layer, given, name=name: inputs.update({name: (layer, given[0])})
        )
        for name, layer in agent.world.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))
    ]
    images = torch.rand(config.train_seq_len, config.batch_size, 64, 64, 3) - 0.5
    with torch.no_grad():
        embed = agent.world.encoder(images)
        feature = torch.randn(*embed.shape[:2], config.stoch_size + config.deter_size)
        agent.world.decoder(feature)
    for hook in hooks:
        hook.remove()
    return inputs


def measure(layer: nn.Module, x: torch.Tensor) -> dict[str, tuple[float, float]]:
    """(FLOP, seconds) of the forward pass, of the input's gradient, of the weights' gradient."""
    weights, x = list(layer.parameters()), x.detach().requires_grad_()
    y = layer(x)
    gradient = torch.randn_like(y)

    def backward(*inputs):
        return lambda: torch.autograd.grad(y, inputs, gradient, retain_graph=True)

    passes = {"forward": lambda: layer(x), "input": backward(x), "weights": backward(*weights)}
    if x.shape[1] == 3:  # nothing needs the gradient of the pictures
        del passes["input"]
    result = {}
    for name, function in passes.items():
        with FlopCounterMode(display=False) as counter:
            function()
        result[name] = counter.get_total_flops(), utils.median_seconds(CPU, function, REPEATS)
    return result


def table(config: dreamer.Config) -> list[str]:
    """A line for each convolution: ms, and GFLOP/s as a share of the matrix product's."""
    product = utils.matmul_flops(CPU, torch.float32)
    lines, total = [f"2048² matrix product: {product / 1e9:.0f} GFLOP/s"], [0, 0.0]
    for name, (layer, x) in convolutions(config).items():
        texts = []
        for which, (work, seconds) in measure(layer, x).items():
            total = [total[0] + work, total[1] + seconds]
            texts.append(f"{which} {1000 * seconds:.3g} ms, {work / seconds / product:.2f}")
        lines.append(f"{name}: " + "; ".join(texts))
    work, seconds = total
    lines.append(f"all: {seconds:.2f} s for {work / 1e9:.3g} GFLOP, {work / seconds / product:.2f}")
    return lines


if __name__ == "__main__":
    utils.tune_process()
    config = dreamer.resolve({"preset": "full", "device": "cpu"})
    for _ in range(ROUNDS):
        print("\n".join(table(config)), flush=True)
