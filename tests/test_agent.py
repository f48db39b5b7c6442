"""The agent and its gradient step: who learns from what, precision, devices, a solved toy."""

import copy
import dataclasses
import math
from itertools import pairwise

import gymnasium
import numpy as np
import pytest
import torch
from conftest import in_double
from emulated_card import Refuse
from torch import nn
from torch.nn.functional import cosine_similarity

import dreamer
import models
import utils
from models import State, TanhNormal, UnitNormal

CPU = torch.device("cpu")
NETWORKS = ("world", "actor", "value")


@pytest.fixture
def make_agent(tiny_config):
    def make(actions=2, device=CPU, **settings):
        torch.manual_seed(0)
        return dreamer.Dreamer(tiny_config(**settings), actions, device)

    return make


def has_gradient(network) -> bool:
    return any(p.grad is not None and p.grad.any() for p in network.parameters())


def all_have_gradients(network) -> bool:
    return all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_each_loss_trains_its_network_and_no_other(make_agent, make_batch):
    agent = make_agent()
    losses = {}
    batch = make_batch(agent.config)
    image, post, prior = agent.observe(batch)
    losses["world"], _ = agent.model_loss(batch, image, post, prior)
    behaviour, _ = agent.behaviour_losses(post)
    losses.update(behaviour)
    for name in ("world", "value", "actor"):
        agent.zero_grad()
        agent._backward(name, losses[name], {}, retain_graph=name == "value")
        for other in NETWORKS:
            assert has_gradient(getattr(agent, other)) == (other == name)
        assert all_have_gradients(getattr(agent, name))


def test_behaviour_reaches_no_posterior(make_agent, make_batch):
    agent = make_agent()
    _, post, _ = agent.observe(make_batch(agent.config))
    losses, _ = agent.behaviour_losses(post)
    leaves = [post.stoch, post.deter, post.mean, post.std]
    for loss in losses.values():
        found = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
        assert all(g is None for g in found)


@pytest.mark.parametrize("use_disc_model", [False, True])
def test_value_loss_equals_the_one_with_gradients_stopped(make_agent, make_batch, use_disc_model):
    """The value's pass is shared with the actor's; written out apart it must be the same."""
    agent = make_agent(discount=0.9, use_disc_model=use_disc_model)
    _, post, _ = agent.observe(make_batch(agent.config))
    captured = {}
    imagine = agent.imagine

    def spy(start):
        captured["feature"], *rest = imagine(start)
        return captured["feature"], *rest

    agent.imagine = spy
    losses, _ = agent.behaviour_losses(post)
    weights = list(agent.value.parameters())
    actual = torch.autograd.grad(losses["value"], weights, retain_graph=True)

    feature = captured["feature"].detach()
    value = agent.value(feature[:-1])
    reward, values = agent.world["reward"](feature).mean, agent.value(feature).mean
    discount = torch.full_like(reward, 0.9)
    if use_disc_model:  # the head has learned discount times continuation
        discount = agent.world["discount"](feature).mean
    target = dreamer.lambda_return(reward, values, discount, 0.95).detach()
    weight = torch.stack([discount[:k].prod(0) for k in range(len(target))]).detach()
    loss = -(weight * value.log_prob(target)).mean()
    torch.testing.assert_close(losses["value"], loss)
    for a, e in zip(actual, torch.autograd.grad(loss, weights)):
        torch.testing.assert_close(a, e, atol=1e-6, rtol=1e-4)


def test_actor_sees_features_without_gradients_and_its_actions_carry_them(make_agent):
    agent = make_agent()
    seen, moved, rssm = [], [], agent.world["rssm"]
    roll_out, retrace = rssm.roll_out, rssm.retrace

    def spy_roll_out(act, *arguments):
        def spy_act(feature):
            seen.append(feature.requires_grad)
            return act(feature)

        return roll_out(spy_act, *arguments)

    def spy_retrace(trace, action):
        moved.extend([action.requires_grad] * len(action))
        return retrace(trace, action)

    rssm.roll_out, rssm.retrace = spy_roll_out, spy_retrace
    feature, *_ = agent.imagine(rssm.initial(3))
    assert not any(seen) and all(moved) and len(seen) == agent.config.imagine_horizon
    assert len(moved) == len(seen)
    assert feature.requires_grad


def test_first_imagined_feature_is_one_step_after_the_start(make_agent):
    """f_1 ... f_H are read, never f_0: the start's own reward belongs to a past action."""
    agent = make_agent()
    start = State(*(torch.randn(3, n) for n in (4, 16, 4, 4)))
    horizon = agent.config.imagine_horizon
    torch.manual_seed(5)
    feature, *_ = agent.imagine(start)
    torch.manual_seed(5)
    action_noise, noise = torch.randn(horizon, 3, 2)[0], torch.randn(horizon, 3, 4)[0]
    action = torch.tanh(agent.actor(start.feature).before_tanh(action_noise))
    state = agent.world["rssm"].img_step(start, action)
    state = state._replace(stoch=state.mean + state.std * noise)
    torch.testing.assert_close(feature[0], state.feature)
    assert len(feature) == horizon


