"""The commands of the README on tiny runs of the real suite; every error that a user can mend."""

import dataclasses
import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing, suppress
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from conftest import ROOT, SHORT_RUN, files_below, flags, folder, run, train, wait_for
from kill_run import differences, plain, rows_of

import dreamer
import env_wrapper
import utils
from replay_buffer import ReplayBuffer


def without_times(path) -> list[dict]:
    return [{k: v for k, v in r.items() if not k.startswith("time/")} for r in rows_of(path)]


def last_state(path) -> dict:
    return utils.load_checkpoint(utils.checkpoints(path / "checkpoints")[-1])


def checkpoint_steps(logdir) -> list[int]:
    return [int(p.stem) for p in utils.checkpoints(folder(logdir) / "checkpoints")]


def test_a_run_leaves_what_the_readme_promises(finished):
    path = folder(finished)
    names = {p.name for p in path.iterdir()}
    assert {"config.json", "metrics.jsonl", "episodes", "checkpoints", "videos", "lock"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    config = json.loads((path / "config.json").read_text())
    assert config["preset"] == "small" and config["free_nats"] == 3.0
    episodes = sorted((path / "episodes").iterdir())
    assert len(episodes) == 6
    for episode in episodes:
        assert re.fullmatch(r"\d{8}T\d{6}-[0-9a-f]{32}-20\.npz", episode.name)
    assert [p.stem for p in utils.checkpoints(path / "checkpoints")][-1] == "240"
    videos = {p.name for p in (path / "videos").iterdir()}
    assert videos == {f"{n}-{s}.gif" for n in ("evaluation", "open_loop") for s in (120, 240)}


def test_every_scalar_of_the_glossary_is_written(finished):
    found = {name for row in rows_of(folder(finished)) for name in row}
    assert found >= {
        "step", "train/return", "eval/return_mean", "eval/return_std", "eval/return_min",
        "eval/return_max", "loss/world", "loss/image", "loss/reward", "loss/actor", "loss/value",
        "kl", "entropy/prior", "entropy/posterior", "entropy/policy", "grad_norm/world",
        "grad_norm/actor", "grad_norm/value", "time/collect_fps", "time/sample_ms",
        "time/update_ms", "time/hours", "time/fps", "replay/gigabytes", "replay/episodes",
        "policy/saturated", "policy/std", "value/mean", "value/error", "reward/imagined",
    }  # fmt: skip


def test_what_is_logged_of_episodes_is_what_lies_on_disk(finished):
    path = folder(finished)
    logged = rows_of(path)
    collected = [row for row in logged if "train/return" in row]
    names = last_state(path)["episodes"]
    assert len(collected) == len(names) == 6
    for number, (row, name) in enumerate(zip(collected, names), 1):
        reward = np.load(path / "episodes" / name)["reward"]
        gigabytes = number * 21 * (64 * 64 * 3 + 4 * (1 + 2)) / 1e9
        expected = {
            "step": 40 * number, "train/return": reward.sum(), "train/length": 20,
            "replay/episodes": number, "replay/gigabytes": gigabytes,
        }  # fmt: skip
        assert {k: row[k] for k in expected} == pytest.approx(expected)
    assert [r["train/updates"] for r in logged if "train/updates" in r] == [0, 4, 7, 10, 13]
    seconds = sum(40 / row["time/collect_fps"] for row in collected)
    assert 0 < seconds < 3600 * logged[-1]["time/hours"]


def test_collecting_is_logged_in_frames_a_second(tmp_path, monkeypatch):
    """Of an hour an episode, beside which a slow machine's seconds do not count."""
    clock, ahead, collect = time.monotonic, [0], dreamer.collect_episode

    def an_hour(*arguments):
        ahead[0] += 3600
        return collect(*arguments)

    monkeypatch.setattr(time, "monotonic", lambda: clock() + ahead[0])
    monkeypatch.setattr(dreamer, "collect_episode", an_hour)
    assert train(tmp_path, total_steps=120, eval_episodes=1, video_interval=0) == 0
    fps = [row["time/collect_fps"] for row in rows_of(folder(tmp_path)) if "train/return" in row]
    assert fps == pytest.approx([40 / 3600] * 3, rel=0.1)
    overall = [row["time/fps"] for row in rows_of(folder(tmp_path)) if "time/fps" in row]
    assert overall == pytest.approx([40 / 3600] * 2, rel=0.1)  # of the prefill, of the iteration


def test_what_is_logged_of_an_evaluation_is_of_its_returns(tmp_path, monkeypatch, capsys):
    clock, ahead = time.monotonic, [0]
    monkeypatch.setattr(time, "monotonic", lambda: clock() + ahead[0])

    def an_hour(trainer):
        ahead[0] += 3600
        return [{"return": x} for x in (1.0, 2.0, 6.0)]

    monkeypatch.setattr(dreamer.Trainer, "play", an_hour)
    assert train(tmp_path, video_interval=0, eval_episodes=3) == 0
    evaluated = [row for row in rows_of(folder(tmp_path)) if "eval/return_mean" in row]
    std = math.sqrt(14 / 3)
    expected = {"mean": 3, "std": std, "min": 1, "max": 6}
    for row in evaluated:
        logged = {name: row[f"eval/return_{name}"] for name in expected}
        assert logged == pytest.approx(expected)
    hours = {
        row["step"]: row["time/hours"] for row in rows_of(folder(tmp_path)) if "time/hours" in row
    }
    assert [int(hours[row["step"]]) for row in evaluated] == [1, 2]
    assert int(last_state(folder(tmp_path))["progress"]["seconds"]) // 3600 == 2
    assert "evaluation 3.0 ± 2.2 (3 episodes, 1 to 6)" in capsys.readouterr().out


def test_every_episode_has_a_start_of_its_own_and_evaluations_have_others(tmp_path, monkeypatch):
    starts, reset = {}, env_wrapper.ControlSuite.reset

    def spy(self, *, seed=None, **named):
        if seed is not None:
            starts.setdefault(self, []).append(seed)
        return reset(self, seed=seed, **named)

    monkeypatch.setattr(env_wrapper.ControlSuite, "reset", spy)
    seen = []
    for seed in (1, 2):
        starts.clear()
        assert train(tmp_path, seed=seed, video_interval=0) == 0
        training, *evaluations = starts.values()
        assert len(training) == 6 and len(evaluations) == 2
        assert all(len(set(each)) == 1 and len(each) == 2 for each in evaluations)  # the same twice
        seen += training + [each[0] for each in evaluations]
        path = folder(tmp_path, seed=seed) / "episodes"
        names = last_state(path.parent)["episodes"]
        seen += [np.load(path / name)["action"].tobytes() for name in names]  # random ones first
    assert len(set(seen)) == len(seen) == 2 * (6 + 2 + 6)


def test_a_batch_is_named_by_the_seed_of_the_run_and_its_number(tiny_config):
    replay = ReplayBuffer(60, 1)
    reward = np.arange(60, dtype=np.float32)
    frames = np.zeros((60, 64, 64, 3), np.uint8)
    replay.add({"image": frames, "action": reward[:, None], "reward": reward, "discount": reward})

    def batch(seed, number):
        config = tiny_config(seed=seed)
        run = SimpleNamespace(config=config, replay=replay, device=torch.device("cpu"))
        return dreamer.Trainer.batch(run, number)["reward"]

    assert torch.equal(batch(1, 0), batch(1, 0))
    assert not torch.equal(batch(1, 0), batch(1, 1)) and not torch.equal(batch(1, 0), batch(2, 0))


def test_a_seed_gives_its_first_weights(tmp_path, monkeypatch):
    weights = []

    def run_nothing(trainer):
        weights.append(plain(trainer.agent.state()))
        trainer.env.close()

    monkeypatch.setattr(dreamer.Trainer, "run", run_nothing)
    for seed, exp in ((1, "a"), (1, "b"), (2, "a")):
        assert train(tmp_path, seed=seed, exp=exp) == 0
    assert weights[0] == weights[1] != weights[2]


def test_evaluate_prints_writes_and_repeats(finished, tmp_path, capsys, monkeypatch):
    film, filmed = dreamer.film, []
    monkeypatch.setattr(dreamer, "film", lambda c, e: (filmed.append(e["return"]), film(c, e))[1])
    finished = shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    words = ["--evaluate", "--restore", *flags(env="cartpole-balance", logdir=finished)]
    assert run(*words, "--eval-episodes", 3) == 0
    out = capsys.readouterr().out
    assert len(re.findall(r"episode \d: return", out)) == 3 and "±" in out
    printed = [float(x) for x in re.findall(r"episode \d: return (\S+)", out)]
    result = json.loads((folder(finished) / "evaluation-240.json").read_text())
    returns = [e["return"] for e in result["episodes"]]
    assert printed == pytest.approx(returns, abs=0.05)
    assert [e["length"] for e in result["episodes"]] == [20] * 3
    assert result["return_mean"] == pytest.approx(np.mean(returns))
    assert result["return_std"] == pytest.approx(np.std(returns)) != 0
    assert f"at 240 frames: {np.mean(returns):.1f} ± {np.std(returns):.1f}" in out
    assert filmed == [max(returns), min(returns)] and len(set(returns)) == 3
    for name, size in (("best", 256), ("worst", 256)):
        gif = imageio.imread(folder(finished) / "videos" / f"evaluation-240-{name}.gif", index=None)
        assert gif.shape[1:] == (size, size, 3) and len(gif) > 5
        assert any((a != b).any() for a, b in pairwise(gif))
    assert (folder(finished) / "videos" / "evaluation-240-open_loop.gif").exists()
    assert run(*words, "--eval-episodes", 3) == 0
    again = json.loads((folder(finished) / "evaluation-240.json").read_text())
    assert again["episodes"] == result["episodes"]


def test_an_evaluation_does_not_replace_that_of_another_run(finished, tmp_path, capsys):
    shutil.copytree(folder(finished), folder(tmp_path))
    shutil.copytree(folder(finished), folder(tmp_path, seed=2))
    before = files_below(folder(tmp_path, seed=2))
    checkpoint = utils.checkpoints(folder(tmp_path) / "checkpoints")[-1]
    words = flags(env="cartpole-balance", logdir=tmp_path, seed=2, checkpoint_path=checkpoint)
    error_line(capsys, run("--evaluate", "--restore", *words), "no checkpoint of", "--exp")
    assert files_below(folder(tmp_path, seed=2)) == before
    assert run("--evaluate", "--restore", *words, "--exp", "other", "--eval-episodes", 1) == 0


def test_a_film_shows_thirty_frames_a_second_at_most(tmp_path, monkeypatch):
    shown, video = {}, utils.Logger.video

    def spy(self, step, name, frames, fps):
        shown[name] = len(frames), fps
        video(self, step, name, frames, fps)

    monkeypatch.setattr(utils.Logger, "video", spy)
    assert train(tmp_path, action_repeat=1, total_steps=120, eval_episodes=1) == 0
    assert shown["evaluation"] == (11, 25)  # of 41 frames, 100 a second


def test_the_film_is_the_episode_that_was_evaluated(finished, monkeypatch):
    state = last_state(folder(finished))
    config = dreamer.Config(**{**state["config"], "eval_episodes": 2})
    agent = dreamer.Dreamer(config, 1, torch.device("cpu"))
    dreamer.load_agent(agent, state)
    with utils.StopSignal() as stop:
        envs = dreamer.make_evaluation_envs(config)
        episode = dreamer.evaluate(agent, envs, stop)[1]
    seen = []
    step = dreamer.env_wrapper.ControlSuite.step

    def spy(self, action):
        result = step(self, action)
        seen.append(result[0])
        return result

    monkeypatch.setattr(dreamer.env_wrapper.ControlSuite, "step", spy)
    frames, fps = dreamer.film(config, episode)
    assert np.array_equal(np.stack(seen), episode["image"][1:])
    assert (frames.shape, fps) == ((11, 256, 256, 3), 25)  # every other frame of 50 a second


def test_episodes_are_collected_with_one_thread_and_the_rest_has_all(tmp_path, monkeypatch):
    seen = {"step": set(), "update": set()}

    def note(owner, name):
        method = getattr(owner, name)

        def noting(*arguments):
            seen[name].add(torch.get_num_threads())
            return method(*arguments)

        monkeypatch.setattr(owner, name, noting)

    note(dreamer.env_wrapper.ControlSuite, "step")
    note(dreamer.Dreamer, "update")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert train(tmp_path, total_steps=120, eval_interval=0, max_hours=1) == 0
    finally:
        torch.set_num_threads(before)
    assert seen["update"] == {2} and 1 in seen["step"]


def test_random_actions_until_seed_steps_then_the_policy_explores_and_is_evaluated_without(
    tmp_path, monkeypatch
):
    policy, sample, who = dreamer.Dreamer.policy, gym.spaces.Box.sample, []

    def noted_policy(self, n, explore):
        who.append((n, explore))
        return policy(self, n, explore)

    def noted_sample(self, *words):
        who.append("random")
        return sample(self, *words)

    monkeypatch.setattr(dreamer.Dreamer, "policy", noted_policy)
    monkeypatch.setattr(gym.spaces.Box, "sample", noted_sample)
    assert train(tmp_path) == 0
    episode, evaluation = (1, True), (2, False)
    assert who == ["random"] * 40 + [episode, evaluation, *[episode] * 3, evaluation]


def test_evaluate_a_given_checkpoint_under_another_name(finished, tmp_path):
    path = utils.checkpoints(folder(finished) / "checkpoints")[0]
    words = flags(env="cartpole_balance", algo="dreamerv1", exp="eval", logdir=tmp_path)
    code = run(*words, "--evaluate", "--restore", "--checkpoint_path", path, "--eval_episodes=1")
    assert code == 0
    written = folder(tmp_path, exp="eval") / f"evaluation-{path.stem}.json"
    result = json.loads(written.read_text())
    assert result["checkpoint"] == str(path)
    assert (result["config"]["exp"], result["config"]["eval_episodes"]) == ("eval", 1)
    assert (result["device"], result["precision"]) == ("cpu", "torch.float32")


def test_benchmark_prints_and_writes_what_it_measured(tmp_path, capsys):
    path = tmp_path / "benchmark.json"
    words = flags(**{**SHORT_RUN, "logdir": tmp_path / "runs", "collect_steps": 30})
    assert run("--benchmark", "--json", path, *words) == 0
    (out, told), result = capsys.readouterr(), json.loads(path.read_text())
    parts = ("environment", "the suite's own environment", "collecting", "acting", "sampling")
    parts = [*parts, "gradient step", "matrix product", "evaluation"]
    assert told.splitlines() == [f"measuring: {part}" for part in parts]  # and no bar of a run
    first, settings, *_ = out.splitlines()
    assert len(out.splitlines()) == 1 + len(result)
    assert first == "benchmark on CPU in torch.float32, preset small"
    assert "batch_size=4" in settings.split() and "cnn_depth=4" in settings.split()
    for name, value in result.items():
        assert name == "config" or name in out
        assert not isinstance(value, float) or value > 0
    # Whole episodes of 40 frames: two of random actions, then four iterations of one each.
    hours = 80 / result["environment frames/s"] + 160 / result["collecting frames/s"]
    hours += (4 + 3 * 3) * result["gradient step ms"] / 1000 + 2 * result["evaluation s"]
    assert result["hours for --total-steps"] == pytest.approx(hours / 3600)
    assert result["hours for --total-steps"] < 1
    assert result["share of matrix product"] == pytest.approx(
        result["gradient step GFLOP/s"] / result["matrix product GFLOP/s"]
    )
    assert not (tmp_path / "runs").exists()
    error_line(capsys, run("--train", "--json", path), "--benchmark")
    error_line(capsys, run("--benchmark", "--json", tmp_path, *words), "--json", "is a folder")
    os.mkfifo(tmp_path / "pipe") if hasattr(os, "mkfifo") else (tmp_path / "pipe").mkdir()
    error_line(capsys, run("--benchmark", "--json", tmp_path / "pipe", *words), "--json", "is ")
    nowhere = tmp_path / "none" / "benchmark.json"
    error_line(capsys, run("--benchmark", "--json", nowhere), "--json", str(nowhere.parent))


@pytest.mark.parametrize("max_hours, number, code", [(None, signal.SIGTERM, 143), (0, None, 0)])
def test_a_benchmark_can_be_stopped(max_hours, number, code, tmp_path, monkeypatch, capsys):
    steps, step = [], dreamer.Trainer.gradient_step

    def counted(trainer):
        steps.append(trainer.progress.updates)
        os.kill(os.getpid(), number)
        step(trainer)

    monkeypatch.setattr(dreamer.Trainer, "gradient_step", counted)
    words = flags(**{**SHORT_RUN, "logdir": tmp_path / "runs", "collect_steps": 30})
    words += [] if max_hours is None else ["--max-hours", max_hours]
    assert run("--benchmark", *words) == code
    assert len(steps) == (1 if number else 0)
    assert "stopped by" in capsys.readouterr().out


def test_a_run_without_evaluations_and_videos_learns_the_same(finished, tmp_path):
    assert train(tmp_path, eval_interval=0, video_interval=0) == 0
    one, two = last_state(folder(finished)), last_state(folder(tmp_path))
    for key in ("agent", "random"):
        assert plain(one[key]) == plain(two[key])


def test_a_run_that_was_extended_equals_one_that_was_never_stopped(finished, tmp_path):
    assert train(tmp_path, total_steps=160) == 0
    words = flags(env="cartpole-balance", logdir=tmp_path, total_steps=240)
    assert run("--train", "--restore", *words) == 0
    one, two = last_state(folder(finished)), last_state(folder(tmp_path))
    for key in ("agent", "random"):
        assert plain(one[key]) == plain(two[key])


def test_a_complete_run_is_left_as_it_is(finished, tmp_path, capsys):
    """Also from an earlier checkpoint that was complete: nothing after it is forgotten."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    before = files_below(tmp_path)
    early = folder(tmp_path) / "checkpoints" / "120.pt"
    words = flags(env="cartpole-balance", logdir=tmp_path)
    for more in ((), ("--total-steps=120", "--checkpoint-path", early)):
        assert run("--train", "--restore", *words, *more) == 0
        assert f"this run is complete: {120 if more else 240} frames" in capsys.readouterr().out
    assert files_below(tmp_path) == before


@pytest.mark.parametrize("moment", [1, 30, 47, 50, 75, 101, 160])
def test_a_run_stopped_anywhere_equals_one_that_was_never_stopped(
    finished, tmp_path, monkeypatch, moment
):
    """The stop comes at the n-th look at the signal: in the prefill, an episode, between
    gradient steps, in an evaluation."""
    interrupt(monkeypatch, moment, utils.Stopped("SIGTERM", 143))
    assert train(tmp_path) == 143
    assert_goes_on_like(finished, tmp_path)


@pytest.mark.parametrize("moment", [44, 50, 100, 140])
def test_a_run_killed_anywhere_equals_one_that_was_never_killed(
    finished, tmp_path, monkeypatch, moment
):
    """Nothing is saved at the end: what came after the last checkpoint is cut off and redone."""
    interrupt(monkeypatch, moment, ArithmeticError("killed"))
    with pytest.raises(ArithmeticError):
        train(tmp_path)
    assert_goes_on_like(finished, tmp_path)


def interrupt(monkeypatch, moment, error):
    """Raises `error` at the n-th look at the stop signal, once."""
    check, looks = utils.StopSignal.check, []

    def raise_once(self):
        looks.append(self)
        if len(looks) == moment:
            raise error
        check(self)

    monkeypatch.setattr(utils.StopSignal, "check", raise_once)
    return looks


def assert_goes_on_like(finished, logdir):
    """The run at `logdir`, restored, ends as the one that was never interrupted."""
    assert run("--train", "--restore", *flags(env="cartpole-balance", logdir=logdir)) == 0
    assert differences(folder(finished), folder(logdir)) == []


def test_the_moments_above_lie_in_every_phase(tmp_path, monkeypatch):
    looks, phases = interrupt(monkeypatch, -1, None), {}
    for name in ("collect", "gradient_step", "evaluate"):
        unit = getattr(dreamer.Trainer, name)

        def spy(self, unit=unit, name=name):
            first = len(looks)
            result = unit(self)
            phases.setdefault(name, []).append(range(first, len(looks) + 1))
            return result

        monkeypatch.setattr(dreamer.Trainer, name, spy)
    assert train(tmp_path) == 0
    for name, moments in (("collect", (30, 101)), ("gradient_step", (47,)), ("evaluate", (75,))):
        for moment in moments:
            assert any(moment in found for found in phases[name]), (name, moment, phases)


def test_a_signal_is_looked_at_before_every_gradient_step_and_every_step_of_an_environment(
    tmp_path, monkeypatch
):
    events = []

    def note(owner, name, event):
        function = getattr(owner, name)

        def spy(*words, **more):
            events.append(event)
            return function(*words, **more)

        monkeypatch.setattr(owner, name, spy)

    note(utils.StopSignal, "check", "look")
    note(dreamer.Dreamer, "update", "update")
    note(dreamer.EpisodeRecorder, "add", "step")
    assert train(tmp_path, eval_episodes=1) == 0
    pairs = {pair for pair in pairwise(events) if "look" not in pair}
    assert {"update", "step"} < set(events) and not pairs


def test_a_stop_while_the_replay_is_filled_comes_at_once_and_changes_nothing(
    finished, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        interrupt(patch, 101, utils.Stopped("SIGTERM", 143))
        assert train(tmp_path) == 143
    before = files_below(tmp_path)
    with monkeypatch.context() as patch:
        interrupt(patch, 2, utils.Stopped("SIGINT", 130))
        words = flags(env="cartpole-balance", logdir=tmp_path)
        assert run("--train", "--restore", *words) == 130
    assert files_below(tmp_path) == before
    assert_goes_on_like(finished, tmp_path)


def test_several_episodes_an_iteration_stopped_in_the_last_one(tmp_path, monkeypatch):
    """Past the run's end, but within its last iteration: the last evaluation is still to come."""
    more = {"collect_steps": 120, "total_steps": 160, "eval_interval": 0}
    assert train(tmp_path / "a", **more) == 0
    interrupt(monkeypatch, 42 + 4 + 2 * 21 + 10, utils.Stopped("SIGTERM", 143))
    assert train(tmp_path / "b", **more) == 143
    assert last_state(folder(tmp_path / "b"))["progress"]["step"] == 160
    words = flags(env="cartpole-balance", logdir=tmp_path / "b")
    assert run("--train", "--restore", *words) == 0
    assert without_times(folder(tmp_path / "a")) == without_times(folder(tmp_path / "b"))
    assert "eval/return_mean" in {k for row in rows_of(folder(tmp_path / "b")) for k in row}


def test_a_stop_keeps_the_checkpoint_of_the_best_evaluation_beside_its_own(tmp_path, monkeypatch):
    """Stopped twice after it, each time with one gradient step more."""
    more, step = {"eval_interval": 80, "total_steps": 120}, dreamer.Trainer.gradient_step

    def stops(trainer):
        step(trainer)
        if trainer.progress.step == trainer.progress.best_step:
            raise utils.Stopped("SIGTERM", 143)

    checkpoints = folder(tmp_path / "b") / "checkpoints"
    again = ["--train", "--restore", *flags(env="cartpole-balance", logdir=tmp_path / "b")]
    with monkeypatch.context() as patch:
        patch.setattr(dreamer.Trainer, "gradient_step", stops)
        assert train(tmp_path / "b", **more) == 143
        assert run(*again) == 143
    best, newest = (utils.load_checkpoint(checkpoints / f"80{end}.pt") for end in ("-best", ""))
    assert [state["progress"]["updates"] for state in (best, newest)] == [0, 2]
    assert best["progress"]["best_step"] == newest["progress"]["best_step"] == 80
    assert plain(best["agent"]) != plain(newest["agent"])
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    copy, evaluate = folder(tmp_path / "c"), ["--evaluate", *again[1:-1], f"--logdir={tmp_path}/c"]
    assert run(*evaluate) == 0
    (copy / "checkpoints" / "80.pt").write_bytes(b"")
    assert run(*evaluate) == 0  # of the best, since the newest is damaged
    found = [json.loads((copy / f"evaluation-80{x}.json").read_text()) for x in ("-best", "")]
    assert [Path(x["checkpoint"]).name for x in found] == ["80-best.pt", "80.pt"]
    assert run(*again) == 0
    assert train(tmp_path / "a", **more) == 0
    assert differences(folder(tmp_path / "a"), folder(tmp_path / "b")) == []
    evaluated = utils.load_checkpoint(folder(tmp_path / "a") / "checkpoints" / "80.pt")
    assert plain(best["agent"]) == plain(evaluated["agent"])
    last = last_state(folder(tmp_path / "b"))["progress"]
    assert (checkpoints / "80-best.pt").exists() == (last["best_step"] == 80)
    start = checkpoints / "0.pt"  # before all that; of an evaluation to come there is no copy
    assert run(*again, "--checkpoint-path", start, "--max-hours", 0) == 0
    assert [path.name for path in checkpoints.iterdir()] == ["0.pt"]


def test_going_on_from_an_older_checkpoint_forgets_what_came_later(finished, tmp_path, monkeypatch):
    assert train(tmp_path, checkpoint_interval=40) == 0
    path = folder(tmp_path)
    older = utils.checkpoints(path / "checkpoints")[-2]
    assert int(older.stem) < 240
    words = flags(env="cartpole-balance", logdir=tmp_path, checkpoint_path=older)
    episodes = utils.load_checkpoint(older)["episodes"]
    with monkeypatch.context() as patch:  # stopped as soon as the replay is filled again
        interrupt(patch, len(episodes) + 1, utils.Stopped("SIGTERM", 143))
        assert run("--train", "--restore", *words) == 143
    assert max(checkpoint_steps(tmp_path)) == int(older.stem)
    assert {p.name for p in (path / "episodes").iterdir()} == set(episodes)
    assert run("--train", "--restore", *flags(env="cartpole-balance", logdir=tmp_path)) == 0
    assert plain(last_state(folder(finished))["agent"]) == plain(last_state(path)["agent"])
    assert without_times(folder(finished)) == without_times(path)


class Killed(BaseException):
    """As a SIGKILL: nothing is saved on the way out."""


def test_a_process_that_dies_while_it_forgets_leaves_a_run_that_goes_on_exactly(
    finished, tmp_path, monkeypatch
):
    assert train(tmp_path, checkpoint_interval=40) == 0
    path, unlink = folder(tmp_path), Path.unlink
    older = utils.checkpoints(path / "checkpoints")[-3]
    words = flags(env="cartpole-balance", logdir=tmp_path)

    def dies_at_an_episode(self, *arguments, **named):
        unlink(self, *arguments, **named)
        if self.suffix == ".npz":
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "unlink", dies_at_an_episode)
        run("--train", "--restore", *words, "--checkpoint-path", older)
    assert {*last_state(path)["episodes"]} <= {p.name for p in (path / "episodes").iterdir()}
    assert run("--train", "--restore", *words) == 0
    assert plain(last_state(folder(finished))["agent"]) == plain(last_state(path)["agent"])


