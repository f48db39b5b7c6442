"""The environment against the real suite: `dm_control` stepped by hand is the known answer."""

import os
import random
import subprocess
import sys
import time
import warnings

import gymnasium as gym
import numpy as np
import pytest
from conftest import ROOT
from gymnasium.utils.env_checker import check_env

import env_wrapper

GL_VARIABLES = ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY", "DREAMER_GL")


@pytest.fixture
def make():
    """`make_env`, with every environment closed at the end of the test."""
    envs = []

    def make_env(task, *args, **options):
        envs.append(env_wrapper.make_env(task, *args, **options))
        return envs[-1]

    yield make_env
    for env in envs:
        env.close()


@pytest.fixture
def load_raw():
    """The suite's own environment, as plain as it comes."""
    envs = []

    def load(domain, task, seed):
        envs.append(env_wrapper._suite().load(domain, task, task_kwargs={"random": seed}))
        return envs[-1]

    yield load
    for env in envs:
        env.close()


def actions_for(env, n, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(-1, 1, (n, *env.action_space.shape)).astype(np.float32)


def play(env, seed, steps=4):
    """Frames and rewards of an episode's first steps; the actions are always the same."""
    frames, rewards = [env.reset(seed=seed)[0]], []
    for action in actions_for(env, steps):
        frame, reward, *_ = env.step(action)
        frames.append(frame)
        rewards.append(reward)
    return np.stack(frames), np.array(rewards)


def assert_same_episode(one, other):
    np.testing.assert_array_equal(one[0], other[0])
    np.testing.assert_array_equal(one[1], other[1])


def without_pictures(env, monkeypatch):
    """Steps cost next to nothing when nothing is drawn."""
    blank = np.zeros((64, 64, 3), np.uint8)
    monkeypatch.setattr(env.unwrapped, "_observation", lambda: blank)


def spy_on_render(monkeypatch):
    """A list that receives (height, width, camera) of each picture drawn from now on."""
    from dm_control.mujoco import Camera

    render, calls = Camera.render, []

    def spy(self, *words, **options):
        calls.append((self.height, self.width, self._render_camera.fixedcamid))
        return render(self, *words, **options)

    monkeypatch.setattr(Camera, "render", spy)
    return calls


# ------------------------------------------------------------------------------------------ tasks


def test_every_task_of_the_suite_can_be_played():
    tasks = env_wrapper._suite().ALL_TASKS
    assert len(tasks) > 40
    failures = {}
    for domain, task in tasks:
        name = f"{domain}-{task}"
        try:
            env = env_wrapper.make_env(name, seed=0)
            obs, _ = env.reset(seed=1)
            after, reward, *_ = env.step(actions_for(env, 1)[0])
            env.close()
            for frame in (obs, after):
                assert frame.shape == (64, 64, 3) and frame.dtype == np.uint8
                assert frame.std() > 1, "the picture is of one colour"
            assert isinstance(reward, float) and np.isfinite(reward)
            assert (env.action_space.low == -1).all() and (env.action_space.high == 1).all()
            assert env.action_space.dtype == np.float32
        except Exception as error:
            failures[name] = f"{type(error).__name__}: {error}"
    assert not failures


@pytest.mark.parametrize("task", ["lqr-lqr_2_1", "lqr-lqr_6_2"])
def test_tasks_of_unbounded_controls_survive_an_episode_of_random_actions(task, make, monkeypatch):
    env = make(task, seed=0)
    without_pictures(env, monkeypatch)
    env.reset(seed=1)
    for action in actions_for(env, 500):
        _, reward, terminated, truncated, _ = env.step(action)
        assert abs(reward) < 1e6, "squared, as in the loss, it is too large for float32"
    assert truncated and not terminated


@pytest.mark.parametrize(
    "name, expected",
    [
        ("walker-walk", ("walker", "walk")),
        ("walker_walk", ("walker", "walk")),
        ("WALKER-WALK", ("walker", "walk")),
        (" Walker_Walk\n", ("walker", "walk")),
        ("ball_in_cup-catch", ("ball_in_cup", "catch")),
        ("ball-in-cup-catch", ("ball_in_cup", "catch")),
        ("cup-catch", ("ball_in_cup", "catch")),
        ("CUP_CATCH", ("ball_in_cup", "catch")),
        ("pointmass-easy", ("point_mass", "easy")),
        ("cartpole-balance_sparse", ("cartpole", "balance_sparse")),
        ("humanoid_CMU-run", ("humanoid_CMU", "run")),
        ("humanoid_cmu_run", ("humanoid_CMU", "run")),
    ],
)
def test_spellings_of_a_task(name, expected):
    assert env_wrapper.parse_task(name) == expected
    assert env_wrapper.canonical_name(name) == "-".join(expected)


def test_every_task_is_found_under_every_spelling_of_its_name():
    wrong = []
    for domain, task in env_wrapper._suite().ALL_TASKS:
        for name in (f"{domain}-{task}", f"{domain}_{task}", f"{domain}-{task}".upper()):
            try:
                found = env_wrapper.parse_task(name)
            except env_wrapper.UnknownTask:
                found = None
            if found != (domain, task):
                wrong.append((name, found))
    assert not wrong


@pytest.mark.parametrize(
    "name, close",
    [
        ("walker-wlak", "walker-walk"),
        ("cheetah_jog", "cheetah-run"),
        ("cup-catsh", "ball_in_cup-catch"),
        ("Quadruped-Wlak", "quadruped-walk"),
        ("cup", "ball_in_cup-catch"),  # a part of a name
        ("CMU", "humanoid_CMU-run"),
    ],
)
def test_an_unknown_task_is_told_the_closest_names_in_one_line(name, close):
    with pytest.raises(env_wrapper.UnknownTask) as error:
        env_wrapper.make_env(name)
    message = str(error.value)
    assert repr(name) in message and close in message
    assert "\n" not in message and len(message) < 160


def test_a_name_unlike_any_task_gets_one_line_without_a_hint():
    with pytest.raises(env_wrapper.UnknownTask) as error:
        env_wrapper.parse_task("zzz\nqqq")
    assert "\n" not in str(error.value) and "closest" not in str(error.value)


# ------------------------------------------------------------------------------------ the checker


def test_gymnasium_checker_finds_nothing_in_the_environment():
    """With a spec, since only then the checker looks at determinism, render modes and `close`."""
    name, options = "ControlSuiteTest-v0", {"task": "walker-walk", "seed": 0}
    gym.register(name, env_wrapper.ControlSuite, kwargs=options, disable_env_checker=True)
    try:
        env = gym.make(name, render_mode="rgb_array").unwrapped
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            # dm_control 1.0.50 sets the shape of arrays, of which NumPy 2.5 warns.
            warnings.filterwarnings("ignore", module="dm_control", category=DeprecationWarning)
            check_env(env)
        env.close()
    finally:
        gym.registry.pop(name)


def test_gymnasium_checker_passes_the_rescaled_environment(make):
    env = make("quadruped-walk", seed=0, render_mode="rgb_array")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*different from the unwrapped version.*")
        warnings.filterwarnings("ignore", ".*not having a spec.*")
        check_env(env)


@pytest.mark.parametrize("task", ["walker-walk", "cartpole-balance"])
def test_observations_are_arrays_of_their_own_that_pytorch_takes(make, task):
    env = make(task, seed=0)
    frames = [env.reset(seed=1)[0]]
    before = frames[0].copy()
    frames += [env.step(a)[0] for a in actions_for(env, 2)]
    assert all(frame.flags.c_contiguous and frame.flags.writeable for frame in frames)
    assert not np.shares_memory(frames[0], frames[1])
    np.testing.assert_array_equal(frames[0], before)
    assert (frames[0] != frames[1]).any() and (frames[0] != frames[2]).any()


# ------------------------------------------------------------------------------------------ seeds


@pytest.mark.parametrize("task", ["walker-walk", "finger-turn_hard", "quadruped-escape"])
def test_an_episode_depends_on_its_seed_alone(task, make):
    env = make(task, seed=0)
    first = play(env, seed=5)
    other = play(env, seed=6)
    assert (first[0] != other[0]).any()
    env.reset()
    assert_same_episode(play(env, seed=5), first)

    elsewhere = make(task, seed=123)
    elsewhere.reset()
    assert_same_episode(play(elsewhere, seed=5), first)


@pytest.mark.parametrize("task", ["cartpole-balance", "quadruped-escape"])
def test_to_ask_what_draws_changes_no_picture(task, make):
    """The second task makes its physics anew at every reset."""
    asked, other = make(task), make(task)
    assert asked.unwrapped.renderer not in ("", "unknown")
    for seed in (1, 2):
        frames = [env.reset(seed=seed)[0] for env in (asked, other)]
        np.testing.assert_array_equal(*frames)
        assert asked.unwrapped.renderer == other.unwrapped.renderer


def test_rewards_differ_between_seeds(make):
    env = make("walker-walk", seed=0)
    assert (play(env, seed=5)[1] != play(env, seed=6)[1]).all()


def test_the_seed_of_the_construction_decides_the_physics_that_a_task_draws_there(make):
    same, again, other = (make("lqr-lqr_2_1", seed=s) for s in (1, 1, 2))

    def stiffness(env):
        return np.array(env.unwrapped._env.physics.model.jnt_stiffness)

    np.testing.assert_array_equal(stiffness(same), stiffness(again))
    assert (stiffness(same) != stiffness(other)).all()


def test_environments_never_share_a_random_state(make):
    one, two = make("walker-walk", seed=1), make("walker-walk", seed=1)
    states = [env.unwrapped._env.task.random for env in (one, two)]
    assert states[0] is not states[1]
    assert np.random.mtrand._rand not in states

    one.reset(seed=4)
    expected = play(two, seed=4)
    two.reset(seed=4)
    frames = []
    for action in actions_for(one, 4):
        one.reset()
        frames.append(two.step(action)[0])
    np.testing.assert_array_equal(np.stack(frames), expected[0][1:])


def test_environments_without_a_seed_start_differently(make):
    one, two = make("walker-walk"), make("walker-walk")
    assert (one.reset()[0] != two.reset()[0]).any()


def test_an_environment_leaves_the_global_generators_alone(make):
    state = random.getstate(), np.random.get_state()
    play(make("finger-turn_hard", seed=1), seed=2)
    assert random.getstate() == state[0]
    for now, before in zip(np.random.get_state(), state[1]):
        np.testing.assert_array_equal(now, before)


# ------------------------------------------------------------------- action repeat and time limit


@pytest.mark.parametrize("repeat, frames", [(1, [1] * 10), (2, [2] * 5), (3, [3, 3, 3, 1])])
@pytest.mark.parametrize("domain, task", [("walker", "walk"), ("cartpole", "swingup")])
def test_action_repeat_sums_what_the_suite_gives(
    domain, task, repeat, frames, make, load_raw, monkeypatch
):
    env = make(f"{domain}-{task}", seed=0, action_repeat=repeat, time_limit=10)
    without_pictures(env, monkeypatch)
    env.reset(seed=7)
    raw = load_raw(domain, task, seed=7)
    raw.reset()
    for i, (action, n) in enumerate(zip(actions_for(env, len(frames)), frames)):
        _, reward, terminated, truncated, info = env.step(action)
        expected = sum((raw.step(action).reward for _ in range(n)), 0.0)
        assert reward == expected
        assert type(reward) is float and info == {"frames": n}
        assert (terminated, truncated) == (False, i == len(frames) - 1)
        np.testing.assert_array_equal(
            env.unwrapped._env.physics.get_state(), raw.physics.get_state()
        )


def test_a_reset_starts_the_count_of_frames_afresh(make, monkeypatch):
    env = make("cartpole-balance", seed=0, action_repeat=3, time_limit=4)
    without_pictures(env, monkeypatch)
    action = np.zeros(1, np.float32)
    for _ in range(2):
        env.reset(seed=0)
        steps = [env.step(action) for _ in range(2)]
        assert [step[4]["frames"] for step in steps] == [3, 1]
        assert [step[3] for step in steps] == [False, True]


@pytest.mark.parametrize("repeat", [1, 3])
def test_a_step_draws_one_picture(repeat, make, monkeypatch):
    env = make("cartpole-balance", seed=0, action_repeat=repeat, time_limit=4)
    calls = spy_on_render(monkeypatch)
    env.reset(seed=0)
    assert len(calls) == 1
    truncated, steps = False, 0
    while not truncated:
        truncated, steps = env.step(np.zeros(1, np.float32))[3], steps + 1
    assert len(calls) == 1 + steps


def test_the_time_limit_is_the_only_one(make, monkeypatch):
    """The suite's own limit for this task is 10 s, which are 1000 frames."""
    env = make("cartpole-balance", seed=0, action_repeat=5, time_limit=1205)
    without_pictures(env, monkeypatch)
    env.reset(seed=0)
    steps = [env.step(np.zeros(1, np.float32)) for _ in range(241)]
    assert not any(step[2] for step in steps)
    assert [step[3] for step in steps] == [False] * 240 + [True]


def test_the_default_episode_is_500_steps_of_two_frames(make, monkeypatch):
    env = make("cartpole-balance", seed=0)
    without_pictures(env, monkeypatch)
    env.reset(seed=0)
    truncated, frames = False, []
    while not truncated:
        *_, truncated, info = env.step(np.zeros(1, np.float32))
        frames.append(info["frames"])
    assert frames == [2] * 500


@pytest.mark.parametrize(
    "discount, time_limit, expected",
    [
        (0.0, 1000, (True, False)),
        (1.0, 1000, (False, True)),
        (0.0, 2, (True, False)),  # at the very frame of the time limit: the task's end counts
    ],
)
def test_the_end_of_a_task_against_the_end_of_its_time(
    discount, time_limit, expected, make, monkeypatch
):
    import dm_env

    env = make("cartpole-balance", seed=0, action_repeat=3, time_limit=time_limit)
    without_pictures(env, monkeypatch)
    env.reset(seed=0)
    steps = [
        dm_env.TimeStep(dm_env.StepType.MID, 0.25, 1.0, {}),
        dm_env.TimeStep(dm_env.StepType.LAST, 0.5, discount, {}),
    ]
    monkeypatch.setattr(env.unwrapped._env, "step", lambda action: steps.pop(0))
    _, reward, terminated, truncated, info = env.step(np.zeros(1, np.float32))
    assert (terminated, truncated) == expected
    assert type(terminated) is bool and type(truncated) is bool
    assert reward == 0.75 and info == {"frames": 2} and not steps


def test_an_episode_whose_simulation_diverges_is_truncated(make):
    """MuJoCo itself then begins anew in the middle of a step."""
    env = make("cheetah-run", action_repeat=3)
    env.reset(seed=1)
    seen, *_ = env.step(env.action_space.sample())
    env.unwrapped._env.physics.data.qvel[:] = 1e20
    image, *outcome = env.step(env.action_space.sample())
    assert outcome == [0.0, False, True, {"frames": 1}]
    assert (image == seen).all()
    image, _ = env.reset(seed=1)
    assert (image == env.reset(seed=1)[0]).all()
    assert not env.step(env.action_space.sample())[3]
    with pytest.raises(RuntimeError):  # an action that is no number is no fault of the simulation
        env.step(np.full(6, np.nan, np.float32))


def test_a_real_end_of_a_task_is_a_termination(make):
    """An LQR system that is at rest at its goal ends by itself."""
    env = make("lqr-lqr_2_1", seed=0).unwrapped
    env.reset(seed=0)
    with env._env.physics.reset_context():
        env._env.physics.data.qpos[:] = 0
        env._env.physics.data.qvel[:] = 0
    _, reward, terminated, truncated, info = env.step(np.zeros(1, np.float32))
    assert (terminated, truncated) == (True, False)
    assert info == {"frames": 1} and reward == pytest.approx(1)


# ---------------------------------------------------------------------------------------- actions


def test_actions_are_rescaled_to_the_bounds_of_the_task(make, monkeypatch):
    env = make("quadruped-walk", seed=0, action_repeat=1)
    without_pictures(env, monkeypatch)
    env.reset(seed=0)
    inner, received = env.unwrapped._env, []
    step = inner.step

    def spy(action):
        received.append(np.array(action))
        return step(action)

    monkeypatch.setattr(inner, "step", spy)
    for value in (-1, 0, 1):
        env.step(np.full(12, value, np.float32))
    low, high = np.tile([-1, -1, -0.8], 4), np.tile([1, 1.1, 0.8], 4)
    np.testing.assert_allclose(received, [low, (low + high) / 2, high], atol=1e-6)


def test_rescaled_actions_do_what_they_do_in_the_suite(make, load_raw, monkeypatch):
    env = make("quadruped-walk", seed=0, action_repeat=2)
    without_pictures(env, monkeypatch)
    env.reset(seed=7)
    raw = load_raw("quadruped", "walk", seed=7)
    raw.reset()
    spec = raw.action_spec()
    for action in actions_for(env, 5):
        by_hand = spec.minimum + (action + 1.0) / 2 * (spec.maximum - spec.minimum)
        expected = raw.step(by_hand).reward + raw.step(by_hand).reward
        assert env.step(action)[1] == pytest.approx(expected, rel=1e-4)


# --------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize(
    "domain, task",
    [
        ("walker", "walk"),
        ("cartpole", "swingup"),
        ("cheetah", "run"),
        ("ball_in_cup", "catch"),
        ("finger", "spin"),
        ("hopper", "hop"),
        ("reacher", "easy"),
        ("swimmer", "swimmer6"),
    ],
)
def test_cheap_pictures_are_those_of_the_suite(domain, task, make, load_raw):
    """Next to no pixel may differ, and no picture may be upside down or of another moment."""
    env = make(f"{domain}-{task}", seed=0)
    frames, _ = play(env, seed=7, steps=40)
    raw = load_raw(domain, task, seed=7)
    raw.reset()
    expected = [raw.physics.render(64, 64, camera_id=0)]
    for action in actions_for(env, 40):
        raw.step(action)
        raw.step(action)
        expected.append(raw.physics.render(64, 64, camera_id=0))
    difference = np.abs(frames.astype(int) - np.stack(expected)).max(-1)
    assert (difference > 8).mean() <= 1e-3


