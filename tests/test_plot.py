"""tools.plot: smoothing and interpolation against their definitions, seeds pooled, bad input refused."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from tools import plot


def write_run(folder, values, task="toy", method="mummi", seed=1, metric="train_return", steps=None, **config):
    """A run as train.py leaves it, with other lines between those of the metric."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dict(task=task, method=method, seed=seed, **config)))
    steps = range(400, 400 * len(values) + 1, 400) if steps is None else steps
    lines = [line for s, v in zip(steps, values) for line in ({"steps": s, metric: v}, {"steps": s, "kl": 1.0})]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def command(monkeypatch, *arguments):
    """`python -m tools.plot ...` in this process."""
    monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, arguments)])
    runpy.run_path(plot.__file__, run_name="__main__")


# ---- 1. Curves -----------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.0, 0.5, 0.9])
def test_smoothing_is_the_weighted_mean_of_the_past(weight):
    values = np.random.rand(30)
    for i, average in enumerate(plot.smooth(values, weight)):
        weights = [weight ** (i - j) for j in range(i + 1)]
        assert average == pytest.approx(np.average(values[: i + 1], weights=weights))


def test_seeds_are_interpolated_where_all_have_steps():
    """Straight lines stay straight, whatever their steps."""
    a, b = np.array([0.0, 100, 400]), np.array([50.0, 60, 310, 330])
    steps, values = plot.interpolate([(a, 2 * a), (b, 5 - b)])
    assert steps[0] == 50 and steps[-1] == 330
    np.testing.assert_allclose(values, [2 * steps, 5 - steps])


def test_the_last_of_several_values_at_one_step_counts():
    """Environments side by side end their episodes at the same step; the last is the smoothed one."""
    steps, values = plot.interpolate([(np.array([4.0, 4, 8, 8, 8]), np.array([9.0, 1, 9, 9, 3]))])
    np.testing.assert_allclose(values[0], np.interp(steps, [4, 8], [1, 3]))


