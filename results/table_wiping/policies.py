"""What simple policies earn in Table Wiping: ten episodes each, without domain randomisation.

`python results/table_wiping/policies.py`: six minutes on one core.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from wiping import TableWiping, scripted_action

SHIFTS = np.array([1, 1, 1, 0, 0, 0])
POLICIES = {  # what they do with (info, rng)
    "stands still": lambda info, rng: np.zeros(6),
    "uniform": lambda info, rng: rng.uniform(-1, 1, 6),
    "uniform, without turns": lambda info, rng: rng.uniform(-1, 1, 6) * SHIFTS,
    "uniform, without turns, a quarter as large": lambda info, rng: rng.uniform(-0.25, 0.25, 6) * SHIFTS,
    "tanh N(0, 0.4)": lambda info, rng: np.tanh(rng.normal(0, 0.4, 6)),
    "tanh N(0, 0.1)": lambda info, rng: np.tanh(rng.normal(0, 0.1, 6)),
    "holds the tool 3 cm over the nearest dirt": lambda info, rng: np.append(
        np.clip((info["dirt"] + [0, 0, 0.03] - info["tool"]) / 0.05, -0.3, 0.3), np.zeros(3)),
    "`scripted_action`": lambda info, rng: scripted_action(info),
}  # fmt: skip
EPISODES = 10


def episode(world, policy, seed):
    """Return and wiped markers of one episode."""
    (_, info), rng, total = world.reset(seed=seed), np.random.default_rng(seed), 0.0
    for _ in range(world.episode_steps):
        _, reward, _, _, info = world.step(policy(info, rng))
        total += reward
    return total, info["wiped"]


if __name__ == "__main__":
    world = TableWiping()
    world.wanted = ()  # nothing is rendered
    print("| policy | return, least to most | wiped markers of 50, mean |\n|---|---|---|")
    for name, policy in POLICIES.items():
        returns, wiped = np.array([episode(world, policy, seed) for seed in range(EPISODES)]).T
        print(f"| {name} | {returns.mean():.1f} ± {returns.std():.1f}, {returns.min():.1f} to {returns.max():.1f} "
              f"| {wiped.mean():.0f} |", flush=True)  # fmt: skip
    world.close()
