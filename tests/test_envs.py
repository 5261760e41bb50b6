"""envs.py: missing data, backgrounds, the control suite's sensors, the toy world, seeding."""

import importlib.util
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from itertools import islice
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env, data_equivalence

import envs
from envs import make_env, make_vector_env

DOMAINS = ("finger_spin", "walker_walk", "cup_catch")  # one task of each


@pytest.fixture
def make(request):
    """make_env that closes what it made."""

    def make(*args, **kwargs):
        env = make_env(*args, **kwargs)
        request.addfinalizer(env.close)
        return env

    return make


def rollout(env, decisions, seed=0, **reset):
    """Everything that an environment returns under random actions."""
    rng = np.random.default_rng(seed)
    results = [env.reset(**reset)]
    for _ in range(decisions):
        results.append(env.step(rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)))
    return results


def same(a, b):
    return all(data_equivalence(x, y, exact=True) for x, y in zip(a, b, strict=True))


# ---- 1. Missing data ----


@pytest.mark.dev(7)
@pytest.mark.parametrize("max_length", [1, 5, 14, 400])
@pytest.mark.parametrize("rate", [0, 0.1, 0.375, 0.75, 0.99])
@pytest.mark.parametrize("steps", [1, 50, 101, 501])
def test_schedule_has_exactly_its_rate(steps, rate, max_length):
    for seed in range(20):
        missing = envs.missing_schedule(steps, rate, max_length, np.random.default_rng(seed))
        assert missing.shape == (steps,) and missing.dtype == bool
        assert missing.sum() == round(rate * steps)


