"""envs.py: missing data, any environment, procedural backgrounds, the control suite, the toy world, seeds, workers."""

import asyncio
import errno
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Text
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


# ---- 2. Any environment ----


class Arm(gymnasium.Env):
    """Somebody's robot: nested sensors of all kinds, an action of three motors, episodes of different lengths."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}
    render_mode = None

    def __init__(self, length=lambda rng: rng.integers(3, 30), sensors=None, action=None):
        self.length = length
        self.observation_space = sensors or Dict({
            "images": Dict({"top": Box(0, 255, (48, 96, 3), np.uint8), "wrist": Box(0, 1, (32, 32, 3), np.float64)}),
            "depth": Box(0, 30, (120, 160, 1), np.float64), "grey": Box(0, 255, (50, 40), np.uint8),
            "joints": Box(-np.inf, np.inf, (7,), np.float64), "count": Box(1, 9, (), np.int64),
        })  # fmt: skip
        self.action_space = action or Box(np.float64([-2, 0, 5]), np.float64([2, 1, 6]), dtype=np.float64)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.end = 0, self.length(self.np_random)
        self.observation_space.seed(int(self.np_random.integers(2**31)))
        return self.observation_space.sample(), {}

    def step(self, action):
        self.t, self.action = self.t + 1, action
        return self.observation_space.sample(), float(self.t), self.t == self.end, False, {}


def test_anybodys_sensors_take_the_forms_that_the_model_reads():
    env = envs.MissingSensors(Arm(), seed=0)
    expected = {"images.top": envs.IMAGE, "images.wrist": envs.IMAGE, "depth": envs.DEPTH, "grey": envs.IMAGE,
                "joints": Box(-np.inf, np.inf, (7,), np.float32), "count": Box(0, 9, (1,), np.float32),
                "present": MultiBinary(6)}  # fmt: skip
    assert dict(env.observation_space.items()) == expected
    assert list(env.observation_space)[-1] == "present"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of infinite bounds, and of a wrapper around an environment
        check_env(env)
    for observation, *_ in rollout(envs.MissingSensors(Arm(lambda rng: 99), seed=0), 40):
        assert observation in env.observation_space
        for name, present in zip(env.sensors, observation["present"]):
            assert observation[name].any() == present
        for name in ("images.top", "images.wrist", "grey"):
            assert not observation[name].any() or 110 < observation[name].mean() < 145


@pytest.mark.parametrize("shape", [(64, 64), (128, 192), (100, 37), (30, 20)])
def test_images_are_means_over_areas(shape):
    image = np.random.default_rng(0).random((*shape, 2)).astype(np.float32)
    fine = image.astype(float).repeat(64, 0).repeat(64, 1)  # each new pixel covers a whole number of these
    expected = fine.reshape(64, shape[0], 64, shape[1], 2).mean((1, 3))
    assert envs.resize(image) == pytest.approx(expected, abs=1e-5)


def test_kinds_of_readings():
    grey = np.arange(64 * 64).reshape(64, 64).astype(np.uint8)
    assert (envs.fit(grey, envs.IMAGE) == grey[..., None]).all()
    assert (envs.fit(grey[..., None], envs.IMAGE) == grey[..., None]).all()
    colour = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    assert (envs.fit(colour, envs.IMAGE) == colour).all()
    assert (envs.fit(colour.astype(float), envs.IMAGE) == colour).all()  # of another type than it says
    assert (envs.fit(colour / 255, envs.IMAGE, unit=True) == colour).all()
    metres = np.full((128, 128, 1), 2.5)
    metres[:2, :2], metres[2:4, :2], metres[4:6, :2], metres[6:8, :2] = np.nan, np.inf, 1000, -np.inf
    depth = envs.fit(metres, envs.DEPTH)
    assert depth.dtype == np.float32 and (depth[:4, 0, 0] == [10, 10, 10, 0]).all() and (depth[4:] == 2.5).all()
    assert envs.fit(np.int64(3), Box(0, 9, (1,), np.float32)).tolist() == [3]


def refused(env):
    with pytest.raises(ValueError) as error:
        envs.MissingSensors(env)
    assert "\n" not in str(error.value) and "allowed" in str(error.value) or "name" in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("space", [
    Box(0, 65535, (64, 64, 1), np.uint16), Box(0, 10_000, (64, 64, 1), np.int32), Box(0, 5000, (64, 64, 1)),  # millimetres?
    Box(0, 1, (64, 64, 1), np.float32), Box(-1, 1, (64, 64, 1), np.float32), Box(0, 255, (64, 64, 1), np.float32),  # grey?
    Box(0, 255, (64, 64, 3), np.float32), Box(0, 255, (3, 64, 64), np.uint8), Box(0, 255, (64, 64, 4), np.uint8),
    Box(0, 9, (4, 4), np.float32), Box(0, 9, (0,), np.float32), Discrete(3), MultiBinary(3), Text(5),
], ids=str)  # fmt: skip
def test_other_sensors_are_refused_by_name(space):
    assert "Arm" in (line := refused(Arm(sensors=Dict({"fine": Box(0, 1, (2,)), "odd": space})))) and "'odd'" in line


@pytest.mark.parametrize("space", [Discrete(3), MultiDiscrete([2, 2]), Box(-1, np.inf, (2,)), Box(0, 5, (2,), np.int64)], ids=str)
def test_other_actions_are_refused(space):
    assert "bounded Box of floats" in refused(Arm(action=space))


@pytest.mark.parametrize("name", [*envs.RESERVED, "front/range", "a=b", "a,b"])
def test_names_that_the_replay_keeps_are_refused(name):
    assert repr(name) in refused(Arm(sensors=Dict({"fine": Box(0, 1, (2,)), name: Box(0, 1, (2,))})))


def test_two_sensors_of_one_name_are_refused():
    assert "a.b" in refused(Arm(sensors=Dict({"a.b": Box(0, 1, (2,)), "a": Dict({"b": Box(0, 1, (2,))})})))


def test_actions_are_rescaled():
    env = envs.MissingSensors(Arm(lambda rng: 99))
    env.reset()
    assert env.action_space == Box(-1, 1, (3,), np.float32)
    for action, expected in (([-1, -1, -1], [-2, 0, 5]), ([1, 1, 1], [2, 1, 6]), ([0, 0, 9], [0, 0.5, 6])):
        env.step(np.float32(action))
        assert env.unwrapped.action.tolist() == expected
    env = envs.MissingSensors(Arm(action=Box(-3, 3, (2, 2), np.float32)))
    env.reset(), env.step(np.float32([-1, 0, 0.5, 1]))
    assert env.unwrapped.action.tolist() == [[-3, 0], [1.5, 3]] and env.unwrapped.action.dtype == np.float32


def test_missing_data_go_on_where_episodes_have_no_limit():
    env = envs.MissingSensors(Arm(lambda rng: 10**9, sensors=Box(0, 1, (2,))), missing_rate=0.75, seed=1)
    env.reset()
    present = [env.step(np.zeros(3))[0]["present"][0] for _ in range(2500)]
    assert (env.episode_steps, env.action_repeat) == (None, 1)
    assert env.missing.shape == (3000, 1) and present == (~env.missing[1:2501, 0]).tolist()
    assert (env.missing.reshape(3, 1000).sum(1) == 750).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_vector_that_is_not_finite_is_missing(value):
    """As in `methods.Player`; the schedule of missing data stays as it was."""

    class Faulty(Arm):
        def step(self, action):
            observation, *rest = super().step(action)
            observation["near"][1] = value if self.t % 3 == 0 else 0.5
            return observation, *rest

    sensors = Dict({"far": Box(0, 1, (2,)), "near": Box(-np.inf, np.inf, (2,))})
    env = envs.MissingSensors(Faulty(lambda rng: 99, sensors), missing_rate=0)
    env.reset()
    for t in range(1, 10):
        observation = env.step(np.zeros(3))[0]
        assert observation["present"].tolist() == [1, t % 3 > 0] and not env.missing[t].any()
        assert np.isfinite(observation["near"]).all() and (observation["near"] != 0).any() == (t % 3 > 0)


def test_a_float_picture_that_is_not_finite_is_missing_and_a_mask_of_0_and_1_is_black_and_white():
    sensors = Dict({"rgb": Box(0, 1, (64, 64, 3)), "mask": Box(0, 1, (64, 64, 1), np.uint8), "wide": Box(0.1, np.inf, (64, 64, 1))})
    arm = Arm(lambda rng: 99, sensors)
    env = envs.MissingSensors(arm, missing_rate=0, seed=0)
    env.reset()
    assert env.sensors["wide"] == envs.DEPTH and set(np.unique(env.step(np.zeros(3))[0]["mask"])) == {0, 255}
    reading = sensors.sample() | {"rgb": np.full((64, 64, 3), np.nan, np.float32)}
    arm.step = lambda action: (reading, 0.0, False, False, {})
    assert env.step(np.zeros(3))[0]["present"].tolist() == [int(name != "rgb") for name in env.sensors]
    lying = envs.LyingSensors(envs.FitSpaces(arm), {"rgb": "black", "mask": "black"}, rate=0.99)
    for env in (lying, envs.LyingSensors(envs.FitSpaces(Arm(lambda rng: 99, sensors)), {"rgb": "other"}, 0.99, envs.FitSpaces(arm))):
        env.reset(seed=0)
        observation, *_, info = env.step(np.zeros(3))
        assert info["lying"][list(env.sensors).index("rgb")] == 0 and ("rgb" in observation) == (env is not lying)


def test_the_registered_time_limit_counts_and_not_an_attribute_that_counts_steps():
    arm = Arm()
    arm.episode_steps = 0
    env = gymnasium.wrappers.TimeLimit(arm, 30)
    arm.spec = gymnasium.envs.registration.EnvSpec("Arm-v0", max_episode_steps=30)
    assert envs.MissingSensors(env).episode_steps == 30
    lying = envs.make_env("Pendulum-v1", missing_rate=0, faults={"state": "black"})
    lying.reset(seed=0)
    told = [lying.step(np.zeros(1))[-1]["lying"][0] for _ in range(200)]
    assert sum(told) + lying.env.lies[0, 0] == round(0.5 * 201)


def test_an_environment_may_tell_its_attributes():
    arm = Arm()
    arm.episode_steps, arm.action_repeat = 30, 4
    env = envs.MissingSensors(gymnasium.wrappers.TimeLimit(arm, 30))
    env.reset()
    assert (env.episode_steps, env.action_repeat, len(env.missing)) == (30, 4, 31)


def test_its_own_time_limit_truncates_and_its_end_terminates():
    for end, limit, expected in ((5, 9, (True, False)), (9, 5, (False, True))):
        env = envs.MissingSensors(gymnasium.wrappers.TimeLimit(Arm(lambda rng, end=end: end), limit))
        results = rollout(env, 5)
        assert results[-1][2:4] == expected and not any(r[2] or r[3] for r in results[1:-1])
        with pytest.raises(gymnasium.error.ResetNeeded):
            env.step(np.zeros(3))


@pytest.mark.parametrize("task", ["toy", "finger_spin", "Arm"])
def test_what_is_missing_is_not_rendered(make, monkeypatch, task):
    class Camera(Arm):
        render_mode = "rgb_array"

        def render(self):
            drawn.append(1)
            return np.full((30, 50, 3), 7, np.uint8)

    drawn, seen = [], 0
    if task == "Arm":
        env = envs.MissingSensors(Camera(lambda rng: 10**9), missing_rate=0.75, seed=0)
    else:
        env = make(task, missing_rate=0.75)
        owner, name = (envs.ToyCamera, "draw") if task == "toy" else (envs.ControlSuite, "look")
        draw = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: (drawn.append(1), draw(*args))[1])
    for observation, *_ in rollout(env, 60):
        present = dict(zip(env.sensors, observation["present"]))
        seen += present["camera"] if task != "finger_spin" else present["rgb"] or present["depth"]
        assert task != "Arm" or (observation["camera"] == 7 * present["camera"]).all()
    assert 0 < seen < 61 and len(drawn) == seen
    assert env.render().any()
    env.unwrapped.wanted, before = (), len(drawn)
    if task != "Arm":  # a policy that does not look need not render at all
        assert env.unwrapped.reset(seed=1)[0] == env.unwrapped.step(np.zeros(2))[0] == {} and len(drawn) == before


def test_the_world_alone_is_the_world_behind_the_sensors(make):
    env, world = make("toy", missing_rate=0), make("toy").unwrapped
    names = list(env.sensors)
    world.wanted = names
    env.reset(seed=3), world.reset(seed=3)
    behind, alone = env.step([0.5, -1]), world.step([0.5, -1])
    assert same(behind[1:], alone[1:]) and all((behind[0][name] == alone[0][name]).all() for name in names)


def test_a_task_of_gymnasium(tmp_path):
    """Pendulum needs pygame for its pictures only."""
    env = make_env("Pendulum-v1", seed=4)
    assert list(env.observation_space) == ["state", "present"]
    assert (env.episode_steps, env.action_repeat) == (200, 1)
    results = rollout(env, 200)
    assert [r[3] for r in results[1:]] == [False] * 199 + [True] and not any(r[2] for r in results[1:])
    assert env.missing.shape == (201, 1) and env.missing.sum() == round(0.375 * 201)
    assert same(results, rollout(make_env("Pendulum-v1", seed=4), 200))


def test_a_task_of_a_package(tmp_path, monkeypatch):
    (tmp_path / "my_robots.py").write_text(
        "import gymnasium, test_envs\n"
        "gymnasium.register('Arm-v0', lambda **kwargs: test_envs.Arm(**kwargs), max_episode_steps=12)\n")
    monkeypatch.syspath_prepend(tmp_path)
    small = {"sensors": Dict({"joints": Box(-9, 9, (3,))})}
    vector = make_vector_env("my_robots:Arm-v0", 3, task_kwargs=small)
    vector.reset(seed=[1, 2, 3])
    lengths, seen, resets = np.zeros(3, int), set(), np.zeros(3, bool)
    for _ in range(60):
        observation, reward, terminated, truncated, _ = vector.step(np.zeros((3, 3), np.float32))
        assert (reward[resets] == 0).all() and (reward[~resets] == lengths[~resets] + 1).all()
        lengths = np.where(resets, 0, lengths + 1)
        resets = terminated | truncated
        assert (truncated <= (lengths == 12)).all()
        seen |= set(lengths[resets].tolist())
    assert vector.get_attr("episode_steps") == (12, 12, 12) and len(seen) > 2
    vector.close()
    del gymnasium.registry["Arm-v0"]


@pytest.mark.parametrize("task", ["Hopper-v5", "Pendulum-v1"])
def test_a_camera_beside_the_state(task):
    pytest.importorskip({"Hopper-v5": "imageio", "Pendulum-v1": "pygame"}[task])
    env = make_env(task, missing_rate=0, task_kwargs={"render_mode": "rgb_array"})
    assert list(env.observation_space) == ["state", "camera", "present"]
    for observation, *_ in rollout(env, 3):
        assert observation in env.observation_space and observation["camera"].std() > 1
        assert np.abs(observation["camera"] - envs.fit(env.render(), envs.IMAGE).astype(int)).max() >= 0
    env.close()


# ---- 3. Procedural backgrounds ----


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


# ---- 4. Multi-Modal Natural MuJoCo ----


@pytest.mark.parametrize("task", DOMAINS)
def test_depth_is_in_metres(make, task):
    env = make(task, missing_rate=0)
    observation = rollout(env, 30)[-1][0]
    physics = env.unwrapped.environment.physics
    reference = np.minimum(physics.render(64, 64, camera_id=0, depth=True), envs.MAX_DEPTH)
    assert observation["depth"][..., 0] == pytest.approx(reference, rel=1e-3)
    assert (observation["depth"] == observation["depth"].astype(np.float16)).all()
    assert (observation["depth"] == envs.MAX_DEPTH).any()  # the sky: the video is not in it
    body = observation["depth"][..., 0][env.unwrapped.foreground]
    distance = np.linalg.norm(physics.data.cam_xpos[0] - physics.data.subtree_com[1])
    assert abs(np.median(body) - distance) < 0.5


@pytest.mark.dev(11)
@pytest.mark.parametrize("task", DOMAINS)
def test_foreground_is_exact(make, task):
    env = make(task, missing_rate=0)
    env.reset()
    world, rng = env.unwrapped, np.random.default_rng(0)
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
    env.unwrapped.random.seed(7)
    env.unwrapped.environment.reset(), original.reset()
    physics = env.unwrapped.environment.physics
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
            physics = env.unwrapped.environment.physics
            physics.forward()  # contacts and sensors of one and the same moment
            touch = np.expm1(env.unwrapped.sense(["touch"])["touch"])
            for newtons, foot in zip(touch, ("right_foot", "left_foot")):
                expected = sum(normal_forces(physics, {foot}, {"floor"}))
                assert newtons == pytest.approx(expected, rel=1e-4, abs=1e-4)
                felt, free = felt + (expected > 0), free + (expected == 0)
    assert felt > 50 and free > 50


def test_cup_feels_the_ball_inside_it_only(make):
    env = make("cup_catch", missing_rate=0, remove=("rgb", "depth"))
    env.reset()
    physics = env.unwrapped.environment.physics
    weight = 9.81 * physics.named.model.body_mass["ball"]
    for ball_z, newtons in ((0.33, weight), (0.05, 0)):  # in the cup; hanging from its string
        with physics.reset_context():
            physics.named.data.qpos["ball_x"], physics.named.data.qpos["ball_z"] = 0.001, ball_z
        for _ in range(300):
            observation, *_ = env.step([0, 0])
            env.t = env.unwrapped.t = 0
        assert np.expm1(observation["touch"][0]) == pytest.approx(newtons, rel=0.02, abs=1e-6)


def test_cup_feels_nearly_every_contact_inside_it(make):
    env = make("cup_catch", missing_rate=0, remove=("rgb", "depth"))
    env.reset()
    physics = env.unwrapped.environment.physics
    with physics.reset_context():
        physics.named.data.qpos["ball_z"] = 0.35  # just above the bottom of the cup
    walls = {f"cup_part_{i}" for i in range(5)}
    felt, missed = 0, 0
    for action in np.random.default_rng(0).uniform(-0.5, 0.5, (400, 2)):
        observation, *_ = env.step(action)
        physics.forward()
        touch = env.unwrapped.sense(["touch"])["touch"][0]
        inside = abs(physics.ball_to_target()).max() < 0.05
        if inside and sum(normal_forces(physics, {"ball"}, walls)) > 0.01:
            felt, missed = felt + (touch > 0), missed + (touch == 0)
    assert felt > 100 and missed <= 0.02 * felt


def test_fingertip_feels_the_spinner(make):
    env = make("finger_spin", missing_rate=0, seed=1, remove=("rgb", "depth"))
    touched = 0
    for actions in np.random.default_rng(1).uniform(-1, 1, (3, 100, 2)).repeat(4, 1):
        env.reset()
        for action in actions:
            observation, *_ = env.step(action)
            sensors = env.unwrapped.environment.physics.named.data.sensordata[["touchtop", "touchbottom"]]
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
        two.unwrapped.environment.physics.render(64, 64, camera_id=0, depth=True)
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
with env.unwrapped.environment.physics.contexts.gl.make_current() as gl:
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
    world = envs.make_env("finger_spin").unwrapped
    world.load()
    world.close()
    assert ("__EGL_VENDOR_LIBRARY_FILENAMES" in os.environ) == (device is None)


# ---- 5. The toy world ----


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
            [192 * (1.1 - y) / 1.2 - 0.5, 192 * (x + 0.1) / 1.2 - 0.5], abs=0.5)


# ---- 6. Environments ----


@pytest.mark.parametrize("task", [*envs.SUITE, *envs.TOY])  # Table Wiping: test_wiping.py
def test_gymnasium_finds_no_fault(task):
    gymnasium.register(f"{task}-v0", entry_point=lambda render_mode="rgb_array": make_env(task).unwrapped,
                       order_enforce=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        world = gymnasium.make(f"{task}-v0", disable_env_checker=True)
        check_env(world)
        warnings.filterwarnings("ignore", ".*is different from the unwrapped version.*")
        env = envs.MissingSensors(world)
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


def test_a_seed_gives_the_episodes_that_it_always_gave(make):
    env = make("toy", seed=5)
    for position, missing in (([0.403118, 0.753592], [0, 1, 2, 38]), ([0.633729, 0.292795], [0, 1, 2, 3])):
        _, info = env.reset()
        assert info["position"] == pytest.approx(position, abs=1e-6)
        assert np.flatnonzero(env.missing[:, 0])[:4].tolist() == missing


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
    (dict(task="toy", backgrounds="/nope"), "control suite"),
    (dict(task="toy", task_kwargs={"size": 3}), "gymnasium.make"),
    (dict(task="no_such_package:Reach-v0"), "no_such_package"),
    (dict(task="CartPole-v1"), "bounded Box"),
    (dict(task="Pendulum-v1", task_kwargs={"size": 3}), "size"),
    (dict(task="Pendulum-v1", task_kwargs={"max_episode_steps": 0}), "max_episode_steps"),
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


# ---- 7. Vectors of environments ----


def vector_rollout(task, num_envs, steps, **kwargs):
    vector = make_vector_env(task, num_envs, **kwargs)
    rng = np.random.default_rng(0)
    results = [vector.reset()]
    for _ in range(steps):
        results.append(vector.step(rng.uniform(-1, 1, vector.action_space.shape).astype(np.float32)))
    vector.close()
    return results


def test_vector_is_deterministic_and_its_environments_differ():
    one, two = (vector_rollout("toy", 3, 30, seed=1, missing_rate=0) for _ in range(2))
    assert all(data_equivalence(a[0], b[0], exact=True) for a, b in zip(one, two))
    positions = one[0][0]["position"]
    assert len({tuple(p) for p in positions}) == 3
    other = vector_rollout("toy", 3, 0, seed=2)[0][0]["position"]
    assert not {tuple(p) for p in positions} & {tuple(p) for p in other}


def test_vector_resets_on_the_step_after_the_end():
    results = vector_rollout("toy_xy", 2, 102, missing_rate=0)
    assert results[100][3].all() and not results[99][3].any() and not results[101][3].any()
    assert (results[101][1] == 0).all() and (results[102][1] > 0).all()
    before, after = (np.concatenate([results[t][0]["x"], results[t][0]["y"]], 1) for t in (100, 101))
    assert (np.abs(before - after).max(1) > 0.02).all()


def test_vector_of_the_control_suite_after_opengl_was_used_here(make):
    make("finger_spin").reset()  # a fork of this process would hang at its first picture
    vector = make_vector_env("finger_spin", 1, seed=3)
    assert list(vector.single_observation_space) == ["rgb", "depth", "touch", "present"]
    [(observation, _), (after, *_)] = [vector.reset(), vector.step(np.zeros((1, 2), np.float32))]
    vector.close()
    alone = make("finger_spin", seed=envs.seeds(3, count=1)[0])
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


@pytest.mark.parametrize("start", ["Thread", "ThreadPoolExecutor", "asyncio"])
def test_workers_outlive_the_thread_that_made_them(start):
    made = []

    def make():
        made.append(make_vector_env("toy", 2))

    if start == "Thread":
        thread = threading.Thread(target=make)
        thread.start(), thread.join()
    elif start == "ThreadPoolExecutor":
        with ThreadPoolExecutor(1) as pool:
            pool.submit(make).result()
    else:
        asyncio.run(asyncio.to_thread(make))
    time.sleep(0.3)
    made[0].reset(), made[0].step(np.zeros((2, 2), np.float32))
    made[0].close()


SLOW = """
import multiprocessing, sys, time
import envs
def begin(self, rng):
    self.position = rng.random(2)