@pytest.mark.parametrize("name", ["80-best.pt", "good.pt"])
def test_a_run_restored_from_a_checkpoint_of_another_name_can_end_at_once(
    tmp_path, monkeypatch, name
):
    """What the best evaluation left, or what a user kept from being pruned."""

    def ends(error, updates_left):
        def step(trainer):
            if trainer.progress.step == 80 and trainer.progress.updates_left == updates_left:
                raise error
            original(trainer)

        return step

    original, more = dreamer.Trainer.gradient_step, {"eval_interval": 80, "eval_episodes": 1}
    path, words = folder(tmp_path / "b"), flags(env="cartpole-balance", logdir=tmp_path / "b")
    again, stopped = ["--train", "--restore", *words], utils.Stopped("SIGTERM", 143)
    with monkeypatch.context() as patch:  # the evaluation at 80 is followed by four gradient steps
        patch.setattr(dreamer.Trainer, "gradient_step", ends(stopped, 1))
        assert train(tmp_path / "b", **more) == 143
    checkpoint = path / "checkpoints" / "80-best.pt"
    if name == "good.pt":
        (path / "checkpoints" / "80.pt").unlink()
        checkpoint = checkpoint.rename(path / "checkpoints" / name)
    for error in (Killed(), stopped):
        with monkeypatch.context() as patch, suppress(Killed):
            patch.setattr(dreamer.Trainer, "gradient_step", ends(error, 4))
            assert run(*again, "--checkpoint-path", checkpoint) == 143
        assert last_state(path)["progress"]["updates"] == 0
    assert run(*again) == 0
    assert train(tmp_path / "a", **more) == 0
    assert without_times(folder(tmp_path / "a")) == without_times(path)
    assert plain(last_state(folder(tmp_path / "a"))["agent"]) == plain(last_state(path)["agent"])


