"""pictures.py: what is drawn is what was seen, predicted and relied on; and looking changes nothing."""

import json
import sys

import gymnasium
import numpy as np
import pytest
import torch
from conftest import MODALITIES, A, tiny_agent

import envs
import evaluate
import mssm
import pictures

STEPS = 40


@pytest.fixture
def seen():
    """An episode of three environments as `run_episodes` gives it; touch is never there."""
    rng, steps = np.random.default_rng(0), []
    for t in range(STEPS):
        present = np.array([[1, t % 3 > 0, 0]] * 3, np.int8)
        rgb = np.full((3, 64, 64, 3), 5 * t, np.uint8)
        depth = (10 * rng.random((3, 64, 64, 1)) * present[0, 1]).astype(np.float32)
        step = {"rgb": rgb, "depth": depth, "touch": np.zeros((3, 2), np.float32), "present": present}
        action = rng.uniform(-1, 1, (3, A)).astype(np.float32)
        steps.append(step | {"action": action, "reward": np.full(3, t / STEPS)})
    return steps


def vectors(n, steps=12, **last):
    """An episode of one environment with n vectors, each present except at every third step."""
    rng, seen = np.random.default_rng(n), []
    for t in range(steps):
        readings = {f"v{i}": rng.normal(size=(1, i + 1)).astype(np.float32) for i in range(n)}
        present = np.full((1, n), t % 3 > 0, np.int8)
        seen.append(readings | {"present": present, "action": np.zeros((1, A)), "reward": np.array([0.5])} | last)
    return seen


def body(frame, column, row=0):
    """One panel of a frame, without its label."""
    side, label = pictures.SIDE, pictures.LABEL
    top, left = row * (side + label + 4) + label, column * (side + 4)
    return frame[top : top + side, left : left + side]


def label_of(frame, column, row=0):
    top, left = row * (pictures.SIDE + pictures.LABEL + 4), column * (pictures.SIDE + 4)
    return frame[top : top + pictures.LABEL, left : left + pictures.SIDE]


def says(frame, column, text, alarm=False, row=0):
    return (label_of(frame, column, row) == pictures.line_of_text(text, pictures.SIDE, alarm)).all()


GREEN, ORANGE = (90, 200, 120), (213, 94, 0)


def rows_of(picture, colour, column):
    return np.flatnonzero((picture[:, column] == colour).all(-1))


def test_panels_show_each_kind_of_sensor():
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    np.testing.assert_array_equal(pictures.panel(image), image)
    depth = np.linspace(0, 20, 4096, dtype=np.float32).reshape(64, 64, 1)
    grey = pictures.panel(depth)
    assert grey[0, 0].tolist() == [255] * 3 and grey[-1, -1].tolist() == [0] * 3, "near is white"
    cross = pictures.panel(image, present=False)
    assert cross.max() == 90 and (cross[range(64), range(64)] == 90).all()
    assert pictures.panel(np.array([8.0]), limits=(0, 8), side=100).shape == (100, 100, 3)
    assert pictures.panel(np.zeros(348), limits=(-1, 1)).shape == (128, 128, 3)


@pytest.mark.parametrize("value, low, high", [
    (0.25, 0, 1), (1, 0, 1), (-1, -1, 1), (0.5, -1, 1), (-0.5, -1, 1), (-12, -16, 0), (300, -100, 500), (900, -100, 500)])  # fmt: skip
def test_bars_are_as_long_as_their_values(value, low, high):
    picture = pictures.bars(np.array([value, 0.0]), (low, high), [])
    height = 128 - pictures.STRIP - 1
    bar, other = rows_of(picture, GREEN if value >= 0 else ORANGE, 10), rows_of(picture, ORANGE if value >= 0 else GREEN, 10)
    assert len(other) == 0
    assert abs(len(bar) - height * abs(min(value, high)) / (high - low)) <= 1
    zero = round(height * high / (high - low))
    assert (picture[zero] == 170).all(), "the line of 0 is there, over its whole width"
    assert bar.min() >= zero if value < 0 else bar.max() <= zero


