"""pictures.py: what is drawn is what was seen, predicted and relied on; and looking changes nothing."""

import numpy as np
import pytest
import torch
from conftest import MODALITIES, A, tiny_agent

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


def test_panels_show_each_kind_of_sensor():
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    np.testing.assert_array_equal(pictures.panel("rgb", image), image)
    depth = np.linspace(0, 20, 4096, dtype=np.float32).reshape(64, 64, 1)
    grey = pictures.panel("depth", depth)
    assert grey[0, 0].tolist() == [255] * 3 and grey[-1, -1].tolist() == [0] * 3, "near is white"
    cross = pictures.panel("rgb", image, present=False)
    assert cross.max() == 90 and (cross[range(64), range(64)] == 90).all()
    assert pictures.panel("touch", np.array([8.0])).shape == (64, 64, 3)


@pytest.mark.parametrize("value, low", [(0.0, 0.0), (0.25, 0.0), (1.0, 0.0), (-1.0, -1.0), (0.5, -1.0), (-0.5, -1.0)])
def test_bars_are_as_long_as_their_values(value, low):
    picture = pictures.bars(np.array([value, 0.0]), low)
    colour = (90, 200, 120) if value >= 0 else (213, 94, 0)
    rows = np.flatnonzero((picture[:, 10] == colour).all(-1))
    assert abs(len(rows) - 1 - 63 * abs(value) / (1 - low)) <= 1
    zero = round(63 * (1 - (0 - low) / (1 - low)))
    assert zero in rows


def test_the_history_ends_at_its_right_with_the_newest():
    picture = pictures.history([1.0] * 100 + [0.5], highest=1.0)
    filled = (picture == (90, 200, 120)).all(-1).sum(0)
    assert (filled[:-1] == 64).all() and filled[-1] in (32, 33)


def test_a_frame_holds_every_sensor_the_action_and_the_reward(seen):
    shown = list(pictures.frames(seen, scale=1))
    assert len(shown) == STEPS and {x.shape for x in shown} == {(64 + pictures.LABEL, 5 * 64, 3)}
    assert {x.dtype for x in shown} == {np.dtype("uint8")}
    body = [x[pictures.LABEL :] for x in shown]
    np.testing.assert_array_equal(body[7][:, :64], seen[7]["rgb"][0])
    np.testing.assert_array_equal(body[7][:, 192:256], pictures.bars(seen[7]["action"][0], low=-1.0))
    crossed = [bool((x[:, 64:128] <= 90).all()) for x in body]
    assert crossed == [not step["present"][0, 1] for step in seen]


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
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == 10


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


@pytest.mark.parametrize("method", PICTURES)
def test_every_method_has_its_pictures_and_looking_changes_nothing(method, seen):
    model, state = tiny_agent(method).model, torch.get_rng_state()
    drawn = pictures.of_evaluation(model, seen, method)
    assert set(drawn) == PICTURES[method]
    for name, picture in drawn.items():
        assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3, name
        assert picture.std() > 10, "not empty"
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


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
    assert video.step == 4 and video.encoded_image_string.startswith(b"GIF") and video.width == 5 * 128
