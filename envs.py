"""Worlds seen through several sensors, each of which fails now and then.

Multi-Modal Natural MuJoCo (Fig. 4: colour image with a moving natural video behind the body,
depth image, touch), Table Wiping (Fig. 6, `wiping.py`) and the 2-D toy world (Fig. 1, 19, 20),
as Gymnasium environments.

    M          modalities of a task, in the fixed order of its observation space
    present    (M,) int8, 1 where the modality was observed; a missing one reads zero
    decision   one action, repeated for `action_repeat` simulator steps

    env = make_env("finger_spin", seed=0, missing_rate=0.375)
    observation, info = env.reset()             # {"rgb", "depth", "touch", "present"}
    observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
    envs = make_vector_env("toy", num_envs=8, seed=0)       # eight worker processes

The spaces say all that a consumer needs: three axes of uint8 are a colour image, three axes
of float a depth image in metres, one axis a vector.
"""

import atexit
import ctypes
import io
import itertools
import multiprocessing
import os
import pickle
import pickletools
import signal
import sys
from collections import OrderedDict
from functools import partial
from pathlib import Path

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, MultiBinary
from gymnasium.vector import AsyncVectorEnv
from gymnasium.vector.async_vector_env import _async_worker

SIZE = 64  # pixels, height and width of every image
IMAGE = Box(0, 255, (SIZE, SIZE, 3), np.uint8)
MAX_DEPTH = 10.0  # metres, where depth is cut off
MESA = "/usr/share/glvnd/egl_vendor.d/50_mesa.json"  # Debian's, Ubuntu's: OpenGL without a GPU
MAX_SEGMENT = 14  # decisions, the longest missing segment  [code] config

SUITE = {  # task: domain, task, size of the action, number of touch sensors
    "finger_spin": ("finger", "spin", 2, 2),
    "walker_stand": ("walker", "stand", 6, 2),
    "walker_walk": ("walker", "walk", 6, 2),
    "walker_run": ("walker", "run", 6, 2),
    "cup_catch": ("ball_in_cup", "catch", 2, 1),
}
TOY = {  # task: its modalities
    "toy": ("position", "camera"),  # Fig. 1
    "toy_two_cameras": ("front", "rear"),  # Fig. 19
    "toy_xy": ("x", "y"),  # Fig. 20
}
TASKS = (*SUITE, "table_wiping", *TOY)
SPLITS = ("train", "eval")


# ---- 1. Missing data ----


def missing_schedule(steps, rate, max_length, rng):
    """When one sensor is missing in an episode: segments of uniform length and start.  Dev. D7

    rate        fraction missing, in [0, 1): exactly round(rate * steps) steps are
    max_length  segments last 1 to max_length steps, uniformly; the last is cut to fit
    returns     (steps,) bool, True where missing

    All arrangements are equally likely, on an episode closed to a ring: a segment that runs
    past the end goes on at the beginning, so every step is missing equally often.  Segments
    do not overlap, but one in 14 (at 37.5 %) directly follows another.
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
    """The released code's process: at each observed step a segment starts by chance.  Dev. D7

    Arguments and result as of `missing_schedule`, but rate is nominal: 0, 0.375 or 0.75
    stand for a start probability of 0, 0.05 or 0.10.  In fact 28.2 % and 45.3 % are missing:
    segments of 7.5 steps on average alternate with waits of 19 and 9 steps.
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


# ---- 2. Backgrounds ----


def open_backgrounds(source, split):
    """A function draw(rng) that picks a video and returns an endless iterator of its frames.

    source  "procedural" (Dev. D21); or a path: a video, a folder of videos or of folders of frames
            (ILSVRC-VID, DAVIS), or an array, .npy or CVRL's natural_train.pkl
    split   "train" or "eval": their scenes differ, and their videos where there are several

    Raises ValueError naming the path that is missing, empty or not readable as video.
    """
    if source == "procedural":
        return lambda rng: procedural_video(2 * int(rng.integers(2**31)) + SPLITS.index(split))
    videos = find_videos(Path(source))
    if len(videos) > 1:  # every tenth is for evaluation
        videos = [v for i, v in enumerate(videos) if (i % 10 == 0) == (split == "eval")]
    read_clip(videos[0], max_frames=1)  # fail here rather than in the midst of training

    def draw(rng):
        """Plays a clip from a random frame on, forwards and backwards for ever."""
        clip = read_clip(videos[rng.integers(len(videos))])
        order = [*range(len(clip)), *range(len(clip) - 2, 0, -1)]
        start = rng.integers(len(clip))
        return (clip[i] for i in itertools.cycle(order[start:] + order[:start]))

    return draw


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
        # The fields are periodic: two by two of them hold every window.
        layers.append((np.tile(texture, (2, 2, 1)), np.tile(shape[..., None], (2, 2, 1)), velocity))
    for t in itertools.count():
        frame = np.empty((SIZE, SIZE, 3), np.uint8)
        for texture, shape, velocity in layers:
            i, j = (t * velocity).astype(int) % side
            window = np.s_[i : i + SIZE, j : j + SIZE]
            np.copyto(frame, texture[window], where=shape[window])
        yield frame


