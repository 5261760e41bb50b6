"""The reward's error on episodes that training has not seen: `python results/table1_small/held_out.py AGENT ...`

AGENT is a folder of a run or a file of weights. It acts for ten episodes as in evaluation with 37.5 % missing, on
backgrounds held out. Of every step the model predicts the reward from what was observed up to that step (0 steps
ahead), and from what was observed up to k steps earlier and the actions after that (k ahead, by its prior alone).

prints  the mean square error, as a share of the reward's variance. The state ahead is a sample: a model that knows
        nothing of the future has 2, one that gives the mean reward 1.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from checkpoint import load_checkpoint
from config import make_config, sensing
from envs import make_vector_env, seeds
from evaluate import run_episodes, to_device
from methods import load_agent
from mssm import State

AHEAD = (0, 1, 3, 5, 10, 14)
EPISODES = 10


def reward_errors(path):
    """{k: error of the reward k steps ahead, as a share of its variance} and the reward's mean and variance."""
    config, agent = make_config(load_checkpoint(path)["config"], path), load_agent(path).agent
    envs = make_vector_env(config.task, EPISODES, split="eval", **sensing(config) | {"missing_rate": 0.375})
    _, seen = run_episodes(agent, envs, seeds(2000, count=EPISODES))
    envs.close()
    model, modalities = agent.model, (*agent.model.modalities, "present")
    stacked = {name: np.stack([step[name] for step in seen]) for name in (*modalities, "action", "reward")}
    data = to_device(stacked, agent.device)
    led_to, reward = torch.roll(data["action"], 1, 0), torch.roll(data["reward"], 1, 0)  # as in replay.py
    led_to[0] = reward[0] = 0
    (T, B), errors = reward.shape, {}
    with torch.no_grad():
        filtered = model.observe({name: data[name] for name in model.modalities}, data["present"], led_to)
        state = State(filtered.h.flatten(0, 1), filtered.s_c.flatten(0, 1))
        for k in range(max(AHEAD) + 1):
            if k:
                action = torch.cat([led_to[k:], led_to.new_zeros(k, *led_to.shape[1:])])  # what led to step t + k
                state = model.imagine_step(state, action.flatten(0, 1))
            if k in AHEAD:
                predicted = model.reward(model.latent(*state)).view(T, B)[: T - k]
                errors[k] = float((predicted - reward[k:]).square().mean() / reward[k:].var())
    return errors, float(reward.mean()), float(reward.var())


if __name__ == "__main__":
    print("| agent | mean, variance of a reward |", *(f"{k} ahead |" for k in AHEAD))
    print("|---|---|" + "---|" * len(AHEAD))
    for path in sys.argv[1:]:
        errors, mean, variance = reward_errors(path)
        print(f"| {path} | {mean:.3f}, {variance:.3f} |", *(f"{error:.2f} |" for error in errors.values()), flush=True)
