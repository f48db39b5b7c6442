"""Captured steps and acting against the same code run eagerly, on an emulated graph, to the bit.

tests/test_cuda.py does the same on a card, within rounding.
"""

import copy
from contextlib import contextmanager
from types import SimpleNamespace

import emulated_card
import numpy as np
import pytest
import torch
from conftest import folder, train
from emulated_card import CapturingDreamer, EagerDreamer
from kill_run import differences

import dreamer
import utils

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def emulation(monkeypatch):
    emulated_card.install(monkeypatch)


@pytest.fixture
def pair(tiny_config):
    """Makes a captured agent and an eager one, with the same weights."""

    def make(**more):
        agents = []
        for kind in (CapturingDreamer, EagerDreamer):
            torch.manual_seed(0)
            agents.append(kind(tiny_config(**more), 2, CPU))
        return agents

    return make


def assert_same(one, other):
    """Of everything that training changes; an optimizer's tensors go by number."""
    leaves = [torch.utils._pytree.tree_flatten_with_path(a.state())[0] for a in (one, other)]
    assert [path for path, _ in leaves[0]] == [path for path, _ in leaves[1]]
    for (path, mine), (_, theirs) in zip(*leaves):
        same = torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs
        assert same, path


@pytest.mark.parametrize(
    "more, scale",
    [
        ({}, None),
        ({"precision": "bf16", "actor_entropy": 0.1}, None),
        ({"use_disc_model": True, "algo": "Dreamerv2", "kl_scale": 0.5}, None),
        ({"use_disc_model": True}, 8.0),
        ({}, 3e38),  # overflows, until it has been halved often enough
    ],
)
def test_captured_steps_equal_eager_steps(pair, make_batch, more, scale):
    agents = pair(model_rate_decay=3, **more)
    first = make_batch(agents[0].config)
    second = {key: value.flip(1) for key, value in first.items()}
    for agent in agents:
        if scale:
            agent.scalers = {n: torch.amp.GradScaler("cpu", scale) for n in agent.scalers}
        torch.manual_seed(1)
        agent.metrics = [
            {name: value.item() for name, value in agent.update(batch, number).items()}
            for number, batch in enumerate((first, second, first, second))
        ]
    captured, eager = agents
    assert captured._captured_step.__name__ == "replay"
    assert captured.metrics == eager.metrics
    assert captured.metrics[1] != captured.metrics[3]
    assert_same(captured, eager)


def test_a_state_loaded_after_the_capture_is_trained_on(pair, make_batch):
    captured, eager = pair(model_rate_decay=3)
    batch = make_batch(eager.config)
    captured.update(batch)
    for number in range(3):
        eager.update(batch, number)
    state = copy.deepcopy(eager.state())
    for agent in (captured, eager):
        agent.load_state(copy.deepcopy(state))  # an optimizer keeps the tensors that it is given
        torch.manual_seed(3)
        agent.update(batch, 3)
        agent.update(batch, 4)
    assert_same(captured, eager)


@pytest.mark.parametrize("explore", [True, False])
def test_captured_acting_equals_eager_acting(pair, make_batch, explore):
    """Of two numbers of environments in turns, while the weights change."""
    agents = pair(act_memory=3)
    images = np.random.default_rng(0).integers(0, 256, (7, 3, 64, 64, 3), np.uint8)
    batch = make_batch(agents[0].config)
    played = []
    for agent in agents:
        torch.manual_seed(4)
        actions = []
        for _ in range(2):
            for n in (1, 3):
                policy = agent.policy(n, explore)
                actions += [policy(image[:n]) for image in images]  # beyond `act_memory`
            agent.update(batch)
        played.append(actions)
    assert len(agents[0]._policies) == 2
    for one, other in zip(*played):
        np.testing.assert_array_equal(one, other)
    assert not np.array_equal(played[0][0], played[0][14])


def test_a_second_stream_begins_with_what_was_queued_and_is_waited_for(monkeypatch):
    calls, device = [], torch.device("cpu", 3)  # whose stream nobody has made

    def stream(name):
        fake = SimpleNamespace(name=name)
        fake.wait_stream = lambda other: calls.append(f"{name} waits for {other.name}")
        return fake

    def make(device):
        calls.append("made")
        return stream("second")

    @contextmanager
    def enter(fake):
        calls.append(f"into {fake.name}")
        yield
        calls.append("out")

    main = stream("main")
    for name, fake in (("Stream", make), ("stream", enter), ("current_stream", lambda _: main)):
        monkeypatch.setattr(torch.cuda, name, fake)
    beside = utils.Beside(device)
    calls.append("beside")
    with beside:
        calls.append("inside")
    begun = ["made", "second waits for main", "beside"]
    assert calls == [*begun, "into second", "inside", "out", "main waits for second"]
    calls.clear()
    with pytest.raises(RuntimeError, match="first"), utils.Beside(device):
        raise RuntimeError("first")
    # The same stream; and a capture that failed has no end to wait for.
    assert calls == ["second waits for main", "into second"]


def test_a_graph_holds_no_wait_for_the_device():
    def waits():
        return torch.ones(3).sum().item()

    with pytest.raises(AssertionError, match="_local_scalar_dense"):
        utils.capture(waits, CPU)


def test_a_captured_run_equals_an_eager_run(tmp_path, monkeypatch):
    """Trained, evaluated, restored and trained on; rows, weights and all."""
    folders = []
    for kind in (CapturingDreamer, EagerDreamer):
        monkeypatch.setattr(dreamer, "Dreamer", kind)
        logdir = tmp_path / kind.__name__
        assert train(logdir, total_steps=160, model_rate_decay=3) == 0
        assert train(logdir, "--restore", total_steps=240, model_rate_decay=3) == 0
        folders.append(folder(logdir))
    assert differences(*folders) == []
    rows = (folders[0] / "metrics.jsonl").read_text().splitlines()
    assert sum("loss/world" in row for row in rows) == 4
