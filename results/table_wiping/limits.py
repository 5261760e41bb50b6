"""How soon the arm of Table Wiping meets a joint limit or a collision, and whether it gets out again.

`python results/table_wiping/limits.py`: 16 episodes a row, of one seed each; two minutes on one core.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from wiping import TableWiping

PENALISED = -0.3  # a control step in a limit or a collision earns -0.33
EPISODES = 16


def rewards(world, actions):
    """(steps,) rewards of a list of actions (6,)."""
    return np.array([world.step(action)[1] for action in actions])


if __name__ == "__main__":
    world, rng = TableWiping(), np.random.default_rng(0)
    world.wanted = ()  # nothing is rendered
    print("| actions | decisions to the first penalty: quartiles | never in 300 |\n|---|---|---|")
    for scale in (1, 0.5, 0.25):
        first = []
        for seed in range(EPISODES):
            world.reset(seed=seed)
            hit = rewards(world, scale * rng.uniform(-1, 1, (300, 6))) < PENALISED
            first.append(hit.argmax() + 1 if hit.any() else 301)
        quartiles = ", ".join(f"{x:.0f}" for x in np.percentile(first, (25, 50, 75)))
        print(
            f"| uniform in ±{scale}, drawn anew | {quartiles} | {sum(x > 300 for x in first)} of {EPISODES} |",
            flush=True,
        )
    print("\n| 30 decisions of one action, then | penalised decisions of the next 60, by tens |\n|---|---|")
    for then, factor in (("none", 0.0), ("its reverse", -1.0), ("its reverse, a third as large", -1 / 3)):
        shares = []
        for seed in range(EPISODES):
            world.reset(seed=seed)
            action = np.random.default_rng(seed).uniform(-1, 1, 6)
            world_rewards = rewards(world, [action] * 30 + [factor * action] * 60)
            shares.append((world_rewards[30:] < PENALISED).reshape(6, 10).mean(1))
        print(f"| {then} | {', '.join(f'{x:.0%}' for x in np.mean(shares, 0))} |", flush=True)
    world.close()