@pytest.mark.parametrize("count", [2, 64, 65, 128, 348])
def test_every_value_has_a_bar_as_far_as_there_are_pixels(count):
    picture = pictures.bars(np.ones(count), (0, 1), [])
    assert (picture[10] == GREEN).all(-1).sum() >= min(count, 128) and (picture[10, -3:] == GREEN).all(-1).any()


def test_what_is_no_number_has_no_bar():
    picture = pictures.bars(np.array([np.nan, 1.0]), (0, 1), [])
    assert len(rows_of(picture, GREEN, 10)) == 0 and len(rows_of(picture, GREEN, 100)) > 100


def test_the_scale_is_that_of_the_episode_and_has_zero_in_it():
    assert pictures.limits_of([np.array([3.0, 7.0])]) == (0, 7)
    assert pictures.limits_of([-16.5, -2.0, np.nan, -np.inf]) == (-16.5, 0)
    assert pictures.limits_of([]) == pictures.limits_of([0.0]) == (0, 1)
    seen = vectors(2)
    seen[1]["v1"] = np.array([[-9.0, 40.0]], np.float32)
    seen[3]["v1"] = np.array([[77.0, 77.0]], np.float32)  # missing then
    assert pictures.limits_of_vectors(seen)["v1"] == (-9, 40)
    frame = list(pictures.frames(seen))[1]
    assert says(frame, 1, "v1, -9 to 40") and says(frame, 2, "action, -1 to 1") and says(frame, 3, "reward, 0 to 0.5")
    np.testing.assert_array_equal(body(frame, 1), pictures.panel(seen[1]["v1"][0], True, (-9, 40), pictures.SIDE))


def test_bars_tell_their_numbers():
    """Below them: components with their values, or their indices, or nothing where there is no room."""
    below = lambda x: pictures.panel(np.array(x), limits=(-9, 9))[-pictures.STRIP :]  # noqa: E731
    assert (below([1.0, 2.0]) != below([1.0, 3.0])).any(), "the value"
    np.testing.assert_array_equal(below([1.0] * 4), below([2.0] * 4))
    assert below([1.0] * 4).max() > 100 and below([1.0] * 60).max() == 0


def test_negative_rewards_are_below_the_line():
    seen = vectors(1, steps=80)
    for t, step in enumerate(seen):
        step["reward"] = np.array([-4.0 if t % 2 else 1.0])
    frame = list(pictures.frames(seen))[79]
    assert says(frame, 2, "reward, -4 to 1")
    height = pictures.SIDE - pictures.STRIP - 1
    newest, before = pictures.SIDE - 2, pictures.SIDE - 5
    assert abs(len(rows_of(body(frame, 2), ORANGE, newest)) - height * 4 / 5) <= 1
    assert abs(len(rows_of(body(frame, 2), GREEN, before)) - height / 5) <= 1
    first = list(pictures.frames(seen))[0]
    assert len(rows_of(body(first, 2), GREEN, newest)) and not len(rows_of(body(first, 2), GREEN, before)), "one reward"


def test_a_frame_holds_the_world_every_sensor_the_action_and_the_reward(seen):
    world = np.random.default_rng(1).integers(0, 256, (40, 96, 3), dtype=np.uint8)  # wide
    for step in seen:
        step["rendered"] = world
    shown = list(pictures.frames(seen))
    assert len(shown) == STEPS and {x.dtype for x in shown} == {np.dtype("uint8")}
    assert {x.shape for x in shown} == {(2 * (192 + 24 + 4), 3 * (192 + 4), 3)}, "six panels in two rows"
    fitted = body(shown[7], 0)
    np.testing.assert_array_equal(fitted[56:136], world.repeat(2, 0).repeat(2, 1))
    assert fitted[:56].max() == fitted[136:].max() == 0
    np.testing.assert_array_equal(body(shown[7], 1), seen[7]["rgb"][0].repeat(3, 0).repeat(3, 1))
    np.testing.assert_array_equal(body(shown[7], 1, row=1), pictures.panel(seen[7]["action"][0], True, (-1, 1), 192))
    for t in range(6):
        there = t % 3 > 0
        assert says(shown[t], 0, f"world; {1 + there} of 3 sensors work") and says(shown[t], 1, "rgb")
        assert says(shown[t], 2, "depth" if there else "depth: missing", alarm=not there)
        assert bool((body(shown[t], 2) <= 90).all()) is not there, "crossed out"
        assert says(shown[t], 0, "touch: missing", alarm=True, row=1)


