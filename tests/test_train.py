"""The training loop: what it leaves, how often it updates, that it resumes exactly, and what it refuses."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import killer
import numpy as np
import pytest
import torch

import envs
import evaluate
import checkpoint as runs
import train
from config import TASK_DEFAULTS, Config, check_comparable, load_config, parse
from fast import FastAgent
from mssm import MSSM

ROOT = Path(__file__).parent.parent
SMALL = ("--task toy --device cpu --num-envs 2 --eval-episodes 2 --prefill 200 --first-updates 3 --updates-per-1000 20 "
         "--eval-every 200 --log-every 2 --batch-size 3 --batch-length 6 --horizon 3 --channels 1 --units 8 --hidden 8 "
         "--d-h 8 --d-c 4 --d-f 8 --capacity 2000").split()  # fmt: skip


class Flips(gymnasium.Env):
    """Episodes of 1 to 300 decisions, with a reward of 1 each; the second number never moves."""

    observation_space, action_space = gymnasium.spaces.Box(-1, 1, (2,)), gymnasium.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = int(self.np_random.integers(1, 300))
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.left -= 1
        return np.float32([self.np_random.uniform(-1, 1), 0]), 1.0, self.left <= 0, False, {}


gymnasium.register("Endless-v0", Flips)
gymnasium.register("Flips-v0", Flips, max_episode_steps=1000)


def run(*options):
    train.main(parse([*SMALL, *options]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished run of 600 environment steps, and the working directory that it was made in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("training"))
        run("--steps", "600", "--name", "whole")
        yield Path.cwd() / "runs" / "whole"


@pytest.fixture
def quick(monkeypatch):
    """Without pictures, which change nothing: the runs are compared with `folder`'s, which has them."""
    killer.without_pictures(monkeypatch.setattr)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def flat(state, prefix=""):
    """Every leaf of nested dictionaries and lists by its path."""
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, (list, tuple)) else None
    if items is None:
        return {prefix: state}
    return {path: leaf for key, value in items for path, leaf in flat(value, f"{prefix}/{key}").items()}


def test_a_run_leaves_what_it_promises(folder):
    left = {path.name for path in folder.iterdir()}
    assert {"config.json", "metrics.jsonl", "checkpoint.pt", "replay", "video-00000600.mp4"} <= left
    assert not [name for name in left if name.endswith((".tmp", ".new.pt"))]
    evaluations = [line for line in lines(folder) if "eval_return" in line]
    assert [line["steps"] for line in evaluations] == [200, 400, 600]
    losses = [line for line in lines(folder) if "model_loss" in line]
    assert losses and all(np.isfinite(list(line.values())).all() for line in losses)
    returns = [line["train_return"] for line in lines(folder) if "train_return" in line]
    assert len(returns) == 6 and all(0 <= value <= 100 for value in returns)


