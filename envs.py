"""Environments with several sensors, each of which drops out now and then.

`MissingSensors` is a Gymnasium wrapper around any environment with continuous observations. The paper's tasks are plain
environments inside it: Multi-Modal Natural MuJoCo (Fig. 4), Table Wiping (`wiping.py`), the toy world (Fig. 1, 19, 20).

    M          number of sensors, in the order of the observation space
    present    (M,) int8, 1 where the sensor was observed; the reading of a missing sensor is zero
    decision   one action, repeated for `action_repeat` simulator steps

    env = make_env("finger_spin", seed=0, missing_rate=0.375)
    observation, info = env.reset()             # {"rgb", "depth", "touch", "present"}
    observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
    envs = make_vector_env("toy", num_envs=8, seed=0)       # eight worker processes

A sensor's space says what it is: uint8 of three axes is colour, float of three axes depth in metres, one axis a vector.
"""

import atexit
import errno
import itertools
import multiprocessing.connection
import os
import re
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, MultiBinary
from gymnasium.utils import RecordConstructorArgs
from gymnasium.vector import AsyncVectorEnv
from gymnasium.vector.async_vector_env import _async_worker

SIZE = 64  # pixels, height and width of every image
MAX_DEPTH = 10.0  # metres, where depth is cut off
IMAGE = Box(0, 255, (SIZE, SIZE, 3), np.uint8)
DEPTH = Box(0, MAX_DEPTH, (SIZE, SIZE, 1), np.float32)
MESA = "/usr/share/glvnd/egl_vendor.d/50_mesa.json"  # OpenGL without a GPU, on Debian and Ubuntu
MAX_SEGMENT = 14  # decisions, the longest missing segment  [code] config
BLOCK = 1000  # decisions for which missing data are drawn at a time where episodes have no time limit
RESERVED = "present action reward continues first serial rendered lying trusted suspicion".split()  # no sensor's

SUITE = {  # task: domain, task, size of the action, number of touch sensors
    "finger_spin": ("finger", "spin", 2, 2),
    "walker_stand": ("walker", "stand", 6, 2),
    "walker_walk": ("walker", "walk", 6, 2),
    "walker_run": ("walker", "run", 6, 2),
    "cup_catch": ("ball_in_cup", "catch", 2, 1),
}
TOY = {  # task: its sensors
    "toy": ("position", "camera"),  # Fig. 1
    "toy_two_cameras": ("front", "rear"),  # Fig. 19
    "toy_xy": ("x", "y"),  # Fig. 20
}
TASKS = (*SUITE, "table_wiping", *TOY)  # time alone ends their episodes
SPLITS = ("train", "eval")


# ---- 1. Missing data ----


def missing_schedule(steps, rate, max_length, rng):
    """Draw when one sensor is missing in an episode: segments of uniform length and start.  Dev. D7

    rate        fraction missing, in [0, 1): exactly round(rate * steps) steps
    max_length  segments last 1 to max_length steps, uniformly; the last is cut to fit
    returns     (steps,) bool, True where missing

    All arrangements on an episode closed to a ring are equally likely: a segment that runs past the end
    continues at the beginning, so every step is missing equally often. Segments do not overlap, but one in 14
    (at 37.5 %) directly follows another.
    """
    total = round(rate * steps)
    lengths = []
    while sum(lengths) < total:
        lengths.append(min(int(rng.integers(1, max_length + 1)), total - sum(lengths)))
    # Shuffle the segments among the single observed steps, which stand here as zeros.
    blocks = rng.permutation(lengths + [0] * (steps - total))
    missing = np.repeat(blocks > 0, np.maximum(blocks, 1))
    return np.roll(missing, rng.integers(steps))


RELEASED_START = {0: 0.0, 0.375: 0.05, 0.75: 0.10}  # nominal rate: chance of a start  [code]


def released_schedule(steps, rate, max_length, rng):
    """Draw by the released code's process: at each observed step a segment may start by chance.  Dev. D7

    Arguments and result as in `missing_schedule`, but the rate is nominal: 0.375 and 0.75 stand for the chances in
    `RELEASED_START`, and are 28.2 % and 45.3 % in fact: segments of 7.5 steps on average between waits of 19 and 9.
    """
    missing = np.zeros(steps, bool)
    t = 0
    while rate > 0 and t < steps:
        t += rng.geometric(RELEASED_START[rate]) - 1  # observed steps before the next start
        length = rng.integers(1, max_length + 1)
        missing[t : t + length] = True
        t += length
    return missing


SCHEDULES = {"exact": missing_schedule, "released": released_schedule}
FAULTS = ("black", "noise", "frozen", "other", "occluded", "bias", "delayed")
DELAY = 5  # decisions


# ---- 2. Sensors that drop out, around any environment ----


