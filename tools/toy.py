"""Latent spaces of the 2-D toy world, Fig. 1, 19, 20: a quarter of an hour on a CPU.

A disc moves at random and is seen by two sensors. One model learns from it by the ELBO, Eq. (10), another by
MuMMI's objective, Eq. (17); nothing else differs: no actor, no missing data. Both are then drawn and measured on
motion that neither has seen: <output>.png and .json, by default in runs/toy_world.

    python -m tools.toy                                  # Fig. 1: position and a ceiling camera
    python -m tools.toy --world two_cameras              # Fig. 19: a front and a rear camera
    python -m tools.toy --world x_and_y                  # Fig. 20: x alone and y alone
    python -m tools.toy --missing-rate 0.375             # with data missing in training

Shapes: T steps, B sequences or episodes, N = T * B, M = 2 sensors. Time first.
"""

import json
import time
from dataclasses import asdict, dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure

import fast
import tools
from checkpoint import say
from config import Config
from envs import make_env, seeds
from evaluate import matching_rank
from methods import make_agent

WORLDS = {"position_camera": "toy", "two_cameras": "toy_two_cameras", "x_and_y": "toy_xy"}  # name here: task
PAIR = {"ELBO": "mssm_e", "MuMMI": "mummi"}  # the two models: name here: method
SIZES: dict = dict(  # a model for a CPU; many short sequences, as their steps are the negatives of Eq. (15)
    d_h=64, d_f=32, hidden=64, units=64, channels=8, batch_size=32, batch_length=8, free_nats=1.0,
)  # fmt: skip
UPDATES = {"position_camera": 2_000, "two_cameras": 2_000, "x_and_y": 6_000}  # MuMMI learns one of x, y much later
STEPS = 100  # of an episode
TRAIN_EPISODES, TEST_EPISODES = 100, 25  # 2,500 steps to measure on


@dataclass
class Options:
    """Which world, and how long to learn from it."""

    world: Literal["position_camera", "two_cameras", "x_and_y"] = "position_camera"  # Fig. 1, 19, 20
    missing_rate: float = 0.0  # of each sensor's data in training
    updates: int | None = None  # of each of the two models; by default 2,000, and 6,000 for x_and_y
    model_lr: float = Config.model_lr  # Adam's, falling to zero; at 2e-3 MuMMI often learns only one of x and y
    seed: int = 1
    output: str = ""  # file name without suffix; by default runs/toy_world/<world>


# ---- 1. Gathering data, learning from them -------------------------------------------------------


def random_motion(task, episodes, missing_rate, seed):
    """Episodes of random actions.

    returns  {sensor: (T, B, ...), "present": (T, B, M), "action": (T, B, 2), "reward": (T, B),
              "truth": (T, B, 2)}: vectors standardised, and where the disc was in the unit square
    """
    env, rng = make_env(task, seed, missing_rate), np.random.default_rng(seed)
    recorded = []  # one list of steps an episode
    for _ in range(episodes):
        observation, info = env.reset()
        action, reward = np.zeros(2), 0.0
        recorded.append([])
        for _ in range(STEPS):
            recorded[-1].append({**observation, "action": action, "reward": reward, "truth": info["position"]})
            action = rng.uniform(-1, 1, 2)
            observation, reward, _, _, info = env.step(action)
    motion = {k: np.array([[step[k] for step in steps] for steps in zip(*recorded)]) for k in recorded[0][0]}
    for sensor in {"position", "x", "y"} & motion.keys():
        # Standardised: uniform in 0..1 has mean 1/2, variance 1/12. Left so small, they are learnt later
        # than the picture, and it is the camera that the ELBO relies on.
        motion[sensor] = (motion[sensor] - 0.5) * 12**0.5
    return {name: torch.tensor(x if x.dtype == np.uint8 else x.astype(np.float32)) for name, x in motion.items()}


def learn(method, options, motion, **changes):
    """Train one model of PAIR on the motion; `changes` override its configuration."""
    config = Config(task=WORLDS[options.world], method=PAIR[method], seed=options.seed, device="cpu",
                    model_lr=options.model_lr, **SIZES | changes)  # fmt: skip
    agent = make_agent(config, make_env(config.task).observation_space, action_size=2)  # only its model learns
    rng = np.random.default_rng(options.seed)
    for update in range(options.updates):
        if update % 500 == 0:
            say(f"{method}: {update} of {options.updates} updates")
        agent.optimisers["model"].param_groups[0]["lr"] = config.model_lr * (1 - update / options.updates)
        episode = rng.integers(motion["truth"].shape[1], size=config.batch_size)
        start = rng.integers(STEPS - config.batch_length + 1, size=config.batch_size)
        step = start + np.arange(config.batch_length)[:, None]  # (T, B)
        batch = {name: x[step, episode] for name, x in motion.items()}
        batch["observation"] = {sensor: batch[sensor] for sensor in agent.model.modalities}
        filtered = agent.model.observe(batch["observation"], batch["present"], batch["action"])
        loss, _ = agent.objective(agent.model, filtered, batch)
        agent.optimise({"model": loss})
    return agent.model


