"""The five methods of Tables I and II, and the agent made of one of them: where the parts are wired together.

A method is a fusion, the heads that its objective trains besides the reward, and an objective; nothing else differs.

    agent = make_agent(config, envs.single_observation_space, action_size=2)
"""

import os

import torch

import fast
from agent import Agent
from mssm import MSSM, initialise
from mummi_loss import Weights, cvrl, elbo, mummi, mummi_b

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
    bfloat16 = config.precision == "bfloat16" or (config.precision == "auto" and device.type == "cuda")
    torch.use_deterministic_algorithms(config.deterministic)
    torch.manual_seed(config.seed)
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
    lambdas = {name: float(value) for name, value in (pair.split("=") for pair in config.weights)}
    weights = Weights(lambdas, config.reward_weight, config.free_nats, config.fused_kl_scale, config.absent_logit,
                      config.over_present)  # fmt: skip
    options = {name: getattr(config, name) for name in BEHAVIOUR}
    options |= dict(continuation=continuation, sample_in_evaluation=config.act_by == "sample", device=device)

    def loss(model, filtered, batch):
        return objective(model, filtered, batch, weights)

    if config.fast:
        agent = fast.FastAgent(model, loss, action_size, bfloat16=bfloat16, **options)
    else:
        agent = Agent(model, loss, action_size, **options)
    initialise(agent.actor)
    initialise(agent.critic)
    return agent


def choose_device(name):
    """The device of `--device`: auto, or what torch calls it. Raises ValueError where it is not there."""
    # To ask whether there is a GPU must not open it: worker processes are forked after that.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name not in (*known, "cuda") or (name == "cuda" and len(known) == 1):
        raise ValueError(f"--device {name} is not here: give auto or one of {', '.join(known)}")
    return torch.device(name)