def move(self, action):
    exec(sys.argv[1])
    return 0.0, False
envs.ToyWorld.begin, envs.ToyWorld.move = begin, move
envs.Workers.TIMEOUT = float(sys.argv[2])
if __name__ == "__main__":
    workers = envs.make_vector_env("toy", 2)
    workers.reset()
    print(*[process.pid for process in workers.processes], flush=True)
    for _ in range(int(sys.argv[3])):
        workers.step(workers.action_space.sample())
    print("done")
    workers.close()
"""


def start_slow(*arguments):
    """A program in a session of its own whose environments take their time; its process and its workers' ids."""
    environment = os.environ | {"PYTHONPATH": str(Path(envs.__file__).parent)}
    process = subprocess.Popen([sys.executable, "-c", SLOW, *map(str, arguments)], env=environment, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    return process, [int(pid) for pid in process.stdout.readline().split()]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("step", ["time.sleep(600)", "while True: pass"])
def test_workers_die_with_a_killed_parent_in_the_midst_of_a_step(step):
    process, workers = start_slow(step, 300, 1)
    time.sleep(0.3)
    assert len(workers) == 2 and all(map(is_running, workers))
    process.kill()
    process.communicate(timeout=30)
    deadline = time.monotonic() + 20
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(is_running, workers))