@pytest.mark.parametrize(
    "task, shadows, stacks",
    [
        ("walker-walk", 768, 16),
        ("cheetah-run", 768, 12),
        ("hopper-hop", 1024, 16),
        ("quadruped-escape", 2048, 16),
    ],
)
def test_cheap_settings_are_in_force_when_the_first_picture_is_drawn(task, shadows, stacks, make):
    env = make(task, seed=0)
    visual = env.unwrapped._env.physics.model.vis
    assert (visual.quality.shadowsize, visual.quality.numstacks) == (shadows, stacks)
    assert (visual.global_.offwidth, visual.global_.offheight) == (64, 64)


def test_cheap_settings_survive_a_task_that_builds_its_physics_anew(make, load_raw, monkeypatch):
    env = make("walker-walk", seed=0)
    fresh = load_raw("walker", "walk", seed=0)
    inner = env.unwrapped._env
    reset = inner.reset

    def rebuild():
        monkeypatch.setattr(inner, "_physics", fresh.physics)
        return reset()

    monkeypatch.setattr(inner, "reset", rebuild)
    old, _ = env.reset(seed=0)
    assert fresh.physics.model.vis.quality.shadowsize == 768
    fresh.physics.named.data.qpos["rootz"] += 0.3
    new, *_ = env.step(np.zeros(6, np.float32))
    assert (old != new).mean() > 0.05  # it is the new physics that is seen


