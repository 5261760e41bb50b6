"""What touch tells MuMMI's agent of cup_catch: `python results/table1_small/touch.py`

The agent acts for twenty episodes as in evaluation, with all sensors, with touch alone and with none.

prints  the return; how often touch reads more than 0 after a rewarded decision (the ball is in the cup) and after
        another; in how many episodes the ball got into the cup, and the mean change of the action in and out of it
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from checkpoint import load_checkpoint
from config import make_config, sensing
from envs import make_vector_env, seeds
from evaluate import run_episodes
from methods import load_agent

AGENT = "pretrained/cup_catch.pt"
EPISODES = 20
SENSORS = {"rgb+depth+touch": (1, 1, 1), "touch": (0, 0, 1), "none": (0, 0, 0)}


def percent(x):
    """The share of an array that is true, as text."""
    return f"{100 * x.mean():.1f} %"


def row(config, agent, mask):
    """The figures of twenty episodes in which the agent is given only the sensors of the mask."""
    act, mask = agent.act, torch.tensor(mask)
    agent.act = lambda memory, observation, present, *rest, **options: act(
        memory, {name: x * m for m, (name, x) in zip(mask, observation.items())}, present * mask, *rest, **options
    )
    envs = make_vector_env(config.task, EPISODES, split="eval", **sensing(config) | {"missing_rate": 0})
    returns, seen = run_episodes(agent, envs, seeds(1000, count=EPISODES))
    envs.close()
    agent.act = act
    touch, reward, action = (np.stack([step[name] for step in seen]) for name in ("touch", "reward", "action"))
    touches, caught = touch[1:, :, 0] > 0, reward[:-1] > 0  # a reward and what is observed next are of one moment
    change = np.abs(np.diff(action, axis=0)).mean(-1)
    return (f"{returns.mean():.1f} ± {returns.std():.1f}", percent(touches[caught]), percent(touches[~caught]),
            caught.any(0).sum(), f"{change[caught].mean():.2f}", f"{change[~caught].mean():.2f}")  # fmt: skip


if __name__ == "__main__":
    print("| sensors | return | touch, ball in the cup | outside | caught in | action changes by | outside |")
    print("|---|---|---|---|---|---|---|")
    config, agent = make_config(load_checkpoint(AGENT)["config"], AGENT), load_agent(AGENT).agent
    for name, mask in SENSORS.items():
        print(f"| {name} |", *(f"{x} |" for x in row(config, agent, mask)), flush=True)
