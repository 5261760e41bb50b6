"""Table Wiping: what the cameras show, what randomisation changes, rewards, the end of episodes, seeds.

Skipped where robosuite is not installed: `pip install -r requirements-wiping.txt`.
"""

import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env, data_equivalence
from test_envs import same

import envs
from methods import make_agent
import wiping
from config import TASK_DEFAULTS, Config, decide
from envs import make_env

pytest.importorskip("robosuite", reason="Table Wiping needs: pip install -r requirements-wiping.txt")

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def plain():
    """One simulator for all tests that need no other; every test resets it."""
    env = make_env("table_wiping", missing_rate=0, randomize=False)
    yield env
    env.close()


@pytest.fixture(scope="module")
def randomized():
    env = make_env("table_wiping", missing_rate=0)
    yield env
    env.close()


def rollout(env, seed, decisions=6):
    """Everything that an environment returns under the same small random actions."""
    rng = np.random.default_rng(0)
    results = [env.reset(seed=seed)]
    return results + [env.step(rng.uniform(-0.2, 0.2, 6).astype(np.float32)) for _ in range(decisions)]


def dirt(image):
    """Where a picture without randomisation shows dirt, (64, 64) bool: it is dark brown."""
    image = image.astype(int)
    return (image.sum(-1) < 330) & (image[..., 0] > image[..., 2] + 8)


# ---- 1. What the cameras show ----


@pytest.mark.fig(6)
def test_two_cameras_in_the_papers_order(plain):
    space = plain.observation_space
    assert list(space) == ["workspace", "robot", "present"]
    assert all(space[name] == envs.IMAGE for name in ("workspace", "robot"))
    assert plain.action_space == gymnasium.spaces.Box(-1, 1, (6,), np.float32)
    assert (plain.action_repeat, plain.episode_steps) == (2, 250)
    assert plain.reset(seed=0)[0] in space


@pytest.mark.parametrize("seed", [1, 4, 9])  # both cameras see dirt; at one start in ten `robot` sees none
def test_pictures_are_neither_upside_down_nor_mirrored(plain, seed):
    """Dirt is seen where the camera's pose says that it lies."""
    observation, _ = plain.reset(seed=seed)
    world = plain.unwrapped
    for name, camera in wiping.CAMERAS.items():
        index = world.model.camera(camera).id
        axes = world.data.cam_xmat[index].reshape(3, 3)  # columns: right, up, backwards
        x, y, z = ((world.data.xpos[world.markers] - world.data.cam_xpos[index]) @ axes).T
        scale = 32 / np.tan(np.radians(world.model.cam_fovy[index]) / 2)  # pixels
        column, row = 32 + scale * x / -z, 32 - scale * y / -z
        within = (0 <= column) & (column < 64) & (0 <= row) & (row < 64)
        assert within.sum() > 5
        seen = dirt(observation[name])[row[within].astype(int), column[within].astype(int)]
        assert seen.mean() > 0.9
    brightness = observation["workspace"].mean((1, 2))
    assert brightness[-20:].mean() > 200 > brightness[:8].mean(), "the white table is below, the wall above"


def test_there_are_50_markers_and_wiped_ones_vanish(plain):
    _, info = plain.reset(seed=1)
    world = plain.unwrapped
    assert len(world.markers) == 50 and info["wiped"] == 0
    assert (world.model.geom_rgba[world.discs, 3] == 1).all()
    assert np.ptp(world.data.xpos[world.markers], axis=0)[:2].max() > 0.05
    before = dirt(world.look("birdview")).sum()
    while info["wiped"] < 30:
        *_, info = plain.step(wiping.scripted_action(info))
    assert info["wiped"] == len(world.environment.wiped_markers) == (world.model.geom_rgba[world.discs, 3] == 0).sum()
    plain.step(np.array([0, 0, 1, 0, 0, 0]))
    assert dirt(world.look("birdview")).sum() < 0.95 * before
    assert plain.reset()[1]["wiped"] == 0 and (world.model.geom_rgba[world.discs, 3] == 1).all()


def test_cameras_are_dropped_each_at_its_own_times(plain):
    env = make_env("table_wiping", missing_rate=0.375, randomize=False)
    gaps, complete = rollout(env, 3, 30), rollout(plain, 3, 30)
    env.close()
    assert (env.missing.sum(0) == round(0.375 * 251)).all() and (env.missing[:, 0] != env.missing[:, 1]).any()
    present = np.array([observation["present"] for observation, *_ in gaps])
    assert (present == ~env.missing[:31]).all() and len(np.unique(present, axis=0)) >= 3
    for m, name in enumerate(("workspace", "robot")):
        for (observation, *_), (all_of_it, *_), there in zip(gaps, complete, present[:, m]):
            assert (observation[name] == (all_of_it[name] if there else 0)).all()