def test_rgb_array_gives_a_large_picture_beside_the_same_observation(make):
    plain = make("walker-walk", seed=0)
    filmed = make("walker-walk", seed=0, render_mode="rgb_array")
    expected, _ = play(plain, seed=3)
    frames, pictures = [filmed.reset(seed=3)[0]], [filmed.render()]
    for action in actions_for(filmed, 4):
        frames.append(filmed.step(action)[0])
        pictures.append(filmed.render())
    np.testing.assert_array_equal(np.stack(frames), expected)
    for frame, picture in zip(frames, pictures):
        assert picture.shape == (256, 256, 3) and picture.dtype == np.uint8
        small = picture.reshape(64, 4, 64, 4, 3).mean((1, 3))
        assert np.abs(small - frame).mean() < 4
    assert (pictures[0] != pictures[-1]).any()
    assert plain.render() is None


def test_the_size_of_the_large_picture_is_a_setting():
    env = env_wrapper.ControlSuite("walker-walk", seed=0, render_mode="rgb_array", render_size=96)
    env.reset(seed=0)
    assert env.render().shape == (96, 96, 3)
    env.close()


@pytest.mark.parametrize(
    "task, camera", [("quadruped-walk", 2), ("walker-walk", 0), ("cheetah-run", 0)]
)
def test_the_camera(task, camera, make, monkeypatch):
    env = make(task, seed=0, render_mode="rgb_array")
    calls = spy_on_render(monkeypatch)
    env.reset(seed=0)
    env.step(actions_for(env, 1)[0])
    env.render()
    assert calls == [(64, 64, camera), (64, 64, camera), (256, 256, camera)]
    env_wrapper.suites_own(task, frames=2, action_repeat=2)()  # what the benchmark compares with
    assert calls[3:] == [(64, 64, camera)]


