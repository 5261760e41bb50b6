"""The sweep: what it plans, and with a real cluster of Ray's, three nodes on this machine, what it survives."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import killer
import numpy as np
import pytest
import torch
from test_reliability import TOY, assert_equal_runs, run

import evaluate
from config import Config, parse
from tools import sweep

ROOT = Path(__file__).parent.parent
OPTIONS = ["--tasks", "toy", "--methods", "mummi", "cvrl", "--seeds", "1", "2", "--episodes", "1", "--preset", "small",
           *TOY[: TOY.index("--task")], *TOY[TOY.index("--task") + 2 :]]  # fmt: skip


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ---- 1. The plan ----


def configs(*rest, **options):
    return sweep.plan(sweep.Options(**options), list(rest))


@pytest.mark.table(1)
def test_without_options_it_is_table_1_and_asks(capsys):
    """5 tasks x 4 methods x 3 seeds, each as train.py alone would have it; nothing is made."""
    planned = configs()
    assert len(planned) == 60
    paper = json.loads((ROOT / "results" / "paper.json").read_text())["Table I"]
    assert {(c.task, c.method) for c in planned.values()} == {(t, m) for t in paper for m in paper[t]["None"]}
    config = planned[Path("runs").resolve() / "cup_catch-cvrl-2"]
    assert config == parse("--task cup_catch --method cvrl --seed 2".split())
    assert sweep.main(sweep.Options(), []) is None
    said = capsys.readouterr().out
    assert "60 runs" in said and "--yes" in said and not Path("runs").exists()


def test_the_plan_says_the_hours_that_were_measured(monkeypatch, tmp_path):
    """Of GPUs where there are any; else of the CPU, saying so. Runs of other sizes have no estimate."""
    folder = tmp_path / "results" / "benchmark"
    folder.mkdir(parents=True)
    monkeypatch.setattr(sweep, "ROOT", tmp_path)
    planned = configs("--preset", "paper", tasks=("cup_catch",), seeds=(1,))
    (folder / "cpu.json").write_text(json.dumps({"machine": {"gpu": None}, "training": {"steps_a_second": 2.0}}))
    (folder / "other.json").write_text(json.dumps({"machine": {"gpu": "G8"}, "update": {}}))
    said = sweep.describe(planned, [*planned])
    assert "No GPU has been measured" in said and "277.8 hours each, 1,111 in all" in said
    (folder / "gpu.json").write_text(json.dumps({"machine": {"gpu": "G9"}, "training": {"steps_a_second": 200.0}}))
    said = sweep.describe(planned, [*planned][:3])
    assert "1 are finished" in said and "2.8 hours each, 8 in all, one at a time on G9" in said and "CPU" not in said
    small = configs(tasks=("toy",), seeds=(1,))
    assert "hours each" not in sweep.describe(small, [*small])


@pytest.mark.parametrize(
    "rest, options, said",
    [
        (["--seed", "3"], {}, "--seed is not for a sweep"),
        (["--name=x"], {}, "--name=x is not for a sweep"),
        ([], {"gpus_per_run": 2.0}, "--gpus-per-run 0 to 1"),
        ([], {"retries": -1}, "--retries takes 0 or more"),
        ([], {"address": "auto"}, "--address also needs --preset"),
        ([], {"methods": ("mumi",)}, "--method mumi is not allowed"),
        (["--horizon", "1"], {}, "--horizon 1 is not allowed"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_starts(rest, options, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        configs(*rest, **options)


def test_a_folder_of_another_run_is_refused():
    """But more steps are another wish for the same run."""
    (folder, config), = configs(tasks=("toy",), methods=("mummi",), seeds=(1,)).items()
    sweep.create_folder(folder, config)
    sweep.write_config(folder, dataclasses.replace(config, precision="bfloat16"))  # as its node has decided
    (again,) = configs("--steps", "9000", tasks=("toy",), methods=("mummi",), seeds=(1,)).values()
    assert again.precision == "bfloat16"
    with pytest.raises(ValueError, match="was trained with --num-envs 4, not 2"):
        configs("--num-envs", "2", tasks=("toy",), methods=("mummi",), seeds=(1,))


@pytest.mark.parametrize(
    "nodes, options, expected",
    [
        ([{"CPU": 2.0}], {}, (0.0, 1)),
        ([{"CPU": 8.0, "GPU": 1.0}], {"gpus_per_run": 0.0}, (0.0, 1)),
        ([{"CPU": 4.0}, {"CPU": 64.0, "GPU": 8.0}], {}, (1.0, 8)),
        ([{"CPU": 16.0, "GPU": 1.0}], {"gpus_per_run": 0.5}, (0.5, 8)),
        ([{"CPU": 2.0, "GPU": 1.0}], {"gpus_per_run": 0.25}, (0.25, 1)),
        ([{"CPU": 2.0}], {"cpus_per_run": 2}, (0.0, 2)),
    ],
)
def test_the_share_of_a_run(nodes, options, expected):
    assert sweep.share(nodes, sweep.Options(**options)) == expected


def test_a_share_that_no_node_has_is_refused():
    with pytest.raises(ValueError, match="asks for 0.5 GPUs and 1 CPUs, and the nodes have 0 and 2"):
        sweep.share([{"CPU": 2.0}], sweep.Options(gpus_per_run=0.5))


@pytest.mark.parametrize("by_hand, kept", [
    ({}, True), ({"calibration": True, "video": True}, True), ({"references": False}, False), ({"episodes": 3}, False),
    ({"missing_process": "released"}, False), ({"backgrounds": "other"}, False), ({"label": ("free_nats",)}, False),
    ({"rates": ("None",)}, False), ({"faults": ("camera=black",)}, False), ({"trust": True}, False), ({"seed": 5}, False),
    ({"remove": ("camera",)}, False), ({"act_by": "sample"}, False),
], ids=str)  # fmt: skip
def test_an_evaluation_by_hand_is_kept_if_its_conditions_are_those_of_the_sweep(by_hand, kept):
    (folder, config), = configs(tasks=("toy",), methods=("mummi",), seeds=(1,)).items()
    sweep.create_folder(folder, config)
    torch.save({"steps": config.steps, "evaluated": config.steps}, folder / "checkpoint.pt")
    options = evaluate.Options((str(folder),), **by_hand)
    (folder / "evaluation.json").write_text(json.dumps({"options": dataclasses.asdict(options)}))
    left = sweep.commands(folder, config, sweep.Options(), "cpu", True)
    assert (left == []) == kept and all("evaluate.py" in command[0] for command in left)


def test_what_would_change_the_evaluation_of_a_finished_run_is_refused():
    (folder, config), = configs(tasks=("toy",), methods=("mummi",), seeds=(1,)).items()
    sweep.create_folder(folder, config)
    sweep.check_same(folder, dataclasses.replace(config, act_by="sample"))  # it comes in time
    torch.save({"steps": config.steps, "evaluated": config.steps}, folder / "checkpoint.pt")
    sweep.check_same(folder, dataclasses.replace(config, eval_every=1))
    sweep.write_config(folder, dataclasses.replace(config, precision="bfloat16"))  # what auto was on its node
    sweep.check_same(folder, config)
    with pytest.raises(ValueError, match="was trained with --precision bfloat16, not float32"):
        sweep.check_same(folder, dataclasses.replace(config, precision="float32"))
    with pytest.raises(ValueError, match="was trained with --act-by mode, not sample"):
        sweep.check_same(folder, dataclasses.replace(config, act_by="sample"))
    with pytest.raises(ValueError, match="was trained with --steps 6000, not 3000"):
        sweep.check_same(folder, dataclasses.replace(config, steps=3000))
    sweep.check_same(folder, dataclasses.replace(config, steps=9000))  # it would go on
    np.save("clips.npy", np.zeros((3, 30, 64, 64, 3), np.uint8))
    with pytest.raises(ValueError, match="clips.npy hold other clips than those of"):
        sweep.check_same(folder, dataclasses.replace(config, backgrounds="clips.npy"))


# ---- 2. On a cluster of three nodes ----


@pytest.fixture(scope="module")
def cluster():
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    os.environ["RAY_worker_niceness"] = "0"  # as tools.sweep has it for a cluster of its own
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=2)
    yield cluster
    cluster.shutdown()


def start(cluster, *options, stdout=subprocess.PIPE, encoding="utf-8"):
    """The sweep, as a user starts it."""
    command = [sys.executable, "-m", "tools.sweep", "--address", cluster.address, *OPTIONS, *map(str, options)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}
    return subprocess.Popen(command, stdout=stdout, stderr=subprocess.STDOUT, text=True, env=environment)


def end(process):
    said = process.communicate(timeout=1200)[0]
    return process.returncode, said


def wait_for(condition, process, seconds=900):
    for _ in range(10 * seconds):
        if condition():
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    raise TimeoutError


def place(folder):
    """Node and worker of the last attempt at a run."""
    return re.findall(r"node (\w+), worker (\d+)", (folder / "sweep.log").read_text())[-1]


def alive(folder):
    """The processes of a run."""
    lines = subprocess.run(["ps", "-eo", "stat,args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in lines if str(folder) in line and "tools.sweep" not in line and not line.startswith("Z")]


def test_with_a_worker_killed_and_a_node_lost_all_runs_equal_those_without_ray(cluster, monkeypatch):
    """Two methods x two seeds, bit for bit; and then their table and curves."""
    process = start(cluster, "--steps", 400)
    folders = [Path("runs").resolve() / f"toy-{method}-{seed}" for method in ("mummi", "cvrl") for seed in (1, 2)]
    training = lambda: [f for f in folders if (f / "checkpoint.pt").exists() and not sweep.finished(f, Config(steps=400))]  # noqa: E731
    wait_for(training, process)
    killed = training()[0]
    os.kill(int(place(killed)[1]), signal.SIGKILL)
    nodes = {node.node_id: node for node in cluster.worker_nodes}
    gone = lambda: [f for f in training() if place(f)[0] in nodes and f != killed]  # noqa: E731
    wait_for(gone, process)
    lost = gone()[0]
    cluster.remove_node(nodes[place(lost)[0]], allow_graceful=False)
    code, said = end(process)
    assert code == 0, said
    for folder in (killed, lost):
        assert re.search(rf"{folder.name}: .*; attempt 2 of 4 follows", said), said
        assert "attempt 2 on" in (folder / "sweep.log").read_text()
    killer.without_pictures(monkeypatch.setattr)
    for folder in folders:
        task, method, seed = folder.name.split("-")
        run(*TOY, "--steps", 400, "--method", method, "--seed", seed, "--name", f"alone-{folder.name}")
        assert_equal_runs(Path("runs") / f"alone-{folder.name}", folder)
    assert Path("runs-table.md").read_text() in said and said.count("| toy | position+camera |") == 6  # returns, and every seed
    assert Path("runs-curves.png").exists() and Path("runs-curves.svg").exists()
    references = [json.loads((folder / "evaluation.json").read_text())["references"] for folder in folders]
    assert [list(x) for x in references] == [["toy"], [], [], []] and "The random policy earns" in said


def test_an_interrupted_sweep_goes_on_and_a_run_that_fails_does_not_stop_the_others(cluster):
    options = ["--methods", "mummi", "--steps", 400, "--retries", 1]
    process = start(cluster, *options)
    folders = [Path("runs").resolve() / f"toy-mummi-{seed}" for seed in (1, 2)]
    wait_for(lambda: all((folder / "checkpoint.pt").exists() for folder in folders), process)
    process.send_signal(signal.SIGINT)
    code, said = end(process)
    assert (code, said.splitlines()[-1]) == (130, "tools.sweep: stopped by SIGINT; go on with the same command"), said
    assert [alive(folder) for folder in folders] == [[], []]
    assert not (folders[0] / "evaluation.json").exists()

    whole = (folders[1] / "checkpoint.pt").read_bytes()
    for path in folders[1].glob("checkpoint*.pt"):
        path.write_bytes(b"damaged")
    code, said = end(start(cluster, *options))
    assert code == 1 and "1 of 2 runs failed: toy-mummi-2" in said, said
    assert "toy-mummi-2: exit code 2" in said and "attempt 2 of 2 follows" in said and "given up" in said
    assert sweep.finished(folders[0], Config(steps=400)) and "1 seed, 1 episodes" in Path("runs-table.md").read_text()

    (folders[1] / "checkpoint.pt").write_bytes(whole)
    before = (folders[0] / "sweep.log").read_text()
    code, said = end(start(cluster, *options))
    assert code == 0 and "of which 1 are finished" in said, said
    assert (folders[0] / "sweep.log").read_text() == before, "what is finished is left alone"
    assert "2 seeds, 2 episodes" in Path("runs-table.md").read_text()


def test_a_sweep_that_nobody_reads_writes_its_table(cluster):
    """Its output is ASCII, and a pipe that is closed."""
    reader, writer = os.pipe()
    os.close(reader)
    process = start(cluster, "--methods", "mummi", "--seeds", 1, "--steps", 200, stdout=writer, encoding="ascii")
    os.close(writer)
    assert process.wait(timeout=1200) == 0
    assert "1 seed, 1 episodes" in Path("runs-table.md").read_text() and Path("runs-curves.png").exists()


def test_a_node_that_does_not_see_the_runs_is_named(cluster):
    """It has another file system mounted there."""
    if subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount")
    runs = Path("runs").resolve()
    runs.mkdir()
    ray = shutil.which("ray", path=Path(sys.executable).parent)
    line = f"mount -t tmpfs none {runs} && exec {ray} start --address {cluster.address} --num-cpus 1 --block"
    other = subprocess.Popen(["unshare", "-m", "sh", "-c", line], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        expected = len(cluster.list_all_nodes()) + 1
        for _ in range(600):
            if len(cluster.global_state._live_node_ids()) == expected:
                break
            time.sleep(0.1)
        code, said = end(start(cluster, "--steps", 400))
        assert code == 2 and "is not seen here: give --runs a folder that all" in said, said
        assert list(runs.iterdir()) == []
    finally:
        other.terminate()
        other.wait()
