"""Draw what the sensors of each task give during one episode, into <output>/<task>.png.

    python -m tools.contact_sheet                               # every installed task, into runs/contact_sheets
    python -m tools.contact_sheet table_wiping --output docs    # as in the documentation

Above, ten moments of an episode of smooth random actions, or of Table Wiping's scripted arm: each camera as the agent
gets it, black where missing; depth in metres; the foreground, which no sensor gives; starts of other episodes of Table
Wiping, whose looks are random. Below, the whole episode: the vector sensors, and which sensors are present when.
"""

from typing import Literal

import numpy as np
import tyro
from matplotlib.figure import Figure

import tools
from checkpoint import say
from envs import TASKS, make_env
from wiping import scripted_action

SEEDS = {"table_wiping": 8}  # the arm wipes most of the table,
SEED = 2  # and random actions catch the ball for a while


def record(task):
    """One episode: the sensors' names, {name: readings over time} of images and of vectors, missing (T, M)."""
    env, rng = make_env(task, seed=SEEDS.get(task, SEED)), np.random.default_rng(0)
    world, images, vectors, truncated = env.unwrapped, {}, {}, False
    action = np.zeros(env.action_space.shape)
    observation, info = env.reset()
    while True:
        for name in env.sensors:
            kind = images if observation[name].ndim == 3 else vectors
            kind.setdefault(name, []).append(observation[name])
        if task != "table_wiping":
            picture = env.render()  # also finds the foreground
            name, picture = ("the world", picture) if task.startswith("toy") else ("foreground", world.foreground)
            images.setdefault(name, []).append(picture)
        if truncated:
            break
        action = 0.9 * action + 0.4 * rng.normal(size=action.shape)
        if task == "table_wiping":
            action = scripted_action(info)
        observation, _, _, truncated, info = env.step(action)
    if task == "table_wiping":
        for i, t in enumerate(ten_moments(task, env.episode_steps)):
            world.begin(np.random.default_rng(i))
            for name, image in world.sense(env.sensors).items():
                images.setdefault(f"{name},\nother starts", {})[t] = image
    env.close()
    return list(env.sensors), images, vectors, env.missing


def ten_moments(task, steps):
    """Decisions to show: over the episode, or until the scripted arm has wiped the table."""
    return np.linspace(0, 120 if task == "table_wiping" else steps, 10).astype(int)


def draw(task):
    """The contact sheet of one task."""
    sensors, images, vectors, missing = record(task)
    time = np.arange(len(missing))
    moments = ten_moments(task, time[-1])
    heights = [1] * len(images) + [1.3] * len(vectors) + [0.25 * len(sensors)]
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
                axes.set_facecolor("black")
                axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
                axes.text(0.5, 0.5, "missing", color="w", ha="center", va="center")
            else:
                drawn = axes.imshow(pictures[t], **options)
        if name == "depth":
            figure.colorbar(drawn, figure.add_subplot(grid[row, -1]), label="metres", extend="max")
    for row, (name, values) in enumerate(vectors.items(), start=len(images)):
        gone = missing[:, sensors.index(name)]
        axes = figure.add_subplot(grid[row, :-1], xlim=(0, time[-1]), ylim=np.array([-0.05, 1.05]) * np.max(values),
                                  ylabel="touch, log(1 + N)" if name == "touch" else name)  # fmt: skip
        axes.plot(time, np.where(gone[:, None], np.nan, values), lw=1)
        axes.fill_between(time, 0, 1, where=gone, step="mid", color="0.85", lw=0, transform=axes.get_xaxis_transform())
        axes.tick_params(labelbottom=False)
    axes = figure.add_subplot(grid[-1, :-1], xlabel="decision")
    axes.imshow(missing.T, aspect="auto", cmap="gray", vmin=-1, vmax=1.2, interpolation="none")
    axes.set_yticks(range(len(sensors)), sensors)
    figure.suptitle(f"{task}: readings of its sensors; dark where present, light where missing")
    return figure


def main(tasks: tyro.conf.Positional[tuple[Literal[TASKS], ...]] = TASKS,  # type: ignore[valid-type]
         output: str = "runs/contact_sheets"):  # fmt: skip
    """Draw the tasks into a folder. Raises ValueError where it cannot be written."""
    for task in tasks:
        (picture,) = tools.output_files(f"{output}/{task}", ".png")
        try:
            draw(task).savefig(picture, dpi=80, bbox_inches="tight")
            say(f"{picture}")
        except ValueError as error:  # Table Wiping without robosuite
            say(f"{task}: {error}")


if __name__ == "__main__":
    tools.run("contact_sheet", main, __doc__)