def test_no_row_is_called_lost_that_was_never_written(tmp_path, monkeypatch, capsys):
    """Killed before its first row, a run has a checkpoint that tells of empty logs."""

    def dies(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(dreamer, "collect_episode", dies)
        train(tmp_path)
    assert run("--train", "--restore", *flags(env="cartpole-balance", logdir=tmp_path)) == 0
    out = capsys.readouterr().out
    assert "rows are lost" not in out
    losses = r"image \d{5}  reward [\d.]+  kl [\d.]+  actor -?[\d.]+  value [\d.]+\]\n"
    assert re.search(r"100% 240/240 .*, return \d+  " + losses, out)
    last = f"complete: {folder(tmp_path)}; the same flags with --evaluate --restore show it"
    assert out.splitlines()[-1] == last


def test_a_foreign_checkpoint_harms_no_run(finished, tmp_path, capsys):
    assert train(tmp_path, total_steps=120) == 0
    before = sorted(p.name for p in folder(tmp_path).rglob("*"))
    foreign = utils.checkpoints(folder(finished) / "checkpoints")[-1]
    words = flags(env="cartpole-balance", logdir=tmp_path, checkpoint_path=foreign)
    error_line(capsys, run("--train", "--restore", *words), "no checkpoint of the run")
    assert sorted(p.name for p in folder(tmp_path).rglob("*")) == before


def test_a_full_replay_goes_on_exactly(tmp_path):
    """Room for three episodes of 21 rows: the oldest leave, before and after the restore."""
    more = {"buffer_gb": 0.001}
    assert train(tmp_path / "a", **more) == 0
    assert train(tmp_path / "b", total_steps=200, **more) == 0
    words = flags(env="cartpole-balance", logdir=tmp_path / "b", total_steps=240)
    assert run("--train", "--restore", *words) == 0
    one, two = last_state(folder(tmp_path / "a")), last_state(folder(tmp_path / "b"))
    assert plain(one["agent"]) == plain(two["agent"])
    assert max(r.get("replay/episodes", 0) for r in rows_of(folder(tmp_path / "a"))) == 3


def test_a_batch_drawn_ahead_is_the_batch_of_its_step(tmp_path, monkeypatch):
    update, seen = dreamer.Dreamer.update, []

    def spy(self, batch, number):
        seen.append((number, batch))
        return update(self, batch, number)

    monkeypatch.setattr(dreamer.Dreamer, "update", spy)
    next_batch = dreamer.Trainer.next_batch

    def compare(self):
        batch, again = next_batch(self), self.batch(self.progress.updates)
        assert all(torch.equal(batch[key], again[key]) for key in again)
        return batch

    monkeypatch.setattr(dreamer.Trainer, "next_batch", compare)
    assert train(tmp_path) == 0
    assert [number for number, _ in seen] == list(range(13))


def test_no_pretraining_still_trains(tmp_path):
    assert train(tmp_path, pretrain_steps=0, total_steps=200) == 0
    assert last_state(folder(tmp_path))["progress"]["updates"] == 6


def test_restore_from_the_first_checkpoint_starts_again_and_is_the_same(finished, tmp_path):
    """Killed before there was another: left-over files of all kinds."""
    path = folder(tmp_path)
    assert train(tmp_path, total_steps=120) == 0
    for checkpoint in utils.checkpoints(path / "checkpoints")[1:]:
        checkpoint.unlink()
    assert checkpoint_steps(tmp_path) == [0]
    (path / "episodes" / ".half.npz.tmp").write_bytes(b"half")
    words = flags(env="cartpole-balance", logdir=tmp_path, total_steps=240)
    assert run("--train", "--restore", *words) == 0
    assert plain(last_state(folder(finished))["agent"]) == plain(last_state(path)["agent"])
    assert len(list((path / "episodes").iterdir())) == 6


def test_restore_without_anything_but_settings_starts(finished, tmp_path, monkeypatch):
    """Killed before the first checkpoint was whole."""

    def killed(trainer):
        raise ArithmeticError

    with monkeypatch.context() as patch, pytest.raises(ArithmeticError):
        patch.setattr(dreamer.Trainer, "save", killed)
        train(tmp_path)
    assert run("--train", "--restore", *flags(env="cartpole-balance", logdir=tmp_path)) == 0
    assert differences(folder(finished), folder(tmp_path)) == []


def test_a_run_that_has_lost_its_checkpoints_is_left_alone(finished, tmp_path, capsys):
    finished = shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    aside = shutil.move(folder(finished) / "checkpoints", tmp_path / "aside")
    before = files_below(folder(finished))
    words = ["--train", "--restore", *flags(env="cartpole-balance", logdir=finished)]
    error_line(capsys, run(*words), "lost its checkpoints", "--exp")
    assert files_below(folder(finished)) == before
    shutil.move(aside, folder(finished) / "checkpoints")
    assert run(*words, "--total-steps", 280) == 0


@pytest.mark.parametrize("action_repeat", [1, 3, 6])
def test_evaluations_and_checkpoints_come_when_due(tmp_path, action_repeat):
    # Episodes end at multiples of 40, the intervals at multiples of 70.
    due = {"eval_interval": 70, "checkpoint_interval": 70, "time_limit": 40}
    assert train(tmp_path, action_repeat=action_repeat, video_interval=0, **due) == 0
    steps = [r["step"] for r in rows_of(folder(tmp_path)) if "eval/return_mean" in r]
    assert steps == [80, 160, 240]
    assert checkpoint_steps(tmp_path) == steps
    assert len(utils.checkpoints(folder(tmp_path) / "checkpoints")) == 3


@pytest.mark.parametrize("interval, kept", [(70, {80, 160, 240}), (40, {80, 160, 200, 240})])
def test_the_newest_three_checkpoints_and_the_best_are_kept(tmp_path, monkeypatch, interval, kept):
    returns = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(dreamer.Trainer, "play", lambda self: [{"return": next(returns)}])
    due = {"eval_interval": 70, "checkpoint_interval": interval, "video_interval": 0}
    assert train(tmp_path, **due) == 0
    assert set(checkpoint_steps(tmp_path)) == kept
    progress = last_state(folder(tmp_path))["progress"]
    assert (progress["best_step"], progress["best_return"]) == (80, 3.0)


def test_every_flag_is_read():
    source = (ROOT / "dreamer.py").read_text()
    for field in dataclasses.fields(dreamer.Config):
        uses = re.findall(rf'(?:\bc|config)\.{field.name}\b|top\["{field.name}"\]', source)
        assert uses, f"--{field.name} is parsed and never read"


def test_the_algorithms_differ_in_one_table():
    v1 = dreamer.resolve({"algo": "Dreamerv1"})
    v2 = dreamer.resolve({"algo": "Dreamerv2"})
    differ = {k for k, v in vars(v1).items() if v != vars(v2)[k]}
    assert differ == {"algo", "free_nats", "kl_balance"}
    assert (v1.free_nats, v1.kl_balance, v2.free_nats, v2.kl_balance) == (3.0, None, 0.0, 0.8)


def test_flags_override_tables_and_take_underscores():
    modes, given = dreamer.parse(
        ["--train", "--batch_size", "7", "--free-nats=1", "--kl_balance", "none", "--no-gpu",
         "--test-interval", "500", "--exp-name", "x", "--algo", "DREAMERV2"]
    )  # fmt: skip
    config = dreamer.resolve(given)
    assert modes == {"train": True}
    assert (config.batch_size, config.free_nats, config.kl_balance) == (7, 1.0, None)
    assert (config.device, config.eval_interval, config.exp) == ("cpu", 500, "x")
    assert config.algo == "Dreamerv2"


def test_the_full_preset_has_the_papers_values():
    c = dreamer.resolve({"preset": "full", "device": "cpu"})
    assert (c.batch_size, c.train_seq_len, c.imagine_horizon) == (50, 50, 15)
    assert (c.deter_size, c.stoch_size, c.hidden_size, c.num_units) == (200, 30, 200, 400)
    assert (c.model_learning_rate, c.actor_learning_rate, c.value_learning_rate) == (
        6e-4, 8e-5, 8e-5,
    )  # fmt: skip
    assert (c.model_rate_decay, c.kl_scale, c.reward_scale) == (0, 1.0, 1.0)
    assert (c.actor_entropy, c.first_share) == (0, 0)


@pytest.mark.parametrize(
    "more, work",
    [
        ({}, (5, 95 * 100, 95, 10)),
        ({"pretrain_steps": 7}, (5, 7 + 94 * 100, 95, 10)),
        ({"collect_steps": 100}, (5, 95 * 100, 95, 10)),  # an episode is whole
        ({"collect_steps": 2500}, (5, 32 * 100, 96, 10)),
        ({"eval_interval": 100}, (5, 95 * 100, 95, 96)),
        ({"eval_interval": 0}, (5, 95 * 100, 95, 1)),
        ({"total_steps": 3000}, (5, 0, 0, 1)),
        ({"seed_steps": 50_000}, (50, 50 * 100, 50, 6)),  # those due in the prefill are one
        ({"total_steps": 104_500}, (5, 100 * 100, 100, 11)),
    ],
)
def test_the_work_of_a_run_is_counted_in_whole_episodes(tiny_config, more, work):
    config = tiny_config(**{"update_steps": 100, "pretrain_steps": 100, **more})
    assert dreamer.work_of_run(config, frames=1000) == work


@pytest.mark.parametrize(
    "choice, cores, parallel",
    [("sync", 2, False), ("async", 1, True), ("auto", 1, False), ("auto", 2, True)],
)
def test_an_evaluation_is_in_processes_where_there_are_cores(
    tiny_config, monkeypatch, choice, cores, parallel
):
    monkeypatch.setattr(utils, "cores", lambda: cores)
    monkeypatch.setattr(env_wrapper, "make_vector_env", lambda *arguments: arguments)
    config = tiny_config(vector_env=choice, env="cup-catch", seed=3, time_limit=50)
    expected = (10, parallel, "cup-catch", 3, 2, 50)
    assert dreamer.make_evaluation_envs(config) == expected


@pytest.mark.parametrize("frames, gigabytes", [(100_000, 0.65), (1_000_000, 6.3)])
def test_the_replay_of_a_run_is_as_large_as_the_run(tiny_config, frames, gigabytes):
    """A million frames fit a machine of 12.7 GB, where about 11 are free."""
    config = tiny_config(total_steps=frames, buffer_gb=0.6 * 11)
    trainer = SimpleNamespace(config=config, device=torch.device("cpu"))
    replay = dreamer.Trainer._make_replay(trainer, actions=6)
    assert replay.capacity >= (frames / 1000) * 501
    assert float(re.search(r"([\d.]+) GB", str(replay))[1]) <= gigabytes


@pytest.mark.parametrize("free, place", [(1.3, "cuda"), (1.2, "cpu")])
def test_the_replay_lies_on_the_card_where_half_of_what_is_free_is_enough(
    tiny_config, monkeypatch, free, place
):
    """100K frames take 0.63 GB."""

    class OnlyItsPlace(dreamer.replay_buffer.ReplayBuffer):
        def __init__(self, capacity, actions, device):
            self.place = torch.device(device).type

    monkeypatch.setattr(dreamer.utils, "free_memory_gb", lambda device: free)
    monkeypatch.setattr(dreamer.replay_buffer, "ReplayBuffer", OnlyItsPlace)
    trainer = SimpleNamespace(config=tiny_config(buffer_gb=9), device=torch.device("cuda"))
    assert dreamer.Trainer._make_replay(trainer, actions=6).place == place


def test_help_is_short_enough_to_read(capsys):
    assert run("--help") == 0
    text = capsys.readouterr().out
    assert text.count("\n") < 100
    for field in dataclasses.fields(dreamer.Config):
        assert "--" + field.name.replace("_", "-") in text


# ----------------------------------------------------------------------- errors of the user


def error_line(capsys, code, *words) -> str:
    """Runs a command that must fail with one line and exit code 2."""
    assert code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    for word in words:
        assert word in lines[0]
    return lines[0]


def test_a_run_whose_folder_goes_away(tmp_path, monkeypatch, capsys):
    def lose(self):
        shutil.rmtree(self.folder)

    monkeypatch.setattr(dreamer.Trainer, "check_finite", lose)
    error_line(capsys, train(tmp_path), "No such file", str(folder(tmp_path)))


def test_a_process_of_an_evaluation_that_is_killed(finished, monkeypatch, capsys):
    def killed(*arguments):
        envs = make_vector_env(*arguments)
        envs.processes[0].kill()
        return envs

    make_vector_env = env_wrapper.make_vector_env
    monkeypatch.setattr(env_wrapper, "make_vector_env", killed)
    words = flags(logdir=finished, env="cartpole-balance", vector_env="async", eval_episodes=1)
    error_line(capsys, run("--evaluate", "--restore", *words), "killed", "--vector-env sync")


def test_unknown_task(capsys):
    error_line(capsys, run("--train", "--env", "walker-wolk"), "walker-walk")


def test_a_training_without_a_gradient_step(tmp_path, capsys):
    error_line(capsys, train(tmp_path, total_steps=80), "--total-steps 80", "--seed-steps 80")
    error_line(capsys, train(tmp_path, total_steps=120, seed_steps=81), "after 120 frames")
    assert not any(tmp_path.iterdir())


def test_a_benchmark_restores_nothing(capsys):
    error_line(capsys, run("--benchmark", "--restore"), "--restore goes with")


def test_unknown_algorithm(capsys):
    error_line(capsys, run("--train", "--algo", "Dreamerv9"), "Dreamerv1")


def test_abbreviated_flag(capsys):
    error_line(capsys, run("--train", "--batch", "3"), "--batch")


@pytest.mark.parametrize("words", [[], ["--restore"], ["--train", "--evaluate", "--restore"]])
def test_no_mode_or_two(capsys, words):
    error_line(capsys, run(*words), "--train", "--evaluate")


BAD_VALUES = {
    "action_repeat": 0, "imagine_horizon": 1, "actor_init_std": 0, "seed": -1, "eval_episodes": 0,
    "buffer_gb": -1, "batch_size": 0, "train_seq_len": 1, "seed_steps": 0, "time_limit": 0,
    "discount": "nan", "device": "mps", "model_learning_rate": -1, "exp": "",
}  # fmt: skip
TOO_LARGE = {
    "seed": 2**32, "buffer_gb": "inf", "discount": 1.1, "td_lambda": 3, "kl_balance": 7,
    "first_share": 5, "model_learning_rate": "inf",
}  # fmt: skip


NO_NAMES = [("exp", name) for name in ("..", ".", "a/b", "/tmp", "a\nb", "\udcff")]


@pytest.mark.parametrize("name, value", [*BAD_VALUES.items(), *TOO_LARGE.items(), *NO_NAMES])
def test_a_value_that_cannot_work(tmp_path, capsys, name, value):
    code = train(tmp_path, **{name: value})
    error_line(capsys, code, "--" + name.replace("_", "-"))
    assert not any(tmp_path.iterdir())


def test_a_replay_that_holds_no_episode_is_refused_before_there_is_a_run(tmp_path, capsys):
    error_line(capsys, train(tmp_path, buffer_gb=0.001, time_limit=200), "--buffer-gb 0.001", "101")
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "lock"]