class MissingSensors(gymnasium.Wrapper, RecordConstructorArgs):
    """Let each sensor of an environment drop out, by a schedule of its own for every episode.

    env              an environment; `FitSpaces` wraps it first, unless it has the attribute `wanted` (see below)
    missing_rate     fraction of each sensor's readings that are missing, in [0, 1)
    missing_process  a key of SCHEDULES
    remove           names of sensors that are missing for good
    seed             of the first `reset()`

    Observations are a dictionary: each sensor's reading, zero where missing, and `present` (M,) last. `missing`
    (steps, M) is the schedule; `render()` shows the world without failures. `view(seed)` does so only if that was
    the seed of the last seeded reset, to film one of many workers. Before each step, `env.wanted` is set to
    the names of the sensors that work: the environment need not render the others.
    """

    def __init__(self, env, missing_rate=0.375, missing_process="exact", remove=(), seed=None):
        self.env: Any  # it has `wanted`
        RecordConstructorArgs.__init__(self, missing_rate=missing_rate, missing_process=missing_process,
                                       remove=remove, seed=seed)  # fmt: skip
        gymnasium.Wrapper.__init__(self, env if hasattr(env, "wanted") else FitSpaces(env))
        self.sensors = dict(self.env.observation_space.items())
        if missing_process not in SCHEDULES:
            raise ValueError(f"missing_process is {missing_process!r}; choose from {', '.join(SCHEDULES)}")
        if not 0 <= missing_rate < 1:
            raise ValueError(f"missing_rate is {missing_rate}; choose one in [0, 1)")
        if missing_process == "released" and missing_rate not in RELEASED_START:
            raise ValueError(f"missing_rate is {missing_rate}; the released process has 0, 0.375, 0.75")
        for name in self.sensors:
            if name in RESERVED or not re.fullmatch(r"[^/=,]+", name):
                raise ValueError(f"a sensor is named {name!r}; rename it: {', '.join(RESERVED)} and / = , are taken")
        if not set(remove) < set(self.sensors):
            raise ValueError(f"remove is {remove}; choose some of {', '.join(self.sensors)}, not all")
        self.missing_rate, self.missing_process = missing_rate, missing_process
        self.removed = np.array([name in remove for name in self.sensors])  # (M,)
        # A missing sensor reads zero, wherever its own range lies.
        spaces = [(s, Box(np.minimum(x.low, 0), np.maximum(x.high, 0), dtype=x.dtype)) for s, x in self.sensors.items()]
        self.observation_space = Dict([*spaces, ("present", MultiBinary(len(spaces)))])
        self.action_repeat = said(env, "action_repeat", 1)
        self.episode_steps, self.first_seed, self.generator, self.under_way = time_limit(env), seed, None, False

    def reset(self, *, seed=None, options=None):
        """Start an episode; a seed reseeds the environment and the missing data."""
        seed, self.first_seed = self.first_seed if seed is None else seed, None
        if seed is not None or self.generator is None:
            self.generator, self.seed = np.random.default_rng(seed), seed
        # `World` takes the first child of an equal generator: one seed gives the same world at every missing rate.
        _, self.missing_rng = self.generator.spawn(2)
        self.missing, self.t = self.draw_missing(), 0
        self.env.wanted = self.working()
        observation, info = self.env.reset(seed=seed, options=options)
        self.under_way = True
        return self.observe(observation), info

    def step(self, action):
        """Step the environment and read the sensors that work then."""
        if not self.under_way:
            raise gymnasium.error.ResetNeeded("no episode is under way; call reset() first")
        self.t += 1
        if self.t == len(self.missing):
            self.missing = np.concatenate([self.missing, self.draw_missing()])
        self.env.wanted = self.working()
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.under_way = not (terminated or truncated)
        return self.observe(observation), reward, terminated, truncated, info

    def view(self, seed):
        return self.render() if seed == self.seed and self.render_mode == "rgb_array" else None

    def draw_missing(self):
        """(steps, M) bool: an episode's schedule, or that of the next BLOCK steps where there is no time limit."""
        steps = self.episode_steps + 1 if self.episode_steps else BLOCK  # a reset observes before any action
        schedule = SCHEDULES[self.missing_process]
        drawn = [schedule(steps, self.missing_rate, MAX_SEGMENT, self.missing_rng) for _ in self.sensors]
        return np.stack(drawn, 1) | self.removed

    def working(self):
        return [name for name, missing in zip(self.sensors, self.missing[self.t]) if not missing]

    def observe(self, readings):
        """The readings of the sensors that work and are finite, zeros for the others, and `present`."""
        zeros = {name: np.zeros(space.shape, space.dtype) for name, space in self.sensors.items()}
        seen = {name: readings[name] for name in self.working() if np.isfinite(readings.get(name, np.nan)).all()}
        return zeros | seen | {"present": np.array([name in seen for name in self.sensors], np.int8)}


def said(env, name, default):
    """Get an attribute of an environment or of its wrappers, else `default`."""
    return env.get_wrapper_attr(name) if env.has_wrapper_attr(name) else default


def time_limit(env):
    """Decisions of an episode: the registered limit, else the attribute `episode_steps`; None without a limit."""
    return (env.spec.max_episode_steps if env.spec else None) or said(env, "episode_steps", None)