# ---- 2. Measuring --------------------------------------------------------------------------------


class Spaces(NamedTuple):
    """What a model infers from the first sensor alone, from the second alone, and from both."""

    mean: list  # 3 of (N, D_f): each expert's mean, and that of their product
    std: list  # 3 of (N, D_f)
    latent: list  # 3 of (N, D_z)
    truth: torch.Tensor  # (N, 2)  where the disc was


@torch.no_grad()
def perceive(model, motion):
    """Filter whole episodes with the first sensor, with the second, and with both. Returns Spaces."""
    means, stds, latents = [], [], []
    for kept in ([1, 0], [0, 1], [1, 1]):
        filtered = model.observe(motion, motion["present"] * torch.tensor(kept), motion["action"])
        means.append(filtered.fused.mean.flatten(0, 1))  # a product of one expert is that expert
        stds.append(filtered.fused.std.flatten(0, 1))
        latents.append(model.latent(filtered.h, filtered.s_c).flatten(0, 1))
    return Spaces(means, stds, latents, motion["truth"].flatten(0, 1))


def r2(predicted, truth):
    """1 - squared error / variance: 1 is exact, 0 as good as the mean. (N, D), (N, D) -> float"""
    return float(1 - (predicted - truth).square().sum() / (truth - truth.mean(0)).square().sum())


def linear(x, truth):
    """Least squares with a bias. (N, D), (N, 2) -> a function (N', D) -> (N', 2)"""
    ones = lambda x: torch.cat([x, torch.ones(len(x), 1)], -1)  # noqa: E731
    solution = torch.linalg.lstsq(ones(x), truth, driver="gelsd").solution  # a unit may be dead
    return lambda x: ones(x) @ solution


def nearest(x, truth, k=5):
    """Mean of the k nearest neighbours. (N, D), (N, 2) -> a function (N', D) -> (N', 2)"""
    return lambda query: truth[torch.cdist(query, x).topk(k, largest=False).indices].mean(1)


def measure(sensors, fit, test):
    """{name: number}. Decoders are fitted on one lot of motion and tested on another.

    A decoder fitted on the latent states of both sensors reads what an actor trained with both would read. A
    decoder "of its own" is fitted on those of the one sensor: it tells whether they hold the position at all.

    sensors    the two names
    fit, test  Spaces
    """
    a, b = sensors
    numbers = {}
    for i, view in enumerate([f"{a} alone", f"{b} alone", "both"]):
        decoded, of_its_own = (linear(fit.latent[j], fit.truth)(test.latent[i]) for j in (2, i))
        name = f"R2 of position from the latent state, {view}"
        numbers[name], numbers[f"{name}, by a decoder of its own"] = r2(decoded, test.truth), r2(of_its_own, test.truth)
        for j, coordinate in enumerate("xy"):
            numbers[f"R2 of {coordinate}, {view}"] = r2(decoded[:, j], test.truth[:, j])
    for i, j, pair in ((0, 1, f"{a} -> {b}"), (1, 0, f"{b} -> {a}")):
        transferred, rank = nearest(fit.mean[i], fit.truth)(test.mean[j]), matching_rank(test.mean[i], test.mean[j])
        numbers[f"R2 of position by nearest expert means, {pair}"] = r2(transferred, test.truth)
        numbers[f"median rank of the same step among {len(test.truth)}, {pair}"] = int(rank)
    numbers[f"mean log(std of {b} / std of {a})"] = float((test.std[1] / test.std[0]).log().mean())
    return numbers


# ---- 3. Drawing, as in Fig. 1 --------------------------------------------------------------------


def principal_components(*spaces):
    """Project spaces on the two directions in which all together spread most. (N, D) each -> (N, 2) each"""
    together = torch.cat(spaces)
    centre = together.mean(0)
    directions = torch.linalg.svd(together - centre, full_matrices=False).Vh[:2]
    return [(x - centre) @ directions.T for x in spaces]


CORNERS = torch.tensor([  # red, green, blue at [y][x] of the unit square's corners
    [[0.15, 0.25, 0.65], [0.85, 0.15, 0.40]],
    [[0.05, 0.65, 0.50], [0.98, 0.78, 0.15]],
])  # fmt: skip


def colours(truth):
    """Positions in the unit square (N, 2) as colours (N, 3), mixed from those of the corners."""
    x, y = truth.T.unsqueeze(-1)
    return (1 - y) * ((1 - x) * CORNERS[0, 0] + x * CORNERS[0, 1]) + y * ((1 - x) * CORNERS[1, 0] + x * CORNERS[1, 1])