def test_a_removed_camera_never_returns():
    env = make_env("table_wiping", missing_rate=0, remove=("workspace",))
    for observation, *_ in rollout(env, 0, 3):
        assert observation["present"].tolist() == [0, 1]
        assert not observation["workspace"].any() and observation["robot"].any()
    env.close()


# ---- 2. Rewards and ends ----


def test_wiping_is_rewarded(plain):
    """Markers that vanish in a decision are worth more than all else in it."""
    _, info = plain.reset(seed=2)
    rewards, wiped = [], [0]
    while wiped[-1] < 20:
        _, reward, _, _, info = plain.step(wiping.scripted_action(info))
        rewards.append(reward)
        wiped.append(info["wiped"])
    rewards, new = np.array(rewards), np.diff(wiped)
    unit = 50 * 500 / (50 * 50 + 500 * (0.01 + 50 * 0.51))  # robosuite's, normalised to its horizon
    assert (new > 0).any() and (rewards[new > 0] > 0.9 * unit * new[new > 0]).all()
    assert rewards[new == 0].max() < 0.5 * unit


def test_the_time_limit_truncates(plain):
    plain.reset(seed=0)
    plain.t = plain.unwrapped.t = plain.episode_steps - 2
    assert plain.step(np.zeros(6))[2:4] == (False, False)
    assert plain.step(np.zeros(6))[2:4] == (False, True)
    with pytest.raises(gymnasium.error.ResetNeeded):
        plain.step(np.zeros(6))


@pytest.mark.dev(17)
def test_a_joint_limit_costs_and_ends_nothing(plain):
    plain.reset(seed=0)
    pull = [plain.step(np.array([-1, 1, 1, 1, 1, 1])) for _ in range(60)]  # the arm away, until a joint's limit
    rewards = np.array([reward for _, reward, *_ in pull])
    assert rewards[0] > -0.1 and rewards[-1] == pytest.approx(-2 * 10 * 500 / (50 * 50 + 500 * (0.01 + 50 * 0.51)))
    assert not any(terminated or truncated for *_, terminated, truncated, _ in pull)


@pytest.mark.dev(17)
def test_a_clean_table_ends_nothing_and_earns_on(plain):
    plain.reset(seed=0)
    robosuite = plain.unwrapped.environment
    robosuite.wiped_markers = list(robosuite.model.mujoco_arena.markers)
    _, reward, *ends, _ = plain.step(np.zeros(6))
    assert ends == [False, False] and reward == pytest.approx(2 * 0.836, abs=0.01)
    assert decide(Config(task="table_wiping")).continuation == "off"  # Dev. D22


# ---- 3. Randomisation ----


def test_training_is_randomized_and_evaluation_is_not():
    made = {split: make_env("table_wiping", split=split).unwrapped.randomize for split in envs.SPLITS}
    assert made == {"train": True, "eval": False}
    assert make_env("table_wiping", split="eval", randomize=True).unwrapped.randomize
    with pytest.raises(ValueError, match="randomize is for table_wiping"):
        make_env("finger_spin", randomize=True)


def test_randomisation_changes_the_pictures_but_not_the_task(plain, randomized):
    one, two = rollout(plain, 5, 12), rollout(randomized, 5, 12)
    assert all(data_equivalence(a[-1], b[-1], exact=True) for a, b in zip(one, two))  # tool, dirt, wiped
    assert [step[1:4] for step in one[1:]] == [step[1:4] for step in two[1:]]
    worlds = plain.unwrapped, randomized.unwrapped
    for name in ("xpos", "site_xpos", "qpos", "qvel"):
        assert np.array_equal(*(getattr(world.data, name) for world in worlds))
    assert np.array_equal(*(world.model.geom_rgba[world.discs] for world in worlds))
    for name in ("workspace", "robot"):
        for (a, *_), (b, *_) in zip(one, two):
            assert (a[name] != b[name]).any(-1).mean() > 0.3


def test_every_episode_has_a_look_of_its_own(randomized):
    pictures = [randomized.reset(seed=s)[0]["workspace"] for s in (0, 1, 0)]
    assert (pictures[0] != pictures[1]).any(-1).mean() > 0.5
    assert (pictures[0] == pictures[2]).all()
    # It is the picture that `reset` returns which is randomised, and no step changes the look again.
    still = randomized.step(np.zeros(6))[0]["workspace"].astype(int)
    assert np.abs(still - pictures[2]).mean() < 3