def test_a_machine_that_cannot_render_says_so_in_two_lines(tmp_path, capsys, monkeypatch):
    def none():
        raise env_wrapper.NoRenderer(f"{env_wrapper._NO_RENDERER}\n{env_wrapper._PACKAGES}")

    monkeypatch.setattr(env_wrapper, "choose_gl", none)
    assert train(tmp_path) == 2
    error, way_out = capsys.readouterr().err.strip().splitlines()
    assert "EGL" in error and "apt-get install" in way_out
    assert not any(tmp_path.iterdir())


def test_a_log_folder_that_is_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    error_line(capsys, train(tmp_path / "file"), "file")


def test_a_checkpoint_path_without_restore(tmp_path, capsys):
    error_line(capsys, train(tmp_path, checkpoint_path="x.pt"), "--restore")


def test_settings_saved_by_another_version():
    saved = dataclasses.asdict(dreamer.resolve({"algo": "Dreamerv2"}))
    old = {**saved, "buffer_gb": None, "gone_since": 3}
    assert old.pop("act_memory") and old.pop("first_share")  # the preset's, since they exist
    config = dreamer.resolve({}, old)
    assert config.buffer_gb > 0
    differ = {k for k, v in vars(config).items() if k != "buffer_gb" and v != saved[k]}
    assert differ == {"act_memory", "first_share"}
    assert (config.act_memory, config.first_share) == (0, 0)
    without = dreamer.resolve({"algo": "Dreamerv2", "kl_balance": None})
    assert dreamer.resolve({}, dataclasses.asdict(without)).kl_balance is None


