"""Dreamer v1 and v2 on the DeepMind Control Suite, from pixels, in one script.

    python dreamer.py --train                                   # walker-walk, Dreamer v1
    python dreamer.py --env cartpole-balance --algo Dreamerv2 --train
    python dreamer.py --train --restore                         # go on with a run
    python dreamer.py --evaluate --restore                      # returns, JSON and GIFs
    python dreamer.py --benchmark                               # how fast, how long
    tensorboard --logdir runs

A world model (models.py: the RSSM) is learned from replayed episodes; an actor and a value are
learned inside it, in imagination. Read in this order: the losses, the agent and its gradient
step, the training loop. Steps of a run and of its logs are frames of the environment, repeats
counted; steps of sequences, of imagination and of acting are actions.

Dreamer v1: https://arxiv.org/abs/1912.01603    Dreamer v2: https://arxiv.org/abs/2010.02193
"""

import argparse
import errno
import json
import math
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import env_wrapper
import replay_buffer
import utils
from models import (
    RSSM,
    ActionDecoder,
    ConvDecoder,
    ConvEncoder,
    DenseDecoder,
    RecordedMLP,
    State,
    UnitNormal,
    init_as_keras,
    kl_divergence,
    standard_normal,
)

# ------------------------------------------------------------------------------ flags and presets

# The algorithms and the sizes differ in these values and in nothing else.
ALGORITHMS = {
    "Dreamerv1": {"free_nats": 3.0, "kl_balance": None},
    "Dreamerv2": {"free_nats": 0.0, "kl_balance": 0.8},
}
PRESETS = {
    "full": {
        "batch_size": 50, "train_seq_len": 50, "num_units": 400, "cnn_depth": 32,
        "model_learning_rate": 6e-4, "actor_learning_rate": 8e-5, "value_learning_rate": 8e-5,
        "update_steps": 100, "pretrain_steps": 100, "model_rate_decay": 0, "reward_scale": 1.0,
        "actor_entropy": 0.0, "first_share": 0.0, "act_memory": 0,
    },
    "small": {
        "batch_size": 4, "train_seq_len": 16, "num_units": 200, "cnn_depth": 16,
        "model_learning_rate": 6e-4, "actor_learning_rate": 4e-5, "value_learning_rate": 1e-4,
        "update_steps": 400, "pretrain_steps": 400, "model_rate_decay": 20_000,
        "reward_scale": 10.0, "actor_entropy": 0.03, "first_share": 0.25, "act_memory": 5,
    },
}  # fmt: skip


def flag(default, help, *aliases, **options):
    """A field of `Config` that is also a flag; `group` begins a group of --help."""
    return field(default=default, metadata={"help": help, "aliases": aliases, **options})


def algorithm(name: str) -> str:
    """The algorithm of that name, whatever its case; `name` itself where there is none."""
    return {known.lower(): known for known in ALGORITHMS}.get(name.lower(), name)


def number(text: str) -> float | None:
    """A number, or None for the word `none`."""
    return None if text.lower() == "none" else float(text)


@dataclass
class Config:
    """Every setting of a run. `None` means: by preset, algorithm or machine (see `resolve`); in a
    resolved configuration, no limit for `max_hours` and no balancing for `kl_balance`.
    """

    env: str = flag("walker-walk", "task of the Control Suite", group="run")
    algo: str = flag("Dreamerv1", "upper or lower case", type=algorithm, choices=tuple(ALGORITHMS))
    exp: str = flag("default", "name of the experiment", "--exp-name")
    seed: int = flag(1, "random seed", maximum=2**32 - 1)
    logdir: str = flag("runs", "where runs are kept")
    preset: str = flag(
        "auto", "sizes: full, small, or auto: full on CUDA, small on a CPU",
        choices=("auto", *PRESETS),
    )  # fmt: skip
    device: str = flag("auto", "cpu, cuda, cuda:N, or auto")
    precision: str = flag(
        "auto", "fp32, bf16, fp16, or auto: fp16 on a T4, bf16 on newer cards, fp32 on a CPU",
        choices=("auto", "fp32", "bf16", "fp16"),
    )  # fmt: skip
    eager: bool = flag(False, "on CUDA, do not capture gradient steps and acting as graphs")

    total_steps: int = flag(100_000, "frames of the whole run", group="schedule", minimum=1)
    seed_steps: int = flag(5000, "frames of random actions before training", minimum=1)
    collect_steps: int = flag(1000, "frames collected in an iteration", minimum=1)
    update_steps: int = flag(None, "gradient steps in an iteration")
    pretrain_steps: int = flag(None, "gradient steps in the first iteration")
    eval_interval: int = flag(
        10_000, "frames between evaluations; 0: none but the last", "--test-interval"
    )
    eval_episodes: int = flag(10, "episodes of an evaluation", "--test-episodes", minimum=1)
    vector_env: str = flag(
        "auto", "evaluation's episodes: async: a process each; sync: one process; auto: by cores",
        choices=("auto", "async", "sync"),
    )  # fmt: skip
    checkpoint_interval: int = flag(5000, "frames between checkpoints; 0: first, best, last only")
    video_interval: int = flag(50_000, "frames between videos, made at evaluations; 0: none")
    max_hours: float = flag(None, "stop cleanly after so many hours; none: no limit", type=number)

    action_repeat: int = flag(2, "frames an action is held", group="environment", minimum=1)
    time_limit: int = flag(1000, "frames of an episode", minimum=1)
    action_noise: float = flag(0.3, "std of the noise added to collected actions")
    buffer_gb: float = flag(
        None, "memory of the replay, in 10^9 bytes (0.6 of what is free)",
        minimum=0.001, maximum=1e6,
    )  # fmt: skip

    batch_size: int = flag(None, "sequences in a batch", group="sizes", minimum=1)
    train_seq_len: int = flag(None, "steps of a sequence", minimum=2)
    act_memory: int = flag(
        None, "N: acting knows only its last N + 1 to 2 N observations; 0: the whole episode"
    )
    first_share: float = flag(
        None, "share of the sequences that begin where an episode does", maximum=1
    )
    deter_size: int = flag(200, "deterministic state of the RSSM", minimum=1)
    stoch_size: int = flag(30, "stochastic state of the RSSM", minimum=1)
    hidden_size: int = flag(200, "width of the RSSM's hidden layers", minimum=1)
    num_units: int = flag(None, "width of the other networks' hidden layers", minimum=1)
    cnn_depth: int = flag(None, "channels of the first convolution", minimum=1)
    imagine_horizon: int = flag(15, "imagined steps", minimum=2)

    discount: float = flag(0.99, "discount of a step of the agent", group="objective", maximum=1)
    td_lambda: float = flag(0.95, "lambda of the returns", maximum=1)
    free_nats: float = flag(None, "KL in nats below which it is not reduced")
    kl_balance: float = flag(
        None, "share of the KL that trains the prior; none: no balancing",
        type=number, maximum=1,
    )  # fmt: skip
    kl_scale: float = flag(1.0, "weight of the KL in the model's loss")
    reward_scale: float = flag(None, "weight of the reward in the model's loss")
    actor_entropy: float = flag(None, "weight of the policy's entropy in the actor's loss")
    actor_init_std: float = flag(5.0, "policy's std before the tanh, at the start", minimum=0.01)
    use_disc_model: bool = flag(False, "predict continuation instead of a constant discount")
    disc_loss_coeff: float = flag(10.0, "weight of the continuation loss")
    model_learning_rate: float = flag(
        None, "learning rate of the world model", group="optimization", maximum=1
    )
    model_rate_decay: int = flag(
        None, "N: the world model's rate is divided by 1 + (gradient steps) / N; 0: constant"
    )
    actor_learning_rate: float = flag(None, "learning rate of the actor", maximum=1)
    value_learning_rate: float = flag(None, "learning rate of the value", maximum=1)
    adam_epsilon: float = flag(1e-7, "epsilon of the three optimizers")
    grad_clip_norm: float = flag(100.0, "norm to which each gradient is clipped")


# What a restored run may change. Another device or precision rounds otherwise: only on a CPU, in
# the same precision, does a run go on bit for bit. The folder that `exp` names may be a copy.
MAY_CHANGE = {
    "device", "precision", "total_steps", "eval_interval", "eval_episodes",
    "checkpoint_interval", "video_interval", "vector_env", "exp",
}  # fmt: skip
# What holds for one start and is not restored: a run may have been moved, the clock starts anew
# with every process, and no flag undoes --eager.
ONE_START = {"logdir", "max_hours", "eager"}
# An evaluation may also be of other episodes, and of another task of the same shape.
EVALUATION_MAY_CHANGE = MAY_CHANGE | {"env", "seed", "action_repeat", "time_limit", "act_memory"}


def pick_device(name: str) -> torch.device:
    """The device of `--device`.

    Raises:
        utils.RunError: it does not exist here.
    """
    count = utils.cards()
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    if name not in {"cpu", "cuda", *(f"cuda:{i}" for i in range(count))}:
        raise utils.RunError(f"--device {name}: choose cpu, cuda or auto")
    if name == "cuda" and not count:
        raise utils.RunError("--device cuda: PyTorch sees no CUDA device here; try --device cpu")
    return torch.device(name)


