"""Replay: episodes on disk as npz files, their rows in memory, sequences sampled from them.

An episode is a dict of arrays with T + 1 rows. Row t holds the frame, and the action and the
reward that led to it; row 0 has a zero action and a zero reward.

    image    (T + 1, 64, 64, 3) uint8
    action   (T + 1, A) float32
    reward   (T + 1,) float32
    discount (T + 1,) float32: 0 where the task itself ended, 1 everywhere else, at a time limit too
"""

import io
import uuid
import zipfile
from collections import deque
from datetime import datetime, timezone
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor


def layout(rows: int, actions: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type of each array of that many rows, for `actions` action dimensions."""
    return {
        "image": ((rows, 64, 64, 3), "uint8"),
        "action": ((rows, actions), "float32"),
        "reward": ((rows,), "float32"),
        "discount": ((rows,), "float32"),
    }


KEYS = tuple(layout(0, 0))


class DamagedEpisode(ValueError):
    """A file that is not an episode of this task; the message says what is wrong with it."""


class ReplayError(RuntimeError):
    """The replay cannot do what was asked; the message says why and what would help."""


def episode_name(episode: dict) -> str:
    """A name for its file, never the same twice: `<UTC time>-<uuid>-<length>.npz`, in actions."""
    now = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S")
    return f"{now}-{uuid.uuid4().hex}-{len(episode['reward']) - 1}.npz"


def write_episode(file: BinaryIO, episode: dict) -> None:
    """Writes an episode into an open file, compressed."""
    np.savez_compressed(file, **episode)


def load_episode(path: Path, actions: int) -> dict:
    """Reads and checks an episode of a task with `actions` action dimensions.

    Raises:
        DamagedEpisode: absent, cut short, empty, foreign, of another shape or type, or pickled.
        OSError: the machine cannot read it; that is no fault of the file.
    """
    try:
        data = io.BytesIO(path.read_bytes())
    except (FileNotFoundError, IsADirectoryError) as error:
        raise DamagedEpisode(error.strerror) from error
    try:
        with zipfile.ZipFile(data) as archive:
            # Whole members, so that their checksums are compared; `np.load` may read too little.
            members = {key: io.BytesIO(archive.read(f"{key}.npy")) for key in KEYS}
        read = np.lib.format.read_array
        episode = {key: read(member, allow_pickle=False) for key, member in members.items()}
    except Exception as error:  # damage provokes whatever the parsers of zip and npy can raise
        raise DamagedEpisode(f"{type(error).__name__}: {error}") from error
    rows = len(episode["reward"]) if episode["reward"].ndim else 0
    for key, (shape, dtype) in layout(rows, actions).items():
        array = episode[key]
        if rows < 2 or array.shape != shape or array.dtype != dtype:
            raise DamagedEpisode(f"{key} is {array.dtype}{list(array.shape)}")
        if dtype == "float32" and not np.isfinite(array).all():
            raise DamagedEpisode(f"{key} holds numbers that are not finite")
    return episode


def queue_copy(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; a copy to CUDA is queued there, and not waited for."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # from other memory a copy waits
    return tensor.to(device, non_blocking=True)


class ReplayBuffer:
    """The newest episodes in one preallocated ring of rows, the oldest leaving first.

    An episode may run over the ring's end. What is kept and what is sampled depend only on the
    episodes added, in their order, and never on where they lie: a replay that is filled again
    from disk gives the same batches.

    Args:
        capacity: rows; `rows_for` tells how many fit into so much memory.
        actions: action dimensions.
        device: where they lie.
    """

    def __init__(self, capacity: int, actions: int, device: torch.device | str = "cpu"):
        self.capacity, self.device = capacity, torch.device(device)
        self._rows = {
            key: torch.empty(shape, dtype=getattr(torch, dtype), device=device)
            for key, (shape, dtype) in layout(capacity, actions).items()
        }
        self._episodes = deque()  # (first row, rows) of each episode, oldest first
        self._table = np.empty((0, 2), np.int64)  # the same, to compute with
        self._next = 0  # the row after the newest
        self.rows = 0  # rows in use

    @staticmethod
    def rows_for(gigabytes: float, actions: int) -> int:
        """How many rows fit into so many gigabytes (10^9 bytes)."""
        return int(gigabytes * 1e9 // (64 * 64 * 3 + 4 * (actions + 2)))

    @property
    def gigabytes(self) -> float:
        """What the rows in use take, in 10^9 bytes."""
        return self._total_gigabytes * self.rows / self.capacity

    @property
    def _total_gigabytes(self) -> float:
        return sum(tensor.nbytes for tensor in self._rows.values()) / 1e9

    def __len__(self) -> int:
        """Episodes in memory."""
        return len(self._episodes)

    def __str__(self) -> str:
        return f"room for {self.capacity} rows, {self._total_gigabytes:.2f} GB on {self.device}"

    def add(self, episode: dict) -> None:
        """Adds an episode; the oldest leave where there is no room.

        Raises:
            ReplayError: the episode alone is larger than the replay.
        """
        rows = len(episode["reward"])
        if rows > self.capacity:
            raise ReplayError(
                f"an episode of {rows} rows does not fit into a replay of {self.capacity}: "
                "raise --buffer-gb"
            )
        while self.rows + rows > self.capacity:
            self.rows -= self._episodes.popleft()[1]
        where = (self._next + torch.arange(rows, device=self.device)) % self.capacity
        for key, tensor in self._rows.items():
            tensor.index_copy_(0, where, torch.from_numpy(episode[key]).to(self.device))
        self._episodes.append((self._next, rows))
        self._table = np.array(self._episodes, np.int64)
        self._next = (self._next + rows) % self.capacity
        self.rows += rows

    def sample_rows(self, batch: int, length: int, seed, first_share: float = 0.0) -> np.ndarray:
        """Rows of `batch` sequences, (length, batch), each within one episode.

        Every possible start is equally likely; with probability `first_share` a sequence begins
        where its episode does instead. `seed` is anything that numpy's `default_rng` takes; the
        same seed on the same episodes gives the same rows.

        Raises:
            ReplayError: no episode is long enough.
        """
        first, rows = self._table.T
        starts = np.maximum(rows - length + 1, 0)  # of each episode
        if not starts.any():
            raise ReplayError(
                f"no episode has the {length} rows of a training sequence: "
                "lower --train-seq-len or raise --time-limit"
            )
        # The starts of all episodes, one episode after the other; of these a number is drawn.
        ends = starts.cumsum()
        rng = np.random.default_rng(seed)
        draw = rng.integers(ends[-1], size=batch)
        episode = np.searchsorted(ends, draw, side="right")
        offset = draw - (ends - starts)[episode]  # within its episode
        offset[rng.random(batch) < first_share] = 0
        return (first[episode] + offset + np.arange(length)[:, None]) % self.capacity

    def sample(self, batch: int, length: int, seed, first_share: float = 0.0) -> dict[str, Tensor]:
        """A batch of sequences, (length, batch, ...) by key; arguments as `sample_rows`.

        New tensors on the replay's device. On CUDA nothing here waits for it.
        """
        rows = self.sample_rows(batch, length, seed, first_share)
        if self.device.type == "cpu":  # NumPy brings no threads that compete with training's
            return {key: torch.from_numpy(x.numpy()[rows]) for key, x in self._rows.items()}
        where = queue_copy(torch.from_numpy(rows), self.device)
        return {key: tensor[where] for key, tensor in self._rows.items()}
