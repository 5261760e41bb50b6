"""tools.toy: the numbers of Fig. 1 against cases with known answers, and the command from end to end."""

import io
import json
import math
import runpy
import sys

import numpy as np
import pytest
import torch
from conftest import close

from mssm import MSSM
from tools import toy

N = 200


# ---- 1. Measures ---------------------------------------------------------------------------------


def test_r2_against_its_definition():
    truth, predicted = torch.rand(N, 2), torch.rand(N, 2)
    error, variance = ((predicted - truth) ** 2).mean(), truth.var(0, correction=0).mean()
    close(toy.r2(predicted, truth), 1 - error / variance)
    assert toy.r2(truth, truth) == 1
    close(toy.r2(truth.mean(0).expand(N, 2), truth), 0.0)


def test_the_linear_decoder_recovers_an_affine_map_from_latents_with_a_dead_unit():
    latent = torch.randn(N, 6)
    latent[:, 3] = 0
    matrix, bias = torch.randn(6, 2), torch.randn(2)
    decode = toy.linear(latent, latent @ matrix + bias)
    query = torch.randn(9, 6)
    query[:, 3] = 0
    close(decode(query), query @ matrix + bias, 1e-3)


def test_nearest_neighbours_are_averaged():
    x, truth = torch.arange(10.0).unsqueeze(1), torch.stack([torch.arange(10.0), 2 * torch.arange(10.0)], 1)
    close(toy.nearest(x, truth, k=1)(torch.tensor([[3.2], [8.9]])), [[3.0, 6.0], [9.0, 18.0]])
    close(toy.nearest(x, truth, k=3)(torch.tensor([[3.2], [8.9]])), [[3.0, 6.0], [8.0, 16.0]])


def test_principal_components_of_a_plane_keep_distances_and_the_gap_between_spaces():
    """Two spaces in one plane of five dimensions: nothing is lost, least of all how far apart they lie."""
    plane = torch.linalg.qr(torch.randn(5, 2)).Q.T
    a, b = torch.randn(N, 2), torch.randn(N, 2) + torch.tensor([8.0, 0])
    projected = toy.principal_components(a @ plane + 3, b @ plane + 3)
    close(torch.cdist(*projected), torch.cdist(a, b), 1e-3)
    together = torch.cat(projected)
    close(together.mean(0), [0.0, 0.0], 1e-4)
    assert together[:, 0].var() > together[:, 1].var()


def test_colours_of_the_corners_and_the_middle():
    corners = torch.tensor([[0.0, 0], [1, 0], [0, 1], [1, 1]])  # x, y
    close(toy.colours(corners), toy.CORNERS.flatten(0, 1))
    close(toy.colours(torch.tensor([[0.5, 0.5]])), toy.CORNERS.mean((0, 1)).unsqueeze(0))


def spaces(means, latents, stds=(0.1, 0.2)):
    """Of one truth: the last of `means` and `latents` is that of both sensors."""
    std = [torch.full_like(means[0], value) for value in (*stds, 0.1)]
    return toy.Spaces(means, std, latents, toy_truth)


toy_truth = torch.rand(N, 2, generator=torch.Generator().manual_seed(0))


def test_measures_of_experts_that_agree():
    """The second expert's means are the first's; its latent state knows x only."""
    same, half = toy_truth @ torch.randn(2, 8), toy_truth * torch.tensor([1.0, 0]) + torch.tensor([0, 0.5])
    agree = spaces([same, same, same], [toy_truth, half, toy_truth])
    numbers = toy.measure(["a", "b"], agree, agree)
    close(numbers["R2 of position from the latent state, a alone"], 1.0)
    close(numbers["R2 of x, b alone"], 1.0)
    close(numbers["R2 of y, b alone"], 0.0, 0.1)
    for pair in ("a -> b", "b -> a"):
        assert numbers[f"R2 of position by nearest expert means, {pair}"] > 0.98
        assert numbers[f"median rank of the same step among {N}, {pair}"] == 1
    close(numbers["mean log(std of b / std of a)"], math.log(2))


