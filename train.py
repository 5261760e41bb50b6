"""Train MuMMI, or one of its baselines, on one task: `python train.py --task finger_spin`.

The loop of Appendix A: environments step in worker processes; meanwhile the agent learns from
sequences drawn from the replay. Everything a run leaves is in its folder, `runs/<name>`:

    config.json      what `--help` lists
    metrics.jsonl    a line an episode, an evaluation and every `log_every` updates
    checkpoint.pt    after every evaluation and at SIGTERM or Ctrl-C; `--resume runs/<name>` goes on
                     from there; checkpoint.previous.pt is the one before
    replay/          the collected episodes
    video-*.mp4      what the agent saw, did and got in an evaluation episode
    events.out.*     metrics, video and more pictures for `tensorboard --logdir runs`

Evaluate it with `python evaluate.py runs/<name>`. Options end with their value in the paper, as
in [Appendix B: 200], or, where it is silent, in the authors' released code, [code: 50]; [ours] has
none in either. Dev. D1 is a row of the README's table of deviations.
"""

import ctypes
import os
import platform
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial

# Torch's threads share the cores with the environments. If they spun for long while they wait for each other,
# as they do unless told so before the import, an update could take a hundred times as long; if they slept at
# once, a small one would take half as long again.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# cuBLAS reads this once, at its first product; without it no later run of the process could be --deterministic.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# To ask whether there is a GPU must not open it: worker processes are forked after that.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import numpy as np
import torch
from tqdm import tqdm

import envs as environments
from agent import Agent
from config import parse, run_folder, sensing
from envs import WorkerError
from methods import METHODS
from mssm import MSSM, StepLinear, unrolled
from pictures import gif, of_evaluation, write_video
from replay import Replay
from runs import (Log, Progress, StopSignals, Stopped, create_folder, fail, restore, save_checkpoint,
                  write_config)  # fmt: skip

# ---- 1. The agent ---------------------------------------------------------------------------------

MODEL = "d_h d_c d_f hidden units channels sample_s_f prior_if_unobserved expert_power".split()
BEHAVIOUR = ("units horizon discount return_lambda initial_std model_lr actor_lr critic_lr clip mpc_rate "
             "mpc_iterations exploration").split()  # fmt: skip


def make_agent(config, observation_space, action_size):
    """The agent of a configuration, on its device. Seeds torch."""
    torch.use_deterministic_algorithms(config.deterministic)
    torch.manual_seed(config.seed)
    fusion, heads, objective = METHODS[config.method]
    modalities = {name: space.shape for name, space in observation_space.items() if name != "present"}
    fused_prior = fusion == "product" and config.fused_kl_scale > 0
    model = MSSM(modalities, action_size, fusion, heads, fused_prior=fused_prior,
                 **{name: getattr(config, name) for name in MODEL})  # fmt: skip
    cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    bfloat16 = config.precision == "bfloat16" or (config.precision == "auto" and cuda)
    # The losses' products are in float32. TF32 loses nothing of factors that come from bfloat16 layers, as all do but
    # the fused mean of MuMMI-b; on the way back it rounds the other factor to 11 bits.
    tf32 = cuda and bfloat16 and config.method != "mummi_b"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = not config.deterministic
    return Agent(model, partial(objective, config=config), action_size, device="cuda" if cuda else "cpu",
                 bfloat16=bfloat16, cuda_graphs=config.cuda_graphs and cuda, linear=StepLinear, unrolled=unrolled,
                 **{name: getattr(config, name) for name in BEHAVIOUR})  # fmt: skip


# ---- 2. Between environments, replay and agent ---------------------------------------------------


def to_device(x, device):
    """NumPy arrays in nested dictionaries as tensors on the device."""
    if isinstance(x, dict):
        return {name: to_device(value, device) for name, value in x.items()}
    return torch.as_tensor(x).to(device)


def act(agent, memory, observation, first, explore):
    """`Agent.act` for a vector environment's observation; the action as a NumPy array (B, A)."""
    observation = to_device(observation, agent.device)
    present = observation.pop("present")
    action, memory = agent.act(memory, observation, present, to_device(first, agent.device), explore=explore)
    return action.float().cpu().numpy(), memory


def replay_fields(observation_space, action_size):
    """{key: (shape, dtype)} of what the replay keeps of one step; two bytes a pixel of depth."""
    fields = {name: (space.shape, space.dtype) for name, space in observation_space.items()}
    for name, (shape, dtype) in fields.items():
        if len(shape) == 3 and dtype == np.float32:
            fields[name] = (shape, np.float16)
    return fields | {"action": ((action_size,), np.float32), "reward": ((), np.float32)}


