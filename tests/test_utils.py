"""Files, logs, random states and signals, each against what is on the disk afterwards."""

import errno
import io
import json
import os
import pickle
import random
import signal
import stat
import subprocess
import sys
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import emulated_card
import numpy as np
import pytest
import torch
from conftest import ROOT, Payload, mutations
from kill_run import rows_of
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import utils
from utils import Every, Logger, MeanMetrics, RunError, Stopped, StopSignal


def names(folder):
    return sorted(os.listdir(folder))


def python(code, *args, **options):
    """A process that runs `code` with the repository on its path; its output is a text pipe."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        **options,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------ files


def test_an_atomic_file_replaces_the_old_one(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")
    with utils.atomic_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["x.bin"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
@pytest.mark.parametrize("old", [None, b"old"])
def test_an_atomic_file_that_fails_changes_nothing(old, error, tmp_path):
    path = tmp_path / "x.bin"
    if old:
        path.write_bytes(old)
    with pytest.raises(error), utils.atomic_file(path) as file:
        file.write(b"half of the n")
        raise error
    assert (path.read_bytes() if old else path.exists()) == (old or False)
    assert names(tmp_path) == (["x.bin"] if old else [])


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_a_mount_that_cannot_sync_folders_keeps_files_all_the_same(number, tmp_path, monkeypatch):
    """But an error of the disk is one."""
    sync = os.fsync

    def refuses(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", refuses)
    error = nullcontext() if number == errno.EINVAL else pytest.raises(OSError)
    with error, utils.atomic_file(tmp_path / "x.bin") as file:
        file.write(b"new")
    assert (tmp_path / "x.bin").read_bytes() == b"new"


def test_an_atomic_file_needs_its_folder(tmp_path):
    with pytest.raises(FileNotFoundError), utils.atomic_file(tmp_path / "absent" / "x.bin"):
        pass
    assert names(tmp_path) == []


def test_a_killed_process_leaves_the_old_file_and_a_temporary_that_is_cleared(tmp_path):
    path = tmp_path / "5.pt"
    path.write_bytes(b"old")
    code = (
        "import os, signal, sys, utils; from pathlib import Path\n"
        "with utils.atomic_file(Path(sys.argv[1])) as file:\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert python(code, path).wait(60) == -signal.SIGKILL
    assert path.read_bytes() == b"old" and len(names(tmp_path)) == 2
    utils.clear_temporaries(tmp_path)
    assert names(tmp_path) == ["5.pt"]


def test_only_temporaries_are_cleared(tmp_path):
    for name in (".x.pt.tmp", ".1-2-3.npz.tmp", "x.pt", "x.tmp", ".hidden", "metrics.jsonl"):
        (tmp_path / name).touch()
    utils.clear_temporaries(tmp_path)
    assert names(tmp_path) == [".hidden", "metrics.jsonl", "x.pt", "x.tmp"]


def test_json_is_written_for_people_too(tmp_path):
    path = tmp_path / "config.json"
    utils.write_json(path, {"env": "walker-walk", "seed": 1, "rate": 8e-5, "none": None})
    text = path.read_text()
    assert json.loads(text) == {"env": "walker-walk", "seed": 1, "rate": 8e-5, "none": None}
    assert len(text.splitlines()) == 6 and text.endswith("\n")


# ------------------------------------------------------------------------------------ checkpoints


def checkpoint(agent, **more) -> dict:
    """The least that a checkpoint of this program holds, and more."""
    return {"agent": agent, "config": {}, "progress": {}, **more}


def test_a_checkpoint_gives_back_what_it_was_given(tmp_path):
    state = {
        "agent": {"w": torch.randn(3, 4), "half": torch.ones(2, dtype=torch.bfloat16)},
        "config": {"env": "walker-walk"},
        "progress": {"step": 5, "best": -float("inf"), "done": False, "text": "ä"},
        "episodes": ["a.npz", "b.npz"],
        "none": None,
    }
    utils.save_checkpoint(tmp_path / "5.pt", state)
    loaded = utils.load_checkpoint(tmp_path / "5.pt")
    for name, tensor in state["agent"].items():
        assert loaded["agent"][name].dtype == tensor.dtype
        assert torch.equal(loaded["agent"][name], tensor)
    assert {**loaded, "agent": 0} == {**state, "agent": 0}
    assert names(tmp_path) == ["5.pt"]


def assert_no_checkpoint(path):
    with pytest.raises(RunError) as error:
        utils.load_checkpoint(path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message


def test_a_missing_checkpoint_and_a_folder_are_refused(tmp_path):
    assert_no_checkpoint(tmp_path / "5.pt")
    (tmp_path / "6.pt").mkdir()
    assert_no_checkpoint(tmp_path / "6.pt")


@pytest.mark.parametrize(
    "data",
    [b"", b"garbage\n" * 100, b"PK\x03\x04" + b"\0" * 200, np.random.default_rng(0).bytes(5000)],
    ids=["empty", "text", "zip magic", "noise"],
)
def test_garbage_is_no_checkpoint(data, tmp_path):
    path = tmp_path / "5.pt"
    path.write_bytes(data)
    assert_no_checkpoint(path)


def test_a_checkpoint_that_is_cut_short_is_refused(tmp_path):
    path = tmp_path / "5.pt"
    utils.save_checkpoint(path, checkpoint({"w": torch.randn(50)}, random=utils.random_state()))
    data = path.read_bytes()
    for length in [*range(0, len(data), len(data) // 20), len(data) - 1]:
        path.write_bytes(data[:length])
        assert_no_checkpoint(path)


@pytest.mark.parametrize("allocate, error", [(np.empty, MemoryError), (torch.empty, RuntimeError)])
def test_a_checkpoint_without_memory_to_read_it_is_not_called_damaged(
    tmp_path, monkeypatch, allocate, error
):
    def full(*_, **__):
        allocate(10**15)

    utils.save_checkpoint(tmp_path / "5.pt", checkpoint({"w": torch.zeros(3)}))
    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(error, match="allocate") as raised:
        utils.load_checkpoint(tmp_path / "5.pt")
    assert not isinstance(raised.value, RunError)


def test_only_numbered_files_are_checkpoints(tmp_path):
    for name in ("10.pt", "9.pt", "9-best.pt", "best.pt", "-best.pt", "1².pt", "x10.pt"):
        (tmp_path / name).touch()
    (tmp_path / "500.pt").mkdir()
    assert [path.name for path in utils.checkpoints(tmp_path)] == ["9-best.pt", "9.pt", "10.pt"]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_no_mutated_checkpoint_is_more_than_damaged(tmp_path):
    """It loads as it was, where the byte means nothing, or it is refused; there is no third way."""
    path, outcomes = tmp_path / "5.pt", Counter()
    state = checkpoint({"w": torch.randn(50), "b": torch.arange(3)}, numbers=[1, 2.5, None])
    utils.save_checkpoint(path, state)
    for data in mutations(path.read_bytes(), 2000):
        path.write_bytes(data)
        try:
            loaded = utils.load_checkpoint(path)
        except RunError:
            outcomes["refused"] += 1
        else:
            for name, tensor in state["agent"].items():
                assert torch.equal(loaded["agent"][name], tensor)
            assert {**loaded, "agent": 0} == {**state, "agent": 0}
            outcomes["loaded"] += 1
    assert outcomes["refused"] > 1000 and outcomes["loaded"] > 15


@pytest.mark.parametrize("state", [[1, 2], {"model": {}}, torch.zeros(3), None])
def test_a_checkpoint_of_another_program_is_refused(state, tmp_path):
    torch.save(state, tmp_path / "5.pt")
    assert_no_checkpoint(tmp_path / "5.pt")


def write_zip(path, value):
    torch.save(value, path)


def write_legacy(path, value):
    torch.save(value, path, _use_new_zipfile_serialization=False)


def write_pickle(path, value):
    path.write_bytes(pickle.dumps(value, protocol=2))


@pytest.mark.parametrize("write", [write_zip, write_legacy, write_pickle])
def test_code_in_a_checkpoint_is_never_run(write, tmp_path):
    path, marker = tmp_path / "5.pt", tmp_path / "executed"
    write(path, {"agent": Payload(marker)})
    assert_no_checkpoint(path)
    assert not marker.exists()
    if write is write_pickle:
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert marker.exists(), "the payload would not have run in any case"


def test_checkpoints_are_listed_by_step(tmp_path):
    for name in ("500.pt", "10000.pt", "2000.pt", "best.pt", ".3000.pt.tmp", "4000.txt", "-1.pt"):
        (tmp_path / name).touch()
    assert [path.name for path in utils.checkpoints(tmp_path)] == ["500.pt", "2000.pt", "10000.pt"]
    assert utils.checkpoints(tmp_path / "absent") == []


@pytest.mark.parametrize(
    "best, kept",
    [
        (None, [900, 1000, 1100]),
        (200, [200, 900, 1000, 1100]),
        (1000, [900, 1000, 1100]),
        (333, [900, 1000, 1100]),
    ],
)
def test_the_newest_three_and_the_best_are_kept(best, kept, tmp_path):
    for step in range(100, 1200, 100):
        (tmp_path / f"{step}.pt").touch()
    for name in ("notes", "my-best", "200-best", "900-best"):
        (tmp_path / f"{name}.pt").touch()
    utils.prune_checkpoints(tmp_path, keep=3, best=best)
    left = [path.stem for path in utils.checkpoints(tmp_path)]
    assert left == ["200-best"] * (best == 200) + [str(step) for step in kept]
    assert (tmp_path / "my-best.pt").exists()
    assert (tmp_path / "notes.pt").exists()


def test_few_checkpoints_are_all_kept(tmp_path):
    for step in (1, 2, 3):
        (tmp_path / f"{step}.pt").touch()
        utils.prune_checkpoints(tmp_path, keep=3, best=None)
    assert len(utils.checkpoints(tmp_path)) == 3


# --------------------------------------------------------------------------------- random numbers


def draws():
    """Something of every global generator, of those that draw normals in pairs too."""
    return [
        random.random(), random.gauss(0, 1), *np.random.randn(3).tolist(),
        *np.random.randint(0, 1000, 3).tolist(), *torch.randn(3).tolist(),
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def global_generators():
    """Each test starts from the same state, halfway through a pair of normals."""
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    random.gauss(0, 1)
    np.random.randn()
    yield
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])


def test_a_random_state_brings_the_draws_back():
    state = utils.random_state()
    first, second = draws(), draws()
    assert first != second
    utils.set_random_state(state)
    assert [draws(), draws()] == [first, second]


def test_a_random_state_survives_a_checkpoint(tmp_path):
    utils.save_checkpoint(tmp_path / "1.pt", checkpoint({}, random=utils.random_state()))
    expected = draws()
    utils.seed_everything(99)
    utils.set_random_state(utils.load_checkpoint(tmp_path / "1.pt")["random"])
    assert draws() == expected


def test_a_random_state_is_a_copy():
    state = utils.random_state()
    first = draws()
    for _ in range(700):  # more than a block of the Mersenne twister
        draws()
    utils.set_random_state(state)
    assert draws() == first


def test_seeding_seeds_every_generator():
    utils.seed_everything(5)
    expected = draws()
    utils.seed_everything(6)
    assert all(a != b for a, b in zip(draws()[:5], expected))
    utils.seed_everything(5)
    assert draws() == expected
    random.seed(5)
    assert random.random() == expected[0]


def test_nothing_was_drawn_around_an_isolated_block():
    state = utils.random_state()
    expected = draws()
    utils.seed_everything(7)
    inside = draws()
    utils.set_random_state(state)
    with utils.isolated_random(7):
        assert draws() == inside
    assert draws() == expected


def test_an_isolated_block_that_fails_is_undone_too():
    state = utils.random_state()
    expected = draws()
    utils.set_random_state(state)
    with pytest.raises(ValueError), utils.isolated_random(7):
        draws()
        raise ValueError
    assert draws() == expected


def test_the_generators_of_the_cards_that_there_are_are_put_back(monkeypatch):
    """A checkpoint of a machine with two cards, on one with one."""
    state = {**utils.random_state(), "cuda": [torch.tensor([1]), torch.tensor([2])]}
    put = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda x, device: put.append((x, device)))
    utils.set_random_state(state)  # a driver that is too old counts a card that it cannot start
    assert put == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    utils.set_random_state(state)
    assert put == [(torch.tensor([1]), 0)]


def test_streams_have_seeds_of_their_own():
    keys = [(seed, kind, n) for seed in range(5) for kind in range(3) for n in range(200)]
    seeds = [utils.stream_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert seeds == [utils.stream_seed(*key) for key in keys]
    assert all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds)
    assert np.std(seeds) == pytest.approx(2**32 / 12**0.5, rel=0.05)


def test_streams_of_keys_that_differ_in_length_have_seeds_of_their_own():
    keys = [(1,), (1, 0), (1, 0, 0), (0, 1), (0, 0, 1), (0,), (0, 0)]
    assert len({utils.stream_seed(*key) for key in keys}) == len(keys)


def test_seeding_a_stream_draws_from_no_global_generator():
    state = utils.random_state()
    expected = draws()
    utils.set_random_state(state)
    utils.stream_seed(1, 2, 3)
    assert draws() == expected


# --------------------------------------------------------------------------------------- triggers


@pytest.mark.parametrize(
    "repeat, expected",
    [
        (1, [10, 20, 30, 40, 50, 60]),
        (2, [10, 20, 30, 40, 50, 60]),
        (3, [12, 21, 30, 42, 51, 60]),
        (6, [12, 24, 30, 42, 54, 60]),
    ],
)
def test_a_trigger_is_due_once_in_each_interval(repeat, expected):
    every, fired = Every(10), []
    for step in range(0, 61, repeat):
        if every.due(step):
            fired.append(step)
            every.fired(step)
            assert not every.due(step)
    assert fired == expected


def test_a_trigger_waits_until_what_was_due_is_done():
    every = Every(10)
    assert [every.due(step) for step in (9, 10, 11, 25)] == [False, True, True, True]
    every.fired(25)
    assert [every.due(step) for step in (25, 29, 30)] == [False, False, True]


def test_a_trigger_goes_on_where_it_was():
    every = Every(10, last=31)
    assert [every.due(step) for step in (31, 39, 40)] == [False, False, True]
    every.last = 45
    assert [every.due(step) for step in (49, 50)] == [False, True]


def test_an_interval_of_zero_is_never():
    every = Every(0)
    assert not any(every.due(step) for step in range(100))


# ---------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_becomes_an_exception_where_it_is_asked_for(number, code):
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    with pytest.raises(Stopped) as stopped, StopSignal() as stop:
        stop.check()
        assert all(signal.getsignal(n) != before[n] for n in before)
        signal.raise_signal(number)
        for _ in range(2):  # it is not forgotten
            with pytest.raises(Stopped):
                stop.check()
        stop.check()
    assert stopped.value.code == code
    assert number.name in str(stopped.value)
    assert {n: signal.getsignal(n) for n in before} == before


def test_handlers_are_put_back_without_a_signal_too():
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    with StopSignal() as stop:
        stop.check()
    assert {n: signal.getsignal(n) for n in before} == before


def test_the_time_limit_is_a_stop_without_an_error(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(utils, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with StopSignal(max_hours=0.5) as stop:
        now[0] += 1799
        stop.check()
        now[0] += 2
        with pytest.raises(Stopped) as stopped:
            stop.check()
    assert stopped.value.code == 0 and "max-hours" in str(stopped.value)


def test_without_a_time_limit_no_time_is_too_long(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(utils, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with StopSignal() as stop:
        now[0] = 1e9
        stop.check()


def test_a_further_interrupt_ends_the_process_but_not_one_that_comes_with_the_first():
    code = (
        "import time, utils\n"
        "with utils.StopSignal() as stop:\n"
        "    print('ready', flush=True)\n"
        "    while stop._signal is None: time.sleep(0.01)\n"
        "    print('noted', flush=True)\n"
        "    while True: time.sleep(0.01)\n"
    )
    with python(code) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == "noted\n"
            process.send_signal(signal.SIGINT)
            time.sleep(1.5)
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            assert process.wait(10) == -signal.SIGINT
        finally:
            process.kill()


# ------------------------------------------------------------------------------------------- lock

LOCK = (
    "import sys, time, utils; from pathlib import Path\n"
    "try:\n"
    "    with utils.run_lock(Path(sys.argv[1])):\n"
    "        print('held', flush=True)\n"
    "        time.sleep(float(sys.argv[2]))\n"
    "except utils.RunError as error:\n"
    "    print(error)\n"
)


def test_a_run_is_locked_while_a_process_uses_it(tmp_path):
    with utils.run_lock(tmp_path):
        with python(LOCK, tmp_path, 0) as other:
            output = other.stdout.read()
        assert str(tmp_path) in output and "in use" in output and len(output.splitlines()) == 1
    with python(LOCK, tmp_path, 0) as other:
        assert other.stdout.read() == "held\n"


def test_a_killed_process_holds_no_lock(tmp_path):
    with python(LOCK, tmp_path, 600) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(RunError, match="in use"), utils.run_lock(tmp_path):
                pass
        finally:
            holder.send_signal(signal.SIGKILL)
        holder.wait(10)
        with utils.run_lock(tmp_path):
            pass


def test_a_lock_is_free_after_an_error_and_is_of_one_run_only(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError), utils.run_lock(tmp_path / "a"):
        raise ValueError
    with (
        utils.run_lock(tmp_path / "a"),
        utils.run_lock(tmp_path / "b"),
        pytest.raises(RunError),
        utils.run_lock(tmp_path / "a"),
    ):
        pass


def test_a_file_system_without_locks_is_not_a_run_in_use(tmp_path, monkeypatch):
    """Network folders, a mounted Google Drive among them, may know no locks."""

    def no_locks(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(utils.fcntl, "flock", no_locks)
    with utils.run_lock(tmp_path):
        pass


# ---------------------------------------------------------------------------------------- metrics


def test_metrics_are_means_since_the_last_reading():
    metrics = MeanMetrics()
    assert metrics.pop() == {}
    for value in (1.0, 2.0, 6.0):
        metrics.add({"loss": torch.tensor(value), "kl": torch.tensor(-value)})
    assert metrics.pop() == {"loss": 3.0, "kl": -3.0}
    assert metrics.pop() == {}
    metrics.add({"loss": torch.tensor(5.0)})
    assert metrics.pop() == {"loss": 5.0}


def test_metrics_do_not_follow_a_tensor_that_is_written_again():
    """As a captured graph does with its outputs."""
    metrics, value = MeanMetrics(), torch.tensor(1.0)
    metrics.add({"loss": value})
    value.fill_(3.0)
    metrics.add({"loss": value})
    value.fill_(100.0)
    assert metrics.pop() == {"loss": 2.0}


def test_metrics_survive_a_checkpoint(tmp_path):
    metrics = MeanMetrics()
    metrics.add({"loss": torch.tensor(1.0)})
    utils.save_checkpoint(tmp_path / "1.pt", checkpoint({}, metrics=metrics.state_dict()))
    again = MeanMetrics()
    again.load_state_dict(utils.load_checkpoint(tmp_path / "1.pt")["metrics"])
    for m in (metrics, again):
        m.add({"loss": torch.tensor(4.0)})
    assert again.pop() == metrics.pop() == {"loss": 2.5}


# ----------------------------------------------------------------------------------------- logger


def events_of(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    return events.Reload()


def scalars_of(folder, name):
    return [(event.step, event.value) for event in events_of(folder).Scalars(name)]


def moving_square(n, size=(48, 32)):
    """(n, height, width, 3): a white square that moves a pixel a frame."""
    frames = np.zeros((n, *size, 3), np.uint8)
    for t in range(n):
        frames[t, 4:12, 2 + t : 10 + t] = 255
    return frames


def frames_of(gif):
    """Frames (T, height, width, 3) and the milliseconds that each is shown."""
    frames, durations = [], []
    with Image.open(io.BytesIO(gif)) as image:
        assert image.format == "GIF"
        for t in range(image.n_frames):
            image.seek(t)
            frames.append(np.asarray(image.convert("RGB")))
            durations.append(image.info["duration"])
    return np.stack(frames), durations


def test_scalars_are_rows_of_json_and_of_tensorboard(tmp_path):
    logger = Logger(tmp_path)
    logger.scalars(1000, {"train/return": 12.5, "train/length": 500})
    logger.scalars(1000, {"loss/image": 2.0})
    logger.scalars(2000, {"train/return": 13.25, "train/length": 500})
    assert len(rows_of(tmp_path)) == 3, "rows are on the disk at once"
    logger.close()
    assert rows_of(tmp_path) == [
        {"step": 1000, "train/return": 12.5, "train/length": 500},
        {"step": 1000, "loss/image": 2.0},
        {"step": 2000, "train/return": 13.25, "train/length": 500},
    ]
    assert scalars_of(tmp_path, "train/return") == [(1000, 12.5), (2000, 13.25)]
    assert scalars_of(tmp_path, "loss/image") == [(1000, 2.0)]
    tags = events_of(tmp_path).Tags()["scalars"]
    assert sorted(tags) == ["loss/image", "train/length", "train/return"]


def test_a_video_is_a_file_and_an_image_of_tensorboard_that_moves(tmp_path):
    logger = Logger(tmp_path)
    logger.video(3000, "evaluation", moving_square(6), fps=20)
    logger.close()
    events = events_of(tmp_path)
    assert events.Tags()["images"] == ["video/evaluation"]
    (image,) = events.Images("video/evaluation")
    assert (image.step, image.height, image.width) == (3000, 48, 32)
    assert image.encoded_image_string == (tmp_path / "videos/evaluation-3000.gif").read_bytes()
    frames, _ = frames_of(image.encoded_image_string)
    np.testing.assert_array_equal(frames, moving_square(6))
    assert all((frames[t] != frames[t + 1]).any() for t in range(5))
    assert names(tmp_path / "videos") == ["evaluation-3000.gif"]


def log_steps(logger, steps, offset=0.0):
    for step in steps:
        logger.scalars(step, {"loss": step + offset})


def test_a_restored_logger_cuts_off_what_came_after_the_checkpoint(tmp_path):
    first = Logger(tmp_path)
    log_steps(first, [1, 2, 3])
    early = first.state_dict()
    log_steps(first, [4, 5])
    state = first.state_dict()
    log_steps(first, [6, 7, 8])
    first.video(8, "evaluation", moving_square(3), fps=20)
    first.close()

    second = Logger(tmp_path, state)
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3, 4, 5]
    log_steps(second, [6, 7], offset=0.5)
    later = second.state_dict()
    log_steps(second, [8, 9], offset=0.5)
    second.close()

    third = Logger(tmp_path, later)
    log_steps(third, [8], offset=0.25)
    third.close()
    expected = [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 6.5), (7, 7.5), (8, 8.25)]
    assert scalars_of(tmp_path, "loss") == expected
    assert [(row["step"], row["loss"]) for row in rows_of(tmp_path)] == expected
    assert events_of(tmp_path).Tags()["images"] == []

    fourth = Logger(tmp_path, early)  # an older checkpoint: files that it knows nothing of go
    log_steps(fourth, [4])
    fourth.close()
    assert scalars_of(tmp_path, "loss") == [(1, 1), (2, 2), (3, 3), (4, 4)]
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3, 4]


def test_a_logger_whose_process_was_killed_is_restored_from_its_checkpoint(tmp_path):
    """Half a line, and half a record of TensorBoard's, lie after what the checkpoint knows of."""
    logger = Logger(tmp_path)
    log_steps(logger, [1, 2])
    state = json.loads(json.dumps(logger.state_dict()))
    logger.close()
    for path in (tmp_path / "metrics.jsonl", *tmp_path.glob("events.*")):
        with path.open("ab") as file:
            file.write(b'{"step": 3, "lo')
    again = Logger(tmp_path, state)
    log_steps(again, [3])
    again.close()
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3]
    assert scalars_of(tmp_path, "loss") == [(1, 1), (2, 2), (3, 3)]