def resolve(given: dict, saved: dict | None = None, may_change: set = MAY_CHANGE) -> Config:
    """The configuration of a run: the defaults, under the saved run's, under the flags given.

    Args:
        given: field names to values, only of the flags that stood on the command line.
        saved: the `config.json` of a run that is being restored.
        may_change: fields in which `given` may differ from `saved`.

    Raises:
        utils.RunError: a flag contradicts the saved run, or cannot work.
    """
    defaults = {f.name: f.default for f in fields(Config)}
    # Settings that this version does not know are not kept either.
    names = defaults.keys() - ONE_START
    kept = {k: v for k, v in (saved or {}).items() if k in names}
    # What an older version saved as None it had not resolved; of `kl_balance` None is a value.
    kept = {k: v for k, v in kept.items() if v is not None or k == "kl_balance"}
    given = dict(given)
    if "preset" in kept and given.get("preset") == "auto":
        del given["preset"]
    differ = [
        f"--{name.replace('_', '-')} {value} (saved: {kept[name]})"
        for name, value in given.items()
        if name in kept and name not in may_change and value != kept[name]
    ]
    if differ:
        raise utils.RunError("the run being restored has other settings: " + ", ".join(differ))
    top = {**defaults, **kept, **given}
    check(Config(**top))
    on_gpu = pick_device(top["device"]).type == "cuda"
    if top["preset"] == "auto":
        given["preset"] = top["preset"] = "full" if on_gpu else "small"
    # The replay's size is settled once: a restored run must forget the same episodes.
    memory = {"buffer_gb": round(0.6 * utils.free_memory_gb(torch.device("cpu")), 1)}
    # A run that was saved before a setting existed goes on without it, as in the full preset.
    fallback = "full" if saved else top["preset"]
    tables = {**memory, **PRESETS[fallback], **ALGORITHMS[top["algo"]]}
    return Config(**{**defaults, **tables, **kept, **given})


def check(config: Config) -> None:
    """Refuses settings that cannot work, before anything is written; those of a file may be of any
    type.

    Raises:
        utils.RunError: naming the first.
    """
    for f in fields(Config):
        value, choices = getattr(config, f.name), f.metadata.get("choices")
        types = (int, float) if f.type is float else (f.type,)
        if value is not None and type(value) not in types:
            raise utils.RunError(f"{f.name} {value!r}: not of type {f.type.__name__}")
        if choices and value not in choices:
            raise utils.RunError(f"{f.name} {value!r}: choose from {', '.join(choices)}")
        least = f.metadata.get("minimum", 0)
        most = f.metadata.get("maximum", math.inf if f.type is float else 10**12)
        if isinstance(value, int | float) and not least <= value <= most:
            bound = f"at most {most}" if value > most else f"at least {least}"
            raise utils.RunError(f"--{f.name.replace('_', '-')} {value}: {bound}")
    name = config.exp
    if Path(name).name != name or name in ("", "..") or not name.isprintable():
        raise utils.RunError(f"--exp {config.exp!r}: a name, not a path")
    if config.precision == "fp16" and pick_device(config.device).type == "cpu":
        raise utils.RunError("--precision fp16 needs CUDA; a CPU takes fp32 or bf16")


def check_lengths(config: Config) -> None:
    """Refuses a training that has no gradient step, or sequences longer than an episode.

    Raises:
        utils.RunError: it is one of these.
    """
    seed_frames = math.ceil(config.seed_steps / config.time_limit) * config.time_limit
    if config.total_steps <= seed_frames:
        raise utils.RunError(
            f"--total-steps {config.total_steps}: training begins after {seed_frames} frames, the "
            f"episodes of --seed-steps {config.seed_steps}; raise the one or lower the other"
        )
    if config.train_seq_len > longest_episode(config):
        raise utils.RunError(
            f"--train-seq-len {config.train_seq_len}: an episode of --time-limit "
            f"{config.time_limit} and --action-repeat {config.action_repeat} has "
            f"{longest_episode(config)} rows"
        )


def longest_episode(config: Config) -> int:
    """Rows of an episode that lasts to the time limit: one more than it has actions."""
    return math.ceil(config.time_limit / config.action_repeat) + 1


# ----------------------------------------------------------------------------------------- losses
# Pure functions: tensors in, tensors out. Equations are numbered as in the v1 paper.


def kl_loss(post: State, prior: State, free_nats: float, balance: float | None):
    """The KL term of the model's loss and the mean KL itself, two scalars, in nats.

    `post`, `prior`: states (T, B, ...), of which the Normals are compared.
    Without balance (v1 code): max(mean KL(post || prior), free nats): first the mean over all
    states, then the maximum. With it (v2, algorithm 2):
    α KL(sg(post) || prior) + (1 − α) KL(post || sg(prior)), each mean bounded below by the free
    nats: the value of the KL is the same, and its gradients reach the prior and the posterior
    with weights α and 1 − α.
    """
    if balance is None:
        divergence = kl_divergence(post.mean, post.std, prior.mean, prior.std).mean()
        return divergence.clamp(min=free_nats), divergence
    to_prior = kl_divergence(post.mean.detach(), post.std.detach(), prior.mean, prior.std).mean()
    to_post = kl_divergence(post.mean, post.std, prior.mean.detach(), prior.std.detach()).mean()
    loss = balance * to_prior.clamp(min=free_nats) + (1 - balance) * to_post.clamp(min=free_nats)
    return loss, to_prior


def normal_entropy(std: Tensor) -> Tensor:
    """Mean entropy in nats of diagonal Normals, summed over the last axis of `std`."""
    return (std.log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1).mean()


def lambda_return(reward: Tensor, value: Tensor, discount: Tensor, lambda_: float) -> Tensor:
    """V_k = r_k + γ_k ((1 − λ) v_{k+1} + λ V_{k+1}), V_H = v_H (equation 6).

    For k = 1 ... H-1.
    `reward`, `value`, `discount`: (H, ...), of the imagined states 1 ... H. Returns (H-1, ...).
    """
    at_once = reward[:-1] + discount[:-1] * (1 - lambda_) * value[1:]
    later = lambda_ * discount[:-1]
    target, targets = value[-1], []
    for a, b in reversed(list(zip(at_once.unbind(), later.unbind()))):
        target = a + b * target
        targets.append(target)
    return torch.stack(targets[::-1])


def discount_weight(discount: Tensor) -> Tensor:
    """w_k = γ_1 ... γ_{k−1}, w_1 = 1: how likely step k is still reached.

    (H, ...) to (H-1, ...). Gradients are stopped.
    """
    ones = torch.ones_like(discount[:1])
    return torch.cat([ones, discount[:-2]]).cumprod(0).detach()


def actor_loss(target: Tensor, weight: Tensor) -> Tensor:
    """-mean(w V): the actor climbs the returns' own gradient (equation 7). (H-1, N) each."""
    return -(weight * target).mean()


def value_loss(log_prob: Tensor, weight: Tensor) -> Tensor:
    """-mean(w ln N(sg(V); v, 1)): the value regresses on the returns (equation 8). (H-1, N)."""
    return -(weight * log_prob).mean()


# ------------------------------------------------------------------------------------------ agent


