"""How long the parts take on this machine, as JSON on standard output.

    python benchmark.py                         # everything, some minutes on a GPU, an hour on a CPU
    python benchmark.py update environments     # these sections only

Times are medians with their least and greatest value, in milliseconds, at the paper's sizes. On a
CPU the time of a float32 matrix product of 2048 x 2048 x 2048 stands beside them: machines differ,
the ratio less so.
"""

import inspect
import itertools
import json
import os
import platform
import resource
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack, redirect_stdout
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import train  # isort: skip (before torch, whose threads it quiets)

import numpy as np
import torch
from gymnasium.spaces import Box, Dict, MultiBinary
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map

import agent as behaviour
import mssm
from config import Config
from envs import TASKS, make_env, make_vector_env
from pictures import gif, of_evaluation, write_video
from replay import Replay
from runs import Log, Progress, save_checkpoint

ACTION_SIZE = 2
CUDA = torch.cuda.is_available()
SENSORS = {"rgb": Box(0, 255, (64, 64, 3), np.uint8), "depth": Box(0, 10, (64, 64, 1), np.float32),
           "touch": Box(0, 20, (2,), np.float32)}  # fmt: skip


def space(modalities=3):
    """Observations like the control suite's: colour, depth, touch, and again."""
    kinds = zip(range(modalities), itertools.cycle(SENSORS.items()))
    sensors = {f"{name}{i // 3 or ''}": box for i, (name, box) in kinds}
    return Dict([*sensors.items(), ("present", MultiBinary(modalities))])


def wait():
    """Until the GPU has done what it was asked."""
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


def processor():
    """What the processor calls itself."""
    if platform.system() == "Linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(": ")[2]
    return platform.processor() or platform.machine()


@cache
def machine():
    """The day, names and versions, and the matrix product that times are compared with."""
    a, b = torch.rand(2048, 2048), torch.rand(2048, 2048)
    return {
        "date": time.strftime("%Y-%m-%d"), "processor": processor(), "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "gpu": torch.cuda.get_device_name() if CUDA else None,
        "torch": torch.__version__, "matmul_2048": milliseconds(lambda: a @ b, repeats=20, warm_up=3),
    }  # fmt: skip


def random_batch(length, batch_size, device, modalities=3):
    """What `Agent.update` reads, 37.5 % missing."""
    make: dict = {
        "rgb": lambda shape: torch.randint(0, 256, shape, dtype=torch.uint8),
        "depth": lambda shape: (10 * torch.rand(shape)).half(),
        "touch": torch.rand,
    }
    boxes = {name: box for name, box in space(modalities).items() if name != "present"}
    observation = {
        name: make[name.rstrip("0123456789")]((length, batch_size, *box.shape)) for name, box in boxes.items()
    }  # fmt: skip
    batch = {
        "observation": observation, "present": torch.rand(length, batch_size, modalities) > 0.375,
        "action": torch.rand(length, batch_size, ACTION_SIZE) * 2 - 1, "reward": torch.rand(length, batch_size),
    }  # fmt: skip
    return train.to_device(batch, device)


def make(modalities=3, **options):
    """An agent, the paper's but for the options, and a batch for it; the peak of device memory is that from here on."""
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    config = Config(**options)
    agent = train.make_agent(config, space(modalities), ACTION_SIZE)
    return agent, random_batch(config.batch_length, config.batch_size, agent.device, modalities)


# ---- The agent ----


