"""Networks and distributions: shapes, densities, initial weights, equal forms of one function."""

import math

import pytest
import torch
from torch import nn

import models


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_unit_normal_against_torch():
    mean, x = torch.randn(2, 3, 8, 8, 3)
    expected = torch.distributions.Normal(mean, 1).log_prob(x).sum((-3, -2, -1))
    torch.testing.assert_close(models.UnitNormal(mean, 3).log_prob(x), expected)
    scalar = torch.distributions.Normal(mean, 1).log_prob(x)
    torch.testing.assert_close(models.UnitNormal(mean, 0).log_prob(x), scalar)


def test_bernoulli_takes_a_soft_target():
    p = models.Bernoulli(torch.tensor(0.3))
    q = torch.sigmoid(torch.tensor(0.3))
    expected = 0.99 * q.log() + 0.01 * (1 - q).log()
    torch.testing.assert_close(p.log_prob(torch.tensor(0.99)), expected)
    torch.testing.assert_close(p.mean, q)


def log_density(policy, action):
    return policy.log_prob_before_tanh(torch.atanh(action))


def test_tanh_normal_density_integrates_to_one():
    policy = models.TanhNormal(torch.tensor([[0.3]]), torch.tensor([[0.8]]))
    edges = torch.linspace(-1 + 1e-5, 1 - 1e-5, 200001)
    density = log_density(policy, edges[:, None]).exp()
    assert torch.trapezoid(density, edges).item() == pytest.approx(1, abs=1e-3)


def test_tanh_normal_against_torch():
    mean, std = torch.randn(5, 2, dtype=torch.float64), torch.rand(5, 2, dtype=torch.float64) + 0.1
    base = torch.distributions.Normal(mean, std)
    other = torch.distributions.TransformedDistribution(
        base, torch.distributions.transforms.TanhTransform()
    )
    action = torch.rand(5, 2, dtype=torch.float64) * 1.8 - 0.9
    actual = log_density(models.TanhNormal(mean, std), action)
    torch.testing.assert_close(actual, other.log_prob(action).sum(-1))


@pytest.mark.parametrize("mean", [-5.0, 0.0, 5.0])
def test_tanh_normal_is_finite_at_the_bounds(mean):
    weights = torch.tensor([[mean, mean]], requires_grad=True)
    policy = models.TanhNormal(weights, torch.full((1, 2), 1e-2))
    for action in (torch.ones(1, 2), -torch.ones(1, 2), torch.tensor([[1.0, -1.0]])):
        x = 30 * action
        assert torch.equal(torch.tanh(x), action)
        log_prob = policy.log_prob_before_tanh(x)
        assert log_prob.isfinite().all()
        (gradient,) = torch.autograd.grad(log_prob.sum(), weights)
        assert gradient.isfinite().all()


def test_mode_is_the_densest_of_its_samples():
    mean, std = torch.tensor([[0.5, -2.0]]), torch.tensor([[0.4, 0.1]])
    policy = models.TanhNormal(mean, std)
    torch.manual_seed(3)
    mode = policy.mode()
    torch.manual_seed(3)
    samples = torch.tanh(mean + std * torch.randn(100, 1, 2)).double()
    exact = log_density(models.TanhNormal(mean.double(), std.double()), samples)
    torch.testing.assert_close(mode[0], samples[exact[:, 0].argmax(), 0].float())
    many = policy.mode(20000)
    grid = torch.linspace(-0.999, 0.999, 2001).double()
    for i in range(2):
        one = models.TanhNormal(mean[:, i : i + 1].double(), std[:, i : i + 1].double())
        assert abs(grid[log_density(one, grid[:, None]).argmax()] - many[0, i]) < 0.1


def test_log_prob_is_the_log_density_of_the_sample():
    mean, std = torch.tensor([[0.3, -0.5]]), torch.tensor([[0.4, 0.2]])
    policy = models.TanhNormal(mean, std)
    x = policy.before_tanh(torch.randn_like(policy.mean))
    other = torch.distributions.TransformedDistribution(
        torch.distributions.Normal(mean, std), torch.distributions.transforms.TanhTransform()
    )
    expected = other.log_prob(torch.tanh(x)).sum(-1)
    torch.testing.assert_close(policy.log_prob_before_tanh(x), expected, rtol=1e-4, atol=1e-4)