def test_a_logger_without_a_state_starts_from_nothing(tmp_path):
    logger = Logger(tmp_path)
    log_steps(logger, [1, 2])
    logger.close()
    (tmp_path / "config.json").write_text("{}")
    again = Logger(tmp_path)
    log_steps(again, [5])
    again.close()
    assert [row["step"] for row in rows_of(tmp_path)] == [5]
    assert scalars_of(tmp_path, "loss") == [(5, 5)]
    assert (tmp_path / "config.json").exists()


# ----------------------------------------------------------------------------------------- videos


def test_a_gif_has_the_frames_their_size_and_their_rate():
    frames = moving_square(7, size=(48, 32))
    decoded, durations = frames_of(utils.encode_gif(frames, fps=20))
    np.testing.assert_array_equal(decoded, frames)
    assert durations == [50] * 7
    with Image.open(io.BytesIO(utils.encode_gif(frames, fps=10))) as image:
        assert image.size == (32, 48) and image.info["loop"] == 0
        assert image.info["duration"] == 100


def test_a_gif_of_a_picture_that_stands_still_lasts_as_long():
    """Equal frames may become one that is shown longer."""
    frames = moving_square(6)
    frames[2:5] = frames[2]
    decoded, durations = frames_of(utils.encode_gif(frames, fps=20))
    assert sum(durations) == 300
    np.testing.assert_array_equal(decoded[0], frames[0])
    np.testing.assert_array_equal(decoded[-1], frames[-1])


