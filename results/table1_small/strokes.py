"""How often an agent of finger_spin flicks the spinner: python results/table1_small/strokes.py AGENT ...

Two episodes with nothing missing, from the 100th decision on: the period of the reward, which is the first peak of its
autocorrelation, the share of decisions with a reward, and of actions beyond 0.99.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import envs
import evaluate
from methods import load_agent

for path in sys.argv[1:]:
    workers = envs.make_vector_env("finger_spin", 2, split="eval", missing_rate=0.0)
    returns, seen = evaluate.run_episodes(load_agent(path).agent, workers, [1, 2])
    workers.close()
    reward, action = (np.array([step[name] for step in seen])[100:] for name in ("reward", "action"))
    centred = reward - reward.mean(0)
    likeness = np.array([(centred[lag:] * centred[: len(centred) - lag]).mean(0) for lag in range(60)])  # (60, 2)
    peaks = (likeness[1:-1] > likeness[:-2]) & (likeness[1:-1] > likeness[2:]) & (likeness[1:-1] > 0.2 * likeness[0])
    print(f"{path}: returns {returns.tolist()}, a flick every {(1 + peaks.argmax(0)).tolist()} decisions, a reward in "
          f"{(reward > 0).mean(0).round(2).tolist()} of them, actions beyond 0.99 {(abs(action) > 0.99).mean((0, 2)).round(2).tolist()}")  # fmt: skip