def runs(missing):
    """Lengths of the runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], missing, [0]])))
    return edges[1::2] - edges[::2]


def test_schedule_lengths_are_uniform():
    # So few are missing that segments hardly ever touch and that only the last one is cut.
    rng = np.random.default_rng(0)
    count = Counter()
    for _ in range(40):
        count.update(runs(envs.missing_schedule(40_000, 0.01, 14, rng)).tolist())
    observed = np.array([count[n] for n in range(1, 15)])
    assert observed.sum() > 0.98 * sum(count.values())
    chi_squared = ((observed - observed.mean()) ** 2 / observed.mean()).sum()
    assert chi_squared < 34.5  # 13 degrees of freedom, p = 0.001


@pytest.mark.parametrize("rate", [0.375, 0.75])
def test_schedule_starts_are_uniform(rate):
    rng = np.random.default_rng(0)
    missing = np.stack([envs.missing_schedule(101, rate, 14, rng) for _ in range(4000)])
    starts = missing & ~np.roll(missing, 1, axis=1)
    for frequency in (missing.mean(0), starts.mean(0)):
        error = np.sqrt(frequency.mean() * (1 - frequency.mean()) / len(missing))
        assert np.abs(frequency - frequency.mean()).max() < 4.5 * error


def test_schedule_segments_touch_as_often_as_documented():
    rng = np.random.default_rng(0)
    drawn, seen = 0, 0
    for _ in range(300):
        missing = envs.missing_schedule(501, 0.375, 14, rng)
        drawn, seen = drawn + 188 / 7.5, seen + len(runs(missing)) - (missing[0] and missing[-1])
    assert 1 - seen / drawn == pytest.approx(1 / 14, abs=0.02)


@pytest.mark.dev(7)
@pytest.mark.parametrize("nominal, actual", [(0, 0), (0.375, 0.282), (0.75, 0.453)])
def test_released_process_misses_less_than_its_name_says(nominal, actual):
    missing = envs.released_schedule(300_000, nominal, 14, np.random.default_rng(0))
    assert missing.mean() == pytest.approx(actual, abs=0.005)
    assert nominal == 0 or runs(missing).max() > 14  # its segments chain


def test_schedules_of_an_episode_are_exact_and_independent(make):
    env = make("toy", missing_rate=0.375)
    env.reset()
    first = env.missing
    env.reset()
    assert first.shape == (101, 2) and (first.sum(0) == 38).all()
    assert (first[:, 0] != first[:, 1]).any() and (first != env.missing).any()


@pytest.mark.parametrize("task", ["finger_spin", "toy", "toy_two_cameras"])
def test_missing_readings_are_zero_and_flagged(make, task):
    whole = rollout(make(task, seed=3, missing_rate=0.0, missing_process="released"), 60)
    env = make(task, seed=3, missing_rate=0.75)
    gaps = rollout(env, 60, seed=0)
    names = list(env.observation_space)[:-1]
    for t, (observation, *_) in enumerate(gaps):
        assert (observation["present"] == ~env.missing[t]).all()
        for name, present in zip(names, observation["present"]):
            assert present or not observation[name].any()
    assert all((observation["present"] == 1).all() for observation, *_ in whole)
    assert all(observation[names[0]].any() for observation, *_ in whole)


@pytest.mark.parametrize("task", ["cup_catch", "toy"])
def test_one_seed_gives_the_same_world_at_every_missing_rate(make, task):
    whole = rollout(make(task, seed=3, missing_rate=0), 40)
    gaps = rollout(make(task, seed=3, missing_rate=0.75), 40)
    assert 0 < sum(observation["present"].sum() for observation, *_ in gaps)
    for (one, *_), (two, *_) in zip(whole, gaps):
        for name, present in zip(list(one)[:-1], two["present"]):
            assert not present or (one[name] == two[name]).all()
    assert [r for _, r, *_ in whole[1:]] == [r for _, r, *_ in gaps[1:]]


def test_removed_sensors_never_return(make):
    env = make("finger_spin", missing_rate=0, remove=("rgb", "touch"))
    for observation, *_ in rollout(env, 20):
        assert observation["present"].tolist() == [0, 1, 0]
        assert not observation["rgb"].any() and observation["depth"].any()
    assert env.render().any()


# ---- 2. Backgrounds ----


def frames(source, split="train", count=10, seed=0):
    return np.stack(list(islice(envs.open_backgrounds(source, split)(np.random.default_rng(seed)), count)))


def amplitude_slope(pictures):
    """The exponent of the amplitude spectrum over frequency, fitted to brightness (n, 64, 64)."""
    window = np.hanning(64)[:, None] * np.hanning(64)
    pictures = (pictures - pictures.mean((1, 2), keepdims=True)) * window
    amplitude = np.sqrt((np.abs(np.fft.fft2(pictures)) ** 2).mean(0))
    frequency = np.hypot(np.fft.fftfreq(64)[:, None], np.fft.fftfreq(64)) * 64
    band = (frequency >= 3) & (frequency <= 28)
    return np.polyfit(np.log(frequency[band]), np.log(amplitude[band]), 1)[0]


def test_procedural_scenes_have_a_natural_spectrum():
    scenes = np.stack([next(envs.procedural_video(s)) for s in range(100)]).astype(float)
    assert amplitude_slope(scenes.mean(-1)) == pytest.approx(-1, abs=0.2)
    # Natural colours vary mostly together.
    flat = scenes - scenes.mean((1, 2), keepdims=True)
    assert np.corrcoef(flat[..., 0].ravel(), flat[..., 2].ravel())[0, 1] > 0.7
    assert 30 < scenes.std((1, 2)).mean() < 70


def test_procedural_scenes_have_edges_and_occlusion():
    # Two layers with different velocities: no single shift explains the next frame.
    explained = []
    for scene in range(20):
        a, b = (f.astype(float) for f in islice(envs.procedural_video(scene), 2))
        shifts = [(i, j) for i in range(-7, 8) for j in range(-7, 8)]
        errors = [np.abs(np.roll(a, s, (0, 1)) - b)[8:-8, 8:-8].mean() for s in shifts]
        explained.append(min(errors) / np.abs(a - b)[8:-8, 8:-8].mean())
    assert np.mean(explained) > 0.2


def test_procedural_video_never_stands_still_or_ends():
    for scene in range(10):
        video = np.stack(list(islice(envs.procedural_video(scene), 300)))
        changed = (video[1:] != video[:-1]).any(-1).mean((1, 2))
        assert changed.min() > 0.2 and changed.mean() > 0.6


@pytest.mark.dev(21)
def test_training_and_evaluation_scenes_are_disjoint(monkeypatch):
    monkeypatch.setattr(envs, "procedural_video", lambda scene: scene)
    rng = np.random.default_rng(0)
    scenes = {split: {envs.open_backgrounds("procedural", split)(rng) for _ in range(500)}
              for split in envs.SPLITS}
    assert all(scene % 2 == 0 for scene in scenes["train"])
    assert all(scene % 2 == 1 for scene in scenes["eval"])
    assert len(scenes["train"]) == len(scenes["eval"]) == 500


def test_every_episode_has_a_new_background(make):
    env = make("finger_spin", missing_rate=0)
    pictures = [env.reset()[0]["rgb"] for _ in range(3)]
    assert all((a != b).mean() > 0.5 for a, b in zip(pictures, pictures[1:]))


def write_video(path, levels, size=(96, 80)):
    """A video of grey frames, each of one level."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.bit_rate = 4_000_000
        for level in levels:
            picture = np.full((size[1], size[0], 3), level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())


