"""The DeepMind Control Suite from pixels, behind the Gymnasium API.

    env = make_env("cartpole-balance", seed=1)
    obs, info = env.reset(seed=7)            # (64, 64, 3) uint8
    obs, reward, terminated, truncated, info = env.step(action)      # action in [-1, 1]

dm_control is imported when the first environment is made, because the GL back-end can only be
chosen before that.
"""

import atexit
import contextlib
import difflib
import functools
import multiprocessing
import multiprocessing.resource_tracker
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import ClassVar

import gymnasium as gym
import numpy as np

SIZE = 64  # pixels of an observation, height and width
ALIASES = {"cup": "ball_in_cup", "pointmass": "point_mass"}  # short names in common use

# What software GL draws cheaper, by domain or task: width and height of the shadow map, and rings
# of triangles on round bodies. With these all but one pixel in a thousand stay within 8 of 255 of
# the suite's.
SUITE_QUALITY, CHEAP_QUALITY = (2048, 16), (1024, 16)
QUALITY = {
    "cartpole": (768, 12),
    "cheetah": (768, 12),
    "walker": (768, 16),
    "dog": SUITE_QUALITY,
    "humanoid_CMU": SUITE_QUALITY,
    "quadruped-escape": SUITE_QUALITY,
    "reacher": SUITE_QUALITY,
    "swimmer": SUITE_QUALITY,
}


class EnvironmentProblem(RuntimeError):
    """What the user can mend; the message says how."""


class UnknownTask(EnvironmentProblem):
    """The suite has no task of that name."""


class NoRenderer(EnvironmentProblem):
    """No GL back-end can make a context."""


class NoSuite(EnvironmentProblem):
    """dm_control cannot be imported."""


class WorkerDied(EnvironmentProblem):
    """A process of an environment is gone: killed, perhaps because memory ran out."""


_PROBE = """
import mujoco
context = mujoco.GLContext(64, 64)
context.make_current()
mujoco.MjrContext(mujoco.MjModel.from_xml_string("<mujoco/>"), 100)  # GLFW fails only here
context.free()
"""
# An environment variable that this process leaves to its children: what made a context here.
_PROBED = "DREAMER_GL"
_NO_RENDERER = "no OpenGL back-end can render here: neither EGL nor OSMesa makes a context."
_PACKAGES = "On Debian, Ubuntu and Colab: apt-get install -y libegl1 libgl1-mesa-dri libosmesa6"


def choose_gl() -> str | None:
    """Chooses how MuJoCo renders, before anything imports dm_control.

    On Linux a `MUJOCO_GL` that the user set is taken, else GLFW where there is a display, else EGL
    and then OSMesa: the first that makes a real context, in a process of its own (a failed
    attempt would bind PyOpenGL to the wrong platform). Sets and returns `MUJOCO_GL`.

    Raises:
        NoRenderer: none does; the message is two lines, the second the way out.
    """
    if not sys.platform.startswith("linux"):
        return os.environ.get("MUJOCO_GL")
    chosen = os.environ.get("MUJOCO_GL", "").lower()  # MuJoCo takes capitals, dm_control does not
    if chosen and chosen == os.environ.get(_PROBED):
        return chosen
    display = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    for backend in [chosen] if chosen else ["glfw"] * bool(display) + ["egl", "osmesa"]:
        command = [sys.executable, "-c", _PROBE]
        environment = {**os.environ, "MUJOCO_GL": backend}
        try:
            probe = subprocess.run(
                command, env=environment, capture_output=True, timeout=60, check=False
            )
        except subprocess.TimeoutExpired:
            continue
        if probe.returncode == 0:
            os.environ["MUJOCO_GL"] = os.environ[_PROBED] = backend
            return backend
    what = f"MUJOCO_GL={chosen} does not work here; unset it." if chosen else _NO_RENDERER
    raise NoRenderer(f"{what}\n{_PACKAGES}")


def _suite():
    choose_gl()
    import absl.logging

    absl.logging.set_verbosity(absl.logging.ERROR)  # each task would warn of a deprecation
    try:
        from dm_control import suite
    except (AttributeError, ImportError, RuntimeError) as error:
        chosen = os.environ.get("MUJOCO_GL")
        if chosen and chosen != os.environ.get(_PROBED):  # only Linux is probed
            what = f"with MUJOCO_GL={chosen}: unset it"
        else:
            what = "here; what it needs: pip install -r requirements.txt"
        raise NoSuite(f"dm_control cannot be imported ({error}) {what}") from error
    return suite


