"""What a world model knows of a pole that is nearly upright.

    python results/cartpole_model.py runs/cartpole-balance/Dreamerv2/default/1/checkpoints/*.pt

The beginnings of episodes of random actions, so that no action tells the angle. The posterior of
each frame is held against the physics: how much of the pole's angle and angular velocity a linear
probe cannot read from its features (a share of their standard deviation, on episodes that the
probe was not fitted to), and how far it imagines that a constant push moves the pole.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dreamer
import utils

EPISODES, FITTED, FRAMES_PLAYED, SKIPPED = 32, 24, 56, 6  # the first steps are left out
FRAMES, PUSH = 16, 0.7  # of a push, 0.16 s, and its action


def angle(physics) -> float:
    """Of the pole, in degrees from upright."""
    return np.degrees(np.arctan2(np.sin(physics.data.qpos[1]), np.cos(physics.data.qpos[1])))


def pushed(env, action: float) -> float:
    """The angle after `FRAMES` frames of `action`; the physics is put back."""
    physics, task = env.unwrapped._env.physics, env.unwrapped._env.task
    state = physics.get_state()
    for _ in range(FRAMES):
        task.before_step(np.array([action]), physics)
        physics.step()
    result = angle(physics)
    physics.set_state(state)
    physics.forward()
    return result


def play(config: dreamer.Config) -> dict:
    """Arrays (steps, EPISODES, ...): image, action, truth (angle, its rate), pushed (-, +)."""
    env, rng, episodes = dreamer.make_env(config), np.random.default_rng(0), []
    physics = env.unwrapped._env.physics
    for seed in range(EPISODES):
        frame, _ = env.reset(seed=seed)
        action, rows = np.zeros(1, np.float32), []
        for _ in range(FRAMES_PLAYED // config.action_repeat):
            truth = [angle(physics), np.degrees(physics.data.qvel[1])]
            ends = [pushed(env, sign * PUSH) for sign in (-1, 1)]
            rows.append((frame, action, truth, ends))
            action = rng.uniform(-1, 1, 1).astype(np.float32)
            frame, *_ = env.step(action)
        episodes.append([np.stack(column) for column in zip(*rows)])
    env.close()
    names = ("image", "action", "truth", "pushed")
    return {n: np.stack(column, 1) for n, column in zip(names, zip(*episodes))}


@torch.no_grad()
def judge(agent: dreamer.Dreamer, data: dict) -> dict:
    """The probe's errors, and the angles that the pushes lead to, in truth and in imagination."""
    rssm, torch_data = agent.world.rssm, {k: torch.from_numpy(v) for k, v in data.items()}
    embed = agent.world.encoder(agent.pixels(torch_data["image"]))
    post, _ = rssm.observe(embed, torch_data["action"], rssm.initial(EPISODES))
    post = post.map(lambda x: x[SKIPPED:].flatten(0, 1))

    def design(state):
        return np.pad(state.feature.numpy(), ((0, 0), (0, 1)), constant_values=1.0)

    truth = data["truth"][SKIPPED:].reshape(-1, 2)
    fitted = np.tile(np.arange(EPISODES) < FITTED, len(truth) // EPISODES)
    x = design(post)
    gram = x[fitted].T @ x[fitted] + 0.1 * np.eye(x.shape[1])
    probe = np.linalg.solve(gram, x[fitted].T @ truth[fitted])
    unexplained = (x @ probe - truth)[~fitted].std(0) / truth[~fitted].std(0)
    ends = []
    for sign in (-1, 1):
        state = post
        for _ in range(FRAMES // agent.config.action_repeat):
            state = rssm.img_step(state, torch.full((len(x), 1), sign * PUSH))
        ends.append((design(state) @ probe)[:, 0])
    real = np.diff(data["pushed"][SKIPPED:].reshape(-1, 2)).mean()
    return {
        "angles' std, degrees": truth[:, 0].std(),
        "of it unexplained": unexplained[0],
        "of the rate's unexplained": unexplained[1],
        "push moves it, degrees": real,
        "imagined": (ends[1] - ends[0]).mean(),
    }


def main(paths: list[str]) -> None:
    data = {}
    for path in map(Path, paths):
        state = utils.load_checkpoint(path)
        config = dreamer.resolve({}, state["config"])
        torch.manual_seed(0)
        agent = dreamer.Dreamer(config, 1, torch.device("cpu"))
        dreamer.load_agent(agent, state)
        repeat = config.action_repeat
        data[repeat] = data.get(repeat) or play(config)
        numbers = judge(agent, data[repeat]).items()
        print(f"{path}: " + ", ".join(f"{name} {value:.2f}" for name, value in numbers))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except utils.RunError as error:
        print(f"cartpole_model.py: error: {error}", file=sys.stderr)
        sys.exit(2)