class Dreamer(nn.Module):
    """World model, actor and value, their optimizers, and the gradient step.

    Args:
        config: a resolved configuration.
        actions: action dimensions of the task.
        device: where everything lies.
    """

    def __init__(self, config: Config, actions: int, device: torch.device):
        super().__init__()
        c = self.config = config
        self.actions, self.device = actions, device
        features = c.stoch_size + c.deter_size
        encoder = ConvEncoder(c.cnn_depth)
        world = {
            "encoder": encoder,
            "rssm": RSSM(actions, encoder.embed_size, c.stoch_size, c.deter_size, c.hidden_size),
            "decoder": ConvDecoder(features, c.cnn_depth),
            "reward": DenseDecoder(features, layers=2, units=c.num_units),
        }
        if c.use_disc_model:
            world["discount"] = DenseDecoder(features, layers=3, units=c.num_units, binary=True)
        self.world = nn.ModuleDict(world)
        policy = {"layers": 4, "units": c.num_units, "init_std": c.actor_init_std}
        self.actor = ActionDecoder(features, actions, **policy)
        self.value = DenseDecoder(features, layers=3, units=c.num_units)
        self.apply(init_as_keras)
        self.to(device=device, memory_format=torch.channels_last)
        rates = {
            "world": c.model_learning_rate,
            "actor": c.actor_learning_rate,
            "value": c.value_learning_rate,
        }
        self.captures = device.type == "cuda" and not c.eager
        if self.captures:  # a graph reads the rates where they lie
            rates = {name: torch.tensor(lr, device=device) for name, lr in rates.items()}
        adam = {"eps": c.adam_epsilon, "fused": True, "capturable": self.captures}
        # Optimizers and scalers are no modules: `state` below saves them beside the `state_dict`.
        self.optimizers = {
            name: torch.optim.Adam(getattr(self, name).parameters(), lr, **adam)
            for name, lr in rates.items()
        }
        self._captured_batch, self._captured_step = None, None
        self._policies = {}
        self.precision = self._precision()
        # One each: the model's gradients overflow at scales where the actor's would underflow, and
        # from the usual 2^16 the model would miss its first steps while the actor learns in it.
        scaling = {"enabled": self.precision == torch.float16, "growth_interval": 200}
        scales = {"world": 2.0**5, "actor": 2.0**16, "value": 2.0**16}
        self.scalers = {
            name: torch.amp.GradScaler(device.type, scale, **scaling)
            for name, scale in scales.items()
        }

    def _precision(self) -> torch.dtype:
        choice = self.config.precision
        if self.device.type == "cuda":
            sm80 = torch.cuda.get_device_capability(self.device) >= (8, 0)
            if choice == "bf16" and not sm80:  # PyTorch would emulate it
                raise utils.RunError("--precision bf16: this card has none; fp16 is its own")
            choice = ("bf16" if sm80 else "fp16") if choice == "auto" else choice
        elif choice == "auto":
            choice = "fp32"
        types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        return types[choice]

    def autocast(self):
        """A context for forward passes, of half precision where that was chosen."""
        if self.precision == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.precision)

    # ------------------------------------------------------------------------- acting

    def pixels(self, image: Tensor) -> Tensor:
        """Bytes to floats in [-0.5, 0.5]."""
        return image.to(self.dtype) / 255 - 0.5

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return self.actor.net[0].weight.dtype

    @torch.no_grad()
    def act(self, image: Tensor, state: State, action: Tensor, explore: bool):
        """The next actions of N environments, (N, A), and the state that they were chosen in.

        `image` (N, 64, 64, 3) uint8 is what `action` (N, A) led to from `state`. With `explore` a
        sample plus noise, clipped to [-1, 1]; without it the mode of the policy. `state` may have
        a multiple of N rows (see `Policy`): all go on, the first N choose the actions.
        """
        with self.autocast():
            embed = self.world.encoder(self.pixels(image))
            copies = len(state.stoch) // len(image)
            action, embed = action.repeat(copies, 1), embed.repeat(copies, 1)
            state = self.world.rssm.obs_step(state, action, embed)
            distribution = self.actor(state.feature[: len(image)])
            if not explore:
                return distribution.mode(), state
            action = distribution.rsample()
            noise = self.config.action_noise * torch.randn_like(action)
            return (action + noise).clamp(-1, 1), state

    def policy(self, n: int, explore: bool) -> "Policy":
        """Acts from the start of `n` episodes; the same object for the same arguments."""
        key = n, explore
        if key not in self._policies:
            self._policies[key] = Policy(self, n, explore)
        self._policies[key].reset()
        return self._policies[key]

    @torch.no_grad()
    def open_loop(self, image: Tensor, action: Tensor, context: int = 5):
        """Open-loop prediction: `context` frames are seen, the rest imagined from the actions.

        `image` (T, B, 64, 64, 3) uint8, `action` (T, B, A), rows as in the replay. Returns frames
        (T, B, 64, 64, 3), 0 black and 1 white but not bounded, the first `context` reconstructed.
        """
        rssm = self.world.rssm
        with self.autocast():
            embed = self.world.encoder(self.pixels(image[:context]))
            post, _ = rssm.observe(embed, action[:context], rssm.initial(image.shape[1]))
            state, features = post.map(lambda x: x[-1]), [post.feature]
            for t in range(context, len(action)):
                state = rssm.img_step(state, action[t])
                features.append(state.feature[None])
            return self.world.decoder(torch.cat(features)).mean + 0.5

    # ------------------------------------------------------------------ gradient step

    def observe(self, batch: dict):
        """The images of a batch (T, B, ...) as floats, and the posterior and the prior of every
        step, (T, B, ...).
        """
        image, rssm = self.pixels(batch["image"]), self.world.rssm
        state = rssm.initial(image.shape[1])
        return image, *rssm.observe(self.world.encoder(image), batch["action"], state)

    def model_loss(self, batch: dict, image: Tensor, post: State, prior: State):
        """Loss of the world model on a batch (T, B, ...) (equation 10), and metrics. `image`,
        `post`, `prior`: what `observe` made of the batch.

        E[-ln p(image)] + reward-scale E[-ln p(reward)] + kl-scale KL
        (+ coefficient E[-ln p(continuation)]).
        """
        # rows     (action, reward, image) of row t: what the action led to
        # states   [0] -> z_0 -> z_1 -> ... -> z_{T-1}, z_t from action_t and image_t
        # read off image_t, reward_t, continuation_t from z_t
        c, world, feature = self.config, self.world, post.feature
        terms = {
            "image": -world.decoder(feature).log_prob(image).mean(),
            "reward": -world.reward(feature).log_prob(batch["reward"]).mean(),
        }
        kl_term, kl = kl_loss(post, prior, c.free_nats, c.kl_balance)
        loss = terms["image"] + c.reward_scale * terms["reward"] + c.kl_scale * kl_term
        if c.use_disc_model:
            target = c.discount * batch["discount"]
            terms["continuation"] = -world.discount(feature).log_prob(target).mean()
            loss = loss + c.disc_loss_coeff * terms["continuation"]
        metrics = {f"loss/{name}": term for name, term in terms.items()}
        metrics["kl"] = kl
        metrics["entropy/prior"] = normal_entropy(prior.std)
        metrics["entropy/posterior"] = normal_entropy(post.std)
        return loss, metrics

    def imagine(self, start: State):
        """Features (H, N, F) of the imagined states 1 ... H, the policy's -ln density of the
        actions that led there (H, N), and metrics of the policy.

        The actor sees features without gradients; its actions carry them into the next state.
        By autograd alone, step by step: `imagine_step_by_step` in tests/test_agent.py.
        """
        actor, shape = self.actor, (self.config.imagine_horizon, len(start.stoch))
        noise = standard_normal((*shape, self.actions), start.stoch)
        noises = iter(noise)
        recorded = RecordedMLP(actor.net, *shape)

        def act(feature: Tensor) -> Tensor:
            return torch.tanh(actor.policy(recorded(feature)).before_tanh(next(noises)))

        trace = self.world.rssm.roll_out(act, start, len(noise))
        policy = actor.policy(recorded.outputs())
        x = policy.before_tanh(noise)
        state = self.world.rssm.retrace(trace, torch.tanh(x))
        entropy = -policy.log_prob_before_tanh(x)
        with torch.no_grad():
            metrics = {
                "entropy/policy": entropy.mean(),
                "policy/saturated": (x.abs() > math.atanh(0.99)).to(self.dtype).mean(),
                "policy/std": policy.std.mean(),
            }
        return state.feature, entropy, metrics

    def behaviour_losses(self, post: State):
        """Losses of the actor and of the value in imagination from every posterior (T, B, ...),
        and metrics.

        Both read the same pass of the value network: the gradient step takes from each loss only
        the gradients of the network that it trains, which is what stopping gradients amounts to.
        """
        # state     z0 --a0--> z1 --a1--> z2 ... --a_{H-1}--> z_H     z0: posteriors
        # read off             r_1 v_1 γ_1  r_2 v_2 γ_2  ...  r_H v_H γ_H
        # targets              V_1          V_2          ...  V_H = v_H
        # weights              1            γ_1          ...
        c = self.config
        if c.use_disc_model:  # the last step may be terminal: nothing starts there
            post = post.map(lambda x: x[:-1])
        start = post.map(lambda x: x.detach().flatten(0, 1))
        feature, entropy, metrics = self.imagine(start)
        reward = self.world.reward(feature).mean
        if c.use_disc_model:
            discount = self.world.discount(feature).mean  # γ is in it: see `model_loss`
        else:
            discount = torch.full_like(reward, c.discount)
        value = self.value(feature)
        target = lambda_return(reward, value.mean, discount, c.td_lambda)
        weight = discount_weight(discount)
        regression = UnitNormal(value.mean[:-1], event_dims=0)
        # The action that led to state k was chosen in state k - 1, and V_k counts from its reward.
        objective = target + c.actor_entropy * entropy[:-1] if c.actor_entropy else target
        losses = {
            "value": value_loss(regression.log_prob(target.detach()), weight),
            "actor": actor_loss(objective, weight),
        }
        metrics["value/mean"] = value.mean.mean()
        metrics["value/error"] = (target - value.mean[:-1]).abs().mean()
        metrics["reward/imagined"] = reward.mean()
        return losses, metrics

    def gradients(self, batch: dict) -> dict:
        """Gradients of the three losses on a batch (T, B, ...) into `.grad`; returns metrics."""
        with self.autocast():
            image, post, prior = self.observe(batch)
            # In a graph the behaviour is learned beside the rest of the model's step: neither needs
            # the other, and neither fills a card. It begins here, where the posterior is known.
            beside = utils.Beside(self.device) if self.captures else nullcontext()
            loss, metrics = self.model_loss(batch, image, post, prior)
        self._backward("world", loss, metrics)
        with beside:
            with self.autocast():
                losses, more = self.behaviour_losses(post)
            metrics.update(more)
            # The actor's loss runs through the value's graph too: the first backward pass keeps it.
            self._backward("value", losses["value"], metrics, retain_graph=True)
            self._backward("actor", losses["actor"], metrics)
        return {name: value.detach() for name, value in metrics.items()}

    def update(self, batch: dict, number: int = 0) -> dict:
        """Gradient step `number` of the run, on a batch (T, B, ...) that lies on the device.

        Three losses, three optimizers; every gradient is taken at the old weights. Returns
        scalar tensors by name, still on the device: nothing here waits for it. Where `captures`
        holds, the first step is captured as one graph, and all are replays of it.
        """
        rate = self.model_rate(number)
        for group in self.optimizers["world"].param_groups:
            group["lr"] = group["lr"].fill_(rate) if self.captures else rate
        if not self.captures:
            return self.eager_update(batch)
        if self._captured_step is None:
            self._captured_batch = {key: value.clone() for key, value in batch.items()}
            step = partial(self.eager_update, self._captured_batch)
            self._captured_step = utils.capture(step, self.device, self._undo())
        for key, value in batch.items():
            self._captured_batch[key].copy_(value)
        return self._captured_step()

    def eager_update(self, batch: dict) -> dict:
        """What `update` captures: gradients and optimizers, at the rates that they have."""
        metrics = self.gradients(batch)
        for name, optimizer in self.optimizers.items():
            self.scalers[name].step(optimizer)
            self.scalers[name].update()
        return metrics

    def model_rate(self, number: int) -> float:
        """The world model's learning rate at gradient step `number`."""
        c = self.config
        decay = 1 + number / c.model_rate_decay if c.model_rate_decay else 1
        return c.model_learning_rate / decay

    def _backward(self, name: str, loss: Tensor, metrics: dict, retain_graph=False) -> None:
        """The clipped gradient of `loss` for the network `name`, and for no other."""
        optimizer, scaler = self.optimizers[name], self.scalers[name]
        weights = list(getattr(self, name).parameters())
        optimizer.zero_grad()
        scaler.scale(loss).backward(inputs=weights, retain_graph=retain_graph)
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(weights, self.config.grad_clip_norm)
        if scaler.is_enabled():  # at an overflow the step is skipped, and the scale halved
            metrics[f"overflow/{name}"] = 1 - norm.isfinite().to(self.dtype)
            norm = norm.nan_to_num(0, 0)
        metrics[f"loss/{name}"], metrics[f"grad_norm/{name}"] = loss, norm

    def _undo(self) -> Callable[[], None]:
        """A function that puts back, in place, what gradient steps from now on change."""
        weights = [(p, p.detach().clone()) for p in self.parameters()]
        moments = {
            p: {key: tensor.clone() for key, tensor in state.items()}
            for optimizer in self.optimizers.values()
            for p, state in optimizer.state.items()
        }
        scales = {}
        for name, scaler in self.scalers.items():
            scaler.scale(torch.zeros((), device=self.device))  # its tensors, if it has none
            scales[name] = scaler.state_dict()

        @torch.no_grad()
        def undo():
            for p, old in weights:
                p.copy_(old)
            for optimizer in self.optimizers.values():
                for p, state in optimizer.state.items():
                    for key, tensor in state.items():  # Adam starts from zeros
                        tensor.copy_(moments[p][key]) if p in moments else tensor.zero_()
            for name, scaler in self.scalers.items():
                if scaler.is_enabled():
                    scaler.update(scales[name]["scale"])  # ends a step that was begun by `unscale_`
                    scaler.load_state_dict(scales[name])

        return undo

    # --------------------------------------------------------------------------- state

    def state(self) -> dict:
        """All that training changes: every network, every optimizer, the loss scalers."""
        optimizers = self.optimizers.items()
        return {
            "networks": self.state_dict(),
            # Without the rates and the like: those are in the configuration.
            "optimizers": {n: {"state": o.state_dict()["state"]} for n, o in optimizers},
            "scalers": {name: scaler.state_dict() for name, scaler in self.scalers.items()},
        }

    def load_state(self, state: dict) -> None:
        """Loads what `state` returned."""
        self.load_state_dict(state["networks"])
        for name, optimizer in self.optimizers.items():
            options = optimizer.state_dict()["param_groups"]
            moments = state["optimizers"][name]["state"]
            optimizer.load_state_dict({"state": moments, "param_groups": options})
        self._captured_step = None  # it knows the optimizers' old tensors
        for name, scale in state.get("scalers", {}).items():
            if scale:  # none where it was not in use
                self.scalers[name].load_state_dict(scale)


