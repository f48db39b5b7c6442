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
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def standard_normal(shape, like: Tensor) -> Tensor:
    """Noise of `shape` on the device and in the type of `like`.

    Drawn in float32 whatever the type, so that a float64 run sees the numbers of a float32 run.
    """
    return torch.randn(shape, device=like.device).to(like.dtype)


def full_precision(x: Tensor) -> Tensor:
    """Half-precision outputs of autocast as float32; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def product_type(x: Tensor) -> torch.dtype:
    """The type in which products with `x` are computed here: autocast's if that is on."""
    kind = x.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on and x.dtype == torch.float32 else x.dtype


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
        return torch.tanh(self.before_tanh(standard_normal(self.mean.shape, self.mean)))

    def before_tanh(self, noise: Tensor) -> Tensor:
        """The sample that `noise`, standard normal, stands for, before its tanh: (..., A)."""
        return self.mean + self.std * noise

    def log_prob_before_tanh(self, x: Tensor) -> Tensor:
        """ln of the density of the action tanh(`x`), summed over A: (..., A) to (...).

        By ln(1 - tanh(x)^2) = 2 (ln 2 - x - softplus(-2x)) it is finite for every x. Minus its mean
        over samples is the entropy, and its gradient does not vanish where the tanh's does.
        """
        normal = 0.5 * ((x - self.mean) / self.std).square() + self.std.log()
        log_slope = 2 * (math.log(2) - x - F.softplus(-2 * x))
        return -(normal + 0.5 * math.log(2 * math.pi) + log_slope).sum(-1)

    def mode(self, samples: int = 100) -> Tensor:
        """Of `samples` samples the one of highest density, as in the v1 code: (..., A)."""
        shape = (samples, *self.mean.shape)
        x = self.mean + self.std * standard_normal(shape, self.mean)
        best = self.log_prob_before_tanh(x).argmax(0, keepdim=True)
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


class RecordedMLP:
    """An `mlp` that is called in T steps, without gradients, and then differentiated.

    Autograd would take the gradients of its weights step by step and add them up; here they are
    taken of all steps at once.
    """

    def __init__(self, net: nn.Sequential, steps: int, rows: int):
        self.weights = [w.to(product_type(w)) for w in net.parameters()]
        sizes = [self.weights[0].shape[1], *map(len, self.weights[::2])]
        self.layers = [self.weights[0].new_empty(steps, rows, size) for size in sizes]
        self._steps = zip(*self.layers)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """The next step, (N, F) to (N, G)."""
        layers = next(self._steps)
        layers[0].copy_(x)
        for (x, y), weight, bias in zip(pairwise(layers), self.weights[::2], self.weights[1::2]):
            torch.addmm(bias, x, weight.T, out=y)
            if y is not layers[-1]:
                F.elu(y, inplace=True)
        return y

    def outputs(self) -> Tensor:
        """What all steps gave, (T, N, G), as a function of the weights."""
        return ThroughLayers.apply(self.layers, *self.weights)