def imagine_step_by_step(agent, start, noises):
    """Features and entropies of `Dreamer.imagine`, with autograd alone; `noises`: as drawn."""
    rssm, state, features, entropies = agent.world.rssm, start, [], []
    for action_noise, noise in zip(*noises):
        policy = agent.actor(state.feature.detach())
        x = policy.before_tanh(action_noise)
        state = rssm.img_step(state, torch.tanh(x))
        state = state._replace(stoch=state.mean + state.std * noise)
        features.append(state.feature)
        entropies.append(-policy.log_prob_before_tanh(x))
    return torch.stack(features), torch.stack(entropies)


def test_imagination_and_its_gradient_are_those_of_steps_one_by_one(make_agent):
    """As autograd takes it where the actor sees features without gradients."""
    agent = make_agent()
    start = State(*(torch.randn(3, n) for n in (4, 16, 4, 4)))
    steps = agent.config.imagine_horizon
    results = []
    for one_by_one in (False, True):
        torch.manual_seed(5)
        if one_by_one:
            noises = torch.randn(steps, 3, 2), torch.randn(steps, 3, 4)
            outputs = imagine_step_by_step(agent, start, noises)
        else:
            outputs = agent.imagine(start)[:2]
        torch.manual_seed(6)
        loss = sum((x * torch.randn_like(x)).sum() for x in outputs)
        results.append((*outputs, *torch.autograd.grad(loss, list(agent.actor.parameters()))))
    assert len(results[0][0]) == steps
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())


def test_the_entropy_at_an_action_goes_with_the_return_from_the_state_that_it_led_to(
    make_agent, make_batch
):
    agent = make_agent(actor_entropy=0.5, discount=0.9)
    _, post, _ = agent.observe(make_batch(agent.config))
    feature, entropy, metrics = agent.imagine(post.map(lambda x: x.detach().flatten(0, 1)))
    torch.testing.assert_close(metrics["entropy/policy"], entropy.mean())
    agent.imagine = lambda start: (feature, entropy, {})
    losses = []
    for coefficient in (0.0, 0.5):
        agent.config.actor_entropy = coefficient
        losses.append(agent.behaviour_losses(post)[0])
    steps = agent.config.imagine_horizon - 1
    weight = torch.tensor([0.9**k for k in range(steps)])[:, None]
    expected = -(weight * 0.5 * entropy[:steps]).mean()
    torch.testing.assert_close(losses[1]["actor"] - losses[0]["actor"], expected)
    torch.testing.assert_close(losses[1]["value"], losses[0]["value"])


def test_the_entropy_keeps_the_policy_from_saturating(make_agent, make_batch):
    """Without a reward to gain, the entropy alone moves a saturated policy back to the middle."""
    agent = make_agent(actor_entropy=1.0)
    with torch.no_grad():
        agent.actor.net[-1].bias.copy_(torch.tensor([8.0, 8.0, -10.0, -10.0]))
    _, post, _ = agent.observe(make_batch(agent.config))
    agent.behaviour_losses(post)[0]["actor"].backward()
    gradient = agent.actor.net[-1].bias.grad
    assert (gradient[:2] > 1e-3).all() and (gradient[2:] < -1e-3).all()


@pytest.mark.parametrize("use_disc_model", [False, True])
def test_every_posterior_is_a_start_but_a_terminal_one(make_agent, make_batch, use_disc_model):
    agent = make_agent(use_disc_model=use_disc_model)
    _, post, _ = agent.observe(make_batch(agent.config))
    starts = []
    imagine = agent.imagine
    agent.imagine = lambda start: (starts.append(start), imagine(start))[1]
    agent.behaviour_losses(post)
    kept = post.stoch[:-1] if use_disc_model else post.stoch
    torch.testing.assert_close(starts[0].stoch, kept.flatten(0, 1))


def test_continuation_is_trained_on_discount_times_gamma(make_agent, make_batch):
    agent = make_agent(use_disc_model=True, discount=0.9)
    batch = make_batch(agent.config)
    batch["discount"][-1] = 0.0
    seen = []
    head = agent.world["discount"].forward

    def spy(feature):
        distribution = head(feature)
        log_prob = distribution.log_prob
        distribution.log_prob = lambda x: (seen.append(x), log_prob(x))[1]
        return distribution

    agent.world["discount"].forward = spy
    _, metrics = agent.model_loss(batch, *agent.observe(batch))
    torch.testing.assert_close(seen[0], 0.9 * batch["discount"])
    assert "loss/continuation" in metrics


