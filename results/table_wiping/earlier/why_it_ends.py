"""Why episodes of a trained agent end: `python results/table_wiping/earlier/why_it_ends.py AGENT`, 30 episodes, 37.5 % missing."""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from envs import make_env
from methods import load_agent

if __name__ == "__main__":
    player, env, ends = load_agent(sys.argv[1]), make_env("table_wiping", split="eval"), []
    for seed in range(30):
        player.reset()
        (observation, info), actions, total = env.reset(seed=seed), [], 0.0
        while env.under_way:
            working = zip(env.sensors, observation["present"])
            actions.append(player.act({name: observation[name] for name, present in working if present}))
            observation, reward, terminated, _, info = env.step(actions[-1])
            total += reward
        robosuite = env.unwrapped.environment
        robot, shift, turn = robosuite.robots[0], *np.split(np.mean(actions, 0), 2)
        limit, collision = robot.check_q_limits(), robosuite.check_contact(robot.robot_model)
        ends.append([total, env.t, info["wiped"], limit, collision, shift[2], np.linalg.norm(turn)])
    env.close()
    ends = np.array(ends, float)
    print(f"return {ends[:, 0].mean():.1f} ± {ends[:, 0].std():.1f}, {np.median(ends[:, 1]):.0f} decisions (median), "
          f"{ends[:, 2].mean():.1f} markers wiped (mean), {(ends[:, 2] > 0).mean():.0%} of episodes wipe one; "
          f"at the end a joint limit in {ends[:, 3].mean():.0%}, a collision in {ends[:, 4].mean():.0%}; "
          f"mean action down {-ends[:, 5].mean():.2f}, size of the mean turn {ends[:, 6].mean():.2f}")  # fmt: skip