class LyingSensors(gymnasium.Wrapper, RecordConstructorArgs):
    """Make sensors give false readings without a flag: `present` stays 1.

    env      an environment with the attribute `wanted`, see `MissingSensors`, which goes around this wrapper
    faults   {sensor: fault}
    rate     fraction of each of these sensors' readings, in segments as in `missing_schedule`, in [0, 1)
    another  an environment of the same kind for the fault "other"

    black     zeros                             frozen    the last good reading, again and again
    noise     random values of the whole range  other     what another episode gives under the same actions
    occluded  a patch drifts over half of it    delayed   the reading of DELAY steps ago, or the first
    bias      a vector shifted by a quarter of its range, a picture by 8 pixels, each time another way

    `info["lying"]` (M,) int8 tells the truth: 1 where a sensor lies. Raises ValueError for what no sensor can do.
    """

    def __init__(self, env, faults, rate=0.5, another=None):
        self.env: Any
        RecordConstructorArgs.__init__(self, faults=faults, rate=rate, another=another, _disable_deepcopy=True)
        gymnasium.Wrapper.__init__(self, env)
        self.sensors, self.faults = dict(env.observation_space.items()), dict(faults)
        self.rate, self.another = rate, another
        for name, fault in self.faults.items():
            if name not in self.sensors or fault not in FAULTS:
                raise ValueError(f"{name}={fault} is no fault; give a sensor of {', '.join(self.sensors)}, and one of "
                                 + ", ".join(FAULTS))  # fmt: skip
            if fault == "occluded" and len(self.sensors[name].shape) == 1:
                raise ValueError(f"{name}=occluded: a vector has no patch; choose another fault")
            if fault == "other" and another is None:
                raise ValueError(f"{name}=other: give `another` environment, whose readings these are")
        if not 0 <= rate < 1:
            raise ValueError(f"the rate of faults is {rate}; choose one in [0, 1)")
        self.wanted, self.generator, self.episode_steps = list(self.sensors), None, time_limit(env)

    def reset(self, *, seed=None, options=None):
        if seed is not None or self.generator is None:
            self.generator = np.random.default_rng(seed)
        *_, self.rng = self.generator.spawn(3)  # the first two are `World`'s and `MissingSensors`'
        steps, self.t = self.episode_steps + 1 if self.episode_steps else BLOCK, 0
        schedules = {s: missing_schedule(steps, self.rate, MAX_SEGMENT, self.rng) for s in self.faults}
        self.lies = np.stack([schedules.get(s, np.zeros(steps, bool)) for s in self.sensors], 1)  # (steps, M)
        self.good: dict = {name: deque(maxlen=DELAY + 1) for name in self.faults}  # a sensor's last true readings
        self.manner: dict = {}  # how a sensor lies in this segment
        self.env.wanted = {*self.wanted, *self.faults}
        observation, info = self.env.reset(seed=seed, options=options)
        if self.another:
            self.another.wanted = self.env.wanted
            self.others, _ = self.another.reset(seed=int(self.rng.integers(2**31)))
        return self.lie(observation, info)

    def step(self, action):
        self.t += 1
        self.env.wanted = {*self.wanted, *self.faults}
        observation, reward, terminated, truncated, info = self.env.step(action)
        if self.another:
            self.others, _, over, late, _ = self.another.step(action)
            if over or late:
                self.others, _ = self.another.reset()
        observation, info = self.lie(observation, info)
        return observation, reward, terminated, truncated, info

    def lie(self, observation, info):
        """The observation with this step's lies, and the truth about them in `info`."""
        lying = dict(zip(self.sensors, self.lies[self.t % len(self.lies)]))  # a ring: it goes round without a limit
        for name, fault in self.faults.items():
            if name not in observation or (fault == "other" and name not in self.others):  # it was not finite
                lying[name] = False
                continue
            x, box = observation[name], self.sensors[name]
            lying[name] &= fault not in ("frozen", "delayed") or len(self.good[name]) > 0  # is there one to repeat?
            if fault == "delayed" or not lying[name]:
                self.good[name].append(x)
            if lying[name]:
                manner = self.manner.setdefault(name, self.rng.uniform(-1, 1, 4))
                observation[name] = self.reading(name, fault, x, box, manner).astype(box.dtype)
            else:
                self.manner.pop(name, None)
        return observation, info | {"lying": np.array([*lying.values()], np.int8)}

    def reading(self, name, fault, x, box, manner):
        """What the sensor gives instead of x; manner (4,) in [-1, 1] stays the same in a segment."""
        span = np.where(np.isfinite(box.high) & np.isfinite(box.low), box.high.astype(float) - box.low, 2 + 2 * abs(x))
        if fault == "black":
            return np.zeros_like(x)
        if fault == "noise":
            return box.low + span * self.rng.random(x.shape) if box.is_bounded() else x + self.rng.normal(0, span)
        if fault == "other":
            return self.others[name]
        if fault in ("frozen", "delayed"):
            return self.good[name][-1 if fault == "frozen" else 0]
        if fault == "bias" and x.ndim == 1:
            return np.clip(x + np.sign(np.resize(manner, len(x))) * span / 4, box.low, box.high)
        if fault == "bias":
            return np.roll(x, np.where(manner[:2] < 0, -8, 8), (0, 1))
        half = round(SIZE / 2**0.5)  # the side of a square of half the picture
        row, column = ((SIZE - half) * (0.5 + 0.5 * np.sin(3 * manner[:2] + 0.2 * manner[2:] * self.t))).astype(int)
        x = x.copy()
        x[row : row + half, column : column + half] = 0
        return x

    def close(self):
        self.env.close()
        if self.another:
            self.another.close()


