"""Train MuMMI, or one of its baselines, on one task: `python train.py --task finger_spin`.

The loop of Appendix A: environments step in worker processes; meanwhile the agent learns from
sequences drawn from the replay. Everything a run leaves is in its folder, `runs/<name>`:

    config.json      what `--help` lists
    metrics.jsonl    a line every `log_every` updates and every evaluation (also for TensorBoard)
    checkpoint.pt    after every evaluation and at SIGTERM or Ctrl-C; `--resume runs/<name>` goes on
                     from there; checkpoint.previous.pt is the one before
    replay/          the collected episodes
    video-*.mp4      what the agent saw, did and got in an evaluation episode
    events.out.*     the same and more pictures for `tensorboard --logdir runs`

Evaluate it with `python evaluate.py runs/<name>`. Options end with their value in the paper, as
in [Appendix B: 200], or, where it is silent, in the authors' released code, [code: 50]; [ours] has
none in either. Dev. D1 is a row of the README's table of deviations.
"""

import argparse
import ctypes
import json
import math
import os
import platform
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, fields, make_dataclass, replace
from functools import partial
from pathlib import Path

# Torch's threads share the cores with the environments. If they spun while they wait for each other, as
# they do unless told so before the import, an update could take a hundred times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
import tyro
from tqdm import tqdm

import envs as environments
from agent import Agent
from envs import WorkerError
from methods import METHODS
from mssm import MSSM
from pictures import gif, of_evaluation, write_video
from replay import Replay
from runs import (Log, Progress, StopSignals, Stopped, create_folder, fail, restore, save_checkpoint,
                  write_config)  # fmt: skip

# ---- 1. Configuration ----------------------------------------------------------------------------


@dataclass
class Run:
    """What to train, and where."""

    task: str = "finger_spin"  # finger_spin, walker_stand, _walk, _run, cup_catch, table_wiping, toy, ... [Table I]
    method: str = "mummi"  # mummi, mummi_b, mssm_e, cvrl or dreamer [Table I, II]
    seed: int = 1  # of every generator.  Dev. D15 [section V: three seeds]
    name: str = ""  # of the folder in runs/; by default <task>-<method>-<seed> [ours]
    resume: str = ""  # folder of a run to go on with; its configuration is used [ours]
    device: str = "auto"  # auto, cpu or cuda [ours]
    precision: str = "auto"  # auto (bfloat16 on a GPU), float32 or bfloat16.  Dev. D14 [code: float16]
    cuda_graphs: bool = True  # on a GPU, record an update and a decision as one CUDA graph each [ours]
    deterministic: bool = False  # only algorithms that give the same bits every time, slower on a GPU [ours]


@dataclass
class Environment:
    """Section V: what the agent sees, and how often it does not."""

    num_envs: int = 8  # stepping side by side in worker processes [ours]
    missing_rate: float = 0.375  # of each sensor's data in training [section V: 0.375]
    missing_process: str = "exact"  # exact, or released: a random process.  Dev. D7 [section V: exact; code: released]
    backgrounds: str = "procedural"  # or a path: videos, folders of frames, CVRL's arrays [section V: ILSVRC]


@dataclass
class Protocol:
    """Section V: how long to train, and when to look at the agent."""

    steps: int = 2_000_000  # environment steps, action repeat included.  Dev. D16 [code: 2000000]
    prefill: int = 5_000  # environment steps of random actions before the first update [code: 5000]
    first_updates: int = 100  # updates after the random steps [code: 100]
    updates_per_1000: float = 100  # updates per 1,000 environment steps [code: 100]
    capacity: int = 1_000_000  # decisions kept in the replay [ours]
    log_every: int = 100  # updates between log lines [ours]
    eval_every: int = 40_000  # environment steps between evaluations, rounded up to whole episodes [ours]
    eval_episodes: int = 10  # at the training missing rate, backgrounds unseen in training [section V: 10]


@dataclass
class Model:
    """Section III and Appendix B: sizes of the world model, and how it fuses its sensors."""

    d_h: int = 200  # size of the deterministic state h [Appendix B: 200]
    d_c: int = 30  # size of the stochastic state s^c [Appendix B: 30]
    d_f: int = 1024  # size of the fused code s^f [Appendix B: 1024]
    hidden: int = 200  # hidden layers of transition, prior and posterior [code: 200]
    units: int = 400  # hidden layers of reward, actor and critic [code: 400]
    channels: int = 32  # of the first convolution; features are 32 times as many [code: 32]
    sample_s_f: bool = True  # sample the fused code, not its mean.  Dev. D2 [Eq. (11): True; code: False]
    prior_if_unobserved: bool = True  # nothing present: the prior, not code 0.  Dev. D3 [Eq. (11): True; code: False]
    expert_power: int = 2  # experts weigh 1/std to this power.  Dev. D1 [Eq. (11): 2; code: 1]