VIDEO_SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"}
FRAME_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png"}
FORMATS = "mov,mp4,m4v,matroska,webm,avi,mpeg,mpegvideo,mpegts,mjpeg,bmp_pipe,jpeg_pipe,png_pipe"  # to be opened
MAX_PIXELS = 2**26  # 8,192 x 8,192


def find_videos(path):
    """The videos at a path: arrays (frames, 64, 64, 3), or files and folders of frames."""
    try:
        path.stat()
    except OSError as error:
        raise ValueError(f"backgrounds {path} do not exist: {error.strerror}; give a path or 'procedural'") from error
    if path.suffix in (".npy", ".pkl"):
        return read_array(path)
    if not path.is_dir():
        return [path]
    files = [Path(folder, name) for folder, _, names in os.walk(path) for name in names]
    videos = {f for f in files if f.suffix.lower() in VIDEO_SUFFIXES}
    videos |= {f.parent for f in files if f.suffix.lower() in FRAME_SUFFIXES}
    if not videos:
        raise ValueError(f"backgrounds {path} hold neither videos nor folders of frames")
    return sorted(videos)


def read_array(path):
    """The videos in a .npy or .pkl file, each (frames, 64, 64, 3) uint8."""
    try:
        if path.suffix == ".npy":
            array = np.lib.format.open_memmap(path, "r")
        else:
            with open(path, "rb") as file:
                for opcode, number, _ in pickletools.genops(file):
                    if "PUT" in opcode.name and number > path.stat().st_size:
                        raise ValueError("it asks for more memory than it can use")
                file.seek(0)
                array = np.asarray(ArrayUnpickler(file).load())
    except Exception as error:  # a damaged pickle raises whatever it likes
        raise ValueError(f"backgrounds {path} are not an array: {error}") from error
    if array.dtype != np.uint8 or array.ndim not in (4, 5) or array.shape[-3:] != IMAGE.shape:
        raise ValueError(f"backgrounds {path} are {array.dtype} {array.shape}; needed are uint8 "
                         "(frames, 64, 64, 3) or (videos, frames, 64, 64, 3)")
    if array.size == 0:
        raise ValueError(f"backgrounds {path} hold no frames: {array.shape}")
    return list(array) if array.ndim == 5 else [array]


class ArrayUnpickler(pickle.Unpickler):
    """Admits arrays and plain containers only: any other pickle may run any code."""

    def find_class(self, module, name):
        arrays = "multiarray._reconstruct numeric._frombuffer numpy.ndarray numpy.dtype _codecs.encode".split()
        if f"{module}.{name}".removeprefix("numpy.core.").removeprefix("numpy._core.") not in arrays:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of an array")
        return super().find_class(module, name)


def read_clip(video, max_frames=501):
    """An array, or the first frames of a video, an episode's worth: (frames, 64, 64, 3) uint8."""
    if isinstance(video, np.ndarray):
        return video
    import av

    clip = []
    pictures = sorted(f for f in video.glob("*") if f.suffix.lower() in FRAME_SUFFIXES)
    for file in pictures[:max_frames] or [video]:
        if not file.is_file():
            raise ValueError(f"background {file} is no file; remove it")
        try:
            # FFmpeg gets no name of a picture: it would take "%d" in it for a series of files. And it opens no
            # playlist, which might lead elsewhere.
            data = io.BytesIO(file.read_bytes()) if pictures else open(file, "rb")
            with data, av.open(data, options={"format_whitelist": FORMATS}) as container:
                size = container.streams.video[0].codec_context
                if size is None:
                    raise ValueError("its codec is unknown")
                if size.width * size.height > MAX_PIXELS:
                    raise ValueError(f"it has {size.width} x {size.height} pixels")
                for frame in itertools.islice(container.decode(video=0), max_frames - len(clip)):
                    frame = frame.reformat(SIZE, SIZE, "rgb24", interpolation="AREA")
                    clip.append(frame.to_ndarray())
        except Exception as error:  # a damaged file raises whatever it likes
            raise ValueError(f"background {file} is not readable as video: {error}") from error
    if not clip:
        raise ValueError(f"background {video} holds no frames; remove it")
    return np.stack(clip)


