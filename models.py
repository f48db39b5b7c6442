"""The networks of Dreamer, and the distributions that they return.

Axes, in the order in which they appear in shapes:
    T  time within a sequence          S  stochastic state (stoch)
    B  sequences in a batch            D  deterministic state (deter)
    H  imagination horizon             F  feature = S + D
    N  starts of imagination           E  image embedding
    A  action dimensions               d  width of the convolutions (cnn-depth)
A leading "..." stands for any batch axes. Sequences are time-major: (T, B, ...).
Images are (..., 64, 64, 3), float, in [-0.5, 0.5].

Sources: Dreamer v1 is arXiv 1912.01603, Dreamer v2 is arXiv 2010.02193; the RSSM comes from
PlaNet, arXiv 1811.04551.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from itertools import pairwise, repeat
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def standard_normal(shape, like: Tensor) -> Tensor:
    """Noise of `shape` on the device and in the type of `like`.

    Drawn in float32 whatever the type, so that a float64 run sees the numbers of a float32 run.
    """
    return torch.randn(shape, device=like.device).to(like.dtype)


def full_precision(x: Tensor) -> Tensor:
    """Half-precision outputs of autocast as float32; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


# ------------------------------------------------------------------------------ distributions


class UnitNormal:
    """Independent Normals of standard deviation 1, their log-density summed over `event_dims`."""

    def __init__(self, mean: Tensor, event_dims: int):
        self.mean, self.event_dims = mean, event_dims

    def log_prob(self, x: Tensor) -> Tensor:
        """ln N(x; mean, 1), summed over the last `event_dims` axes."""
        error = F.mse_loss(self.mean, x, reduction="none")  # one pass, and one for its gradient
        size = math.prod(error.shape[error.ndim - self.event_dims :])
        if self.event_dims:
            error = error.flatten(-self.event_dims).sum(-1)
        return -0.5 * (error + size * math.log(2 * math.pi))


class Bernoulli:
    """A probability by its logit: the mean, which is trained to be the discount of a step."""

    def __init__(self, logit: Tensor):
        self.logit = logit

    @property
    def mean(self) -> Tensor:
        return torch.sigmoid(self.logit)

    def log_prob(self, x: Tensor) -> Tensor:
        """x ln p + (1 - x) ln(1 - p); `x` may be any number in [0, 1] (a soft target)."""
        return -F.binary_cross_entropy_with_logits(self.logit, x, reduction="none")


class TanhNormal:
    """The policy: tanh of a diagonal Normal, on actions in (-1, 1). `mean`, `std`: (..., A)."""

    def __init__(self, mean: Tensor, std: Tensor):
        self.mean, self.std = mean, std

    def rsample(self) -> Tensor:
        """A reparameterized sample, (..., A)."""
        return torch.tanh(self.rsample_before_tanh())

    def rsample_before_tanh(self) -> Tensor:
        """The reparameterized sample before its tanh, (..., A)."""
        return self.mean + self.std * standard_normal(self.mean.shape, self.mean)

    def surprise(self, x: Tensor) -> Tensor:
        """-ln of the density of the action tanh(`x`), summed over A: (..., A) to (...).

        By ln(1 - tanh(x)^2) = 2 (ln 2 - x - softplus(-2x)) it is finite for every x. Its mean over
        samples is the entropy, and its gradient does not vanish where the tanh's does.
        """
        normal = 0.5 * ((x - self.mean) / self.std).square() + self.std.log()
        log_slope = 2 * (math.log(2) - x - F.softplus(-2 * x))
        return (normal + 0.5 * math.log(2 * math.pi) + log_slope).sum(-1)

    def mode(self, samples: int = 100) -> Tensor:
        """Of `samples` samples the one of highest density, as in the v1 code: (..., A)."""
        shape = (samples, *self.mean.shape)
        x = self.mean + self.std * standard_normal(shape, self.mean)
        best = self.surprise(x).argmin(0, keepdim=True)
        return torch.tanh(x.gather(0, best[..., None].expand(1, *self.mean.shape))[0])


