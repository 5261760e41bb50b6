"""A run is stopped, killed, starved or fed with damaged files: nothing is lost, and one line says what happened."""

import gc
import json
import math
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path

import killer
import numpy as np
import pytest
import torch
from conftest import random_batch, tiny_agent
from test_train import flat, lines

import envs
import checkpoint as runs
import train
from agent import Agent
from config import load_config
from pictures import write_video
from replay import Replay

ROOT = Path(__file__).parent.parent
TINY = ("--device cpu --num-envs 1 --eval-episodes 1 --first-updates 3 --log-every 2 --batch-size 3 --batch-length 6 "
        "--horizon 2 --mpc-iterations 0 --channels 1 --units 8 --hidden 8 --d-h 8 --d-c 4 --d-f 8").split()  # fmt: skip
TOY = [*TINY, *"--task toy --prefill 100 --updates-per-1000 30 --eval-every 100 --capacity 300".split()]
FINGER = [*TINY, *"--task finger_spin --prefill 100 --updates-per-1000 30 --eval-every 200 --capacity 220".split()]


def run(*options):
    train.main(train.parse([*map(str, options)]))


def assert_equal_runs(first, second):
    """Parameters, optimisers, generators, metrics lines and what the replay holds, bit for bit."""
    a, b = (runs.load_checkpoint(folder) for folder in (first, second))
    for state in (a, b):
        state["config"].update(name="", steps=0)
    episodes = a["replay"]["episodes"]
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    assert [path for path in a if not np.array_equal(a[path], b[path])] == []
    assert lines(first) == lines(second)
    for path in (first / "replay").glob("*.npy"):
        x, y = (np.load(folder / "replay" / path.name, mmap_mode="r") for folder in (first, second))
        for start, rows, _ in episodes:
            assert np.array_equal(x[start : start + rows], y[start : start + rows]), path.name


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A working directory with a finished run of 500 steps, runs/whole."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("reliability"))
        killer.without_pictures(patch.setattr)
        run(*TOY, "--steps", 500, "--name", "whole")
        yield Path.cwd()


@pytest.fixture
def copy(home, request):
    """A copy of runs/whole of its own."""
    folder = Path("runs") / f"copy-{request.node.name.replace('[', '-').rstrip(']')}"
    shutil.copytree("runs/whole", folder)
    yield folder
    shutil.rmtree(folder)


def failure(action, capsys, program="train.py"):
    """The exit code and the one line with which the program ends where `action` raises."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        try:
            action()
        except (Exception, KeyboardInterrupt) as error:
            runs.fail(program, error)
    said = capsys.readouterr().err
    assert "Traceback" not in said
    lines = [line[line.index(f"{program}: ") :] for line in said.splitlines() if f"{program}: " in line]
    assert len(lines) == 1  # a bar of another run may stand around it
    return exit.value.code, lines[0]


# ---- 1. Resuming ----


def test_finger_spin_resumed_equals_uninterrupted(home):
    """Simulator, camera, procedural background and missing data go on bit for bit.

    Episodes of 100 decisions; in a process without MuJoCo, which forks its workers, so that theirs are as short.
    """
    whole, half = [*FINGER, "--steps", "400", "--name", "finger"], [*FINGER, "--steps", "200", "--name", "finger-halves"]
    rest = ["--resume", "runs/finger-halves", "--steps", "400"]
    program = f"""
import envs, killer, train
envs.ControlSuite.episode_steps = 100
killer.without_pictures()
for options in {[whole, half, rest]}:
    train.main(train.parse(options))
"""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
    assert runs.load_checkpoint("runs/finger")["updates"] > 3
    assert_equal_runs(Path("runs/finger"), Path("runs/finger-halves"))


def test_resumed_within_the_interval_of_a_log_line(home):
    """The updates since the last line are part of the next one's means: 300 steps make an odd number of updates."""
    run(*TOY, "--steps", 300, "--name", "halves")
    assert runs.load_checkpoint("runs/halves")["log"]["pending"]
    run("--resume", "runs/halves", "--steps", 500)
    assert_equal_runs(Path("runs/whole"), Path("runs/halves"))


