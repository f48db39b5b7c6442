"""What a run survives: kills, a full disk, many iterations."""

import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SHORT_RUN, files_below, flags, folder, run, train, wait_for
from kill_run import contents, differences, rows_of

import utils


def test_a_run_killed_in_every_phase_equals_one_that_was_never_killed(tmp_path):
    """The short form of `python tests/kill_run.py --kills 50`."""
    command = [sys.executable, "tests/kill_run.py", "--kills", "8"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "| all, each restored | 8 |" in result.stdout
    assert "Differences: none." in result.stdout


def test_the_comparison_of_runs_sees_what_differs(finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    one, two = folder(finished), folder(tmp_path)
    assert differences(one, two) == []
    with (two / "metrics.jsonl").open("a") as file:
        file.write('{"step": 240, "train/return": 1.0}\n')
    logger = utils.Logger(two, {path.name: 10**9 for path in two.iterdir() if path.is_file()})
    logger.video(240, "evaluation", np.zeros((2, 8, 8, 3), np.uint8), 10)
    logger.close()
    (two / "episodes" / ".x.npz.tmp").write_bytes(b"")
    path = utils.checkpoints(two / "checkpoints")[-1]
    state = utils.load_checkpoint(path)
    state["agent"]["networks"]["actor.net.0.bias"][0] += 1e-7
    state["random"]["torch"][0] += 1
    state["progress"]["updates"] += 1
    state["every"]["video"] += 1
    state["episodes"].reverse()
    utils.save_checkpoint(path, state)
    assert differences(one, two) == list(contents(one))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of 1 MB, and a function that mounts it with other options."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if not shutil.which("mount"):
        pytest.skip("no mount command here")

    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    if not mount("size=1m"):
        pytest.skip("only root may mount a file system")
    yield disk, lambda options: mount(f"remount,{options}")
    subprocess.run(["umount", disk], check=True)


def test_a_disk_that_is_full_is_one_line_and_the_run_goes_on_when_there_is_room(
    finished, small_disk
):
    disk, remount = small_disk
    command = [sys.executable, "dreamer.py", "--train", *flags(**SHORT_RUN, logdir=disk)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stdout + result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and "No space left on device" in lines[0]
    for path in utils.checkpoints(folder(disk) / "checkpoints"):
        utils.load_checkpoint(path)
    assert remount("size=100m")
    words = flags(env="cartpole-balance", logdir=disk)
    assert run("--train", "--restore", *words) == 0
    assert differences(folder(finished), folder(disk)) == []


def test_a_folder_that_may_not_be_written_is_one_line_and_stays_as_it_was(
    finished, small_disk, capsys
):
    disk, remount = small_disk
    assert remount("size=100m")
    shutil.copytree(finished, disk, dirs_exist_ok=True)
    before = files_below(disk)
    assert remount("ro")
    words = flags(env="cartpole-balance", logdir=disk)
    for command in (
        ["--train", "--exp=another"],
        ["--train", "--restore", "--total-steps=280"],
        ["--evaluate", "--restore"],
    ):
        assert run(*command, *words) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and "Read-only file system" in lines[0]
    assert files_below(disk) == before


MEMORY_AND_FILES = """
import json, os, sys
sys.path.insert(0, "tests")
import conftest
import dreamer

seen, end = [], dreamer.Trainer.end_iteration

def spy(self):
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    seen.append((pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))))
    return end(self)

dreamer.Trainer.end_iteration = spy
code = conftest.train(*sys.argv[1:], **{
    "time_limit": 12, "collect_steps": 12, "seed_steps": 24, "total_steps": 2400,
    "update_steps": 1, "pretrain_steps": 1, "eval_interval": 240, "checkpoint_interval": 240,
    "video_interval": 240, "buffer_gb": 0.001,
})
print(json.dumps([code, seen]))
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="reads Linux's /proc")
def test_memory_and_open_files_stay_flat_over_200_iterations(tmp_path):
    """In a process of its own, where nothing else comes and goes."""
    command = [sys.executable, "-c", MEMORY_AND_FILES, str(tmp_path)]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    code, seen = json.loads(out.splitlines()[-1])
    memory, files = np.array(seen).T
    assert code == 0 and len(seen) == 199
    assert files[-50:].max() <= files[20:70].max()
    assert memory[-20:].mean() - memory[40:60].mean() < 8e6, memory.tolist()


TUNED = """
import sys, resource, torch, dreamer
code = dreamer.main(["--evaluate", "--restore", "--logdir", sys.argv[1]])
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    before = faults()
    torch.ones(2**24)  # 16384 pages
print(code, faults() - before, (torch.full((99,), 1e-20) ** 2).sum().item())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that is told")
def test_a_command_keeps_freed_memory_and_takes_denormals_as_zero(tmp_path):
    command = [sys.executable, "-c", TUNED, str(tmp_path)]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    code, faults, denormals = out.split()
    assert (code, float(denormals)) == ("2", 0)
    assert int(faults) < 1000


# ------------------------------------------------- evaluation in processes of its own


def test_evaluation_in_processes_finds_the_same(finished, tmp_path):
    # That there are processes is shown below.
    assert train(tmp_path, vector_env="async") == 0
    assert differences(folder(finished), folder(tmp_path)) == []


def members(process) -> int:
    """Processes of its group, by Linux's /proc."""
    groups = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # one may end meanwhile
            groups.append(int(path.read_text().rpartition(")")[2].split()[2]))
    return groups.count(process.pid)


def group_is_alive(process) -> bool:
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.skipif(os.name != "posix", reason="process groups are POSIX")
@pytest.mark.parametrize(
    "number, code",
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)],
)
def test_no_worker_outlives_its_run_nor_takes_its_signals(tmp_path, number, code):
    """Ctrl-C and a scheduler's SIGTERM reach every process; SIGKILL here only the run itself."""
    more = {"total_steps": 10**5, "vector_env": "async", "logdir": tmp_path}
    command = [sys.executable, "dreamer.py", "--train", *flags(**{**SHORT_RUN, **more})]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    wait_for("eval/return_mean", process, tmp_path)
    if os.path.isdir("/proc/self"):
        assert members(process) >= 5  # itself, two workers, the fork server and its tracker
    if number == signal.SIGKILL:
        process.kill()
    else:
        os.killpg(process.pid, number)
    assert process.wait(timeout=120) == code
    deadline = time.monotonic() + 60
    while group_is_alive(process) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not group_is_alive(process)
    if number != signal.SIGKILL:  # after a kill the workers complain as they end
        assert "Traceback" not in (tmp_path / "log").read_text()


def in_a_session(code):
    """A process that runs `code` as the leader of a group of its own."""
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=subprocess.PIPE)