def test_time_that_the_main_process_was_stopped_does_not_count():
    process, workers = start_slow("time.sleep(0.2)", 2, 12)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGSTOP)  # as Ctrl-Z does
    time.sleep(5)
    os.killpg(process.pid, signal.SIGCONT)
    out, err = process.communicate(timeout=60)
    assert out == "done\n" and process.returncode == 0, err
    process, _ = start_slow("time.sleep(60)", 1, 1)
    _, err = process.communicate(timeout=30)
    assert "WorkerError: an environment's process has not answered for 1.0 s" in err


def test_few_file_descriptors_are_reported_in_one_line():
    """Wherever they run out."""
    program = """
import resource
import envs
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
for limit in [*range(5, 60, 3), 200]:
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        workers = envs.make_vector_env("toy_xy", 4)
        workers.reset()
        print("works")
    except envs.WorkerError as error:
        print(error)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        if "workers" in globals():
            workers.close()
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=Path(envs.__file__).parent,
                            capture_output=True, text=True, timeout=120)
    said = result.stdout.splitlines()
    assert len(said) == 20 and result.returncode == 0 and "AttributeError" not in result.stderr, result.stderr
    assert "ulimit -n" in said[0] and said[-1] == "works"
    assert all(line == "works" or "ulimit -n" in line or "Too many open files" in line for line in said)


def test_little_shared_memory_is_reported_in_one_line(monkeypatch):
    def no_space(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("multiprocessing.synchronize.SemLock.__init__", no_space)
    with pytest.raises(envs.WorkerError, match="larger /dev/shm"):
        make_vector_env("toy", 2)


def test_a_worker_that_dies_is_reported_whatever_it_was_asked():
    vector = make_vector_env("toy", 2)
    vector.processes[0].kill(), vector.processes[0].join()
    with pytest.raises(envs.WorkerError, match="has died"):
        vector.get_attr("episode_steps")
    vector.close()


ROBOT = """
import time
import gymnasium, test_envs
import numpy as np
class Robot(test_envs.Arm):
    def reset(self, *, seed=None, options=None):
        observation, _ = super().reset(seed=seed)
        self.contacts = int(self.np_random.integers(1, 9))
        return observation, self.info()
    def step(self, action):
        np.zeros(3) + np.zeros(4 if self.t == 2 else 3)
        return *super().step(action)[:4], self.info()
    def info(self):
        return {"contacts": np.zeros((self.contacts, 3)), "when": self.contacts if self.contacts > 4 else None}
    def close(self):
        open(f"closed-{id(self)}", "w").close()
        time.sleep(CLOSING)
