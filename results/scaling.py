"""Does a long run cost more an iteration than a young one?

    python results/scaling.py

Runs that hold 10, 100 and 1000 episodes of 1000 frames are restored, each in a process of its own,
and go on for five iterations of 100 gradient steps. An episode is one of five random ones, copied.
Three rounds, since a machine's speed drifts.
"""

import json
import multiprocessing
import shutil
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from time import monotonic

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dreamer
import utils

ITERATIONS, DIFFERENT, ROUNDS = 5, 5, 3


def write_run(config: dreamer.Config, folder: Path, episodes: int) -> Path:
    """A run of so many episodes that stands before an iteration; its checkpoint."""
    with utils.StopSignal() as stop:
        trainer = dreamer.Trainer(config, folder, stop)
        for name in ("episodes", "checkpoints"):
            (folder / name).mkdir()
        for number in range(DIFFERENT):
            episode, frames = dreamer.collect_episode(trainer.env, None, number, stop)
            trainer.save_episode(episode)
        for number in range(DIFFERENT, episodes):
            source = trainer.episode_files[number % DIFFERENT]
            copy = f"{number}-{source}"
            trainer.episode_files.append(copy)
            shutil.copy(folder / "episodes" / source, folder / "episodes" / copy)
        step = episodes * frames
        trainer.progress = dreamer.Progress(
            step, episodes, iterations=1, updates_left=config.update_steps, iteration_end=step + 1
        )
        trainer.open_logs()
        trainer.save()
        trainer.close()
    return folder / "checkpoints" / f"{step}.pt"


def measure(episodes: int, flags: dict) -> dict:
    """Restores a run of so many episodes and goes on; seconds, milliseconds and 10^9 bytes."""
    utils.tune_process()
    rare = dict.fromkeys(("eval_interval", "checkpoint_interval", "video_interval"), 0)
    config = dreamer.resolve({**flags, **rare, "eval_episodes": 1})
    config.total_steps = (episodes + ITERATIONS) * config.time_limit
    with tempfile.TemporaryDirectory() as scratch, utils.StopSignal() as stop:
        folder = Path(scratch)
        checkpoint = write_run(config, folder, episodes)
        trainer = dreamer.Trainer(config, folder, stop)
        start = monotonic()
        trainer.restore(checkpoint, utils.load_checkpoint(checkpoint))
        restored = monotonic() - start
        trainer.run()
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    hours, steps, waits, frames_per_second = (
        [row[key] for row in rows if key in row]
        for key in ("time/hours", "time/update_ms", "time/sample_ms", "time/collect_fps")
    )
    return {
        "episodes": episodes,
        "replay GB": trainer.replay.gigabytes,
        "restoring s": restored,
        "iteration s": float(np.median(np.diff([0, *hours])) * 3600),
        "collecting frames/s": float(np.median(frames_per_second)),
        "waiting for a batch ms": float(np.median(waits)),
        "gradient step ms": float(np.median(steps)),
        "peak memory GB": utils.peak_memory_gb(trainer.device),
    }


if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    flags = {"env": "cartpole-balance", "algo": "Dreamerv2", "update_steps": 100}
    rows = []
    for episodes in (10, 100, 1000) * ROUNDS:
        with ProcessPoolExecutor(1, context) as process:  # so that the peak of memory is its own
            rows.append(process.submit(measure, episodes, flags).result())
    for row in rows:
        print("  ".join(f"{name} {value:.4g}" for name, value in row.items()))