def write_frames(folder, levels):
    import av

    folder.mkdir(parents=True)
    for i, level in enumerate(levels):
        with av.open(str(folder / f"{i:05d}.jpg"), "w", format="image2") as container:
            stream = container.add_stream("mjpeg")
            stream.width, stream.height, stream.pix_fmt = 120, 90, "yuvj420p"
            picture = np.full((90, 120, 3), level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
            container.mux(stream.encode())


def array_of(levels):
    return np.broadcast_to(np.uint8(levels)[:, None, None, None], (len(levels), 64, 64, 3)).copy()


LEVELS = [40, 80, 120, 160]


def write_source(kind, folder):
    """One of the five kinds of background sources, each of two videos where it can hold two."""
    if kind == "video":
        write_video(folder / "clip.mp4", LEVELS)
        return folder / "clip.mp4"
    if kind == "videos":
        write_video(folder / "a.avi", [250] * 4)
        write_video(folder / "b.mp4", LEVELS)
    elif kind == "frames":
        write_frames(folder / "train" / "a", [250] * 4)
        write_frames(folder / "train" / "b", LEVELS)
    elif kind == "npy":
        np.save(folder / "videos.npy", np.stack([array_of([250] * 4), array_of(LEVELS)]))
        return folder / "videos.npy"
    else:
        with open(folder / "natural_train.pkl", "wb") as file:
            pickle.dump(array_of(LEVELS), file, protocol=int(kind[-1]))
        return folder / "natural_train.pkl"
    return folder


@pytest.mark.parametrize("kind", ["video", "videos", "frames", "npy", "pkl2", "pkl3", "pkl4", "pkl5"])
def test_background_sources(make, tmp_path, kind):
    source = write_source(kind, tmp_path)
    starts = set()
    for seed in range(12):
        video = frames(source, seed=seed, count=13)
        assert video.shape == (13, 64, 64, 3) and video.dtype == np.uint8
        levels = video.mean((1, 2, 3))
        nearest = np.abs(levels[:, None] - LEVELS).argmin(1)
        assert np.abs(levels - np.array(LEVELS)[nearest]).max() < 4
        # Forwards and backwards for ever, without a cut.
        assert (np.abs(np.diff(nearest)) == 1).all() and set(nearest) == {0, 1, 2, 3}
        starts.add(nearest[0])
    assert len(starts) > 1
    if kind in ("videos", "frames", "npy"):  # the first of ten is for evaluation
        assert frames(source, "eval").mean() == pytest.approx(250, abs=4)
    env = make("finger_spin", missing_rate=0, backgrounds=source)
    background = env.reset()[0]["rgb"][~env.world.foreground]
    assert np.ptp(background.astype(int), axis=0).max() <= 4


def test_one_frame_is_a_background_too(tmp_path):
    np.save(tmp_path / "one.npy", array_of([70]))
    assert (frames(tmp_path / "one.npy") == 70).all()


def test_a_video_is_scaled_not_cropped(tmp_path):
    import av

    picture = np.zeros((80, 96, 3), np.uint8)
    picture[:40, 48:, 0] = 255  # red in the upper right quarter
    (tmp_path / "video").mkdir()
    with av.open(str(tmp_path / "video" / "0.png"), "w", format="image2") as container:
        stream = container.add_stream("png")
        stream.width, stream.height, stream.pix_fmt = 96, 80, "rgb24"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())
    expected = np.zeros((64, 64, 3), int)
    expected[:32, 32:, 0] = 255
    assert np.abs(frames(tmp_path, count=1)[0].astype(int) - expected).mean() < 2


