"""How long the parts take on this machine: medians with their least and greatest value, in milliseconds, as JSON.

    python -m tools.benchmark update action
    python -m tools.benchmark peers --dreamer-pytorch ../dreamer-pytorch --r2dreamer ../r2dreamer

    section        what is timed, at the paper's sizes unless it says otherwise             on two CPU cores
    update         one update of 16 x 16 and of 50 x 50 steps, fast and plain (--no-fast)              5 min
    action         one decision for 1, 8 and 16 environments                                            20 s
    stages         where the time of an update goes                                                    1 min
    growth         an update against sequences, sensors, horizon and sizes (small, paper)             10 min
    environments   a decision and a reset of every task; decisions a second of worker processes        2 min
    training       a minute of train.py: steps and updates a second, memory of all its processes       3 min
    kernels        the share of an update that a GPU is busy
    peers          an update of other code bases, see tools/peers.py, in turns with ours              40 min

On a CPU, compare machines by `matmul_2048`, the time of a float32 product of 2048 x 2048 x 2048.
"""

import itertools
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Literal, get_args
from unittest.mock import patch

import numpy as np
import torch
import tyro
from gymnasium.spaces import Box

import fast
import tools
from checkpoint import say
from config import Config
from envs import DEPTH, IMAGE, TASKS, make_env, make_vector_env
from evaluate import to_device
from methods import make_agent

ROOT = Path(__file__).parent.parent
CUDA = torch.cuda.is_available()
SMALL = dict(d_h=128, d_f=128, hidden=128, units=128, channels=8, batch_size=16, batch_length=25)  # preset small
Section = Literal["update", "action", "stages", "growth", "environments", "training", "kernels", "peers"]


@dataclass
class Options:
    """What to time."""

    sections: tyro.conf.Positional[tuple[Section, ...]] = ()  # of the table above; none shows the table
    dreamer_pytorch: str = ""  # for peers: a checkout of github.com/juliusfrost/dreamer-pytorch
    r2dreamer: str = ""  # for peers: a checkout of github.com/NM512/r2dreamer
    output: str = "runs/benchmark.json"  # written anew after each section


# ---- 1. Machine, clock, agents -------------------------------------------------------------------


def wait():
    """Wait until the GPU has finished its work."""
    if CUDA:
        torch.cuda.synchronize()


def milliseconds(function, repeats, warm_up=1):
    """Median, min and max time of one call, in milliseconds."""
    times = []
    for _ in range(warm_up + repeats):
        wait()
        start = time.perf_counter()
        function()
        wait()
        times.append(1e3 * (time.perf_counter() - start))
    return spread(times[warm_up:])


def spread(times):
    """Median, min and max of a list of numbers."""
    return {"median": round(float(np.median(times)), 3), "min": round(min(times), 3), "max": round(max(times), 3)}


@cache
def machine():
    """The day, names and versions, and the matrix product that times are compared with."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if platform.system() == "Linux" else ""
    models = [line.partition(": ")[2] for line in cpuinfo.splitlines() if line.startswith("model name")]
    a, b = torch.rand(2, 2048, 2048)
    return {
        "date": time.strftime("%Y-%m-%d"), "processor": models[0] if models else platform.machine(),
        "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if CUDA else None, "float32_product": fast.faster_exact_product(),
        "matmul_2048": milliseconds(lambda: a @ b, repeats=20, warm_up=3),
    }  # fmt: skip


def sensors(count=3):
    """Spaces like the control suite's: colour, depth, touch, and again."""
    kinds = itertools.cycle({"rgb": IMAGE, "depth": DEPTH, "touch": Box(0, 20, (2,), np.float32)}.items())
    return {f"{name}{i // 3 or ''}": box for i, (name, box) in zip(range(count), kinds)}


def make(modalities=3, **options):
    """An agent, the paper's but for the options, and a batch for it, 37.5 % missing."""
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    config, observation = Config(**options), {}
    agent, steps = make_agent(config, sensors(modalities), action_size=2), (config.batch_length, config.batch_size)
    for name, box in sensors(modalities).items():
        x = 10 * torch.rand(*steps, *box.shape)
        observation[name] = (25 * x).byte() if box == IMAGE else x.half() if box == DEPTH else x
    batch = {"observation": observation, "present": torch.rand(*steps, modalities) > 0.375,
             "action": torch.rand(*steps, 2) * 2 - 1, "reward": torch.rand(*steps)}  # fmt: skip
    return agent, to_device(batch, agent.device)


# ---- 2. The agent --------------------------------------------------------------------------------