@dataclass
class Objective:
    """Eq. (17): what the world model learns from."""

    touch_weight: float = 0.001  # lambda^m of touch; 1 for every other modality.  Dev. D8 [code: 0.001]
    reward_weight: float = 1.0  # of log p(r | z) [Eq. (17): 1]
    free_nats: float = 3.0  # of the KL [code: 3]
    fused_kl_scale: float = 0.0  # weight of KL[q(s^f | x) || p(s^f | s^c)].  Dev. D6 [Eq. (17): 1; code: 0]
    absent_logit: float = -math.inf  # log f of absent observations.  Dev. D4 [code: -100]
    over_present: bool = True  # InfoNCE is a mean over present steps, not all.  Dev. D5 [Eq. (15): True; code: False]


@dataclass
class Learning:
    """Batches, and Adam for the model, the actor and the critic."""

    batch_size: int = 50  # sequences a batch [code: 50]
    batch_length: int = 50  # steps a sequence [code: 50]
    model_lr: float = 6e-4  # learning rate of the world model [code: 6e-4]
    actor_lr: float = 8e-5  # learning rate of the actor [code: 8e-5]
    critic_lr: float = 8e-5  # learning rate of the critic [code: 8e-5]
    clip: float = 30.0  # global norm of each of the three gradients [code: 30]


@dataclass
class Behaviour:
    """Appendix A: latent imagination, and latent-guided MPC."""

    horizon: int = 15  # imagined steps H [code: 15]
    discount: float = 0.99  # of a reward one step later [code: 0.99]
    return_lambda: float = 0.95  # lambda of the lambda-return, Eq. (19) [code: 0.95]
    initial_std: float = 5.0  # of the untrained actor, before tanh [code: 5]
    mpc_rate: float = 0.003  # step of latent-guided MPC along the gradient of the return [code: 0.003]
    mpc_iterations: int = 1  # of latent-guided MPC; 0 switches it off [ours]
    exploration: float = 0.3  # standard deviation of the noise on training actions [code: 0.3]


@dataclass
class Config(Behaviour, Learning, Objective, Model, Protocol, Environment, Run):
    """All of the above in one: `config.d_h`. The groups are those of --help."""


EXAMPLES = """\
examples:
  python train.py --task toy                              a first run: six minutes on two CPU cores
  python train.py --task finger_spin                      the paper's sizes and protocol, for a GPU
  python train.py --task walker_walk --method cvrl --seed 2          another cell of Table I
  python train.py --task cup_catch --backgrounds videos   a folder of videos behind the body
  python train.py --task toy --touch-weight 1 --name touch-1         another lambda^m, Eq. (17)
  python train.py --resume runs/finger_spin-mummi-1       go on after a stop
  python train.py --task toy --help                       the defaults of another task
"""

# A task's own defaults. The toy control task trains on a CPU in minutes: small networks and batches,
# larger learning rates, a shorter memory of the future than 100 steps.
TOY: dict = dict(
    num_envs=4, steps=6_000, prefill=2_000, first_updates=200, updates_per_1000=400, capacity=20_000, eval_every=1_200,
    d_h=64, d_f=32, hidden=64, units=64, channels=8, batch_size=16, batch_length=25, horizon=12, discount=0.95,
    model_lr=3e-3, actor_lr=2e-4, critic_lr=3e-4, reward_weight=5.0, free_nats=1.0, initial_std=1.0, log_every=50,
)  # fmt: skip
# Table Wiping: section VI's length and Appendix B's codes of 256, concatenated 512. Only encoders this
# narrow have 256 features.  Dev. D16, D18
WIPING = dict(steps=1_000_000, d_f=256, channels=8)
TASK_DEFAULTS = {"toy": TOY, "toy_two_cameras": TOY, "toy_xy": TOY, "table_wiping": WIPING}

