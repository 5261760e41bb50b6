"""How long the parts take on this machine, as JSON on standard output.

    python benchmark.py
"""

import json
import platform
import time

import numpy as np

from envs import TASKS, make_env


def milliseconds(function, repeats):
    """Median and mean time of one call, in milliseconds, after one call to warm up."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return {"median": round(float(np.median(times)), 3), "mean": round(float(np.mean(times)), 3)}


def environments():
    """One decision of a random policy, and one reset, of each task in this process."""
    results = {}
    for task in TASKS:
        env = make_env(task)
        reset = milliseconds(env.reset, repeats=10)
        actions = iter(np.random.default_rng(0).uniform(-1, 1, (500, *env.action_space.shape)))
        env.reset()
        decision = milliseconds(lambda: env.step(next(actions)), min(400, env.episode_steps - 1))
        env.close()
        results[task] = {"decision": decision, "reset": reset}
    return results


if __name__ == "__main__":
    report = {"machine": platform.processor() or platform.machine(), "unit": "milliseconds"}
    report["environments"] = environments()
    print(json.dumps(report, indent=2))
