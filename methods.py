"""The five methods of Tables I and II, and the agent made of one of them: where the parts are wired together.

A method is a fusion, the heads that its objective trains besides the reward, and an objective; nothing else differs.

    agent = make_agent(config, envs.single_observation_space, action_size=2)
    player = load_agent("runs/toy-mummi-1")             # or a file of weights
    action = player.act({"position": [0.2, 0.7]})       # the camera is missing at this step
"""

import os
from types import SimpleNamespace

import numpy as np
import torch

import fast
from agent import Agent
from mssm import MAX_DEPTH, MSSM, check_observation, initialise
from mummi_loss import Weights, cvrl, elbo, log_density_ratio, mummi, mummi_b
from trust import Trust

METHODS = {  # method: fusion, heads, objective
    "mummi": ("product", "g", mummi),
    "mummi_b": ("product", "g", mummi_b),
    "mssm_e": ("product", "decoders", elbo),
    "cvrl": ("concatenate", "projections", cvrl),
    "dreamer": ("concatenate", "decoders", elbo),
}
MODEL = "d_h d_c d_f hidden units channels sample_s_f prior_if_unobserved expert_power".split()
BEHAVIOUR = ("units horizon discount return_lambda initial_std model_lr actor_lr critic_lr clip mpc_rate "
             "mpc_iterations exploration").split()  # fmt: skip


def make_agent(config, observation_space, action_size):
    """The agent of a configuration (`config.Config`), on its device. Seeds torch.

    Raises ValueError where the device is not there.
    """
    device = choose_device(config.device)
    bfloat16 = fast.choose_precision(config, device) == "bfloat16"
    if bfloat16 and not config.fast:
        raise ValueError("--precision bfloat16 needs fast.py: leave --no-fast out, or give --precision float32")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first product
    torch.backends.cudnn.allow_tf32 = False  # `fast.prepare` may allow it
    torch.use_deterministic_algorithms(config.deterministic)
    torch.manual_seed(config.seed)
    if device.index:  # CUDA graphs are captured on the current GPU
        torch.cuda.set_device(device)
    if config.fast:  # the losses of MuMMI-b read the fused mean, which is float32
        fast.prepare(device, bfloat16, config.method == "mummi_b", config.deterministic)
    fusion, heads, objective = METHODS[config.method]
    modalities = {name: space.shape for name, space in observation_space.items() if name != "present"}
    continuation = config.continuation == "on"
    model = (fast.FastMSSM if config.fast else MSSM)(
        modalities, action_size, fusion, heads, continuation=continuation,
        fused_prior=fusion == "product" and config.fused_kl_scale > 0,
        **{name: getattr(config, name) for name in MODEL},
    )  # fmt: skip
    lambdas = {name: float(value) for name, value in (pair.rsplit("=", 1) for pair in config.weights)}
    weights = Weights(lambdas, config.reward_weight, config.free_nats, config.fused_kl_scale, config.absent_logit,
                      config.over_present)  # fmt: skip
    options = {name: getattr(config, name) for name in BEHAVIOUR} | ({"bfloat16": bfloat16} if config.fast else {})
    options |= dict(continuation=continuation, sample_in_evaluation=config.act_by == "sample", device=device)
    loss = lambda model, filtered, batch: objective(model, filtered, batch, weights)  # noqa: E731
    agent = (fast.FastAgent if config.fast else Agent)(model, loss, action_size, **options)
    initialise(agent.actor)
    initialise(agent.critic)
    return agent


def choose_device(name):
    """Return the torch device of a name, or of "auto". Raises ValueError if it does not exist."""
    # Checking for a GPU must not initialise CUDA: worker processes are forked later.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name not in (*known, "cuda") or (name == "cuda" and len(known) == 1):
        raise ValueError(f"--device {name} is not here: give auto or one of {', '.join(known)}")
    return torch.device(name)