def test_where_nothing_is_seen_the_world_is_and_says_so():
    seen = vectors(2, rendered=np.full((500, 500, 3), 77, np.uint8))
    frame = list(pictures.frames(seen))[0]
    assert says(frame, 0, "world; 0 of 2 sensors work", alarm=True) and (body(frame, 0) == 77).all()
    assert body(frame, 1).max() == body(frame, 2).max() == 90, "crosses on black"


@pytest.mark.parametrize("rendered", [True, False])
def test_seven_sensors_in_a_video_of_a_thousand_pixels(tmp_path, rendered):
    import av

    seen = vectors(7, **({"rendered": np.zeros((30, 50, 3), np.uint8)} if rendered else {}))
    pictures.write_video(tmp_path / "a.mp4", seen)
    with av.open(str(tmp_path / "a.mp4")) as video:
        [frame, *others] = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(others) == len(seen) - 1 and frame.shape == (440, 980, 3)  # 9 or 10 panels
    exact = list(pictures.frames(seen))[1]
    for i in range(7):
        column, row = (i + rendered) % 5, (i + rendered) // 5
        low, high = pictures.limits_of_vectors(seen)[f"v{i}"]
        assert says(exact, column, f"v{i}, {low:.3g} to {high:.3g}", row=row)
    assert says(exact, 3 if rendered else 2, "action, -1 to 1", row=1)
    assert rendered or (exact[222:, 4 * 196 :] == pictures.PAPER).all(), "empty where there is no panel"


@pytest.mark.parametrize("n", range(1, 40))
def test_any_number_of_panels_fits(n):
    picture = pictures.grid([np.zeros((216, 192, 3), np.uint8)] * n)
    height, width, _ = picture.shape
    assert width <= 1000 and height % 2 == width % 2 == 0
    assert (picture == 0).all(-1).sum() == n * 216 * 192, "none is lost"


def test_a_film_ends_with_the_episode(seen):
    """Though other environments go on, and the first begins another episode."""
    for step in seen[30:]:
        step["reward"] = np.array([np.nan, 1.0, 1.0])
    assert len(list(pictures.frames(seen))) == 30
    with_nan, without = (pictures.of_evaluation(tiny_agent().model, x, "mummi") for x in (seen, seen[:30]))
    assert all((with_nan[name] == without[name]).all() for name in without)


def test_the_goal_is_in_the_toy_world_and_in_no_sensor():
    env = envs.make_env("toy", missing_rate=0)
    observation, _ = env.reset(seed=0)
    env.unwrapped.position = np.array([0.1, 0.9])
    camera, view = env.unwrapped.sense(["camera"])["camera"], env.render()
    blue = lambda x: (x[..., 2].astype(int) - x[..., 0] > 100)  # noqa: E731
    assert not blue(camera).any() and not blue(observation["camera"]).any()
    rows, columns = np.nonzero(blue(view))
    x, y = 1.2 * (columns + 0.5) / len(view) - 0.1, 1.1 - 1.2 * (rows + 0.5) / len(view)
    assert len(rows) > 50
    np.testing.assert_allclose([x.mean(), y.mean()], envs.TOY_GOAL, atol=0.005)
    np.testing.assert_allclose(np.hypot(x - 0.7, y - 0.3), 1.25 * envs.TOY_RADIUS, atol=0.02)