def test_measures_of_experts_that_disagree():
    """The second expert's means are turned by half a turn: what lies near lies elsewhere."""
    mean = (toy_truth - 0.5) @ torch.randn(2, 8)
    turned = spaces([mean, -mean, mean], [toy_truth, 1 - toy_truth, toy_truth])  # of latent states, too
    numbers = toy.measure(["a", "b"], turned, turned)
    assert numbers["R2 of position from the latent state, b alone"] < -1
    close(numbers["R2 of position from the latent state, b alone, by a decoder of its own"], 1.0)
    for pair in ("a -> b", "b -> a"):
        assert numbers[f"R2 of position by nearest expert means, {pair}"] < -1
        assert numbers[f"median rank of the same step among {N}, {pair}"] > N / 4


def test_transfer_is_named_for_the_expert_it_is_fitted_on():
    """b's means all lie where a has one position: nothing can be read off a's space, all off b's by chance."""
    mean = toy_truth @ torch.randn(2, 8)
    one_point = spaces([mean, mean[:1].expand(N, 8), mean], [toy_truth] * 3)
    numbers = toy.measure(["a", "b"], one_point, one_point)
    expected = toy_truth[torch.cdist(mean[:1], mean).topk(5, largest=False).indices[0]].mean(0).expand(N, 2)
    close(numbers["R2 of position by nearest expert means, a -> b"], toy.r2(expected, toy_truth))


# ---- 2. Motion and models ------------------------------------------------------------------------


def test_actions_lead_to_the_observations_they_stand_beside():
    motion = toy.random_motion("toy", 4, 0.0, seed=3)
    shapes = {name: tuple(x.shape) for name, x in motion.items()}
    assert shapes == {"position": (100, 4, 2), "camera": (100, 4, 64, 64, 3), "present": (100, 4, 2),
                      "action": (100, 4, 2), "reward": (100, 4), "truth": (100, 4, 2)}  # fmt: skip
    assert motion["camera"].dtype == torch.uint8
    close(motion["position"], (motion["truth"] - 0.5) * 12**0.5)  # standardised
    assert motion["action"][0].abs().sum() == 0 and motion["reward"][0].abs().sum() == 0
    moved, inside = motion["truth"].diff(dim=0), (motion["truth"][1:] % 1 != 0).all(-1)  # off the walls
    gust = (moved - 0.1 * motion["action"][1:])[inside]
    assert gust.std() == pytest.approx(0.04, rel=0.15)


def test_missing_data_reach_the_motion_but_not_the_truth():
    motion = toy.random_motion("toy_xy", 10, 0.375, seed=0)
    assert 1 - motion["present"].mean() == pytest.approx(0.375, abs=0.02)
    absent = motion["x"][motion["present"][..., 0] == 0]
    close(absent / 12**0.5 + 0.5, torch.zeros_like(absent))  # zero-filled, then standardised
    close(motion["truth"], toy.random_motion("toy_xy", 10, 0.0, seed=0)["truth"])


def test_a_sensor_alone_is_its_expert_alone():
    motion = toy.random_motion("toy_xy", 2, 0.0, seed=0)
    model = MSSM({"x": (1,), "y": (1,)}, 2, d_h=8, d_c=4, d_f=6, hidden=8, units=8, channels=2)
    seen = toy.perceive(model, motion)
    present = motion["present"].bool()
    fused = model.fuse(model.encode(motion, present), present)
    for m in (0, 1):
        close(seen.mean[m], fused.expert_mean[:, :, m].flatten(0, 1))
        close(seen.std[m], fused.expert_std[:, :, m].flatten(0, 1))
    close(seen.mean[2], fused.mean.flatten(0, 1))
    changed = toy.perceive(model, motion | {"y": motion["y"] + 1})
    close(changed.mean[0], seen.mean[0])
    assert (changed.mean[2] - seen.mean[2]).abs().max() > 1e-3