def test_a_restore_may_change_what_the_readme_says_and_nothing_else():
    saved = dataclasses.asdict(dreamer.resolve({"device": "auto"}))
    others = {
        "env": "cheetah-run", "algo": "Dreamerv2", "preset": "full", "device": "cpu",
        "precision": "fp32", "vector_env": "sync", "max_hours": 2.0, "kl_balance": 0.5,
    }  # fmt: skip
    allowed = set()
    for name, value in saved.items():
        if isinstance(value, bool):
            other = not value
        elif isinstance(value, str) or value is None:
            other = others.get(name, "other")
        else:
            other = value + 1 if isinstance(value, int) else value / 2
        try:
            assert vars(dreamer.resolve({name: other}, saved))[name] == other
            allowed.add(name)
        except utils.RunError as error:
            assert "--" + name.replace("_", "-") in str(error)
    assert allowed == {
        "total_steps", "eval_interval", "checkpoint_interval", "video_interval", "eval_episodes",
        "vector_env", "max_hours", "device", "precision", "eager", "logdir", "exp",
    }  # fmt: skip


def test_eager_holds_for_one_start():
    saved = dataclasses.asdict(dreamer.resolve({"device": "cpu", "eager": True}))
    assert saved["eager"] and not dreamer.resolve({}, saved).eager
    assert dreamer.resolve({"eager": True}, {**saved, "eager": False}).eager


