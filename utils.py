"""What every training script needs and no algorithm: files, random states, signals, logs and
videos, and the machine: CUDA graphs, timing, memory.
"""

import ctypes
import errno
import functools
import gc
import io
import json
import math
import os
import platform
import random
import signal
import sys
import time
import warnings
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

try:
    import fcntl
    import resource
except ImportError:  # Windows has neither advisory locks of this kind nor usage figures
    fcntl = resource = None


class RunError(RuntimeError):
    """Something about a run or a flag that the user can mend; the message is one line."""


class Stopped(Exception):
    """A signal or the time limit asked for an end; `code` is the exit code."""

    def __init__(self, reason: str, code: int):
        super().__init__(reason)
        self.code = code


# ----------------------------------------------------------------------------------------- files


@contextmanager
def atomic_file(path: Path):
    """Yields a binary file that becomes `path` at the end, whole, or leaves nothing behind."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes a rename in `folder` survive a power cut, where system and mount can do that."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a mount that knows no such thing
                raise
        finally:
            os.close(descriptor)


def clear_temporaries(folder: Path) -> None:
    """Removes what a killed process left half-written in `folder`."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def write_json(path: Path, value) -> None:
    """Writes `value` as JSON, atomically."""
    with atomic_file(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


# ----------------------------------------------------------------------------------- checkpoints


def save_checkpoint(path: Path, state: dict) -> None:
    """Writes tensors and plain Python values, atomically."""
    # In memory first: writing a file, PyTorch makes an error of its own of a full disk.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with atomic_file(path) as file:
        file.write(buffer.getbuffer())


def load_checkpoint(path: Path) -> dict:
    """Reads what `save_checkpoint` wrote, onto the CPU; code in the file is never run.

    Raises:
        RunError: no such file, or no checkpoint of this program, or not as it was written.
    """
    if not path.is_file():
        raise RunError(f"no checkpoint at {path}")
    data = io.BytesIO(path.read_bytes())
    try:
        # PyTorch reads past a wrong checksum: weights with a flipped bit would go unnoticed.
        damaged = zipfile.ZipFile(data).testzip()
        if damaged:
            raise zipfile.BadZipFile(damaged)
        data.seek(0)
        state = torch.load(data, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise whatever a damaged archive provokes
        if out_of_memory(error):  # no fault of the file
            raise
        raise RunError(f"{path} is not a checkpoint, or is damaged") from error
    parts = ("agent", "config", "progress")
    if not isinstance(state, dict) or not all(isinstance(state.get(k), dict) for k in parts):
        raise RunError(f"{path} is not a checkpoint of this program")
    return state


BEST = "-best"  # ends the name of a copy, see `copy_best`


def step_of(checkpoint: Path) -> int:
    """The frames that its name tells."""
    return int(checkpoint.stem.removesuffix(BEST))


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first: `<step>.pt`, and before it `<step>-best.pt`."""
    files = (p for p in folder.glob("*.pt") if p.stem.removesuffix(BEST).isdecimal())
    return sorted(filter(Path.is_file, files), key=lambda p: (step_of(p), p.stem.isdecimal()))


def copy_best(folder: Path, step: int) -> None:
    """Copies the checkpoint of the best evaluation to `<step>-best.pt`, if that is not there yet,
    before another one of the same step takes its place.
    """
    copy = folder / f"{step}{BEST}.pt"
    if not copy.exists():
        with atomic_file(copy) as file:
            file.write((folder / f"{step}.pt").read_bytes())


def prune_checkpoints(folder: Path, keep: int, best: int | None) -> None:
    """Removes all but the newest `keep` checkpoints and what there is of step `best`."""
    paths = checkpoints(folder)
    newest = [path for path in paths if path.stem.isdecimal()][-keep:]
    for path in paths:
        if path not in newest and step_of(path) != best:
            path.unlink(missing_ok=True)


# --------------------------------------------------------------------------------- random numbers


def random_state() -> dict:
    """The state of every global generator, in types that a safe checkpoint may hold."""
    kind, keys, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if cards() else []
    return {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def set_random_state(state: dict) -> None:
    """Undoes whatever was drawn since `random_state` gave `state`."""
    kind, keys, *rest = state["numpy"]
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    for device, generator in zip(range(cards()), state["cuda"]):
        torch.cuda.set_rng_state(generator.cpu(), device)


def seed_everything(seed: int) -> None:
    """Seeds every global generator."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def stream_seed(*key: int) -> int:
    """A seed for the stream that the integers `key` name; different keys share nothing."""
    # A seed sequence pads with zeros: the length tells (1,) from (1, 0).
    return int(np.random.SeedSequence((len(key), *key)).generate_state(1)[0])


@contextmanager
def isolated_random(seed: int):
    """Inside, generators start from `seed`; outside, nothing was drawn."""
    state = random_state()
    seed_everything(seed)
    try:
        yield
    finally:
        set_random_state(state)


# -------------------------------------------------------------------------- triggers and signals


class Every:
    """Due once in each `interval` of steps, whatever the size of the steps; 0 is never."""

    def __init__(self, interval: int, last: int = 0):
        self.interval, self.last = interval, last

    def due(self, step: int) -> bool:
        """True if `step` lies in a later interval than the last firing."""
        return self.interval > 0 and step // self.interval > self.last // self.interval

    def fired(self, step: int) -> None:
        """Notes that what was due at `step` is done."""
        self.last = step


class StopSignal:
    """Turns SIGINT, SIGTERM and a time limit into `Stopped`, raised where `check` is called.

    A further SIGINT ends the process at once, but not within a second of the first signal:
    `timeout` sends each twice.
    """

    def __init__(self, max_hours: float | None = None):
        self._deadline = time.monotonic() + max_hours * 3600 if max_hours is not None else None
        self._signal, self._since = None, None

    def __enter__(self):
        self._previous = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number, _frame):
        now = time.monotonic()
        if self._signal is None:
            self._signal, self._since = number, now
        elif number == signal.SIGINT and now - self._since > 1:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def check(self) -> None:
        """Raises `Stopped` if an end was asked for."""
        if self._signal is not None:
            name = signal.Signals(self._signal).name
            raise Stopped(name, 128 + self._signal)
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise Stopped("--max-hours", 0)


_lost_output = {}  # why a stream can no longer be written, by its name


def say(text: str, stream: str = "stdout") -> None:
    """Prints a line. Where that fails, as in a closed pipe, `lost_output` tells."""
    file = getattr(sys, stream)
    try:
        print(text, file=file, flush=True)
    except OSError as error:
        _lost_output[stream] = error.strerror or str(error)
        # What is still in its buffer would fail once more at the end of the process.
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), file.fileno())