class Payload:
    """What unpickling this would create must never appear."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("nested", [False, True])
def test_a_pickle_that_runs_code_is_refused(tmp_path, nested):
    payload = Payload(tmp_path / "executed")
    payload = np.array([payload, None], object) if nested else payload
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps(payload))
    with pytest.raises(ValueError, match="bad.pkl"):
        make_env("finger_spin", backgrounds=tmp_path / "bad.pkl")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("kind", ["missing", "empty", "garbage.mp4", "cut.mp4", "garbage.npy", "garbage.pkl",
                                  "float.npy", "small.npy", "a/0.jpg", "sound.mp4"])
def test_bad_backgrounds_are_named(tmp_path, kind):
    source = tmp_path / "source"
    if kind != "missing":
        source.mkdir()
    if kind.startswith(("garbage", "a/")):
        (source / "a").mkdir()
        (source / kind).write_bytes(b"no video at all" * 100)
    elif kind == "cut.mp4":
        write_video(tmp_path / "whole.mp4", LEVELS)
        (source / kind).write_bytes((tmp_path / "whole.mp4").read_bytes()[:600])
    elif kind == "float.npy":
        np.save(source / kind, array_of(LEVELS).astype(float))
    elif kind == "small.npy":
        np.save(source / kind, array_of(LEVELS)[:, ::2, ::2])
    elif kind == "sound.mp4":
        import av

        with av.open(str(source / kind), "w") as container:
            stream = container.add_stream("aac", rate=44100)
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            sound.sample_rate = 44100
            container.mux(stream.encode(sound))
            container.mux(stream.encode())
    named = source if kind in ("missing", "empty") else source / kind
    if named.suffix in (".npy", ".pkl"):
        source = named
    with pytest.raises(ValueError) as error:
        make_env("finger_spin", backgrounds=source)
    assert str(named) in str(error.value) and "\n" not in str(error.value)


def test_an_unreadable_video_among_good_ones_is_not_skipped(tmp_path):
    for name in ("a", "b", "c"):
        write_video(tmp_path / f"{name}.mp4", LEVELS)
    (tmp_path / "d.mp4").write_bytes(b"no video at all" * 100)
    with pytest.raises(ValueError, match="d.mp4"):
        for seed in range(20):
            frames(tmp_path, seed=seed)


# ---- 3. Multi-Modal Natural MuJoCo ----


@pytest.mark.parametrize("task", DOMAINS)
def test_depth_is_in_metres(make, task):
    env = make(task, missing_rate=0)
    observation = rollout(env, 30)[-1][0]
    physics = env.world.environment.physics
    reference = np.minimum(physics.render(64, 64, camera_id=0, depth=True), envs.MAX_DEPTH)
    assert observation["depth"][..., 0] == pytest.approx(reference, rel=1e-3)
    assert (observation["depth"] == observation["depth"].astype(np.float16)).all()
    assert (observation["depth"] == envs.MAX_DEPTH).any()  # the sky: the video is not in it
    body = observation["depth"][..., 0][env.world.foreground]
    distance = np.linalg.norm(physics.data.cam_xpos[0] - physics.data.subtree_com[1])
    assert abs(np.median(body) - distance) < 0.5


@pytest.mark.dev(11)
@pytest.mark.parametrize("task", DOMAINS)
def test_foreground_is_exact(make, task):
    env = make(task, missing_rate=0)
    env.reset()
    world, rng = env.world, np.random.default_rng(0)
    physics = world.environment.physics
    ground = physics.model.name2id("floor" if task == "walker_walk" else "ground", "geom")
    for _ in range(60):
        rgb = env.step(rng.uniform(-1, 1, env.action_space.shape))[0]["rgb"]
        label = physics.render(64, 64, camera_id=0, segmentation=True)
        geom = 5  # mjOBJ_GEOM
        is_ground = (label[..., 0] == ground) & (label[..., 1] == geom)
        assert (world.foreground == ((label[..., 0] != -1) & ~is_ground)).all()
    body, _ = world.look()
    assert (rgb[world.foreground] == body[world.foreground]).all()
    assert (rgb[~world.foreground] != body[~world.foreground]).any(-1).mean() > 0.9


@pytest.mark.parametrize("task", list(envs.SUITE))
def test_touch_sites_leave_the_simulation_as_it_was(make, task):
    env = make(task)
    env.reset()
    from dm_control import suite

    domain, name, *_ = envs.SUITE[task]
    original = suite.load(domain, name, task_kwargs={"random": 7})
    env.world.random.seed(7)
    env.world.environment.reset(), original.reset()
    physics = env.world.environment.physics
    for action in np.random.default_rng(0).uniform(-1, 1, (100, *env.action_space.shape)):
        reward = env.step(action)[1]
        assert reward == original.step(action).reward + original.step(action).reward
        assert (physics.get_state() == original.physics.get_state()).all()
    assert physics.time() == pytest.approx(200 * original.control_timestep())


def normal_forces(physics, first, second):
    """Normal force in newtons of each contact between a geom of `first` and one of `second`."""
    import mujoco

    forces = []
    for i, contact in enumerate(physics.data.contact):
        names = {physics.model.id2name(g, "geom") for g in (contact.geom1, contact.geom2)}
        if names & first and names & second:
            force = np.zeros(6)
            mujoco.mj_contactForce(physics.model.ptr, physics.data.ptr, i, force)
            forces.append(force[0])
    return forces


@pytest.mark.dev(10)
def test_soles_feel_the_ground(make):
    env = make("walker_walk", missing_rate=0)
    rng = np.random.default_rng(0)
    felt, free = 0, 0
    for _ in range(3):
        env.reset()
        for _ in range(60):
            env.step(rng.uniform(-1, 1, 6))
            physics = env.world.environment.physics
            physics.forward()  # contacts and sensors of one and the same moment
            touch = np.expm1(env.world.sense(["touch"])["touch"])
            for newtons, foot in zip(touch, ("right_foot", "left_foot")):
                expected = sum(normal_forces(physics, {foot}, {"floor"}))
                assert newtons == pytest.approx(expected, rel=1e-4, abs=1e-4)
                felt, free = felt + (expected > 0), free + (expected == 0)
    assert felt > 50 and free > 50


def test_cup_feels_the_ball_inside_it_only(make):
    env = make("cup_catch", missing_rate=0)
    env.reset()
    physics = env.world.environment.physics
    weight = 9.81 * physics.named.model.body_mass["ball"]
    for ball_z, newtons in ((0.33, weight), (0.05, 0)):  # in the cup; hanging from its string
        with physics.reset_context():
            physics.named.data.qpos["ball_x"], physics.named.data.qpos["ball_z"] = 0.001, ball_z
        for _ in range(300):
            observation, *_ = env.step([0, 0])
            env.t = 0
        assert np.expm1(observation["touch"][0]) == pytest.approx(newtons, rel=0.02, abs=1e-6)


def test_cup_feels_nearly_every_contact_inside_it(make):
    env = make("cup_catch", missing_rate=0)
    env.reset()
    physics = env.world.environment.physics
    with physics.reset_context():
        physics.named.data.qpos["ball_z"] = 0.35  # just above the bottom of the cup
    walls = {f"cup_part_{i}" for i in range(5)}
    felt, missed = 0, 0
    for action in np.random.default_rng(0).uniform(-0.5, 0.5, (400, 2)):
        observation, *_ = env.step(action)
        physics.forward()
        touch = env.world.sense(["touch"])["touch"][0]
        inside = abs(physics.ball_to_target()).max() < 0.05
        if inside and sum(normal_forces(physics, {"ball"}, walls)) > 0.01:
            felt, missed = felt + (touch > 0), missed + (touch == 0)
    assert felt > 100 and missed <= 0.02 * felt


def test_fingertip_feels_the_spinner(make):
    env = make("finger_spin", missing_rate=0, seed=1)
    touched = 0
    for actions in np.random.default_rng(1).uniform(-1, 1, (3, 100, 2)).repeat(4, 1):
        env.reset()
        for action in actions:
            observation, *_ = env.step(action)
            sensors = env.world.environment.physics.named.data.sensordata[["touchtop", "touchbottom"]]
            assert np.expm1(observation["touch"]) == pytest.approx(sensors, rel=1e-4)
            touched += (sensors > 0).any()
    assert touched > 10


def test_two_environments_share_a_process(make):
    alone = rollout(make("finger_spin", seed=5), 20)
    one, two = make("finger_spin", seed=5), make("walker_walk", seed=6)
    rng, together = np.random.default_rng(0), [one.reset()]
    two.reset()
    for _ in range(20):
        together.append(one.step(rng.uniform(-1, 1, 2).astype(np.float32)))
        two.step(np.zeros(6))
        two.world.environment.physics.render(64, 64, camera_id=0, depth=True)
    assert same(alone, together)


@pytest.mark.parametrize("gl, library", [(None, "EGL"), ("osmesa", "OSMesa")])
def test_missing_opengl_is_explained(gl, library):
    program = f"""