class Blind(gymnasium.Env):
    """Seven sensors, two noises, no picture."""

    observation_space = gymnasium.spaces.Dict({f"s{i}": gymnasium.spaces.Box(-9, 9, (2,), np.float32) for i in range(7)})
    action_space = gymnasium.spaces.Box(-1, 1, (A,), np.float32)

    def read(self):
        return {name: self.np_random.normal(size=2).astype(np.float32) for name in self.observation_space}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.read(), {}

    def step(self, action):
        return self.read(), -float(np.square(action).sum()), False, False, {}


gymnasium.register("blind-v0", entry_point=Blind, max_episode_steps=8)


class Turning:
    """An agent whose actions follow from what it sees."""

    device = torch.device("cpu")

    def initial_memory(self, num_envs):
        return num_envs

    def act(self, memory, observation, present, first, explore):
        total = sum(x.float().flatten(1).mean(1) for x in observation.values())
        return torch.stack([total.sin(), torch.rand(memory) - 0.5], 1), memory


@pytest.mark.parametrize("task, task_kwargs, side", [
    ("toy", None, 192), ("finger_spin", None, 192), ("blind-v0", None, None), ("Pendulum-v1", '{"render_mode": "rgb_array"}', 192)])  # fmt: skip
def test_an_evaluation_is_the_same_filmed_or_not(task, task_kwargs, side, tmp_path, monkeypatch):
    """Returns, observations and actions, bit by bit; only the first environment is rendered."""
    if task == "blind-v0":  # only a fork knows it, and it never renders
        monkeypatch.setattr(envs.FitSpaces, "rendered", False)
        monkeypatch.delitem(sys.modules, "dm_control", raising=False)
    kwargs = {"task_kwargs": json.loads(task_kwargs)} if task_kwargs else {}
    results, vector = [], envs.make_vector_env(task, 2, split="eval", **kwargs)
    for film in (False, True):
        if task == "Pendulum-v1":  # takes one number
            agent = Turning()
            agent.act = lambda *args, **kwargs: (lambda a, m: (a[:, :1], m))(*Turning().act(*args, **kwargs))
        else:
            agent = Turning()
        results.append(evaluate.run_episodes(agent, vector, [5, 6], film=film))
        assert vector.call("view", 5)[1] is None
    vector.close()
    (returns, plain), (filmed_returns, filmed) = results
    np.testing.assert_array_equal(returns, filmed_returns)
    assert len(plain) == len(filmed) and "rendered" not in plain[0]
    for a, b in zip(plain, filmed):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
    if side is None:
        assert "rendered" not in filmed[0]
        pictures.write_video(tmp_path / "a.mp4", filmed)
        assert next(pictures.frames(filmed)).shape == (440, 980, 3)
        return
    views = [step["rendered"] for step in filmed]
    assert {x.shape for x in views} == {(side, side, 3)} and (views[0] != views[3]).any()
    if task == "finger_spin":  # what the camera gives where it works
        here = [t for t in range(len(filmed)) if filmed[t]["present"][0, 0]][7]
        np.testing.assert_array_equal(filmed[here]["rgb"][0].repeat(3, 0).repeat(3, 1), views[here])


def test_the_video_and_the_gif_have_the_frames(seen, tmp_path):
    import av
    from PIL import Image

    pictures.write_video(tmp_path / "a.mp4", seen)
    with av.open(str(tmp_path / "a.mp4")) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(frames) == STEPS
    means = [frame[50:100, 10:100].mean() for frame in frames]  # rgb grows brighter by 5 a step
    np.testing.assert_allclose(np.diff(means), 5, atol=3)
    (tmp_path / "a.gif").write_bytes(pictures.gif(seen, most=10))
    exact = list(pictures.frames(seen, every=4))
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == 10
        for i in (0, 5):
            image.seek(i)
            assert np.abs(np.asarray(image.convert("RGB")).astype(int) - exact[i]).mean() < 5