def lost_output() -> str | None:
    """Why standard output could not be written, if so."""
    return _lost_output.get("stdout")


def open_streams() -> None:
    """Makes the standard streams such that no character fails, and that there are all of them."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed when the process began
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
            setattr(sys, name, stream)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")


@contextmanager
def run_lock(folder: Path):
    """Holds `folder/lock` while a process uses the run; the system frees it when that one dies.

    Raises:
        RunError: another process holds it.
    """
    with (folder / "lock").open("a+") as file:
        if fcntl:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(f"the run {folder} is in use by another process") from None
            except OSError:  # a file system without locks, as some network mounts are
                pass
        yield


# -------------------------------------------------------------------------------- logs and videos


class MeanMetrics:
    """Means of scalars that stay on their device until they are read."""

    def __init__(self):
        self.sums, self.count = {}, 0

    def add(self, metrics: dict) -> None:
        """Adds scalar tensors by name, without a synchronization."""
        for name, value in metrics.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()
        self.count += 1

    def pop(self) -> dict:
        """The means as Python numbers; starts again from nothing."""
        result = {name: total.item() / self.count for name, total in self.sums.items()}
        self.sums, self.count = {}, 0
        return result

    def state_dict(self) -> dict:
        return {"sums": self.sums, "count": self.count}

    def load_state_dict(self, state: dict) -> None:
        self.sums, self.count = dict(state["sums"]), state["count"]


class Logger:
    """Scalars to `metrics.jsonl` and TensorBoard, videos to TensorBoard and `videos/`.

    The files only grow, so their sizes say what had been written at a checkpoint: `state_dict`
    gives them, and a logger that is made with that state cuts off what came after. A file that has
    become shorter is named, and `metrics.jsonl` loses its unfinished row.
    """

    def __init__(self, folder: Path, state: dict | None = None):
        from tensorboard.compat.proto.event_pb2 import Event  # slow to import
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.folder = folder
        (folder / "videos").mkdir(exist_ok=True)
        sizes = state or {}
        for path in self._files():
            size = sizes.get(path.name, 0)
            if size == 0:
                path.unlink()
            elif path.stat().st_size > size:
                os.truncate(path, size)
        self._name_shorter(sizes)
        self._jsonl = (folder / "metrics.jsonl").open("a")
        # note: TensorBoard's own writer is a thread, in which a full disk would end in a traceback
        self._events = RecordWriter((folder / f"events.out.tfevents.{time.time_ns()}").open("ab"))
        header = Event(wall_time=time.time(), file_version="brain.Event:2")
        self._events.write(header.SerializeToString())

    def _name_shorter(self, sizes: dict) -> None:
        here = {path.name: path for path in self._files()}
        for name, size in sizes.items():
            if size and (name not in here or here[name].stat().st_size < size):
                say(f"{self.folder / name} is shorter than it was, or gone: rows are lost")
                if name in here and name.endswith(".jsonl"):
                    os.truncate(here[name], here[name].read_bytes().rfind(b"\n") + 1)

    def _files(self) -> list[Path]:
        return [*self.folder.glob("metrics.jsonl"), *self.folder.glob("events.out.tfevents.*")]

    def state_dict(self) -> dict:
        """The size of each file in bytes; what `metrics.jsonl` holds is on the disk."""
        os.fsync(self._jsonl.fileno())
        return {path.name: path.stat().st_size for path in self._files()}

    def scalars(self, step: int, values: dict) -> None:
        """One row: `values` by name, at `step` environment frames."""
        row = {k: v if math.isfinite(v) else None for k, v in values.items()}  # JSON has no NaN
        self._jsonl.write(json.dumps({"step": step, **row}) + "\n")
        self._jsonl.flush()
        self._event(step, [{"tag": name, "simple_value": x} for name, x in values.items()])

    def video(self, step: int, name: str, frames: np.ndarray, fps: float) -> None:
        """`frames` (T, height, width, 3) uint8 as `videos/<name>-<step>.gif` and in TensorBoard."""
        gif = save_gif(self.folder / "videos" / f"{name}-{step}.gif", frames, fps)
        height, width = frames.shape[1:3]
        # TensorBoard's own add_video needs moviepy; a GIF is an image to it, and it moves.
        image = {"height": height, "width": width, "colorspace": 3, "encoded_image_string": gif}
        self._event(step, [{"tag": f"video/{name}", "image": image}])

    def _event(self, step: int, values: list[dict]) -> None:
        """Writes an event of TensorBoard's, `values` as fields of its `Summary.Value`."""
        from tensorboard.compat.proto.event_pb2 import Event

        event = Event(wall_time=time.time(), step=step, summary={"value": values})
        self._events.write(event.SerializeToString())
        self._events.flush()

    def close(self) -> None:
        self._jsonl.close()
        self._events.close()


