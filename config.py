"""Every option of `train.py`, its default and where that comes from; the command line, and what it refuses.

    config = parse(["--task", "toy", "--method", "cvrl"])
    config.d_h                                              # 64, the toy task's own
    config = load_config("runs/toy-mummi-1")
"""

import argparse
import json
import math
import re
import sys
from dataclasses import dataclass, fields, make_dataclass, replace
from pathlib import Path

import tyro

import envs as environments
from methods import METHODS, choose_device

# ---- 1. Options and defaults ---------------------------------------------------------------------


@dataclass
class Run:
    """What to train, and where."""

    task: str = "finger_spin"  # one of the tasks above, or what gymnasium.make takes, like Hopper-v5 [Table I]
    task_kwargs: str = ""  # of gymnasium.make, as JSON: {"render_mode": "rgb_array"} adds a camera [ours]
    preset: str = "paper"  # sizes and rates: paper, small; auto: paper for the tasks above on a GPU, else small [ours]
    method: str = "mummi"  # mummi, mummi_b, mssm_e, cvrl or dreamer [Table I, II]
    seed: int = 1  # of every generator.  Dev. D15 [section V: three seeds]
    name: str = ""  # of the folder in runs/; by default <task>-<method>-<seed> [ours]
    resume: str = ""  # folder of a run to go on with; its configuration is used [ours]
    device: str = "auto"  # auto, cpu or cuda [ours]
    precision: str = "auto"  # float32, bfloat16, or auto: the faster on this machine.  Dev. D14 [code: float16]
    fast: bool = True  # what fast.py adds: in float32 the same results; --no-fast: the plain code alone [ours]
    deterministic: bool = False  # only algorithms that give the same bits every time, slower on a GPU [ours]


@dataclass
class Environment:
    """Section V: environments, missing data and backgrounds."""

    num_envs: int = 8  # stepping side by side in worker processes.  Dev. D28 [code: 1]
    missing_rate: float = 0.375  # of each sensor's data in training [section V: 0.375]
    missing_process: str = "exact"  # exact, or released: a random process.  Dev. D7 [section V: exact; code: released]
    backgrounds: str = "procedural"  # or a path: videos, frames, CVRL's arrays.  Dev. D21 [section V: ILSVRC]


@dataclass
class Protocol:
    """Section V: how long to train, and when to evaluate."""

    steps: int = 2_000_000  # environment steps.  Dev. D16 [section V: 2 million episodes; code: 2000000]
    prefill: int = 5_000  # random environment steps first, and on to the end of an episode [code: 5000]
    prefill_hold: int = 0  # 0: uniform random actions; n: an untrained actor's, held n times.  Dev. D27 [code: 0]
    first_updates: int = 100  # updates after the random steps [code: 100]
    updates_per_1000: float = 100  # updates per 1,000 environment steps [code: 100]
    capacity: int = 1_000_000  # decisions kept in the replay [ours]
    log_every: int = 100  # updates between log lines [ours]
    eval_every: int = 40_000  # environment steps between evaluations, in whole episodes.  Dev. D28 [code: 10000]
    eval_episodes: int = 10  # at the training missing rate, on backgrounds unseen in training.  Dev. D28 [code: 1]


@dataclass
class Model:
    """Section III and Appendix B: sizes of the world model, and how it fuses its sensors."""

    d_h: int = 200  # size of the deterministic state h [Appendix B: 200]
    d_c: int = 30  # size of the stochastic state s^c [Appendix B: 30]
    d_f: int = 1024  # size of the fused observation s^f [Appendix B: 1024]
    hidden: int = 200  # hidden layers of transition, prior and posterior [code: 200]
    units: int = 400  # hidden layers of reward, actor and critic [code: 400]
    channels: int = 32  # of the first convolution; features are 32 times as many [code: 32]
    standardise: str = "auto"  # vectors, by the random phase: on, off, or auto, on for tasks of gymnasium.make [ours]
    sample_s_f: bool = True  # sample s^f, do not take its mean.  Dev. D2 [Eq. (11): True; code: False]
    prior_if_unobserved: bool = True  # nothing present: the prior, not s^f 0.  Dev. D3 [code: False]
    expert_power: int = 2  # experts weigh 1/std to this power.  Dev. D1 [Eq. (11): 2; code: 1]