@pytest.mark.parametrize(
    "task, repeat, fps", [("walker-walk", 2, 20), ("cartpole-balance", 1, 100)]
)
def test_pictures_know_their_rate(task, repeat, fps, make):
    env = make(task, seed=0, action_repeat=repeat)
    assert env.unwrapped.metadata["render_fps"] == pytest.approx(fps)
    assert "render_fps" not in env_wrapper.ControlSuite.metadata


# ------------------------------------------------------------------------------------ GL back-end


@pytest.fixture
def bare_linux(monkeypatch):
    """Linux without a display and without a choice of the user's; all is put back afterwards."""
    for name in GL_VARIABLES:
        monkeypatch.setenv(name, "")  # so that it is put back even where it was not set
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "platform", "linux")


def fake_probe(monkeypatch, outcomes):
    """Probes end as `outcomes` says, by back-end; returns the list of those tried."""
    tried = []

    def run(command, *, env, timeout=None, **_):
        backend = env["MUJOCO_GL"]
        tried.append(backend)
        if outcomes[backend] == "hang":
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, outcomes[backend])

    monkeypatch.setattr(env_wrapper.subprocess, "run", run)
    return tried


@pytest.mark.parametrize(
    "variable, value, expected",
    [
        ("MUJOCO_GL", "osmesa", "osmesa"),
        ("MUJOCO_GL", "OSMesa", "osmesa"),  # the one spelling that dm_control takes
        ("DISPLAY", ":0", "glfw"),
        ("WAYLAND_DISPLAY", "w-0", "glfw"),
    ],
)
def test_what_the_user_has_is_respected(variable, value, expected, bare_linux, monkeypatch):
    monkeypatch.setenv(variable, value)
    tried = fake_probe(monkeypatch, {"glfw": 0, "egl": 0, "osmesa": 0})
    for _ in range(2):  # the second time it is known to work
        assert env_wrapper.choose_gl() == expected
        assert os.environ.get("MUJOCO_GL") == expected
        assert tried == [expected]