gymnasium.register("Robot-v0", Robot, max_episode_steps=12)
"""


@pytest.fixture
def robot(tmp_path, monkeypatch):
    """Two of somebody's robots in worker processes, whose second step fails; how long they take to close."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def make(closing):
        Path("robot.py").write_text(ROBOT.replace("CLOSING", str(closing)))
        sys.modules.pop("robot", None)
        gymnasium.registry.pop("Robot-v0", None)
        small = {"sensors": Dict({"joints": Box(-9, 9, (3,))}), "length": int_100}
        return make_vector_env("robot:Robot-v0", 2, task_kwargs=small)

    yield make
    sys.modules.pop("robot", None)
    gymnasium.registry.pop("Robot-v0", None)


def int_100(rng):
    return 100


def test_infos_of_any_shape_harm_nobody(robot):
    vector, fits = robot(0), set()
    for seed in range(20):  # as many contacts as there happen to be
        _, info = vector.reset(seed=[seed, seed + 100])
        *_, after = vector.step(np.zeros((2, 3), np.float32))
        for told in (info, after):
            assert told["_contacts"][0]
            fits.add(bool(told["_contacts"][1]))
    assert False in fits, "one that does not fit is left out"
    vector.close()


def test_the_error_of_an_environment_says_where(robot, capfd):
    vector = robot(0)
    vector.reset()
    vector.step(np.zeros((2, 3), np.float32)), vector.step(np.zeros((2, 3), np.float32))
    with pytest.raises(envs.WorkerError, match="^an environment failed: operands could not be broadcast"):
        vector.step(np.zeros((2, 3), np.float32))
    assert 'robot.py", line' in capfd.readouterr().err
    vector.close()


@pytest.mark.parametrize("closing", [0, 60])
def test_every_worker_closes_its_environment_or_is_killed(robot, monkeypatch, closing):
    monkeypatch.setattr(envs.Workers, "GRACE", 2)
    vector = robot(closing)
    vector.reset()
    made_here = len(list(Path().glob("closed-*")))
    vector.step_async(np.zeros((2, 3), np.float32))  # in the midst of a step
    began = time.monotonic()
    vector.close()
    assert time.monotonic() - began < 20 and not any(map(is_running, [process.pid for process in vector.processes]))
    assert len(list(Path().glob("closed-*"))) > made_here


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_workers_leave_signals_to_the_main_process(number):
    vector = make_vector_env("toy", 2)
    vector.reset()
    os.kill(vector.processes[0].pid, number)
    time.sleep(0.1)
    vector.step(np.zeros((2, 2), np.float32))
    vector.close()


def test_seeds_depend_on_every_number():
    drawn = [envs.seeds(*numbers, count=3) for numbers in ((1,), (1, 0), (0, 1), (1, 1))]
    assert len({tuple(d) for d in drawn}) == 4 and drawn[0] == envs.seeds(1, count=3)