class ThroughLayers(torch.autograd.Function):
    """The gradient of a `RecordedMLP`'s weights; its inputs have none."""

    @staticmethod
    def forward(ctx, layers, *weights):
        """The last of `layers`: inputs, outputs of hidden layers, outputs, (T, N, ...) each."""
        ctx.save_for_backward(*layers[:-1], *weights)
        return layers[-1].view_as(layers[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y):
        saved = ctx.saved_tensors
        inputs, weights = saved[: len(saved) // 3], saved[len(saved) // 3 :: 2]
        d_y, gradients = d_y.flatten(0, 1), []
        for x, weight in reversed(list(zip(inputs, weights))):
            gradients = [d_y.T @ x.flatten(0, 1), d_y.sum(0), *gradients]
            if x is not inputs[0]:
                d_y = (d_y @ weight).mul_(elu_slope(x.flatten(0, 1)))
        return None, *gradients


def elu_slope(y: Tensor) -> Tensor:
    """The slope of ELU where its value is `y`."""
    return y.clamp(max=0) + 1


def gru(i: Tensor, s: Tensor, last: Tensor) -> tuple[Tensor, Tensor | tuple[Tensor, ...]]:
    """A GRU's next state, (N, D), from its products with the input, `i`, and with its last state,
    `s`, (N, 3D) each; and what `gru_gradient` needs.

    n + z (last - n), where r = sigmoid(i_r + s_r), z = sigmoid(i_z + s_z), n = tanh(i_n + r s_n).
    As PyTorch has it: the blocks are r, z, n, and r is outside the product.
    """
    if i.is_cuda:  # PyTorch's own, one kernel each way
        return torch.ops.aten._thnn_fused_gru_cell(i, s, last)
    (i_r, i_z, i_n), (s_r, s_z, s_n) = (full_precision(x).chunk(3, -1) for x in (i, s))
    r, z = torch.sigmoid(i_r + s_r), torch.sigmoid(i_z + s_z)
    n = torch.tanh(i_n + r * s_n)
    return (n + z * (last - n)).to(last.dtype), (r, z, n, s_n, last)


def gru_gradient(d_new: Tensor, saved: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The gradients of `gru`'s `i`, `s` and `last` from that of the next state."""
    if d_new.is_cuda:
        return torch.ops.aten._thnn_fused_gru_cell_backward(d_new, saved, has_bias=False)[:3]
    r, z, n, s_n, last = saved
    d_n = d_new * (1 - z) * (1 - n.square())
    d_r, d_z = d_n * s_n * r * (1 - r), d_new * (last - n) * z * (1 - z)
    d_i, d_s = torch.cat([d_r, d_z, d_n], -1), torch.cat([d_r, d_z, d_n * r], -1)
    return tuple(x.to(d_new.dtype) for x in (d_i, d_s, d_new * z))


class ConvOfPictures(nn.Conv2d):
    """A convolution of stride 2 and an even kernel, of a few channels and without gradient to them.

    A card computes convolutions fast whose channels come by eights. There the channels of each
    block of 2 x 2 pixels are taken as those of one, beside ones for the bias. On a CPU that is no
    gain. The weights, their initialization and the function are those of `nn.Conv2d`.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int):
        super().__init__(inputs, outputs, kernel, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.by_blocks(x) if x.is_cuda else super().forward(x)

    def by_blocks(self, x: Tensor) -> Tensor:
        """The same; (N, C, H, W), H and W even."""
        n, channels, height, width = x.shape
        size, used = self.kernel_size[0] // 2, 4 * channels
        shape = n, height // 2, width // 2, used + 8 - used % 8
        blocks = x.new_ones(shape, dtype=product_type(x))
        # Pixel (2i + p, 2j + q) is at i, j, (p, q, channel), and meets weight[2a + p, 2b + q].
        pixels = x.permute(0, 2, 3, 1).unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).transpose(2, 3)
        blocks[..., :used].view(pixels.shape).copy_(pixels)
        weight = self.weight.unflatten(3, (size, 2)).unflatten(2, (size, 2))
        weight = weight.permute(0, 3, 5, 1, 2, 4).flatten(1, 3)  # out, (p, q, channel), a, b
        bias = self.bias[:, None, None, None]
        bias = F.pad(bias, (0, size - 1, 0, size - 1, 0, shape[3] - used - 1))
        weight = torch.cat([weight, bias], 1).contiguous(memory_format=torch.channels_last)
        return F.conv2d(blocks.permute(0, 3, 1, 2), weight.to(blocks.dtype))


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

    @property
    def _action_weight(self) -> Tensor:
        """The part of the first layer's weight that reads actions, (hidden, A)."""
        return self.img_in.weight[:, self.stoch_size :]

    def initial(self, batch: int) -> State:
        """The state before a sequence, all zeros, in the weights' type and on their device."""
        zeros = self.img_in.weight.new_zeros
        stoch = zeros(batch, self.stoch_size)
        return State(stoch, zeros(batch, self.deter_size), stoch, stoch)

    @classmethod
    def stats(cls, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, (..., S) each, of what `img_out` or `obs_out` gives."""
        mean, std = full_precision(x).chunk(2, -1)
        return mean, F.softplus(std) + cls.min_std

    def img_step(self, state: State, action: Tensor) -> State:
        """The prior of the next state. `action`: (N, A)."""
        x = F.elu(self.img_in(torch.cat([state.stoch, action], -1)), inplace=True)
        # Of half precision under autocast, and as it is into the next step.
        deter = self.cell(x, state.deter)
        mean, std = self.stats(self.img_out(deter))
        stoch = mean + std * standard_normal(mean.shape, mean)
        return State(stoch, deter, mean, std)

    def obs_step(self, state: State, action: Tensor, embed: Tensor) -> State:
        """The posterior of the next state. `action`: (N, A), `embed`: (N, E)."""
        return self._posterior(embed[None], action[None], state).map(lambda x: x[0])

    def observe(self, embed: Tensor, action: Tensor, state: State) -> tuple[State, State]:
        """Posterior and prior of every step of a sequence.

        `embed`: (T, B, E), `action`: (T, B, A), `state`: before the sequence, (B, ...), which no
        gradient reaches. The returned states are (T, B, ...); the prior's `stoch` is its mean,
        since nothing samples it. By autograd alone, step by step: `observe_step_by_step` in
        tests/test_models.py.
        """
        posterior = self._posterior(embed, action, state)
        # The recurrence does not need the prior: its head runs once over all of time.
        mean, std = self.stats(on_rows(self.img_out, posterior.deter))
        return posterior, State(mean, posterior.deter, mean, std)

    def _posterior(self, embed: Tensor, action: Tensor, state: State) -> State:
        """The posterior of every step of a sequence; shapes as in `observe`."""
        # What is known beforehand is read for all of time at once.
        embed_weight = self.obs_in.weight[:, self.deter_size :]
        x = F.linear(action, self._action_weight, self.img_in.bias)
        h = F.linear(embed, embed_weight, self.obs_in.bias)
        noise = standard_normal((*action.shape[:2], self.stoch_size), state.stoch)
        weights = self._weights(self.obs_in, self.obs_out, h.dtype)
        return self._states(self._loop(None, x, h, weights, state, noise), x, h)

    @torch.no_grad()
    def roll_out(self, act: Callable[[Tensor], Tensor], state: State, steps: int) -> "Trace":
        """Imagines `steps` steps from `state` (N, ...), without gradients.

        `act` chooses actions (N, A) from features (N, F), step by step.
        """
        noise = standard_normal((steps, *state.stoch.shape), state.stoch)
        hidden, _, out = self.img_out
        x, h = (
            layer.bias.to(product_type(noise)).expand(*noise.shape[:2], -1)
            for layer in (self.img_in, hidden)
        )
        weights = [w.detach() for w in self._weights(hidden, out, h.dtype)]
        return self._loop(act, x, h, weights, state, noise)

    def retrace(self, trace: "Trace", action: Tensor) -> State:
        """The states (T, N, ...) of a roll-out, with gradients to its actions and to nothing else.

        `action`: those that `act` chose, (T, N, A), as a function of what is trained.
        """
        return self._states(trace, F.linear(action, self._action_weight.detach()), None)

    def _weights(self, hidden: nn.Linear, out: nn.Linear, dtype: torch.dtype) -> list[Tensor]:
        """What the loop uses of the weights, with two layers after the GRU; as in `Trace`."""
        recurrent = self.img_in.weight[:, : self.stoch_size], *self.cell.parameters()
        weights = *recurrent, hidden.weight[:, : self.deter_size], *out.parameters()
        return [w.to(dtype) for w in weights]

    @torch.no_grad()
    def _loop(self, act, x, h, weights: list[Tensor], state: State, noise: Tensor) -> "Trace":
        """See `Trace`. `x`, `h`: what is known of its x and h beforehand, before f; `act`, if any,
        chooses an action from the feature before each step.
        """
        x_weight, i_weight, s_weight, i_bias, s_bias, h_weight, out_weight, out_bias = weights
        action_weight = self._action_weight.to(h.dtype) if act else None
        steps, rows, size = noise.shape
        x, h, out = x.clone(), h.clone(), noise.new_empty(steps, rows, len(out_bias))
        stoch = h.new_empty(steps + 1, rows, size)
        stoch[0] = state.stoch
        deters, saved = [state.deter.to(h.dtype, copy=True)], []
        for x_t, h_t, out_t, noise_t, last_stoch, new_stoch in zip(
            x, h, out, noise, stoch[:-1], stoch[1:]
        ):
            last = deters[-1]
            if act:
                action = act(torch.cat([last_stoch, last], -1)).to(h.dtype)
                torch.addmm(x_t, action, action_weight.T, out=x_t)
            torch.addmm(x_t, last_stoch, x_weight.T, out=x_t)
            i = F.linear(F.elu(x_t, inplace=True), i_weight, i_bias)
            new, for_gradient = gru(i, F.linear(last, s_weight, s_bias), last)
            torch.addmm(h_t, new, h_weight.T, out=h_t)
            out_t.copy_(F.linear(F.elu(h_t, inplace=True), out_weight, out_bias))
            mean, std = self.stats(out_t)
            torch.addcmul(mean, std, noise_t, out=new_stoch)
            deters.append(new)
            saved.append(for_gradient)
        return Trace(x, h, out, noise, stoch, torch.stack(deters), saved, weights)

    def _states(self, trace: "Trace", x: Tensor, h: Tensor | None) -> State:
        """The states of a trace, as a function of its weights and of what its layers read."""
        deter, out = ThroughTime.apply(x, h, trace, *trace.weights)
        mean, std = self.stats(out)
        return State(mean + std * trace.noise, full_precision(deter), mean, std)


class Trace(NamedTuple):
    """All that the RSSM's loop computed in T steps, from a state (N, ...).

    With ELU for f, and with actions and embeddings as layers read them, or constants:
        x_t = f(W_x stoch_{t-1} + action_t)
        i_t = W_i x_t + b_i    s_t = W_s deter_{t-1} + b_s    deter_t = gru(i_t, s_t, deter_{t-1})
        h_t = f(W_h deter_t + embed_t)    out_t = W_out h_t + b_out
        mean_t, std_t = stats(out_t)    stoch_t = mean_t + std_t noise_t
    """

    x: Tensor  # (T, N, hidden)
    h: Tensor  # (T, N, hidden)
    out: Tensor  # (T, N, 2S), never of half precision
    noise: Tensor  # (T, N, S)
    stoch: Tensor  # (T + 1, N, S), as layers read it, from the state before the first step on
    deter: Tensor  # (T + 1, N, D), likewise
    saved: list  # T times, for `gru_gradient`
    weights: list[Tensor]  # W_x, W_i, W_s, b_i, b_s, W_h, W_out, b_out


class ThroughTime(torch.autograd.Function):
    """The gradient of a trace: backpropagation through time.

    Autograd would do, step by step, all that it does for one step. Here the loop back in time has
    only what depends on a later step; the rest, the weights' gradients too, is done for all steps
    at once.
    """

    @staticmethod
    def forward(ctx, x, h, trace, *weights):
        """deter (T, N, D) and out (T, N, 2S). `x`, `h`: what x_t and h_t have beside the products
        with the state, as far as it has gradients; only these are taken of them. The state before
        the trace is a constant.
        """
        ctx.save_for_backward(*trace[:6], *weights)
        ctx.saved = trace.saved
        return trace.deter[1:], trace.out.view_as(trace.out)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_deter, d_out):
        x, h, out, noise, stoch, deter, *weights = ctx.saved_tensors
        x_weight, i_weight, s_weight, _, _, h_weight, out_weight, _ = weights
        x_slope, h_slope = elu_slope(x), elu_slope(h)
        std_slope = noise * out[..., noise.shape[-1] :].sigmoid()
        stoch_slope = torch.stack([torch.ones_like(noise), std_slope], 2)  # in both halves of out
        d_out, d_stoch = d_out.reshape(stoch_slope.shape), torch.zeros_like(noise[0])
        d_deter = torch.cat([torch.zeros_like(deter[:1]), d_deter])
        d_x, d_h, d_is, d_ss = torch.empty_like(x), torch.empty_like(h), [], []
        trained = any(ctx.needs_input_grad[1:])  # not so in imagination
        d_outs = torch.empty_like(d_out, dtype=x.dtype)
        for t in reversed(range(len(x))):
            torch.addcmul(d_out[t], stoch_slope[t], d_stoch[:, None], out=d_outs[t])
            torch.mul(d_outs[t].flatten(1) @ out_weight, h_slope[t], out=d_h[t])
            d_new = d_deter[t + 1]
            torch.addmm(d_new, d_h[t], h_weight, out=d_new)
            d_i, d_s, d_last = gru_gradient(d_new, ctx.saved[t])
            before = d_deter[t].add_(d_last)
            torch.addmm(before, d_s, s_weight, out=before)
            torch.mul(d_i @ i_weight, x_slope[t], out=d_x[t])
            d_stoch = d_x[t] @ x_weight
            if trained:
                d_is.append(d_i)
                d_ss.append(d_s)
        if not trained:
            return d_x, *[None] * (2 + len(weights))

        def over_time(d_y: Tensor, y: Tensor) -> Tensor:
            return d_y.flatten(0, 1).T @ y.flatten(0, 1)

        d_i, d_s = torch.stack(d_is[::-1]), torch.stack(d_ss[::-1])
        d_outs, last = d_outs.flatten(2), deter[:-1]
        d_weights = (
            over_time(d_x, stoch[:-1]), over_time(d_i, x), over_time(d_s, last),
            d_i.sum((0, 1)), d_s.sum((0, 1)), over_time(d_h, deter[1:]),
            over_time(d_outs, h), d_outs.sum((0, 1)),
        )  # fmt: skip
        return d_x, d_h, None, *d_weights


class ConvEncoder(nn.Module):
    """Images (..., 64, 64, 3) to embeddings (..., 32d)."""

    def __init__(self, depth: int):
        super().__init__()
        sizes = [depth, 2 * depth, 4 * depth, 8 * depth]
        others = [nn.Conv2d(a, b, 4, stride=2) for a, b in pairwise(sizes)]
        layers = [ConvOfPictures(3, depth, 4), *others]
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
        return self.policy(on_rows(self.net, feature))

    def policy(self, x: Tensor) -> TanhNormal:
        """The policy that outputs (..., 2A) of the network stand for."""
        mean, std = full_precision(x).chunk(2, -1)
        mean = self.mean_scale * torch.tanh(mean / self.mean_scale)
        return TanhNormal(mean, F.softplus(std + self.raw_init_std) + self.min_std)