def test_a_choice_that_does_not_work_is_not_replaced(bare_linux, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    tried = fake_probe(monkeypatch, {"osmesa": 1, "egl": 0})
    with pytest.raises(env_wrapper.NoRenderer, match="MUJOCO_GL=osmesa") as error:
        env_wrapper.choose_gl()
    assert_names_the_way_out(str(error.value))
    assert tried == ["osmesa"]


def test_other_systems_choose_for_themselves(bare_linux, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    tried = fake_probe(monkeypatch, {"egl": 0, "osmesa": 0})
    assert env_wrapper.choose_gl() is None and not tried


@pytest.mark.parametrize(
    "outcomes, chosen, order",
    [
        ({"egl": 0, "osmesa": 0}, "egl", ["egl"]),
        ({"egl": 1, "osmesa": 0}, "osmesa", ["egl", "osmesa"]),
        ({"egl": -11, "osmesa": 0}, "osmesa", ["egl", "osmesa"]),
        ({"egl": "hang", "osmesa": 0}, "osmesa", ["egl", "osmesa"]),
        ({"glfw": 1, "egl": 0, "osmesa": 0}, "egl", ["glfw", "egl"]),
    ],
)
def test_egl_is_tried_before_osmesa(outcomes, chosen, order, bare_linux, monkeypatch):
    if "glfw" in outcomes:  # a display that nobody can reach
        monkeypatch.setenv("DISPLAY", ":0")
    tried = fake_probe(monkeypatch, outcomes)
    assert env_wrapper.choose_gl() == chosen
    assert os.environ["MUJOCO_GL"] == chosen
    assert tried == order
    assert env_wrapper.choose_gl() == chosen and tried == order


def assert_names_the_way_out(message):
    lines = message.splitlines()
    assert len(lines) == 2
    assert "apt-get install" in lines[1]
    for package in ("libegl1", "libgl1-mesa-dri", "libosmesa6"):
        assert package in lines[1]


@pytest.mark.parametrize("outcome", [1, "hang"])
def test_no_back_end_is_said_in_two_lines(outcome, bare_linux, monkeypatch):
    tried = fake_probe(monkeypatch, {"egl": outcome, "osmesa": outcome})
    with pytest.raises(env_wrapper.NoRenderer) as error:
        env_wrapper.make_env("walker-walk")
    assert_names_the_way_out(str(error.value))
    assert tried == ["egl", "osmesa"] and "MUJOCO_GL" not in os.environ


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux is probed")
@pytest.mark.parametrize(
    "hidden_by", ["a mujoco that cannot be imported", "a foreign platform", "other libraries"]
)
def test_real_probes_that_fail_end_soon(hidden_by, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k not in GL_VARIABLES}
    path = [str(ROOT)]
    if hidden_by == "a foreign platform":
        environment["PYOPENGL_PLATFORM"] = "glx"  # then MuJoCo refuses both EGL and OSMesa
    elif hidden_by == "other libraries":  # found first, and without a function of OpenGL
        for name in (
            "libEGL.so.1",
            "libEGL.so",
            "libOSMesa.so.8",
            "libOSMesa.so.6",
            "libOSMesa.so",
        ):
            (tmp_path / name).symlink_to(np.linalg._umath_linalg.__file__)
        environment["LD_LIBRARY_PATH"] = str(tmp_path)
    else:
        (tmp_path / "mujoco").mkdir()
        (tmp_path / "mujoco" / "__init__.py").write_text("raise ImportError('no libEGL.so')\n")
        path.insert(0, str(tmp_path))
    environment["PYTHONPATH"] = os.pathsep.join(path)
    code = (
        "import env_wrapper\n"
        "try:\n    env_wrapper.choose_gl()\n"
        "except env_wrapper.NoRenderer as error:\n    print(error)\n"
    )
    start = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False,
        timeout=60,
    )  # fmt: skip
    assert time.monotonic() - start < 10
    assert result.returncode == 0, result.stderr
    assert_names_the_way_out(result.stdout.strip())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux is probed")
def test_a_display_that_cannot_be_reached_is_passed_over():
    environment = {k: v for k, v in os.environ.items() if k not in GL_VARIABLES}
    environment.update(DISPLAY=":987", WAYLAND_DISPLAY="none")
    code = "import env_wrapper; print(env_wrapper.choose_gl())"
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True,
        check=True, timeout=60,
    )  # fmt: skip
    assert result.stdout.strip() in ("egl", "osmesa")