def test_model_loss_is_the_sum_of_its_terms(make_agent, make_batch):
    agent = make_agent(use_disc_model=True, algo="Dreamerv2", kl_scale=0.5, reward_scale=30)
    batch, world = make_batch(agent.config), agent.world
    torch.manual_seed(3)
    loss, metrics = agent.model_loss(batch, *agent.observe(batch))
    torch.manual_seed(3)
    image = batch["image"].float() / 255 - 0.5
    state = world.rssm.initial(agent.config.batch_size)
    post, prior = world.rssm.observe(world.encoder(image), batch["action"], state)
    error = (world.decoder(post.feature).mean - image).square().flatten(2).sum(-1).mean()
    expected = 0.5 * error + 64 * 64 * 3 / 2 * math.log(2 * math.pi)
    torch.testing.assert_close(metrics["loss/image"], expected)
    error = (world.reward(post.feature).mean - batch["reward"]).square().mean()
    expected = 0.5 * error + 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(metrics["loss/reward"], expected)
    normals = (torch.distributions.Normal(x.mean, x.std) for x in (post, prior))
    expected = torch.distributions.kl_divergence(*normals).sum(-1).mean()
    torch.testing.assert_close(metrics["kl"], expected)
    terms = metrics["loss/image"] + 30 * metrics["loss/reward"] + 0.5 * metrics["kl"]
    torch.testing.assert_close(loss, terms + 10 * metrics["loss/continuation"])


def test_the_free_nats_bound_the_loss_of_the_model(make_agent, make_batch):
    agent = make_agent(free_nats=100.0, kl_scale=0.5)
    batch = make_batch(agent.config)
    loss, metrics = agent.model_loss(batch, *agent.observe(batch))
    assert metrics["kl"] < 100
    torch.testing.assert_close(loss, metrics["loss/image"] + metrics["loss/reward"] + 0.5 * 100)


def test_the_balance_is_the_share_of_the_kl_that_trains_the_prior(make_agent, make_batch):
    gradients = []
    for balance in (0.8, 0.2):
        agent = make_agent(algo="Dreamerv2", kl_balance=balance)
        torch.manual_seed(3)
        batch = make_batch(agent.config)
        agent.model_loss(batch, *agent.observe(batch))[0].backward()
        gradients.append(agent.world.rssm.img_out[-1].weight.grad)
    torch.testing.assert_close(gradients[0], 4 * gradients[1], rtol=1e-3, atol=1e-7)


def test_all_gradients_are_taken_at_the_old_weights(make_agent, make_batch):
    agent, compared = make_agent(), []
    before, backward = copy.deepcopy(agent.state_dict()), agent._backward

    def spy(name, *arguments, **named):
        backward(name, *arguments, **named)
        compared.extend(torch.equal(before[k], v) for k, v in agent.state_dict().items())

    agent._backward = spy
    agent.update(make_batch(agent.config))
    assert len(compared) == 3 * len(before) and all(compared)
    assert not all(torch.equal(before[k], v) for k, v in agent.state_dict().items())


def test_what_is_logged_of_imagination(make_agent, make_batch):
    agent = make_agent(discount=0.9, td_lambda=0.5, imagine_horizon=3)
    policy = TanhNormal(torch.tensor([3.0, 1.0]), torch.tensor([1e-4, 3e-4]))  # tanh 3 > 0.99
    agent.actor.policy = lambda x: TanhNormal(
        policy.mean.expand(*x.shape[:-1], 2), policy.std.expand(*x.shape[:-1], 2)
    )
    agent.world.reward.forward = lambda feature: UnitNormal(torch.full(feature.shape[:-1], 3.0), 0)
    agent.value.forward = lambda feature: UnitNormal(torch.full(feature.shape[:-1], 2.0), 0)
    batch = make_batch(agent.config)
    image, post, prior = agent.observe(batch)
    _, metrics = agent.model_loss(batch, image, post, prior)
    normal = torch.distributions.Normal(post.mean, post.std)
    torch.testing.assert_close(metrics["entropy/posterior"], normal.entropy().sum(-1).mean())
    assert metrics["entropy/prior"] != metrics["entropy/posterior"]
    _, metrics = agent.behaviour_losses(post)
    x = torch.tensor([3.0, 1.0])  # ln of the density of the Normal, and of the tanh's slope
    entropy = (torch.log(policy.std) + 0.5 * math.log(2 * math.pi * math.e)).sum()
    entropy = entropy + torch.log(1 - torch.tanh(x).square()).sum()
    errors = [3 + 0.9 * 2 - 2, 3 + 0.9 * (0.5 * 2 + 0.5 * (3 + 0.9 * 2)) - 2]
    expected = {
        "policy/saturated": 0.5, "policy/std": 2e-4, "value/mean": 2.0, "reward/imagined": 3.0,
        "value/error": sum(errors) / 2,
    }  # fmt: skip
    assert {k: metrics[k].item() for k in expected} == pytest.approx(expected)
    assert metrics["entropy/policy"].item() == pytest.approx(entropy.item(), abs=0.5)