class FitSpaces(gymnasium.ObservationWrapper, RecordConstructorArgs):
    """Bring anybody's environment into the forms that the model reads.

    sensors  the boxes of a `Dict`, nested names joined by dots; or one `Box`, which becomes `state`
    colour   uint8 (H, W, 3), (H, W, 1) or (H, W), or floats (H, W, 3) in [0, 1]  -> uint8 (64, 64, 3)
    depth    floats (H, W, 1) in metres; NaN and infinity count as far            -> float32 (64, 64, 1), at most 10
    vector   (D,) or () of any numbers                                            -> float32 (D,)
    camera   the rendered picture, added if the environment was made with render_mode="rgb_array"
    action   floats of a bounded Box                                              <- float32 (A,) in [-1, 1]

    Images are stretched to a square, by means over areas. Raises ValueError, in one line, for any other space.
    """

    rendered = False  # whether any environment of this process has rendered

    def __init__(self, env):
        self.env: Any
        RecordConstructorArgs.__init__(self)
        gymnasium.Wrapper.__init__(self, env)
        self.name = env.spec.id if env.spec else type(env.unwrapped).__name__
        sensors = list(flatten(env.observation_space))
        if not 0 < len(sensors) == len(dict(sensors)):
            raise ValueError(f"{self.name} has sensors {[name for name, _ in sensors]}; give each a name of its own")
        self.forms = {name: self.form(name, space) for name, space in sensors}
        self.unit = {name for name, space in sensors if self.forms[name] is IMAGE and space.high.max() <= 1}
        self.camera = env.render_mode == "rgb_array" and "camera" not in self.forms
        self.forms |= {"camera": IMAGE} if self.camera else {}
        self.observation_space, self.wanted = Dict(list(self.forms.items())), list(self.forms)
        box = self.env.action_space
        if not isinstance(box, Box) or box.dtype.kind != "f" or not box.is_bounded() or 0 in box.shape:
            raise ValueError(f"{self.name} has actions {box}; allowed is a bounded Box of floats: wrap the environment")
        self.action_space = Box(-1, 1, (int(np.prod(box.shape)),), np.float32)

    def form(self, name, space):
        """The space of one sensor as the model reads it."""
        if isinstance(space, Box) and 0 not in space.shape:
            floats, axes, channels = space.dtype.kind == "f", len(space.shape), space.shape[2:]
            low, high = space.low.min(), space.high.max()
            unit = floats and low >= 0 and high <= 1
            if axes < 2:
                with np.errstate(over="ignore"):
                    low, high = (bound.astype(np.float32).reshape(-1) for bound in (space.low, space.high))
                return Box(low, high, dtype=np.float32)
            if space.dtype == np.uint8 and (axes == 2 or channels in ((1,), (3,))) or unit and channels == (3,):
                return IMAGE
            if floats and channels == (1,) and not unit and not -np.inf < low < 0 and not 200 < high < 10**6:
                return DEPTH  # else it may be grey, or in millimetres
        raise ValueError(f"{self.name}: sensor {name!r} is {space}; allowed are vectors, images (channels last) of "
                         "uint8 in grey or colour or of floats within [0, 1] in colour, and depth (H, W, 1) of "
                         "floats in metres from 0 to above 1 (at most 200): wrap the environment")  # fmt: skip

    def step(self, action):
        box = self.env.action_space
        share = (np.clip(np.asarray(action, np.float64), -1, 1).reshape(box.shape) + 1) / 2
        action = np.clip(box.low + share * (box.high - box.low), box.low, box.high).astype(box.dtype)
        return super().step(action)

    def observation(self, observation):
        """Every reading in its form; `camera` only if it is wanted."""
        readings = dict(flatten(observation))
        if self.camera and "camera" in self.wanted:
            FitSpaces.rendered, readings["camera"] = True, self.env.render()
        readings = {s: x for s, x in readings.items() if s not in self.unit or np.isfinite(x).all()}
        return {s: fit(readings[s], form, s in self.unit) for s, form in self.forms.items() if s in readings}


def flatten(tree, name=""):
    """The (name, leaf) pairs of nested dictionaries or spaces, names joined by dots; a leaf alone is `state`."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from flatten(value, f"{name}.{key}" if name else f"{key}")
    else:
        yield name or "state", tree


def fit(reading, space, unit=False):
    """One reading in the form of its space: a vector, DEPTH or IMAGE, whose values are given in [0, 1] if `unit`."""
    reading = np.asarray(reading)
    if len(space.shape) == 1:
        return reading.astype(np.float32).reshape(-1)
    image = reading.reshape(*reading.shape[:2], -1).astype(np.float32)  # (H, W, channels)
    if space == DEPTH:  # in half precision, which the replay keeps
        return resize(np.fmin(image, MAX_DEPTH).clip(0)).astype(np.float16).astype(np.float32)
    image = resize(255 * image if unit else image)
    return np.broadcast_to(image.round().clip(0, 255), IMAGE.shape).astype(np.uint8)


def resize(image):
    """(H, W, channels) -> (64, 64, channels): the mean over the area of each new pixel."""
    height, width, channels = image.shape
    rows = (area_weights(height) @ image.reshape(height, -1)).reshape(SIZE, width, channels)
    return area_weights(width) @ rows


@cache
def area_weights(n):
    """(64, n): the share that each of n pixels in a row has in each of 64 new ones."""
    edges = np.arange(SIZE + 1)[:, None] * n / SIZE
    overlap = np.minimum(edges[1:], np.arange(1, n + 1)) - np.maximum(edges[:-1], np.arange(n))
    return (overlap.clip(0) * SIZE / n).astype(np.float32)


# ---- 3. The worlds of this project ----


class World(gymnasium.Env):
    """What our own environments share: seeds, the time limit, and rendering only the sensors that are `wanted`."""

    action_repeat: int
    episode_steps: int
    info: dict
    begin: Callable  # (rng): start an episode
    move: Callable  # (action) -> reward, whether it ended the episode
    sense: Callable  # (names) -> {name: reading}

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}
    render_mode = "rgb_array"

    def __init__(self, spaces, action_size):
        self.observation_space, self.wanted = Dict(list(spaces.items())), list(spaces)
        self.action_space = Box(-1, 1, (action_size,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        rng, _ = self.np_random.spawn(2)  # the second is that of `MissingSensors`
        self.t = 0
        self.begin(rng)
        return self.sense(self.wanted), dict(self.info)

    def step(self, action):
        self.t += 1
        reward, terminated = self.move(np.clip(action, -1, 1))
        return self.sense(self.wanted), reward, terminated, self.t >= self.episode_steps, dict(self.info)


def choose_renderer():
    """Let MuJoCo draw without a screen, and without a GPU unless MUJOCO_EGL_DEVICE_ID names one."""
    os.environ.setdefault("MUJOCO_GL", "egl")
    if Path(MESA).exists() and "MUJOCO_EGL_DEVICE_ID" not in os.environ:
        # A picture takes one core a millisecond. Eight processes that draw on one GPU hang with some drivers
        # (github.com/google-deepmind/mujoco/issues/3444), and the learner needs the GPU.
        os.environ.setdefault("__EGL_VENDOR_LIBRARY_FILENAMES", MESA)
        os.environ.setdefault("LP_NUM_THREADS", "0")  # every environment has a process already


def import_renderer():
    """dm_control's module for OpenGL contexts, or RuntimeError with the packages to install."""
    choose_renderer()
    try:
        from dm_control import _render
    except AttributeError as error:  # PyOpenGL found no library
        raise RuntimeError("no OpenGL: install libegl1 and libgl1, or libosmesa6 with MUJOCO_GL=osmesa") from error
    return _render


