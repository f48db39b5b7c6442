"""Replay: toy episodes whose every row says which row of which episode it is."""

import calendar
import io
import pickle
import random
import re
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import Payload, mutations

import replay_buffer
from replay_buffer import DamagedEpisode, ReplayBuffer, ReplayError, load_episode

ROW_BYTES = 64 * 64 * 3 + 4 * (2 + 2)  # of an episode with two action dimensions


def toy_episode(number, rows, terminal=False):
    """Every array of row t encodes (number, t)."""
    t = np.arange(rows)
    episode = {
        "image": np.zeros((rows, 64, 64, 3), np.uint8),
        "action": np.stack([np.full(rows, number), t], 1).astype(np.float32),
        "reward": (1000 * number + t).astype(np.float32),
        "discount": np.ones(rows, np.float32),
    }
    episode["image"][..., 0] = number
    episode["image"][..., 1] = t[:, None, None]
    if terminal:
        episode["discount"][-1] = 0
    return episode


def sequences(batch):
    """(episode, first row) of each sequence, after a check that rows are aligned and contiguous."""
    number, t = batch["action"].astype(int).transpose(2, 0, 1)
    length = len(t)
    assert (number == number[0]).all()
    np.testing.assert_array_equal(t, t[0] + np.arange(length)[:, None])
    np.testing.assert_array_equal(batch["reward"], 1000 * number + t)
    image = np.stack([number, t, np.zeros_like(t)], -1).astype(np.uint8)
    assert (batch["image"] == image[:, :, None, None]).all()
    return list(zip(number[0].tolist(), t[0].tolist()))


def filled(capacity, *episodes):
    replay = ReplayBuffer(capacity, actions=2)
    for episode in episodes:
        replay.add(episode)
    return replay


def sample(replay, *arguments, **named):
    """A batch as numpy arrays."""
    return {key: x.numpy() for key, x in replay.sample(*arguments, **named).items()}


def every_start(episodes, length):
    """All starts of sequences in (number, rows) episodes."""
    return {(n, t) for n, rows in episodes for t in range(rows - length + 1)}


def save_episode(folder, episode):
    name = replay_buffer.episode_name(episode)
    with (folder / name).open("wb") as file:
        replay_buffer.write_episode(file, episode)
    return name


def assert_same_batch(one, other):
    assert one.keys() == other.keys()
    for key in one:
        np.testing.assert_array_equal(one[key], other[key])


# ------------------------------------------------------------------------------------------ files


def test_an_episode_survives_the_disk(tmp_path):
    rng = np.random.default_rng(0)
    episode = {
        "image": rng.integers(0, 256, (8, 64, 64, 3), np.uint8),
        "action": rng.uniform(-1, 1, (8, 3)).astype(np.float32),
        "reward": rng.normal(size=8).astype(np.float32),
        "discount": np.array([1] * 7 + [0], np.float32),
    }
    name = save_episode(tmp_path, episode)
    loaded = load_episode(tmp_path / name, actions=3)
    assert_same_batch(loaded, episode)
    assert {key: array.dtype for key, array in loaded.items()} == {
        "image": np.uint8, "action": np.float32, "reward": np.float32, "discount": np.float32,
    }  # fmt: skip


def test_the_file_is_what_the_tools_of_the_field_read(tmp_path):
    name = save_episode(tmp_path, toy_episode(1, 6))
    stamp, length = re.fullmatch(r"(\d{8}T\d{6})-[0-9a-f]{32}-(\d+)\.npz", name).groups()
    assert length == "5"
    assert abs(calendar.timegm(time.strptime(stamp, "%Y%m%dT%H%M%S")) - time.time()) < 60
    with zipfile.ZipFile(tmp_path / name) as archive:
        members = {member.filename: member.compress_type for member in archive.infolist()}
    assert members == {f"{key}.npy": zipfile.ZIP_DEFLATED for key in replay_buffer.KEYS}


def test_names_are_unique():
    assert len({replay_buffer.episode_name(toy_episode(1, 3)) for _ in range(5)}) == 5