def test_updates_keep_the_ratio_of_the_protocol(folder):
    """3 after the random steps, then 20 a 1,000 environment steps; none before."""
    state = runs.load_checkpoint(folder)
    assert (state["steps"], state["updates"]) == (600, 3 + 20 * (600 - 200) // 1000)
    config = Config()
    assert train.updates_due(config, 4_999) == 0
    assert train.updates_due(config, 5_000) == 100
    assert train.updates_due(config, 2_000_000) == 100 + 199_500


def test_the_video_shows_what_the_agent_saw(folder):
    import av

    with av.open(str(folder / "video-00000600.mp4")) as video:
        pictures = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(pictures) == 100
    assert pictures[0].shape == (220, 980, 3)  # world, position, camera, action and reward, three times as large
    assert min(picture[30:210, 10:180].max() for picture in pictures) > 150, "the world is always shown"
    brightest = [picture[30:210, 402:574].max() for picture in pictures]  # the camera is bright, a cross is grey
    assert 30 <= sum(value < 130 for value in brightest) <= 45, "38 of 101 are missing and crossed out"


@pytest.mark.usefixtures("quick")
def test_a_resumed_run_equals_an_uninterrupted_one(folder):
    """Bit for bit: parameters, optimisers, generators, replay and logged losses."""
    run("--steps", "400", "--name", "halves")
    train.main(parse(["--resume", "runs/halves", "--steps", "600"]))
    whole, halves = (flat(runs.load_checkpoint(folder.parent / name)) for name in ("whole", "halves"))
    differing = [path for path in whole if path not in ("/config/name", "/config/steps")
                 and not np.array_equal(whole[path], halves[path])]  # fmt: skip
    assert whole.keys() == halves.keys()
    assert differing == []
    assert lines(folder) == lines(folder.parent / "halves")
    for path in (folder / "replay").iterdir():
        other = np.load(folder.parent / "halves" / "replay" / path.name, mmap_mode="r")
        assert np.array_equal(np.load(path, mmap_mode="r"), other), path.name


def test_options_that_come_too_late_for_a_finished_run_do_not_enter_its_configuration(folder, capsys):
    before = (folder / "config.json").read_bytes()
    train.main(parse(["--resume", str(folder), "--act-by", "sample"]))
    assert (folder / "config.json").read_bytes() == before and "is finished at step 600" in capsys.readouterr().out


def test_the_precision_of_a_run_is_written_down_and_may_change_on_resume(folder):
    """Else `auto` would be another one on another machine, and nobody would know."""
    assert load_config(folder).precision == runs.load_checkpoint(folder)["config"]["precision"] == "float32"
    assert parse(["--resume", str(folder), "--precision", "bfloat16"]).precision == "bfloat16"
    assert parse(["--task", "toy", "--name", "x"]).precision == "auto"  # who starts a sweep does not decide it


@pytest.mark.dev(28)
@pytest.mark.usefixtures("quick")
def test_what_is_looked_at_changes_nothing_that_is_learnt(folder):
    """Bit for bit: parameters and optimisers after evaluations of another number and rate, and other log lines."""
    run("--steps", "600", "--name", "looked", "--eval-every", "400", "--eval-episodes", "3", "--log-every", "3")
    whole, other = (flat(runs.load_checkpoint(folder.parent / n)["agent"]) for n in ("whole", "looked"))
    assert [path for path in whole if not np.array_equal(whole[path], other[path])] == []
    returns = [[x["train_return"] for x in lines(folder.parent / n) if "train_return" in x] for n in ("whole", "looked")]
    assert returns[0] == returns[1]


@pytest.mark.dev(27)
def test_random_actions_are_uniform_or_the_untrained_actors_and_held():
    rng, zero, going_on = np.random.default_rng(0), np.zeros((2000, 2), np.float32), np.zeros(2000, bool)
    uniform = train.random_action(Config(), rng, zero, going_on, 1)
    assert abs((abs(uniform) > 0.5).mean() - 0.5) < 0.03 and (uniform != 0).all()
    config = Config(prefill_hold=8, initial_std=5.0)
    drawn = train.random_action(config, rng, zero, going_on, 0)
    beyond = math.erfc(math.atanh(0.9) / 5 / 2**0.5)  # of tanh N(0, 5)
    assert abs((abs(drawn) > 0.9).mean() - beyond) < 0.02
    for t in range(1, 8):
        np.testing.assert_array_equal(train.random_action(config, rng, drawn, going_on, t), drawn)
    assert (train.random_action(config, rng, drawn, going_on, 8) != drawn).mean() > 0.9
    first = np.arange(2000) < 1000
    mixed = train.random_action(config, rng, drawn, first, 3)
    assert (mixed[first] != drawn[first]).mean() > 0.9, "an episode begins with an action of its own"
    np.testing.assert_array_equal(mixed[~first], drawn[~first])


def test_what_was_earned_is_in_the_units_of_what_is_imagined():
    nan = np.nan

    def earned(reward, continues, discount):
        return train.earned_return([{"reward": r, "continues": c} for r, c in zip(reward, continues)], discount)

    for steps in (4, 300):  # wherever time cuts it off
        assert math.isclose(earned(np.full((steps, 2), 0.5), np.ones((steps, 2)), 0.9), 0.5 / (1 - 0.9))
    ending = np.array([[1.0, 2.0], [1.0, nan], [4.0, nan]])  # sums of 1 + 0.5 + 1, 1 + 2, 4 and of 2
    assert math.isclose(earned(ending, np.array([[1, 0], [1, 1], [0, 1]]), 0.5), (2.5 + 3 + 4 + 2) / 4)
    assert math.isclose(earned(ending, np.array([[1, 1], [1, 0], [0, 1]]), 1.0), (6 + 5 + 4 + 2) / 4)
    # If the second is cut off, its one step counts for half, as the beginning of 2, 2, 2, ...
    assert math.isclose(earned(ending, np.array([[1, 1], [1, 0], [0, 1]]), 0.5), (2.5 + 3 + 4 + 0.5 * 4) / 3.5)


@pytest.mark.usefixtures("quick")
def test_vectors_are_standardised_by_the_random_phase(tmp_path, monkeypatch):
    """On for anybody's environment; statistics of the present readings, kept in the checkpoint."""
    monkeypatch.chdir(tmp_path)
    run("--steps", "200", "--name", "scaled", "--standardise", "on")
    state = runs.load_checkpoint("runs/scaled")
    position, present = (np.load(f"runs/scaled/replay/{key}.npy")[:202] for key in ("position", "present"))
    seen = position[present[:, 0] == 1].astype(float)
    np.testing.assert_allclose(state["agent"]["model"]["mean_0"], seen.mean(0), rtol=1e-4)
    np.testing.assert_allclose(state["agent"]["model"]["std_0"], seen.std(0), rtol=1e-4)
    assert parse(["--task", "toy"]).standardise == "off" and parse(["--task", "Hopper-v5"]).standardise == "on"
    assert parse(["--task", "Hopper-v5"]).continuation == "on" and parse(["--task", "toy"]).continuation == "off"


def test_what_stood_still_in_the_random_phase_may_move_later():
    seen = np.stack([np.linspace(0, 1, 50), np.full(50, 0.3), np.linspace(0, 1e-4, 50)], -1)
    model = MSSM({"joints": (3,)}, 1)
    columns = {"joints": seen.astype(np.float32), "present": np.ones((50, 1), np.int8)}
    train.standardise(model, SimpleNamespace(rows_of=columns.get))
    assert model.std_0[0] == pytest.approx(seen[:, 0].std()) and model.std_0[1:].tolist() == pytest.approx([1, 1e-3])


@pytest.mark.usefixtures("quick")
def test_returns_in_training_are_those_of_whole_episodes_of_any_length(tmp_path, monkeypatch):
    """Were a round to end with the first episode that ends, long ones would be cut, and the mean too low."""
    monkeypatch.chdir(tmp_path)
    small = SMALL[2:]  # without the task
    train.main(parse([*small, "--task", "test_train:Flips-v0", "--steps", "12000", "--prefill", "12000", "--eval-every", "12000",
                      "--num-envs", "4", "--capacity", "20000", "--name", "flips", "--continuation", "off"]))  # fmt: skip
    replay = {path.stem for path in Path("runs/flips/replay").iterdir()}
    assert "first" in replay and "continues" not in replay, "short episodes are learnt from, whether their ends are or not"
    returns = [x["train_return"] for x in lines(Path("runs/flips")) if "train_return" in x]
    assert len(returns) > 50 and max(returns) > 250
    assert np.mean(returns) == pytest.approx(150, abs=4 * 86 / len(returns) ** 0.5)


def test_options_that_a_method_does_not_read_are_told(capsys):
    for method, option, told in (
        ("mummi_b", ["--weights", "camera=2"], True), ("mummi", ["--weights", "camera=2"], False),
        ("cvrl", ["--d-f", "16"], True), ("mssm_e", ["--d-f", "16"], False), ("dreamer", ["--no-over-present"], True),
        ("cvrl", ["--no-over-present"], False), ("dreamer", [], False), ("cvrl", ["--horizon", "5"], False),
    ):  # fmt: skip
        parse(["--task", "toy", "--method", method, "--name", "told", *option])
        assert capsys.readouterr().err == (f"{option[0].replace('no-', '')} changes nothing: {method} does not read it\n" if told else "")


@pytest.mark.usefixtures("quick")
def test_another_seed_gives_another_run(folder):
    run("--steps", "200", "--name", "other", "--seed", "2")
    first, other = (runs.load_checkpoint(folder.parent / name)["agent"]["model"] for name in ("whole", "other"))
    assert not torch.equal(first["posterior_net.0.weight"], other["posterior_net.0.weight"])
    assert lines(folder)[0] != lines(folder.parent / "other")[0]


def test_evaluation_has_episodes_of_its_own():
    evaluated, trained = (set(envs.seeds(*numbers, count=10)) for numbers in [(1,), (1, 0)])  # those of step 0
    assert len(evaluated) == len(trained) == 10 and not evaluated & trained


def test_evaluations_are_on_unseen_backgrounds_and_without_exploration(tmp_path, monkeypatch):
    """Those during training and those of evaluate.py. The environments and the agent run as they are, and are listened to."""
    killer.without_pictures(monkeypatch.setattr)
    splits, explored = [], []
    make, act = envs.make_vector_env, FastAgent.act
    monkeypatch.setattr(envs, "make_vector_env", lambda *a, **k: (splits.append(k.get("split", "train")), make(*a, **k))[1])
    monkeypatch.setattr(FastAgent, "act", lambda *a, **k: (explored.append(k["explore"]), act(*a, **k))[1])
    monkeypatch.chdir(tmp_path)
    run("--steps", "200", "--prefill", "200", "--updates-per-1000", "0", "--first-updates", "1")
    assert splits == ["train", "eval"]
    assert set(explored) == {False}, "the only episodes were random, or evaluations"
    splits.clear()
    evaluate.main(evaluate.Options(runs=("runs/toy-mummi-1",), episodes=1, rates=("None",)))
    assert splits == ["eval"]
    assert set(explored) == {False}


def test_evaluation_prints_and_writes_the_table(folder, capsys):
    evaluate.main(evaluate.Options(runs=(str(folder),), episodes=2, calibration=True, video=True))
    printed = capsys.readouterr().out
    assert (folder / "evaluation.md").read_text() == printed
    records = json.loads((folder / "evaluation.json").read_text())["records"]
    assert [record["missing"] for record in records] == ["None", "Medium", "High"]
    for record in records:
        cell = f"{np.mean(record['returns']):.1f} ± {np.std(record['returns']):.1f}"
        assert f"| {record['missing']} | {cell} |" in printed
        assert 0.99 < sum(record["calibration"]["share"].values()) < 1.01
    assert "The random policy earns" in printed and "The scripted policy earns" in printed
    assert (folder / "evaluation-High.mp4").exists()


@pytest.mark.table(1)
def test_evaluation_shows_the_papers_figures_beside_ours():
    cells = {("finger_spin", "rgb+depth+touch", "High"): {"mummi": dict(mean=900, std=10, seeds={1: 0.0, 2: 0.0, 3: 0.0}, episodes=30, steps={2_000_000})}}
    assert "| 900.0 ± 10.0 [929.1 ± 20.8] |" in evaluate.markdown(cells, {})
    cells = {("finger_spin", "rgb+depth", "High"): cells.popitem()[1]}
    assert "[" not in evaluate.markdown(cells, {}), "the paper removes no sensor in Table I"


def test_table_ii_has_the_rows_and_columns_of_the_paper():
    """Whatever the order of the runs."""
    cell = dict(mean=1, std=2, seeds={1: 0.0}, episodes=30, steps={1_000_000})
    cells = {("table_wiping", sensors, rate): {method: cell for method in ("mssm_e", "mummi_b", "mummi")}
             for sensors in ("workspace+robot", "robot") for rate in evaluate.TABLE_II}  # fmt: skip
    table = evaluate.markdown(cells, {}).splitlines()
    assert table[0] == "| task | sensors | missing | mummi | mummi_b | mssm_e |"
    paper = [[part.split("]")[0] for part in row.split("[")[1:]] for row in table[2:6]]
    assert paper == [
        ["61.4 ± 70.4", "48.8 ± 40.5", "60.9 ± 56.1"], ["60.6 ± 69.9", "47.9 ± 37.2", "64.9 ± 85.3"],
        ["57.8 ± 69.8", "62.1 ± 93.7", "64.0 ± 95.9"], ["65.9 ± 76.9", "69.2 ± 97.2", "60.4 ± 98.2"],
    ]  # fmt: skip


@pytest.mark.table(1)
def test_the_papers_table_1_is_whole():
    table = json.loads(evaluate.PAPER.read_text())["Table I"]
    assert set(table) == set(envs.SUITE)
    for rows in table.values():
        assert set(rows) == set(evaluate.RATES)
        for row in rows.values():
            assert set(row) == {"mummi", "mummi_b", "cvrl", "dreamer"}
            assert row["mummi"][0] == max(mean for mean, _ in row.values()), "bold in the paper"


@pytest.mark.table(2)
def test_table_2_is_what_removing_the_workspace_camera_leaves():
    table = json.loads(evaluate.PAPER.read_text())["Table II"]
    sensors = ["workspace", "robot"]
    kept = evaluate.sensor_subsets(evaluate.Options(runs=("a",), remove=("workspace",)), sensors)
    assert set(table) == {"+".join(names) for names in kept}
    for names in kept:
        for missing in ("Medium", "None"):
            assert set(table["+".join(names)][missing]) == {"mummi", "mummi_b", "mssm_e"}
    assert evaluate.paper_cell("table_wiping", "robot", "None", "mssm_e") == [60.4, 98.2]
    assert evaluate.paper_cell("table_wiping", "robot", "High", "mssm_e") is None


BAD = {
    "unknown task": ["--task", "finger_twist"],
    "unknown method": ["--method", "momo"],
    "rate of 1": ["--missing-rate", "1"],
    "negative rate": ["--missing-rate", "-0.1"],
    "released rate": ["--missing-process", "released", "--missing-rate", "0.5"],
    "missing backgrounds": ["--task", "finger_spin", "--backgrounds", "nowhere"],
    "empty backgrounds": ["--task", "finger_spin", "--backgrounds", "empty"],
    "unreadable background": ["--task", "finger_spin", "--backgrounds", "garbage"],
    "batch longer than an episode": ["--task", "toy", "--batch-length", "102"],
    "no batch": ["--batch-size", "0"],
    "negative size": ["--d-h", "-5"],
    "negative prefill": ["--prefill", "-1"],
    "negative rate of updates": ["--updates-per-1000", "-1"],
    "replay shorter than an episode": ["--capacity", "50"],
    "run folder exists": ["--name", "taken"],
    "no run to resume": ["--resume", "runs/nothing"],
    "another task's checkpoint": ["--resume", "runs/trained", "--task", "walker_walk"],
    "no time limit": ["--task", "test_train:Endless-v0"],
    "nothing to learn from": ["--task", "toy", "--steps", "500"],
    "no such device": ["--device", "cuda"],
    "unknown device": ["--device", "tpu"],
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_line_and_writes_nothing(case, tmp_path, monkeypatch, capsys):
    if case == "no such device" and torch.cuda.is_available():
        pytest.skip("this machine has the device")
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "garbage", "runs/taken", "runs/trained"):
        Path(name).mkdir(parents=True)
    Path("garbage/broken.mp4").write_bytes(b"no video")
    Path("runs/trained/config.json").write_text(json.dumps({"task": "toy"}))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError) as error:
        parse(BAD[case])
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    assert sorted(tmp_path.rglob("*")) == before
    if case == "unreadable background":
        assert "broken.mp4" in str(error.value)