@pytest.mark.parametrize("fps", [100 / 3, 40])
def test_a_gif_plays_at_a_rate_that_is_no_whole_number_of_hundredths(fps):
    """A GIF counts in hundredths of a second: 33.3 a second are 3 of them, 40 are 2 and 3."""
    frames = moving_square(20, size=(24, 40))
    _, durations = frames_of(utils.encode_gif(frames, fps=fps))
    assert sum(durations) == pytest.approx(20 * 1000 / fps, rel=0.05)


def test_a_gif_of_a_coloured_picture_is_near_the_picture():
    y, x = np.mgrid[:64, :64]
    picture = np.stack([4 * x, 4 * y, 255 - 2 * (x + y)], -1).clip(0, 255).astype(np.uint8)
    frames = np.stack([picture, picture[::-1], picture[:, ::-1]])
    decoded, _ = frames_of(utils.encode_gif(frames, fps=20))
    assert decoded.shape == frames.shape
    assert np.abs(decoded.astype(int) - frames).mean() < 8


def test_a_gif_is_saved_whole(tmp_path):
    gif = utils.save_gif(tmp_path / "x.gif", moving_square(4), fps=20)
    assert (tmp_path / "x.gif").read_bytes() == gif == utils.encode_gif(moving_square(4), 20)
    assert names(tmp_path) == ["x.gif"]