import ctypes, os, sys
os.environ.pop("MUJOCO_GL", None), os.environ.pop("PYOPENGL_PLATFORM", None)
{f'os.environ["MUJOCO_GL"] = {gl!r}' if gl else ''}
class NoOpenGL(ctypes.CDLL):
    def __init__(self, name, *args, **kwargs):
        if name and name.startswith(("libGL", "libEGL", "libOpenGL", "libOSMesa")):
            raise OSError(name)
        super().__init__(name, *args, **kwargs)
ctypes.CDLL = NoOpenGL
ctypes.cdll = ctypes.LibraryLoader(NoOpenGL)
import envs
try:
    envs.make_env("finger_spin").reset()
except RuntimeError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=Path(envs.__file__).parent,
                            capture_output=True, text=True)
    assert "libegl1" in result.stdout and "libosmesa6" in result.stdout, result.stderr


@pytest.mark.skipif(not Path(envs.MESA).exists(), reason="no Mesa here")
def test_pictures_are_drawn_without_a_gpu():
    """Also where there is one."""
    program = """
import os
for name in ("MUJOCO_GL", "MUJOCO_EGL_DEVICE_ID", "PYOPENGL_PLATFORM", "__EGL_VENDOR_LIBRARY_FILENAMES",
             "LP_NUM_THREADS"):
    os.environ.pop(name, None)
import envs
env = envs.make_env("finger_spin")
env.reset()
from OpenGL import GL
with env.world.environment.physics.contexts.gl.make_current() as gl:
    print(gl.call(GL.glGetString, GL.GL_RENDERER).decode())
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=Path(envs.__file__).parent,
                            capture_output=True, text=True)
    assert "llvmpipe" in result.stdout, result.stderr


@pytest.mark.skipif(not Path(envs.MESA).exists(), reason="no Mesa here")
@pytest.mark.parametrize("device", [None, "0"])
def test_a_gpu_is_asked_for_by_its_number(monkeypatch, device):
    """Every vendor's EGL stays in sight then."""
    for name in ("MUJOCO_EGL_DEVICE_ID", "__EGL_VENDOR_LIBRARY_FILENAMES"):
        monkeypatch.setenv(name, "")  # restored afterwards
        monkeypatch.delenv(name)
    if device is not None:
        monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", device)
    world = envs.make_env("finger_spin").world
    world.load()
    world.close()
    assert ("__EGL_VENDOR_LIBRARY_FILENAMES" in os.environ) == (device is None)