def open_backgrounds(source, split):
    """Return a function draw(rng) that picks a video and returns an endless iterator of its frames.

    source  "procedural" (Dev. D21), or a path to files, see `backgrounds.py`
    split   "train" or "eval": no scene or clip is in both
    """
    if source == "procedural":
        return lambda rng: procedural_video(2 * int(rng.integers(2**31)) + SPLITS.index(split))
    from backgrounds import open_clips

    return open_clips(source, split)


def procedural_video(scene):
    """Frames of scene number `scene`, (64, 64, 3) uint8, for ever.

    Three coloured textures with the 1/f amplitude spectrum of natural images, the nearer two
    cut into blobs, slide over each other: edges, occlusion, parallax.
    """
    rng = np.random.default_rng(scene)
    side = 2 * SIZE
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side))
    frequency[0, 0] = np.inf  # no mean

    def noise(power):
        field = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(side, side))) / frequency**power)
        return field / field.std()

    layers = []
    for nearness in range(3):
        # Natural colours vary mostly together, in brightness.
        shade = 40 * noise(1)[..., None] + 15 * np.stack([noise(1) for _ in range(3)], -1)
        tint = rng.uniform(70, 180) + rng.normal(0, 25, 3)
        texture = np.clip(tint + shade, 0, 255).astype(np.uint8)
        shape = noise(2) > (0.5 if nearness else -np.inf)  # the farthest covers everything
        angle, speed = rng.uniform(0, 2 * np.pi), rng.uniform(1, 2) * (1 + nearness)
        velocity = speed * np.array([np.sin(angle), np.cos(angle)])  # pixels a decision
        # The fields are periodic: two by two copies hold every window.
        layers.append((np.tile(texture, (2, 2, 1)), np.tile(shape[..., None], (2, 2, 1)), velocity))
    for t in itertools.count():
        frame = np.empty((SIZE, SIZE, 3), np.uint8)
        for texture, shape, velocity in layers:
            i, j = (t * velocity).astype(int) % side
            window = np.s_[i : i + SIZE, j : j + SIZE]
            np.copyto(frame, texture[window], where=shape[window])
        yield frame


# ---- 4. Multi-Modal Natural MuJoCo, Fig. 4 ----

# Boxes that sense touch: name, body, centre and half-sizes in metres.  They miss no contact
# of a sole and one in 200 of those inside the cup.  The finger has its own two sensors.
TOUCH_BOXES: dict[str, list] = {
    "finger": [],
    "walker": [(foot, foot, (0, 0, 0), (0.16, 0.06, 0.06)) for foot in ("right_foot", "left_foot")],
    "ball_in_cup": [("inside_cup", "cup", (0, 0, -0.05), (0.04, 0.02, 0.04))],
}