def test_actor_gradient_against_finite_differences(tiny_config, make_batch):
    """Through dynamics, reward and value, the gradient is the slope of the imagined return.

    From the second imagined state on actions are chosen from a feature whose gradient is
    stopped, so the actor is made blind to features: then no path is cut, and the slope is exact.
    """
    config = tiny_config(imagine_horizon=4)
    agent = in_double(lambda: dreamer.Dreamer(config, 2, CPU))
    nn.init.zeros_(agent.actor.net[0].weight)
    _, post, _ = agent.observe(make_batch(config, dtype=torch.float64))
    bias = agent.actor.net[-1].bias

    def loss_at(shift):
        with torch.no_grad():
            bias[0] += shift
        torch.manual_seed(9)
        loss = agent.behaviour_losses(post)[0]["actor"]
        gradient = torch.autograd.grad(loss, bias)[0][0].item()
        with torch.no_grad():
            bias[0] -= shift
        return loss.item(), gradient

    slope = (loss_at(1e-5)[0] - loss_at(-1e-5)[0]) / 2e-5
    assert slope != 0
    assert loss_at(0.0)[1] == pytest.approx(slope, rel=1e-5)


def copy_in_double(agent, config):
    double = in_double(lambda: dreamer.Dreamer(config, agent.actions, CPU))
    double.load_state_dict({k: v.double() for k, v in agent.state_dict().items()})
    return double


class SharedReLU(nn.Module):
    """A ReLU that takes, in the second run, the branches that the first run took.

    A sum within rounding of zero falls on either side of the kink, and among n activations one
    such flip alone moves a gradient by 1 / sqrt(n): that is the kink's share, not the precision's.
    """

    def __init__(self):
        super().__init__()
        self.masks, self.flips, self.count, self.replay = [], 0, 0, False

    def forward(self, x):
        if not self.replay:
            self.masks.append(x > 0)
            return torch.relu(x)
        mask = self.masks.pop(0)
        self.flips += ((x > 0) != mask).sum().item()
        self.count += mask.numel()
        return x * mask


@pytest.mark.parametrize("algo", ["Dreamerv1", "Dreamerv2"])
def test_the_step_in_float32_is_the_step_in_float64(make_batch, algo):
    """Losses and the gradient of every weight tensor agree to 1e-3, at the small preset."""
    config = dreamer.resolve(
        {"device": "cpu", "preset": "small", "algo": algo, "batch_size": 4, "train_seq_len": 8,
         "use_disc_model": True, "free_nats": 0.0}
    )  # fmt: skip
    torch.manual_seed(0)
    single = dreamer.Dreamer(config, 2, CPU)
    double = copy_in_double(single, config)
    relus = {}
    for agent in (single, double):
        for name, module in agent.named_modules():
            if isinstance(module, nn.Sequential):
                for i, layer in enumerate(module):
                    if isinstance(layer, nn.ReLU):
                        module[i] = relus.setdefault(f"{name}.{i}", SharedReLU())
    results = []
    for agent, dtype in ((single, torch.float32), (double, torch.float64)):
        torch.manual_seed(1)
        results.append(agent.update(make_batch(config, dtype=dtype)))
        for relu in relus.values():
            relu.replay = True
    for name, value in results[0].items():
        assert value.item() == pytest.approx(results[1][name].item(), rel=1e-3), name
    for (name, a), b in zip(single.named_parameters(), double.named_parameters()):
        error = (a.grad.double() - b[1].grad).norm() / b[1].grad.norm()
        assert error < 1e-3, f"{name}: {error:.2e}"
    assert len(relus) == 7
    assert sum(r.flips for r in relus.values()) <= 1e-5 * sum(r.count for r in relus.values())