# ---- 4. The toy world ----


def toy_return(env, policy):
    _, info = env.reset()
    total = 0.0
    for _ in range(env.episode_steps):
        _, reward, _, _, info = env.step(policy(info["position"]))
        assert 0 <= reward <= 1
        total += reward
    return total


def test_toy_returns(make):
    env, rng = make("toy_xy"), np.random.default_rng(0)
    scripted = np.mean([toy_return(env, envs.scripted_toy_action) for _ in range(60)])
    at_random = np.mean([toy_return(env, lambda position: rng.uniform(-1, 1, 2)) for _ in range(60)])
    assert scripted == pytest.approx(91, abs=1.5) and at_random == pytest.approx(12, abs=3)
    blind = np.mean([toy_return(env, lambda position: np.zeros(2)) for _ in range(60)])
    assert blind < 25  # the gusts carry away who does not look


@pytest.mark.parametrize("name", ["camera", "front", "rear"])
def test_each_camera_tells_both_coordinates(name):
    camera = envs.ToyCamera(name)
    grid = np.linspace(0, 1, 41)
    pictures = {(x, y): camera.draw(x, y).astype(int) for x in grid for y in grid}
    rng = np.random.default_rng(0)
    for position in rng.random((20, 2)):
        picture = camera.draw(*position)
        nearest = min(pictures, key=lambda p: np.abs(pictures[p] - picture).sum())
        assert np.abs(nearest - position).max() < 0.05


def disc(picture):
    return (picture[..., 0] > 150) & (picture[..., 1] < 100)