# ---- 3. Multi-Modal Natural MuJoCo, Fig. 4 ----

# Boxes that sense touch: name, body, centre and half-sizes in metres.  They miss no contact
# of a sole and one in 200 of those inside the cup.  The finger has its own two sensors.
TOUCH_BOXES: dict[str, list] = {
    "finger": [],
    "walker": [(foot, foot, (0, 0, 0), (0.16, 0.06, 0.06)) for foot in ("right_foot", "left_foot")],
    "ball_in_cup": [("inside_cup", "cup", (0, 0, -0.05), (0.04, 0.02, 0.04))],
}


class ControlSuite:
    """A task of the DeepMind Control Suite with colour image, depth image and touch.

    rgb    (64, 64, 3) uint8    the body before a moving video, which hides floor and sky
    depth  (64, 64, 1) float32  metres from the camera plane, floor included, at most 10;
                                rounded to half precision, so that two bytes a pixel keep it
    touch  (sensors,) float32   log(1 + newtons) in the last simulator step

    1000 simulator steps an episode, two a decision, rendered once a decision.
    """

    action_repeat, episode_steps = 2, 500
    terminated, info = False, {}

    def __init__(self, domain, task, action_size, touch_size, draw_background):
        self.domain, self.task, self.action_size = domain, task, action_size
        self.draw_background = draw_background
        self.spaces = {
            "rgb": IMAGE,
            "depth": Box(0, MAX_DEPTH, (SIZE, SIZE, 1), np.float32),
            "touch": Box(0, 20, (touch_size,), np.float32),  # e^20 newtons: never reached
        }
        self.environment = None

    def load(self):
        """Builds the simulator and its camera."""
        if sys.platform == "linux":
            os.environ.setdefault("MUJOCO_GL", "egl")
            if Path(MESA).exists() and "MUJOCO_EGL_DEVICE_ID" not in os.environ:  # nobody asked for a GPU's pictures
                # A picture is a millisecond's work for a core. Eight processes that draw on one GPU hang with some
                # drivers (github.com/google-deepmind/mujoco/issues/3444), and the learner needs it.
                os.environ.setdefault("__EGL_VENDOR_LIBRARY_FILENAMES", MESA)
                os.environ.setdefault("LP_NUM_THREADS", "0")  # every environment has a process already
        try:
            from dm_control import mujoco, suite
        except AttributeError as error:  # PyOpenGL's way to say that it found no library
            raise RuntimeError("no OpenGL library found; install the Debian packages libegl1 and "
                               "libgl1, or libosmesa6 and set MUJOCO_GL=osmesa") from error
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

    def reset(self, rng):
        if self.environment is None:
            self.load()  # only now, in the worker: an open OpenGL does not survive a fork
        self.random.seed(rng.integers(2**32))
        self.background = self.draw_background(rng)
        self.environment.reset()

    def step(self, action):
        return float(sum(self.environment.step(action).reward for _ in range(self.action_repeat)))

    def sense(self, names):
        rgb, depth = self.look()
        data = self.environment.physics.data
        # Foreground is what lies before the floor, the plane z = 0, on the pixel's ray, and
        # before the sky, which OpenGL draws at 0.6 to 0.9 of the far plane.  Dev. D11
        descent = -self.rays @ data.cam_xmat[0, 6:]
        floor = data.cam_xpos[0, 2] / np.maximum(descent, 1e-9)
        self.foreground = depth < np.minimum(floor * (1 - 2e-4), self.far / 4)
        self.picture = np.where(self.foreground[..., None], rgb, next(self.background))
        depth = np.minimum(depth, MAX_DEPTH).astype(np.float16).astype(np.float32)
        touch = np.log1p(data.sensordata[self.touch]).astype(np.float32)  # Dev. D10
        readings = {"rgb": self.picture, "depth": depth[..., None], "touch": touch}
        return {name: readings[name] for name in names}

    def look(self):
        """One rendering pass: colour (64, 64, 3) uint8, depth (64, 64) in metres."""
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

    def close(self):
        """Frees the simulator and its OpenGL context."""
        if self.environment is not None:
            self.environment.physics.free()
            self.environment = None