@pytest.mark.parametrize("half_cell", [False, True])
def test_half_precision_on_the_cpu_keeps_losses_in_float32(make_agent, make_batch, half_cell):
    """And states; also where autocast includes the GRU cell, as it does on CUDA."""
    agent = make_agent(precision="bf16", use_disc_model=True)
    if half_cell:
        agent.world.rssm.cell.register_forward_hook(lambda _, inputs, h: h.bfloat16())
    batch = make_batch(agent.config)
    metrics = agent.update(batch)
    assert all(m.dtype == torch.float32 and m.isfinite() for m in metrics.values())
    with agent.autocast():
        _, post, _ = agent.observe(batch)
    assert {x.dtype for x in post} == {torch.float32}
    policy = agent.policy(3, explore=False)
    images = np.zeros((3, 64, 64, 3), np.uint8)
    action, _ = agent.act(
        torch.zeros(1, 64, 64, 3, dtype=torch.uint8),
        agent.world.rssm.initial(1),
        torch.zeros(1, 2),
        explore=False,
    )
    assert action.dtype == torch.float32
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        assert policy(images).dtype == np.float32
        states.append(policy.state.deter.clone())
    assert states[1].dtype == torch.float32 and (states[0] != states[1]).any()
    actions = [policy(images) for _ in range(2)]
    assert actions[0].dtype == np.float32 and (actions[0] != actions[1]).any()
    frames = agent.open_loop(batch["image"], batch["action"])
    assert frames.dtype == torch.float32 and frames.isfinite().all()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_gradients_in_half_precision_are_those_of_float32(make_batch, precision):
    """Of every weight tensor, at the small preset's sizes; from the first scales none overflows."""
    config = dreamer.resolve(
        {"device": "cpu", "preset": "small", "algo": "Dreamerv2", "train_seq_len": 8,
         "use_disc_model": True}
    )  # fmt: skip
    agents = []
    for choice in ("fp32", precision):
        config = dataclasses.replace(config, precision=choice)  # `resolve` refuses fp16 on a CPU
        torch.manual_seed(0)
        agent = dreamer.Dreamer(config, 2, CPU)
        metrics = agent.gradients(make_batch(config))
        agents.append(agent)
    assert not any(value for name, value in metrics.items() if name.startswith("overflow/"))
    assert [f"overflow/{name}" in metrics for name in NETWORKS] == [precision == "fp16"] * 3
    for (name, p), q in zip(agents[0].named_parameters(), agents[1].parameters()):
        assert cosine_similarity(p.grad.flatten(), q.grad.flatten(), 0) > 0.99, name
        assert q.grad.norm().item() == pytest.approx(p.grad.norm().item(), rel=0.03), name


def test_half_precision_does_not_round_a_value(make_agent):
    """bfloat16 has no number between 100 and 100.5."""
    agent = make_agent(precision="bf16")
    nn.init.constant_(agent.value.net[-1].bias, 100.25)
    with agent.autocast():
        value = agent.value(torch.zeros(2, 3, 20)).mean
    torch.testing.assert_close(value, torch.full((2, 3), 100.25))


@pytest.mark.parametrize("capability, expected", [((7, 5), "float16"), ((8, 0), "bfloat16")])
def test_precision_of_a_card(make_agent, monkeypatch, capability, expected):
    agent = make_agent()
    agent.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert agent._precision() == getattr(torch, expected)


def test_bfloat16_on_a_card_without_it_is_refused(make_agent, monkeypatch):
    """PyTorch would emulate it, or fail somewhere."""
    agent = make_agent(precision="bf16")
    assert agent.precision == torch.bfloat16  # on a CPU
    agent.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(utils.RunError, match="bf16"):
        agent._precision()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert agent._precision() == torch.bfloat16


def test_everything_on_the_meta_device(make_agent, make_batch):
    """A tensor left on the CPU and an `.item()` both raise there."""
    agent = make_agent(device=torch.device("meta"), use_disc_model=True, algo="Dreamerv2")
    batch = {k: v.to("meta") for k, v in make_batch(agent.config).items()}
    agent.gradients(batch)
    assert all(p.grad.device.type == "meta" for p in agent.parameters())


def test_nothing_in_the_gradient_step_waits_or_depends_on_data(make_agent, make_batch):
    agent = make_agent(use_disc_model=True, algo="Dreamerv2")
    batch = make_batch(agent.config)
    agent.update(batch)
    with Refuse():
        agent.update(batch)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), Refuse():
        torch.ones(1).item()


def kinds_of_nodes(loss):
    """The names of the classes in its graph."""
    seen, new = set(), {loss.grad_fn}
    while new:
        seen |= new
        new = {n for node in new for n, _ in node.next_functions if n is not None} - seen
    return {type(node).__name__ for node in seen}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_view_is_changed_in_place(make_agent, make_batch, precision):
    """Its gradient would be copied four times, in networks that run over all of time at once."""
    agent = make_agent(use_disc_model=True, precision=precision)
    with agent.autocast():
        batch = make_batch(agent.config)
        image, post, prior = agent.observe(batch)
        loss, _ = agent.model_loss(batch, image, post, prior)
        losses, _ = agent.behaviour_losses(post)
    for each in (loss, *losses.values()):
        kinds = kinds_of_nodes(each)
        assert "EluBackward1" in kinds or "EluBackward0" in kinds
        assert "CopySlices" not in kinds


def test_the_models_rate_falls_with_the_gradient_steps_and_no_other(make_agent, make_batch):
    agent = make_agent(model_learning_rate=0.01, model_rate_decay=100)
    assert [agent.model_rate(n) for n in (0, 100, 300)] == [0.01, 0.005, 0.0025]
    batch, moved = make_batch(agent.config), {}
    for number in (0, 100):
        before = {name: p.detach().clone() for name, p in agent.named_parameters()}
        for optimizer in agent.optimizers.values():
            optimizer.state.clear()  # the first step of Adam is as long as the rate
        torch.manual_seed(0)
        agent.update(batch, number)
        moved[number] = {n: (p - before[n]).abs().max().item() for n, p in agent.named_parameters()}
    for name in ("world.rssm.cell.weight_hh", "world.decoder.net.6.weight"):
        assert moved[100][name] / moved[0][name] == pytest.approx(0.5, rel=0.01)
    rates = {"actor": agent.config.actor_learning_rate, "value": agent.config.value_learning_rate}
    for name, rate in rates.items():
        for number in (0, 100):
            assert moved[number][f"{name}.net.0.weight"] == pytest.approx(rate, rel=0.01)
        weight = f"{name}.net.0.weight"
        assert moved[100][weight] / moved[0][weight] == pytest.approx(1, rel=0.01)