# ------------------------------------------------------------------------- acting in environments


# Streams of random numbers that a run draws from; see `utils.stream_seed`.
TRAINING, EVALUATION, REPLAY = range(3)


def make_env(config: Config, render_mode=None):
    """The environment of a run: its task, its action repeat, its time limit."""
    c = config
    return env_wrapper.make_env(c.env, c.seed, c.action_repeat, c.time_limit, render_mode)


class Policy:
    """Acts in N environments at once and remembers their states.

    Called with images (N, 64, 64, 3) uint8 of consecutive steps; returns actions (N, A) float32.
    Its tensors stay where they are, so that on CUDA a step is captured once (see
    `Dreamer.policy`).

    The world model is trained on states of `train_seq_len` steps at most, and one that is older
    may be unlike any of these. With `act_memory` M a second state of each environment begins at
    zero every M steps and then takes the place of the first, so that the one that acts has seen
    the last M + 1 to 2 M images.
    """

    def __init__(self, agent: Dreamer, n: int, explore: bool):
        self.agent, self.explore, self.taken = agent, explore, 0
        self.image = torch.zeros(n, 64, 64, 3, dtype=torch.uint8, device=agent.device)
        states = 2 if agent.config.act_memory else 1  # of each environment
        self.state = agent.world.rssm.initial(states * n).map(torch.clone)
        self.action = self.state.stoch.new_zeros(n, agent.actions)
        self._step = utils.capture(self._act, agent.device) if agent.captures else self._act

    def reset(self) -> None:
        """Before the first step of episodes."""
        self.taken = 0
        for tensor in (self.action, *self.state):
            tensor.zero_()

    def _act(self) -> None:
        action, state = self.agent.act(self.image, self.state, self.action, self.explore)
        for mine, new in zip((self.action, *self.state), (action, *state)):
            mine.copy_(new)

    def __call__(self, image: np.ndarray) -> np.ndarray:
        self.image.copy_(torch.from_numpy(image))
        memory = self.agent.config.act_memory
        if memory and self.taken and self.taken % memory == 0:
            for first, second in (tensor.chunk(2) for tensor in self.state):
                first.copy_(second)
                second.zero_()
        self.taken += 1
        self._step()
        return self.action.to("cpu", copy=True).numpy()


class EpisodeRecorder:
    """The rows of an episode as they come, and the arrays that the replay takes."""

    def __init__(self, image: np.ndarray, actions: int):
        self.rows = []
        self.add(np.zeros(actions), image, 0.0, False, False)

    def add(self, action, image, reward, terminated, truncated) -> None:
        """A row: `action`, and what the environment's `step` returned for it."""
        self.rows.append((image, action, reward, 0.0 if terminated else 1.0))
        self.over = terminated or truncated

    def episode(self) -> dict:
        """Arrays by key, rows as in the replay."""
        images, *others = zip(*self.rows)
        names = ("action", "reward", "discount")
        arrays = {name: np.asarray(x, np.float32) for name, x in zip(names, others)}
        return {"image": np.stack(images), **arrays}


def collect_episode(env, agent: Dreamer | None, seed: int, stop: utils.StopSignal):
    """One whole episode as arrays, and its frames; random actions without an agent.

    The environment and its action space are seeded with `seed`, so the episode depends on that,
    on the agent and on torch's generator alone. A stop in between puts that generator back.
    """
    before = utils.random_state()
    image, _ = env.reset(seed=seed)
    env.action_space.seed(seed)
    recorder = EpisodeRecorder(image, env.action_space.shape[0])
    frames = 0
    policy = agent.policy(1, explore=True) if agent else None
    try:
        with utils.one_thread():
            while not recorder.over:
                stop.check()
                action = policy(image[None])[0] if policy else env.action_space.sample()
                image, *outcome, info = env.step(action)
                recorder.add(action, image, *outcome)
                frames += info["frames"]
    except utils.Stopped:
        utils.set_random_state(before)
        raise
    return recorder.episode(), frames


def make_evaluation_envs(config: Config):
    """The environments of an evaluation, in lockstep; in processes where there are cores."""
    c = config
    parallel = c.vector_env == "async" or (c.vector_env == "auto" and utils.cores() > 1)
    arguments = (c.env, c.seed, c.action_repeat, c.time_limit)
    return env_wrapper.make_vector_env(c.eval_episodes, parallel, *arguments)