def scatter_row(axes, spaces, truth, titles):
    """One space a panel, coloured by position; all of them together in grey behind it."""
    for axis, title, panel in zip(axes, titles, points := principal_components(*spaces)):
        axis.scatter(*torch.cat(points).T, s=5, color="0.86", linewidths=0)
        axis.scatter(*panel.T, s=5, c=colours(truth), linewidths=0)
        axis.set_title(title, fontsize=9)
        axis.set(xticks=[], yticks=[], aspect="equal", adjustable="datalim")


def draw(sensors, spaces, numbers):
    """The figure: the ELBO left, MuMMI right; experts above, latent states below.

    spaces   {"ELBO", "MuMMI": Spaces}
    numbers  {"ELBO", "MuMMI": of `measure`}
    """
    a, b = sensors
    figure = Figure(figsize=(15, 5.4), layout="constrained")
    parts = figure.subfigures(1, 3, width_ratios=[7, 7, 1.4], wspace=0.04, squeeze=False)[0]
    for half, (method, space) in zip(parts, spaces.items()):
        half.suptitle(f"{method}, " + ("Eq. (10)" if method == "ELBO" else "Eq. (17)"), fontweight="bold")
        above, below = half.subplots(2, 3)
        transfer = [numbers[method][f"R2 of position by nearest expert means, {x} -> {y}"] for x, y in ((b, a), (a, b))]
        titles = [f"{name}'s expert\nread as the other's: $R^2$ {r:.2f}" for name, r in zip(sensors, transfer)]
        scatter_row(above, space.mean, space.truth, [*titles, "product of both"])
        views = f"latent state, {a} alone", f"latent state, {b} alone", "latent state, both"
        titles = [f"{view}\n$R^2$ {numbers[method][f'R2 of position from the {view}']:.2f}" for view in views]
        scatter_row(below, space.latent, space.truth, titles)
    axis, grid = parts[2].subplots(), torch.linspace(0, 1, 50)
    square = torch.cartesian_prod(grid, grid).flip(-1)  # rows of the picture are y
    axis.imshow(colours(square).reshape(50, 50, 3), origin="lower", extent=(0, 1, 0, 1))
    axis.set(xticks=[0, 1], yticks=[0, 1], xlabel="x", ylabel="y")
    axis.set_title("true position;\ngrey: the row's\nother panels", fontsize=9)
    return figure


# ---- 4. The command ------------------------------------------------------------------------------


def table(world, numbers):
    """The numbers of both models, {name here: of `measure`}, in Markdown."""
    lines = [f"| {world} | " + " | ".join(PAIR) + " |", "|---|---|---|"]
    for name in numbers["ELBO"]:
        values = (numbers[method][name] for method in PAIR)
        lines.append(f"| {name} | " + " | ".join(f"{x:.3f}" if isinstance(x, float) else str(x) for x in values) + " |")
    return "\n".join(lines)


def main(options):
    """Learn, measure, draw and write. Raises ValueError on bad input."""
    options = replace(options, updates=UPDATES[options.world] if options.updates is None else options.updates)
    if options.updates < 1 or options.seed < 0 or not 0 < options.model_lr < 1:
        raise ValueError(f"--updates {options.updates} --seed {options.seed} --model-lr {options.model_lr} "
                         "is not allowed: give at least 1, at least 0, and between 0 and 1")  # fmt: skip
    task, started = WORLDS[options.world], time.perf_counter()
    make_env(task, missing_rate=options.missing_rate)  # raises ValueError for what is no rate
    picture, report = tools.output_files(options.output or f"runs/toy_world/{options.world}", ".png", ".json")
    train_seed, fit_seed, test_seed = seeds(options.seed, count=3)
    train = random_motion(task, TRAIN_EPISODES, options.missing_rate, train_seed)
    fit, test = (random_motion(task, TEST_EPISODES, 0.0, seed) for seed in (fit_seed, test_seed))

    models = {method: learn(method, options, train) for method in PAIR}
    sensors, spaces = list(models["ELBO"].modalities), {method: perceive(models[method], test) for method in PAIR}
    numbers = {method: measure(sensors, perceive(models[method], fit), spaces[method]) for method in PAIR}
    seconds = round(time.perf_counter() - started)
    report.write_text(json.dumps({"options": asdict(options), "seconds": seconds, **numbers}, indent=1) + "\n")
    draw(sensors, spaces, numbers).savefig(picture, dpi=110)
    say(table(options.world, numbers))
    say(f"{picture}, {report}: made in {seconds} s; next: python train.py --task {task}")


if __name__ == "__main__":
    fast.restart_with_quiet_threads()
    tools.run("toy", main, __doc__, Options)