def test_a_zero_discount_survives_the_disk_and_the_replay(tmp_path):
    name = save_episode(tmp_path, toy_episode(1, 6, terminal=True))
    replay = filled(20, load_episode(tmp_path / name, 2), toy_episode(2, 6))
    batch = sample(replay, 64, 6, seed=0)
    ends = dict(zip(batch["reward"][-1], batch["discount"].T.tolist()))
    assert ends == {1005: [1, 1, 1, 1, 1, 0], 2005: [1] * 6}


# ---------------------------------------------------------------------------------- damaged files


@pytest.fixture
def whole_file(tmp_path):
    """The bytes of a small episode file, most of them not of the picture."""
    name = save_episode(tmp_path, toy_episode(1, 3))
    return (tmp_path / name).read_bytes()


def assert_damaged(path, data=None):
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(DamagedEpisode) as error:
        load_episode(path, actions=2)
    assert str(error.value)


def test_a_file_that_is_cut_short_is_damaged(tmp_path, whole_file):
    for length in [*range(0, len(whole_file), 13), len(whole_file) - 1]:
        assert_damaged(tmp_path / "x.npz", whole_file[:length])


@pytest.mark.parametrize(
    "data",
    [b"", b"\0" * 500, b"PK\x03\x04" + b"\0" * 500, b"\x93NUMPY\x01\x00" + b"\0" * 200,
     b"hello\n" * 50, np.random.default_rng(0).bytes(5000)],
    ids=["empty", "zeros", "zip magic", "npy magic", "text", "noise"],
)  # fmt: skip
def test_a_file_that_is_something_else_is_damaged(data, tmp_path):
    assert_damaged(tmp_path / "x.npz", data)


def test_a_missing_file_and_a_folder_are_damaged(tmp_path):
    assert_damaged(tmp_path / "absent.npz")
    (tmp_path / "folder.npz").mkdir()
    assert_damaged(tmp_path / "folder.npz")


