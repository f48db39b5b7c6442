"""Shared by the tests: the modules on the path, and settings small enough to run in seconds."""

import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = str(ROOT), str(ROOT / "results")

import dreamer  # noqa: E402

TINY = {
    "batch_size": 4, "train_seq_len": 6, "deter_size": 16, "stoch_size": 4, "hidden_size": 16,
    "num_units": 16, "cnn_depth": 4, "imagine_horizon": 5, "reward_scale": 1.0,
    "actor_entropy": 0.0, "first_share": 0.0, "model_rate_decay": 0,
}  # fmt: skip

# A whole run in seconds: episodes of 40 frames, three gradient steps an iteration.
SHORT_RUN = {
    **TINY, "env": "cartpole-balance", "time_limit": 40, "seed_steps": 80, "collect_steps": 40,
    "update_steps": 3, "pretrain_steps": 4, "total_steps": 240, "eval_interval": 120,
    "eval_episodes": 2, "checkpoint_interval": 80, "video_interval": 120,
    "vector_env": "sync",
}  # fmt: skip


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs a CUDA device")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """What is not marked `cuda` sees no card, its fixtures and processes neither."""
    with pytest.MonkeyPatch.context() as patch:
        if not item.get_closest_marker("cuda"):
            patch.setattr(torch.cuda, "device_count", lambda: 0)
            patch.setattr(torch.cuda, "is_available", lambda: False)
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
        return (yield)


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def mutations(data: bytes, n: int):
    """`n` damaged copies of `data`, the same ones every time: one to three bytes are others."""
    rng = np.random.default_rng(0)
    for _ in range(n):
        mutated = bytearray(data)
        for _ in range(rng.integers(1, 4)):
            mutated[rng.integers(len(data))] = rng.integers(256)
        yield bytes(mutated)


def flags(**settings) -> list[str]:
    """Settings as words of a command line."""
    return [f"--{name}={value}" for name, value in settings.items()]


def run(*words) -> int:
    """The exit code of `python dreamer.py <words>`, run in this process."""
    try:
        return dreamer.main([str(word) for word in words])
    except SystemExit as exit:  # argparse
        return exit.code


def train(logdir, *words, **more) -> int:
    return run("--train", *flags(**{**SHORT_RUN, "logdir": logdir, **more}), *words)


def files_below(path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


def folder(logdir, env="cartpole-balance", algo="Dreamerv1", exp="default", seed=1):
    return logdir / env / algo / exp / str(seed)


def wait_for(scalar, process, logdir) -> None:
    """Until a run that goes on in `process` has logged that scalar."""
    metrics, deadline = folder(logdir) / "metrics.jsonl", time.monotonic() + 240
    while not (metrics.exists() and scalar in metrics.read_text()):
        if time.monotonic() > deadline or process.poll() is not None:
            process.kill()
            pytest.fail(f"no {scalar} came")
        time.sleep(0.1)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A whole tiny run: prefill, four iterations, two evaluations."""
    logdir = tmp_path_factory.mktemp("runs")
    assert train(logdir) == 0
    return logdir


@pytest.fixture
def tiny_config():
    """Makes a resolved configuration of tiny sizes, with the given differences."""
    return lambda **more: dreamer.resolve({"device": "cpu", **TINY, **more})


@pytest.fixture
def make_batch():
    """Makes a batch of made-up sequences for a configuration, on the CPU."""

    def make(config, actions=2, dtype=torch.float32):
        generator = torch.Generator().manual_seed(0)
        shape = (config.train_seq_len, config.batch_size)
        image = torch.randint(0, 256, (*shape, 64, 64, 3), generator=generator)
        action = torch.rand(*shape, actions, generator=generator) * 2 - 1
        return {
            "image": image.to(torch.uint8),
            "action": action.to(dtype),
            "reward": torch.rand(shape, generator=generator).to(dtype),
            "discount": torch.ones(shape, dtype=dtype),
        }

    return make


def in_double(make):
    """What `make` makes, in float64."""
    torch.set_default_dtype(torch.float64)
    try:
        return make()
    finally:
        torch.set_default_dtype(torch.float32)
