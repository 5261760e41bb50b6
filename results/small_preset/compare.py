"""What a checkout of this code computes, to compare two of them: `python compare.py CHECKOUT`.

Four updates and five decisions from the same parameters, batch and random numbers, and a digest of what two tasks'
environments give. The first call writes the parameters to parameters.pt, later ones read them. Commit c308a48
has other names for them.
"""

import hashlib
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, sys.argv[1])
import envs
from config import parse

OPTIONS = """--task finger_spin --device cpu --precision float32 --batch-size 16 --batch-length 25 --channels 8 --d-f 128
    --d-h 128 --hidden 128 --units 128 --reward-weight 10 --model-lr 1e-3 --actor-lr 1e-4 --critic-lr 2e-4
    --discount 0.98 --initial-std 2""".split()
try:
    from methods import make_agent

    OPTIONS += ["--preset", "paper", "--name", "compare"]
except ImportError:  # c308a48
    from train import make_agent
SCALARS = "kl model_loss model_grad_norm critic_loss critic_grad_norm actor_loss actor_grad_norm imagined_return".split()
SENSORS, PARAMETERS = ("rgb", "depth", "touch"), Path("parameters.pt")


def renamed(old):
    """The parameters of c308a48 under the names of later commits."""
    for i, name in enumerate(SENSORS):
        old = {k.replace(f"ers.{name}.", f"ers.{i}.").replace(f"ts.{name}.", f"ts.{i}."): x for k, x in old.items()}
    old = {k.replace("code.0.", "g.0.").replace("posterior_out", "posterior_net.2"): x for k, x in old.items()}
    if "posterior_h.bias" in old:
        halves = old.pop("posterior_s_f.weight"), old.pop("posterior_h.weight")
        old |= {"posterior_net.0.weight": torch.cat(halves, 1), "posterior_net.0.bias": old.pop("posterior_h.bias")}
    return old


torch.set_num_threads(1)
env = envs.make_env("finger_spin")
agent = make_agent(parse(OPTIONS), env.observation_space, 2)
networks = {name: getattr(agent, name) for name in ("model", "actor", "critic")}
if not PARAMETERS.exists():
    torch.save({name: network.state_dict() for name, network in networks.items()}, PARAMETERS)
state = torch.load(PARAMETERS)
for name, network in networks.items():
    given = state[name] if state[name].keys() == network.state_dict().keys() else renamed(state[name])
    unread = network.load_state_dict(given, strict=False)
    assert not unread.unexpected_keys and all(k.startswith(("mean_", "std_")) for k in unread.missing_keys), unread

rng, T, B = np.random.default_rng(0), 25, 16
present = rng.random((T, B, 3)) > 0.375
observation = {
    "rgb": rng.integers(0, 256, (T, B, 64, 64, 3), np.uint8), "touch": rng.random((T, B, 2), np.float32),
    "depth": (rng.random((T, B, 64, 64, 1)) * 5).astype(np.float16),
}  # fmt: skip
for m, name in enumerate(SENSORS):
    observation[name][~present[..., m]] = 0
batch = {
    "observation": {name: torch.tensor(observation[name]) for name in SENSORS},
    "present": torch.tensor(present.astype(np.int8)), "reward": torch.tensor(rng.random((T, B), np.float32)),
    "action": torch.tensor(rng.uniform(-1, 1, (T, B, 2)).astype(np.float32)),
}  # fmt: skip
for update in range(4):
    torch.manual_seed(update)
    metrics = agent.update(batch)
    print(f"update {update}:", *(f"{name} {float(metrics[name]):.4g}" for name in SCALARS))
torch.manual_seed(0)
memory, first = agent.initial_memory(4), torch.ones(4, dtype=torch.bool)
for t in range(5):
    seen = {name: x[t, :4] for name, x in batch["observation"].items()}
    action, memory = agent.act(memory, seen, batch["present"][t, :4], first, explore=t < 4)
    print(f"decision {t}:", *(f"{a:.3f}" for a in action.flatten().tolist()))
    first = ~first if t == 0 else first
for task in ("finger_spin", "cup_catch"):
    env, rng, digest = envs.make_env(task, seed=3), np.random.default_rng(1), hashlib.sha256()
    for seed in (11, None):
        seen, _ = env.reset(seed=seed)
        for _ in range(120):
            action = np.tanh(2 * rng.standard_normal(env.action_space.shape)).astype(np.float32)
            after, reward, *_ = env.step(action)
            for x in (*(seen[name] for name in (*SENSORS, "present")), np.float64(reward)):
                digest.update(np.ascontiguousarray(x).tobytes())
            seen = after
    print(task, "240 decisions, sha256", digest.hexdigest()[:16])