def test_every_gradient_is_clipped_to_the_norm(make_agent, make_batch):
    agent = make_agent(grad_clip_norm=1e-3)
    metrics = agent.gradients(make_batch(agent.config))
    for name in NETWORKS:
        norm = torch.stack([p.grad.norm() for p in getattr(agent, name).parameters()]).norm()
        assert norm.item() == pytest.approx(1e-3, rel=1e-3)
        assert metrics[f"grad_norm/{name}"] > 1e-2  # before clipping


def test_the_networks_are_those_of_the_paper():
    config = dreamer.resolve({"preset": "full", "device": "cpu", "use_disc_model": True})
    agent = dreamer.Dreamer(config, 3, CPU)
    heads = {
        "reward": (agent.world.reward.net, 2, 1), "discount": (agent.world.discount.net, 3, 1),
        "actor": (agent.actor.net, 4, 2 * 3), "value": (agent.value.net, 3, 1),
    }  # fmt: skip
    for name, (net, layers, outputs) in heads.items():
        linear = [(m.in_features, m.out_features) for m in net[::2]]
        sizes = [230, *[400] * layers, outputs]
        assert linear == list(pairwise(sizes)), name
        assert {type(m) for m in net[1::2]} == {nn.ELU}, name
    assert agent.world.encoder.embed_size == 1024
    assert {p.device.type for p in agent.parameters()} == {"cpu"}
    for name, p in agent.named_parameters():  # as Keras starts them
        assert ("bias" not in name) or not p.any(), name
    recurrent = agent.world.rssm.cell.weight_hh
    torch.testing.assert_close(recurrent.T @ recurrent, torch.eye(200), atol=1e-4, rtol=0)
    assert all(o.param_groups[0]["eps"] == 1e-7 for o in agent.optimizers.values())
    assert agent.pixels(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-0.5, 0.5]


def test_without_a_decay_the_models_rate_is_constant(make_agent):
    assert (
        make_agent(model_rate_decay=0).model_rate(10**6) == make_agent().config.model_learning_rate
    )


def test_state_holds_every_network_and_optimizer(make_agent, make_batch):
    agent, other = make_agent(), make_agent()
    batch = make_batch(agent.config)
    agent.update(batch)
    other.load_state(copy.deepcopy(agent.state()))
    assert {k.split(".")[0] for k in agent.state()["networks"]} == set(NETWORKS)
    for one in (agent, other):
        torch.manual_seed(2)
        one.update(batch)
    for a, b in zip(agent.parameters(), other.parameters()):
        assert torch.equal(a, b)


def loss_scalers(**options):
    return {name: torch.amp.GradScaler("cpu", **options) for name in NETWORKS}


def test_undo_takes_back_in_place_what_steps_changed(make_agent, make_batch):
    """What a capture needs: its first steps must not count, and every tensor must stay."""
    agent = make_agent()
    batch = make_batch(agent.config)
    agent.scalers = loss_scalers(init_scale=2.0**10)
    for steps in (0, 2):  # before Adam has any state, and after
        for _ in range(steps):
            agent.update(batch)
        places = [p.data_ptr() for p in agent.parameters()]
        before, undo = copy.deepcopy(agent.state()), agent._undo()
        agent.update(batch)
        agent.update(batch)
        undo()
        after = agent.state()
        for name, value in before["networks"].items():
            assert torch.equal(after["networks"][name], value)
        for name, optimizer in after["optimizers"].items():
            for i, state in optimizer["state"].items():
                old = before["optimizers"][name]["state"].get(i)
                for key, value in state.items():
                    assert torch.equal(value, old[key] if old else torch.zeros_like(value))
        assert after["scalers"] == before["scalers"]
        assert [p.data_ptr() for p in agent.parameters()] == places


@pytest.mark.parametrize("broken", ["model_loss", "behaviour_losses"])
def test_after_a_step_that_failed_halfway_undo_leaves_an_agent_that_trains(
    make_agent, make_batch, monkeypatch, broken
):
    """A capture may fail before anything was scaled, or when a gradient is already unscaled."""
    agent = make_agent()
    batch = make_batch(agent.config)
    agent.scalers = loss_scalers(init_scale=2.0**10)
    undo = agent._undo()
    with monkeypatch.context() as patch:
        patch.setattr(agent, broken, None)
        with pytest.raises(TypeError):
            agent.update(batch)
    undo()
    assert {s.get_scale() for s in agent.scalers.values()} == {2.0**10}
    before = [p.detach().clone() for p in agent.parameters()]
    agent.update(batch)
    assert not all(torch.equal(p, q) for p, q in zip(agent.parameters(), before))


