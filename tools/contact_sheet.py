"""Draw what the sensors of each task give during one episode, into <output>/<task>.png.

    python -m tools.contact_sheet                               # every installed task, into runs/contact_sheets
    python -m tools.contact_sheet table_wiping --moments 0 45 --output docs    # as in the documentation
    python -m tools.contact_sheet --agent pretrained/walker_walk.pt --moments 226 253

Above, ten moments of an episode of smooth random actions, or of Table Wiping's scripted arm: each camera as the agent
gets it, black where missing; depth in metres; the foreground, which no sensor gives; starts of other episodes of Table
Wiping, whose looks are random. Below, the whole episode: the vector sensors, and which sensors are present when. A
trained agent's sheet also has its reward. With `--moments`, above and below show that part of the episode alone.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import tyro
from matplotlib.figure import Figure

import tools
from checkpoint import load_checkpoint, say
from config import make_config, sensing
from envs import TASKS, make_env
from methods import load_agent
from wiping import scripted_action

SEED = 2  # random actions catch the ball for a while


@dataclass
class Options:
    """What to draw."""

    tasks: tyro.conf.Positional[tuple[Literal[TASKS], ...]] = TASKS  # type: ignore[valid-type]
    agent: str = ""  # a run or a file of weights: draw an episode of it, on its own task and backgrounds
    moments: tuple[int, int] | None = None  # the first and the last decision to picture
    output: str = "runs/contact_sheets"  # folder


def record(task, agent, shown):
    """One episode: names of sensors, {name: readings over time} of images, of vectors, missing (T, M), ten moments."""
    if task not in TASKS:
        raise ValueError(f"{agent} acts in {task}: give an agent of {', '.join(TASKS)}")
    player = load_agent(agent) if agent else None
    own = sensing(make_config(load_checkpoint(agent)["config"], agent)) | {"split": "eval"} if agent else {}
    env = make_env(task, seed=8 if task == "table_wiping" else SEED, **own)
    rng, world, images, vectors = np.random.default_rng(0), env.unwrapped, {}, {}
    (observation, info), action, reward = env.reset(), np.zeros(env.action_space.shape), 0.0
    while True:
        for name in env.sensors:
            (images if observation[name].ndim == 3 else vectors).setdefault(name, []).append(observation[name])
        if task != "table_wiping":
            picture = env.render()  # also finds the foreground
            name, picture = ("the world", picture) if task.startswith("toy") else ("foreground", world.foreground)
            images.setdefault(name, []).append(picture)
        if player:
            vectors.setdefault("reward", []).append([reward])
        if not env.under_way:
            break
        action = scripted_action(info) if task == "table_wiping" else 0.9 * action + 0.4 * rng.normal(size=action.shape)
        if player:
            working = zip(env.sensors, observation["present"])
            action = player.act({name: observation[name] for name, present in working if present})
        observation, reward, _, _, info = env.step(action)
    first, last = shown or (0, env.t)
    if not 0 <= first < last <= env.t:
        raise ValueError(f"--moments {first} {last}: give two decisions of 0 to {env.t}, in order")
    moments = np.linspace(first, last, 10).astype(int)
    if task == "table_wiping":
        for i, t in enumerate(moments):
            world.begin(np.random.default_rng(i))
            for name, image in world.sense(env.sensors).items():
                images.setdefault(f"{name},\nother starts", {})[t] = image
    env.close()
    return list(env.sensors), images, vectors, env.missing[: env.t + 1], moments


def draw(task, agent="", shown=None):
    """The contact sheet of one task, of an agent if there is one; shown is its first and last decision, or None."""
    sensors, images, vectors, missing, moments = record(task, agent, shown)
    time, half = np.arange(len(missing)), (moments[1] - moments[0]) / 2
    limits = (moments[0] - half, moments[-1] + half) if shown else (0, time[-1])
    heights = [1] * len(images) + [1.3 - 0.4 * bool(agent)] * len(vectors) + [0.25 * len(sensors)]
    figure = Figure(figsize=(12, 1.3 * sum(heights) + 0.6), layout="constrained")
    grid = figure.add_gridspec(len(heights), len(moments) + 1, height_ratios=heights,
                               width_ratios=[1] * len(moments) + [0.1])  # fmt: skip
    for row, (name, pictures) in enumerate(images.items()):
        options: dict = {"cmap": "gray", "vmin": 0, "vmax": 1}
        if name == "depth":  # from the nearest part of the body as far again beyond its farthest: there is floor
            body = [d[f] for d, f in zip(pictures, images["foreground"]) if d.any()]
            near, far = np.concatenate(body).min(), np.concatenate(body).max()
            options = {"cmap": "magma_r", "vmin": near, "vmax": 2 * far - near}
        for column, t in enumerate(moments):
            axes = figure.add_subplot(grid[row, column], xticks=[], yticks=[], ylabel="" if column else name)
            axes.set_title("" if row else f"{t}", fontsize=9)
            if name in sensors and missing[t, sensors.index(name)]:
                axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", facecolor="black")
                axes.text(0.5, 0.5, "missing", color="w", ha="center", va="center")
            else:
                drawn = axes.imshow(pictures[t], **options)
        if name == "depth":
            figure.colorbar(drawn, figure.add_subplot(grid[row, -1]), label="metres", extend="max")
    for row, (name, values) in enumerate(vectors.items(), start=len(images)):
        gone = missing[:, sensors.index(name)] if name in sensors else np.zeros(len(time), bool)
        axes = figure.add_subplot(grid[row, :-1], xlim=limits, ylabel="touch,\nlog(1 + N)" if name == "touch" else name)
        axes.set_ylim(np.array([-0.05, 1.05]) * (np.ptp(values) or 1) + np.min(values))
        axes.plot(time, np.where(gone[:, None], np.nan, values), lw=1)
        axes.fill_between(time, 0, 1, where=gone, step="mid", color="0.85", lw=0, transform=axes.get_xaxis_transform())
        axes.tick_params(labelbottom=False)
    axes = figure.add_subplot(grid[-1, :-1], xlabel="decision", xlim=limits)
    axes.imshow(missing.T, aspect="auto", cmap="gray", vmin=-1, vmax=1.2, interpolation="none")
    axes.set_yticks(range(len(sensors)), sensors)
    figure.suptitle(f"{task}: readings of its sensors; dark where present, light where missing")
    return figure


def main(options):
    """Draw the tasks. Raises ValueError for an agent that cannot act, and where nothing can be written."""
    if options.agent and options.tasks != TASKS:
        raise ValueError(f"{' '.join(options.tasks)} and --agent: an agent acts in its own task; give one of both")
    for task in (load_checkpoint(options.agent)["config"]["task"],) if options.agent else options.tasks:
        (picture,) = tools.output_files(f"{options.output}/{task}{'_agent' if options.agent else ''}", ".png")
        try:
            draw(task, options.agent, options.moments).savefig(picture, dpi=80, bbox_inches="tight")
            say(f"{picture}")
        except ValueError as error:  # Table Wiping without robosuite
            if options.agent:
                raise
            say(f"{task}: {error}")


if __name__ == "__main__":
    tools.run("contact_sheet", main, __doc__, Options)