def test_seeds_without_common_steps_are_refused():
    with pytest.raises(ValueError, match="begins at step 500 and another ends at 100"):
        plot.interpolate([(np.array([0.0, 100]), np.zeros(2)), (np.array([500.0, 600]), np.zeros(2))])


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn."""
    drawn, draw = [], plot.draw
    monkeypatch.setattr(plot, "draw", lambda *arguments: drawn.append(draw(*arguments)) or drawn[-1])
    return drawn


@pytest.mark.fig(5)
def test_seeds_are_pooled_to_mean_and_standard_deviation(tmp_path, figures):
    """What is drawn, taken from the figure: one panel a task, one line a method."""
    runs = [write_run(tmp_path / f"a{s}", [10.0 * s] * 5, seed=s, name=f"a{s}") for s in (1, 2, 3)]
    runs += [write_run(tmp_path / "b", [1.0, 2.0], method="dreamer"), write_run(tmp_path / "c", [5.0], task="cup_catch")]
    plot.main(plot.Options(tuple(runs), output=str(tmp_path / "new" / "curves")))

    toy, cup = figures[0].axes
    assert (toy.get_title(), cup.get_title()) == ("toy", "cup catch")
    assert [line.get_label() for line in toy.lines] == ["MuMMI, 3 seeds", "Dreamer, 1 seed"]
    np.testing.assert_allclose(toy.lines[0].get_ydata(), 20)
    band = toy.collections[0].get_paths()[0].vertices[:, 1]
    std = np.std([10, 20, 30])
    np.testing.assert_allclose([band.min(), band.max()], [20 - std, 20 + std])
    for suffix, start in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
        assert (tmp_path / "new" / f"curves{suffix}").read_bytes().startswith(start)


def test_ablations_stand_side_by_side_under_labels_of_their_own(tmp_path, figures):
    """Each value of what --label names is a line with its own style; its seeds are still pooled."""
    runs = [write_run(tmp_path / f"{n}-{s}", [n + s] * 3, seed=s, free_nats=n) for n in (0.0, 3.0) for s in (1, 2)]
    runs.append(write_run(tmp_path / "cvrl", [9.0] * 3, method="cvrl", free_nats=3.0))
    plot.main(plot.Options(tuple(runs), label=("free-nats",), output=str(tmp_path / "curves")))
    lines = figures[0].axes[0].lines
    labels = ["MuMMI, free_nats 0.0, 2 seeds", "MuMMI, free_nats 3.0, 2 seeds", "CVRL, free_nats 3.0, 1 seed"]
    assert [line.get_label() for line in lines] == labels
    assert [line.get_ydata()[0] for line in lines] == [1.5, 4.5, 9]
    assert len({line.get_color() for line in lines}) == 3


# ---- 2. Reading ----------------------------------------------------------------------------------


def test_half_a_last_line_is_ignored(tmp_path):
    run = Path(write_run(tmp_path / "run", [1.0, 2.0]))
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"steps": 1200, "train_ret')
    np.testing.assert_array_equal(plot.read_metric(run, "train_return"), [[400, 800], [1, 2]])


def test_a_resumed_run_replaces_the_steps_it_repeats(tmp_path):
    run = write_run(tmp_path / "run", [1.0, 2.0, 3.0, 7.0, 8.0, 9.0], steps=[400, 800, 1200, 800, 1200, 1600])
    steps, values = plot.read_metric(run, "train_return")
    assert steps.tolist() == [400, 800, 800, 1200, 1600] and values.tolist() == [1, 2, 7, 8, 9]


# ---- 3. Bad input: one line, exit code 2, nothing written ----------------------------------------


def no_run(folder):
    return [str(folder / "missing")]


def nothing_at_all(folder):
    return []


def no_run_among_them(folder):
    (folder / "curves.png").write_bytes(b"")
    return [str(folder / "curves.png")]


def unknown_label(folder):
    return [write_run(folder / "run", [1.0]), "--label", "touch"]


def half_a_config(folder):
    run = write_run(folder / "run", [1.0])
    (folder / "run" / "config.json").write_text('{"task": "toy", "meth')
    return [run]


def unknown_method(folder):
    return [write_run(folder / "run", [1.0], method="ppo")]


def no_evaluation_yet(folder):
    return [write_run(folder / "run", [1.0]), "--metric", "eval_return"]


def no_metrics(folder):
    run = write_run(folder / "run", [1.0])
    (folder / "run" / "metrics.jsonl").unlink()
    return [run]


def broken_line(folder):
    run = write_run(folder / "run", [1.0])
    (folder / "run" / "metrics.jsonl").write_text('{"steps": 4\n{"steps": 400, "train_return": 1.0}\n')
    return [run]


def one_seed_twice(folder):
    return [write_run(folder / "a", [1.0]), write_run(folder / "b", [1.0])]


def different_missing_rates(folder):
    return [write_run(folder / "a", [1.0], missing_rate=0.0), write_run(folder / "b", [1.0], seed=2, missing_rate=0.375)]


def smoothing_of_one(folder):
    return [write_run(folder / "run", [1.0]), "--smoothing", "1"]


@pytest.mark.parametrize("bad_input, message", [
    (no_run, "missing is not the folder of a run"),
    (nothing_at_all, "no run was given: give folders like runs/toy-mummi-1"),
    (no_run_among_them, "no run was given: give folders like runs/toy-mummi-1, not "),
    (unknown_label, "--label touch is no option"),
    (half_a_config, "config.json is damaged"),
    (unknown_method, "config.json has method 'ppo', which is unknown: it is one of ['mummi', "),
    (no_evaluation_yet, "no line with eval_return yet"),
    (no_metrics, "no line with train_return yet"),
    (broken_line, "metrics.jsonl, line 1: not JSON"),
    (one_seed_twice, "are both toy, mummi, seed 1: leave one out"),
    (different_missing_rates, "differ in missing_rate, 0.0 and 0.375"),
    (smoothing_of_one, "--smoothing 1.0 is not allowed"),
])  # fmt: skip
def test_bad_input_is_refused_in_one_line(tmp_path, monkeypatch, capsys, bad_input, message):
    arguments = bad_input(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, *arguments, "--output", str(tmp_path / "new" / "curves"))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("tools.plot: ") and error.count("\n") == 1 and message in error
    assert sorted(tmp_path.rglob("*")) == before


def test_an_output_that_cannot_be_written_is_refused(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "run", [1.0])
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, run, "--output", tmp_path / "run" / "config.json" / "curves")
    assert stop.value.code == 2 and "cannot be written" in capsys.readouterr().err


def test_the_command_writes_both_files_and_says_so(tmp_path, monkeypatch, capsys):
    """A suffix is not doubled; what else a glob finds beside the runs is left out."""
    run = write_run(tmp_path / "run", [1.0, 2.0], metric="eval_return")
    (tmp_path / "other").mkdir()
    command(monkeypatch, run, tmp_path / "other", "--metric", "eval_return", "--output", tmp_path / "curves.png")
    assert {path.name for path in tmp_path.glob("curves*")} == {"curves.png", "curves.svg"}
    said = capsys.readouterr()
    assert said.err == f"no runs, left out: {tmp_path}/other\n"
    assert said.out.splitlines() == [f"{tmp_path}/curves.png, {tmp_path}/curves.svg: 1 runs; next: python evaluate.py {run}"]


def test_by_default_nothing_is_written_into_the_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command(monkeypatch, write_run(tmp_path / "run", [1.0, 2.0]))
    assert {path.name for path in tmp_path.iterdir()} == {"run", "runs"}