def test_an_overflow_is_counted_and_skips_the_step_of_its_network(make_agent, make_batch):
    agent = make_agent()
    batch = make_batch(agent.config)
    agent.scalers = loss_scalers(init_scale=2.0**4)
    agent.scalers["world"] = loss_scalers(init_scale=3e38)["world"]
    before = copy.deepcopy(agent.state_dict())
    metrics = agent.update(batch)
    moved = {
        name.split(".")[0] for name, p in agent.state_dict().items() if (p != before[name]).any()
    }
    assert moved == {"actor", "value"}
    assert [metrics[f"overflow/{name}"] for name in NETWORKS] == [1, 0, 0]
    scales = [agent.scalers[name].get_scale() for name in NETWORKS]
    assert scales == pytest.approx([1.5e38, 2.0**4, 2.0**4])
    agent.scalers["world"].update(2.0**4)
    assert agent.update(batch)["overflow/world"] == 0
    moved = {
        name.split(".")[0] for name, p in agent.state_dict().items() if (p != before[name]).any()
    }
    assert moved == set(NETWORKS)


def test_a_policy_starts_each_episode_from_nothing(make_agent):
    agent = make_agent()
    images = np.random.default_rng(0).integers(0, 256, (4, 2, 64, 64, 3), np.uint8)
    played = []
    for _ in range(2):
        policy = agent.policy(2, explore=False)
        torch.manual_seed(0)
        played.append([policy(image) for image in images])
    np.testing.assert_array_equal(played[0], played[1])
    assert not np.array_equal(played[0][0], played[0][1])  # and remembers within one


def test_a_policy_with_a_short_memory_knows_the_last_steps_and_nothing_before(
    make_agent, monkeypatch
):
    """Memory 3: at step 7 the acting state began at step 3, whatever came before."""
    agent = make_agent(act_memory=3)
    monkeypatch.setattr(models.RSSM, "min_std", 0.0)
    with torch.no_grad():  # no noise, so that the same frames and actions give the same state
        agent.world.rssm.obs_out.bias[agent.config.stoch_size :] = -200.0
        agent.world.rssm.obs_out.weight[agent.config.stoch_size :] = 0.0
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (9, 2, 64, 64, 3), np.uint8))
    policy, actions, began = agent.policy(2, explore=True), [torch.zeros(2, 2)], []
    for t, image in enumerate(images):
        policy(image.numpy())
        state = policy.state.map(lambda x: x[:2])
        for first in range(t + 1):  # which frame did this state begin with?
            embed = agent.world.encoder(agent.pixels(images[first : t + 1]))
            action = torch.stack(actions[first:])
            with torch.no_grad():
                post, _ = agent.world.rssm.observe(embed, action, agent.world.rssm.initial(2))
            if torch.allclose(post.deter[-1], state.deter, atol=1e-5):
                began.append(first)
        actions.append(policy.action.clone())
    assert began == [0, 0, 0, 0, 0, 0, 3, 3, 3]


def test_act_samples_with_noise_or_takes_the_mode(make_agent):
    agent = make_agent(action_noise=0.0)
    image = torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8)
    state, action = agent.world["rssm"].initial(3), torch.zeros(3, 2)
    torch.manual_seed(1)
    sampled, _ = agent.act(image, state, action, explore=True)
    agent.config.action_noise = 0.3
    torch.manual_seed(1)
    noisy, _ = agent.act(image, state, action, explore=True)
    assert not torch.equal(sampled, noisy) and noisy.abs().max() <= 1
    torch.manual_seed(1)
    mode, after = agent.act(image, state, action, explore=False)
    embed = agent.world["encoder"](agent.pixels(image))
    torch.manual_seed(1)
    expected = agent.world["rssm"].obs_step(state, action, embed)
    torch.testing.assert_close(after.stoch, expected.stoch)
    torch.testing.assert_close(mode, agent.actor(expected.feature).mode())
    torch.manual_seed(1)
    state = agent.world["rssm"].obs_step(state, action, embed)
    torch.testing.assert_close(sampled, agent.actor(state.feature).rsample())
    torch.testing.assert_close(noisy, (sampled + 0.3 * torch.randn(3, 2)).clamp(-1, 1))


