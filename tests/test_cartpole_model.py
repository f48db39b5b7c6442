"""results/cartpole_model.py against the physics, and on a tiny run."""

import cartpole_model
import numpy as np
import pytest
from conftest import folder

import dreamer
import utils


def test_a_push_moves_the_pole_the_other_way_and_leaves_the_physics_as_it_was():
    env = dreamer.make_env(dreamer.resolve({"env": "cartpole-balance", "device": "cpu"}))
    env.reset(seed=0)
    physics = env.unwrapped._env.physics
    state = physics.get_state()
    before = cartpole_model.angle(physics)
    left, right = (cartpole_model.pushed(env, action) for action in (-0.7, 0.7))
    assert right < before < left
    np.testing.assert_array_equal(physics.get_state(), state)
    for _ in range(cartpole_model.FRAMES // 2):
        env.step(np.array([0.7], np.float32))
    assert cartpole_model.angle(physics) == pytest.approx(right)


def test_the_model_of_a_tiny_run_is_judged(finished, capsys):
    paths = utils.checkpoints(folder(finished) / "checkpoints")[-2:]
    cartpole_model.main(paths)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [str(path) for path in paths]
    for line in lines:
        assert "angles' std, degrees" in line and "imagined" in line and "nan" not in line
    assert lines[0].split("imagined")[1] != lines[1].split("imagined")[1]