def test_equal_seeds_give_equal_runs(home):
    run(*TOY, "--steps", 500, "--name", "again", "--deterministic")
    a, b = (flat(runs.load_checkpoint(Path("runs") / name)["agent"]) for name in ("whole", "again"))
    assert [path for path in a if not np.array_equal(a[path], b[path])] == []
    assert lines(Path("runs/whole")) == lines(Path("runs/again"))
    torch.use_deterministic_algorithms(False)


def test_killed_25_times_at_any_moment_equals_uninterrupted(home):
    """SIGKILL at random moments, half of the time with slowed writes, so also into a checkpoint or the replay."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def killer(kills, name):
        options = [*TOY, "--steps", "800", "--name", name]
        command = [sys.executable, ROOT / "tests" / "killer.py", "1", str(kills), *options]
        return json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout)

    assert killer(0, "unharmed")["status"] == 0
    report = killer(25, "killed")
    assert report["status"] == 0
    assert sum(kill["killed"] for kill in report["kills"]) >= 20
    reached = [kill["progress"] for kill in report["kills"]]
    assert reached == sorted(reached), "a checkpoint was lost"
    assert_equal_runs(Path("runs/unharmed"), Path("runs/killed"))


def test_a_run_without_a_checkpoint_starts_over(home):
    shutil.copytree("runs/whole", "runs/early")
    for path in Path("runs/early").glob("checkpoint*"):
        path.unlink()
    run("--resume", "runs/early")
    assert_equal_runs(Path("runs/whole"), Path("runs/early"))


def test_tensorboard_forgets_what_came_after_the_checkpoint(copy):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shutil.copy(copy / "checkpoint.previous.pt", copy / "checkpoint.pt")
    run("--resume", copy)
    events = EventAccumulator(str(copy)).Reload()
    assert [event.step for event in events.Scalars("return/eval_return")] == [100, 200, 300, 400, 500]


def test_the_ring_keeps_what_a_checkpoint_may_go_back_to(tmp_path):
    fields = {"x": ((), "int64")}
    replay = Replay(tmp_path, fields, capacity=100, spare=60)
    for number in range(20):
        replay.add({"x": np.full(10, number)})
    assert len(replay) == 100
    state = replay.state_dict()
    for number in range(20, 26):
        replay.add({"x": np.full(10, number)})
    replay = Replay(tmp_path, fields, capacity=100, spare=999)
    assert replay.load_state_dict(state) == 0 and len(replay) == 100
    assert set(replay.sample(500, 1, np.random.default_rng(0))["x"].ravel()) == set(range(10, 20))
    for number in range(20, 27):
        replay.add({"x": np.full(10, number)})
    assert replay.load_state_dict(state) == 1 and len(replay) == 90


# ---- 2. Signals ----


def listen():
    """Heed signals as a shell's foreground process does: children of `nohup` or of a script's `&` ignore them."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def children(pid):
    with suppress(FileNotFoundError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def alive(pid):
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_to_the_process_group_leaves_a_checkpoint_and_no_process(home, number, code):
    """As a scheduler or a terminal sends it: workers get it, too."""
    name, log = f"signal-{number}", Path(f"signal-{number}.log")
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, ROOT / "train.py", *TOY, "--eval-every", "1000", "--steps", "1000000", "--name", name],
            start_new_session=True, stderr=file, stdout=file, env=os.environ | {"OMP_NUM_THREADS": "1"}, preexec_fn=listen,
        )  # fmt: skip
        folder, patience = Path("runs") / name, time.monotonic() + 100
        while not (folder / "metrics.jsonl").exists() or len(lines(folder)) < 5:
            assert process.poll() is None and time.monotonic() < patience, log.read_text()
            time.sleep(0.05)
        workers = children(process.pid)
        os.killpg(process.pid, number)
        assert process.wait(timeout=60) == code
        started = time.monotonic()
        while any(alive(pid) for pid in workers):
            assert time.monotonic() < started + 5
            time.sleep(0.02)
    assert len(workers) == 2
    said = log.read_text()
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith(f"train.py: stopped by {signal.Signals(number).name}")
    assert not [entry for entry in os.listdir("/dev/shm") if str(process.pid) in entry]
    state = runs.load_checkpoint(folder)
    assert state["updates"] >= max(line.get("updates", 0) for line in lines(folder)) > 0
    steps = (state["steps"] // 100 + 1) * 100
    run("--resume", folder, "--steps", steps)
    assert runs.load_checkpoint(folder)["steps"] // 100 == steps // 100  # the stop cut an episode short


def start(command, folder, number=5):
    """A shell's command line in a session of its own, once the run in `folder` has written some lines."""
    program = f"{sys.executable} {ROOT}/train.py {' '.join(TOY)} --name {folder.name}"
    process = subprocess.Popen(["bash", "-c", command.format(train=program)], start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env=os.environ | {"OMP_NUM_THREADS": "1"}, preexec_fn=listen)  # fmt: skip
    patience = time.monotonic() + 100
    while not (folder / "metrics.jsonl").exists() or len(lines(folder)) < number:
        assert process.poll() is None and time.monotonic() < patience
        time.sleep(0.05)
    return process


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("command, number", [
    ("{train} --steps 1000000 2>&1 | tee log", signal.SIGINT), ("{train} --steps 1000000 2>&1 | head -n 1", signal.SIGTERM),
    ("{train} --steps 1000000 2>&-", signal.SIGTERM), ("{train} --steps 1000000 >&- 2>&-", signal.SIGHUP),
], ids=["tee dies of the same Ctrl-C", "the reader is gone", "no stderr", "no output at all"])  # fmt: skip
def test_a_message_that_nobody_reads_costs_no_work(home, command, number):
    """The evaluations before the signal print, too: a run that cannot print goes on past them."""
    folder = Path("runs") / f"unread-{abs(hash(command))}"
    process = start(command, folder)
    while not (folder / "checkpoint.pt").exists():  # the first evaluation
        assert process.poll() is None
        time.sleep(0.05)
    evaluated = runs.load_checkpoint(folder)["updates"]
    while max(line.get("updates", 0) for line in lines(folder)) <= evaluated:
        time.sleep(0.05)
    os.killpg(process.pid, number)
    process.wait(timeout=60)
    patience = time.monotonic() + 60
    while children_of_group(process.pid):
        assert time.monotonic() < patience
        time.sleep(0.05)
    assert runs.load_checkpoint(folder)["updates"] > evaluated  # that of the signal


def children_of_group(group):
    """Processes of a session that still run."""
    stats = [path.read_text().rsplit(")", 1)[1].split() for path in Path("/proc").glob("[0-9]*/stat") if path.exists()]
    return [fields for fields in stats if int(fields[2]) == group and fields[0] != "Z"]


@pytest.mark.parametrize("options", ["PYTHONIOENCODING=ascii {train} --steps 100 >log", "{train} --steps 100 | true"])
def test_an_output_that_cannot_be_written_ends_no_run(home, options):
    folder = Path("runs") / f"finished-{abs(hash(options))}"
    process = start("set -o pipefail; " + options, folder, number=1)
    assert process.wait(timeout=100) == 0
    assert runs.load_checkpoint(folder)["evaluated"] == 100


def test_an_output_that_cannot_be_written_ends_no_evaluation(copy):
    command = f"set -o pipefail; {sys.executable} {ROOT}/evaluate.py {copy} --episodes 1 --rates None 2>&1 | true"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    assert subprocess.run(["bash", "-c", command], env=environment, timeout=100, check=False).returncode == 0
    assert json.loads((copy / "evaluation.json").read_text())["records"]


def stop_at(monkeypatch, owner, method, call, number=signal.SIGTERM):
    """Sends this process a signal in the midst of the n-th call of a method."""
    original, calls = getattr(owner, method), []

    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, method, wrapped)