def test_two_cameras_look_from_opposite_sides():
    front, rear = envs.ToyCamera("front"), envs.ToyCamera("rear")
    assert (front.draw(0.3, 0.2) == rear.draw(0.7, 0.8)).mean() > 0.98  # turned by half a turn
    red = [disc(camera.draw(0.8, 0.1)) for camera in (front, rear)]
    assert red[0].sum() > 3 * red[1].sum()  # near to one, far from the other
    assert np.nonzero(red[0])[1].mean() > 40 and np.nonzero(red[1])[1].mean() < 28


def test_toy_sensors_agree(make):
    for task in envs.TOY:
        env = make(task, missing_rate=0, seed=2)
        observation, info = env.reset()
        x, y = np.float32(info["position"])
        expected = {"position": [x, y], "x": [x], "y": [y]}
        for name in set(expected) & set(observation):
            assert (observation[name] == expected[name]).all()
        assert np.argwhere(disc(env.render())).mean(0) == pytest.approx(
            [64 * (1.1 - y) / 1.2 - 0.5, 64 * (x + 0.1) / 1.2 - 0.5], abs=0.5)


# ---- 5. Environments ----


@pytest.mark.parametrize("task", [*envs.SUITE, *envs.TOY])  # Table Wiping: test_wiping.py
def test_gymnasium_finds_no_fault(task):
    gymnasium.register(f"{task}-v0", entry_point=lambda render_mode="rgb_array": make_env(task))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gymnasium.make(f"{task}-v0").unwrapped
        check_env(env)
        env.close()
    del gymnasium.registry[f"{task}-v0"]


@pytest.mark.parametrize("task, expected", [
    ("finger_spin", {"rgb": (64, 64, 3), "depth": (64, 64, 1), "touch": (2,), "present": (3,)}),
    ("walker_run", {"rgb": (64, 64, 3), "depth": (64, 64, 1), "touch": (2,), "present": (3,)}),
    ("cup_catch", {"rgb": (64, 64, 3), "depth": (64, 64, 1), "touch": (1,), "present": (3,)}),
    ("toy", {"position": (2,), "camera": (64, 64, 3), "present": (2,)}),
    ("toy_two_cameras", {"front": (64, 64, 3), "rear": (64, 64, 3), "present": (2,)}),
    ("toy_xy", {"x": (1,), "y": (1,), "present": (2,)}),
])
@pytest.mark.fig(4)
def test_spaces(make, task, expected):
    env = make(task)
    space = env.observation_space
    assert list(space) == list(expected)  # in this order
    assert {name: box.shape for name, box in space.items()} == expected
    for observation, *_ in rollout(env, 3):
        assert list(observation) == list(expected) and observation in space
    for box in list(space.values())[:-1]:
        assert box.dtype == (np.uint8 if box.shape[-1] == 3 else np.float32)
    repeat, steps = (2, 500) if task in envs.SUITE else (1, 100)
    assert (env.unwrapped.action_repeat, env.unwrapped.episode_steps) == (repeat, steps)
    assert env.action_space.dtype == np.float32 and set(env.action_space.high) == {1}


@pytest.mark.dev(15)
@pytest.mark.parametrize("task", ["finger_spin", "walker_stand", "cup_catch", "toy", "toy_xy"])
def test_the_seed_decides_everything(make, task):
    one, two, other = make(task, seed=4), make(task, seed=4), make(task, seed=5)
    first, second = rollout(one, 15), rollout(one, 15)
    assert same(first, rollout(two, 15)) and same(second, rollout(two, 15))
    assert not same(first, second) and not same(first, rollout(other, 15))
    one.reset(seed=8), other.reset(seed=8)
    assert same(rollout(one, 15), rollout(other, 15))


def test_global_generators_are_left_alone(make):
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    rollout(make("walker_walk"), 5), rollout(make("toy"), 5)
    assert (np.random.get_state()[1] == before).all()


@pytest.mark.parametrize("task", ["toy_xy", "finger_spin"])
def test_the_time_limit_truncates(make, task):
    env = make(task)
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(np.zeros(2))
    results = rollout(env, env.episode_steps)[1:]
    assert not any(terminated for _, _, terminated, _, _ in results)
    assert [truncated for *_, truncated, _ in results] == [False] * (env.episode_steps - 1) + [True]
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(np.zeros(2))