def evaluate(agent: Dreamer, envs, stop: utils.StopSignal) -> list[dict]:
    """Plays an episode in each of `envs` with the policy's mode, in lockstep, and returns them.

    Nothing that training uses is touched: the environments are others, seeded otherwise, and the
    generators are put back. The same weights give the same episodes. Beside the replay's arrays
    an episode holds its `seed` and its `return`.
    """
    seeds = [utils.stream_seed(agent.config.seed, EVALUATION, i) for i in range(envs.num_envs)]
    with utils.isolated_random(seeds[0]):
        images, _ = envs.reset(seed=seeds)
        recorders = [EpisodeRecorder(image, agent.actions) for image in images]
        policy = agent.policy(len(seeds), explore=False)
        while not all(recorder.over for recorder in recorders):
            stop.check()
            actions = policy(images)
            images, *outcomes, _ = envs.step(actions)
            for recorder, *row in zip(recorders, actions, images, *outcomes):
                if not recorder.over:  # an environment starts anew by itself; that is ignored
                    recorder.add(*row)
    episodes = [recorder.episode() for recorder in recorders]
    return [
        {**episode, "seed": seed, "return": float(episode["reward"].sum())}
        for seed, episode in zip(seeds, episodes)
    ]


def open_loop_video(agent: Dreamer, episodes: list[dict], length: int = 50) -> np.ndarray:
    """Truth, open-loop prediction and error below each other, an episode a column.

    `episodes` hold `image` and `action`; the first five frames are context. Returns
    (T, 3 * 64, 64 * episodes, 3) uint8.
    """
    length = min(length, *(len(e["image"]) for e in episodes))
    image = np.stack([e["image"][:length] for e in episodes], 1)
    action = np.stack([e["action"][:length] for e in episodes], 1)
    with utils.isolated_random(0):
        model = agent.open_loop(
            torch.from_numpy(image).to(agent.device), torch.from_numpy(action).to(agent.device)
        )
    truth, model = image / 255, model.float().cpu().numpy()
    rows = np.concatenate([truth, model, (model - truth + 1) / 2], 2)  # (T, B, 3 * 64, 64, 3)
    return utils.to_uint8(np.concatenate(list(rows.swapaxes(0, 1)), 2))


def frames_to_show(env) -> tuple[int, float]:
    """A GIF shows every n-th observation: n, and its frames a second, 30 at most."""
    fps = env.unwrapped.metadata["render_fps"]
    every = math.ceil(fps / 30)
    return every, fps / every


def film(config: Config, episode: dict) -> tuple[np.ndarray, float]:
    """An evaluated episode played again at a size for people: frames, and frames per second.

    The same seed and the same actions give the same episode, so only the episodes that are shown
    need the large pictures.
    """
    env = make_env(config, render_mode="rgb_array")
    every, fps = frames_to_show(env)
    env.reset(seed=episode["seed"])
    frames = [env.render()]
    for t, action in enumerate(episode["action"][1:], 1):
        env.step(action)
        if t % every == 0:
            frames.append(env.render())
    env.close()
    return np.stack(frames), fps


# --------------------------------------------------------------------------------------- training


@dataclass
class Progress:
    """Where a run stands; with the networks and the replay, all that its future depends on."""

    step: int = 0  # frames of the environment, as is every `step` of a run
    episodes: int = 0
    updates: int = 0  # gradient steps
    iterations: int = 0
    updates_left: int = 0  # of this iteration
    iteration_end: int = 0  # frames at which this iteration has collected enough
    last_return: float = math.nan
    best_return: float = -math.inf
    best_step: int = -1  # frames at the best evaluation
    seconds: float = 0.0  # that the run took up to here, without what restores cut off
    iteration_start: tuple[int, float] = (0, 0.0)  # frames and seconds at its start