def test_the_gradient_of_the_log_prob_does_not_vanish_with_the_tanhs():
    """Of a sharp Normal at 5 the ln density is a constant less ln of the tanh's slope: slope 2."""
    mean = torch.full((1000, 1), 5.0, requires_grad=True)
    policy = models.TanhNormal(mean, torch.full_like(mean, 0.1))
    x = policy.before_tanh(torch.randn_like(policy.mean))
    (through_tanh,) = torch.autograd.grad(torch.tanh(x).sum(), mean, retain_graph=True)
    (gradient,) = torch.autograd.grad(policy.log_prob_before_tanh(x).sum(), mean)
    assert through_tanh.max() < 1e-3
    torch.testing.assert_close(gradient, torch.full_like(gradient, 2.0), rtol=0, atol=1e-3)


def test_rsample_is_reparameterized_and_bounded():
    mean = torch.zeros(1000, 2, requires_grad=True)
    action = models.TanhNormal(mean, torch.ones(1000, 2)).rsample()
    assert action.abs().max() <= 1
    action.sum().backward()
    torch.testing.assert_close(mean.grad, (1 - action.square()).detach())


def test_kl_divergence_against_torch():
    mean_p, mean_q = torch.randn(2, 4, 3)
    std_p, std_q = torch.rand(2, 4, 3) + 0.2
    normal = torch.distributions.Normal
    pair = normal(mean_p, std_p), normal(mean_q, std_q)
    expected = torch.distributions.kl_divergence(*pair).sum(-1)
    torch.testing.assert_close(models.kl_divergence(mean_p, std_p, mean_q, std_q), expected)


def test_initial_policy_has_the_standard_deviation_that_was_asked():
    actor = models.ActionDecoder(6, 2, layers=4, units=8, init_std=5.0)
    nn.init.zeros_(actor.net[-1].weight)
    nn.init.zeros_(actor.net[-1].bias)
    policy = actor(torch.randn(3, 6))
    torch.testing.assert_close(policy.std, torch.full((3, 2), 5.0 + 1e-4))
    torch.testing.assert_close(policy.mean, torch.zeros(3, 2))


@pytest.mark.parametrize("std", [0.01, 1.0, 5.0, 800.0])
def test_any_initial_std_can_be_asked_for(std):
    actor = models.ActionDecoder(6, 2, layers=4, units=8, init_std=std)
    raw = torch.tensor(actor.raw_init_std, dtype=torch.float64)
    assert nn.functional.softplus(raw).item() == pytest.approx(std)


def test_policy_mean_is_squashed_to_five():
    actor = models.ActionDecoder(6, 1, layers=4, units=8, init_std=5.0)
    nn.init.constant_(actor.net[-1].bias, 1e4)
    policy = actor(torch.randn(3, 6))
    torch.testing.assert_close(policy.mean, torch.full((3, 1), 5.0))


def test_shapes_of_the_papers_sizes():
    image = torch.zeros(2, 3, 64, 64, 3)
    encoder, decoder = models.ConvEncoder(32), models.ConvDecoder(230, 32)
    assert encoder(image).shape == (2, 3, 1024)
    out = decoder(torch.zeros(2, 3, 230))
    assert out.mean.shape == image.shape
    assert out.log_prob(image).shape == (2, 3)
    widths = [tuple(m.weight.shape) for m in encoder.net if isinstance(m, nn.Conv2d)]
    assert widths == [(32, 3, 4, 4), (64, 32, 4, 4), (128, 64, 4, 4), (256, 128, 4, 4)]
    heads = [tuple(m.weight.shape) for m in decoder.net if isinstance(m, nn.ConvTranspose2d)]
    assert heads == [(1024, 128, 5, 5), (128, 64, 5, 5), (64, 32, 6, 6), (32, 3, 6, 6)]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_first_transposed_convolution_is_a_matrix_product(memory_format):
    ours = models.ConvTransposeFromPixel(32, 8, 5, stride=2).to(memory_format=memory_format)
    nn.init.normal_(ours.bias)
    plain = nn.ConvTranspose2d(32, 8, 5, stride=2)
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(7, 32, 1, 1)
    torch.testing.assert_close(ours(x), plain(x))
    for output, module in ((ours(x), ours), (plain(x), plain)):
        output.square().sum().backward()
        module.result = module.weight.grad, module.bias.grad
    torch.testing.assert_close(ours.result, plain.result)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kernel, height, width", [(6, 5, 4), (2, 3, 3), (4, 1, 2)])
