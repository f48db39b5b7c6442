"""Kills a tiny real run at random moments, restores it, and compares its end with a run's that was
never killed. What must agree to the last bit: weights, optimizers, random states, the replay's
episodes, metrics, TensorBoard's events, videos. Times may differ.

    python tests/kill_run.py --kills 50
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from conftest import SHORT_RUN, flags
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer import record_writer  # noqa: F401  (imported once, for all forks)

import dreamer
import replay_buffer
import utils

PHASES = {
    "between units": [],
    "restoring": [(dreamer.Trainer, "restore"), (utils.Logger, "__init__")],
    "collecting": [(dreamer.Trainer, "collect")],
    "gradient step": [(dreamer.Trainer, "gradient_step")],
    "evaluating": [(dreamer.Trainer, "evaluate")],
    "writing an episode": [(dreamer.Trainer, "save_episode")],
    "writing a checkpoint": [(dreamer.Trainer, "save")],
    "writing metrics": [(utils.Logger, "scalars"), (utils.Logger, "video")],
}


def plain(value):
    """Nested containers with tensors as bytes, to be compared with ==."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [plain(x) for x in value]
    return repr(value)  # NaN equals NaN here


def rows_of(folder: Path) -> list[dict]:
    """The logged metrics of a run."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict:
    """All of a finished run that its future or its reader can see, but for times, by name."""
    state = utils.load_checkpoint(utils.checkpoints(folder / "checkpoints")[-1])
    rows = rows_of(folder)
    events = []
    for path in folder.glob("events.out.tfevents.*"):
        for record in RawEventFileLoader(str(path)).Load():
            event = Event.FromString(record)
            for value in event.summary.value:
                timed = value.tag.startswith("time/")
                what = b"" if timed else value.SerializeToString(deterministic=True)
                events.append((event.step, value.tag, what))
    return {
        "weights and optimizers": plain(state["agent"]),
        "random states": plain(state["random"]),
        "progress": plain({**state["progress"], "seconds": 0, "iteration_start": 0}),
        "triggers": plain(state["every"]),
        "episodes": [
            {key: x.tobytes() for key, x in episode.items()}
            for episode in (
                replay_buffer.load_episode(folder / "episodes" / name, state["actions"])
                for name in state["episodes"]
            )
        ],
        "files of episodes": len(list((folder / "episodes").iterdir())),
        "metrics": [{k: v for k, v in r.items() if not k.startswith("time/")} for r in rows],
        "events": sorted(events),
        "videos": {path.name: path.read_bytes() for path in (folder / "videos").iterdir()},
        "temporary files": [path.name for path in folder.rglob(".*.tmp")],
    }


def differences(one: Path, two: Path) -> list[str]:
    """Names of what differs between two finished runs."""
    a, b = contents(one), contents(two)
    return [name for name in a if a[name] != b[name]]


class Watched:
    """A process that trains, and shares with this one which phase it is in.

    It is forked: a new interpreter would take longer to start than a tiny run to end.
    """

    def __init__(self, logdir: Path):
        self.path = logdir / SHORT_RUN["env"] / "Dreamerv1" / "default" / "1"
        self._phase = multiprocessing.RawValue("i", 0)
        self._counts = multiprocessing.RawArray("i", len(PHASES))
        self._seconds = multiprocessing.RawArray("d", len(PHASES))
        saved = ["--restore"] if (self.path / "config.json").exists() else []
        words = ["--train", *saved, *flags(**SHORT_RUN, logdir=logdir)]
        sys.stdout.flush()
        self._pid = os.fork()
        if not self._pid:
            self._train(logdir, words)
        self.code = None

    def _train(self, logdir: Path, words: list[str]) -> None:
        code = 1
        try:
            log = os.open(logdir / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            for number, functions in enumerate(PHASES.values()):
                for owner, name in functions:
                    setattr(owner, name, self._marked(getattr(owner, name), number))
            code = dreamer.main(words)
        finally:
            sys.stdout.flush()
            os._exit(code)

    def _marked(self, function, number):
        def marked(*args, **kwargs):
            before, start = self._phase.value, time.monotonic()
            self._phase.value = number
            self._counts[number] += 1
            try:
                return function(*args, **kwargs)
            finally:
                self._seconds[number] += time.monotonic() - start
                self._phase.value = before

        return marked

    @property
    def phase(self) -> str:
        return list(PHASES)[self._phase.value]

    def count(self, phase: str) -> int:
        """How often it has entered `phase`."""
        return self._counts[list(PHASES).index(phase)]

    def mean_seconds(self, phase: str) -> float:
        number = list(PHASES).index(phase)
        return self._seconds[number] / max(1, self._counts[number])

    def ended(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is not None

    def wait(self) -> None:
        while not self.ended():
            time.sleep(0.001)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        self.wait()


def kill_runs(scratch: Path, kills: int, seed: int = 0, say=lambda line: None):
    """Kills `kills` times. Returns kills by phase, runs finished, and what differed.

    Every phase is aimed at in turn: at some entry into it, then a random part of the time that it
    takes. Where the process is when it dies may be another phase, and that is what is counted. A
    run that reaches its end is compared, and another begins.
    """
    rng, phases = random.Random(seed), list(PHASES)
    (scratch / "whole").mkdir(parents=True)
    whole = Watched(scratch / "whole")
    whole.wait()
    killed, finished, different, number = Counter(), 0, [], 0
    if whole.code:
        return killed, finished, [f"the run itself ended with code {whole.code}"]
    while True:
        logdir = scratch / f"killed-{number}"
        logdir.mkdir(exist_ok=True)
        process = Watched(logdir)
        if killed.total() < kills:
            aim = phases[killed.total() % len(phases)]
            # Between two units: after some unit. Never so late that the run could not be there.
            entered = "gradient step" if aim == "between units" else aim
            entries, part = rng.randint(1, max(1, whole.count(entered) // 3)), rng.random()
            while process.count(entered) < entries and not process.ended():
                time.sleep(0.0001)
            while aim == "between units" and process.phase != aim and not process.ended():
                time.sleep(0.0001)
            time.sleep(part * whole.mean_seconds(aim))
            process.kill()
        process.wait()
        if process.code == -signal.SIGKILL:
            killed[process.phase] += 1
            say(f"kill {killed.total()}: {process.phase}")
            continue
        if process.code:
            different.append(f"run {number} ended with code {process.code}: {logdir / 'log.txt'}")
        else:
            different += [f"run {number}: {x}" for x in differences(whole.path, process.path)]
        finished += 1
        number += 1
        say(f"run {number} finished; differences so far: {different or 'none'}")
        if killed.total() >= kills:
            return killed, finished, different


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        say = lambda line: print(line, flush=True)  # noqa: E731
        killed, finished, different = kill_runs(Path(scratch), args.kills, args.seed, say)
    print("\n| killed while | times |\n|---|---|")
    for phase in PHASES:
        print(f"| {phase} | {killed[phase]} |")
    print(f"| all, each restored | {killed.total()} |")
    print(f"\n{finished} runs reached their end. Differences: {'; '.join(different) or 'none'}.")
    return bool(different)


if __name__ == "__main__":
    torch.set_num_threads(1)  # a fork of a process with a pool of threads hangs
    sys.exit(main())
