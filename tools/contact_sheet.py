"""Draws what the sensors of each task give during one episode, into docs/<task>.png.

    python docs/contact_sheet.py                    # every task that is installed
    python docs/contact_sheet.py table_wiping

Above, ten moments of an episode under smooth random actions, or, in Table Wiping, of the scripted
arm: each camera as the agent gets it, black where it is missing; depth in metres; the foreground,
which no sensor gives; the starts of other episodes of Table Wiping, whose looks are random.
Below, the whole episode: the vector sensors, shaded where missing, and who is present when.
"""

import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SEED = 2  # with it the random actions catch the ball for a while
WIPING_SEED = 8  # with it the sheet shows most of the wiping
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from envs import TASKS, make_env
from wiping import scripted_action


def ten_moments(task, steps):
    """Decisions to show: over the episode, or until the scripted arm has wiped the table."""
    return np.linspace(0, 120 if task == "table_wiping" else steps, 10).astype(int)


def record(task):
    """One episode: images and vectors by name, a list over time each, and missing (T, M)."""
    env = make_env(task, seed=WIPING_SEED if task == "table_wiping" else SEED)
    rng = np.random.default_rng(0)
    images, vectors, truncated = {}, {}, False
    action = np.zeros(env.action_space.shape)
    observation, info = env.reset()
    while True:
        for name in env.world.spaces:
            kind = images if observation[name].ndim == 3 else vectors
            kind.setdefault(name, []).append(observation[name])
        if task.startswith("toy"):
            images.setdefault("the world", []).append(env.render())
        elif task != "table_wiping":
            images.setdefault("foreground", []).append(env.world.foreground)
        if truncated:
            if task == "table_wiping":
                for i, t in enumerate(ten_moments(task, env.episode_steps)):
                    env.world.reset(np.random.default_rng(i))
                    for name, image in env.world.sense(env.world.spaces).items():
                        images.setdefault(f"{name},\nother starts", {})[t] = image
            env.close()
            return images, vectors, env.missing
        action = 0.9 * action + 0.4 * rng.normal(size=action.shape)
        if task == "table_wiping":
            action = scripted_action(info)
        observation, _, _, truncated, info = env.step(action)


def draw(task):
    """The contact sheet of one task as a matplotlib figure."""
    images, vectors, missing = record(task)
    sensors = make_env(task).world.spaces
    time = np.arange(len(missing))
    moments = ten_moments(task, time[-1])

    heights = [1] * len(images) + [1.3] * len(vectors) + [0.25 * len(sensors)]
    figure = plt.figure(figsize=(12, 1.3 * sum(heights) + 0.6), layout="constrained")
    grid = figure.add_gridspec(len(heights), len(moments) + 1, height_ratios=heights,
                               width_ratios=[1] * len(moments) + [0.1])
    for row, (name, pictures) in enumerate(images.items()):
        for column, t in enumerate(moments):
            axes = figure.add_subplot(grid[row, column], xticks=[], yticks=[])
            gone = name in sensors and missing[t, list(sensors).index(name)]
            if name == "depth" and not gone:
                # Nearest and farthest part of the body in the episode; beyond it is floor.
                body = [d[f] for d, f in zip(pictures, images["foreground"]) if d.any()]
                near, far = np.concatenate(body).min(), np.concatenate(body).max()
                drawn = axes.imshow(pictures[t], cmap="magma_r", vmin=near, vmax=2 * far - near)
            else:
                axes.imshow(pictures[t], cmap="gray", vmin=0, vmax=1)
            if gone:
                axes.text(0.5, 0.5, "missing", color="w", ha="center", va="center",
                          transform=axes.transAxes)
            if row == 0:
                axes.set_title(f"{t}", fontsize=9)
            if column == 0:
                axes.set_ylabel(name)
        if name == "depth":
            figure.colorbar(drawn, figure.add_subplot(grid[row, -1]), label="metres", extend="max")
    for row, (name, values) in enumerate(vectors.items(), start=len(images)):
        gone = missing[:, list(sensors).index(name)]
        axes = figure.add_subplot(grid[row, :-1], xlim=(0, time[-1]))
        axes.plot(time, np.where(gone[:, None], np.nan, values), lw=1)
        axes.set_ylim(-0.05 * np.max(values), 1.05 * np.max(values))
        axes.set_ylabel("touch, log(1 + N)" if name == "touch" else name)
        axes.fill_between(time, 0, 1, where=gone, step="mid", color="0.85", lw=0,
                          transform=axes.get_xaxis_transform())
        axes.tick_params(labelbottom=False)
    axes = figure.add_subplot(grid[-1, :-1], xlabel="decision")
    axes.imshow(missing.T, aspect="auto", cmap="gray", vmin=-1, vmax=1.2, interpolation="none")
    axes.set_yticks(range(len(sensors)), sensors)
    figure.suptitle(f"{task}: what its sensors give; dark where present, light where missing")
    return figure


if __name__ == "__main__":
    for task in sys.argv[1:] or TASKS:
        try:
            figure = draw(task)
        except ValueError as error:  # Table Wiping without robosuite
            print(error)
            continue
        figure.savefig(HERE / f"{task}.png", dpi=80, bbox_inches="tight")
        plt.close(figure)
        print(HERE / f"{task}.png")