class Trainer:
    """A run: prefill, then iterations of gradient steps, collection, and what is due after them.

    `run` does one unit of work at a time: a gradient step, an episode, the end of an iteration.
    Between two units the run can be saved exactly, in the middle of an iteration too.
    """

    def __init__(self, config: Config, folder: Path, stop: utils.StopSignal):
        self.config, self.folder, self.stop = config, folder, stop
        self.device = pick_device(config.device)
        utils.seed_everything(config.seed)
        self.env, self.evaluation_envs = make_env(config), None  # those when they are needed
        actions = self.env.action_space.shape[0]
        self.agent = Dreamer(config, actions, self.device)
        self.replay = self._make_replay(actions)
        self.progress = Progress(iteration_end=config.seed_steps)
        self.every = {
            "evaluation": utils.Every(config.eval_interval),
            "video": utils.Every(config.video_interval),
            "checkpoint": utils.Every(config.checkpoint_interval),
        }
        self.metrics = utils.MeanMetrics()
        self.times = []  # (sampling, updating) seconds of each gradient step
        self.sampler, self.ahead = ThreadPoolExecutor(1), (None, None)
        networks = self.agent.optimizers
        self.watched_names = [f"loss/{name}" for name in networks]
        # With loss scaling a gradient may overflow.
        if not any(scaler.is_enabled() for scaler in self.agent.scalers.values()):
            self.watched_names += [f"grad_norm/{name}" for name in networks]
        self.watched = []  # what must be finite, of the gradient steps not yet looked at
        self.episode_files = []  # files of the episodes seen, oldest first
        self.log_sizes = None  # sizes of the log files at the checkpoint that is restored
        self.started = self.logger = self.bar = None  # from `open_logs` on
        self.losses_text = ""  # the last losses, for the bar

    def _make_replay(self, actions: int) -> replay_buffer.ReplayBuffer:
        c = self.config
        # As much as the run can fill: the last iteration may run past the run's end.
        frames = max(c.total_steps, c.seed_steps) + c.collect_steps
        episodes = math.ceil(frames / c.time_limit) + 1
        rows_for = replay_buffer.ReplayBuffer.rows_for
        rows = min(episodes * longest_episode(c), rows_for(c.buffer_gb, actions))
        if rows < longest_episode(c):
            raise utils.RunError(
                f"--buffer-gb {c.buffer_gb}: room for {rows} rows, and an episode has up to "
                f"{longest_episode(c)}"
            )
        # On the card where half of what is free there is enough: the rest is for training.
        fits = rows <= rows_for(utils.free_memory_gb(self.device) / 2, actions)
        return replay_buffer.ReplayBuffer(rows, actions, self.device if fits else "cpu")

    @property
    def complete(self) -> bool:
        """Whether the evaluation of the run's end has been made."""
        return self.every["evaluation"].last >= self.config.total_steps

    # ----------------------------------------------------------------- the loop

    def run(self) -> None:
        """Trains until `total_steps`; a signal or the time limit leaves an exact checkpoint."""
        p = self.progress
        self.open_logs()
        try:
            # A new run (one without a checkpoint counts as having lost them), or one restored from
            # a file of another name, such as `<step>-best.pt`.
            if not (self.folder / "checkpoints" / f"{p.step}.pt").exists():
                self.save()
            finished = False
            while not finished:
                self.stop.check()
                if reason := utils.lost_output():  # whoever read the log is gone, or its disk full
                    raise utils.Stopped(f"standard output: {reason}", 2)
                if p.updates_left:
                    self.gradient_step()
                elif p.step < p.iteration_end:
                    self.collect()
                else:
                    finished = self.end_iteration()
        except utils.Stopped:
            if p.step == p.best_step:  # no episode has come since the best evaluation
                utils.copy_best(self.folder / "checkpoints", p.step)
            self.save()
            raise
        finally:
            self.close()

    def open_logs(self, bar: bool = True) -> None:
        self.started = time.monotonic() - self.progress.seconds
        self.logger = utils.Logger(self.folder, self.log_sizes)
        self.bar = utils.ProgressBar(self.config.total_steps, self.progress.step, bar)

    def close(self) -> None:
        self.bar.close()
        self.sampler.shutdown()
        self.env.close()
        if self.evaluation_envs:
            self.evaluation_envs.close()
        self.logger.close()  # the last: a full disk fails here again

    def gradient_step(self) -> None:
        """One gradient step, on the batch that its number names; metrics at the last one."""
        p = self.progress
        start = time.monotonic()
        batch = self.next_batch()
        sampled = time.monotonic()
        metrics = self.agent.update(batch, p.updates)
        self.metrics.add(metrics)
        self.watched.append(torch.stack([metrics[name] for name in self.watched_names]))
        p.updates += 1
        p.updates_left -= 1
        # note: reading them waits for the device, so CUDA is asked once in 25 steps
        if self.device.type == "cpu" or p.updates_left % 25 == 0:
            self.check_finite()
        self.times.append((sampled - start, time.monotonic() - sampled))
        if not p.updates_left:
            sample, update = 1000 * np.mean(self.times, 0)
            times = {"time/sample_ms": float(sample), "time/update_ms": float(update)}
            values = {**self.metrics.pop(), **times}
            self.times = []
            self.logger.scalars(p.step, values)
            names = ("loss/image", "loss/reward", "kl", "loss/actor", "loss/value")
            # Five digits: an image's loss falls from 11400 to 11300 and no further.
            texts = (f"{name.removeprefix('loss/')} {values[name]:.5g}" for name in names)
            self.losses_text = "  ".join(texts)
        self.bar.update(p.step, f"return {p.last_return:.0f}  {self.losses_text}")

    def batch(self, number: int) -> dict:
        """The batch of gradient step `number`, on the device; uint8 frames."""
        c = self.config
        seed = (c.seed, REPLAY, number)
        batch = self.replay.sample(c.batch_size, c.train_seq_len, seed, c.first_share)
        return {key: replay_buffer.queue_copy(value, self.device) for key, value in batch.items()}

    def next_batch(self) -> dict:
        """The batch of this gradient step; that of the next is drawn while this one is taken.

        Not across iterations: episodes come between them.
        """
        p = self.progress
        number, future = self.ahead
        batch = future.result() if number == p.updates else self.batch(p.updates)
        if p.updates_left > 1:
            self.ahead = p.updates + 1, self.sampler.submit(self.batch, p.updates + 1)
        return batch

    def check_finite(self) -> None:
        """Stops the run at the first loss or gradient that is not finite; the batch is saved.

        Raises:
            utils.RunError: naming the gradient step, what was not finite, the batch, and the
                last checkpoint, which is good: `save` looks here first. Or: float16 overflows at
                every loss scale.
        """
        if not self.watched:
            return
        # Before a scale reaches 0, whose inverse is inf.
        scales = [s.get_scale() for s in self.agent.scalers.values() if s.is_enabled()]
        if scales and min(scales) < 1e-6:
            raise utils.RunError(
                f"gradient step {self.progress.updates}: gradients overflow float16 at every loss "
                "scale; go on with --restore --precision fp32"
            )
        finite = torch.stack(self.watched).isfinite().cpu()
        first, self.watched = self.progress.updates - len(self.watched), []
        if finite.all():
            return
        offset = int((~finite.all(1)).nonzero()[0])
        number = first + offset
        wrong = [name for name, ok in zip(self.watched_names, finite[offset]) if not ok]
        path = self.folder / f"batch-{number}.npz"
        with utils.atomic_file(path) as file:
            np.savez_compressed(file, **{k: v.cpu().numpy() for k, v in self.batch(number).items()})
        saved = utils.checkpoints(self.folder / "checkpoints")
        raise utils.RunError(
            f"gradient step {number}: not finite: {', '.join(wrong)}; its batch is {path}, "
            f"the last good checkpoint {saved[-1] if saved else 'is none'}"
        )

    def collect(self) -> None:
        """One episode into the replay: of random actions until `seed_steps`."""
        c, p = self.config, self.progress
        start = time.monotonic()
        seed = utils.stream_seed(c.seed, TRAINING, p.episodes)
        agent = self.agent if p.step >= c.seed_steps else None
        episode, frames = collect_episode(self.env, agent, seed, self.stop)
        self.save_episode(episode)
        self.replay.add(episode)
        p.step += frames
        p.episodes += 1
        p.last_return = float(episode["reward"].sum())
        seconds = time.monotonic() - start
        self.logger.scalars(
            p.step,
            {
                "train/return": p.last_return,
                "train/length": len(episode["reward"]) - 1,
                "replay/episodes": len(self.replay),
                "replay/gigabytes": self.replay.gigabytes,
                "time/collect_fps": frames / seconds,
            },
        )
        self.bar.update(p.step, f"return {p.last_return:.0f}  {self.losses_text}")

    def end_iteration(self) -> bool:
        """Evaluation, video and checkpoint where due; true if the run is complete."""
        c, p = self.config, self.progress
        complete = p.step >= c.total_steps
        best = False
        if complete or self.every["evaluation"].due(p.step):
            best = self.evaluate()
        p.updates_left = c.update_steps if p.iterations else c.pretrain_steps
        p.iterations += 1
        p.iteration_end = p.step + c.collect_steps
        (frames, before), seconds = p.iteration_start, time.monotonic() - self.started
        p.iteration_start = p.step, seconds
        times = {"time/hours": seconds / 3600, "time/fps": (p.step - frames) / (seconds - before)}
        self.logger.scalars(p.step, {**times, "train/updates": p.updates})
        if complete or best or self.every["checkpoint"].due(p.step):
            self.every["checkpoint"].fired(p.step)
            self.save()
        return complete

    def play(self) -> list[dict]:
        """The episodes of an evaluation."""
        self.evaluation_envs = self.evaluation_envs or make_evaluation_envs(self.config)
        return evaluate(self.agent, self.evaluation_envs, self.stop)

    def evaluate(self) -> bool:
        """Evaluates, with videos where due; true if this was the best evaluation so far."""
        c, p = self.config, self.progress
        episodes = self.play()
        returns = [e["return"] for e in episodes]
        mean = float(np.mean(returns))
        self.logger.scalars(
            p.step,
            {
                "eval/return_mean": mean,
                "eval/return_std": float(np.std(returns)),
                "eval/return_min": min(returns),
                "eval/return_max": max(returns),
            },
        )
        self.bar.write(
            f"{p.step} frames: evaluation {mean:.1f} ± {np.std(returns):.1f} "
            f"({c.eval_episodes} episodes, {min(returns):.0f} to {max(returns):.0f})"
        )
        self.every["evaluation"].fired(p.step)
        if self.every["video"].due(p.step):
            self.every["video"].fired(p.step)
            stride, fps = frames_to_show(self.env)
            self.logger.video(p.step, "evaluation", episodes[0]["image"][::stride][:250], fps)
            self.logger.video(p.step, "open_loop", open_loop_video(self.agent, episodes[:4]), 10)
        if mean > p.best_return:
            p.best_return, p.best_step = mean, p.step
            return True
        return False

    # ------------------------------------------------------------ saving, going on

    def save_episode(self, episode: dict) -> None:
        """Writes an episode to disk and notes its name; the file is whole or absent."""
        name = replay_buffer.episode_name(episode)
        with utils.atomic_file(self.folder / "episodes" / name) as file:
            replay_buffer.write_episode(file, episode)
        self.episode_files.append(name)

    def save(self) -> None:
        """Writes a checkpoint and removes those that are no longer kept."""
        self.check_finite()
        folder = self.folder / "checkpoints"
        self.progress.seconds = time.monotonic() - self.started
        state = {
            "config": asdict(self.config),
            "actions": self.agent.actions,
            "agent": self.agent.state(),
            "progress": asdict(self.progress),
            "every": {name: trigger.last for name, trigger in self.every.items()},
            "metrics": self.metrics.state_dict(),
            "random": utils.random_state(),
            "episodes": self.episode_files,
            "files": self.logger.state_dict(),
        }
        utils.save_checkpoint(folder / f"{self.progress.step}.pt", state)
        utils.prune_checkpoints(folder, keep=3, best=self.progress.best_step)

    def restore(self, path: Path, state: dict) -> None:
        """Goes on from the checkpoint at `path`: fills the replay from the run's episodes.

        A damaged episode is moved to `episodes/damaged/` and named. The episodes and checkpoints
        that came after the checkpoint are removed, the rows of the logs when these are opened: all
        will come again, the same. If the run was complete at the checkpoint none will come, and
        nothing is removed.

        Raises:
            utils.RunError: the checkpoint is of another task's shape or of another version of this
                program, or no episode is left.
        """
        load_agent(self.agent, state)
        with fitting_checkpoint():
            self.progress = Progress(**state["progress"])
            for name, last in state["every"].items():
                self.every[name].last = last
            self.metrics.load_state_dict(state["metrics"])
            self.log_sizes = dict(state["files"])
            episodes = [self.folder / "episodes" / name for name in state["episodes"]]
            utils.set_random_state(state["random"])
        for episode in utils.bar(episodes, "replay"):
            self.stop.check()
            self.load_episode(episode)
        if episodes and not len(self.replay):
            raise utils.RunError(f"no episode of {self.folder / 'episodes'} can be read")
        if not self.complete:
            self.forget_after(path)

    def load_episode(self, path: Path) -> None:
        """An episode from disk into the replay, or out of the way."""
        try:
            self.replay.add(replay_buffer.load_episode(path, self.agent.actions))
            self.episode_files.append(path.name)
        except replay_buffer.DamagedEpisode as error:
            if path.exists():
                aside = path.parent / "damaged"
                aside.mkdir(exist_ok=True)
                path.replace(aside / path.name)
                utils.say(f"damaged episode, moved to {aside}: {path.name}: {error}")
            else:
                utils.say(f"missing episode: {path}")

    def forget_after(self, checkpoint: Path) -> None:
        """Removes checkpoints later than the restored one, and episodes that it has not seen.

        Of the same frames `<step>.pt` is later than `<step>-best.pt`.
        """
        now = self.progress.step
        # The episodes last: if this is cut short, each checkpoint that is left has all of its own.
        for path in utils.checkpoints(self.folder / "checkpoints"):
            same = path.stem == str(now) and path.resolve() != checkpoint.resolve()
            if utils.step_of(path) > now or same:
                path.unlink()
        for path in (self.folder / "episodes").glob("*.npz"):
            if path.name not in self.episode_files:
                path.unlink()


@contextmanager
def fitting_checkpoint():
    """Inside, what is missing or of another kind in a checkpoint becomes a `utils.RunError`."""
    try:
        yield
    except utils.RunError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if utils.out_of_memory(error):
            raise
        # PyTorch names every tensor that does not fit, a line each.
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200)
        raise utils.RunError(f"the checkpoint does not fit this program: {reason}") from error