@pytest.mark.parametrize(
    "platform, chosen, words",
    [
        ("linux", "egl", "requirements.txt"),  # which was probed, or chosen here
        ("darwin", None, "requirements.txt"),
        ("darwin", "osmesa", "MUJOCO_GL=osmesa: unset it"),
    ],
)
def test_a_suite_that_cannot_be_imported(bare_linux, monkeypatch, platform, chosen, words):
    monkeypatch.setattr(sys, "platform", platform)
    fake_probe(monkeypatch, {"egl": 0})
    if chosen:
        monkeypatch.setenv("MUJOCO_GL", chosen)
    monkeypatch.setitem(sys.modules, "dm_control", None)
    with pytest.raises(env_wrapper.NoSuite, match=words) as error:
        env_wrapper.parse_task("walker-walk")
    assert "dm_control" in str(error.value) and len(str(error.value).splitlines()) == 1
    assert ("MUJOCO_GL" in str(error.value)) == (words != "requirements.txt")


def test_a_process_that_is_gone_is_said(capfd):
    """Killed between two steps or before the first; the others end too."""
    for played in (True, False):
        envs = env_wrapper.make_vector_env(2, True, "cartpole-balance")
        if played:
            envs.reset(seed=[1, 2])
        envs.processes[1].kill()
        envs.processes[1].join()
        with pytest.raises(env_wrapper.WorkerDied, match="--vector-env sync"):
            envs.step(np.zeros((2, 1), np.float32)) if played else envs.reset(seed=[1, 2])
        envs.close()
        for process in envs.processes:
            process.join(10)
            assert not process.is_alive()
        del envs
    assert "Traceback" not in capfd.readouterr().err


def test_importing_the_module_imports_no_simulator():
    code = (
        "import os, sys, env_wrapper\n"
        "print([m for m in ('dm_control', 'mujoco', 'OpenGL') if m in sys.modules])\n"
        "print(os.environ.get('MUJOCO_GL'))\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in GL_VARIABLES}
    output = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True,
        check=True, timeout=60,
    ).stdout  # fmt: skip
    assert output.splitlines() == ["[]", "None"]