def test_stopped_in_an_update_nothing_learned_or_seen_is_lost(home, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(runs.Stopped):
        stop_at(patch, Agent, "update", 5)
        run(*TOY, "--steps", 500, "--name", "stopped")
    state = runs.load_checkpoint("runs/stopped")
    assert state["updates"] == 5 and state["steps"] % 100 > 0
    rows = sum(rows for _, rows, _ in state["replay"]["episodes"])
    assert rows == state["steps"] + 2  # an episode of 101 rows, and the one under way
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    run("--resume", "runs/stopped")
    numbers = [line["updates"] for line in lines(Path("runs/stopped")) if "kl" in line]
    assert numbers == list(range(2, numbers[-1] + 1, 2)), "a line is missing or doubled"
    evaluations = [line["steps"] for line in lines(Path("runs/stopped")) if "eval_return" in line]
    assert [steps // 100 for steps in evaluations] == [1, 2, 3, 4, 5]


def test_stopped_in_an_evaluation_it_is_made_up_for(home, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(runs.Stopped):
        stop_at(patch, train, "run_episodes", 3, signal.SIGINT)
        run(*TOY, "--steps", 500, "--name", "unevaluated")
    state = runs.load_checkpoint("runs/unevaluated")
    assert (state["steps"], state["evaluated"]) == (300, 200)
    run("--resume", "runs/unevaluated")
    evaluations = [line["steps"] for line in lines(Path("runs/unevaluated")) if "eval_return" in line]
    assert evaluations == [100, 200, 300, 400, 500]


# ---- 3. Faults ----


@pytest.mark.parametrize("worker", [min, max], ids=["of training", "of evaluation"])
@pytest.mark.parametrize("harm, said", [(signal.SIGKILL, "has died"), (signal.SIGSTOP, "has not answered for 5 s")])
def test_a_worker_killed_or_hung_ends_the_run_with_a_checkpoint(home, monkeypatch, capsys, worker, harm, said):
    monkeypatch.setattr(envs.Workers, "TIMEOUT", 5)
    original, calls = Agent.update, []

    def update(*args, **_):
        calls.append(1)
        if len(calls) == 5:
            os.kill(worker(child.pid for child in multiprocessing.active_children()), harm)
        return original(*args)

    name = f"harmed-{int(harm)}-{worker.__name__}"
    with monkeypatch.context() as patch:
        patch.setattr(Agent, "update", update)
        code, line = failure(lambda: run(*TOY, "--steps", 500, "--name", name), capsys)
    assert code == 1 and said in line
    updates = runs.load_checkpoint(f"runs/{name}")["updates"]
    assert updates == 5 if worker is min else updates > 5
    assert multiprocessing.active_children() == []
    run("--resume", f"runs/{name}", "--steps", 200)


@pytest.mark.parametrize("what", ["checkpoint", "replay", "video"])
def test_a_full_disk_ends_the_run_with_one_line(copy, monkeypatch, capsys, request, what):
    """/dev/full takes the place of a file: it refuses every byte as a full disk does."""
    before = (copy / "checkpoint.pt").read_bytes()
    if what == "checkpoint":
        os.symlink("/dev/full", copy / "checkpoint.new.pt.tmp")
    elif what == "video":
        monkeypatch.setattr(train, "write_video", write_video)
        os.symlink("/dev/full", copy / "video-00000600.mp4.tmp")
    else:
        original, full = Replay.add, open("/dev/full", "r+b", buffering=0)
        request.addfinalizer(full.close)

        def add(self, episode):
            self.columns["camera"].file = full
            original(self, episode)

        monkeypatch.setattr(Replay, "add", add)
    code, line = failure(lambda: run("--resume", copy, "--steps", 600), capsys)
    assert code == 1 and "No space left on device" in line and "--resume" in line
    assert (copy / "checkpoint.pt").read_bytes() == before
    monkeypatch.undo()
    monkeypatch.chdir(copy.parent.parent)
    for path in copy.glob("*.tmp"):
        path.unlink()
    run("--resume", copy, "--steps", 600)


def test_a_metrics_line_is_written_whole_or_not_at_all(copy):
    before = (copy / "metrics.jsonl").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with closing(runs.Log(copy, 0)) as log:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))
        try:
            with pytest.raises(OSError, match="too large"):
                log.write(1, {"train_return": 1.0})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (copy / "metrics.jsonl").read_bytes() == before


def test_a_run_on_a_small_disk(home, tmp_path, capfd):
    """A real one: a tmpfs of two megabytes fills up, is made larger, and the run goes on."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", tmp_path], capture_output=True).returncode:
        pytest.skip("mounting is not allowed")
    try:
        command = [sys.executable, ROOT / "train.py"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        options = [*TOY, "--steps", "300", "--name", "small", "--capacity", "1000"]
        process = subprocess.run([*command, *options], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert process.returncode == 1, process.stderr
        assert "Traceback" not in process.stderr
        assert "No space left on device" in process.stderr.splitlines()[-1]
        json.loads((tmp_path / "runs/small/metrics.jsonl").read_text().splitlines()[-1])
        state = runs.load_checkpoint(tmp_path / "runs/small")
        assert state["steps"] > 0
        subprocess.run(["mount", "-o", "remount,size=20m", tmp_path], check=True)
        process = subprocess.run(
            [*command, "--resume", "runs/small"], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert process.returncode == 0, process.stderr
        assert runs.load_checkpoint(tmp_path / "runs/small")["steps"] == 300
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_weights_alone_are_no_run_to_go_on_with(copy, capsys):
    runs.save_weights(copy, copy / "checkpoint.pt")
    code, line = failure(lambda: run("--resume", copy, "--steps", 600), capsys)
    assert code == 2 and "holds weights alone" in line


def test_a_damaged_checkpoint_gives_way_to_the_one_before(copy, capsys):
    data = bytearray((copy / "checkpoint.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "checkpoint.pt").write_bytes(data)
    run("--resume", copy)
    assert "checkpoint.pt is damaged" in capsys.readouterr().err
    assert_equal_runs(Path("runs/whole"), copy)
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        (copy / name).write_bytes((copy / name).read_bytes()[:-100])
    code, line = failure(lambda: run("--resume", copy, "--steps", 600), capsys)
    assert code == 2 and "checkpoint.pt is damaged" in line and "put back a copy" in line


def test_no_flipped_bit_of_a_checkpoint_goes_unnoticed(home, tmp_path):
    whole = Path("runs/whole/checkpoint.pt").read_bytes()
    expected, path = flat(runs.read_checkpoint(Path("runs/whole/checkpoint.pt"))), tmp_path / "checkpoint.pt"
    draw, noticed = random.Random(0), 0
    for _ in range(300):
        data = bytearray(whole)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        try:
            state = flat(runs.read_checkpoint(path))
        except ValueError:
            noticed += 1
            continue
        assert state.keys() == expected.keys()
        assert all(np.array_equal(state[key], expected[key]) for key in state)  # a bit between the records
    assert noticed > 50


class Payload:
    """What unpickling this would create must never appear."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["zip", "pickle"])
def test_a_checkpoint_from_a_stranger_runs_no_code(copy, tmp_path, capsys, kind):
    state = runs.load_checkpoint(copy) | {"rng": Payload(tmp_path / "executed")}
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        torch.save(state, copy / name) if kind == "zip" else (copy / name).write_bytes(pickle.dumps(state))
    code, line = failure(lambda: run("--resume", copy), capsys)
    assert code == 2 and "is damaged" in line
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("harm", ["truncated", "missing", "garbage", "endless"])
def test_a_damaged_replay_is_refused(copy, capsys, harm):
    path, before = copy / "replay" / "camera.npy", (copy / "checkpoint.pt").read_bytes()
    if harm == "truncated":
        os.truncate(path, 100_000)
    elif harm == "missing":
        path.unlink()
    elif harm == "endless":
        with path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (10**30, 64, 64, 3)})
    else:
        path.write_bytes(b"no array" * 100)
    code, line = failure(lambda: run("--resume", copy, "--steps", 600), capsys)
    assert code == 2 and "camera.npy is" in line
    assert (copy / "checkpoint.pt").read_bytes() == before