def load_agent(agent: Dreamer, state: dict) -> None:
    """Loads a checkpoint into an agent.

    Raises:
        utils.RunError: it is of another task's shape, or of other sizes.
    """
    with fitting_checkpoint():
        if state["actions"] != agent.actions:
            raise utils.RunError(
                f"the checkpoint is of a task with {state['actions']} action dimensions "
                f"({state['config']['env']}); this one has {agent.actions}"
            )
        agent.load_state(state["agent"])


# ------------------------------------------------------------------------------------------- main


class Parser(argparse.ArgumentParser):
    """An error is one line, without the usage of fifty flags."""

    def error(self, message: str):
        self.exit(2, f"dreamer.py: error: {message} (see --help)\n")


def make_parser() -> argparse.ArgumentParser:
    """The command line: modes, then the fields of `Config` by group."""
    parser = Parser(
        usage="dreamer.py --train [--restore] | --evaluate --restore | --benchmark  [flags]",
        description="Dreamer v1 and v2 on the DeepMind Control Suite, from pixels.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=98),
    )
    modes = parser.add_argument_group("modes")
    for name, text in (
        ("train", "train a run"),
        ("evaluate", "play episodes, write their returns as JSON and GIFs"),
        ("restore", "go on with the run, or evaluate it"),
        ("benchmark", "how fast is this machine, how long will a run take"),
    ):
        modes.add_argument(f"--{name}", action="store_true", help=text)
    forgotten = "restore this checkpoint; in training, what came after it is forgotten"
    modes.add_argument("--checkpoint-path", metavar="PATH", help=forgotten)
    modes.add_argument("--json", metavar="PATH", help="where --benchmark writes its numbers too")
    for f in fields(Config):
        if "group" in f.metadata:
            group = parser.add_argument_group(f.metadata["group"])
        options = {"help": f.metadata["help"] + default_text(f), "dest": f.name}
        if f.type is bool:
            options["action"] = "store_true"
        else:
            options["type"] = f.metadata.get("type", f.type)
            options["choices"] = f.metadata.get("choices")
            options["metavar"] = None if options["choices"] else "X"
        group.add_argument("--" + f.name.replace("_", "-"), *f.metadata["aliases"], **options)
        if f.name == "device":
            no_gpu = {"action": "store_const", "const": "cpu", "dest": f.name}
            group.add_argument("--no-gpu", help="the same as --device cpu", **no_gpu)
    return parser


def default_text(f) -> str:
    """The default of a field, as --help shows it; two where the presets or algorithms differ."""
    tables = {**PRESETS, **ALGORITHMS}
    values = {name: table[f.name] for name, table in tables.items() if f.name in table}
    if values:
        typed = {name: "none" if value is None else value for name, value in values.items()}
        return " (" + ", ".join(f"{name}: {value}" for name, value in typed.items()) + ")"
    return "" if f.default is None or f.type is bool else f" ({f.default})"


def parse(argv: list[str]) -> tuple[dict, dict]:
    """Modes, and the fields of `Config` that were given. Flags take `-` and `_` alike."""

    def dashes(word):
        name, equals, value = word.partition("=")
        return name.replace("_", "-") + equals + value if word.startswith("--") else word

    given = vars(make_parser().parse_args([dashes(word) for word in argv]))
    if "env" in given:
        given["env"] = env_wrapper.canonical_name(given["env"])
    settings = {f.name for f in fields(Config)}
    modes = {name: value for name, value in given.items() if name not in settings}
    return modes, {name: value for name, value in given.items() if name in settings}


def run_folder(config: Config) -> Path:
    """`<logdir>/<env>/<algo>/<exp>/<seed>`."""
    return Path(config.logdir) / config.env / config.algo / config.exp / str(config.seed)


def read_config(folder: Path) -> dict | None:
    """The saved settings of a run, or None where there is no run.

    Raises:
        utils.RunError: the file is damaged.
    """
    path = folder / "config.json"
    if not path.exists():
        return None
    try:
        saved = json.loads(path.read_text())
    except ValueError as error:
        raise utils.RunError(f"{path} is damaged: {error}") from error
    if not isinstance(saved, dict) or not {"env", "algo"} <= saved.keys():
        raise utils.RunError(f"{path} is damaged: it does not hold the settings of a run")
    return saved


def find_checkpoint(modes: dict, folder: Path) -> tuple[Path | None, dict | None]:
    """The checkpoint that was asked for, else the newest that can be read, and its state.

    A damaged one is named and the one before is tried. Both are None where a run has none yet.

    Raises:
        utils.RunError: none of those that there are can be read.
    """
    if "checkpoint_path" in modes:
        path = Path(modes["checkpoint_path"])
        return path, utils.load_checkpoint(path)
    paths = utils.checkpoints(folder / "checkpoints")
    for path in reversed(paths):
        try:
            return path, utils.load_checkpoint(path)
        except utils.RunError as error:
            utils.say(f"{error}: trying the one before")
    if paths:
        raise utils.RunError(f"no checkpoint of {folder / 'checkpoints'} can be read")
    return None, None


def lies_in(checkpoint: Path, folder: Path) -> bool:
    """Whether a checkpoint is the run's own."""
    return checkpoint.parent.resolve() == (folder / "checkpoints").resolve()


def train_command(modes: dict, given: dict) -> None:
    """--train, with or without --restore."""
    folder = run_folder(Config(**given))
    saved = read_config(folder)
    patterns = ("checkpoints/*.pt", "episodes/*.npz", "metrics.jsonl")
    found = [path for pattern in patterns for path in folder.glob(pattern)]
    if found and saved is None:
        raise utils.RunError(
            f"{folder} holds {found[0].name} but no config.json: put that back, or --exp NAME "
            "starts another run"
        )
    if saved is not None and "restore" not in modes:
        raise utils.RunError(
            f"the run {folder} exists: --restore goes on with it, --exp NAME starts another"
        )
    if "restore" in modes and saved is None:
        raise utils.RunError(f"no run to restore at {folder}")
    # A folder that was renamed or copied goes by the name that it was found under.
    config = resolve({"exp": Config.exp, **given}, saved)
    if saved is None:
        check_lengths(config)
    env_wrapper.canonical_name(config.env)  # a machine that cannot render says so before we write
    folder.mkdir(parents=True, exist_ok=True)
    with utils.run_lock(folder), utils.StopSignal(config.max_hours) as stop:
        path, state = find_checkpoint(modes, folder) if saved else (None, None)
        if path and not lies_in(path, folder):
            raise utils.RunError(f"{path} is no checkpoint of the run {folder}")
        # An empty log is that of a start which was killed before its first checkpoint.
        if not path and any(file.stat().st_size for file in found):
            raise utils.RunError(
                f"{folder} has lost its checkpoints: put one back, or --exp NAME starts another run"
            )
        for name in ("", "episodes", "checkpoints", "videos"):
            (folder / name).mkdir(exist_ok=True)
            utils.clear_temporaries(folder / name)
        trainer = Trainer(config, folder, stop)
        describe(trainer.agent, f"run {folder}")
        utils.say(f"pictures: {trainer.env.unwrapped.renderer}")
        utils.say(f"replay: {trainer.replay}")
        if path:
            trainer.restore(path, state)
        utils.say(f"from {path or 'the start'}")
        if trainer.complete:
            frames = trainer.progress.step
            utils.say(f"this run is complete: {frames} frames (raise --total-steps to go on)")
            return
        utils.write_json(folder / "config.json", asdict(config))
        trainer.run()
        utils.say(f"complete: {folder}; the same flags with --evaluate --restore show it")


def evaluate_command(modes: dict, given: dict) -> None:
    """--evaluate --restore: returns, their JSON, GIFs of the best and the worst episode and
    of an open-loop prediction."""
    if "restore" not in modes:
        raise utils.RunError("--evaluate needs --restore: the newest checkpoint of the run")
    folder = run_folder(Config(**given))
    path, state = find_checkpoint(modes, folder)
    if path is None:
        raise utils.RunError(f"no checkpoint in {folder / 'checkpoints'}")
    name = {} if "checkpoint_path" in modes else {"exp": Config.exp}
    config = resolve({**name, **given}, state["config"], EVALUATION_MAY_CHANGE)
    folder = run_folder(config)
    if not lies_in(path, folder) and (folder / "config.json").exists():
        raise utils.RunError(
            f"{path} is no checkpoint of the run {folder}: --exp NAME keeps its evaluation apart"
        )
    with utils.StopSignal(config.max_hours) as stop, closing(make_evaluation_envs(config)) as envs:
        actions = envs.single_action_space.shape[0]
        agent = Dreamer(config, actions, pick_device(config.device))
        load_agent(agent, state)
        with fitting_checkpoint():
            step = state["progress"]["step"]
        describe(agent, f"evaluation of {path}")
        episodes = evaluate(agent, envs, stop)
    write_evaluation(agent, step, path, episodes)