class ControlSuite(World):
    """A task of the DeepMind Control Suite with colour image, depth image and touch.

    rgb    (64, 64, 3) uint8    the body in front of a moving video, which hides floor and sky
    depth  (64, 64, 1) float32  metres from the camera plane, floor included, at most 10; rounded to half
                                precision, which the replay keeps
    touch  (sensors,) float32   log(1 + newtons) in the last simulator step

    An episode has 1000 simulator steps, two for each decision; each decision is rendered once.
    """

    action_repeat, episode_steps = 2, 500
    info = {}

    def __init__(self, domain, task, action_size, touch_size, draw_background):
        touch = Box(0, 20, (touch_size,), np.float32)  # e^20 newtons are never reached
        super().__init__({"rgb": IMAGE, "depth": DEPTH, "touch": touch}, action_size)
        self.domain, self.task, self.draw_background, self.environment = domain, task, draw_background, None

    def load(self):
        """Build the simulator and its camera."""
        import_renderer()
        from dm_control import mujoco, suite

        self.mujoco = mujoco
        spec = mujoco.MjSpec.from_file(str(Path(suite.__file__).parent / f"{self.domain}.xml"))
        for name, body, centre, half_sizes in TOUCH_BOXES[self.domain]:
            box, touch, site = mujoco.mjtGeom.mjGEOM_BOX, mujoco.mjtSensor.mjSENS_TOUCH, mujoco.mjtObj.mjOBJ_SITE
            spec.body(body).add_site(name=name, type=box, pos=centre, size=half_sizes, group=4)  # not drawn
            spec.add_sensor(name=name, type=touch, objtype=site, objname=name)
        # In software, shadows and multisampling cost 30 times the rest of a frame, and the
        # foreground is exact only where pixels are sampled at their centres.
        quality = spec.visual.quality
        quality.shadowsize, quality.offsamples = 0, 0
        quality.numslices, quality.numstacks = 16, 8  # the cup's string is 25 capsules
        model = spec.compile()
        self.touch = model.sensor_adr[model.sensor_type == mujoco.mjtSensor.mjSENS_TOUCH]

        self.random = np.random.RandomState()  # the suite's kind; `reset` seeds it
        original = suite.load(self.domain, self.task, task_kwargs={"random": self.random})
        physics = type(original.physics).from_model(mujoco.wrapper.MjModel(model))
        self.environment = type(original)(physics, original.task, control_timestep=original.control_timestep())
        self.camera = mujoco.Camera(physics, SIZE, SIZE, camera_id=0)
        self.camera.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        self.camera.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        # The ray through each pixel's centre at unit depth, in the camera's axes.
        x = np.tan(np.radians(model.cam_fovy[0]) / 2) * (np.arange(0.5, SIZE) / (SIZE / 2) - 1)
        self.rays = np.stack([*np.meshgrid(x, -x), -np.ones((SIZE, SIZE))], -1)  # (64, 64, 3)
        self.near = model.vis.map.znear * model.stat.extent
        self.far = model.vis.map.zfar * model.stat.extent

    def begin(self, rng):
        if self.environment is None:
            self.load()  # only now, in the worker: an open OpenGL does not survive a fork
        self.random.seed(rng.integers(2**32))
        self.background = self.draw_background(rng)
        self.environment.reset()
        self.frame = next(self.background)

    def move(self, action):
        self.frame = next(self.background)
        return float(sum(self.environment.step(action).reward for _ in range(self.action_repeat))), False

    def sense(self, names):
        newtons = self.environment.physics.data.sensordata[self.touch]
        readings = {"touch": np.log1p(newtons).astype(np.float32)}  # Dev. D10
        if "rgb" in names or "depth" in names:
            readings["rgb"], depth = self.draw()
            readings["depth"] = np.minimum(depth, MAX_DEPTH).astype(np.float16).astype(np.float32)[..., None]
        return {name: readings[name] for name in names}

    def draw(self):
        """The body before the background (64, 64, 3) uint8, and depth (64, 64) in metres."""
        rgb, depth = self.look()
        data = self.environment.physics.data
        # Foreground is what the pixel's ray meets before the floor, the plane z = 0, and before the sky, which
        # OpenGL draws at 0.6 to 0.9 of the far plane.  Dev. D11
        descent = -self.rays @ data.cam_xmat[0, 6:]
        floor = data.cam_xpos[0, 2] / np.maximum(descent, 1e-9)
        self.foreground = depth < np.minimum(floor * (1 - 2e-4), self.far / 4)
        return np.where(self.foreground[..., None], rgb, self.frame), depth

    def look(self):
        """Render once: colour (64, 64, 3) uint8, depth (64, 64) in metres."""
        mujoco = self.mujoco
        rgb, depth = np.empty((SIZE, SIZE, 3), np.uint8), np.empty((SIZE, SIZE), np.float32)
        contexts = self.environment.physics.contexts
        rectangle = mujoco.MjrRect(0, 0, SIZE, SIZE)
        self.camera.update()
        with contexts.gl.make_current() as gl:
            gl.call(mujoco.mjr_render, rectangle, self.camera.scene, contexts.mujoco.ptr)
            gl.call(mujoco.mjr_readPixels, rgb, depth, rectangle, contexts.mujoco.ptr)
        depth = self.near / (1 - depth * (1 - self.near / self.far))
        return rgb[::-1], depth[::-1]  # OpenGL's rows go from the bottom up

    def render(self):
        return self.draw()[0]

    def close(self):
        """Free the simulator and its OpenGL context."""
        if self.environment is not None:
            self.environment.physics.free()
            self.environment = None


# ---- 5. The toy world, Fig. 1, 19, 20 ----

TOY_GOAL = np.array([0.7, 0.3])
TOY_SPEED = 0.1  # of the square's side, in one step
TOY_GUST = 0.04  # standard deviation of a step's gust
TOY_RADIUS = 0.1


def scripted_toy_action(position):
    """The action (2,) that goes straight from position (2,) to the goal: the best policy we know."""
    return np.clip((TOY_GOAL - position) / TOY_SPEED, -1, 1).astype(np.float32)


class ToyWorld(World):
    """A disc in the unit square that has to reach the goal and stay there against gusts.

    Actions are velocities; the reward is exp(-d^2 / (2 * 0.15^2)) at distance d from the goal.
    A random policy earns about 13 of 100, `scripted_toy_action` about 92.
    """

    action_repeat, episode_steps = 1, 100

    def __init__(self, sensors):
        vectors = {"position": 2, "x": 1, "y": 1}
        spaces = {s: Box(0, 1, (vectors[s],), np.float32) if s in vectors else IMAGE for s in sensors}
        super().__init__(spaces, action_size=2)
        self.cameras = {s: ToyCamera(s) for s in sensors if s not in vectors}

    def begin(self, rng):
        self.rng, self.position = rng, rng.random(2)

    def move(self, action):
        self.position = np.clip(self.position + TOY_SPEED * action + self.rng.normal(0, TOY_GUST, 2), 0, 1)
        distance = np.linalg.norm(self.position - TOY_GOAL)
        return float(np.exp(-(distance**2) / (2 * 0.15**2))), False

    def sense(self, names):
        x, y = self.position.astype(np.float32)
        vectors = {"position": np.array([x, y]), "x": np.array([x]), "y": np.array([y])}
        return {s: vectors[s] if s in vectors else self.cameras[s].draw(x, y) for s in names}

    @property
    def info(self):
        return {"position": self.position}

    def render(self):
        """The square from above, three times as large as a sensor shows it, with a ring around the goal."""
        camera = ToyCamera("camera", 3 * SIZE)
        distance = np.abs(np.hypot(camera.x - TOY_GOAL[0], camera.y - TOY_GOAL[1]) - 1.25 * TOY_RADIUS)
        ring = np.clip((0.01 - distance) / camera.span + 0.5, 0, 1)[..., None]
        return ((1 - ring) * camera.draw(*self.position) + ring * (0, 90, 200)).astype(np.uint8)


