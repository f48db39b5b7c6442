"""The captured gradient step and captured acting against the same code run eagerly, on a card."""

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, SHORT_RUN, flags, folder, in_double, run, train
from kill_run import rows_of

import dreamer
import models
import utils
from replay_buffer import ReplayBuffer

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")


def pair(tiny_config, **more):
    """A captured agent and an eager one, with the same weights."""
    agents = []
    for eager in (False, True):
        torch.manual_seed(0)
        config = tiny_config(device="cuda", eager=eager, **more)
        agents.append(dreamer.Dreamer(config, 2, CUDA))
    return agents


def assert_trained_alike(one, other, tolerance):
    """Adam's moments say which gradients were seen; its steps have a length of their own."""
    for name in one.optimizers:
        states = [a.optimizers[name].state for a in (one, other)]
        for p, q in zip(getattr(one, name).parameters(), getattr(other, name).parameters()):
            mine, theirs = states[0][p], states[1][q]
            assert mine["step"].item() == theirs["step"].item() > 0
            for key in ("exp_avg", "exp_avg_sq"):
                error = (mine[key] - theirs[key]).norm()
                assert error <= tolerance * theirs[key].norm() + 1e-12, (name, key, p.shape)


def on_card(batch) -> dict:
    return {key: value.to(CUDA) for key, value in batch.items()}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("more", [{}, {"use_disc_model": True, "algo": "Dreamerv2"}])
def test_captured_steps_equal_eager_steps(tiny_config, make_batch, monkeypatch, precision, more):
    if precision == "bf16" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("the card has no bfloat16")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    captured, eager = pair(tiny_config, precision=precision, model_rate_decay=3, **more)
    # A captured rate is of float32, an eager one of float64: here both are the same.
    eager.model_rate = lambda number: float(np.float32(captured.model_rate(number)))
    for optimizer in eager.optimizers.values():
        optimizer.param_groups[0]["lr"] = float(np.float32(optimizer.param_groups[0]["lr"]))
    torch.manual_seed(1)
    first = on_card(make_batch(eager.config))
    second = {key: value.flip(1) for key, value in first.items()}
    for agent in (captured, eager):
        if precision == "fp16":  # tiny networks overflow at other scales
            for name in agent.scalers:
                agent.scalers[name] = torch.amp.GradScaler("cuda", init_scale=8.0)
        torch.cuda.manual_seed(2)
        agent.metrics = [
            {k: v.item() for k, v in agent.update(batch, number).items()}
            for number, batch in enumerate((first, second, first, second))
        ]
    assert captured._captured_step is not None and captured._captured_step.__name__ == "replay"
    tolerance = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 5e-2}[precision]
    for one, two in zip(captured.metrics, eager.metrics):
        assert one.keys() == two.keys()
        for name in ("loss/world", "loss/reward", "kl", "loss/value"):
            assert one[name] == pytest.approx(two[name], rel=tolerance, abs=tolerance), name
    assert_trained_alike(captured, eager, tolerance)


def test_the_gradients_on_a_card_are_those_on_a_cpu(tiny_config, make_batch, monkeypatch):
    """Where it goes other ways: the first convolution by blocks, the GRU in one kernel."""
    for module in (models, dreamer):
        monkeypatch.setattr(module, "standard_normal", lambda shape, x: torch.randn(shape).to(x))
    agents = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        config = tiny_config(
            device=device, precision="fp32", eager=True, use_disc_model=True, algo="Dreamerv2"
        )
        # In double: in float32 cuDNN rounds to TF32, and a ReLU falls to the other side of zero.
        agent = in_double(
            lambda config=config: dreamer.Dreamer(config, 2, torch.device(config.device))
        )
        batch = make_batch(config, dtype=torch.float64)
        torch.manual_seed(1)
        agent.gradients({key: value.to(device) for key, value in batch.items()})
        agents.append(agent)
    for (name, p), q in zip(agents[0].named_parameters(), agents[1].parameters()):
        assert (p.grad - q.grad.cpu()).norm() <= 1e-8 * p.grad.norm() + 1e-15, name


def test_the_capture_itself_changes_nothing(tiny_config, make_batch):
    captured, _ = pair(tiny_config)
    batch = on_card(make_batch(captured.config))
    before, random = copy.deepcopy(captured.state_dict()), torch.cuda.get_rng_state()
    utils.capture(lambda: captured.eager_update(batch), CUDA, captured._undo())
    for name, value in captured.state_dict().items():
        assert torch.equal(value, before[name])
    assert torch.equal(torch.cuda.get_rng_state(), random)
    for optimizer in captured.optimizers.values():
        for state in optimizer.state.values():
            assert all(not tensor.any() for tensor in state.values())