def test_transposed_convolution_by_blocks(memory_format, kernel, height, width):
    ours = models.ConvTransposeByBlocks(8, 3, kernel).to(memory_format=memory_format)
    nn.init.normal_(ours.bias)
    plain = nn.ConvTranspose2d(8, 3, kernel, stride=2)
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(7, 8, height, width).to(memory_format=memory_format)
    torch.testing.assert_close(ours(x), plain(x))
    cotangent = torch.randn_like(plain(x))
    for module in (ours, plain):
        inputs = [y.requires_grad_() for y in (x.clone(), module.weight, module.bias)]
        module.result = torch.autograd.grad(module(inputs[0]), inputs, cotangent)
    torch.testing.assert_close(ours.result, plain.result)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "channels, kernel, height, width", [(3, 4, 8, 6), (1, 2, 2, 4), (2, 6, 6, 8)]
)
def test_convolution_of_pictures_by_blocks(memory_format, channels, kernel, height, width):
    """As on a card, where the blocks have 16, 8 and 16 channels."""
    ours = models.ConvOfPictures(channels, 5, kernel).to(memory_format=memory_format)
    nn.init.normal_(ours.bias)
    x = torch.randn(7, channels, height, width).to(memory_format=memory_format)
    plain = ours(x)
    torch.testing.assert_close(ours.by_blocks(x), plain)
    cotangent = torch.randn_like(plain)
    results = [
        torch.autograd.grad(y, list(ours.parameters()), cotangent)
        for y in (ours.by_blocks(x), plain)
    ]
    torch.testing.assert_close(*results)


def test_gru_and_its_gradient_are_pytorchs():
    cell = nn.GRUCell(5, 4).double()
    x, last = torch.randn(3, 5).double(), torch.randn(3, 4, requires_grad=True).double()
    i = nn.functional.linear(x, cell.weight_ih, cell.bias_ih)
    s = nn.functional.linear(last.detach(), cell.weight_hh, cell.bias_hh)
    new, saved = models.gru(i, s, last)
    torch.testing.assert_close(new, cell(x, last))
    d_new = torch.randn_like(new)
    expected = torch.autograd.grad(new, [i, s, last], d_new)
    torch.testing.assert_close(models.gru_gradient(d_new, saved), expected)


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_a_recorded_mlps_gradient_is_the_networks(layers):
    net, x = models.mlp(6, 5, layers, 2).double(), torch.randn(4, 3, 6).double()
    recorded = models.RecordedMLP(net, 4, 3)
    steps = [recorded(step).clone() for step in x]
    outputs, expected = recorded.outputs(), net(x.flatten(0, 1)).unflatten(0, (4, 3))
    torch.testing.assert_close(torch.stack(steps), expected)
    torch.testing.assert_close(outputs, expected)
    cotangent, weights = torch.randn_like(expected), list(net.parameters())
    results = [torch.autograd.grad(y, weights, cotangent) for y in (outputs, expected)]
    torch.testing.assert_close(*results)


def test_gradients_of_the_recurrent_weights_are_not_summed_in_bfloat16():
    """By the exact sum of a case in which 256 + 1 is 256, as in bfloat16."""
    rssm = models.RSSM(actions=1, embed=2, stoch=2, deter=3, hidden=4)
    nn.init.zeros_(rssm.img_in.weight)  # no step reaches the next one by its sample
    steps = 300
    with torch.autocast("cpu", torch.bfloat16):
        embed = torch.randn(steps, 1, 2).to(torch.bfloat16)
        posterior, _ = rssm.observe(embed, torch.zeros(steps, 1, 1), rssm.initial(1))
        posterior.mean.sum().backward()
    assert rssm.obs_out.bias.grad[:2].tolist() == [300.0, 300.0]


def test_no_recurrent_weight_has_a_gradient_summed_in_bfloat16():
    """Within 1 % of float32's. Summed step by step, those that the loop uses miss it by 12 %."""
    torch.manual_seed(0)
    rssm = models.RSSM(actions=2, embed=4, stoch=3, deter=8, hidden=8)
    embed, action, gradients = torch.rand(600, 1, 4), torch.ones(600, 1, 2), []
    for dtype in (torch.bfloat16, torch.float32):
        rssm.zero_grad()
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            posterior, _ = rssm.observe(embed.bfloat16().to(dtype), action, rssm.initial(1))
            posterior.mean.sum().backward()
        gradients.append({n: p.grad for n, p in rssm.named_parameters() if "img_out" not in n})
    for name, exact in gradients[1].items():
        assert (gradients[0][name] - exact).norm() < 0.01 * exact.norm(), name


def test_images_become_channels_last_without_a_copy():
    image, seen = torch.randn(2, 3, 64, 64, 3), []
    encoder = models.ConvEncoder(4)
    encoder.net[0].register_forward_pre_hook(lambda _, inputs: seen.extend(inputs))
    encoder(image)
    assert seen[0].shape == (6, 3, 64, 64)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert seen[0].data_ptr() == image.data_ptr()