class ToyCamera:
    """Draw the tiled floor and the disc as one camera sees them.

    name  "camera" on the ceiling, "front" outside the wall y = 0, "rear" outside y = 1
    size  pixels, height and width; every sensor has SIZE
    """

    def __init__(self, name, size=SIZE):
        # The point of the floor that each pixel shows, and the length that it covers there.
        row, column = (np.mgrid[:size, :size].astype(np.float32) + 0.5) * (SIZE / size)
        if name == "camera":
            self.x, self.y = 1.2 * column / SIZE - 0.1, 1.1 - 1.2 * row / SIZE
            self.span = 1.2 / SIZE
        else:
            # A pinhole of 50 pixels, 1.6 above the floor and 1 outside the square, with the
            # horizon above the picture: the two sides see one position quite differently.
            distance = 80 / (row + 20)
            right = (column - SIZE / 2) * distance / 50
            self.x = 0.5 + right if name == "front" else 0.5 - right
            self.y = distance - 1 if name == "front" else 2 - distance
            self.span = distance**1.5 / 60  # the mean of a pixel's width and depth
        self.span = self.span * (SIZE / size)
        inside = (np.abs(self.x - 0.5) <= 0.5) & (np.abs(self.y - 0.5) <= 0.5)
        tile = (np.floor(4 * self.x) + np.floor(4 * self.y)) % 2
        grey = np.where(inside, 190 + 20 * tile, 90)[..., None]
        self.floor = np.repeat(grey, 3, -1).astype(np.float32)
        self.disc = np.array([220, 60, 40], np.float32) - self.floor

    def draw(self, x, y):
        """The picture (size, size, 3) uint8 with the disc, anti-aliased, at (x, y)."""
        distance = np.hypot(self.x - x, self.y - y)
        cover = np.clip((TOY_RADIUS - distance) / self.span + 0.5, 0, 1)
        return (self.floor + cover[..., None] * self.disc).astype(np.uint8)


# ---- 6. Making environments ----


def make_env(task, seed=0, missing_rate=0.375, backgrounds="procedural", split="train",
             missing_process="exact", remove=(), randomize=None, task_kwargs=None, faults=None, fault_rate=0.5):
    """Make one environment; its first `reset()` follows from the seed.

    task             one of TASKS, or what `gymnasium.make` takes: "Hopper-v5", "my_package:Reach-v0"
    missing_rate     fraction of each sensor's readings that are missing, in [0, 1): training
                     0.375, evaluation 0, 0.375 and 0.75                              section V
    backgrounds      "procedural" or a path, see `open_backgrounds`; for the control suite
    split            "train" or "eval" backgrounds
    missing_process  "exact", the paper's, or "released", see `released_schedule`
    remove           names of sensors that are missing for good                     Table II
    randomize        domain randomisation of Table Wiping; by default in the "train" split only
    task_kwargs      arguments of `gymnasium.make`; {"render_mode": "rgb_array"} adds a sensor `camera`
    faults           {sensor: fault} that nobody flags, and at which rate, see `LyingSensors`

    Raises ValueError for anything else, or if Table Wiping lacks robosuite.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; choose from {', '.join(SPLITS)}")
    for name, given, allowed, who in (("backgrounds", backgrounds != "procedural", task in SUITE, "the control suite"),
                                      ("randomize", randomize, task == "table_wiping", "table_wiping"),
                                      ("task_kwargs", task_kwargs, task not in TASKS, "gymnasium.make")):
        if given and not allowed:
            raise ValueError(f"{name} is for {who}; {task} has none: leave it out")
    make = partial(make_world, task, backgrounds, split, randomize, task_kwargs or {})
    env = make()
    if faults:
        env = LyingSensors(env, faults, fault_rate, make() if "other" in faults.values() else None)
    return MissingSensors(env, missing_rate, missing_process, remove, seed)


def make_world(task, backgrounds, split, randomize, task_kwargs):
    """The environment of a task, whose sensors all work and tell the truth. Arguments as for `make_env`."""
    if task in TOY:
        return ToyWorld(TOY[task])
    if task in SUITE:
        return ControlSuite(*SUITE[task], open_backgrounds(backgrounds, split))
    if task == "table_wiping":
        from wiping import TableWiping

        return TableWiping(split == "train" if randomize is None else randomize)
    return FitSpaces(make_gymnasium(task, task_kwargs))


def make_gymnasium(task, task_kwargs):
    """gymnasium.make, with MuJoCo's pictures twelve times as fast; ValueError if it does not know the task."""
    choose_renderer()
    for driver in ("SDL_AUDIODRIVER", "SDL_VIDEODRIVER"):  # pygame, which draws some environments, opens no device
        os.environ.setdefault(driver, "dummy")
    try:
        env = gymnasium.make(task, **task_kwargs)
    except (gymnasium.error.Error, ImportError, TypeError, AssertionError) as error:
        line = " ".join(str(error).split())
        raise ValueError(f"task {task!r} was not made: {line}; tasks are {', '.join(TASKS)}, and ids that "
                         "gymnasium.make knows, as package:id where a package registers one") from error  # fmt: skip
    if hasattr(env.unwrapped, "model") and hasattr(env.unwrapped.model, "vis"):  # MuJoCo, as in `ControlSuite.load`
        env.unwrapped.model.vis.quality.shadowsize = env.unwrapped.model.vis.quality.offsamples = 0
    return env


