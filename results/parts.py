"""Where does the time of a gradient step go?

    python results/parts.py

At the `full` sizes each part alone, with its gradients, and the whole step: in fp32 on a CPU; on a
card in bf16 or fp16, each as one graph. Medians of five; three rounds, since a machine's speed
drifts. The parts do not add up to the whole, of which a card does some beside each other.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dreamer
import utils

ROUNDS, REPEATS, ACTIONS = 3, 5, 6


def random_batch(config: dreamer.Config, device: torch.device) -> dict[str, Tensor]:
    """A batch of noise, as the replay would give it."""
    shape = config.train_seq_len, config.batch_size
    return {
        "image": torch.randint(256, (*shape, 64, 64, 3), dtype=torch.uint8, device=device),
        "action": torch.rand(*shape, ACTIONS, device=device) * 2 - 1,
        "reward": torch.rand(shape, device=device),
        "discount": torch.ones(shape, device=device),
    }


def parts(agent: dreamer.Dreamer, batch: dict) -> dict[str, Callable[[], None]]:
    """Functions by name that do a part of the gradient step, the last one the whole of it."""
    world, image, action = agent.world, agent.pixels(batch["image"]), batch["action"]

    def with_gradients(module: nn.Module, function, x: Tensor, wanted: bool = True):
        x = x.detach().requires_grad_(wanted)

        def part():
            with agent.autocast():
                total = sum(output.sum() for output in function(x))
            leaves = [*module.parameters(), *[x] * wanted]
            torch.autograd.grad(total, leaves, allow_unused=True)

        return part

    def observe(embed):
        posterior, prior = world.rssm.observe(embed, action, world.rssm.initial(image.shape[1]))
        return *posterior, prior.mean, prior.std

    def behaviour():
        with agent.autocast():
            losses, _ = agent.behaviour_losses(post)
        torch.autograd.grad(losses["value"], list(agent.value.parameters()), retain_graph=True)
        torch.autograd.grad(losses["actor"], list(agent.actor.parameters()))

    with torch.no_grad(), agent.autocast():
        embed = world.encoder(image)
        _, post, _ = agent.observe(batch)
    encode, decode = (lambda x: [world.encoder(x)]), (lambda x: [world.decoder(x).log_prob(image)])
    return {
        "encoder": with_gradients(world.encoder, encode, image, wanted=False),
        "RSSM": with_gradients(world.rssm, observe, embed),
        "decoder": with_gradients(world.decoder, decode, post.feature),
        "behaviour": behaviour,
        "gradient step": lambda: agent.eager_update(batch),
    }


def measure(config: dreamer.Config) -> dict[str, float]:
    """Seconds of each part."""
    device = dreamer.pick_device(config.device)
    agent = dreamer.Dreamer(config, ACTIONS, device)
    batch, result = random_batch(config, device), {}
    for name, part in parts(agent, batch).items():
        function = utils.capture(part, device) if agent.captures else part
        result[name] = utils.median_seconds(device, function, REPEATS)
    return result


if __name__ == "__main__":
    utils.tune_process()
    for _ in range(ROUNDS):
        seconds = measure(dreamer.resolve({"preset": "full"}))
        print("; ".join(f"{name} {1000 * x:.3g} ms" for name, x in seconds.items()), flush=True)