def glorot(fan_in, fan_out):
    return math.sqrt(6 / (fan_in + fan_out))


def test_weights_start_as_keras_starts_them():
    rssm = models.RSSM(2, 64, stoch=30, deter=200, hidden=150).apply(models.init_as_keras)
    encoder = models.ConvEncoder(32).apply(models.init_as_keras)
    decoder = models.ConvDecoder(230, 32).apply(models.init_as_keras)
    # Keras: fans of a (transposed) convolution count the kernel's pixels on both sides, and the
    # gates of a GRU are one matrix of 3 * 200 outputs.
    bounds = [
        (rssm.img_in.weight, glorot(32, 150)),
        (rssm.cell.weight_ih, glorot(150, 600)),
        (encoder.net[2].weight, glorot(32 * 16, 64 * 16)),
        (decoder.net[0].weight, glorot(1024 * 25, 128 * 25)),
        (decoder.net[2].weight, glorot(128 * 25, 64 * 25)),
        (decoder.dense.weight, glorot(230, 1024)),
    ]
    for weight, bound in bounds:
        assert weight.abs().max().item() <= bound
        assert weight.abs().max().item() == pytest.approx(bound, rel=0.01)
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    recurrent = rssm.cell.weight_hh
    torch.testing.assert_close(recurrent.T @ recurrent, torch.eye(200), atol=1e-5, rtol=0)
    for module in (rssm, encoder, decoder):
        assert all(not p.any() for name, p in module.named_parameters() if "bias" in name)


def rssm_and_inputs(steps=5, batch=3):
    rssm = models.RSSM(2, 12, stoch=4, deter=8, hidden=10).apply(models.init_as_keras)
    return rssm, torch.randn(steps, batch, 12), torch.randn(steps, batch, 2)


def test_observe_is_obs_step_after_obs_step():
    rssm, embed, action = rssm_and_inputs(steps=1)
    torch.manual_seed(1)
    post, _ = rssm.observe(embed, action, rssm.initial(3))
    torch.manual_seed(1)
    step = rssm.obs_step(rssm.initial(3), action[0], embed[0])
    for a, b in zip(post, step):
        torch.testing.assert_close(a[0], b)


def test_observe_against_the_equations_step_by_step():
    rssm, embed, action = rssm_and_inputs()
    torch.manual_seed(1)
    post, prior = rssm.observe(embed, action, rssm.initial(3))
    torch.manual_seed(1)
    noise = torch.randn(5, 3, 4)
    stoch, deter = torch.zeros(3, 4), torch.zeros(3, 8)
    for t in range(5):
        x = nn.functional.elu(rssm.img_in(torch.cat([stoch, action[t]], -1)))
        deter = rssm.cell(x, deter)
        mean, std = rssm.img_out(deter).chunk(2, -1)
        torch.testing.assert_close(prior.mean[t], mean)
        torch.testing.assert_close(prior.std[t], nn.functional.softplus(std) + 0.1)
        y = nn.functional.elu(rssm.obs_in(torch.cat([deter, embed[t]], -1)))
        mean, std = rssm.obs_out(y).chunk(2, -1)
        std = nn.functional.softplus(std) + 0.1
        stoch = mean + std * noise[t]
        for actual, expected in zip(post.map(lambda x, t=t: x[t]), (stoch, deter, mean, std)):
            torch.testing.assert_close(actual, expected)


def observe_step_by_step(rssm, embed, action, noise):
    """`RSSM.observe` from zeros, by autograd alone; `noise`: as drawn."""
    state, posts, priors = rssm.initial(embed.shape[1]), [], []
    for e, a, n in zip(embed, action, noise):
        x = nn.functional.elu(rssm.img_in(torch.cat([state.stoch, a], -1)))
        deter = rssm.cell(x, state.deter)
        y = nn.functional.elu(rssm.obs_in(torch.cat([deter, e], -1)))
        mean, std = rssm.stats(rssm.obs_out(y))
        state = models.State(mean + std * n, deter, mean, std)
        posts.append(state)
        mean, std = rssm.stats(rssm.img_out(deter))
        priors.append(models.State(mean, deter, mean, std))
    return [models.State(*map(torch.stack, zip(*states))) for states in (posts, priors)]