@dataclass
class Objective:
    """Eq. (17): what the world model learns from."""

    weights: tuple[str, ...] = ("touch=0.001",)  # lambda^m by sensor; 1 where not given.  Dev. D8 [code: touch=0.001]
    reward_weight: float = 1.0  # of log p(r | z) [Eq. (17): 1]
    free_nats: float = 3.0  # of the KL.  Dev. D19 [Eq. (17): 0; code: 3]
    fused_kl_scale: float = 0.0  # weight of KL[q(s^f | x) || p(s^f | s^c)].  Dev. D6 [Eq. (17): 1; code: 0]
    absent_logit: float = -math.inf  # log f of absent observations.  Dev. D4 [code: -100]
    over_present: bool = True  # InfoNCE is a mean over present steps, not all.  Dev. D5 [code: False]


@dataclass
class Learning:
    """Batches, and Adam for the model, the actor and the critic."""

    batch_size: int = 50  # sequences a batch [code: 50]
    batch_length: int = 50  # steps a sequence [code: 50]
    model_lr: float = 6e-4  # learning rate of the world model [code: 6e-4]
    actor_lr: float = 8e-5  # learning rate of the actor [code: 8e-5]
    critic_lr: float = 8e-5  # learning rate of the critic [code: 8e-5]
    clip: float = 30.0  # global norm of each of the three gradients [code: 30]
    model_updates: int = 0  # the first updates that train the world model alone.  Dev. D25 [code: 0]


@dataclass
class Behaviour:
    """Appendix A: latent imagination, and latent-guided MPC."""

    horizon: int = 15  # imagined steps H [code: 15]
    discount: float = 0.99  # of a reward one step later [code: 0.99]
    return_lambda: float = 0.95  # lambda of the lambda-return, Eq. (19) [code: 0.95]
    initial_std: float = 5.0  # of the untrained actor, before tanh [code: 5]
    mpc_rate: float = 0.003  # step of latent-guided MPC along the gradient of the return [code: 0.003]
    mpc_iterations: int = 1  # of latent-guided MPC; 0 switches it off [code: 1]
    exploration: float = 0.3  # standard deviation of the noise on training actions [code: 0.3]
    act_by: str = "mode"  # of the actor in evaluation: mode or sample.  Dev. D12 [code: sample]
    continuation: str = "auto"  # learn when episodes end: on, off, or auto, on for gymnasium.make.  Dev. D22 [ours]


@dataclass
class Config(Behaviour, Learning, Objective, Model, Protocol, Environment, Run):
    """All of the above in one: `config.d_h`. The groups are those of --help."""


EXAMPLES = """\
examples:
  python train.py --task toy                              a first run: 4 to 8 minutes on a CPU
  python train.py --task finger_spin                      the paper's sizes on a GPU, else small
  python train.py --task walker_walk --method cvrl --seed 2          another cell of Table I
  python train.py --task cup_catch --backgrounds videos   a folder of videos behind the body
  python train.py --task Hopper-v5 --task-kwargs '{"render_mode": "rgb_array"}'    with a camera
  python train.py --resume runs/finger_spin-mummi-1       go on after a stop
  python train.py --task toy --help                       the defaults of another task
"""

