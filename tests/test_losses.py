"""The losses against small cases with known answers."""

import pytest
import torch

import dreamer
from models import State


def normals(*shape):
    """A random posterior or prior that takes gradients."""
    mean = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    std = (torch.rand(*shape, dtype=torch.float64) + 0.5).requires_grad_()
    return State(mean, mean, mean, std)


def test_kl_of_known_normals():
    one = State(None, None, torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 2.0]]))
    zero = State(None, None, torch.zeros(1, 2), torch.ones(1, 2))
    expected = 0.5 + (0.5 * (4 - 1) - torch.log(torch.tensor(2.0)))
    loss, kl = dreamer.kl_loss(one, zero, free_nats=0.0, balance=None)
    torch.testing.assert_close(kl, expected)
    torch.testing.assert_close(loss, expected)


def test_v1_takes_the_mean_before_the_maximum():
    # KLs of 0 and 5 nats: mean 2.5. The mean of the maxima would be (3 + 5) / 2.
    post = State(None, None, torch.tensor([[0.0], [10**0.5]]), torch.ones(2, 1))
    prior = State(None, None, torch.zeros(2, 1), torch.ones(2, 1))
    loss, kl = dreamer.kl_loss(post, prior, free_nats=3.0, balance=None)
    assert kl.item() == pytest.approx(2.5)
    assert loss.item() == 3.0
    assert dreamer.kl_loss(post, prior, 2.0, None)[0].item() == pytest.approx(2.5)


def test_free_nats_stop_the_gradient_of_v1():
    post, prior = normals(3, 4, 2), normals(3, 4, 2)
    loss, _ = dreamer.kl_loss(post, prior, free_nats=kl_value(post, prior) + 1, balance=None)
    loss.backward()
    assert not post.mean.grad.any() and not prior.mean.grad.any()


def kl_value(post, prior):
    return dreamer.kl_loss(post, prior, 0.0, None)[1].item()


def test_balancing_changes_gradients_and_not_the_value():
    post, prior = normals(3, 4, 2), normals(3, 4, 2)
    weights = (post.mean, post.std, prior.mean, prior.std)
    plain, _ = dreamer.kl_loss(post, prior, 0.0, None)
    balanced, _ = dreamer.kl_loss(post, prior, 0.0, 0.8)
    torch.testing.assert_close(balanced, plain)
    expected = torch.autograd.grad(plain, weights)
    actual = torch.autograd.grad(balanced, weights)
    for a, e, share in zip(actual, expected, (0.2, 0.2, 0.8, 0.8)):
        torch.testing.assert_close(a, share * e)


def test_each_balanced_term_is_bounded_by_the_free_nats():
    post, prior = normals(3, 4, 2), normals(3, 4, 2)
    free = kl_value(post, prior) + 1
    loss, kl = dreamer.kl_loss(post, prior, free, 0.8)
    assert loss.item() == pytest.approx(free)
    assert kl.item() == pytest.approx(free - 1)


def by_hand(reward, value, discount, lambda_):
    """The lambda-return as the v1 paper defines it: a weighted mean of n-step returns."""
    horizon = len(reward)
    result = []
    for k in range(horizon - 1):
        n_step = []
        for end in range(k + 1, horizon):
            total, weight = 0.0, 1.0
            for j in range(k, end):
                total += weight * reward[j]
                weight *= discount[j]
            n_step.append(total + weight * value[end])
        last = len(n_step) - 1
        mixed = sum((1 - lambda_) * lambda_**i * g for i, g in enumerate(n_step[:-1]))
        result.append(mixed + lambda_**last * n_step[-1])
    return torch.stack(result)


@pytest.mark.parametrize("lambda_", [0.0, 0.5, 0.95, 1.0])
def test_lambda_return_against_n_step_returns(lambda_):
    reward, value = torch.randn(2, 6, 3, dtype=torch.float64)
    discount = torch.rand(6, 3, dtype=torch.float64)
    actual = dreamer.lambda_return(reward, value, discount, lambda_)
    torch.testing.assert_close(actual, by_hand(reward, value, discount, lambda_))


def test_lambda_return_at_zero_is_one_step_and_at_one_is_monte_carlo():
    reward, value = torch.randn(2, 4, 1)
    discount = torch.full((4, 1), 0.9)
    one_step = reward[:-1] + 0.9 * value[1:]
    torch.testing.assert_close(dreamer.lambda_return(reward, value, discount, 0.0), one_step)
    rollout = reward[0] + 0.9 * reward[1] + 0.81 * reward[2] + 0.729 * value[3]
    torch.testing.assert_close(dreamer.lambda_return(reward, value, discount, 1.0)[0], rollout)


def test_lambda_return_stops_at_a_predicted_end():
    reward, value = torch.ones(4, 1), torch.full((4, 1), 100.0)
    discount = torch.tensor([[1.0], [0.0], [1.0], [1.0]])
    target = dreamer.lambda_return(reward, value, discount, 1.0)
    assert target[0].item() == 2.0 and target[1].item() == 1.0


def test_discount_weight_starts_at_one_and_is_shifted():
    discount = torch.tensor([0.5, 0.4, 0.3, 0.2], requires_grad=True)
    weight = dreamer.discount_weight(discount)
    torch.testing.assert_close(weight, torch.tensor([1.0, 0.5, 0.2]))
    assert not weight.requires_grad


def test_actor_and_value_loss_by_hand():
    target, weight = torch.tensor([[2.0], [4.0]]), torch.tensor([[1.0], [0.5]])
    assert dreamer.actor_loss(target, weight).item() == -2.0
    assert dreamer.value_loss(torch.tensor([[-1.0], [-3.0]]), weight).item() == 1.25