@pytest.mark.parametrize("program, options", [("train.py", ["--task", "finger_twist"]), ("evaluate.py", ["runs/nothing"])])
def test_the_command_line_ends_with_one_line_and_code_2(program, options, tmp_path):
    process = subprocess.run([sys.executable, ROOT / program, *options], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 2 and process.stdout == ""
    assert process.stderr.count("\n") == 1 and process.stderr.startswith(f"{program}: ")
    assert list(tmp_path.iterdir()) == []


def test_evaluation_refuses_runs_that_are_not_comparable():
    configs = {"a": Config(), "b": Config(method="cvrl", seed=3), "c": Config(d_h=100)}
    with pytest.raises(ValueError, match="a and c differ in d_h, 200 and 100"):
        check_comparable(configs)
    configs.pop("c")
    check_comparable(configs)
    configs |= {"d": Config(task="walker_run"), "e": Config(task="walker_run", method="cvrl", d_h=100)}
    with pytest.raises(ValueError, match="d and e differ in d_h"):
        check_comparable(configs)
    configs["e"] = Config(task="walker_run", name="again")
    with pytest.raises(ValueError, match="d and e are both walker_run, mummi, seed 1"):
        check_comparable(configs)


def test_backgrounds_are_compared_by_what_they_hold(tmp_path):
    """Runs of two machines have their clips in two places; one place may hold other clips today."""
    def run(name, path, fingerprint=None):
        folder = tmp_path / name
        folder.mkdir()
        if fingerprint:
            (folder / "backgrounds.json").write_text(json.dumps({"path": path, "fingerprint": fingerprint}))
        return {folder: Config(seed=len(list(tmp_path.iterdir())), backgrounds=path)}

    here = run("a", "/here", "1f")
    assert check_comparable(here | run("b", "/there", "1f"), ["backgrounds"]) == {
        tmp_path / "a": ("backgrounds /here",), tmp_path / "b": ("backgrounds /there",)}
    check_comparable(here | run("c", "/there", "1f") | run("published", "/here"))
    with pytest.raises(ValueError, match="a and .*d differ in backgrounds, 1f and 2e: take them apart"):
        check_comparable(here | run("d", "/here", "2e"))
    with pytest.raises(ValueError, match="a and .*e differ in backgrounds, /here and /there"):
        check_comparable(here | run("e", "/there"))


def test_the_table_says_how_long_runs_were_trained():
    record = dict(task="toy", sensors="position", missing="None", method="mummi", returns=[1.0])
    records = [dict(record, seed=1, steps=6_000), dict(record, seed=2, steps=4_800)]
    assert "4,800 or 6,000 environment steps" in evaluate.markdown(evaluate.pool(records), {})


def test_ablations_have_columns_of_their_own_and_seeds_and_parameters_are_told():
    record = dict(task="toy", sensors="position", missing="None", method="mummi", steps=100, parameters=1234)
    records = [dict(record, seed=seed, label=f"free_nats {n}", returns=[n + seed]) for n in (0.0, 3.0) for seed in (1, 2)]
    text = evaluate.markdown(evaluate.pool(records), {})
    assert "| mummi, free_nats 0.0 | mummi, free_nats 3.0 |" in text and "**4.5 ± 0.5**" in text
    assert "| 1.0, 2.0 | 4.0, 5.0 |" in text and "| 1,234 | 1,234 |" in text
    other = dict(record, seed=1, label="free_nats 0.0", returns=[1.0], task="toy_xy", parameters=99)
    assert "| 99 or 1,234 | 1,234 |" in evaluate.markdown(evaluate.pool([*records, other]), {})


@pytest.mark.parametrize("options, said", [({"remove": ("camera",)}, "--remove camera"), ({"trust": True}, "no usual distances")])
def test_what_the_last_run_cannot_do_is_known_before_the_first_is_evaluated(folder, tmp_path, monkeypatch, options, said):
    state = runs.load_checkpoint(folder)
    state["config"]["seed"], state["modalities"] = 9, {"x": (1,), "y": (1,)}
    del state["usual"]
    torch.save(state, tmp_path / "other.pt")
    monkeypatch.setattr(evaluate, "evaluate_run", lambda *arguments: pytest.fail("evaluated"))
    with pytest.raises(ValueError, match=said):
        evaluate.main(evaluate.Options(runs=(str(folder), str(tmp_path / "other.pt")), output=str(tmp_path / "x"), **options))


@pytest.mark.parametrize("options, said", [
    ({}, "no run was given"), ({"runs": ("a",), "rates": ("None", "None")}, "each once"),
    ({"runs": ("a",), "missing_process": "fair"}, "exact or released"), ({"runs": ("a",), "act_by": "luck"}, "mode or sample"), ({"runs": ("a",), "device": "cuda:7"}, "cuda:7"),
    ({"runs": ("a",), "fault_rate": 0.2}, "--fault-rate changes nothing without --faults"),
    ({"runs": ("a",), "false_alarms": 0.05}, "--false-alarms changes nothing without --trust"),
    ({"runs": ("a/x", "b/x"), "video": True}, "films of one name"), ({"runs": ("a",), "device": "mps"}, "mps"), ({"runs": ("a",), "device": "gpu"}, "gpu"),
])  # fmt: skip
def test_bad_options_of_evaluation_are_known_before_anything_runs(options, said):
    with pytest.raises(ValueError, match=said):
        evaluate.main(evaluate.Options(**{"runs": ()} | options))


def test_a_table_says_what_it_was_made_under_and_an_agent_may_act_by_a_sample(folder, capsys):
    tables, returns = [], []
    for options in ({}, dict(act_by="mode"), dict(act_by="sample", missing_process="released")):
        evaluate.main(evaluate.Options(runs=(str(folder),), episodes=1, rates=("Medium",), references=False, output="x", **options))
        tables.append(capsys.readouterr().out)
        returns.append(json.loads(Path("x.json").read_text())["records"][0]["returns"])
    assert "Made with" not in tables[0] and "training. Made with --act-by mode." in tables[1]
    assert "training. Made with --act-by sample --missing-process released." in tables[2]
    assert returns[0] == returns[1] != returns[2]


@pytest.mark.usefixtures("quick")
def test_a_run_may_move_with_its_backgrounds_but_not_to_others(tmp_path, monkeypatch):
    """The path is given again; clips of other content are refused."""
    monkeypatch.chdir(tmp_path)
    for name, shade in (("here", 50), ("there", 50), ("others", 90)):
        np.save(f"{name}.npy", np.full((3, 30, 64, 64, 3), shade, np.uint8))
    finger = "--task finger_spin --prefill 100 --updates-per-1000 1 --first-updates 1 --eval-every 1000 --capacity 600"
    small = [*SMALL, *finger.split(), "--num-envs", "1", "--eval-episodes", "1", "--name", "moved"]
    with monkeypatch.context() as patch, pytest.raises(runs.Stopped):
        patch.setattr(train, "collect", lambda *args: os.kill(os.getpid(), signal.SIGTERM) or args[-1]())
        train.main(parse([*small, "--steps", "1000", "--backgrounds", "here.npy"]))
    with pytest.raises(ValueError, match="other clips"):
        train.main(parse(["--resume", "runs/moved", "--steps", "2000", "--backgrounds", "others.npy"]))
    with pytest.raises(ValueError, match="other clips"):
        train.main(parse(["--resume", "runs/moved", "--steps", "2000", "--backgrounds", "procedural"]))
    np.save("here.npy", np.full((4, 30, 64, 64, 3), 50, np.uint8))  # one more: others would be held out
    with pytest.raises(ValueError, match="other clips"):
        evaluate.main(evaluate.Options(runs=("runs/moved",), episodes=1))
    Path("here.npy").unlink()
    train.main(parse(["--resume", "runs/moved", "--steps", "1000", "--backgrounds", "there.npy"]))
    assert runs.load_checkpoint("runs/moved")["steps"] == 1000
    assert runs.load_checkpoint("runs/moved")["config"]["backgrounds"] == "there.npy"


def test_a_run_on_procedural_scenes_does_not_go_on_with_videos(folder):
    np.save("clips.npy", np.zeros((3, 30, 64, 64, 3), np.uint8))
    with pytest.raises(ValueError, match="other clips"):
        runs.check_backgrounds(folder, "clips.npy")
    runs.check_backgrounds(folder, "procedural")


def test_a_folder_knows_its_backgrounds_whoever_makes_it(tmp_path, monkeypatch):
    """As `tools.sweep` does, whose `train.py` finds the folder there and resumes it."""
    monkeypatch.chdir(tmp_path)
    for name in ("these", "those"):
        np.save(f"{name}.npy", np.full((len(name), 30, 64, 64, 3), ord(name[2]), np.uint8))
    runs.create_folder(Path("run"), Config(backgrounds="these.npy"))
    runs.check_backgrounds("run", "these.npy")
    for others in ("those.npy", "procedural"):
        with pytest.raises(ValueError, match="other clips"):
            runs.check_backgrounds("run", others)


def test_a_new_run_never_touches_another(tmp_path):
    for name in ("a.tmp", "a"):
        runs.create_folder(tmp_path / name, Config(name=name))
    assert [json.loads((tmp_path / n / "config.json").read_text())["name"] for n in ("a.tmp", "a")] == ["a.tmp", "a"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.tmp"]


def test_the_reward_error_is_the_whole_error_over_the_whole_variance(tmp_path):
    """A batch without a reward has no variance; the mean of the batches' ratios would be anything."""
    log = runs.Log(tmp_path, 100)
    for error, variance in ((0.5, 1.0), (0.3, 0.0), (0.1, 0.5)):
        log.add({"reward_square_error": torch.tensor(error), "reward_variance": torch.tensor(variance)}, None)
    assert log.means()["reward_error"] == pytest.approx(0.9 / 1.5)
    log.close()


def test_the_update_that_was_first_not_finite_is_told_though_the_actor_began_later(tmp_path):
    log = runs.Log(tmp_path, 100)
    for model, actor in ((1.0, None), (1.0, None), (1.0, 2.0), (math.nan, math.inf), (math.nan, 2.0)):
        losses = {"model_loss": model} | ({} if actor is None else {"actor_loss": actor})
        log.add({name: torch.tensor(x) for name, x in losses.items()}, "the batch")
    with pytest.raises(runs.Fault, match=r"^not finite, 1 updates ago: model_loss, actor_loss;"):
        log.means()
    assert torch.load(tmp_path / "batch.pt") == "the batch"
    log.close()


def test_the_bar_counts_from_the_first_learnt_step_and_fits_80_columns(tmp_path, monkeypatch, capsys):
    log = runs.Log(tmp_path, 2_000_000)
    log.show(8_000)  # random steps, a thousand times as fast
    log.learning(8_000)
    log.bar.start_t = log.learnt[0] - 100  # of tqdm's clock; only differences count
    monkeypatch.setattr(log.bar, "_time", lambda: log.learnt[0])
    log.bar.n = 8_100
    assert log.bar.format_dict["n"] - log.bar.format_dict["initial"] == 100
    assert log.bar.format_dict["elapsed"] == pytest.approx(100)
    log.show(8_100, "learning 37 of 400")
    log.bar.refresh()
    said = capsys.readouterr().err
    assert "learning 37 of 400" in said and max(map(len, said.replace("\r", "\n").split("\n"))) <= 80
    log.close()


def test_episodes_beyond_ten_are_those_of_the_references(monkeypatch, tmp_path):
    """Twenty episodes, ten at a time, begin with the seeds that the random policy gets."""
    given = []
    monkeypatch.setattr(evaluate, "run_episodes", lambda agent, envs, seeds, **_: given.extend(seeds) or (np.zeros(len(seeds)), []))
    options = evaluate.Options(runs=("a",), episodes=12, rates=("None",))
    agent = SimpleNamespace(model=SimpleNamespace(modalities={"position": (2,), "camera": (64, 64, 3)}))
    records = evaluate.evaluate_run("a", Config(task="toy"), agent, 0, options)
    assert given == evaluate.seeds(options.seed, count=12) and len(records[0]["returns"]) == 12


def test_experts_that_never_see_a_step_together_are_not_calibrated():
    model = MSSM({"rgb": (64, 64, 3), "touch": (2,)}, action_size=2, d_f=8, channels=2)
    step = {"rgb": np.zeros((1, 64, 64, 3), np.uint8), "touch": np.zeros((1, 2), np.float32), "present": np.array([[1, 0]])}
    agent = SimpleNamespace(model=model, device=torch.device("cpu"))
    assert evaluate.calibration(agent, [step] * 3, ("rgb", "touch")) is None
    both = dict(step, present=np.array([[1, 1]]))
    assert evaluate.calibration(agent, [step, both], ("rgb", "touch"))["steps"] == 1


@pytest.mark.parametrize("remove", [("camera", "position"), ("nose",)])
def test_evaluation_refuses_to_remove_every_or_an_unknown_sensor(remove):
    with pytest.raises(ValueError, match="choose some of position, camera"):
        evaluate.sensor_subsets(evaluate.Options(runs=("a",), remove=remove), ["position", "camera"])
    subsets = evaluate.sensor_subsets(evaluate.Options(runs=("a",), sensors="all"), ["rgb", "depth", "touch"])
    assert len(subsets) == len(set(subsets)) == 7
    subsets = evaluate.sensor_subsets(evaluate.Options(runs=("a",), remove=("workspace",)), ["workspace", "robot"])
    assert subsets == [("workspace", "robot"), ("robot",)]  # the rows of Table II


def test_the_rank_of_the_matching_step():
    means = torch.arange(5.0).unsqueeze(1)
    assert evaluate.matching_rank(means, means) == 1
    assert evaluate.matching_rank(means, means.flip(0)) == 4  # |4 - 2 i| away: ranks 5, 4, 1, 4, 5


def test_the_references_of_the_toy_world():
    returns = evaluate.reference_returns(Config(task="toy"), 10, seed=0)
    assert np.mean(returns["random"]) < 0.35 * np.mean(returns["scripted"])
    assert np.mean(returns["scripted"]) > 85


def test_toy_tasks_have_their_own_defaults_and_the_others_the_papers(monkeypatch):
    paper = parse(["--task", "finger_spin", "--preset", "paper", "--name", "x"])
    assert (paper.batch_length, paper.d_f, paper.steps) == (50, 1024, 2_000_000)
    for preset in ((), ("--preset", "auto"), ("--preset", "small")):  # small is what a CPU gets
        small = parse(["--task", "finger_spin", "--device", "cpu", *preset, "--name", "x"])
        assert (small.preset, small.batch_length, small.d_f, small.steps) == ("small", 25, 128, 200_000)
    assert parse(["--task", "walker_run", "--preset", "small", "--d-f", "7", "--name", "x"]).d_f == 7
    own = parse(["--task", "Pendulum-v1", "--name", "x"])
    monkeypatch.setattr("config.choose_device", lambda name: torch.device("cuda"))
    assert parse(["--task", "finger_spin", "--name", "x"]) == paper
    assert parse(["--task", "Pendulum-v1", "--name", "x"]) == own and own.preset == "small"
    assert (own.free_nats, own.prefill_hold, own.d_f, small.free_nats, small.prefill_hold) == (0.5, 0, 128, 3.0, 8)
    assert own.model_updates == small.model_updates == 800
    assert own.weights == () and small.weights == ("touch=0.001",)  # somebody's `touch` weighs as much as the rest
    assert parse(["--task", "toy", "--name", "x"]).batch_length == 25
    assert parse(["--task", "toy", "--batch-length", "30", "--name", "x"]).batch_length == 30
    assert set(TASK_DEFAULTS) == {*envs.TOY, "table_wiping"}
    assert TASK_DEFAULTS["table_wiping"]["steps"] == 1_000_000  # section VI