# A task's own defaults. The toy control task trains on a CPU in minutes: small networks and batches,
# larger learning rates, and a discount horizon below 100 steps.
TOY: dict = dict(
    num_envs=4, steps=6_000, prefill=2_000, first_updates=200, updates_per_1000=400, capacity=20_000, eval_every=1_200,
    d_h=64, d_f=32, hidden=64, units=64, channels=8, batch_size=16, batch_length=25, horizon=12, discount=0.95,
    model_lr=3e-3, actor_lr=2e-4, critic_lr=3e-4, reward_weight=5.0, free_nats=1.0, initial_std=1.0, log_every=50,
)  # fmt: skip
# Table Wiping: section VI's length, Appendix B's s^f of 256 and Appendix C's 512, concatenated. Only encoders
# this narrow have 256 features.  Dev. D16, D18
WIPING = dict(steps=1_000_000, d_f=256, channels=8)
# Networks, batches and rates with which one CPU core learns the paper's tasks in two hours or so. Random actions are
# held and the model learns alone at first: else the actor saturates before there is a reward to learn.
SMALL: dict = dict(
    num_envs=4, eval_episodes=4, steps=200_000, prefill=10_000, prefill_hold=8, first_updates=1_000, model_updates=800,
    capacity=250_000, eval_every=20_000, d_h=128, d_f=128, hidden=128, units=128, channels=8, batch_size=16,
    batch_length=25, discount=0.98, model_lr=1e-3, actor_lr=1e-4, critic_lr=2e-4, reward_weight=10.0, initial_std=2.0,
)  # fmt: skip
# For other people's environments: with SMALL's rates and nats, actors of Pendulum-v1 and Hopper-v5 saturate.
OWN = SMALL | dict(prefill=5_000, prefill_hold=0, free_nats=0.5, initial_std=1.0, actor_lr=2e-5, critic_lr=1e-3)
TASK_DEFAULTS = {"toy": TOY, "toy_two_cameras": TOY, "toy_xy": TOY, "table_wiping": WIPING}

RANGES = {  # larger sizes could only fail for want of memory or disk
    "d_h d_c d_f hidden units channels batch_size batch_length": (1, 2**16), "num_envs eval_episodes": (1, 2**10),
    "horizon": (2, 2**10), "steps capacity log_every eval_every": (1, 10**10), "discount return_lambda": (0, 1),
    "seed prefill prefill_hold first_updates updates_per_1000 model_updates exploration mpc_rate mpc_iterations "
    "fused_kl_scale reward_weight free_nats": (0, 2**63 - 1),
    "clip initial_std model_lr actor_lr critic_lr": (1e-30, 1e30), "absent_logit": (-math.inf, 1e30),
}  # fmt: skip
CHOICES: dict[str, list] = {
    "preset": ["paper", "small"], "method": list(METHODS),
    "precision": ["auto", "float32", "bfloat16"], "act_by": ["mode", "sample"],
    "continuation": ["auto", "on", "off"], "standardise": ["auto", "on", "off"], "expert_power": [1, 2],
}  # fmt: skip
READ_BY = {  # the methods that read an option, where not all do
    **dict.fromkeys("d_f sample_s_f prior_if_unobserved expert_power fused_kl_scale".split(), "mummi mummi_b mssm_e"),
    **dict.fromkeys("absent_logit over_present".split(), "mummi mummi_b cvrl"), "weights": "mummi",
}  # fmt: skip
FREE = "resume device precision deterministic fast log_every eval_every".split()  # the same experiment
MAY_CHANGE = [*FREE, "steps", "backgrounds", "act_by"]  # on --resume
MAY_DIFFER = [*FREE, "task", "preset", "method", "seed", "name", "eval_episodes"]  # in one table or figure


# ---- 2. The command line --------------------------------------------------------------------------