def test_what_is_endless_or_unbounded_is_allowed():
    given = {"grad_clip_norm": math.inf, "max_hours": math.inf, "device": "cpu"}
    assert dreamer.resolve(given).grad_clip_norm == math.inf
    saved = json.loads(json.dumps(dataclasses.asdict(dreamer.resolve(given))))
    assert dreamer.resolve({}, saved).grad_clip_norm == math.inf


def test_a_given_auto_contradicts_nothing():
    saved = dataclasses.asdict(dreamer.resolve({"preset": "full", "device": "cpu"}))
    saved = {**saved, "precision": "fp32"}
    config = dreamer.resolve({"preset": "auto", "device": "auto", "precision": "auto"}, saved)
    assert (config.preset, config.device, config.precision) == ("full", "auto", "auto")


def test_damaged_settings(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    for content in ("{", "[1]", "3", "{}", "[]", '""'):
        (folder(tmp_path) / "config.json").write_text(content)
        before = files_below(tmp_path)
        for words in ([], ["--restore"]):
            error_line(capsys, train(tmp_path, *words), "config.json", "damaged")
        after = files_below(tmp_path)
        assert after == before


def test_a_restore_that_fails_leaves_the_settings_alone(finished, capsys):
    before = (folder(finished) / "config.json").read_text()
    words = flags(env="cartpole-balance", logdir=finished, device="cuda:99")
    error_line(capsys, run("--train", "--restore", *words), "--device")
    assert (folder(finished) / "config.json").read_text() == before


def test_run_that_exists(finished, capsys):
    error_line(capsys, train(finished), "--restore", "--exp")


@pytest.mark.parametrize("part", ["checkpoints/240.pt", "episodes/a.npz", "metrics.jsonl"])
def test_a_run_that_has_lost_its_settings_is_left_alone(tmp_path, capsys, part):
    path = folder(tmp_path) / part
    path.parent.mkdir(parents=True)
    path.write_text("work of hours")
    for words in ([], ["--restore"]):
        error_line(capsys, train(tmp_path, *words), path.name, "config.json", "--exp")
    assert path.read_text() == "work of hours"
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]


