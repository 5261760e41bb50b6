"""How often should the look of Table Wiping change, so that a model also sees the arm in looks that are new to it?

`python results/table_wiping/looks.py FOLDER`: 40 episodes of random actions, with one of four looks: the original one,
another in every episode, every 25 decisions, or every decision; and fewer episodes. A model of `--preset small` is
trained on each, 2,000 updates, and its error of the reward measured on eight more episodes, with 37.5 % missing. FOLDER
keeps the episodes (1.5 GB).

prints  the mean square error of the reward as a share of its variance, on the sequences of the last 100 updates, on
        eight whole episodes that it was trained on, and on new ones with the original look and with new looks, of
        what is observed and 5 decisions ahead of it; the bounds in nats
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from config import parse
from envs import make_env, missing_schedule
from methods import make_agent
from mssm import State
from wiping import CAMERAS, TableWiping

LOOKS = {"original": None, "each episode": 250, "25 decisions": 25, "each decision": 1}  # decisions that it lasts
EPISODES, NEW, UPDATES, T = 40, 8, 2000, 25


def record(world, seed, looks):
    """One episode: {key: (251, ...)}, with pictures `look/sensor` for each of the looks."""
    rng, changer = np.random.default_rng(seed), world.look_changer
    bias, steps = rng.uniform(-0.5, 0.5, 6), world.episode_steps + 1
    present = np.stack([~missing_schedule(steps, 0.375, 14, rng) for _ in CAMERAS], 1)
    rows = {"present": present, "action": np.zeros((steps, 6), np.float32), "reward": np.zeros(steps, np.float32)}
    rows |= {f"{look}/{name}": np.zeros((steps, 64, 64, 3), np.uint8) for look in looks for name in CAMERAS}
    world.reset(seed=seed)
    for t in range(steps):
        if t:
            rows["action"][t] = np.clip(bias + rng.uniform(-1, 1, 6), -1, 1)
            rows["reward"][t] = world.step(rows["action"][t])[1]
        for look, lasts in looks.items():
            changer.change(np.random.default_rng((seed, t // lasts))) if lasts else original(world)
            world.mujoco.mj_camlight(world.model, world.data)
            for name, x in world.sense([n for n, there in zip(CAMERAS, present[t]) if there]).items():
                rows[f"{look}/{name}"][t] = x
    original(world)
    return rows


def original(world):
    """Undo all changes of the look."""
    changer, model = world.look_changer, world.model
    model.geom_rgba[changer.geoms, :3] = changer.colours
    for name, x in changer.originals.items():
        getattr(model, name)[:] = x
    for name, x in changer.headlight.items():
        getattr(model.vis.headlight, name)[:] = x


def batch(episodes, look, rng):
    """A batch as `Agent.update` reads it, of 16 sequences."""

    def draw(key):
        return torch.tensor(np.stack([episodes[e][key][t : t + T] for e, t in where], 1))

    where = list(zip(rng.integers(len(episodes), size=16), rng.integers(251 - T, size=16)))
    pictures = {name: draw(f"{look}/{name}") for name in CAMERAS}
    return {"observation": pictures, **{key: draw(key) for key in ("present", "action", "reward")}}


@torch.no_grad()
def errors(model, episodes, look):
    """Errors of the reward of what is observed and 5 decisions ahead, as shares of its variance."""
    whole = {key: torch.tensor(np.stack([e[key] for e in episodes], 1)) for key in ("present", "action", "reward")}
    pictures = {name: torch.tensor(np.stack([e[f"{look}/{name}"] for e in episodes], 1)) for name in CAMERAS}
    filtered = model.observe(pictures, whole["present"], whole["action"])
    state, told = State(filtered.h, filtered.s_c), []
    for k in range(6):
        if k:
            state = State(*(x[:-1] for x in state))
            state = model.imagine_step(state, whole["action"][k:])
        reward = whole["reward"][k:]
        told.append(float((model.reward(model.latent(*state)) - reward).square().mean() / reward.var()))
    return told[0], told[5]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    if not (folder / "episodes.pt").exists():
        world = TableWiping()
        world.reset(seed=0)
        world.wanted = ()
        train = [record(world, seed, LOOKS) for seed in range(EPISODES)]
        new = [
            record(world, 1000 + seed, {look: LOOKS[look] for look in ("original", "each episode")})
            for seed in range(NEW)
        ]
        world.close()
        torch.save((train, new), folder / "episodes.pt")
    train, new = torch.load(folder / "episodes.pt", weights_only=False)
    config = parse(
        "--task table_wiping --preset small --reward-weight 100 --precision float32 --name looks.tmp".split()
    )
    print("| look, lasts | sequences | eight known episodes | new, original look | new, new looks | bounds |")
    print("|---|---|---|---|---|---|", flush=True)
    for run in sys.argv[2:] or [*LOOKS, "each episode,20", "each episode,10"]:
        look, _, count = run.partition(",")
        agent, rng = make_agent(config, make_env("table_wiping").observation_space, 6), np.random.default_rng(0)
        known = train[: int(count or EPISODES)]
        logs = [agent.update(batch(known, look, rng), behaviour=False) for _ in range(UPDATES)]
        last = {key: float(torch.stack([log[key] for log in logs[-100:]]).mean()) for key in logs[-1]}
        share = last["reward_square_error"] / last["reward_variance"]
        asked = ((known[:NEW], look), (new, "original"), (new, "each episode"))
        told = " | ".join(", ".join(f"{x:.2f}" for x in errors(agent.model, *which)) for which in asked)
        bounds = ", ".join(f"{last[f'information_{name}']:.2f}" for name in CAMERAS)
        print(f"| {run} | {share:.2f} | {told} | {bounds}; KL {last['kl']:.1f} |", flush=True)