def parse(arguments, description=""):
    """The configuration from a command line, on top of the task's, or the resumed run's, own.

    description  what --help says first
    Raises ValueError where `check` does.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option, value in {"task": Config.task, "resume": "", "device": "auto", "preset": "auto"}.items():
        first.add_argument(f"--{option}", default=value)
    known = first.parse_known_args(arguments)[0]
    if known.resume:
        default = replace(load_config(known.resume), resume=known.resume)
    else:
        default = Config(task=known.task, **defaults(known.task, known.preset, known.device))
    config = command_line(arguments, default, description)
    if config.preset == "auto":
        config.preset = default.preset
    for field in fields(Config):
        name, option = field.name, "--" + field.name.replace("_", "-")
        was, given = getattr(default, name), getattr(config, name)
        if was != given and config.method not in READ_BY.get(name, config.method).split():
            print(f"{option} changes nothing: {config.method} does not read it", file=sys.stderr)
        if known.resume and name not in MAY_CHANGE and was != given:
            raise ValueError(f"{known.resume} was trained with {option} {was}, not {given}: leave it out or start anew")
    check(config)
    return decide(config)


def defaults(task, preset, device):
    """The defaults of a task in a preset; "auto" is paper for our tasks on a GPU. Toy tasks have their own."""
    known = task in environments.TASKS
    if preset == "auto":
        preset = "paper" if known and device != "cpu" and choose_device("auto").type == "cuda" else "small"
    own, small = TASK_DEFAULTS.get(task, {} if known else {"weights": ()}), SMALL if known else OWN
    return {"preset": preset} | (own | small if preset == "small" and task not in environments.TOY else own)


def command_line(arguments, default, description=""):
    """The configuration `default` as the command line changes it; --help shows one box a group."""
    groups = {group.__name__.lower(): group for group in reversed(Config.__bases__)}
    boxes = make_dataclass("Options", [(x, tyro.conf.OmitArgPrefixes[g]) for x, g in groups.items()])  # type: ignore
    own = {x: group(**{f.name: getattr(default, f.name) for f in fields(group)}) for x, group in groups.items()}
    asked_for_help = not {"-h", "--help"}.isdisjoint(arguments)
    whole = [field.name.replace("_", "-") for field in fields(Config) if field.type is int]
    arguments = [*arguments]  # --steps 1e5 is a whole number, too
    for i, (option, value) in enumerate(zip(arguments, arguments[1:])):
        if option[2:] in whole and re.fullmatch(r"\d+(\.\d+)?[eE]\+?\d+", value) and float(value).is_integer():
            arguments[i + 1] = str(int(float(value)))
    try:
        print(description + "\n" if asked_for_help else "", end="")
        given = tyro.cli(boxes, args=arguments, default=boxes(**own), description="")
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
    if unknown := [name for name in values if name not in kinds]:
        raise ValueError(f"{source} has {unknown[0]!r}, which this version does not know: use the one that wrote it")
    for name, value in values.items():
        if kinds[name] is float and (type(value) in (int, float) or value in ("inf", "-inf", "nan")):
            values = values | {name: float(str(value))}  # of an integer of any length
        elif name == "weights" and isinstance(value, list | tuple) and all(isinstance(x, str) for x in value):
            values = values | {name: tuple(value)}
        elif type(value) is not kinds[name]:
            raise ValueError(f"{source} has {name} {value!r}, which is no {kinds[name].__name__}")
        elif value not in CHOICES.get(name, [value]):
            raise ValueError(f"{source} has {name} {value!r}, which is unknown: it is one of {CHOICES[name]}")
    return Config(**values)


def check(config):
    """Raises ValueError with one line that says what was given, what is allowed and what to do."""

    def refuse(name, allowed):
        raise ValueError(f"--{name.replace('_', '-')} {getattr(config, name)} is not allowed: give {allowed}")

    for names, (least, most) in RANGES.items():
        for name in names.split():
            if not least <= getattr(config, name) <= most:
                refuse(name, f"{least} to {most}")
    if config.steps < config.prefill:
        refuse("steps", f"at least --prefill {config.prefill}: nothing is learnt before")
    for name, choices in CHOICES.items():
        if getattr(config, name) not in choices:
            refuse(name, "one of " + ", ".join(map(str, choices)))
    if config.continuation == "on" and config.task in environments.TASKS:
        refuse("continuation", "auto or off: time alone ends an episode of this task")
    if not re.fullmatch(r"[\w.+-]{0,100}", config.name) or config.name.startswith("."):
        refuse("name", "at most 100 letters, digits, and _ . + -")
    env = environments.make_env(config.task, **sensing(config))  # raises ValueError for what else there is to sense
    sensors, steps = [name for name in env.observation_space if name != "present"], env.episode_steps
    env.close()
    if not steps:
        refuse("task", """one with a time limit: --task-kwargs '{"max_episode_steps": 1000}' gives it one""")
    for pair in set(config.weights) - set(Config.weights):
        name, _, value = pair.rpartition("=")
        if name not in sensors or not re.fullmatch(r"\d*\.?\d+([eE]-?\d+)?", value):
            refuse("weights", f"a sensor and a number, like {sensors[0]}=0.1; sensors are {', '.join(sensors)}")
    if config.batch_length > steps + 1:
        refuse("batch_length", f"at most {steps + 1}, an episode of {config.task}")
    if config.capacity < steps + 1:
        refuse("capacity", f"at least {steps + 1}, an episode of {config.task}")
    choose_device(config.device)
    if not config.resume and (folder := run_folder(config)).exists():
        raise ValueError(f"{folder} exists already: give another --name, or go on with --resume {folder}")


def sensing(config):
    """What the environments of training and evaluation share. Raises ValueError for --task-kwargs that are no JSON."""
    try:
        task_kwargs = json.loads(config.task_kwargs or "{}")
    except ValueError as error:
        raise ValueError(f"--task-kwargs {config.task_kwargs} is no JSON object: {error}") from error
    shared = {name: getattr(config, name) for name in ("missing_rate", "missing_process", "backgrounds")}
    return shared | ({"task_kwargs": task_kwargs} if task_kwargs else {})


def decide(config):
    """The configuration with every "auto" that depends on the task decided."""
    auto = [name for name in ("standardise", "continuation") if getattr(config, name) == "auto"]
    return replace(config, **dict.fromkeys(auto, "off" if config.task in environments.TASKS else "on"))


def to_act(config, device):
    """The configuration of a trained run for a device, which may be slow in bfloat16."""
    return replace(config, device=device, precision="float32" if config.precision == "float32" else "auto")


def check_comparable(configs, label=()):
    """Raises ValueError where two runs of a task differ in more than method, seed and `label`, or not even in these.

    configs  {folder: Config}; of a run's backgrounds, what they hold is compared, wherever they lie
    label    options that may differ: they are part of a run's name in tables and figures
    returns  {folder: ("free_nats 1", ...)}, empty without a label
    """
    known, label = {field.name for field in fields(Config)}, [name.replace("-", "_") for name in label]
    if unknown := set(label) - known:
        raise ValueError(f"--label {min(unknown)} is no option of train.py: give one like free_nats")
    first, held, seen, labels = {}, {}, {}, {}
    for folder, config in configs.items():
        other, clips = first.setdefault(config.task, folder), Path(folder) / "backgrounds.json"
        held[folder] = json.loads(clips.read_text())["fingerprint"] if clips.exists() else None
        for name in sorted(known - {*MAY_DIFFER, *label}):
            was, now = getattr(configs[other], name), getattr(config, name)
            if name == "backgrounds" and held[other] and held[folder]:
                was, now = held[other], held[folder]
            if was != now:
                raise ValueError(f"{other} and {folder} differ in {name}, {was} and {now}: take them apart, or give "
                                 f"--label {name}")  # fmt: skip
        labels[folder] = tuple(f"{name} {getattr(config, name)}" for name in label)
        run = config.task, config.method, config.seed, *labels[folder]
        if (twin := seen.setdefault(run, folder)) != folder:
            raise ValueError(f"{twin} and {folder} are both {run[0]}, {run[1]}, seed {run[2]}: leave one out")
    return labels


def run_folder(config):
    """runs/<name>, by default runs/<task>-<method>-<seed>."""
    name = config.name or f"{config.task}-{config.method}-{config.seed}".replace("/", "-")
    return Path(config.resume or Path("runs") / name)