def test_a_machine_that_cannot_read_is_no_damage(tmp_path, monkeypatch):
    def refuse(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(OSError, match="Input/output"):
        load_episode(tmp_path / "x.npz", actions=2)


def test_a_lone_array_is_damaged(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    assert_damaged(tmp_path / "x.npz", buffer.getvalue())


@pytest.mark.parametrize("key", replay_buffer.KEYS)
def test_a_pickled_array_is_damaged_and_not_run(key, tmp_path):
    marker = tmp_path / "executed"
    episode = {**toy_episode(1, 3), key: np.array([Payload(marker)] * 3, object)}
    np.savez(tmp_path / "x.npz", **episode)
    assert_damaged(tmp_path / "x.npz")
    assert not marker.exists()
    with np.load(tmp_path / "x.npz", allow_pickle=True) as file:
        file[key]
    assert marker.exists(), "the payload would not have run in any case"


def test_a_pickle_is_damaged_and_not_run(tmp_path):
    marker = tmp_path / "executed"
    assert_damaged(tmp_path / "x.npz", pickle.dumps(Payload(marker)))
    assert not marker.exists()


WRONG_ARRAYS = {
    "small pictures": ("image", np.zeros((3, 32, 32, 3), np.uint8)),
    "grey pictures": ("image", np.zeros((3, 64, 64), np.uint8)),
    "float pictures": ("image", np.zeros((3, 64, 64, 3), np.float32)),
    "a picture more": ("image", np.zeros((4, 64, 64, 3), np.uint8)),
    "another task's actions": ("action", np.zeros((3, 6), np.float32)),
    "an action less": ("action", np.zeros((2, 2), np.float32)),
    "flat actions": ("action", np.zeros(3, np.float32)),
    "double actions": ("action", np.zeros((3, 2), np.float64)),
    "a reward less": ("reward", np.zeros(2, np.float32)),
    "one reward": ("reward", np.float32(0)),
    "reward columns": ("reward", np.zeros((3, 1), np.float32)),
    "integer rewards": ("reward", np.zeros(3, np.int32)),
    "foreign byte order": ("reward", np.zeros(3, ">f4")),
    "boolean discounts": ("discount", np.ones(3, bool)),
    "a discount more": ("discount", np.ones(4, np.float32)),
    "reward is NaN": ("reward", np.array([0, np.nan, 0], np.float32)),
    "action is NaN": ("action", np.full((3, 2), np.nan, np.float32)),
    "discount is infinite": ("discount", np.array([1, np.inf, 1], np.float32)),
}


@pytest.mark.parametrize("key, array", WRONG_ARRAYS.values(), ids=WRONG_ARRAYS)
def test_an_array_of_another_kind_is_damaged_and_named(key, array, tmp_path):
    episode = {**toy_episode(1, 3), key: array}
    np.savez_compressed(tmp_path / "x.npz", **episode)
    assert_damaged(tmp_path / "x.npz")
    if np.ndim(array) and len(array) == 3:  # else the number of rows is what disagrees
        with pytest.raises(DamagedEpisode, match=key):
            load_episode(tmp_path / "x.npz", actions=2)


@pytest.mark.parametrize("rows", [0, 1])
def test_an_episode_without_an_action_is_damaged(rows, tmp_path):
    np.savez_compressed(tmp_path / "x.npz", **toy_episode(1, rows))
    assert_damaged(tmp_path / "x.npz")


@pytest.mark.parametrize("key", replay_buffer.KEYS)
def test_an_episode_without_a_key_is_damaged(key, tmp_path):
    episode = toy_episode(1, 3)
    del episode[key]
    np.savez_compressed(tmp_path / "x.npz", **episode)
    assert_damaged(tmp_path / "x.npz")


def npy(header, data=b""):
    """An npy member of version 1 with any header."""
    header = header.encode("latin1")
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


HEADERS = {
    "open bracket": "{'descr': '<f4', 'fortran_order': False, 'shape': (3,",
    "open string": "{'descr': '<f4', 'fortran_order': False, 'shape': '''(3,)}",
    "bad indentation": "{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }\n  x\n y",
    "petabytes": "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000000,), }",
    "overflow": "{'descr': '<f4', 'fortran_order': False, 'shape': (3000000000, 3000000000, 9), }",
    "negative shape": "{'descr': '<f4', 'fortran_order': False, 'shape': (-3,), }",
    "no such type": "{'descr': '<f9', 'fortran_order': False, 'shape': (3,), }",
    "no type": "{'descr': [], 'fortran_order': False, 'shape': (3,), }",
    "no shape": "{'descr': '<f4', 'fortran_order': False, 'shape': (None,), }",
    "unhashable key": "{[]: 1}",
    "zeros": "\0" * 60,
    "deep": "(" * 900,
    "empty": "",
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_an_array_with_a_senseless_header_is_damaged(header, tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, **{k: v for k, v in toy_episode(1, 3).items() if k != "reward"})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("reward.npy", npy(header, b"\0" * 12))
    assert_damaged(path)


def test_a_flipped_byte_in_any_array_is_damaged(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, **toy_episode(1, 3))
    data = path.read_bytes()
    for key, array in toy_episode(1, 3).items():
        at = data.index(array.tobytes()) + array.nbytes // 2
        assert_damaged(path, data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        assert key  # each key's data lies in the file as it is


def test_an_array_that_slipped_by_some_bytes_is_damaged(tmp_path):
    """A header that says it is shorter than it is: the data would begin with the header's end."""
    path = tmp_path / "x.npz"
    np.savez(path, **toy_episode(1, 3))
    data = bytearray(path.read_bytes())
    length = data.index(b"\x93NUMPY") + 8
    assert data[length] == 118 and data[length + 2 : length + 120].endswith(b" " * 12 + b"\n")
    data[length] -= 12
    assert_damaged(path, bytes(data))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_no_mutated_file_is_more_than_damaged(tmp_path, whole_file):
    """It loads as it was, where the byte means nothing, or it is damaged; there is no third way."""
    episode, outcomes = toy_episode(1, 3), Counter()
    path = tmp_path / "x.npz"
    for data in mutations(whole_file, 2000):
        path.write_bytes(data)
        try:
            loaded = load_episode(path, actions=2)
        except DamagedEpisode:
            outcomes["damaged"] += 1
        else:
            assert_same_batch(loaded, episode)
            outcomes["loaded"] += 1
    assert outcomes["damaged"] > 1000 and outcomes["loaded"] > 15


# --------------------------------------------------------------------------------------- sampling


def test_sequences_are_contiguous_aligned_and_of_one_episode():
    episodes = {1: 9, 2: 30, 3: 14}
    replay = filled(100, *(toy_episode(n, rows) for n, rows in episodes.items()))
    batch = sample(replay, 256, 8, seed=0)
    assert {key: (array.shape, array.dtype) for key, array in batch.items()} == {
        "image": ((8, 256, 64, 64, 3), np.uint8),
        "action": ((8, 256, 2), np.float32),
        "reward": ((8, 256), np.float32),
        "discount": ((8, 256), np.float32),
    }
    assert {number for number, _ in sequences(batch)} == set(episodes)


def test_every_start_is_equally_likely_the_last_of_an_episode_included():
    """Of 2 + 6 starts each falls to an eighth of the draws; the short episode has none."""
    replay = filled(30, toy_episode(1, 5), toy_episode(2, 3), toy_episode(3, 9))
    rows = replay.sample_rows(8000, 4, seed=0)
    numbers = replay._rows["action"].numpy()[rows[0]].astype(int)
    counts = Counter(map(tuple, numbers.tolist()))
    assert set(counts) == every_start([(1, 5), (3, 9)], 4)
    assert (3, 5) in counts  # its last row is the episode's last
    chi_squared = sum((n - 1000) ** 2 / 1000 for n in counts.values())
    assert chi_squared < 24.3  # seven degrees of freedom: 0.1 %


@pytest.mark.parametrize("share, within", [(0.0, (0, 5)), (0.25, (220, 280)), (1.0, (1000, 1000))])
def test_a_share_of_the_sequences_begins_where_an_episode_does(share, within):
    """The others are those that are drawn without it, where one in 1495 does by chance."""
    replay = filled(3010, toy_episode(1, 1500), toy_episode(2, 1500))
    rows = replay.sample_rows(1000, 6, 0, share)
    at_first = np.isin(rows[0], (0, 1500))
    assert within[0] <= at_first.sum() <= within[1]
    drawn = replay.sample_rows(1000, 6, 0)
    np.testing.assert_array_equal(rows[:, ~at_first], drawn[:, ~at_first])
    np.testing.assert_array_equal(rows[0] // 1500, drawn[0] // 1500)
    assert (np.diff(rows, axis=0) == 1).all()


@pytest.mark.parametrize("order", [(4, 2, 4), (2, 4, 2), (2, 2, 4), (4, 4, 2)])
def test_episodes_shorter_than_a_sequence_are_never_sampled(order):
    episodes = list(enumerate(order, 1))
    replay = filled(20, *(toy_episode(n, rows) for n, rows in episodes))
    assert set(sequences(sample(replay, 64, 4, seed=1))) == every_start(episodes, 4)


def test_an_episode_of_exactly_one_sequence_is_sampled_whole():
    replay = filled(10, toy_episode(1, 6))
    assert sequences(sample(replay, 3, 6, seed=0)) == [(1, 0)] * 3


@pytest.mark.parametrize("episodes", [[], [4], [4, 3, 4]])
def test_no_episode_that_is_long_enough_is_said(episodes):
    replay = filled(20, *(toy_episode(n, rows) for n, rows in enumerate(episodes)))
    with pytest.raises(ReplayError, match="train-seq-len") as error:
        sample(replay, 2, 5, seed=0)
    assert "\n" not in str(error.value)


def test_sampling_of_another_length_and_after_another_episode():
    """What is remembered about the starts must not outlive an `add`."""
    replay = filled(40, toy_episode(1, 5))
    assert set(sequences(sample(replay, 64, 4, seed=0))) == every_start([(1, 5)], 4)
    assert set(sequences(sample(replay, 64, 5, seed=0))) == every_start([(1, 5)], 5)
    replay.add(toy_episode(2, 6))
    for length in (4, 5):
        found = set(sequences(sample(replay, 64, length, seed=0)))
        assert found == every_start([(1, 5), (2, 6)], length)


def test_the_same_seed_gives_the_same_batch():
    replay = filled(60, toy_episode(1, 30), toy_episode(2, 30))
    first = sample(replay, 16, 5, seed=(1, 2, 3))
    assert_same_batch(sample(replay, 16, 5, seed=(1, 2, 3)), first)
    other = sample(replay, 16, 5, seed=(1, 2, 4))
    assert sequences(other) != sequences(first)


def test_a_batch_is_a_copy():
    replay = filled(10, toy_episode(1, 6))
    batch = sample(replay, 2, 6, seed=0)
    for array in batch.values():
        array[:] = 77
    sequences(sample(replay, 2, 6, seed=0))


def test_an_episode_is_copied_when_it_is_added():
    episode = toy_episode(1, 6)
    replay = filled(10, episode)
    for array in episode.values():
        array[:] = 77
    sequences(sample(replay, 2, 6, seed=0))


def test_sampling_draws_from_no_global_generator():
    replay = filled(20, toy_episode(1, 10))
    state = random.getstate(), np.random.get_state()
    sample(replay, 8, 4, seed=0)
    assert random.getstate() == state[0]
    for now, before in zip(np.random.get_state(), state[1]):
        np.testing.assert_array_equal(now, before)
    np.random.seed(1)
    random.seed(1)
    batch = sample(replay, 8, 4, seed=0)
    np.random.seed(2)
    random.seed(2)
    assert_same_batch(sample(replay, 8, 4, seed=0), batch)


def test_on_a_device_the_rows_stay_there():
    """On the meta device a tensor that was left on the CPU raises."""
    replay = ReplayBuffer(20, actions=2, device="meta")
    replay.add(toy_episode(1, 12))
    replay.add(toy_episode(2, 12))  # over the ring's end
    batch = replay.sample(3, 5, seed=0)
    assert {x.device.type for x in batch.values()} == {"meta"}
    assert batch["image"].shape == (5, 3, 64, 64, 3) and batch["reward"].shape == (5, 3)
    assert "on meta" in str(replay)


# --------------------------------------------------------------------------------------- the ring


def test_the_oldest_leave_first_and_only_where_there_is_no_room():
    replay = filled(20, toy_episode(1, 8), toy_episode(2, 8))
    assert (len(replay), replay.rows) == (2, 16)
    replay.add(toy_episode(3, 4))
    assert (len(replay), replay.rows) == (3, 20)
    replay.add(toy_episode(4, 4))
    assert (len(replay), replay.rows) == (3, 16)
    found = set(sequences(sample(replay, 256, 3, seed=0)))
    assert found == every_start([(2, 8), (3, 4), (4, 4)], 3)
    replay.add(toy_episode(5, 15))
    assert (len(replay), replay.rows) == (2, 19)
    found = set(sequences(sample(replay, 256, 3, seed=0)))
    assert found == every_start([(4, 4), (5, 15)], 3)


def test_an_episode_over_the_end_of_the_ring_is_sampled_right():
    replay = filled(20, toy_episode(1, 8), toy_episode(2, 8), toy_episode(3, 8))
    rows = replay.sample_rows(256, 6, seed=0)
    assert ((rows[0] > 14) & (rows[-1] < 5)).any(), "no sequence runs over the end"
    assert rows.min() >= 0 and rows.max() < 20
    found = set(sequences(sample(replay, 256, 6, seed=0)))
    assert found == every_start([(2, 8), (3, 8)], 6)


def test_the_ring_against_a_list():
    """Many episodes of random lengths: always the newest that fit, and nothing but them."""
    rng = np.random.default_rng(0)
    capacity, kept = 37, []
    replay = ReplayBuffer(capacity, actions=2)
    for number in range(25):
        rows = int(rng.integers(2, 20))
        replay.add(toy_episode(number, rows))
        kept.append((number, rows))
        while sum(n for _, n in kept) > capacity:
            kept.pop(0)
        assert (len(replay), replay.rows) == (len(kept), sum(n for _, n in kept))
        found = set(sequences(sample(replay, 300, 2, seed=number)))
        assert found == every_start(kept, 2)


def test_an_episode_as_large_as_the_ring_fits_and_a_larger_one_does_not():
    replay = filled(10, toy_episode(1, 4), toy_episode(2, 4))
    with pytest.raises(ReplayError, match="buffer-gb") as error:
        replay.add(toy_episode(3, 11))
    assert "\n" not in str(error.value)
    assert set(sequences(sample(replay, 64, 4, seed=0))) == {(1, 0), (2, 0)}
    replay.add(toy_episode(4, 10))
    assert (len(replay), replay.rows) == (1, 10)
    assert set(sequences(sample(replay, 64, 10, seed=0))) == {(4, 0)}


def test_a_replay_that_is_filled_again_gives_the_same_batches(tmp_path):
    """From files, and from the kept episodes alone, which then lie elsewhere in the ring."""
    lengths = [7, 9, 5, 12, 6, 8, 11]
    replay, names = ReplayBuffer(30, actions=2), []
    for number, rows in enumerate(lengths):
        episode = toy_episode(number, rows)
        names.append(save_episode(tmp_path, episode))
        replay.add(episode)
    assert len(replay) < len(lengths)
    again = ReplayBuffer(30, actions=2)
    for name in names[-len(replay) :]:
        again.add(load_episode(tmp_path / name, actions=2))
    assert again._episodes != replay._episodes
    for seed in range(5):
        assert_same_batch(sample(again, 16, 4, (1, seed)), sample(replay, 16, 4, (1, seed)))
    for number in (20, 21, 22):
        replay.add(toy_episode(number, 9))
        again.add(toy_episode(number, 9))
        assert_same_batch(sample(again, 16, 4, number), sample(replay, 16, 4, number))


# ----------------------------------------------------------------------------------------- memory


def test_rows_for_so_much_memory():
    assert ReplayBuffer.rows_for((1000 * ROW_BYTES + 1) / 1e9, actions=2) == 1000
    assert ReplayBuffer.rows_for((1000 * ROW_BYTES - 1) / 1e9, actions=2) == 999
    assert ReplayBuffer.rows_for(1, actions=6) == 1_000_000_000 // 12_320
    assert ReplayBuffer.rows_for(0, actions=2) == 0


def test_gigabytes_are_those_of_the_rows_in_use():
    replay = ReplayBuffer(50, actions=2)
    assert replay.gigabytes == 0
    replay.add(toy_episode(1, 10))
    assert replay.gigabytes == pytest.approx(10 * ROW_BYTES / 1e9)
    replay.add(toy_episode(2, 40))
    replay.add(toy_episode(3, 5))
    assert replay.gigabytes == pytest.approx(45 * ROW_BYTES / 1e9)
    assert ReplayBuffer.rows_for(replay.gigabytes * (1 + 1e-9), actions=2) == 45


@pytest.mark.parametrize("episodes", [100, 1000])
def test_sampling_takes_as_long_from_many_episodes_as_from_few(episodes):
    replays = [filled(n * 21, *(toy_episode(1, 21) for _ in range(n))) for n in (10, episodes)]
    seconds = [], []
    for i in range(30):
        for replay, times in zip(replays, seconds):
            replay.add(toy_episode(1, 21))  # as in an iteration
            start = time.perf_counter()
            sample(replay, 16, 16, seed=i)
            times.append(time.perf_counter() - start)
    few, many = np.median(seconds, 1)
    assert many < 4 * few + 0.002