def kl_divergence(mean_p: Tensor, std_p: Tensor, mean_q: Tensor, std_q: Tensor) -> Tensor:
    """KL(p || q) of diagonal Normals in nats, summed over the last axis."""
    ratio = (std_p / std_q).square()
    distance = ((mean_p - mean_q) / std_q).square()
    return 0.5 * (ratio + distance - 1 - ratio.log()).sum(-1)


# ------------------------------------------------------------------------------- building blocks


def init_as_keras(module: nn.Module) -> None:
    """Initial weights as in the v1 code: Glorot uniform, zero biases, orthogonal recurrence.

    Keras treats the three gates of a GRU as one matrix, and so does this. For `Module.apply`.
    """
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.GRUCell):
        nn.init.xavier_uniform_(module.weight_ih)
        nn.init.orthogonal_(module.weight_hh)
        nn.init.zeros_(module.bias_ih)
        nn.init.zeros_(module.bias_hh)


def mlp(inputs: int, units: int, layers: int, outputs: int) -> nn.Sequential:
    """`layers` hidden layers of `units` with ELU, then a linear one."""
    sizes = [inputs] + [units] * layers
    hidden = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.ELU(inplace=True))]
    return nn.Sequential(*hidden, nn.Linear(sizes[-1], outputs))


def on_rows(net: nn.Module, x: Tensor) -> Tensor:
    """`net`, from (N, F) to (N, G), on every row of `x`: (..., F) to (..., G).

    Of more than two axes PyTorch makes a view, and where one is changed in place, as by ELU here,
    the backward pass copies the whole of it four times.
    """
    return net(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


def for_each_step(weights: Iterable[Tensor], sequence: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The weights for each of the T steps of `sequence` (T, ...), in its type.

    Where they are cast, each step's are views of its own: their gradients are summed at once and
    rounded once. Those of weights that are used T times are rounded at every addition.
    """
    weights, steps = tuple(weights), len(sequence)
    if all(w.dtype == sequence.dtype for w in weights):
        return repeat(weights, steps)
    return zip(*(w.to(sequence.dtype).expand(steps, *w.shape).unbind() for w in weights))


class ConvTransposeFromPixel(nn.ConvTranspose2d):
    """A transposed convolution whose input is one pixel: its matrix product, (N, C, 1, 1) in.

    The weights, their initialization and the function are those of `nn.ConvTranspose2d`.
    """

    def forward(self, x: Tensor) -> Tensor:
        height, width = self.kernel_size
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)  # a view when channels-last
        y = x.flatten(1) @ weight
        y = y + self.bias.repeat(height * width).to(y.dtype)
        return y.view(len(x), height, width, self.out_channels).permute(0, 3, 1, 2)


class ConvTransposeByBlocks(nn.ConvTranspose2d):
    """A transposed convolution of stride 2 and an even kernel: each of its blocks of 2 x 2 pixels
    by an ordinary convolution (sub-pixel convolution, arXiv 1609.05158). (N, C, H, W) in.

    Where there are few channels it is faster. The weights, their initialization and the function
    are those of `nn.ConvTranspose2d`.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int):
        super().__init__(inputs, outputs, kernel, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        size = self.kernel_size[0] // 2
        # Pixel (2i + p, 2j + q) is the sum over a, b of x[i - a, j - b] weight[2a + p, 2b + q].
        weight = self.weight.unflatten(3, (size, 2)).unflatten(2, (size, 2)).flip(2, 4)
        weight = weight.permute(3, 5, 1, 0, 2, 4).flatten(0, 2)  # (p, q, out), in, a, b
        weight = weight.contiguous(memory_format=torch.channels_last)
        y = F.conv2d(x, weight, self.bias.repeat(4), padding=size - 1).permute(0, 2, 3, 1)
        y = y.unflatten(3, (2, -1)).transpose(2, 3)  # N, i, p, j, (q, out)
        n, height, _, width, _ = y.shape
        return y.reshape(n, 2 * height, 2 * width, self.out_channels).permute(0, 3, 1, 2)


# --------------------------------------------------------------------------------------- networks


class State(NamedTuple):
    """A state of the RSSM, or a sequence of them: a sample and the Normal it was drawn from.

    Not everywhere: the initial state is all zeros, and the prior of `observe` is not sampled.
    """

    stoch: Tensor  # (..., S)
    deter: Tensor  # (..., D)
    mean: Tensor  # (..., S)
    std: Tensor  # (..., S)

    @property
    def feature(self) -> Tensor:
        """What the heads read, (..., F)."""
        return torch.cat([self.stoch, self.deter], -1)

    def map(self, function: Callable[[Tensor], Tensor]) -> "State":
        """The state with `function` applied to each of its tensors."""
        return State(*(function(x) for x in self))


class RSSM(nn.Module):
    """Recurrent state-space model (PlaNet, section 3; Dreamer v1, appendix A).

    deter_t = GRU(deter_{t-1}, [stoch_{t-1}, action_t]); prior p(stoch_t | deter_t); posterior
    q(stoch_t | deter_t, embed_t). Here action_t is the action that led to step t.
    """

    min_std = 0.1

    def __init__(self, actions: int, embed: int, stoch: int, deter: int, hidden: int):
        super().__init__()
        self.stoch_size, self.deter_size = stoch, deter
        self.img_in = nn.Linear(stoch + actions, hidden)
        self.cell = nn.GRUCell(hidden, deter)
        self.img_out = mlp(deter, hidden, 1, 2 * stoch)
        self.obs_in = nn.Linear(deter + embed, hidden)
        self.obs_out = nn.Linear(hidden, 2 * stoch)

    def initial(self, batch: int) -> State:
        """The state before a sequence, all zeros, in the weights' type and on their device."""
        zeros = self.img_in.weight.new_zeros
        stoch = zeros(batch, self.stoch_size)
        return State(stoch, zeros(batch, self.deter_size), stoch, stoch)

    def _recur(self, stoch: Tensor, deter: Tensor, action: Tensor, weights=None) -> Tensor:
        """The next deterministic state, (N, D), from one state and action, (N, ...).

        It may be of half precision, and goes as it is into the next step. `weights` stand for
        those of `img_in` and `cell`.
        """
        weight, bias, *cell = weights or self._recurrent_weights()
        x = F.elu(F.linear(torch.cat([stoch, action], -1), weight, bias), inplace=True)
        return torch.gru_cell(x, deter, *cell)

    def _recurrent_weights(self) -> tuple[Tensor, ...]:
        """Those of `img_in` and of the cell, which has them in the order that `gru_cell` takes."""
        return (*self.img_in.parameters(), *self.cell.parameters())

    def _stats(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = full_precision(x).chunk(2, -1)
        return mean, F.softplus(std) + self.min_std

    def img_step(self, state: State, action: Tensor) -> State:
        """The prior of the next state. `action`: (N, A)."""
        deter = self._recur(state.stoch, state.deter, action)
        mean, std = self._stats(self.img_out(deter))
        stoch = mean + std * standard_normal(mean.shape, mean)
        return State(stoch, deter, mean, std)

    def obs_step(self, state: State, action: Tensor, embed: Tensor) -> State:
        """The posterior of the next state. `action`: (N, A), `embed`: (N, E)."""
        return self._posterior(embed[None], action[None], state).map(lambda x: x[0])

    def observe(self, embed: Tensor, action: Tensor, state: State) -> tuple[State, State]:
        """Posterior and prior of every step of a sequence.

        `embed`: (T, B, E), `action`: (T, B, A), `state`: before the sequence, (B, ...). The
        returned states are (T, B, ...); the prior's `stoch` is its mean, since nothing samples it.
        """
        posterior = self._posterior(embed, action, state)
        # The recurrence does not need the prior: its head runs once over all of time.
        mean, std = self._stats(on_rows(self.img_out, posterior.deter))
        return posterior, State(mean, posterior.deter, mean, std)

    def _posterior(self, embed: Tensor, action: Tensor, state: State) -> State:
        """The posterior of every step of a sequence; shapes as in `observe`."""
        stoch, deter = state.stoch, state.deter
        # The posterior's first layer, in two: the embedding's share is one product for all of time.
        deter_weight, embed_weight = self.obs_in.weight.tensor_split([self.deter_size], 1)
        embed_part = F.linear(embed, embed_weight, self.obs_in.bias)
        noise = standard_normal((*action.shape[:2], self.stoch_size), stoch)
        recurrent = for_each_step(self._recurrent_weights(), embed)
        observing = for_each_step((deter_weight, *self.obs_out.parameters()), embed)
        steps = []
        # Not by index: in the backward pass each would be a tensor of the size of all of time.
        sequences = action.unbind(), embed_part.unbind(), noise.unbind()
        for a, e, n, recur, (weight, *out) in zip(*sequences, recurrent, observing):
            deter = self._recur(stoch, deter, a, recur)
            hidden = F.elu(F.linear(deter, weight) + e, inplace=True)
            mean, std = self._stats(F.linear(hidden, *out))
            stoch = mean + std * n
            steps.append((stoch, deter, mean, std))
        return State(*(full_precision(torch.stack(x)) for x in zip(*steps)))


class ConvEncoder(nn.Module):
    """Images (..., 64, 64, 3) to embeddings (..., 32d)."""

    def __init__(self, depth: int):
        super().__init__()
        sizes = [3, depth, 2 * depth, 4 * depth, 8 * depth]
        layers = [nn.Conv2d(a, b, 4, stride=2) for a, b in pairwise(sizes)]
        self.net = nn.Sequential(*(m for x in layers for m in (x, nn.ReLU(inplace=True))))
        self.embed_size = 32 * depth

    def forward(self, image: Tensor) -> Tensor:
        # Height, width, channels in memory is what PyTorch calls channels-last: no copy is made.
        x = self.net(image.flatten(0, -4).permute(0, 3, 1, 2))
        return x.permute(0, 2, 3, 1).reshape(*image.shape[:-3], self.embed_size)


class ConvDecoder(nn.Module):
    """Features (..., F) to a unit-variance Normal over images (..., 64, 64, 3)."""

    def __init__(self, features: int, depth: int):
        super().__init__()
        self.dense = nn.Linear(features, 32 * depth)
        self.net = nn.Sequential(
            ConvTransposeFromPixel(32 * depth, 4 * depth, 5, stride=2),
            nn.ReLU(),  # not in place: its input is a view (see `on_rows`)
            nn.ConvTranspose2d(4 * depth, 2 * depth, 5, stride=2),
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(2 * depth, depth, 6, stride=2),
            nn.ReLU(inplace=True),
            ConvTransposeByBlocks(depth, 3, 6),
        )

    def forward(self, feature: Tensor) -> UnitNormal:
        x = self.dense(feature.flatten(0, -2))
        image = self.net(x[:, :, None, None]).permute(0, 2, 3, 1)
        return UnitNormal(full_precision(image.unflatten(0, feature.shape[:-1])), event_dims=3)


class DenseDecoder(nn.Module):
    """Features (..., F) to one number each: the mean of a unit Normal, or a Bernoulli's logit."""

    def __init__(self, features: int, layers: int, units: int, binary: bool = False):
        super().__init__()
        self.net = mlp(features, units, layers, 1)
        self.binary = binary

    def forward(self, feature: Tensor) -> UnitNormal | Bernoulli:
        x = on_rows(self.net[:-1], feature)
        # bfloat16 would round values of about 100 to halves.
        half = x.dtype != self.net[-1].weight.dtype
        with torch.autocast(x.device.type, enabled=False) if half else nullcontext():
            x = self.net[-1](full_precision(x)).squeeze(-1)
        return Bernoulli(x) if self.binary else UnitNormal(x, event_dims=0)


class ActionDecoder(nn.Module):
    """Features (..., F) to the policy over actions (..., A) (Dreamer v1, appendix A).

    mean = 5 tanh(m / 5), std = softplus(s + s0) + 1e-4, with s0 such that s = 0 gives `init_std`.
    """

    mean_scale = 5.0
    min_std = 1e-4

    def __init__(self, features: int, actions: int, layers: int, units: int, init_std: float):
        super().__init__()
        self.net = mlp(features, units, layers, 2 * actions)
        self.raw_init_std = init_std + math.log(-math.expm1(-init_std))  # ln(e^s - 1)

    def forward(self, feature: Tensor) -> TanhNormal:
        mean, std = full_precision(on_rows(self.net, feature)).chunk(2, -1)
        mean = self.mean_scale * torch.tanh(mean / self.mean_scale)
        return TanhNormal(mean, F.softplus(std + self.raw_init_std) + self.min_std)