def test_floats_become_bytes():
    floats = np.array([-1, 0, 0.5 / 255, 1.4 / 255, 0.5, 254.6 / 255, 1, 7], np.float32)
    result = utils.to_uint8(floats)
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result[[0, 1, 3, 4, 5, 6, 7]], [0, 0, 1, 128, 255, 255, 255])
    np.testing.assert_array_equal(utils.to_uint8(np.arange(256) / 255), np.arange(256))


def test_one_thread_inside_and_as_many_as_before_outside():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyError), utils.one_thread():
            assert torch.get_num_threads() == 1
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_free_memory_is_a_number_of_gigabytes():
    assert 0 < utils.free_memory_gb(torch.device("cpu")) < 1e5


SYSTEM = {"/proc/meminfo": "MemTotal: 9000000 kB\n\nMemAvailable:  8000000 kB\n"}
GROUP = {
    "/sys/fs/cgroup/memory.max": "3000000000\n",
    "/sys/fs/cgroup/memory.current": "2500000000\n",
    "/sys/fs/cgroup/memory.stat": "anon 1000\ninactive_file 500000000\nactive_file 7\n",
}


@pytest.mark.parametrize(
    "files, gigabytes",
    [
        ({}, 4.0),
        (SYSTEM, 8.192),
        (SYSTEM | GROUP, 1.0),
        (SYSTEM | GROUP | {"/sys/fs/cgroup/memory.max": "max\n"}, 8.192),
        (SYSTEM | GROUP | {"/sys/fs/cgroup/memory.max": "90000000000\n"}, 8.192),
        (SYSTEM | GROUP | {"/sys/fs/cgroup/memory.max": "1000000\n"}, 0.0),
        (SYSTEM | GROUP | {"/sys/fs/cgroup/memory.stat": ""}, 8.192),
        ({"/proc/meminfo": "MemTotal: 9000000 kB\n"}, 4.0),
    ],
)
def test_free_memory_is_the_systems_or_the_containers(files, gigabytes, monkeypatch):
    def read(path):
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(Path, "read_text", read)
    assert utils.free_memory_gb(torch.device("cpu")) == gigabytes