def test_a_state_loaded_after_the_capture_is_trained_on(tiny_config, make_batch):
    # In fp16 a step may overflow.
    captured, eager = pair(tiny_config, precision="fp32", model_rate_decay=3)
    batch = on_card(make_batch(captured.config))
    for agent in (captured, eager):
        agent.update(batch)
    state = copy.deepcopy(eager.state())
    for agent in (captured, eager):
        agent.load_state(copy.deepcopy(state))  # an optimizer keeps the tensors that it is given
        torch.cuda.manual_seed(3)
        agent.update(batch, 1)
    assert_trained_alike(captured, eager, 1e-3)


@pytest.mark.parametrize("captured", [True, False])
def test_work_beside_waits_for_what_was_before_and_is_waited_for(captured):
    x, y = torch.zeros(2, device=CUDA)
    long = 10**8  # cycles of the card's clock: tens of milliseconds

    def work():
        torch.cuda._sleep(long)
        x.fill_(1)
        with utils.Beside(CUDA):
            y.copy_(x)
            torch.cuda._sleep(long)
            y.add_(1)
        return 2 * y

    function = utils.capture(work, CUDA) if captured else work
    x.zero_()  # the capture has done its work three times
    y.zero_()
    assert function().item() == 4


def test_a_replay_on_the_card_gives_the_batches_of_one_on_the_cpu():
    rng = np.random.default_rng(0)
    replays = [ReplayBuffer(40, 2, device) for device in (CUDA, "cpu")]
    for rows in (30, 25):  # the second runs over the ring's end
        episode = {
            "image": rng.integers(0, 256, (rows, 64, 64, 3), np.uint8),
            "action": rng.random((rows, 2), np.float32),
            "reward": rng.random(rows, np.float32),
            "discount": np.ones(rows, np.float32),
        }
        for replay in replays:
            replay.add(episode)
    one, other = (replay.sample(8, 6, seed=1, first_share=0.5) for replay in replays)
    for key in other:
        assert one[key].device.type == "cuda" and torch.equal(one[key].cpu(), other[key])


@pytest.mark.parametrize("explore", [True, False])
def test_captured_acting_equals_eager_acting(tiny_config, explore):
    captured, eager = pair(tiny_config, precision="fp32", act_memory=3)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (7, 3, 64, 64, 3), np.uint8)  # beyond `act_memory`
    actions = []
    for agent in (captured, eager):
        policy = agent.policy(3, explore)
        torch.cuda.manual_seed(4)
        actions.append([policy(image) for image in images])
    np.testing.assert_allclose(actions[0], actions[1], atol=1e-3)
    again = captured.policy(3, explore)
    torch.cuda.manual_seed(4)
    np.testing.assert_array_equal(again(images[0]), actions[0][0])


FAILS_TO_CAPTURE = """
import torch, utils
device = torch.device("cuda")
x = torch.ones(3, device=device)
def waits():
    x.add_(torch.rand_like(x).ceil())  # a failed capture may leave the generator unusable
    return x.sum().item()
try:
    function = utils.capture(waits, device, lambda: x.fill_(1))
    print(function is waits, x.tolist(), function())
except utils.RunError as error:
    print(error)
"""


def test_what_cannot_be_captured_runs_eagerly_with_a_warning():
    """In a process of its own: before PyTorch 2.13 none can go on, and that is said."""
    command = [sys.executable, "-c", FAILS_TO_CAPTURE]
    result = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
    out, err = result.stdout.strip(), result.stderr.strip().splitlines()
    if "--eager" in out:
        assert "CUDA capture failed" in out and len(out.splitlines()) == 1
    else:
        assert out == "True [1.0, 1.0, 1.0] 6.0"
        assert len(err) == 1 and "going on without it" in err[0]


@pytest.mark.parametrize("precision", ["auto", "fp16"])
def test_a_run_trains_goes_on_and_evaluates(tmp_path, precision):
    more = {"device": "cuda", "preset": "small", "precision": precision, "update_steps": 20}
    assert train(tmp_path, total_steps=160, **more) == 0
    words = flags(env=SHORT_RUN["env"], logdir=tmp_path, total_steps=240)
    assert run("--train", "--restore", *words) == 0
    rows = rows_of(folder(tmp_path))
    assert rows[-1]["step"] == 240
    trained = [r for r in rows if "loss/world" in r]
    assert all(np.isfinite(r["loss/world"]) for r in trained)
    assert trained[-1].get("overflow/world", 0) < 1
    words = flags(env=SHORT_RUN["env"], logdir=tmp_path, eval_episodes=2)
    assert run("--evaluate", "--restore", *words) == 0
    assert run("--evaluate", "--restore", *words, "--device", "cpu", "--precision", "fp32") == 0


@pytest.mark.parametrize("eager", [[], ["--eager"]])
def test_the_benchmark_counts_the_work_of_a_captured_step_too(tmp_path, eager):
    path = tmp_path / "benchmark.json"
    words = flags(**{**SHORT_RUN, "device": "cuda", "logdir": tmp_path})
    assert run("--benchmark", "--json", path, *words, *eager) == 0
    result = json.loads(path.read_text())
    assert result["gradient step GFLOP"] > 0 and result["share of matrix product"] > 0