class Batches:
    """What `Agent.update` reads, drawn from the replay: the next batch while an update runs.

    A thread reads it from disk and, where there is a GPU, sends it there, from pinned memory on a
    stream of its own. Which sequences it holds is decided by the caller's thread, so that equal
    seeds give equal batches.
    """

    def __init__(self, replay, config, rng, device):
        self.replay, self.rng, self.device = replay, rng, device
        self.size = config.batch_size, config.batch_length
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.buffers = replay.buffers(*self.size, empty=pinned if self.stream else np.empty)
        self.thread, self.pending = ThreadPoolExecutor(1), None

    def next(self):
        """One batch: observation {name: (T, B, ...)}, present (T, B, M), action (T, B, A), reward (T, B)."""
        batch = (self.pending or self.draw()).result()
        self.pending = self.draw()
        if self.stream:  # its memory is not to be used again before the update has read it
            for x in batch.values():
                x.record_stream(torch.cuda.current_stream())
        rest = {name: batch.pop(name) for name in ("present", "action", "reward")}
        return {"observation": batch, **rest}

    def draw(self):
        return self.thread.submit(self.read, self.replay.choose(*self.size, self.rng))

    def read(self, first):
        batch = self.replay.read(first, self.buffers)
        if self.stream is None:
            return {key: torch.tensor(x) for key, x in batch.items()}
        with torch.cuda.stream(self.stream):
            batch = to_device(batch, self.device)
        self.stream.synchronize()
        return batch

    def settle(self):
        """Wait until nothing is being read, so that rows may be overwritten."""
        if self.pending:
            self.pending.result()

    def drop(self):
        """Forget the batch drawn ahead: a run that is resumed here does not have it either."""
        self.settle()
        self.pending = None


def pinned(shape, dtype):
    """An array that the GPU can read by itself."""
    return torch.empty(shape, dtype=getattr(torch, np.dtype(dtype).name), pin_memory=True).numpy()


def updates_due(config, steps):
    """How many updates the protocol has asked for after so many environment steps."""
    if steps < config.prefill:
        return 0
    return config.first_updates + int((steps - config.prefill) * config.updates_per_1000 / 1000)


def seeds(*numbers, count):
    """`count` seeds that depend on all the numbers, and on how many there are: NumPy takes (1,) and (1, 0) for one."""
    return [int(seed) for seed in np.random.SeedSequence((len(numbers), *numbers)).generate_state(count)]


def run_episodes(agent, envs, episode_seeds, check=lambda: None):
    """One episode in each environment, from the seed given for it, without exploration or learning.

    check    called at every step: it may raise
    returns  returns (num_envs,), and what the agents saw, did and got, one dictionary of (num_envs, ...) a step
    """
    observation, _ = envs.reset(seed=episode_seeds)
    memory, total = agent.initial_memory(envs.num_envs), np.zeros(envs.num_envs)
    first, running = np.ones(envs.num_envs, bool), np.ones(envs.num_envs, bool)
    seen = []
    while running.any():
        check()
        action, memory = act(agent, memory, observation, first, explore=False)
        seen.append({**observation, "action": action})
        observation, reward, terminated, truncated, _ = envs.step(action)
        seen[-1]["reward"] = reward * running
        total += reward * running
        running &= ~(terminated | truncated)
        first = np.zeros(envs.num_envs, bool)
    return total, seen


# ---- 3. The loop ---------------------------------------------------------------------------------