def test_in_units_is_the_inverse_of_normalise():
    rgb = torch.randint(0, 256, (1, 1, 64, 64, 3), dtype=torch.uint8)
    assert np.abs(pictures.in_units(mssm.scale(rgb, torch.ones(1, 1).bool(), 0, 1)[0, 0]).astype(int) - rgb[0, 0].numpy()).max() <= 1
    depth = 10 * torch.rand(1, 1, 64, 64, 1)
    np.testing.assert_allclose(pictures.in_units(mssm.scale(depth, torch.ones(1, 1).bool(), 0, 1)[0, 0]), depth[0, 0], atol=1e-5)
    touch = torch.rand(2)
    np.testing.assert_allclose(pictures.in_units(touch), touch)


def test_the_episode_is_in_the_order_that_observe_reads(seen):
    """action[t] led to observation[t]: the one chosen a step before."""
    observation, present, action = pictures.episode(tiny_agent().model, seen)
    assert list(observation) == list(MODALITIES) and present.shape == (STEPS, 1, 3)
    assert (action[0] == 0).all()
    np.testing.assert_array_equal(action[5, 0], seen[4]["action"][0])


PICTURES = {"mummi": {"seen", "similarity", "calibration"}, "mummi_b": {"seen", "similarity", "calibration"},
            "mssm_e": {"seen", "open_loop", "calibration"}, "cvrl": {"seen", "similarity"},
            "dreamer": {"seen", "open_loop"}}  # fmt: skip


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", PICTURES)
def test_every_method_has_its_pictures_and_looking_changes_nothing(method, precision, seen):
    model, state = tiny_agent(method, precision=precision).model, torch.get_rng_state()
    drawn = pictures.of_evaluation(model, seen, method)
    assert set(drawn) == PICTURES[method]
    for name, picture in drawn.items():
        assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3, name
        assert picture.std() > 10, "not empty"
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("method", ["dreamer", "mssm_e", "mummi"])
@pytest.mark.parametrize("steps", [1, 2, 9, 10, 11])
def test_episodes_may_be_short(seen, steps, method):
    assert len(pictures.of_evaluation(tiny_agent(method).model, seen[:steps], method)) >= 2


@torch.no_grad()
def test_imagination_does_not_see_what_comes_later(seen):
    """Predictions are of the first decisions and of the actions alone."""
    model = tiny_agent("dreamer").model
    torch.manual_seed(0)
    before = pictures.open_loop_picture(model, seen, given=5, ahead=(1, 3))
    changed = [dict(step) for step in seen]
    for step in changed[5:]:
        step["rgb"] = 255 - step["rgb"]
    torch.manual_seed(0)
    after = pictures.open_loop_picture(model, changed, given=5, ahead=(1, 3))
    rows = np.split(before[: 6 * (before.shape[0] // 6)] != after[: 6 * (after.shape[0] // 6)], 6)
    assert rows[0].any() and not np.concatenate(rows[1:]).any(), "only what the camera gave differs"


def test_the_ratios_are_those_of_the_objective(seen):
    model = tiny_agent("mummi_b").model
    with torch.no_grad():
        filtered = model.observe(*pictures.episode(model, seen))
        log_f, present = pictures.density_ratios(model, filtered, fused_too=True)
        code = model.g(model.latent(filtered.h, filtered.s_c))[:, 0]
    assert list(log_f) == [*MODALITIES, "product of all"]
    expected = -(code[3] - filtered.fused.expert_mean[7, 0, 1]).square().sum()
    torch.testing.assert_close(log_f["depth"][3, 7], expected, rtol=1e-4, atol=1e-4)
    assert present["touch"].sum() == 0 and present["product of all"].all()


def test_tensorboard_gets_the_pictures_and_the_video(seen, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from checkpoint import Log

    log = Log(tmp_path, total=10)
    log.write(4, {"eval_return": 1.0})
    log.show_pictures(4, pictures.of_evaluation(tiny_agent().model, seen, "mummi"), pictures.gif(seen, most=5))
    log.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["images"]) == PICTURES["mummi"] | {"video"}
    [video] = events.Images("video")
    assert video.step == 4 and video.encoded_image_string.startswith(b"GIF") and video.width == 5 * 196