@pytest.mark.skipif(os.name != "posix", reason="process groups are POSIX")
def test_workers_that_begin_take_no_signals():
    """Ctrl-C all the while that they are made; the process that makes them notes it."""
    code = (
        "import env_wrapper, os, signal, threading, time\n"
        "seen, made = [], threading.Event()\n"
        "for number in (signal.SIGINT, signal.SIGTERM):\n"
        "    signal.signal(number, lambda *arguments: seen.append(arguments[0]))\n"
        "def shoot():\n"
        "    while not made.wait(0.05):\n"
        "        for number in (signal.SIGINT, signal.SIGTERM):\n"
        "            os.killpg(0, number)\n"
        "thread = threading.Thread(target=shoot)\n"
        "env_wrapper.choose_gl()  # before, as that waits for a process of its own\n"
        "thread.start()\n"
        "envs = env_wrapper.make_vector_env(2, True, 'cartpole-balance')\n"
        "envs.reset(seed=[1, 2])\n"
        "made.set(); thread.join(); envs.close()\n"
        "print(sorted({int(number) for number in seen}))"
    )
    process = in_a_session(code)
    try:
        assert process.communicate(timeout=90)[0] == b"[2, 15]\n" and process.returncode == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def in_a_shell(command: str, **options):
    """What a shell makes of a command line in which `dreamer` stands for the program."""
    line = command.replace("dreamer", f"'{sys.executable}' dreamer.py")
    return subprocess.run(
        ["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, check=False, **options
    )


@pytest.mark.skipif(os.name != "posix", reason="a shell of POSIX")
@pytest.mark.parametrize("lines", [1, 6])
def test_a_run_whose_output_nobody_reads_is_saved_and_goes_on(lines, finished, tmp_path):
    """At once, and at the first evaluation."""
    words = flags(**{**SHORT_RUN, "logdir": tmp_path})
    first = in_a_shell(
        f"dreamer --train {' '.join(words)} | head -{lines}; exit ${{PIPESTATUS[0]}}"
    )
    assert first.returncode == 2 and len(first.stdout.splitlines()) == lines
    assert first.stderr == ("stopped by standard output: Broken pipe; --train --restore goes on\n")
    assert len(utils.checkpoints(folder(tmp_path) / "checkpoints")) > lines // 6
    assert run("--train", "--restore", *words) == 0
    assert differences(folder(finished), folder(tmp_path)) == []


@pytest.mark.skipif(os.name != "posix", reason="a shell of POSIX")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_the_exit_code_holds_where_no_stream_is_read(unbuffered, finished):
    """Of a wrong command line, of an error, of a run that is complete."""
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    words = " ".join(flags(env="cartpole-balance", logdir=finished))
    for command in ("--restore", f"--train {words}", f"--train --restore {words}"):
        line = f"dreamer {command} 2>&1 | true; exit ${{PIPESTATUS[0]}}"
        assert in_a_shell(line, env=environment).returncode == 2


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_ctrl_c_that_ended_the_reader_of_a_pipe_too(unbuffered, tmp_path):
    more = {"total_steps": 10**5, "eval_interval": 0, "logdir": tmp_path}
    process = subprocess.Popen(
        [sys.executable, "dreamer.py", "--train", *flags(**{**SHORT_RUN, **more})], cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    wait_for("loss/world", process, tmp_path)
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 130 and process.stderr.read() == ""


@pytest.mark.skipif(os.name != "posix", reason="a shell of POSIX")
def test_an_evaluation_whose_output_nobody_reads_is_written(finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    words = " ".join(flags(env="cartpole-balance", logdir=tmp_path))
    result = in_a_shell(f"dreamer --evaluate --restore {words} | true; exit ${{PIPESTATUS[0]}}")
    assert result.returncode == 2
    assert result.stderr == (
        "dreamer.py: error: standard output: Broken pipe; all the rest is done\n"
    )
    assert (folder(tmp_path) / "evaluation-240.json").exists()
    assert (folder(tmp_path) / "videos" / "evaluation-240-open_loop.gif").exists()


@pytest.mark.skipif(os.name != "posix", reason="a shell of POSIX")
@pytest.mark.parametrize(
    "streams, encoding", [("2>&-", "utf-8"), (">&- 2>&-", "utf-8"), ("", "ascii")]
)
def test_a_run_without_streams_or_with_few_characters(streams, encoding, finished, tmp_path):
    words = " ".join(flags(**{**SHORT_RUN, "logdir": tmp_path}))
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    result = in_a_shell(f"dreamer --train {words} {streams}", env=environment)
    assert (result.returncode, result.stderr) == (0, "")
    assert differences(folder(finished), folder(tmp_path)) == []
    assert encoding == "utf-8" or "frames: evaluation" in result.stdout


def test_logs_that_became_shorter_are_named_and_stay_readable(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    metrics = folder(tmp_path) / "metrics.jsonl"
    before = metrics.read_text().splitlines()
    os.truncate(metrics, metrics.stat().st_size - 20)
    (events,) = folder(tmp_path).glob("events.*")
    events.unlink()
    words = flags(env="cartpole-balance", logdir=tmp_path, total_steps=280)
    assert run("--train", "--restore", *words) == 0
    out = capsys.readouterr().out
    assert f"{metrics} is shorter" in out and f"{events} is shorter" in out
    rows = rows_of(folder(tmp_path))
    assert rows[: len(before) - 1] == [json.loads(line) for line in before[:-1]]
    assert rows[-1]["step"] == 280


@pytest.mark.skipif(os.name != "posix", reason="process groups are POSIX")
def test_a_process_that_fails_ends_though_its_workers_were_not_closed():
    code = (
        "import env_wrapper, multiprocessing\n"
        "envs = env_wrapper.make_vector_env(2, True, 'cartpole-balance')\n"
        "kept = envs.reset, envs\n"
        "print(len(multiprocessing.active_children()), flush=True)\n"
        "raise SystemExit(7)"
    )
    process = in_a_session(code)
    assert process.wait(timeout=120) == 7
    assert process.stdout.read() == b"2\n"
    deadline = time.monotonic() + 60
    while group_is_alive(process) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not group_is_alive(process)