# ---- 4. The toy world, Fig. 1, 19, 20 ----

TOY_GOAL = np.array([0.7, 0.3])
TOY_SPEED = 0.1  # of the square's side, in one step
TOY_GUST = 0.04  # standard deviation of a step's gust
TOY_RADIUS = 0.1


def scripted_toy_action(position):
    """The action (2,) that goes from position (2,) straight to the goal: the yardstick."""
    return np.clip((TOY_GOAL - position) / TOY_SPEED, -1, 1).astype(np.float32)


class ToyWorld:
    """A disc in the unit square, which is to reach the goal and hold it against gusts.

    Actions are velocities; the reward is exp(-d^2 / (2 * 0.15^2)) at distance d of the goal.
    A random policy earns about 12 of 100, `scripted_toy_action` about 91.
    """

    action_size, action_repeat, episode_steps = 2, 1, 100
    terminated = False

    def __init__(self, modalities):
        vectors = {"position": 2, "x": 1, "y": 1}
        self.spaces = {m: Box(0, 1, (vectors[m],), np.float32) if m in vectors else IMAGE for m in modalities}
        self.cameras = {m: ToyCamera(m) for m in modalities if m not in vectors}

    def reset(self, rng):
        self.rng = rng
        self.position = rng.random(2)

    def step(self, action):
        gust = self.rng.normal(0, TOY_GUST, 2)
        self.position = np.clip(self.position + TOY_SPEED * action + gust, 0, 1)
        distance = np.linalg.norm(self.position - TOY_GOAL)
        return float(np.exp(-(distance**2) / (2 * 0.15**2)))

    def sense(self, names):
        x, y = self.position.astype(np.float32)
        vectors = {"position": np.array([x, y]), "x": np.array([x]), "y": np.array([y])}
        return {m: vectors[m] if m in vectors else self.cameras[m].draw(x, y) for m in names}

    @property
    def info(self):
        return {"position": self.position}

    @property
    def picture(self):
        return ToyCamera("camera").draw(*self.position)

    def close(self):
        pass


class ToyCamera:
    """Draws the tiled floor and the disc as one camera sees them.

    name  "camera" on the ceiling, "front" outside the wall y = 0, "rear" outside y = 1
    """

    def __init__(self, name):
        # Where on the floor each pixel looks, and what length it covers there.
        row, column = np.mgrid[:SIZE, :SIZE].astype(np.float32) + 0.5
        if name == "camera":
            self.x, self.y = 1.2 * column / SIZE - 0.1, 1.1 - 1.2 * row / SIZE
            self.span = 1.2 / SIZE
        else:
            # A pinhole of 50 pixels, 1.6 above the floor and 1 outside the square, with the
            # horizon above the picture: a position seen from both sides looks quite different.
            distance = 80 / (row + 20)
            right = (column - SIZE / 2) * distance / 50
            self.x = 0.5 + right if name == "front" else 0.5 - right
            self.y = distance - 1 if name == "front" else 2 - distance
            self.span = distance**1.5 / 60  # the mean of a pixel's width and depth
        inside = (np.abs(self.x - 0.5) <= 0.5) & (np.abs(self.y - 0.5) <= 0.5)
        tile = (np.floor(4 * self.x) + np.floor(4 * self.y)) % 2
        grey = np.where(inside, 190 + 20 * tile, 90)[..., None]
        self.floor = np.repeat(grey, 3, -1).astype(np.float32)
        self.disc = np.array([220, 60, 40], np.float32) - self.floor

    def draw(self, x, y):
        """The picture (64, 64, 3) uint8 with the disc, anti-aliased, at (x, y)."""
        distance = np.hypot(self.x - x, self.y - y)
        cover = np.clip((TOY_RADIUS - distance) / self.span + 0.5, 0, 1)
        return (self.floor + cover[..., None] * self.disc).astype(np.uint8)