@pytest.mark.parametrize("read", ["stoch", "deter", "mean", "std"])
def test_the_gradient_through_time_is_autograds(read):
    """Of every weight, of the embeddings and of the actions, from each part of the states alone."""
    rssm, embed, action = (x.double() for x in rssm_and_inputs())
    for p in rssm.parameters():  # biases too
        nn.init.normal_(p, std=0.5)
    leaves = [*rssm.parameters(), embed.requires_grad_(), action.requires_grad_()]
    torch.manual_seed(1)
    ours = rssm.observe(embed, action, rssm.initial(3))
    torch.manual_seed(1)
    theirs = observe_step_by_step(rssm, embed, action, torch.randn(5, 3, 4).double())
    cotangents = torch.randn_like(getattr(ours[0], read)), torch.randn_like(ours[1].std)
    gradients = []
    for post, prior in (ours, theirs):
        loss = (getattr(post, read) * cotangents[0]).sum() + (prior.std * cotangents[1]).sum()
        gradients.append(torch.autograd.grad(loss, leaves))
    torch.testing.assert_close(*gradients)


def test_the_gradients_of_traces_can_be_taken_twice_and_change_nothing():
    rssm, embed, action = (x.double() for x in rssm_and_inputs())
    post, _ = rssm.observe(embed, action, rssm.initial(3))
    trace = rssm.roll_out(lambda f: f[:, :2].tanh(), post.map(lambda x: x[0].detach()), 4)
    moves = trace.noise[..., :2].clone().requires_grad_()
    imagined = rssm.retrace(trace, moves)
    net = models.mlp(6, 5, 2, 2).double()
    recorded = models.RecordedMLP(net, 4, 3)
    for step in torch.randn(4, 3, 6).double():
        recorded(step)
    for outputs, leaves in (
        ((post.deter, post.mean), [rssm.cell.weight_hh, rssm.img_in.weight]),
        ((imagined.deter, imagined.mean), [moves]),
        ((recorded.outputs(),), list(net.parameters())),
    ):
        cotangents = [torch.randn_like(x) for x in outputs]
        before = [x.clone() for x in cotangents]
        first = torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True)
        second = torch.autograd.grad(outputs, leaves, cotangents)
        torch.testing.assert_close(first, second, rtol=0, atol=0)
        torch.testing.assert_close(cotangents, before, rtol=0, atol=0)


def test_a_roll_out_has_gradients_to_its_actions_and_to_no_weight():
    rssm, _, action = rssm_and_inputs()
    trace = rssm.roll_out(lambda f: f[:, :2].tanh(), rssm.initial(3), 5)
    feature = rssm.retrace(trace, action.requires_grad_()).feature
    gradients = torch.autograd.grad(feature.sum(), [action, *rssm.parameters()], allow_unused=True)
    assert gradients[0].any() and all(g is None for g in gradients[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_under_autocast_only_float32_becomes_half(dtype):
    x = torch.ones(1, dtype=dtype)
    assert models.product_type(x) == dtype
    with torch.autocast("cpu", torch.bfloat16):
        expected = torch.nn.functional.linear(x, torch.ones(1, 1, dtype=dtype)).dtype
        assert models.product_type(x) == expected
        assert (expected == torch.bfloat16) == (dtype == torch.float32)


def test_a_state_changed_after_its_step_changes_no_gradient():
    rssm, embed, action = rssm_and_inputs()
    gradients = []
    for changed in (False, True):
        state = models.State(*(torch.ones(3, n) for n in (4, 8, 4, 4)))
        torch.manual_seed(1)
        post, _ = rssm.observe(embed, action, state)
        if changed:
            for tensor in state:
                tensor.zero_()
        gradients.append(torch.autograd.grad(post.mean.sum(), rssm.cell.weight_hh))
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_img_step_gives_the_prior_that_observe_gives():
    rssm, embed, action = rssm_and_inputs()
    post, prior = rssm.observe(embed, action, rssm.initial(3))
    state = rssm.img_step(post.map(lambda x: x[2]), action[3])
    torch.testing.assert_close(state.mean, prior.mean[3])
    torch.testing.assert_close(state.std, prior.std[3])
    torch.testing.assert_close(state.deter, prior.deter[3])


def test_a_later_frame_changes_no_earlier_state():
    rssm, embed, action = rssm_and_inputs()
    changed = embed.clone()
    changed[3] += 1
    torch.manual_seed(1)
    one, _ = rssm.observe(embed, action, rssm.initial(3))
    torch.manual_seed(1)
    two, _ = rssm.observe(changed, action, rssm.initial(3))
    torch.testing.assert_close(one.stoch[:3], two.stoch[:3])
    assert not torch.equal(one.stoch[3], two.stoch[3])


def test_features_are_stoch_then_deter():
    state = models.State(torch.ones(2, 3), torch.zeros(2, 5), None, None)
    torch.testing.assert_close(state.feature, torch.tensor([[1.0] * 3 + [0.0] * 5] * 2))