def test_a_loss_that_is_not_finite_stops_the_run(home, capsys):
    options = ["--name", "diverged", "--steps", 500, "--prefill", 200, "--model-lr", "1e30"]  # a checkpoint comes first
    code, line = failure(lambda: run(*TOY, *options), capsys)
    assert code == 1 and "not finite" in line and "actor_loss" in line
    batch = torch.load("runs/diverged/batch.pt", weights_only=True)
    assert batch["reward"].shape == (6, 3)
    assert math.isfinite(sum(x.sum() for x in runs.load_checkpoint("runs/diverged")["agent"]["model"].values()))


def test_a_run_in_use_is_refused(copy, capsys):
    with closing(runs.Log(copy, 0)):
        code, line = failure(lambda: run("--resume", copy, "--steps", 600), capsys)
    assert code == 2 and "in use by another process" in line
    run("--resume", copy, "--steps", 600)


def test_out_of_memory_says_what_to_lower(capsys):
    for allocate in (lambda: torch.empty(2**55, dtype=torch.uint8), lambda: np.empty(2**55, np.uint8)):
        code, line = failure(allocate, capsys)
        assert code == 1 and "smaller batch" in line


def test_a_lost_gpu_is_said_in_one_line():
    line, code = runs.explain(torch.AcceleratorError("CUDA error: unspecified launch failure\nCUDA kernel errors ..."))
    assert code == 1 and "the GPU failed" in line and "untouched" in line and "\n" not in line