def keep_freed_memory():
    """Let glibc keep freed activations instead of faulting their pages in again each update."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never


def spare_rows(config, envs):
    """How many rows the replay keeps beyond its capacity: those written in the time of two checkpoints."""
    length, repeat = envs.get_attr("episode_steps")[0], envs.get_attr("action_repeat")[0]
    episodes = config.eval_every // (repeat * length) + 2 * config.num_envs
    return min(2 * episodes * (length + 1), config.capacity)


def learn(agent, batches, config, log, progress, check):
    """All updates that are due after so many environment steps."""
    while len(batches.replay) and progress.updates < updates_due(config, progress.steps):
        started = time.perf_counter()
        if progress.updates == 0 and agent.device.type == "cuda":
            tqdm.write("the first updates compile kernels and record CUDA graphs: up to two minutes")
        batch = batches.next()
        log.add(agent.update(batch), batch)
        progress.updates += 1
        if progress.updates == 2 and agent.device.type == "cpu":
            seconds = time.perf_counter() - started
            hours = updates_due(config, config.steps) * seconds / 3600
            tqdm.write(f"no GPU: an update takes {seconds:.2f} s on this CPU, all of them about {hours:.1f} hours")
        if progress.updates % config.log_every == 0:
            log.write(progress.steps, {"updates": progress.updates, **log.means()})
        check()


def collect(config, agent, envs, batches, log, progress, until, check):
    """Whole episodes until environment step `until`, and all updates that are due by then.

    check    called after every decision and update: it may raise; progress and replay are up to date then
    """
    if progress.steps >= until:  # the run was stopped in the midst of the evaluation
        return
    replay, repeat = batches.replay, envs.get_attr("action_repeat")[0]
    # Seeds depend on the step, so that a resumed run draws the episodes that it would have drawn uninterrupted.
    observation, _ = envs.reset(seed=seeds(config.seed, progress.steps, count=config.num_envs))
    memory, first = agent.initial_memory(config.num_envs), np.ones(config.num_envs, bool)
    action, reward = np.zeros(envs.action_space.shape, np.float32), np.zeros(config.num_envs)
    done = ~first
    replay.begin(config.num_envs)
    while True:
        if done.any():
            batches.settle()
        for episode in replay.record({**observation, "action": action, "reward": reward}, done):
            log.write(progress.steps, {"train_return": float(episode["reward"].sum())})
        if progress.steps >= until and done.any():
            learn(agent, batches, config, log, progress, check)  # what the last step has asked for
            return
        check()

        if progress.updates == 0:
            action = batches.rng.uniform(-1, 1, action.shape).astype(np.float32)
        else:
            action, memory = act(agent, memory, observation, first, explore=True)
        envs.step_async(action)
        learn(agent, batches, config, log, progress, check)  # environments step meanwhile
        observation, reward, terminated, truncated, _ = envs.step_wait()

        first, done = done, terminated | truncated  # the step after the last one is a reset,
        action = np.where(first[:, None], 0, action)  # which no action led to
        progress.steps += repeat * int((~first).sum())
        log.show(progress.steps)


def main(config):
    """Train from the configuration; see the module's docstring for what it leaves."""
    # Worker processes first: they are forked, and must not inherit a CUDA context.
    make = partial(environments.make_vector_env, config.task, **sensing(config))
    with (
        closing(make(num_envs=config.num_envs)) as envs,
        closing(make(num_envs=config.eval_episodes, split="eval")) as eval_envs,
    ):
        space, action_size = envs.single_observation_space, envs.single_action_space.shape[0]
        agent = make_agent(config, space, action_size)
        if agent.device.type == "cpu":
            keep_freed_memory()
        folder = run_folder(config)
        if not config.resume:
            create_folder(folder, config)

        with closing(Log(folder, config.steps)) as log, StopSignals() as stop:
            write_config(folder, config)
            spare = spare_rows(config, envs)
            replay = Replay(folder / "replay", replay_fields(space, action_size), config.capacity, spare)
            rng = np.random.default_rng(config.seed)
            progress = restore(folder, agent, replay, rng, log) if config.resume else Progress()
            batches = Batches(replay, config, rng, agent.device)
            save = partial(save_checkpoint, folder, agent, replay, rng, log, config, progress)
            try:
                while progress.evaluated < config.steps:
                    until = min((progress.evaluated // config.eval_every + 1) * config.eval_every, config.steps)
                    collect(config, agent, envs, batches, log, progress, until, stop.check)
                    batches.drop()
                    episode_seeds = seeds(config.seed, count=config.eval_episodes)
                    returns, seen = run_episodes(agent, eval_envs, episode_seeds, stop.check)
                    mean, std = returns.mean(), returns.std()
                    log.write(progress.steps, {"updates": progress.updates, "eval_return": mean, "eval_std": std})
                    tqdm.write(f"step {progress.steps}: return {mean:.1f} ± {std:.1f} over {len(returns)} episodes")
                    write_video(folder / f"video-{progress.steps:08}.mp4", seen)
                    log.show_pictures(progress.steps, of_evaluation(agent.model, seen, config.method), gif(seen))
                    progress.evaluated = progress.steps
                    save()
            except (Stopped, WorkerError):
                # Keep all that was learned and seen: episodes under way end here.
                batches.drop()
                replay.cut(config.batch_length)
                save()
                raise


if __name__ == "__main__":
    try:
        main(parse(sys.argv[1:], __doc__))
    except (Exception, KeyboardInterrupt) as error:
        fail("train.py", error)