def test_looks_do_not_pile_up_and_wiped_markers_stay_wiped(randomized):
    randomized.reset(seed=0)
    changer, model = randomized.unwrapped.look_changer, randomized.unwrapped.model
    arrays = ("geom_rgba", "cam_pos", "cam_quat", "cam_fovy", "light_pos", "light_dir", "light_diffuse")
    changer.change(np.random.default_rng(1))
    first = {name: getattr(model, name).copy() for name in arrays}
    for seed in (2, 3, 4):
        changer.change(np.random.default_rng(seed))
        assert all((getattr(model, name) != first[name]).any() for name in arrays)
        moved = np.linalg.norm(model.cam_pos - changer.originals["cam_pos"], axis=1)
        assert 0 < moved.max() < 2 * wiping.CAMERA and (model.light_diffuse <= 1).all()
    model.geom_rgba[randomized.unwrapped.discs[:7], 3] = 0
    changer.change(np.random.default_rng(1))
    first["geom_rgba"][randomized.unwrapped.discs[:7], 3] = 0
    assert all(np.array_equal(getattr(model, name), first[name]) for name in arrays)


def test_a_reset_is_fast(randomized):
    times = []
    for _ in range(4):
        start = time.perf_counter()
        randomized.reset()
        times.append(time.perf_counter() - start)
    assert min(times) < 0.3


# ---- 4. Seeds, processes and Gymnasium ----


def test_the_seed_decides_everything(randomized):
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    other = make_env("table_wiping", missing_rate=0, seed=4)
    first = rollout(randomized, 4)
    assert same(first, rollout(randomized, 4))  # whatever happened before
    assert same(first, rollout(other, 4)) and not same(first, rollout(other, 5))
    other.close()
    assert (np.random.get_state()[1] == before).all()


def test_the_first_reset_follows_from_the_seed():
    pictures = []
    for seed in (4, 4, 5):
        env = make_env("table_wiping", seed=seed, missing_rate=0)
        pictures.append(env.reset()[0]["robot"])
        env.close()
    assert (pictures[0] == pictures[1]).all() and (pictures[0] != pictures[2]).any()


def test_gymnasium_finds_no_fault():
    gymnasium.register("table_wiping-v0", entry_point=lambda render_mode="rgb_array": wiping.TableWiping(True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gymnasium.make("table_wiping-v0").unwrapped
        check_env(env)
        env.close()
    del gymnasium.registry["table_wiping-v0"]


def test_the_control_suite_renders_as_well_beside_it(plain):
    """Both draw in this process: neither may draw into the other's picture."""
    def suite(between):
        env = make_env("finger_spin", missing_rate=0)
        seen = [env.reset()[0]]
        for _ in range(3):
            between()
            seen.append(env.step(np.zeros(2))[0])
        env.close()
        return seen

    plain.reset(seed=0)
    alone = suite(lambda: None)
    assert all(data_equivalence(a, b, exact=True) for a, b in zip(alone, suite(lambda: plain.step(np.zeros(6)))))


def test_a_vector_works_without_any_setting_and_closes_quietly():
    program = """
import numpy as np, envs
vector = envs.make_vector_env("table_wiping", 2)
observation, _ = vector.reset(seed=[1, 2])
again, reward, terminated, truncated, info = vector.step(np.zeros((2, 6), np.float32))
print(observation["robot"].shape, again["workspace"].dtype, terminated | truncated, info["wiped"])
vector.close()
"""
    environment = {name: value for name, value in os.environ.items() if name != "MUJOCO_GL"}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.stdout == "(2, 64, 64, 3) uint8 [False False] [0 0]\n" and result.stderr == ""


def test_the_file_works_with_envs_alone(tmp_path):
    for file in ("wiping.py", "envs.py"):
        shutil.copy(ROOT / file, tmp_path)
    command = [sys.executable, "wiping.py"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0 and result.stderr == ""
    assert "(64, 64, 3)" in result.stdout and "of 50 markers wiped" in result.stdout


# ---- 5. The model of section VI ----


@pytest.mark.dev(18)
@pytest.mark.parametrize("method, size", [("mummi", 256), ("mssm_e", 256), ("cvrl", 512)])
def test_codes_have_the_sizes_of_appendix_b(method, size):
    """D_f = 256, and 512 = 256 x 2 concatenated."""
    config = Config(task="table_wiping", method=method, device="cpu", **TASK_DEFAULTS["table_wiping"])
    agent = make_agent(config, make_env("table_wiping").observation_space, 6)
    images = {name: torch.zeros(1, 1, 64, 64, 3, dtype=torch.uint8) for name in ("workspace", "robot")}
    present = torch.ones(1, 1, 2, dtype=torch.bool)
    fused = agent.model.fuse(agent.model.encode(images, present), present)
    assert fused.s_f.shape == (1, 1, size)