class ProgressBar:
    """One live bar over the steps of a run; lines, a minute apart, where output is no terminal;
    nothing unless `shown`.
    """

    def __init__(self, total: int, step: int, shown: bool = True):
        self._lines = shown and not (sys.stderr.isatty() or "ipykernel" in sys.modules)
        step = min(step, total)
        self._total, self._first, self._started = total, step, time.monotonic()
        self._next, self._complete = self._started, False
        # Most updates are gradient steps, which take long and add no frame: only the rate of the
        # whole process tells the time left.
        options = {"total": total, "initial": step, "unit": "frame", "dynamic_ncols": True}
        self._bar = tqdm(**options, smoothing=0, disable=self._lines or not shown)

    def update(self, step: int, text: str) -> None:
        """Shows where the run stands: frames, rate and time left, then `text`."""
        step, now = min(step, self._total), time.monotonic()
        if now < self._next and (step < self._total or self._complete):
            return
        self._complete = step == self._total
        self._next = now + (60 if self._lines else 0.5)
        if self._lines:
            meter = {"initial": self._first, "unit": "frame", "postfix": text, "ncols": 0}
            elapsed = now - self._started
            say(tqdm.format_meter(step, self._total, elapsed, **meter))
        else:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.n = step
            self._bar.refresh()

    def write(self, line: str) -> None:
        """A line of its own, above the bar."""
        with tqdm.external_write_mode():
            say(line)

    def close(self) -> None:
        self._bar.close()