# ------------------------------------------------------------------------------------ progress bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """The module's time, which a test moves by hand."""
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(utils, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    return now


def test_without_a_terminal_there_is_a_line_a_minute(clock, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    bar = utils.ProgressBar(total=1000, step=0)
    for step in range(1, 401):
        bar.update(step, f"return {step}")
        clock.seconds += 0.5
    bar.write("a line of its own")
    bar.close()
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == "a line of its own"
    assert len(lines) == 4  # at the start and after 60, 120 and 180 of 200 seconds
    for line, step in zip(lines, (1, 121, 241, 361)):
        assert f"{step}/1000" in line and f"return {step}" in line
    assert "2.0" in lines[-1] and "frame/s" in lines[-1]
    assert sys.stderr.getvalue() == ""


def test_without_a_terminal_the_rate_is_that_of_this_process(clock, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    bar = utils.ProgressBar(total=2000, step=1000)
    clock.seconds += 100
    bar.update(1500, "")
    line = capsys.readouterr().out
    assert "1500/2000" in line and "5.00frame/s" in line and "01:40<01:40" in line


def test_a_bar_on_a_terminal_shows_where_the_run_stands(clock, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", Terminal())
    bar = utils.ProgressBar(total=1000, step=200)
    bar.update(600, "return 7")
    bar.write("a line of its own")
    bar.update(1003, "return 8")
    bar.close()
    shown = sys.stderr.getvalue()
    assert "200/1000" in shown and "600/1000" in shown and "return 7" in shown
    assert "1000/1000" in shown and "return 8" in shown
    assert capsys.readouterr().out.splitlines() == ["a line of its own"]


def test_a_run_past_its_end_is_told_of_once_and_then_as_often_as_before(clock, capsys):
    """As where a restored run has fewer frames to go than it has behind it."""
    bar = utils.ProgressBar(total=100, step=160)
    for _ in range(200):
        bar.update(160, "")
        clock.seconds += 1
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 4 and "-" not in out  # no negative rate


def test_a_bar_on_a_terminal_is_drawn_twice_a_second_at_most(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    bar = utils.ProgressBar(total=1000, step=0)
    for step in range(100):
        bar.update(step, f"return {step}.")
        clock.seconds += 0.125
    shown = sys.stderr.getvalue()
    assert [f"return {step}." in shown for step in range(100)] == [True, False, False, False] * 25


def test_the_rate_on_a_terminal_counts_the_steps_that_add_no_frame(clock, monkeypatch):
    """A hundred frames at once after 10 seconds without one: 10 frames/s, 90 seconds left."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    bar = utils.ProgressBar(total=1000, step=0)
    bar._bar._time = lambda: clock.seconds
    bar._bar.start_t = clock.seconds
    for _ in range(10):
        bar.update(0, "")
        clock.seconds += 1
    bar.update(100, "")
    assert "100/1000 [00:10<01:30, 10.00frame/s" in sys.stderr.getvalue()


# ------------------------------------------------------------------------- capture, where it fails


@pytest.fixture
def no_card(monkeypatch):
    """`torch.cuda` as far as `utils.capture` uses it, on a machine without a card."""

    emulated_card.install(monkeypatch)


@pytest.mark.parametrize("call", [1, 4])
def test_a_capture_that_fails_is_undone_and_warned_of(no_card, monkeypatch, capsys, call):
    """In the first of the three calls before the capture, or in the capture itself."""
    calls, undone = [], []
    monkeypatch.setattr(utils, "_failed", [])

    def fails():
        calls.append(None)
        if len(calls) == call:
            raise RuntimeError("operation not permitted\nand more")

    cpu = torch.device("cpu")
    assert utils.capture(fails, cpu, lambda: undone.append(len(calls))) is fails
    assert undone == [call]
    assert len(utils._failed) == 1  # kept, as PyTorch's allocator refers to it
    assert capsys.readouterr().err.splitlines() == [
        "warning: CUDA capture failed, going on without it: operation not permitted"
    ]


def test_a_failed_capture_that_spoils_the_generator_names_the_way_out(no_card, monkeypatch):
    def fails(*arguments, **named):
        raise RuntimeError("Offset increment outside graph capture")

    monkeypatch.setattr(torch, "rand", fails)
    with pytest.raises(utils.RunError, match="--eager"):
        utils.capture(fails, torch.device("cpu"))