def update():
    """One whole update: model, actor and critic with their optimisers; plain first, as fast.py changes the process."""
    results: dict = {}
    ways = [("float32", "plain"), ("float32", "fast"), ("bfloat16", "fast")]
    for (precision, way), size in itertools.product(ways, (16, 50)):
        start = time.perf_counter()
        agent, batch = make(batch_size=size, batch_length=size, precision=precision, fast=way == "fast")
        milliseconds(partial(agent.update, batch), repeats=4)  # on a GPU, compiles and captures
        results[f"{size}x{size} {precision} {way}"] = {
            "seconds_to_the_fifth_update": round(time.perf_counter() - start, 1),
            **milliseconds(partial(agent.update, batch), repeats=50 if CUDA else 5),
            "peak_device_gb": round(torch.cuda.max_memory_reserved() / 1e9, 2) if CUDA else 0,
        }
        del agent, batch  # their memory is not the next one's
    return results


def action():
    """One decision of a vector of environments: filter, plan with MPC, act."""
    results = {}
    for num_envs in (1, 8, 16):
        agent, batch = make(batch_length=1, batch_size=num_envs)
        observation = {name: x[0] for name, x in batch["observation"].items()}
        memory, first = agent.initial_memory(num_envs), torch.zeros(num_envs, dtype=torch.bool, device=agent.device)
        act = partial(agent.act, memory, observation, batch["present"][0], first, explore=True)
        results[num_envs] = milliseconds(act, repeats=50, warm_up=5)
    return results


def stages():
    """Where the time of one update goes; on a GPU of a plain one, as a CUDA graph has no stages."""
    agent, batch = make(fast=not CUDA)
    agent.update(batch)
    model, times, repeats = agent.model, defaultdict(float), 20 if CUDA else 3

    def timed(function, stage, *arguments, **options):
        wait()
        start = time.perf_counter()
        result = function(*arguments, **options)
        wait()
        times[stage] += 1e3 * (time.perf_counter() - start) / repeats
        return result

    with ExitStack() as stack:
        for owner, name, stage in [
            (model, "encode", "encoders"), (model, "fuse", "experts and fusion"), (model, "observe", "recurrence"),
            (agent, "objective", "loss"), (agent, "imagine", "imagination"), (agent, "returns", "returns"),
            (torch.autograd, "backward", "backward"), (agent, "update", "update"),
            *((optimiser, "step", "optimisers") for optimiser in agent.optimisers.values()),
        ]:  # fmt: skip
            stack.enter_context(patch.object(owner, name, partial(timed, getattr(owner, name), stage)))
        for _ in range(repeats):
            agent.update(batch)
    times["recurrence"] -= times["encoders"] + times["experts and fusion"]  # which are within `observe`
    times["the rest"] = 2 * times["update"] - sum(times.values())
    return {stage: round(x, 3) for stage, x in times.items()}


def growth():
    """Update time against one size after the other; sequences of 50 steps, on a CPU 16."""
    length = 50 if CUDA else 16
    base = {"batch_length": length, "batch_size": length, "modalities": 3, "horizon": 15}
    grown = {"batch_size": (16, 50, 100, 200), "modalities": range(1, 7), "horizon": (5, 15, 30)}
    settings = {f"{name} {value}": base | {name: value} for name, values in grown.items() for value in values}
    results = dict(base)
    for name, options in {**settings, "sizes small": SMALL, "sizes paper": {}}.items():  # sizes: with their batches
        agent, batch = make(**options)
        results[name] = milliseconds(partial(agent.update, batch), repeats=20 if CUDA else 3, warm_up=4)
        del agent, batch
    return results


