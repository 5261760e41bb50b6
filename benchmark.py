"""How long the parts take on this machine, as JSON on standard output.

    python benchmark.py                         # everything
    python benchmark.py update environments     # these sections only

Times are medians, in milliseconds, at the paper's sizes. On a CPU the time of a float32 matrix
product of 2048 x 2048 x 2048 stands beside them: machines differ, the ratio less so.
"""

import json
import platform
import resource
import sys
import tempfile
import time
from functools import partial

from train import Config, keep_freed_memory, make_agent, replay_fields  # isort: skip (before torch, whose threads it quiets)

import numpy as np
import torch
from gymnasium.spaces import Box, Dict, MultiBinary

from envs import TASKS, make_env
from replay import Replay

SPACE = Dict([  # that of the control suite
    ("rgb", Box(0, 255, (64, 64, 3), np.uint8)), ("depth", Box(0, 10, (64, 64, 1), np.float32)),
    ("touch", Box(0, 20, (2,), np.float32)), ("present", MultiBinary(3)),
])  # fmt: skip
ACTION_SIZE = 2
CUDA = torch.cuda.is_available()


def milliseconds(function, repeats, warm_up=1):
    """Median, min and max time of one call, in milliseconds."""
    times = []
    for _ in range(warm_up + repeats):
        start = time.perf_counter()
        function()
        if CUDA:
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    times = times[warm_up:]
    return {"median": round(float(np.median(times)), 3), "min": round(min(times), 3), "max": round(max(times), 3)}


def machine():
    """Names and versions, and the matrix product that times are compared with."""
    a, b = torch.rand(2048, 2048), torch.rand(2048, 2048)
    return {
        "processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if CUDA else None, "torch": torch.__version__,
        "matmul_2048": milliseconds(lambda: a @ b, repeats=20, warm_up=3),
    }  # fmt: skip


def random_batch(length, batch_size, device):
    """What `Agent.update` reads, three modalities, 37.5 % missing."""
    observation = {
        "rgb": torch.randint(0, 256, (length, batch_size, 64, 64, 3), dtype=torch.uint8),
        "depth": (10 * torch.rand(length, batch_size, 64, 64, 1)).half(),
        "touch": torch.rand(length, batch_size, 2),
    }
    batch = {
        "present": torch.rand(length, batch_size, 3) > 0.375,
        "action": torch.rand(length, batch_size, ACTION_SIZE) * 2 - 1, "reward": torch.rand(length, batch_size),
    }  # fmt: skip
    batch = {name: x.to(device) for name, x in batch.items()}
    return batch | {"observation": {name: x.to(device) for name, x in observation.items()}}


def update():
    """One whole update, model, actor and critic with their optimisers, of T x B steps."""
    results = {}
    product = machine()["matmul_2048"]["median"]
    for size in (16, 50):
        agent = make_agent(Config(batch_size=size, batch_length=size), SPACE, ACTION_SIZE)
        batch = random_batch(size, size, agent.device)
        times = milliseconds(partial(agent.update, batch), repeats=50 if CUDA else 5, warm_up=3)
        results[f"{size}x{size}"] = times
        times["matmuls"] = round(times["median"] / product, 1)
        times["peak_host_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)
        if CUDA:
            times["peak_device_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return results


def action():
    """One decision of a vector of environments: filter, plan with MPC, act."""
    results = {}
    agent = make_agent(Config(), SPACE, ACTION_SIZE)
    for num_envs in (1, 8, 16):
        batch = random_batch(1, num_envs, agent.device)
        observation = {name: x[0] for name, x in batch["observation"].items()}
        memory, first = agent.initial_memory(num_envs), torch.zeros(num_envs, dtype=torch.bool, device=agent.device)
        act = partial(agent.act, memory, observation, batch["present"][0], first, explore=True)
        results[num_envs] = milliseconds(act, repeats=20, warm_up=3)
    return results


def random_decision(env):
    env.step(env.action_space.sample())


def environments():
    """One decision of a random policy, also of a single simulator step, and one reset, of each task."""
    results = {}
    for task in TASKS:
        try:
            env = make_env(task)
        except ValueError as error:  # Table Wiping without robosuite
            results[task] = str(error)
            continue
        results[task] = {"reset": milliseconds(env.reset, repeats=10)}
        for name, repeat in (("decision", env.action_repeat), ("decision_without_repeat", 1)):
            env.world.action_repeat = repeat
            env.reset()
            env.action_space.seed(0)
            results[task][name] = milliseconds(partial(random_decision, env), min(400, env.episode_steps - 1))
        env.close()
    return results


def replay():
    """Drawing a batch of 50 x 50 from a small and from a full replay, the latter a sparse file."""
    results, rng, config = {}, np.random.default_rng(0), Config()
    for capacity in (10_000, 1_000_000):
        with tempfile.TemporaryDirectory() as folder:
            memory = Replay(folder, replay_fields(SPACE, ACTION_SIZE), capacity)
            memory.episodes = [(start, 500, 0) for start in range(0, capacity, 500)]
            draw = partial(memory.sample, config.batch_size, config.batch_length, rng)
            results[capacity] = milliseconds(draw, repeats=20, warm_up=3)
    return results


SECTIONS = {"update": update, "action": action, "environments": environments, "replay": replay}

if __name__ == "__main__":
    names = sys.argv[1:] or list(SECTIONS)
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        sys.exit(f"benchmark.py: {', '.join(unknown)} is unknown: choose among {', '.join(SECTIONS)}")
    if not CUDA:
        keep_freed_memory()
    report = {"machine": machine(), "unit": "milliseconds"}
    for name in names:
        print(f"{name} ...", file=sys.stderr)
        report[name] = SECTIONS[name]()
    print(json.dumps(report, indent=2))