def test_the_elbo_learns_x_from_x_and_y_from_y():
    """In some seconds, in the world without pictures; seeds 0, 1, 2 gave 0.78 or more, and 0.04 or less."""
    options = toy.Options(world="x_and_y", updates=250, model_lr=2e-3, seed=0)
    model = toy.learn("ELBO", options, toy.random_motion("toy_xy", 30, 0.0, seed=1))
    fit, test = (toy.perceive(model, toy.random_motion("toy_xy", 10, 0.0, seed)) for seed in (2, 3))
    numbers = toy.measure(["x", "y"], fit, test)
    assert numbers["R2 of position from the latent state, both"] > 0.7
    assert numbers["R2 of x, x alone"] > 0.5 > numbers["R2 of y, x alone"]
    assert numbers["R2 of y, y alone"] > 0.5 > numbers["R2 of x, y alone"]


# ---- 3. The command ------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch):
    """Two episodes to learn from, one to measure on, the smallest of models."""
    monkeypatch.setattr(toy, "TRAIN_EPISODES", 2)
    monkeypatch.setattr(toy, "TEST_EPISODES", 1)
    small = dict(d_h=8, d_f=6, hidden=8, units=8, channels=2, batch_size=3, batch_length=4)
    monkeypatch.setattr(toy, "SIZES", toy.SIZES | small)


@pytest.mark.parametrize("world, sensors", [
    ("position_camera", ["position", "camera"]), ("two_cameras", ["front", "rear"]), ("x_and_y", ["x", "y"]),
])  # fmt: skip
@pytest.mark.fig(1, 19, 20)
def test_every_world_from_end_to_end(tiny, tmp_path, capsys, world, sensors):
    output = tmp_path / "new" / world
    toy.main(toy.Options(world, missing_rate=0.375, updates=2, output=str(output)))
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    report = json.loads(output.with_suffix(".json").read_text())
    assert report["options"]["world"] == world and report["options"]["missing_rate"] == 0.375
    assert list(report["ELBO"]) == list(report["MuMMI"]) and report["ELBO"] != report["MuMMI"]
    for numbers in (report["ELBO"], report["MuMMI"]):
        assert np.isfinite(list(numbers.values())).all()
        assert any(f"{sensors[0]} -> {sensors[1]}" in what for what in numbers)
    table = capsys.readouterr().out
    for what, value in report["MuMMI"].items():
        assert f"| {what} |" in table and (f"{value:.3f}" if isinstance(value, float) else f"| {value} |") in table


def test_one_seed_gives_one_result(tiny, tmp_path):
    reports = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        toy.main(toy.Options("x_and_y", updates=2, seed=seed, output=str(tmp_path / name)))
        reports.append(json.loads((tmp_path / f"{name}.json").read_text())["MuMMI"])
    assert reports[0] == reports[1] != reports[2]


def command(monkeypatch, *arguments):
    """`python -m tools.toy ...` in this process."""
    monkeypatch.setattr(sys, "argv", ["toy.py", *map(str, arguments)])
    runpy.run_path(toy.__file__, run_name="__main__")


def test_results_are_kept_where_nothing_can_be_printed(tiny, tmp_path, monkeypatch):
    """An ASCII standard output, or none that anybody reads; and a suffix is not doubled."""

    class Closed:
        encoding = "ascii"

        def write(self, *_):
            raise BrokenPipeError

        flush = write

    for name, stdout in (("closed", Closed()), ("ascii", io.TextIOWrapper(io.BytesIO(), "ascii"))):
        monkeypatch.setattr(sys, "stdout", stdout)
        toy.main(toy.Options("x_and_y", updates=1, output=str(tmp_path / f"{name}.png")))
        assert {path.name for path in tmp_path.glob(f"{name}*")} == {f"{name}.png", f"{name}.json"}


@pytest.mark.parametrize("arguments, message", [
    (["--updates", "0"], "--updates 0"),
    (["--seed", "-1"], "--seed -1"),
    (["--model-lr", "0"], "--model-lr 0.0"),
    (["--missing-rate", "1"], "missing_rate is 1.0; choose one in [0, 1)"),
])  # fmt: skip
def test_bad_input_is_refused_in_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, *arguments, "--output", tmp_path / "new" / "figure")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("tools.toy: ") and error.count("\n") == 1 and message in error
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_written_is_found_before_any_work(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, "--output", tmp_path / "file" / "figure")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "cannot be written" in error and error.count("\n") == 1