def update():
    """One whole update, model, actor and critic with their optimisers, of T x B steps."""
    results = {"seconds_to_the_fifth_update": {}}
    product = machine()["matmul_2048"]["median"]
    for size, precision in itertools.product((16, 50), ("float32", "bfloat16")):
        for way in ("recorded", "compiled", "eager") if CUDA else ("eager",):  # the first is the one that compiles
            torch.compiler.set_stance("force_eager" if way == "eager" else "default")
            start = time.perf_counter()
            agent, batch = make(batch_size=size, batch_length=size, precision=precision, cuda_graphs=way == "recorded")
            for _ in range(5):
                agent.update(batch)
            wait()
            name = f"{size}x{size} {precision} {way}"
            results["seconds_to_the_fifth_update"][name] = round(time.perf_counter() - start, 1)
            times = milliseconds(partial(agent.update, batch), repeats=50 if CUDA else 5)
            if CUDA:
                times["peak_device_gb"] = round(torch.cuda.max_memory_reserved() / 1e9, 2)
            else:
                times["matmuls"] = round(times["median"] / product, 1)
            times["peak_host_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)
            results[name] = times
            del agent, batch  # their memory is not the next one's
    torch.compiler.set_stance("default")
    return results


def kernels():
    """Time that a GPU spends in kernels during one recorded update, and its share of the update: the rest it waits.

    Comes last: once something was profiled, the process stays slower.
    """
    if not CUDA:
        return None
    agent, batch = make()
    call, calls = partial(agent.update, batch), 5
    update = milliseconds(call, repeats=50, warm_up=5)["median"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            call()
        wait()
    busy = sum(event.self_device_time_total for event in profile.key_averages()) / 1e3 / calls
    return {"milliseconds": round(busy, 3), "share_of_the_update": round(busy / update, 3)}


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
    """Where the time of one eager update goes."""
    agent, batch = make(cuda_graphs=False)
    agent.update(batch)
    calls, repeats = defaultdict(list), 20 if CUDA else 3
    model, optimisers = agent.model, agent.optimisers.values()
    with ExitStack() as stack:
        for owner, name, stage in [
            (model, "encode", "encoders"), (model, "fuse", "experts and fusion"), (model, "observe", "observe"),
            (agent, "objective", "loss"), (behaviour, "imagine", "imagination"), (agent, "returns", "returns"),
            (torch.Tensor, "backward", "backward"), *((optimiser, "step", "optimisers") for optimiser in optimisers),
            (agent, "update", "update"),
        ]:  # fmt: skip
            stack.enter_context(patch.object(owner, name, timed(getattr(owner, name), calls[stage])))
        for _ in range(repeats):
            agent.update(batch)
    wait()
    times = {stage: sum(between(*call) for call in all_calls) for stage, all_calls in calls.items()}
    times["recurrence"] = times.pop("observe") - times["encoders"] - times["experts and fusion"]
    total = times.pop("update")
    times["the rest"] = total - sum(times.values())
    return {"update": round(total / repeats, 3)} | {name: round(x / repeats, 3) for name, x in times.items()}


def timed(function, calls):
    """The function, which appends the moments of its begin and end to `calls`."""

    def call(*arguments, **options):
        begin = moment()
        result = function(*arguments, **options)
        calls.append((begin, moment()))
        return result

    return call


def moment():
    """Now; on a GPU an event in its queue, for which nothing waits."""
    if not CUDA:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(begin, end):
    """Milliseconds from one moment to another."""
    return begin.elapsed_time(end) if CUDA else 1e3 * (end - begin)


NO_KERNEL = set("""view t transpose expand slice select unsqueeze squeeze split split_with_sizes permute alias detach
    unbind _unsafe_view as_strided diagonal _reshape_alias lift_fresh empty empty_like empty_strided scalar_tensor
    _record_function_enter_new _record_function_exit _local_scalar_dense""".split())


class Operators(TorchDispatchMode):
    """Counts what is computed while it lasts; views are not."""

    count = 0

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        Operators.count += operator._schema.name.split("::")[1] not in NO_KERNEL
        return operator(*arguments, **options or {})


class Cell(torch.autograd.Function):
    """A function that a GPU compiles: one operator forwards, one backwards."""

    @staticmethod
    def forward(ctx, function, *inputs):
        Operators.count += 1
        with _disable_current_modes(), torch.enable_grad():
            ctx.inputs = [x.detach().requires_grad_(x.requires_grad) if torch.is_tensor(x) else x for x in inputs]
            ctx.outputs = function(*ctx.inputs)
        return tree_map(torch.Tensor.detach, ctx.outputs)

    @staticmethod
    def backward(ctx, *gradients):
        Operators.count += 1
        with _disable_current_modes():
            learnt = [torch.is_tensor(x) and x.requires_grad for x in ctx.inputs]
            wanted = [x for x, is_learnt in zip(ctx.inputs, learnt) if is_learnt]
            found = iter(torch.autograd.grad(ctx.outputs, wanted, gradients))
        return None, *(next(found) if is_learnt else None for is_learnt in learnt)


def compiled_cells(module):
    """{name: function} of what `one_kernel` compiles on a GPU."""
    wrapped = {name: f.__wrapped__ for name, f in vars(module).items() if hasattr(f, "__wrapped__")}
    return {name: f for name, f in wrapped.items() if not inspect.isgeneratorfunction(f)}


def count_operators(**options):
    """How many operators one update takes; on a GPU each is a kernel or a few."""
    agent, batch = make(batch_size=2, cuda_graphs=False, **options)
    with ExitStack() as stack:
        for module in (mssm, behaviour):
            for name, function in compiled_cells(module).items():
                stack.enter_context(patch.object(module, name, partial(Cell.apply, function)))
        agent.update(batch)
        Operators.count = 0
        with Operators():
            agent.update(batch)
    return Operators.count


def operators():
    """How many operators one update takes, and how many of them come with each step."""
    whole = count_operators()
    return {
        "update": whole, "a_step_of_the_batch": (whole - count_operators(batch_length=40)) / 10,
        "an_imagined_step": (whole - count_operators(horizon=10)) / 5,
    }  # fmt: skip


def growth():
    """Update time against batch size, number of modalities and horizon; sequences of 50 steps, on a CPU 16."""
    length = 50 if CUDA else 16
    base = {"batch_size": length, "modalities": 3, "horizon": 15}
    results = {"steps": length, **base}
    for name, values in {"batch_size": (16, 50, 100, 200), "modalities": range(1, 7), "horizon": (5, 15, 30)}.items():
        for value in values:
            agent, batch = make(batch_length=length, **base | {name: value})
            call = partial(agent.update, batch)
            results[f"{name} {value}"] = milliseconds(call, repeats=20 if CUDA else 3, warm_up=4)
            del agent, batch, call
    return results


# ---- Environments, replay, training ----


def random_decision(env):
    """One step of an environment, or of a vector of them, with a random action."""
    env.step(env.action_space.sample())


def environments():
    """One decision of a random policy, also of one simulator step, and one reset, with every sensor present;
    decisions a second of workers, with 37.5 % missing."""
    results: dict = {}
    for task in TASKS:
        try:
            env = make_env(task, missing_rate=0.0)
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
    for workers in (1, 2, 4, 8, 16):
        envs = make_vector_env("finger_spin", workers)
        envs.reset(seed=0)
        times = milliseconds(partial(random_decision, envs), repeats=200, warm_up=20)
        envs.close()
        results[f"finger_spin decisions a second, {workers} workers"] = round(1e3 * workers / times["median"])
    return results


def replay():
    """Reading a batch of 50 x 50 from a small and from a full replay, sparse files, in and not in the page cache."""
    results: dict = {}
    rng, config = np.random.default_rng(0), Config()
    for capacity in (10_000, 1_000_000):
        with tempfile.TemporaryDirectory() as folder:
            memory = Replay(folder, train.replay_fields(space(), ACTION_SIZE), capacity)
            memory.episodes = [(start, 500, 0) for start in range(0, capacity, 500)]
            buffers, times = memory.buffers(config.batch_size, config.batch_length), defaultdict(list)
            for _ in range(50):
                for column in memory.columns.values():
                    os.posix_fadvise(column.file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                first = memory.choose(config.batch_size, config.batch_length, rng)
                for state in ("not_in_the_page_cache", "in_the_page_cache"):
                    start = time.perf_counter()
                    memory.read(first, buffers)
                    times[state].append(1e3 * (time.perf_counter() - start))
            results[capacity] = {state: spread(values) for state, values in times.items()}
    return results


class Enough(Exception):
    """The time is over."""


def training(seconds=60):
    """Environment steps and updates a second of `train.py` on finger_spin, between two of `evaluation`."""
    config = Config(prefill=8_000, first_updates=6, capacity=100_000)  # an episode of each environment first
    start = SimpleNamespace(time=None)

    def check():
        if start.time is None and progress.steps >= config.prefill + 100:  # decisions compiled and recorded, too
            wait()
            start.time, start.steps, start.updates = time.perf_counter(), progress.steps, progress.updates
        if start.time and time.perf_counter() - start.time > seconds:
            raise Enough

    envs = make_vector_env(config.task, config.num_envs)
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        agent = train.make_agent(config, envs.single_observation_space, ACTION_SIZE)
        fields = train.replay_fields(envs.single_observation_space, ACTION_SIZE)
        memory, progress = Replay(Path(folder) / "replay", fields, config.capacity), Progress()
        batches = train.Batches(memory, config, np.random.default_rng(0), agent.device)
        log = Log(Path(folder), config.steps)
        try:
            train.collect(config, agent, envs, batches, log, progress, config.steps, check)
        except Enough:
            wait()
        elapsed = time.perf_counter() - start.time
        batches.drop()
        log.close()
    envs.close(terminate=True)
    return {
        "steps_a_second": round((progress.steps - start.steps) / elapsed, 1),
        "updates_a_second": round((progress.updates - start.updates) / elapsed, 2), "seconds": round(elapsed, 1),
        "peak_device_gb": round(torch.cuda.max_memory_reserved() / 1e9, 2) if CUDA else None,
        "peak_host_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
    }  # fmt: skip


def evaluation():
    """What `train.py` does on finger_spin every `eval_every` environment steps, while nothing is learnt."""
    config, results = Config(), {}
    envs = make_vector_env(config.task, config.eval_episodes, split="eval")
    agent, batch = make()
    agent.update(batch)  # a checkpoint holds Adam's state, too

    def timed(name, function, *args):
        start = time.perf_counter()
        result = function(*args)
        wait()
        results[name] = round(1e3 * (time.perf_counter() - start))
        return result

    with tempfile.TemporaryDirectory() as folder:
        memory = Replay(Path(folder) / "replay", train.replay_fields(space(), ACTION_SIZE), config.capacity)
        rng, log = np.random.default_rng(0), Log(Path(folder), config.steps)
        log.write(0, {})
        for _ in range(2):  # the first time, kernels are compiled
            episode_seeds = train.seeds(config.seed, count=envs.num_envs)
            _, seen = timed("episodes", train.run_episodes, agent, envs, episode_seeds)
            timed("video", write_video, Path(folder) / "video.mp4", seen)
            pictures = timed("pictures", of_evaluation, agent.model, seen, config.method)
            log.show_pictures(0, pictures, timed("film", gif, seen))
            timed("checkpoint", save_checkpoint, Path(folder), agent, memory, rng, log, config, Progress())
        log.close()
    envs.close(terminate=True)
    return results | {"sum": sum(results.values())}


SECTIONS = {
    section.__name__: section
    for section in (update, action, stages, operators, growth, environments, replay, training, evaluation, kernels)
}  # fmt: skip

if __name__ == "__main__":
    names = sys.argv[1:] or list(SECTIONS)
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        sys.exit(f"benchmark.py: {', '.join(unknown)} is unknown: choose among {', '.join(SECTIONS)}")
    if not CUDA:
        train.keep_freed_memory()
    report = {"machine": machine(), "unit": "milliseconds"}
    for name in names:
        print(f"{name} ...", file=sys.stderr)
        with redirect_stdout(sys.stderr):  # what train.py says is no JSON
            report[name] = SECTIONS[name]()
    print(json.dumps(report, indent=2))