@pytest.mark.parametrize("ending, code", [("raise ValueError", 1), ("sys.exit(3)", 3), ("pass", 0)])
def test_a_program_that_does_not_close_its_workers_ends_all_the_same(ending, code):
    program = f"import sys, envs\nworkers = envs.make_vector_env('toy', 2)\nworkers.reset()\n{ending}"
    process = subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=200, capture_output=True)
    assert process.returncode == code


def test_workers_that_cannot_start_leave_nothing_to_close():
    program = "import envs\nenvs.make_vector_env('finger_spin', 2, backgrounds='nowhere')"
    process = subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=200, capture_output=True, text=True)
    assert process.returncode == 1 and process.stderr.splitlines()[-1].startswith("ValueError: backgrounds nowhere")


def test_updates_keep_nothing_alive():
    """No tensor of an update outlives it: memory does not grow."""
    agent = tiny_agent()
    counts = []
    for _ in range(4):
        agent.update(random_batch())
        gc.collect()
        counts.append(sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects()))
    assert len(set(counts[1:])) == 1


def test_a_bug_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="shape"):
        try:
            torch.zeros(2, 3) @ torch.zeros(2, 3)
        except RuntimeError as error:
            runs.fail("train.py", error)


# ---- 4. Configurations ----


def test_the_configuration_is_strict_json(home):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    text = Path("runs/whole/config.json").read_text()
    assert json.loads(text, parse_constant=refuse)["absent_logit"] == "-inf"
    assert load_config("runs/whole").absent_logit == -math.inf
    for line in Path("runs/whole/metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


@pytest.mark.parametrize("text, said", [
    ('{"task": "toy", "speed": 3}', "has 'speed', which this version does not know"),
    ('{"d_h": "many"}', "has d_h 'many', which is no int"),
    ('{"sample_s_f": 1}', "which is no bool"),
    ('{"precision": "half"}', "has precision 'half', which is unknown: it is one of ['auto', "),
    ('{"expert_power": 3}', "has expert_power 3, which is unknown: it is one of [1, 2]"),
    ('{"discount": 1' + 400 * "0" + "}", "--discount inf is not allowed: give 0 to 1"),
    ("[1]", "holds no configuration"),
    ('{"task":', "is damaged"),
])  # fmt: skip
def test_a_foreign_configuration_is_refused(tmp_path, monkeypatch, capsys, text, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(text)
    code, line = failure(lambda: train.parse(["--resume", "."]), capsys)
    assert code == 2 and said in line