def test_times_of_an_iteration_that_was_stopped_are_of_the_steps_after_it(tmp_path, monkeypatch):
    update, done = dreamer.Dreamer.update, []

    def slow(self, batch, number):
        done.append(number)
        if number == 8:
            signal.raise_signal(signal.SIGTERM)
        time.sleep(0.05)
        return update(self, batch, number)

    monkeypatch.setattr(dreamer.Dreamer, "update", slow)
    assert train(tmp_path, pretrain_steps=10, total_steps=120) == 128 + signal.SIGTERM
    assert done == list(range(9))
    words = flags(env="cartpole-balance", logdir=tmp_path)
    assert run("--train", "--restore", *words) == 0
    rows = rows_of(folder(tmp_path))
    (time_ms,) = [row["time/update_ms"] for row in rows if "time/update_ms" in row]
    assert time_ms >= 50


def test_restore_of_no_run(tmp_path, capsys):
    error_line(capsys, run("--train", "--restore", "--logdir", tmp_path), "no run")


def test_evaluate_without_a_checkpoint(tmp_path, capsys):
    error_line(capsys, run("--evaluate", "--restore", "--logdir", tmp_path), "no checkpoint")
    error_line(capsys, run("--evaluate", "--logdir", tmp_path), "--restore")
    words = ("--evaluate", "--restore", "--checkpoint-path", tmp_path / "none.pt")
    error_line(capsys, run(*words), "none.pt")


@pytest.mark.parametrize("content", [b"", b"no checkpoint at all", b"PK\x03\x04 cut"])
def test_a_file_that_is_no_checkpoint(tmp_path, capsys, content):
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    code = run("--evaluate", "--restore", "--checkpoint-path", path)
    error_line(capsys, code, "x.pt", "not a checkpoint")


def test_a_checkpoint_of_another_shape(finished, tmp_path, capsys):
    path = utils.checkpoints(folder(finished) / "checkpoints")[-1]
    words = flags(env="walker-walk", checkpoint_path=path, logdir=tmp_path)
    code = run("--evaluate", "--restore", *words)
    error_line(capsys, code, "action dimensions", "cartpole-balance")