def kernels():
    """Time that a GPU spends in kernels during one update, and its share of the update: the rest it waits."""
    if not CUDA:
        return None
    agent, batch = make()
    whole = milliseconds(partial(agent.update, batch), repeats=50, warm_up=5)["median"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        milliseconds(partial(agent.update, batch), repeats=4)
    busy = sum(event.self_device_time_total for event in profile.key_averages()) / 1e3 / 5
    return {"milliseconds": round(busy, 3), "share_of_the_update": round(busy / whole, 3)}


# ---- 3. Other processes --------------------------------------------------------------------------


def random_decision(env):
    """One step of an environment, or of a vector of them, with a random action; or a reset where an episode ended."""
    env.step(env.action_space.sample()) if getattr(env, "under_way", True) else env.reset()


def environments():
    """One reset and one decision with every sensor present; decisions a second of worker processes, 37.5 % missing."""
    results: dict = {}
    for task in TASKS:
        try:
            env = make_env(task, missing_rate=0.0)
        except ValueError as error:  # Table Wiping without robosuite
            results[task] = str(error)
            continue
        results[task] = {"reset": milliseconds(env.reset, repeats=10)}
        results[task]["decision"] = milliseconds(partial(random_decision, env), min(400, env.episode_steps - 1))
        env.close()
    for workers in (1, 2, 4, 8, 16):
        envs = make_vector_env("finger_spin", workers)
        envs.reset(seed=0)
        times = milliseconds(partial(random_decision, envs), repeats=200, warm_up=20)
        envs.close()
        results[f"finger_spin decisions a second, {workers} workers"] = round(1e3 * workers / times["median"])
    return results


def training(seconds=60):
    """Environment steps and updates a second of train.py on finger_spin, and the memory of all its processes.

    Raises ValueError where train.py fails.
    """
    options = "--task finger_spin --preset paper --name x --log-every 1 --first-updates 6 --capacity 100000"
    seen: list = []  # (moment, line) of every update past the first, in which things are compiled
    peak = 0.0
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "train.py"), *options.split()]
        process = subprocess.Popen(command, cwd=folder, stdout=sys.stderr, start_new_session=True)
        metrics = Path(folder) / "runs" / "x" / "metrics.jsonl"
        try:
            while process.poll() is None and (not seen or time.perf_counter() < seen[0][0] + seconds):
                time.sleep(0.1)
                lines = metrics.read_text().splitlines()[:-1] if metrics.exists() else []  # the last may be half
                lines = [line for line in map(json.loads, lines) if "model_loss" in line][8:]
                seen += [(time.perf_counter(), line) for line in lines[len(seen) :]]
                peak = max(peak, session_memory(process.pid))
        finally:
            process.terminate()
        if process.wait() != 128 + signal.SIGTERM:
            raise ValueError(f"train.py ended with code {process.returncode}; it says why above")
    (begin, first), (end, last) = seen[0], seen[-1]
    rate = lambda name: round((last[name] - first[name]) / (end - begin), 3)  # noqa: E731
    return {"steps_a_second": rate("steps"), "updates_a_second": rate("updates"), "peak_host_gb": peak}


def session_memory(leader):
    """GB of all processes of a session; pages that several share are counted once."""
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError):  # it has ended
            if os.getsid(int(process.name)) == leader:
                total += int((process / "smaps_rollup").read_text().partition("Pss:")[2].split()[0])
    return round(total / 1e6, 2)


def peers(dreamer_pytorch, r2dreamer, settings=((2, 16), (2, 50), (1, 16), (1, 50))):
    """An update of each code base in turns: five each, after one to warm up. settings: threads, T = B"""
    paths = {"mummi float32": ROOT, "mummi bfloat16": ROOT, "dreamer-pytorch": dreamer_pytorch, "r2dreamer": r2dreamer}
    paths = {name: str(path) for name, path in paths.items() if path}
    commits = {name: subprocess.getoutput(f"git -C '{path}' log -1 --format=%H") for name, path in paths.items()}
    results: dict = {"commits": {name: x if len(x) == 40 else "not a git checkout" for name, x in commits.items()}}
    for threads, size in settings:
        with ExitStack() as stack:
            processes, times = {}, {name: [] for name in paths}
            for name, path in paths.items():
                command = [sys.executable, ROOT / "tools" / "peers.py", *name.split(), path, size, threads]
                pipes: dict = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
                processes[name] = stack.enter_context(subprocess.Popen([*map(str, command)], **pipes))
            for turn, (name, process) in itertools.product(range(6), processes.items()):
                if turn:  # the first update comes unasked
                    print(file=process.stdin, flush=True)
                answer = process.stdout.readline().split()
                if not answer:
                    raise ValueError(f"{name} has failed; it says why above, and tools/peers.py what it needs")
                times[name].append([float(x) for x in answer])
        for name, answers in times.items():
            took, peak = zip(*answers)
            results[f"{size}x{size} {threads} threads {name}"] = spread(took[1:]) | {"peak_host_gb": peak[-1]}
    return results


def main(options):
    """Time the sections, and write all results after each. Raises ValueError on bad input."""
    if not options.sections:
        return say(f"{__doc__}\nNothing was timed: name a section, as in python -m tools.benchmark update action")
    checkouts = {"--dreamer-pytorch": options.dreamer_pytorch, "--r2dreamer": options.r2dreamer}
    for name, path in checkouts.items():
        if path and not ("peers" in options.sections and Path(path).is_dir()):
            raise ValueError(f"{name} {path}: give a folder with a checkout, and the section peers")
    (output,) = tools.output_files(options.output, ".json")
    report = {"machine": machine(), "unit": "milliseconds"}
    for name in (name for name in get_args(Section) if name in options.sections):  # update first, profiles last
        say(f"{name} ...")
        report[name] = globals()[name](*(checkouts.values() if name == "peers" else ()))
        output.write_text(json.dumps(report, indent=2) + "\n")
    say(json.dumps(report, indent=2))
    return say(f"{output}: {', '.join(options.sections)}; compare with results/benchmark and docs/speed.md")


if __name__ == "__main__":
    fast.restart_with_quiet_threads()
    tools.run("benchmark", main, __doc__, Options)