def parse_task(name: str) -> tuple[str, str]:
    """Domain and task of `name`: "walker-walk", "walker_walk", "ball_in_cup-catch", "cup-catch".

    Raises:
        UnknownTask: with the closest names that exist.
    """
    tasks = {f"{domain}_{task}".lower(): (domain, task) for domain, task in _suite().ALL_TASKS}
    key = name.strip().lower().replace("-", "_")
    for short, domain in ALIASES.items():
        if key.startswith(short + "_"):
            key = domain + key[len(short) :]
    if key in tasks:
        return tasks[key]
    names, wanted = ["-".join(pair) for pair in tasks.values()], key.replace("_", "-")
    close = difflib.get_close_matches(wanted, names, n=3, cutoff=0.4)
    close = close or [each for each in names if wanted and wanted in each.lower()][:3]
    hint = f"; the closest: {', '.join(close)}" if close else ""
    raise UnknownTask(f"the Control Suite has no task {name!r}{hint}")


def canonical_name(name: str) -> str:
    """The one spelling of a task under which its runs are kept: "domain-task".

    Raises:
        UnknownTask: as `parse_task`.
    """
    return "-".join(parse_task(name))


def camera_of(domain: str) -> int:
    """The number of the camera that watches a domain: the first, but of quadruped the third."""
    return 2 if domain == "quadruped" else 0


class ControlSuite(gym.Env):
    """One task of the suite; an action is held for `action_repeat` frames.

    Rewards are summed over the frames of an action, and only the last frame is rendered. After
    `time_limit` frames the episode is truncated, which is not its end in the task's own sense:
    `terminated` is true only where the task itself ended, with discount 0. `info["frames"]` is
    how many frames a step took: fewer than `action_repeat` where an episode ends in between.
    Where the simulation diverges the episode is truncated too, with the last picture once more.

    The state of the random number generator is set afresh by `reset(seed=...)`, so that an
    episode depends on its seed alone.

    Args:
        task: any spelling that `parse_task` takes.
        seed: of the task's construction (few tasks draw their physics there) and of resets
            that name no seed.
        render_mode: "rgb_array" lets `render` return a picture of `render_size` pixels, beside
            the agent's observation.
    """

    metadata: ClassVar = {"render_modes": ["rgb_array"]}

    def __init__(self, task, seed=None, action_repeat=2, time_limit=1000, render_mode=None,
                 render_size=256):  # fmt: skip
        domain, name = self._task = parse_task(task)
        # The time limit is ours alone, in frames: the suite's own is in simulated seconds.
        options = {"random": seed, "time_limit": float("inf")}
        self._env = _suite().load(domain, name, task_kwargs=options)
        self.action_repeat, self.time_limit = action_repeat, time_limit
        self.render_mode, self.render_size = render_mode, render_size
        self._camera = None  # that of observations, made when it is needed
        self._frames, self._image = 0, None
        frame = self._env.control_timestep()  # seconds
        self.metadata = {**self.metadata, "render_fps": 1 / (frame * action_repeat)}
        self._cheap_rendering()
        spec = self._env.action_spec()
        shape = spec.shape
        low = np.broadcast_to(spec.minimum, shape).astype(np.float32)
        high = np.broadcast_to(spec.maximum, shape).astype(np.float32)
        # The controls of the LQR tasks are unbounded, said as 1e10: no range to rescale to.
        low, high = np.where(low < -1e3, -1, low), np.where(high > 1e3, 1, high)
        self.action_space = gym.spaces.Box(low, high, dtype=np.float32)
        self.observation_space = gym.spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8)

    def _cheap_rendering(self) -> None:
        """Settings that are cheap on software GL and change hardly a pixel (see `QUALITY`).

        They must be made before the first context; where `reset` builds the physics anew, this
        is called again.
        """
        self._camera = None
        visual = self._env.physics.model.vis
        size = max(SIZE, self.render_size if self.render_mode else 0)
        visual.global_.offwidth = visual.global_.offheight = size
        domain, name = self._task
        shadows, stacks = QUALITY.get(f"{domain}-{name}", QUALITY.get(domain, CHEAP_QUALITY))
        visual.quality.shadowsize = min(shadows, visual.quality.shadowsize)
        visual.quality.numstacks = min(stacks, visual.quality.numstacks)

    def _observation(self) -> np.ndarray:
        # The suite's own `render` would build a scene for every picture.
        if self._camera is None:
            from dm_control.mujoco import Camera

            self._camera = Camera(self._env.physics, SIZE, SIZE, camera_of(self._task[0]))
        # A view of the camera's buffer that is upside down; PyTorch takes no negative strides.
        return self._camera.render().copy()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self._env.task.random.seed(seed)
        physics = self._env.physics
        self._env.reset()
        if self._env.physics is not physics:
            self._cheap_rendering()
        self._frames, self._image = 0, self._observation()
        return self._image, {}

    def step(self, action):
        from dm_control.rl.control import PhysicsError

        reward, frames, last = 0.0, 0, False
        while frames < self.action_repeat and not last:
            frames += 1
            try:
                step = self._env.step(action)
            except PhysicsError:  # a run would come to it again after every restore
                if not np.isfinite(action).all():  # that is no fault of the simulation
                    raise
                return self._image, float(reward), False, True, {"frames": frames}
            reward += step.reward or 0.0
            last = step.last() or self._frames + frames >= self.time_limit
        self._frames += frames
        terminated = bool(step.last() and step.discount == 0)
        self._image = self._observation()
        info = {"frames": frames}
        return self._image, float(reward), terminated, last and not terminated, info

    def render(self):
        if self.render_mode is None:
            return None
        size = self.render_size
        return self._env.physics.render(size, size, camera_id=camera_of(self._task[0]))

    @property
    def renderer(self) -> str:
        """What draws, by the name that it gives itself: a card, or llvmpipe, the CPU."""
        from OpenGL import GL

        with self._env.physics.contexts.gl.make_current() as context:
            name = context.call(GL.glGetString, GL.GL_RENDERER)
        return name.decode() if name else "unknown"

    def close(self):
        self._env.close()