def test_a_checkpoint_of_other_sizes(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    path = utils.checkpoints(folder(tmp_path) / "checkpoints")[-1]
    state = utils.load_checkpoint(path)
    networks = state["agent"]["networks"]
    state["agent"]["networks"] = {name: tensor[:1] for name, tensor in networks.items()}
    utils.save_checkpoint(path, state)
    words = flags(env="cartpole-balance", logdir=tmp_path)
    for mode in ("--train", "--evaluate"):
        line = error_line(capsys, run(mode, "--restore", *words), "does not fit", "size mismatch")
        assert len(line) < 300


def foreign(**changes):
    """Puts other things into a checkpoint; None takes one out."""

    def change(state):
        for name, value in changes.items():
            state.pop(name) if value is None else state.update({name: value})

    return change


@pytest.mark.parametrize(
    "change, modes",
    [
        (foreign(actions=None), "te"),
        (foreign(agent="weights"), "te"),
        (foreign(agent={"networks": {}}), "te"),
        (foreign(progress={"steps": 240}), "te"),
        (foreign(progress={"step": 240, "best": 1.0}), "t"),
        (foreign(every={"snapshot": 5}), "t"),
        (foreign(files=None), "t"),
        (foreign(episodes=None), "t"),
        (foreign(metrics=None), "t"),
        (foreign(random={}), "t"),
        (foreign(config={"algo": "PlaNet"}), "e"),
        (foreign(config={"batch_size": "4"}), "e"),
        (foreign(config={"precision": "fp8"}), "e"),
    ],
)
def test_a_checkpoint_that_another_program_wrote(change, modes, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    for path in utils.checkpoints(folder(tmp_path) / "checkpoints"):
        state = utils.load_checkpoint(path)
        change(state)
        utils.save_checkpoint(path, state)
    words, before = flags(env="cartpole-balance", logdir=tmp_path), files_below(tmp_path)
    oldest = utils.checkpoints(folder(tmp_path) / "checkpoints")[0]  # nothing after it is forgotten
    for mode in modes:
        command = {"t": ("--train", "--total-steps", 280), "e": ("--evaluate",)}[mode]
        error_line(capsys, run(*command, "--restore", *words, "--checkpoint-path", oldest))
        assert files_below(tmp_path) == before


def test_a_checkpoint_that_fits_is_not_blamed_for_want_of_memory(finished, capsys, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")

    monkeypatch.setattr(dreamer.Dreamer, "load_state", full)
    words = flags(env="cartpole-balance", logdir=finished, total_steps=280)
    assert "fit" not in error_line(capsys, run("--train", "--restore", *words), "out of memory")


@pytest.mark.parametrize(
    "name, value, reason",
    [
        ("algo", "Dreamerv3", "Dreamerv1, Dreamerv2"),
        ("algo", 2, "not of type str"),
        ("precision", "fp8", "fp32"),
        ("device", "tpu", "choose cpu"),
        ("batch_size", "4", "not of type int"),
        ("discount", "high", "not of type float"),
        ("discount", 2, "at most 1"),
        ("kl_balance", [0.8], "not of type float"),
        ("eager", "no", ""),  # holds for one start: that of a file is not read
    ],
)
def test_a_config_that_was_edited(name, value, reason, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    path = folder(tmp_path) / "config.json"
    utils.write_json(path, {**json.loads(path.read_text()), name: value})
    code = run("--train", "--restore", *flags(env="cartpole-balance", logdir=tmp_path))
    if reason:
        error_line(capsys, code, name, reason)
    else:
        assert code == 0


def test_a_run_that_was_renamed_and_whose_checkpoints_are_links(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "runs")
    renamed = folder(tmp_path / "runs", exp="branch")
    renamed.parent.parent.mkdir(exist_ok=True)
    folder(tmp_path / "runs").parent.rename(renamed.parent)
    for path in utils.checkpoints(renamed / "checkpoints"):
        path.symlink_to(path.rename(tmp_path / path.name))
    words = flags(env="cartpole-balance", logdir=tmp_path / "runs")
    assert run("--evaluate", "--restore", "--exp", "branch", *words) == 0
    assert run("--train", "--restore", "--total-steps", 280, "--exp", "branch", *words) == 0
    assert last_state(renamed)["progress"]["step"] == 280
    assert json.loads((renamed / "config.json").read_text())["exp"] == "branch"
    again = folder(tmp_path / "runs")  # back to the name that is not said
    renamed.parent.rename(again.parent)
    assert run("--evaluate", "--restore", *words) == 0
    assert run("--train", "--restore", "--total-steps", 320, *words) == 0
    assert (again / "evaluation-280.json").exists() and not renamed.exists()
    assert json.loads((again / "config.json").read_text())["exp"] == "default"


def test_flags_that_contradict_the_saved_run(finished, capsys):
    words = flags(env="cartpole-balance", logdir=finished, batch_size=9, discount=0.5)
    line = error_line(capsys, run("--train", "--restore", *words))
    assert "--batch-size 9 (saved: 4)" in line and "--discount 0.5 (saved: 0.99)" in line


def test_a_sequence_longer_than_an_episode(tmp_path, capsys):
    error_line(capsys, train(tmp_path, train_seq_len=30), "--train-seq-len", "--time-limit")
    assert not any(tmp_path.iterdir())


def test_fp16_on_a_cpu(tmp_path, capsys):
    error_line(capsys, train(tmp_path, precision="fp16", device="cpu"), "CUDA")


def test_cuda_where_there_is_none(tmp_path, capsys):
    error_line(capsys, train(tmp_path, device="cuda"), "--device cpu")


def test_a_card_that_cannot_be_used_is_none(tmp_path, capsys, monkeypatch):
    """A driver that is too old counts it, and cannot start it."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert dreamer.pick_device("auto") == torch.device("cpu")
    error_line(capsys, train(tmp_path, device="cuda"), "--device cpu")
    error_line(capsys, train(tmp_path, device="cuda:0"), "--device cuda:0")


def test_a_run_says_what_draws(tmp_path, capsys):
    assert train(tmp_path, total_steps=120) == 0
    with closing(env_wrapper.make_env(SHORT_RUN["env"])) as env:
        assert f"\npictures: {env.unwrapped.renderer}\n" in capsys.readouterr().out


def test_a_run_in_use(finished, capsys):
    with utils.run_lock(folder(finished)):
        words = flags(env="cartpole-balance", logdir=finished, total_steps=280)
        code = run("--train", "--restore", *words)
    error_line(capsys, code, "in use", str(folder(finished)))


def mujoco_empty(_):
    raise ValueError("Error: Could not allocate memory for texture")


@pytest.mark.parametrize("allocate", [np.empty, torch.empty, mujoco_empty])
def test_out_of_memory_is_one_line(tmp_path, capsys, monkeypatch, allocate):
    monkeypatch.setattr(dreamer.Dreamer, "update", lambda *_: allocate(10**15))
    error_line(capsys, train(tmp_path), "out of memory", "--batch-size")


def test_an_error_of_the_program_keeps_its_traceback(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("a mistake")

    monkeypatch.setattr(dreamer.Dreamer, "update", broken)
    with pytest.raises(RuntimeError, match="a mistake"):
        train(tmp_path)


def test_what_the_system_reports_is_one_line():
    """Nearly whatever its number; an error without one is the program's own."""
    slow = OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT), "a.npz")
    assert dreamer.machine_error(slow) == f"{os.strerror(errno.ETIMEDOUT)}: a.npz"
    assert dreamer.machine_error(OSError("cannot identify image file")) is None
    assert dreamer.machine_error(OSError(errno.EBADF, os.strerror(errno.EBADF))) is None


def test_a_full_disk_is_one_line(tmp_path, capsys, monkeypatch):
    def full(file, **_):
        file.write(b"PK")
        raise OSError(28, "No space left on device", "episode.npz")

    monkeypatch.setattr(np, "savez_compressed", full)
    error_line(capsys, train(tmp_path), "No space left on device")
    assert not list((folder(tmp_path) / "episodes").iterdir())


def test_a_disk_that_fills_under_a_checkpoint_keeps_the_last_one(tmp_path, capsys, monkeypatch):
    saves, sync = [], os.fsync

    def full(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(".pt.tmp"):
            saves.append(descriptor)
            if len(saves) > 2:
                raise OSError(28, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    error_line(capsys, train(tmp_path), "No space left on device")
    monkeypatch.setattr(os, "fsync", sync)
    names = [p.name for p in (folder(tmp_path) / "checkpoints").iterdir()]
    assert sorted(names) == ["0.pt", "80.pt"]
    assert run("--train", "--restore", *flags(env="cartpole-balance", logdir=tmp_path)) == 0


def test_an_episode_that_the_machine_cannot_read_stays_where_it_is(
    finished, tmp_path, capsys, monkeypatch
):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    before = files_below(tmp_path)
    read = Path.read_bytes

    def refuse(path):
        if path.suffix == ".npz":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    words = flags(env="cartpole-balance", logdir=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)
        error_line(capsys, run("--train", "--restore", *words), "Permission denied", ".npz")
    assert files_below(tmp_path) == before


def test_a_damaged_episode_is_moved_aside_and_named(tmp_path, capsys):
    assert train(tmp_path, total_steps=160) == 0
    episodes = sorted((folder(tmp_path) / "episodes").iterdir())
    episodes[0].write_bytes(episodes[0].read_bytes()[:200])
    words = flags(env="cartpole-balance", logdir=tmp_path, total_steps=200)
    capsys.readouterr()
    assert run("--train", "--restore", *words) == 0
    assert episodes[0].name in capsys.readouterr().out
    assert (folder(tmp_path) / "episodes" / "damaged" / episodes[0].name).exists()
    assert rows_of(folder(tmp_path))[-1]["step"] == 200


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    videos = set((folder(tmp_path) / "videos").iterdir())
    *_, before, newest = utils.checkpoints(folder(tmp_path) / "checkpoints")
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    words = flags(env="cartpole-balance", logdir=tmp_path)
    assert run("--evaluate", "--restore", *words, "--eval-episodes", 1) == 0
    out = capsys.readouterr().out
    assert newest.name in out and f"at {before.stem} frames" in out
    assert newest.exists()  # an evaluation changes nothing
    for video in set((folder(tmp_path) / "videos").iterdir()) - videos:
        video.unlink()
    assert_goes_on_like(finished, tmp_path)
    out = capsys.readouterr().out
    assert newest.name in out and f"from {before}" in out


def test_no_checkpoint_left(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    for checkpoint in (folder(tmp_path) / "checkpoints").iterdir():
        checkpoint.write_bytes(b"")
    words = flags(env="cartpole-balance", logdir=tmp_path)
    error_line(capsys, run("--train", "--restore", *words), "no checkpoint", "can be read")
    assert len(list((folder(tmp_path) / "episodes").iterdir())) == 6


def test_no_episode_left(tmp_path, capsys):
    assert train(tmp_path, total_steps=160) == 0
    for episode in (folder(tmp_path) / "episodes").iterdir():
        episode.write_bytes(b"")
    words = flags(env="cartpole-balance", logdir=tmp_path, total_steps=200)
    error_line(capsys, run("--train", "--restore", *words), "episode")


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys, monkeypatch):
    update = dreamer.Dreamer.update

    def broken(self, batch, number):
        metrics = update(self, batch, number)
        if self.broken == 0:
            metrics["loss/value"] = metrics["loss/value"] * float("nan")
        self.broken -= 1
        return metrics

    monkeypatch.setattr(dreamer.Dreamer, "broken", 5, raising=False)
    monkeypatch.setattr(dreamer.Dreamer, "update", broken)
    line = error_line(capsys, train(tmp_path), "gradient step 5", "loss/value", "/120.pt")
    batch = np.load(re.search(r"\S+\.npz", line)[0])
    assert batch["image"].shape == (6, 4, 64, 64, 3)
    assert last_state(folder(tmp_path))["progress"]["updates"] <= 5


def test_gradients_that_always_overflow_float16_stop_the_run(tmp_path, capsys, monkeypatch):
    """In float32 with a loss scale: only that is under test."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1e-7)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *arguments, **named: scaler)
    error_line(capsys, train(tmp_path), "gradient step 1:", "--precision fp32")


# ------------------------------------------------------------------------- real processes


def start(logdir, *words):
    command = [sys.executable, "dreamer.py", "--train", *flags(**SHORT_RUN, logdir=logdir), *words]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_real_process_and_the_run_goes_on(tmp_path, number):
    process = start(tmp_path, "--total-steps=100000")
    wait_for("loss/world", process, tmp_path)
    process.send_signal(number)
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 128 + number, out
    assert "--train --restore goes on" in out
    assert utils.checkpoints(folder(tmp_path) / "checkpoints")
    step = last_state(folder(tmp_path))["progress"]["step"]
    words = flags(env="cartpole-balance", logdir=tmp_path, total_steps=step + 40)
    assert run("--train", "--restore", *words) == 0


def test_the_plain_script_says_what_is_wrong_without_a_traceback():
    result = subprocess.run(
        [sys.executable, "dreamer.py", "--train", "--env", "nonsense-task"],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ}, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert "Traceback" not in result.stderr and "nonsense-task" in result.stderr


@pytest.mark.parametrize("hours", [1e-6, 0])
def test_max_hours_stops_cleanly(tmp_path, capsys, hours):
    assert train(tmp_path, max_hours=hours) == 0
    assert "stopped by --max-hours" in capsys.readouterr().out
    assert last_state(folder(tmp_path))["progress"]["step"] == 0
    words = flags(env="cartpole-balance", logdir=tmp_path)
    assert run("--train", "--restore", *words) == 0
    assert rows_of(folder(tmp_path))[-1]["step"] == 240


def test_max_hours_may_end_in_mid_iteration(tmp_path, monkeypatch):
    update, clock, ahead = dreamer.Dreamer.update, time.monotonic, [0]
    monkeypatch.setattr(time, "monotonic", lambda: clock() + ahead[0])

    def slow(self, batch, number):
        ahead[0] = 4000 if number == 8 else 0
        return update(self, batch, number)

    monkeypatch.setattr(dreamer.Dreamer, "update", slow)
    assert train(tmp_path, max_hours=1) == 0
    progress = last_state(folder(tmp_path))["progress"]
    assert (progress["updates"], progress["updates_left"]) == (9, 1)