def write_evaluation(agent: Dreamer, step: int, path: Path, episodes: list[dict]) -> None:
    """Prints the returns; writes their JSON, GIFs of the best and the worst episode and of
    an open-loop prediction."""
    config, returns = agent.config, [e["return"] for e in episodes]
    for number, each in enumerate(returns, 1):
        utils.say(f"episode {number}: return {each:.1f}")
    utils.say(f"{config.env} at {step} frames: {np.mean(returns):.1f} ± {np.std(returns):.1f}")
    folder = run_folder(config)
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    result = {
        "checkpoint": str(path),
        "env": config.env,
        "algo": config.algo,
        "step": step,
        "device": str(agent.device),
        "precision": str(agent.precision),
        "return_mean": float(np.mean(returns)),
        "return_std": float(np.std(returns)),
        "episodes": [
            {"seed": e["seed"], "return": e["return"], "length": len(e["reward"]) - 1}
            for e in episodes
        ],
        "config": asdict(config),
    }
    name = f"evaluation-{step}" + utils.BEST * path.stem.endswith(utils.BEST)
    utils.write_json(folder / f"{name}.json", result)
    open_loop = open_loop_video(agent, episodes[:2]).repeat(2, 1).repeat(2, 2)  # twice the size
    videos = {
        "best": film(config, episodes[int(np.argmax(returns))]),
        "worst": film(config, episodes[int(np.argmin(returns))]),
        "open_loop": (open_loop, 10),
    }
    for kind, (frames, fps) in videos.items():
        utils.save_gif(folder / "videos" / f"{name}-{kind}.gif", frames, fps)
    utils.say(f"written: {folder / f'{name}.json'}, {folder / 'videos'}")


def benchmark_command(modes: dict, given: dict) -> None:
    """--benchmark: how fast each part of a run is here, and how long the run would take."""
    config = resolve(given)
    check_lengths(config)
    path = Path(modes["json"]) if "json" in modes else None
    if path and not path.is_file() and (path.exists() or not path.parent.is_dir()):
        other = "is a folder" if path.is_dir() else "is no file"  # but a device, say
        what = other if path.exists() else f"no folder {path.parent}"
        raise utils.RunError(f"--json {path}: {what}")
    with tempfile.TemporaryDirectory() as scratch, utils.StopSignal(config.max_hours) as stop:
        folder = Path(scratch)
        (folder / "episodes").mkdir()
        trainer = Trainer(config, folder, stop)
        describe(trainer.agent, "benchmark")
        trainer.open_logs(bar=False)
        try:
            result = benchmark(trainer)
        finally:
            trainer.close()
    for name, value in result.items():
        utils.say(f"{name:28} {value:.4g}" if isinstance(value, float) else f"{name:28} {value}")
    if path:
        utils.write_json(path, {**result, "config": asdict(config)})


def benchmark(trainer: Trainer) -> dict:
    """Times the methods that training calls, medians of several; and what they add up to."""
    c, agent, p = trainer.config, trainer.agent, trainer.progress

    def seconds_of(what: str, work: Callable, times: int) -> float:
        utils.say(f"measuring: {what}", "stderr")
        return utils.median_seconds(trainer.device, work, times)

    def collect_from(step: int):
        p.step = step
        trainer.collect()

    def gradient_step():
        trainer.stop.check()
        trainer.gradient_step()

    random_seconds = seconds_of("environment", lambda: collect_from(0), 3)  # before `seed_steps`
    frames = p.step
    suites_own = env_wrapper.suites_own(c.env, frames, c.action_repeat)
    suite_seconds = seconds_of("the suite's own environment", suites_own, 3)
    collect_seconds = seconds_of("collecting", lambda: collect_from(c.seed_steps), 3)
    policy, image = agent.policy(1, explore=True), np.zeros((1, 64, 64, 3), np.uint8)
    with utils.one_thread():
        acting_seconds = seconds_of("acting", lambda: policy(image), 20)
    sample_seconds = seconds_of("sampling", lambda: trainer.batch(1), 20)
    p.updates_left = c.update_steps + 10  # the end of an iteration is not reached
    update_seconds = seconds_of("gradient step", gradient_step, 5)
    peak_memory = utils.peak_memory_gb(trainer.device)
    trainer.stop.check()
    with FlopCounterMode(display=False) as counter:
        agent.eager_update(trainer.batch(0))  # the counter sees no operation of a captured graph
    utils.say("measuring: matrix product", "stderr")
    matmul = utils.matmul_flops(trainer.device, agent.precision)
    utils.say("measuring: evaluation", "stderr")
    trainer.play()  # starts the environments, once in a run
    evaluation_seconds = utils.median_seconds(trainer.device, trainer.play, 1)
    work = work_of_run(c, frames)
    seconds = random_seconds, update_seconds, collect_seconds, evaluation_seconds
    return {
        "device": str(trainer.device),
        "precision": str(agent.precision),
        "preset": c.preset,
        "pictures": trainer.env.unwrapped.renderer,
        "environment frames/s": frames / random_seconds,
        "times the suite's own": suite_seconds / random_seconds,
        "collecting frames/s": frames / collect_seconds,
        "acting ms": 1000 * acting_seconds,
        "sampling ms": 1000 * sample_seconds,
        "gradient step ms": 1000 * update_seconds,
        "gradient step GFLOP": counter.get_total_flops() / 1e9,
        "gradient step GFLOP/s": counter.get_total_flops() / update_seconds / 1e9,
        "matrix product GFLOP/s": matmul / 1e9,
        "share of matrix product": counter.get_total_flops() / update_seconds / matmul,
        "evaluation s": evaluation_seconds,
        "peak memory GB": peak_memory,
        "hours for --total-steps": sum(n * each for n, each in zip(work, seconds)) / 3600,
    }


def work_of_run(config: Config, frames: int) -> tuple[int, int, int, int]:
    """Random episodes, gradient steps, episodes of the policy and evaluations of a whole run.

    `frames`: of an episode. Episodes are whole; an iteration ends with one evaluation at most.
    """
    c = config
    prefill, collected = math.ceil(c.seed_steps / frames), math.ceil(c.collect_steps / frames)
    iterations = math.ceil(max(0, c.total_steps - prefill * frames) / (collected * frames))
    updates = c.pretrain_steps + (iterations - 1) * c.update_steps if iterations else 0
    every, evaluations = utils.Every(c.eval_interval), 0
    for iteration in range(iterations + 1):
        step = (prefill + iteration * collected) * frames
        if step >= c.total_steps or every.due(step):
            every.fired(step)
            evaluations += 1
    return prefill, updates, iterations * collected, evaluations


def describe(agent: Dreamer, what: str) -> None:
    """Prints the resolved settings, so that a log says what was run."""
    device, config = agent.device, agent.config
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    utils.say(f"{what} on {name} in {agent.precision}, preset {config.preset}")
    utils.say("  ".join(f"{key}={value}" for key, value in asdict(config).items()))


# What a user can mend: one line each, exit code 2.
USER_ERRORS = (utils.RunError, env_wrapper.EnvironmentProblem, replay_buffer.ReplayError)


# Of what a system reports, these are mistakes of a program; the rest is of its disks and mounts.
PROGRAM_ERRORS = {errno.EBADF, errno.EINVAL, errno.ECHILD, errno.ESRCH}


def command(argv: list[str]) -> None:
    """Does what the command line says, or raises."""
    modes, given = parse(argv)
    commands = {
        "train": train_command,
        "evaluate": evaluate_command,
        "benchmark": benchmark_command,
    }
    wanted = [name for name in commands if name in modes]
    if len(wanted) != 1:
        raise utils.RunError("give one of --train, --evaluate --restore, --benchmark")
    for name, mode in (("checkpoint_path", "restore"), ("json", "benchmark")):
        if name in modes and mode not in modes:
            raise utils.RunError(f"--{name.replace('_', '-')} goes with --{mode}")
    if {"restore", "benchmark"} <= modes.keys():
        raise utils.RunError("--restore goes with --train or --evaluate")
    utils.tune_process()
    commands[wanted[0]](modes, given)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    utils.open_streams()
    try:
        command(argv)
        if reason := utils.lost_output():
            raise utils.RunError(f"standard output: {reason}; all the rest is done")
    except utils.Stopped as stopped:
        hint = "; --train --restore goes on" if "--train" in argv else ""
        utils.say(f"stopped by {stopped}{hint}", "stderr" if stopped.code == 2 else "stdout")
        return stopped.code
    except KeyboardInterrupt:
        return 130
    except USER_ERRORS as error:
        utils.say(f"dreamer.py: error: {error}", "stderr")
        return 2
    except (MemoryError, RuntimeError, OSError, ValueError) as error:
        if not (line := machine_error(error)):
            raise
        utils.say(f"dreamer.py: error: {line}", "stderr")
        return 2
    return 0


def machine_error(error: Exception) -> str | None:
    """What is wrong with the machine rather than with the program, in one line; or None."""
    if isinstance(error, OSError):
        place = f": {error.filename}" if error.filename else ""
        theirs = error.strerror and error.errno not in PROGRAM_ERRORS
        return f"{error.strerror}{place}" if theirs else None
    if utils.out_of_memory(error):
        return "out of memory; a new run takes less with a lower --buffer-gb or --batch-size"
    return None


if __name__ == "__main__":
    sys.exit(main())