LARGEST = {  # of whole numbers, each at least 1: larger ones could only fail for want of memory or disk
    **dict.fromkeys("d_h d_c d_f hidden units channels batch_size batch_length".split(), 2**16),
    **dict.fromkeys("num_envs eval_episodes horizon".split(), 2**10),
    **dict.fromkeys("steps capacity log_every eval_every".split(), 10**10),
}
POSITIVE = "clip initial_std model_lr actor_lr critic_lr".split()
NOT_NEGATIVE = ("seed prefill first_updates updates_per_1000 exploration mpc_rate mpc_iterations fused_kl_scale "
                "touch_weight reward_weight free_nats").split()  # fmt: skip
MAY_CHANGE = "resume device deterministic cuda_graphs steps log_every eval_every".split()  # when a run is resumed


def parse(arguments=None):
    """The configuration from the command line, on top of the task's, or the resumed run's, own.

    Raises ValueError where `check` does.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--task", default=Config.task)
    first.add_argument("--resume", default="")
    known = first.parse_known_args(arguments)[0]
    if known.resume:
        default = replace(load_config(known.resume), resume=known.resume)
    else:
        default = Config(task=known.task, **TASK_DEFAULTS.get(known.task, {}))
    config = command_line(arguments, default)
    for field in fields(Config):
        was, given = getattr(default, field.name), getattr(config, field.name)
        if known.resume and field.name not in MAY_CHANGE and was != given:
            option = "--" + field.name.replace("_", "-")
            raise ValueError(f"{known.resume} was trained with {option} {was}, not {given}: leave {option} out, "
                             "or start a new run")  # fmt: skip
    check(config)
    return config


def command_line(arguments, default):
    """The configuration `default` as the command line changes it; --help shows one box a group."""
    groups = {group.__name__.lower(): group for group in reversed(Config.__bases__)}
    nested = make_dataclass(
        "Options", [(name, tyro.conf.OmitArgPrefixes[group]) for name, group in groups.items()]  # type: ignore
    )  # fmt: skip
    defaults = {
        name: group(**{f.name: getattr(default, f.name) for f in fields(group)}) for name, group in groups.items()
    }  # fmt: skip
    pairs = () if default.resume else (tyro.conf.FlagCreatePairsOff,)  # only --no-x, unless a run may have had it
    asked_for_help = not {"-h", "--help"}.isdisjoint(arguments)
    try:
        print(__doc__ + "\n" if asked_for_help else "", end="")
        given = tyro.cli(nested, args=arguments, default=nested(**defaults), description="", config=pairs)
    finally:
        print(EXAMPLES if asked_for_help else "", end="")
    return Config(**{name: value for group in groups for name, value in vars(getattr(given, group)).items()})


def load_config(folder):
    """The configuration of a run. Raises ValueError if the folder holds none."""
    path = Path(folder) / "config.json"
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{folder} is not the folder of a run: {path} is missing or unreadable; give one like "
                         "runs/toy-mummi-1") from error  # fmt: skip
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return make_config(values, path)


def make_config(values, source):
    """A configuration from a dictionary that may be anyone's. Raises ValueError, naming the source."""
    kinds = {field.name: field.type for field in fields(Config)}
    if not isinstance(values, dict):
        raise ValueError(f"{source} holds no configuration")
    unknown = [name for name in values if name not in kinds]
    if unknown:
        raise ValueError(f"{source} has {unknown[0]!r}, which this version does not know: use the one that wrote it")
    for name, value in values.items():
        if kinds[name] is float and (type(value) in (int, float) or value in ("inf", "-inf", "nan")):
            values = values | {name: float(value)}
        elif type(value) is not kinds[name]:
            raise ValueError(f"{source} has {name} {value!r}, which is no {kinds[name].__name__}")
    return Config(**values)