def make_env(task, seed=None, action_repeat=2, time_limit=1000, render_mode=None) -> gym.Env:
    """The task with actions in [-1, 1], rescaled to the task's own bounds (see `ControlSuite`).

    Raises:
        UnknownTask: the suite has no such task.
        NoRenderer: nothing can render on this machine.
    """
    env = ControlSuite(task, seed, action_repeat, time_limit, render_mode)
    return gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))


def suites_own(task: str, frames: int, action_repeat: int) -> Callable[[], None]:
    """A function that plays random actions without this module's environment, to compare speeds.

    It plays so many frames; an action is held for `action_repeat` of them, and a picture follows.
    """
    domain, name = parse_task(task)
    env = _suite().load(domain, name)
    spec, rng = env.action_spec(), np.random.default_rng(0)
    low, high = np.maximum(spec.minimum, -1), np.minimum(spec.maximum, 1)

    def play():
        env.reset()
        for frame in range(0, frames, action_repeat):
            action = rng.uniform(low, high)
            for _ in range(min(action_repeat, frames - frame)):
                env.step(action)
            env.physics.render(SIZE, SIZE, camera_id=camera_of(domain))

    return play


class _ParallelEnvs(gym.vector.AsyncVectorEnv):
    """A process that is gone raises `WorkerDied` instead of `EOFError` or a broken pipe."""

    def __init__(self, *arguments, **options):
        with self._workers():
            super().__init__(*arguments, **options)

    def reset(self, **options):
        with self._workers():
            return super().reset(**options)

    def step(self, actions):
        with self._workers():
            return super().step(actions)

    @contextlib.contextmanager
    def _workers(self):
        try:
            yield
        except (EOFError, ConnectionError) as error:
            for process in self.processes:
                process.kill()
            self.closed = True  # nothing is left to be closed
            raise WorkerDied(
                "a process of an environment was killed, perhaps because memory ran out; "
                "--vector-env sync needs no more than this one"
            ) from error


def make_vector_env(n: int, parallel: bool, *arguments) -> gym.vector.VectorEnv:
    """`n` environments that are stepped together, `make_env(*arguments)` each.

    In parallel each is a process of its own. These never get Ctrl-C and SIGTERM, which may be sent
    to every process of a group: the process that made them answers, and closes them.

    Raises:
        WorkerDied: one of these is gone; so do `reset` and `step`.
    """
    if not parallel:
        return gym.vector.SyncVectorEnv([lambda: make_env(*arguments)] * n)
    choose_gl()
    atexit.register(_kill_workers)
    # Not forked from here: threads and GL contexts do not survive a fork.
    methods = multiprocessing.get_all_start_methods()
    context = "forkserver" if "forkserver" in methods else "spawn"
    # A worker imports the main module anew, to find what was defined there. Nothing was, and
    # PyTorch would come with it.
    main = sys.modules["__main__"]
    file = main.__dict__.pop("__file__", None)
    try:
        envs = [functools.partial(_make_in_worker, os.getpid(), *arguments)] * n
        with _signals_held():
            return _ParallelEnvs(envs, context=context)
    finally:
        if file is not None:
            main.__file__ = file


@contextlib.contextmanager
def _signals_held():
    """Processes that begin inside never get Ctrl-C and SIGTERM; this one gets them later."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    multiprocessing.resource_tracker.ensure_running()  # which lets them through as it begins
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _kill_workers() -> None:
    """Ends those that nobody closed: multiprocessing would ask by SIGTERM, and wait for ever."""
    for process in multiprocessing.active_children():
        process.kill()


def _make_in_worker(parent: int, *arguments) -> gym.Env:
    if os.getpid() != parent:  # AsyncVectorEnv makes one in its own process too, to look at it
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        os.environ.setdefault("LP_NUM_THREADS", "1")  # Mesa would take all cores in each process
    return make_env(*arguments)