def seeds(*numbers, count):
    """`count` seeds that depend on all the numbers, and on how many there are: NumPy takes (1,) and (1, 0) for one."""
    return [int(seed) for seed in np.random.SeedSequence((len(numbers), *numbers)).generate_state(count)]


# ---- 7. Worker processes ----


class WorkerError(RuntimeError):
    """A worker process could not start, died or hung, or its environment failed."""


def reporting(method):
    """A method of `Workers` that reports the failure of a worker process as WorkerError."""

    def call(self, *args, **kwargs):
        try:
            return method(self, *args, **kwargs)
        except multiprocessing.TimeoutError as error:
            raise WorkerError(f"an environment's process has not answered for {self.TIMEOUT} s") from error
        except (EOFError, ConnectionError) as error:
            codes = [process.exitcode for process in self.processes if process.exitcode is not None]
            raise WorkerError(f"an environment's process has died, exit code {codes}: did it fail (see above), "
                              "was it killed, or is memory short?") from error  # fmt: skip
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOSPC):
                raise
            raise WorkerError(f"no worker processes: {error}; allow more open files (ulimit -n) or a larger /dev/shm, "
                              "or use fewer environments") from error  # fmt: skip

    return call


class Workers(AsyncVectorEnv):
    """Environments in worker processes, which leave signals to the main process and end with it.

    Raises WorkerError at once if a worker dies, and if one does not answer for `TIMEOUT` seconds.
    """

    TIMEOUT, GRACE = 300, 5  # seconds to answer, and to close an environment

    def __init__(self, makers, context):
        self.processes, self.parent_pipes = [], []
        atexit.register(self.close)  # before multiprocessing's own end, whose SIGTERM the workers ignore
        try:
            reporting(AsyncVectorEnv.__init__)(self, makers, context=context, worker=work)
        except BaseException:
            self.close()
            raise

    reset_async, reset_wait = reporting(AsyncVectorEnv.reset_async), reporting(AsyncVectorEnv.reset_wait)
    step_async, step_wait = reporting(AsyncVectorEnv.step_async), reporting(AsyncVectorEnv.step_wait)
    call_async, call_wait = reporting(AsyncVectorEnv.call_async), reporting(AsyncVectorEnv.call_wait)

    def _poll_pipe_envs(self, timeout=None):
        """Wait until all workers have answered, at most `TIMEOUT` seconds in which this process runs.

        A stop of any length (Ctrl-Z) falls into one of many short waits, and counts as no more.
        """
        waits = itertools.count(1)
        for pipe in self.parent_pipes:
            while not pipe.poll(self.TIMEOUT / 100):
                if next(waits) == 100:
                    return False
        return True

    def _raise_if_errors(self, successes):
        """Raise an environment's error as WorkerError; print its traceback."""
        if not all(successes):
            _, _, value, trace = self.error_queue.get()
            print(trace, file=sys.stderr)
            raise WorkerError(f"an environment failed: {value}")

    def _add_info(self, infos, info, i):
        """Leave out what has another shape or type in this environment than in those before it."""
        for name, x in info.items():
            with suppress(ValueError, TypeError):
                infos = super()._add_info(infos, {name: x}, i)
        return infos

    def close_extras(self, **kwargs):
        atexit.unregister(self.close)
        for pipe in self.parent_pipes:
            with suppress(OSError):
                pipe.send(("close", None))
        late = time.monotonic() + self.GRACE
        for process in [process for process in self.processes if process.pid is not None]:
            process.join(max(0, late - time.monotonic()))
            process.kill()
            process.join()
        for pipe in self.parent_pipes:
            pipe.close()


def die_with_parent(parent=None):
    """Kill this process as soon as its parent has ended, even by SIGKILL and in the midst of a step.

    parent  process id; by default that of the process that made this one by multiprocessing

    Linux's PR_SET_PDEATHSIG is not used: it follows the *thread* that made this process.
    """
    parent = parent or multiprocessing.parent_process().pid
    try:
        end = os.pidfd_open(parent)  # readable once the process has ended
    except ProcessLookupError:
        os.kill(os.getpid(), signal.SIGKILL)
    except (AttributeError, OSError):  # not Linux, or no file descriptor left
        end = None

    def watch():
        while end is None and os.getppid() == parent:
            time.sleep(1)
        if end is not None:
            multiprocessing.connection.wait([end])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def work(*args):
    """Run Gymnasium's worker, which ignores signals to the process group, like Ctrl-C: the main process ends it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()
    _async_worker(*args)


def make_vector_env(task, num_envs, seed=0, **kwargs):
    """Make environments in worker processes, seeded apart; kwargs as for `make_env`.

    `reset(seed=[...])` takes one seed per environment. A step after the end of an episode resets and
    ignores its action (AutoresetMode.NEXT_STEP).
    """
    makers = [partial(make_env, task, seed=s, **kwargs) for s in seeds(seed, count=num_envs)]
    # A fork of a process that has opened OpenGL hangs at its first picture, and CUDA does not survive a fork.
    torch = sys.modules.get("torch")
    is_open = "dm_control" in sys.modules or FitSpaces.rendered or (torch and torch.cuda.is_initialized())
    return Workers(makers, context="spawn" if is_open else None)


if __name__ == "__main__":
    for task in TOY:
        env = make_env(task)
        observation, info = env.reset()
        print(task, {name: (value.shape, str(value.dtype)) for name, value in observation.items()})
        total = 0.0
        for _ in range(env.episode_steps):
            _, reward, _, _, info = env.step(scripted_toy_action(info["position"]))
            total += reward
        print(f"    scripted return {total:.1f}, missing {env.missing.mean(0)}")