def check(config):
    """Raises ValueError with one line that says what was given, what is allowed and what to do."""

    def refuse(name, allowed):
        raise ValueError(f"--{name.replace('_', '-')} {getattr(config, name)} is not allowed: give {allowed}")

    for field in fields(config):
        value = getattr(config, field.name)
        if field.type is float and field.name != "absent_logit" and not math.isfinite(value):
            refuse(field.name, "a number")
    for name, largest in LARGEST.items():
        if not 1 <= getattr(config, name) <= largest:
            refuse(name, f"1 to {largest}")
    if config.horizon == 1:
        refuse("horizon", "2 or more: the last imagined state only ends the return")
    for name in POSITIVE:
        if not getattr(config, name) > 0:
            refuse(name, "more than 0")
    for name in NOT_NEGATIVE:
        if not 0 <= getattr(config, name) < 2**63:
            refuse(name, "0 or more")
    for name in ("discount", "return_lambda"):
        if not 0 <= getattr(config, name) <= 1:
            refuse(name, "0 to 1")
    if not config.absent_logit < math.inf:
        refuse("absent_logit", "a number or -inf")
    for name, choices in {
        "task": list(environments.TASKS), "method": list(METHODS), "device": ["auto", "cpu", "cuda"],
        "precision": ["auto", "float32", "bfloat16"],
    }.items():  # fmt: skip
        if getattr(config, name) not in choices:
            refuse(name, "one of " + ", ".join(choices))
    if config.expert_power not in (1, 2):
        refuse("expert_power", "1 or 2")
    if not re.fullmatch(r"[\w.+-]{0,100}", config.name) or config.name.startswith("."):
        refuse("name", "at most 100 letters, digits, and _ . + -")
    env = environments.make_env(config.task, **sensing(config))  # raises ValueError for what else there is to sense
    if config.batch_length > env.episode_steps + 1:
        refuse("batch_length", f"at most {env.episode_steps + 1}, an episode of {config.task}")
    if config.capacity < env.episode_steps + 1:
        refuse("capacity", f"at least {env.episode_steps + 1}, an episode of {config.task}")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda was asked for, but torch finds no CUDA GPU: leave --device out, or give cpu")
    folder = run_folder(config)
    if not config.resume and folder.exists():
        raise ValueError(f"{folder} exists already: give another --name, or go on with --resume {folder}")


def sensing(config):
    """What the environments of training and evaluation share: missing data and backgrounds."""
    return {name: getattr(config, name) for name in ("missing_rate", "missing_process", "backgrounds")}


def run_folder(config):
    """runs/<name>, by default runs/<task>-<method>-<seed>."""
    return Path(config.resume or Path("runs") / (config.name or f"{config.task}-{config.method}-{config.seed}"))


# ---- 2. The agent ---------------------------------------------------------------------------------

MODEL = "d_h d_c d_f hidden units channels sample_s_f prior_if_unobserved expert_power".split()
BEHAVIOUR = ("units horizon discount return_lambda initial_std model_lr actor_lr critic_lr clip mpc_rate "
             "mpc_iterations exploration").split()  # fmt: skip


def make_agent(config, observation_space, action_size):
    """The agent of a configuration, on its device. Seeds torch."""
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its start
    torch.use_deterministic_algorithms(config.deterministic)
    torch.manual_seed(config.seed)
    fusion, heads, objective = METHODS[config.method]
    modalities = {name: space.shape for name, space in observation_space.items() if name != "present"}
    fused_prior = fusion == "product" and config.fused_kl_scale > 0
    model = MSSM(modalities, action_size, fusion, heads, fused_prior=fused_prior,
                 **{name: getattr(config, name) for name in MODEL})  # fmt: skip
    cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    bfloat16 = config.precision == "bfloat16" or (config.precision == "auto" and cuda)
    torch.set_float32_matmul_precision("high" if bfloat16 and cuda else "highest")  # of the losses: TF32 or not
    torch.backends.cudnn.benchmark = not config.deterministic
    return Agent(model, partial(objective, config=config), action_size, device="cuda" if cuda else "cpu",
                 bfloat16=bfloat16, cuda_graphs=config.cuda_graphs and cuda,
                 **{name: getattr(config, name) for name in BEHAVIOUR})  # fmt: skip


# ---- 3. Between environments, replay and agent ---------------------------------------------------


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
    """`count` seeds that depend on all the numbers."""
    return [int(seed) for seed in np.random.SeedSequence(numbers).generate_state(count)]


def run_episodes(agent, envs, seed, check=lambda: None):
    """One episode in each environment, without exploration or learning.

    check    called at every step: it may raise
    returns  returns (num_envs,), and what the agents saw, did and got, one dictionary of (num_envs, ...) a step
    """
    observation, _ = envs.reset(seed=seeds(seed, count=envs.num_envs))
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


# ---- 4. The loop ---------------------------------------------------------------------------------


def keep_freed_memory():
    """Let glibc keep freed activations instead of faulting their pages in again each update."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


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
    """Whole episodes until environment step `until`, and the updates that are due meanwhile.

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
                    returns, seen = run_episodes(agent, eval_envs, config.seed, stop.check)
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
        main(parse())
    except (Exception, KeyboardInterrupt) as error:
        fail("train.py", error)