# ---- 5. The environment: a world behind sensors that fail ----


class MultiModalEnv(gymnasium.Env):
    """A world whose sensors drop out, by a schedule drawn for each at the start of an episode.

    A world has `spaces` (modality: Box), `action_size`, `action_repeat`, `episode_steps`, `reset(rng)`,
    `step(action)` -> reward, `sense(names)` -> {name: reading}, asked once a decision for the sensors
    that work, `terminated` where the task has ended before its time, `picture` that no failure
    spoils, `info` that no sensor tells, `close()`.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}
    render_mode = "rgb_array"

    def __init__(self, world, seed, draw_missing, removed):
        self.world = world
        self.action_repeat, self.episode_steps = world.action_repeat, world.episode_steps
        self.action_space = Box(-1, 1, (world.action_size,), np.float32)
        # An OrderedDict, for Dict sorts the keys of an ordinary one.
        present = MultiBinary(len(world.spaces))
        self.observation_space = Dict(OrderedDict(world.spaces, present=present))
        self.draw_missing = draw_missing  # (steps, rng) -> (steps,) bool
        self.removed = removed  # (M,) bool, sensors missing for good
        self.t = self.episode_steps  # no episode is under way
        super().reset(seed=seed)

    def reset(self, *, seed=None, options=None):
        """Starts an episode; a seed reseeds dynamics, background and missing data alike."""
        super().reset(seed=seed)
        # Of their own, so that one seed gives the same world at every missing rate.
        world_rng, missing_rng = self.np_random.spawn(2)
        steps = self.episode_steps + 1  # the first observation comes before any action
        drawn = [self.draw_missing(steps, rng=missing_rng) for _ in self.world.spaces]
        self.missing = np.stack(drawn, 1) | self.removed  # (steps, M)
        self.t = 0
        self.world.reset(world_rng)
        return self.observe(), dict(self.world.info)

    def step(self, action):
        """One decision: the world's step, what the sensors give then; truncates after `episode_steps`."""
        if self.t == self.episode_steps or self.world.terminated:
            raise gymnasium.error.ResetNeeded("no episode is under way; call reset() first")
        self.t += 1
        reward = self.world.step(np.clip(action, -1, 1))
        truncated = self.t == self.episode_steps
        return self.observe(), reward, self.world.terminated, truncated, dict(self.world.info)

    def observe(self):
        """Reads the sensors that work now and flags them as present; the others are zero."""
        missing = self.missing[self.t]
        readings = self.world.sense([m for m, gone in zip(self.world.spaces, missing) if not gone])
        zeros = {m: np.zeros(space.shape, space.dtype) for m, space in self.world.spaces.items()}
        return zeros | readings | {"present": (~missing).astype(np.int8)}

    def render(self):
        return self.world.picture

    def close(self):
        self.world.close()


# ---- 6. Making environments ----


def make_env(task, seed=0, missing_rate=0.375, backgrounds="procedural", split="train",
             missing_process="exact", remove=(), randomize=None):
    """One environment; its first `reset()` follows from the seed.

    task             one of TASKS
    missing_rate     fraction of each sensor's readings that are missing, in [0, 1): training
                     0.375, evaluation 0, 0.375 and 0.75                              Table I
    backgrounds      "procedural" or a path, see `open_backgrounds`; the control suite's only
    split            "train" or "eval" backgrounds
    missing_process  "exact", the paper's, or "released", see `released_schedule`
    remove           names of sensors that are missing for good                     Table II
    randomize        Table Wiping's domain randomisation; by default in the "train" split only

    Raises ValueError for anything else, and where Table Wiping lacks robosuite.
    """
    for name, value, choices in (("task", task, TASKS), ("split", split, SPLITS),
                                 ("missing_process", missing_process, SCHEDULES)):
        if value not in choices:
            raise ValueError(f"{name} is {value!r}; choose from {', '.join(choices)}")
    if not 0 <= missing_rate < 1:
        raise ValueError(f"missing_rate is {missing_rate}; choose one in [0, 1)")
    if missing_process == "released" and missing_rate not in RELEASED_START:
        raise ValueError(f"missing_rate is {missing_rate}; the released process has 0, 0.375, 0.75")
    if randomize and task != "table_wiping":
        raise ValueError(f"randomize is for table_wiping; {task} has none")
    if task in TOY:
        world = ToyWorld(TOY[task])
    elif task == "table_wiping":
        from wiping import TableWiping

        world = TableWiping(split == "train" if randomize is None else randomize)
    else:
        world = ControlSuite(*SUITE[task], open_backgrounds(backgrounds, split))
    if not set(remove) < set(world.spaces):
        raise ValueError(f"remove is {remove}; choose some of {', '.join(world.spaces)}, not all")
    draw_missing = partial(SCHEDULES[missing_process], rate=missing_rate, max_length=MAX_SEGMENT)
    return MultiModalEnv(world, seed, draw_missing, np.array([m in remove for m in world.spaces]))