class Player:
    """A trained agent that takes one observation at a time and keeps its own memory.

    sensors  {name: shape} that it knows: colour (64, 64, 3) uint8, depth (64, 64, 1) in metres, vectors (D,).
             A sensor is missing at a step where its key is absent, its value None, or a vector not finite.
    """

    def __init__(self, agent, trust=None):
        self.agent, self.sensors, self.trust = agent, dict(agent.model.modalities), trust
        self.reset()

    def reset(self):
        """Forget everything: an episode begins."""
        self.memory = self.agent.initial_memory(1)
        self.first = torch.ones(1, dtype=torch.bool, device=self.agent.device)

    def filter(self, observation, action=None):
        """Take in one observation, {name: array}, and the action before it.

        action   (A,) in [-1, 1] that was executed since the last observation, where it isn't what `act` returned
        returns  the latent state z (D_z,), and {name: log f} of Eq. (16), how well each sensor that is present (and
                 believed) agrees with it: 0 is best (MuMMI and MuMMI-b only)
        Raises ValueError for an unknown sensor, for another shape or type, and for an action outside [-1, 1].
        """
        if unknown := set(observation) - set(self.sensors):
            raise ValueError(f"sensor {min(unknown)!r} is unknown: give some of {', '.join(self.sensors)}")
        arrays = {}
        for name, x in observation.items():
            x = np.asarray(np.nan if x is None else x, np.float32 if len(self.sensors[name]) == 1 else None)
            if x.shape not in ((), self.sensors[name]):
                raise ValueError(f"sensor {name!r} has shape {x.shape}: give {self.sensors[name]}")
            if x.ndim > 1 or np.isfinite(x).all():
                arrays[name] = np.ascontiguousarray(np.fmin(x, MAX_DEPTH) if x.ndim == 3 and x.dtype.kind == "f" else x)
        given, model = {}, self.agent.model
        for name, shape in self.sensors.items():
            kind = np.uint8 if len(shape) == 3 and shape[-1] > 1 else np.float32
            given[name] = torch.as_tensor(arrays.get(name, np.zeros(shape, kind)), device=self.agent.device)[None]
        present = torch.tensor([[name in arrays for name in self.sensors]], device=self.agent.device)
        check_observation({k: x[None] for k, x in given.items()}, present[None], self.memory.action[None], self.sensors)
        if action is not None:
            action = np.reshape(np.float32(action), self.memory.action.shape)
            if not (np.abs(action) < 1.001).all():
                raise ValueError(f"the action is {action[0]}: give the one that was executed, in [-1, 1]")
            self.memory = self.memory._replace(action=torch.tensor(action, device=self.agent.device))
        if self.trust:
            present = self.trust(self.memory, given, present, self.first)
        filtered = self.agent.filter(self.memory, given, present, self.first)
        self.first = torch.zeros_like(self.first)
        self.memory = self.memory._replace(state=model.state(filtered))
        latent, agreement = model.latent(*self.memory.state), {}
        if hasattr(model, "g"):
            with torch.no_grad():
                log_f = log_density_ratio(model.g(latent), filtered.fused.expert_mean[0, 0])[0]  # (M,)
            agreement = {name: float(x) for name, x, here in zip(self.sensors, log_f, present[0]) if here}
        return latent[0].cpu().numpy(), agreement

    def act(self, observation, action=None):
        """The action (A,) in [-1, 1] after one more observation; arguments as for `filter`."""
        self.filter(observation, action)
        policy = self.agent.actor.sample if self.agent.sample_in_evaluation else self.agent.actor.mode
        action = self.agent.plan(self.memory.state, policy).clamp(-1, 1)
        self.memory = self.memory._replace(action=action)
        return np.array(action[0].float().cpu())


def load_agent(path, device="cpu", trust=False):
    """The trained agent of a run's folder, or of a file of weights. Raises ValueError where there is none.

    trust  let it drop the readings of sensors that lie, see `trust.py`; for runs that were trained to their end
    """
    from checkpoint import load_checkpoint
    from config import make_config, to_act

    state = load_checkpoint(path)
    config = to_act(make_config(state["config"], path), device)
    space = {name: SimpleNamespace(shape=tuple(shape)) for name, shape in state["modalities"].items()}
    agent = make_agent(config, space, state["action_size"])
    agent.load_state_dict(state["agent"])
    if trust and "usual" not in state:
        raise ValueError(f"{path} has no usual distances for trust: finish a run of mummi, mummi_b or mssm_e")
    return Player(agent, Trust(agent.model, state["usual"]) if trust else None)