class Clock(gymnasium.Env):
    """Its frames and rewards tell the time; after `length` steps it ends, by itself or not."""

    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    observation_space = gymnasium.spaces.Box(0, 255, (64, 64, 3), np.uint8)

    def __init__(self, length, terminates):
        self.length, self.terminates, self.taken = length, terminates, []

    def _frame(self):
        return np.full((64, 64, 3), self.time, np.uint8)

    def reset(self, *, seed=None, options=None):
        self.time, self.seed = 0, seed
        return self._frame(), {}

    def step(self, action):
        self.time += 1
        self.taken.append(np.array(action))
        over = self.time == self.length
        terminated, truncated = over and self.terminates, over and not self.terminates
        return self._frame(), 10.0 * self.time, terminated, truncated, {"frames": 2}


@pytest.mark.parametrize("terminates", [False, True])
def test_row_t_holds_a_frame_and_the_action_and_the_reward_that_led_to_it(terminates):
    env = Clock(3, terminates)
    with utils.StopSignal() as stop:
        episode, frames = dreamer.collect_episode(env, None, 7, stop)
    assert (frames, env.seed) == (6, 7)
    assert_rows(episode, env, terminates)


def assert_rows(episode, env, terminates):
    n = env.length
    assert episode["image"][:, 0, 0, 0].tolist() == list(range(n + 1))
    assert not episode["action"][0].any()
    np.testing.assert_array_equal(episode["action"][1:], np.stack(env.taken[:n]))
    assert episode["reward"].tolist() == [10.0 * t for t in range(n + 1)]
    assert episode["discount"].tolist() == [1.0] * n + [0.0 if terminates else 1.0]


def test_an_evaluated_episode_ends_where_it_ends_and_others_go_on(make_agent):
    agent = make_agent()
    envs = gymnasium.vector.SyncVectorEnv([lambda: Clock(3, True), lambda: Clock(9, False)])
    with utils.StopSignal() as stop:
        episodes = dreamer.evaluate(agent, envs, stop)
    for episode, env in zip(episodes, envs.envs):
        assert_rows(episode, env, env.terminates)
        assert episode["return"] == episode["reward"].sum()


def test_an_open_loop_video_shows_truth_prediction_and_error(make_agent):
    agent = make_agent()
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (2, 9, 64, 64, 3), np.uint8)
    episodes = [{"image": x, "action": np.zeros((9, 2), np.float32)} for x in image]
    agent.open_loop = lambda image, action: 1 - image / 255
    video = dreamer.open_loop_video(agent, episodes, length=7)
    assert video.shape == (7, 3 * 64, 2 * 64, 3)
    for i, x in enumerate(image[:, :7]):
        truth, model, error = np.split(video[:, :, 64 * i : 64 * (i + 1)], 3, 1)
        assert (truth == x).all() and (model == 255 - x).all()
        assert np.abs(error - (255.0 - x)).max() <= 1  # (model - truth + 1) / 2


def test_open_loop_prediction_sees_the_context_and_no_later_frame(make_agent):
    agent = make_agent()
    image = torch.randint(0, 256, (9, 2, 64, 64, 3), dtype=torch.uint8)
    action = torch.rand(9, 2, 2)
    torch.manual_seed(1)
    frames = agent.open_loop(image, action)
    image[5:] = 0
    torch.manual_seed(1)
    again = agent.open_loop(image, action)
    assert frames.shape == (9, 2, 64, 64, 3)
    assert torch.equal(frames, again)
    action[7] += 0.5
    torch.manual_seed(1)
    other = agent.open_loop(image, action)
    assert torch.equal(frames[:7], other[:7]) and not torch.equal(frames[7], other[7])


def toy_batch(config, seed):
    """Episodes of a task with a known answer: the reward is 1 - 4 (action - 0.5)^2, at once."""
    generator = torch.Generator().manual_seed(seed)
    shape = (config.train_seq_len, config.batch_size)
    action = torch.rand(*shape, 1, generator=generator) * 2 - 1
    image = ((action + 1) * 127).to(torch.uint8)[..., None, None].expand(*shape, 64, 64, 3)
    reward = 1 - 4 * (action[..., 0] - 0.5).square()
    return {"image": image, "action": action, "reward": reward, "discount": torch.ones(shape)}


@pytest.mark.parametrize("algo", ["Dreamerv1", "Dreamerv2"])
def test_toy_problem_is_solved_through_the_model(tiny_config, algo):
    """The best action is 0.5; only the learned model can tell the actor so."""
    config = tiny_config(
        algo=algo, num_units=32, batch_size=16, train_seq_len=5, actor_init_std=1.0, discount=0.8,
        model_learning_rate=5e-3, actor_learning_rate=5e-4, value_learning_rate=5e-3,
    )  # fmt: skip
    torch.manual_seed(0)
    agent = dreamer.Dreamer(config, 1, CPU)
    for step in range(800):
        agent.update(toy_batch(config, step))
    with torch.no_grad():
        _, post, _ = agent.observe(toy_batch(config, 1000))
        action = agent.actor(post.feature).mode()
    assert (action - 0.5).abs().mean() < 0.15
    assert (action - 0.5).abs().max() < 0.4