class WorkerError(RuntimeError):
    """A worker process died, hung, or its environment failed."""


class Workers(AsyncVectorEnv):
    """Environments in worker processes that leave signals to the main process and end with it.

    Raises WorkerError where a worker has died, at once, or has not answered for `TIMEOUT` seconds.
    """

    TIMEOUT = 300

    def __init__(self, makers, context):
        self.processes, self.parent_pipes = [], []
        atexit.register(self.close)  # before multiprocessing's own end, whose SIGTERM the workers ignore
        self.ask(super().__init__, makers, context=context, worker=work)

    def ask(self, method, *args, **kwargs):
        """A method of AsyncVectorEnv; what goes wrong with a worker is told as WorkerError."""
        try:
            return method(*args, **kwargs)
        except multiprocessing.TimeoutError as error:
            raise WorkerError(f"an environment's process has not answered for {self.TIMEOUT} s") from error
        except (EOFError, ConnectionError) as error:
            codes = [process.exitcode for process in self.processes if process.exitcode is not None]
            raise WorkerError(f"an environment's process has died, exit code {codes}: was it killed, "
                              "or is memory short?") from error  # fmt: skip

    def reset_async(self, *args, **kwargs):
        return self.ask(super().reset_async, *args, **kwargs)

    def reset_wait(self):
        return self.ask(super().reset_wait, self.TIMEOUT)

    def step_async(self, actions):
        return self.ask(super().step_async, actions)

    def step_wait(self):
        return self.ask(super().step_wait, self.TIMEOUT)

    def _raise_if_errors(self, successes):
        """What an environment raised, as WorkerError; its traceback is printed if it may be a bug."""
        if not all(successes):
            _, kind, value, trace = self.error_queue.get()
            if kind is not ValueError:
                print(trace, file=sys.stderr)
            raise WorkerError(f"an environment failed: {value}")

    def close_extras(self, **kwargs):
        """Ends the workers, whatever they are doing: they hold nothing that needs saving."""
        atexit.unregister(self.close)
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        for pipe in self.parent_pipes:
            pipe.close()


def work(*args):
    """Gymnasium's worker. A signal to the process group, like Ctrl-C, must not end it under way."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: die with the parent
    _async_worker(*args)


def make_vector_env(task, num_envs, seed=0, **kwargs):
    """Environments in worker processes, seeded apart; kwargs as of `make_env`.

    `reset(seed=[...])` takes one seed per environment.  A step after the end of an episode resets and
    ignores its action (AutoresetMode.NEXT_STEP).
    """
    seeds = np.random.SeedSequence(seed).generate_state(num_envs, np.uint64).tolist()
    makers = [partial(make_env, task, seed=s, **kwargs) for s in seeds]
    # A fork of a process in which OpenGL is open would hang at its first picture, and CUDA does not outlive a fork.
    torch = sys.modules.get("torch")
    is_open = "mujoco" in sys.modules or (torch is not None and torch.cuda.is_initialized())
    return Workers(makers, context="spawn" if is_open else None)


if __name__ == "__main__":
    for task in TOY:
        env = make_env(task)
        observation, info = env.reset()
        print(task, {name: (value.shape, str(value.dtype)) for name, value in observation.items()})
        rewards = []
        while len(rewards) < env.episode_steps:
            _, reward, _, _, info = env.step(scripted_toy_action(info["position"]))
            rewards.append(reward)
        print(f"    scripted return {sum(rewards):.1f}, missing {env.missing.mean(0)}")
    print("background", next(procedural_video(scene=0)).shape)