def bar(items: list, name: str):
    """Iterates over `items`, with a bar of that name where there is a terminal."""
    return tqdm(items, desc=name, leave=False, disable=None)


def encode_gif(frames: np.ndarray, fps: float, limit: int = 1_000_000) -> bytes:
    """A looping GIF of `frames` (T, height, width, 3) uint8.

    All frames share one palette of 128 colours, so that what stands still is stored once: a sixth
    of the size with a palette for each frame. A film of more than `limit` bytes loses its end.
    """
    sample = np.concatenate(list(frames[:: max(1, len(frames) // 8)]), axis=1)
    palette = Image.fromarray(sample).quantize(128, dither=Image.Dither.NONE)
    images = [
        Image.fromarray(x).quantize(palette=palette, dither=Image.Dither.NONE) for x in frames
    ]
    # GIF counts in hundredths of a second: each frame ends at the nearest one.
    ends = np.round(np.arange(len(images) + 1) * 100 / fps)
    durations = (10 * np.diff(ends)).astype(int).tolist()
    while True:
        buffer = io.BytesIO()
        options = {"append_images": images[1:], "duration": durations[: len(images)], "loop": 0}
        images[0].save(buffer, format="GIF", save_all=True, optimize=False, **options)
        size = buffer.tell()
        if size <= limit or len(images) == 1:
            return buffer.getvalue()
        images = images[: max(1, int(0.95 * len(images) * limit / size))]


def save_gif(path: Path, frames: np.ndarray, fps: float) -> bytes:
    """Writes `encode_gif` to a file, atomically, and returns it."""
    gif = encode_gif(frames, fps)
    with atomic_file(path) as file:
        file.write(gif)
    return gif


def to_uint8(image: np.ndarray) -> np.ndarray:
    """Floats in [0, 1], clipped, as bytes."""
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


# ------------------------------------------------------------------------------------- the machine


def cards() -> int:
    """CUDA devices that can be used: a driver that is too old counts those that it cannot start."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


_failed = []  # graphs whose capture failed: PyTorch's allocator still refers to them


def capture(function, device: torch.device, undo=lambda: None):
    """`function`, which takes nothing, as one CUDA graph; itself where it cannot be captured.

    It must read and write tensors that stay where they are, and never wait for the device. What
    it returns is overwritten by the next call. Before the capture it is run three times, as
    libraries choose and allocate in their first calls; `undo` then takes back what those changed.
    Random numbers are put back here.
    """
    before = torch.cuda.get_rng_state(device)
    with torch.cuda.device(device):
        side, main = torch.cuda.Stream(), torch.cuda.current_stream()
        gc.collect()  # a dead graph that is collected in mid-capture would invalidate it
        graph, cause, reason = torch.cuda.CUDAGraph(), None, None
        try:
            side.wait_stream(main)
            with torch.cuda.stream(side), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*capturable")  # not captured yet
                for _ in range(3):
                    function()
            main.wait_stream(side)
            # Another thread may draw the next batch meanwhile. The stream is that of the first
            # calls, so that each graph has its own workspace of cuBLAS: a shared one would be freed
            # with the first graph.
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                try:
                    output = function()
                except RuntimeError as error:
                    cause = error  # where a capture fails its end raises too, and says less
                    raise
        except RuntimeError as error:
            cause = cause or error
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            reason = str(cause).splitlines()[0]
            cause = None
            _failed.append(graph)
        finally:
            torch.cuda.set_stream(main)  # a capture that failed leaves its own in force
            torch.cuda.synchronize()
            undo()
            torch.cuda.set_rng_state(before, device)
    if reason is not None:
        try:
            torch.rand((), device=device)
        except RuntimeError as error:  # PyTorch before 2.13: the generator still captures
            raise RunError(f"CUDA capture failed: {reason}; --eager goes without it") from error
        torch.cuda.set_rng_state(before, device)
        say(f"warning: CUDA capture failed, going on without it: {reason}", "stderr")
        return function

    def replay():
        graph.replay()
        return output

    return replay


class Beside:
    """A context whose work on a card runs beside what is queued from here on, until it ends.

    It begins when what was queued before this object was made is done. Tensors that were made
    before and are read inside must stay alive until its end.
    """

    def __init__(self, device: torch.device):
        self.device, self.stream = device, _second_stream(device)
        self.stream.wait_stream(torch.cuda.current_stream(device))

    def __enter__(self):
        self._inside = torch.cuda.stream(self.stream)
        self._inside.__enter__()

    def __exit__(self, *error):
        self._inside.__exit__(*error)
        if error[0] is None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)


@functools.cache  # in a graph a new one would have its workspace of cuBLAS in that graph's memory
def _second_stream(device: torch.device):
    return torch.cuda.Stream(device)


def median_seconds(device: torch.device, function, repeats: int) -> float:
    """Median seconds of `repeats` calls, after one that does not count if there are several.

    Work that is still queued on the device is waited for.
    """
    seconds = []
    for _ in range(repeats + (repeats > 1)):
        _wait(device)
        start = time.perf_counter()
        function()
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[-repeats:]))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of this machine in a square matrix product that fills it, median of five."""
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / median_seconds(device, lambda: a @ a, 5)


def tune_process() -> None:
    """Settings of this process that its speed depends on; before anything is computed.

    Denormal numbers count as zero. On a card, convolutions in float32 do not use TF32. And
    what is freed is kept: glibc gives a large block back to the system, which clears it page by
    page when the next one is wanted, a fifth of the time of a full-size gradient step
    (results/benchmark.md).
    """
    torch.set_flush_denormal(True)
    torch.backends.cudnn.allow_tf32 = False
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_max = -1, -4  # as in <malloc.h>
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(trim_threshold, -1)  # never shrink the heap
        mallopt(mmap_max, 0)  # every block comes from it


@contextmanager
def one_thread():
    """Inside, PyTorch computes with one thread.

    For many small calls between other work: while PyTorch's threads wait for the next call they
    keep their cores busy, which slows what else needs these, as software rendering does.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def out_of_memory(error: Exception) -> bool:
    """Whether that is what is wrong: on a CPU, PyTorch's allocator has no exception of its own."""
    named = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return named or "allocate memory" in str(error)


def peak_memory_gb(device: torch.device) -> float:
    """The most memory that was in use, in 10^9 bytes: of the device, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 1e9  # with what a graph keeps for itself
    if resource is None:
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss counts bytes there, else KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def free_memory_gb(device: torch.device) -> float:
    """Memory that a device can still give, in 10^9 bytes; 4 where it cannot be told.

    On a CPU the system's, or what a container (cgroup v2) may still take if that is less.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 1e9
    free = []
    with suppress(OSError, ValueError, StopIteration):
        free.append(1024 * _entry(Path("/proc/meminfo"), "MemAvailable:"))
    with suppress(OSError, ValueError, StopIteration):
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        cache = _entry(group / "memory.stat", "inactive_file")  # given back when it is wanted
        free.append(max(0, limit - used + cache))
    return min(free, default=4e9) / 1e9


def _entry(path: Path, name: str) -> int:
    """The number after `name` in a file of such lines."""
    lines = (line.split() for line in path.read_text().splitlines())
    return int(next(words[1] for words in lines if words[:1] == [name]))