@pytest.mark.parametrize("task", ["toy", "walker_walk"])
def test_actions_are_clipped(make, task):
    one, two = make(task), make(task)
    one.reset(), two.reset()
    size = one.action_space.shape
    assert same(one.step(np.full(size, -1.0)), two.step(np.full(size, -2.0)))


@pytest.mark.parametrize("wrong, named", [
    (dict(task="hopper_hop"), "finger_spin"),
    (dict(missing_rate=1.0), "[0, 1)"),
    (dict(missing_rate=-0.1), "[0, 1)"),
    (dict(missing_rate=float("nan")), "[0, 1)"),
    (dict(split="test"), "eval"),
    (dict(missing_process="markov"), "released"),
    (dict(missing_process="released", missing_rate=0.5), "0.375"),
    (dict(remove=("sonar",)), "depth"),
    (dict(remove=("rgb", "depth", "touch")), "touch"),
    (dict(randomize=True), "table_wiping"),
])
def test_wrong_arguments_are_explained(wrong, named):
    with pytest.raises(ValueError) as error:
        make_env(**{"task": "finger_spin", **wrong})
    assert named in str(error.value) and "\n" not in str(error.value)


def test_table_wiping_says_what_it_needs(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "robosuite" else find(name, *a))
    with pytest.raises(ValueError, match="pip install -r requirements-wiping.txt") as error:
        make_env("table_wiping")
    assert "\n" not in str(error.value)


# ---- 6. Vectors of environments ----


def vector_rollout(task, num_envs, steps, **kwargs):
    vector = make_vector_env(task, num_envs, **kwargs)
    rng = np.random.default_rng(0)
    results = [vector.reset()]
    for _ in range(steps):
        results.append(vector.step(rng.uniform(-1, 1, vector.action_space.shape).astype(np.float32)))
    vector.close()
    return results


def test_vector_is_deterministic_and_its_environments_differ():
    one, two = (vector_rollout("toy", 3, 30, seed=1) for _ in range(2))
    assert all(data_equivalence(a[0], b[0], exact=True) for a, b in zip(one, two))
    positions = one[0][1]["position"]
    assert len({tuple(p) for p in positions}) == 3
    other = vector_rollout("toy", 3, 0, seed=2)[0][1]["position"]
    assert not {tuple(p) for p in positions} & {tuple(p) for p in other}


def test_vector_resets_on_the_step_after_the_end():
    results = vector_rollout("toy_xy", 2, 102)
    assert results[100][3].all() and not results[99][3].any() and not results[101][3].any()
    assert (results[101][1] == 0).all() and (results[102][1] > 0).all()
    before, after = results[100][4]["position"], results[101][4]["position"]
    assert (np.abs(before - after).max(1) > 0.02).all()


def test_vector_of_the_control_suite_after_opengl_was_used_here(make):
    make("finger_spin").reset()  # a fork of this process would hang at its first picture
    vector = make_vector_env("finger_spin", 1, seed=3)
    assert list(vector.single_observation_space) == ["rgb", "depth", "touch", "present"]
    [(observation, _), (after, *_)] = [vector.reset(), vector.step(np.zeros((1, 2), np.float32))]
    vector.close()
    [seed] = np.random.SeedSequence(3).generate_state(1, np.uint64).tolist()
    alone = make("finger_spin", seed=seed)
    for name, value in alone.reset()[0].items():
        assert (observation[name][0] == value).all() and observation[name].dtype == value.dtype
    assert (after["rgb"][0] == alone.step(np.zeros(2))[0]["rgb"]).all()


def test_vector_forks_unless_opengl_or_cuda_is_open(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("""
import envs, torch
if __name__ == "__main__":
    for cuda_is_open in (False, True):
        torch.cuda.is_initialized = lambda: cuda_is_open
        vector = envs.make_vector_env("walker_walk", 2)
        print(vector.reset()[0]["rgb"].shape, vector.context)
        vector.close()
""")
    result = subprocess.run([sys.executable, script], env=os.environ | {"PYTHONPATH": str(Path(envs.__file__).parent)},
                            capture_output=True, text=True, timeout=120)
    assert result.stdout == "(2, 64, 64, 3) None\n(2, 64, 64, 3) spawn\n", result.stderr


def test_the_file_works_alone(tmp_path):
    shutil.copy(envs.__file__, tmp_path)
    result = subprocess.run([sys.executable, "-I", "envs.py"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and "scripted return" in result.stdout, result.stderr
