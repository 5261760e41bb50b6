"""Actor-critic with latent imagination and latent-guided MPC, on top of any latent world model.

Holds Eq. (18), the objectives of actor and critic, and Eq. (19), the lambda-return (Appendix A of
the MuMMI paper, after [Dreamer], Hafner et al., arXiv 1912.01603), and the latent-guided model
predictive control of [CVRL] (Ma et al., arXiv 2008.02430).

symbol   name here   meaning                                            size
z        latent      what actor, critic and reward head read            D_z
a        action      in [-1, 1]                                         A
r        reward      predicted reward of an imagined state
v_psi    value       the critic's estimate of the return from a state
V_lambda returns     lambda-return of an imagined state

Shapes: H imagined steps, N = T * B start states, B environments, A action size. Time first.

The world model is passed in. It needs `observe`, `state`, `imagine_step`, `latent`, `reward` and
`initial_state` (see `mssm.py`); its states are NamedTuples. The objective is passed in, too:
`objective(model, filtered, batch)` returns the world model's loss and a dictionary of scalars
to log.

    agent = Agent(model, objective, action_size=4)
    metrics = agent.update(batch)                       # one gradient step of all three
    memory = agent.initial_memory(num_envs)
    action, memory = agent.act(memory, observation, present, first, explore=True)
"""

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

MEAN_SCALE = 5.0  # [code] keeps the mean before tanh within (-5, 5)


class Memory(NamedTuple):
    """The policy state between two decisions."""

    state: tuple  # the world model's state, each (B, D)
    action: torch.Tensor  # (B, A)  the last action executed


# ---- 1. Actor (Fig. 12) and critic (Fig. 13) -----------------------------------------------------


def tanh_normal(parameters, initial_std):
    """Mean and standard deviation before tanh, in float32, from the actor's output.

    parameters   (..., 2 A)
    initial_std  of the untrained actor
    returns      mean (..., A), std (..., A)
    """
    mean, raw_std = parameters.float().chunk(2, -1)
    mean = MEAN_SCALE * torch.tanh(mean / MEAN_SCALE)
    inverse = initial_std + math.log(-math.expm1(-initial_std))  # softplus of it is initial_std
    return mean, F.softplus(raw_std + inverse) + 1e-4


def squash(parameters, initial_std, noise):
    """The tanh of a sample of `tanh_normal`.  Dev. D24

    parameters   (..., 2 A)
    initial_std  of the untrained actor
    noise        (..., A)  standard normal
    returns      (..., A)
    """
    mean, std = tanh_normal(parameters, initial_std)
    return torch.tanh(mean + std * noise)


class Actor(nn.Module):
    """pi(a | z), Fig. 12: four ELU layers, then a Gaussian squashed by tanh."""

    def __init__(self, latent_size, action_size, units=400, initial_std=5.0):
        super().__init__()
        self.initial_std = initial_std  # before tanh, of the untrained actor
        self.net = nn.Sequential(
            nn.Linear(latent_size, units), nn.ELU(),
            nn.Linear(units, units), nn.ELU(),
            nn.Linear(units, units), nn.ELU(),
            nn.Linear(units, units), nn.ELU(),
            nn.Linear(units, 2 * action_size),
        )  # fmt: skip

    def forward(self, latent):
        """Mean and standard deviation before tanh. (..., D_z) -> (..., A), (..., A)"""
        return tanh_normal(self.net(latent), self.initial_std)

    def sample(self, latent):
        """A reparameterised action. (..., D_z) -> (..., A)"""
        parameters = self.net(latent)
        noise = torch.randn_like(parameters.chunk(2, -1)[0], dtype=torch.float32)
        return squash(parameters, self.initial_std, noise)

    def mode(self, latent):
        """The tanh of the mean. (..., D_z) -> (..., A).  Dev. D12"""
        return torch.tanh(self(latent)[0])


class Critic(nn.Module):
    """v_psi(z), Fig. 13: three ELU layers."""

    def __init__(self, latent_size, units=400):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(latent_size, units), nn.ELU(),
            nn.Linear(units, units), nn.ELU(),
            nn.Linear(units, units), nn.ELU(),
            nn.Linear(units, 1),
        )  # fmt: skip

    def forward(self, latent):
        """(..., D_z) -> (...)"""
        return self.net(latent).squeeze(-1).float()


# ---- 2. Latent imagination and the lambda-return, Eq. (19) ---------------------------------------


def imagine(model, policy, state, horizon):
    """Appendix A: roll the policy out in the world model, without observations.

    policy   latent (N, D_z) -> action (N, A)
    state    the model's state before the first action, each (N, D)
    returns  latents (H, N, D_z) of the states that the actions lead to, and the actions (H, N, A)

    The policy gets detached latents, [code]: a gradient flows from later states to an action, but
    not on to the latent before it.
    """
    latent, latents, actions = model.latent(*state), [], []
    for _ in range(horizon):
        action = policy(latent.detach())
        state = model.imagine_step(state, action)
        latent = model.latent(*state)
        latents.append(latent)
        actions.append(action)
    return torch.stack(latents), torch.stack(actions)


def lambda_return(reward, value, discount, bootstrap, lambda_):
    """Eq. (19): R[t] = reward[t] + discount[t] ((1 - lambda) value[t+1] + lambda R[t+1]).

    reward, value, discount  (H, ...)  value[t] belongs to step t; value[0] is not read
    bootstrap                (...)     stands for value[H] and R[H]
    lambda_                  float in [0, 1]
    returns                  (H, ...)
    """
    next_value = torch.cat([value[1:], bootstrap.unsqueeze(0)])
    target = reward + discount * (1 - lambda_) * next_value
    returns, following = [], bootstrap
    for t in reversed(range(len(reward))):
        following = target[t] + discount[t] * lambda_ * following
        returns.append(following)
    return torch.stack(returns[::-1])


# ---- 3. Objectives of the behaviour, Eq. (18) ----------------------------------------------------


def actor_loss(returns, weight):
    """Eq. (18): max over eta of E[sum of V_lambda(z)], as a mean to be minimised.

    returns  (H - 1, N)
    weight   (H - 1, N)  product of the discounts of earlier steps, [code].  Dev. D20
    returns  ()
    """
    return -(weight * returns).mean()


def critic_loss(value, returns, weight):
    """Eq. (18): min over psi of E[sum of 1/2 || v(z) - V_lambda(z) ||^2], as a mean.

    value, weight  (H - 1, N)
    returns        (H - 1, N)  targets: no gradient flows into them
    returns        ()
    """
    return (weight * 0.5 * (value - returns.detach()).square()).mean()


# ---- 4. The agent --------------------------------------------------------------------------------


class Agent:
    """The world model, the actor and the critic, each with its own optimiser.

    model, objective      see the module's docstring
    action_size           A
    horizon               H imagined steps, 2 or more
    discount              of a reward one step later
    return_lambda         lambda of Eq. (19)
    continuation          the model's `continuation` tells where episodes end, [Dreamer].  Dev. D22
    initial_std           of the untrained actor, before tanh
    mpc_rate              step along the gradient of the return; mpc_iterations 0 switches MPC off
    exploration           standard deviation of the noise added to training actions
    sample_in_evaluation  sample the actor in evaluation, too, not its mode.  Dev. D12
    Raises ValueError on a horizon of less than 2.
    """

    def __init__(self, model, objective, action_size, units=400, horizon=15, discount=0.99, return_lambda=0.95,
                 continuation=False, initial_std=5.0, model_lr=6e-4, actor_lr=8e-5, critic_lr=8e-5, clip=30.0,
                 mpc_rate=0.003, mpc_iterations=1, exploration=0.3, sample_in_evaluation=False, device="cpu"):
        if horizon < 2:
            raise ValueError(f"horizon is {horizon}; give 2 or more: the last state only bootstraps the return")
        self.device, self.action_size, self.horizon, self.clip = torch.device(device), action_size, horizon, clip
        self.discount, self.return_lambda, self.continuation = discount, return_lambda, continuation
        self.mpc_rate, self.mpc_iterations = mpc_rate, mpc_iterations
        self.exploration, self.sample_in_evaluation = exploration, sample_in_evaluation
        self.model, self.objective = model.to(self.device), objective
        latent_size = model.latent(*model.initial_state(1, self.device)).shape[-1]
        self.actor = Actor(latent_size, action_size, units, initial_std).to(self.device)
        self.critic = Critic(latent_size, units).to(self.device)
        rates = {"model": model_lr, "actor": actor_lr, "critic": critic_lr}
        self.optimisers = {name: self.adam(getattr(self, name), rate) for name, rate in rates.items()}

    def adam(self, module, learning_rate):
        """Adam with Keras' epsilon, [code]."""
        return torch.optim.Adam(module.parameters(), learning_rate, eps=1e-7)

    # -- learning --

    def update(self, batch, behaviour=True):
        """Appendix A: learn the world model from a batch, then the behaviour in its imagination.

        batch      observation {name: (T, B, ...)}, present (T, B, M), action (T, B, A),
                   reward (T, B); action[t] led to observation[t], which came with reward[t].
                   Where episodes can end early also continues (T, B) and first (T, B)
        behaviour  False: the world model alone.  Dev. D25
        returns    {name: ()} on the device, detached
        """
        # World model: Eq. (17), or another objective; it takes its step before imagination.  Dev. D26
        filtered = self.model.observe(batch["observation"], batch["present"], batch["action"], first=batch.get("first"))
        loss, metrics = self.objective(self.model, filtered, batch)
        metrics |= self.optimise({"model": loss})

        if behaviour:  # latent imagination from every posterior state, then Eq. (18)
            latent, action = self.imagine(self.actor.sample, self.model.state(filtered))
            returns, value, weight = self.returns(latent)  # (H - 1, N)
            alive = batch["continues"].flatten() if "continues" in batch else torch.ones_like(weight[0])  # (N,)
            weight = weight * alive  # after an episode's end there is nothing to imagine, [Dreamer]
            losses = {"critic": critic_loss(value, returns, weight), "actor": actor_loss(returns, weight)}
            metrics |= self.optimise(losses)
            metrics["imagined_return"] = (returns * alive).mean() / alive.mean()
            metrics["saturated_actions"] = (action.abs() > 0.99).float().mean()
            metrics["action_sign_changes"] = (action[1:].sign() != action[:-1].sign()).float().mean()
        return {name: value.detach() for name, value in metrics.items()}

    def imagine(self, policy, state):
        """`imagine` in the world model, H steps. Latents (H, N, D_z), actions (H, N, A)"""
        return imagine(self.model, policy, state, self.horizon)

    def returns(self, latent):
        """Eq. (19) of imagined states, by the predicted rewards and the critic's values.

        latent   (H, N, D_z)
        returns  returns, value, weight (H - 1, N)  the last state is worth what the critic says
        """
        reward, value = self.model.reward(latent[:-1]), self.critic(latent)  # (H - 1, N), (H, N)
        discount = torch.full_like(reward, self.discount)
        if self.continuation:
            discount = discount * torch.sigmoid(self.model.continuation(latent[:-1]))
        returns = lambda_return(reward, value[:-1], discount, value[-1], self.return_lambda)
        weight = torch.cat([torch.ones_like(discount[:1]), discount[:-1]]).cumprod(0)
        return returns, value[:-1], weight.detach()

    def optimise(self, losses):
        """One Adam step of each module, by its own loss {module: ()} alone.

        Each backward pass computes its own module's gradients only, so no loss changes another module.
        All backward passes precede the first step, because the losses share a graph.

        returns  {name: ()}  the losses, and the norms of their gradients before clipping
        """
        metrics, parameters = {}, {name: self.optimisers[name].param_groups[0]["params"] for name in losses}
        for name, loss in losses.items():
            self.optimisers[name].zero_grad(set_to_none=True)
            loss.backward(inputs=parameters[name], retain_graph=name != list(losses)[-1])
        for name, loss in losses.items():
            norm = nn.utils.clip_grad_norm_(parameters[name], self.clip)
            self.optimisers[name].step()
            metrics |= {f"{name}_loss": loss, f"{name}_grad_norm": norm}
        return metrics

    # -- acting --

    def initial_memory(self, num_envs):
        """Memory before the first decision of `num_envs` environments."""
        action = torch.zeros(num_envs, self.action_size, device=self.device)
        return Memory(self.model.initial_state(num_envs, self.device), action)

    def act(self, memory, observation, present, first, explore):
        """Filter the observations into the posterior, plan, and choose one action an environment.

        memory       Memory of the decision before
        observation  {name: (B, ...)}, present (B, M)
        first        (B,)  bool, True where an episode begins: the memory there is forgotten
        explore      True: sampled actions plus noise; False: the mode (Dev. D12), no noise
        returns      action (B, A) in [-1, 1], Memory
        """
        state = self.model.state(self.filter(memory, observation, present, first))
        action = self.plan(state, self.actor.sample if explore or self.sample_in_evaluation else self.actor.mode)
        if explore:
            action = action + self.exploration * torch.randn_like(action)
        action = action.clamp(-1, 1)
        return action, Memory(state, action)

    def filter(self, memory, observation, present, first):
        """Infer the posterior from one observation of every environment: T = 1. Arguments as for `act`."""
        with torch.no_grad():
            memory = self.forget(memory, first)
            observation = {name: x.unsqueeze(0) for name, x in observation.items()}
            return self.model.observe(observation, present.unsqueeze(0), memory.action.unsqueeze(0), memory.state)

    def forget(self, memory, first):
        """Memory with everything zero where an episode begins. first (B,) bool"""
        fresh, first = self.initial_memory(len(first)), first.unsqueeze(-1)
        state = [torch.where(first, new, old) for new, old in zip(fresh.state, memory.state)]
        return Memory(fresh.state._make(state), torch.where(first, fresh.action, memory.action))

    def plan(self, state, policy):
        """Latent-guided MPC, [CVRL]: improve the policy's plan by the gradient of its return.

        state    the model's state, each (B, D)
        policy   latent (B, D_z) -> action (B, A)
        returns  (B, A)  the first action of the improved plan

        Every environment follows the gradient of its own return (Dev. D13): returns of different
        environments share no variable, so the gradient of their sum is the gradient of each.
        """
        with torch.no_grad():
            plan = [policy(self.model.latent(*state))]  # H actions (B, A), the first alone as yet
        for _ in range(self.mpc_iterations):
            imagined, latents = state, []
            for k in range(self.horizon):
                if k == len(plan):  # in the first iteration the policy makes the plan
                    with torch.no_grad():
                        plan.append(policy(latents[-1]))
                plan[k].requires_grad_()
                imagined = self.model.imagine_step(imagined, plan[k])
                latents.append(self.model.latent(*imagined))
            returns, _, _ = self.returns(torch.stack(latents))
            gradients = torch.autograd.grad(returns[0].sum(), plan)
            plan = [(a + self.mpc_rate * g).detach().clamp(-1, 1) for a, g in zip(plan, gradients)]
        return plan[0]

    # -- checkpoints --

    def state_dict(self):
        """Parameters and optimisers, as tensors and numbers only."""
        return {
            **{name: getattr(self, name).state_dict() for name in self.optimisers},
            **{f"{name}_optimiser": optimiser.state_dict() for name, optimiser in self.optimisers.items()},
        }  # fmt: skip

    def load_state_dict(self, state):
        """Load a `state_dict` from any device; learning rates stay. Raises RuntimeError where shapes differ."""
        for name, optimiser in self.optimisers.items():
            getattr(self, name).load_state_dict(state[name])
            moments = state.get(f"{name}_optimiser", {"state": {}})["state"]  # a file of weights has none
            optimiser.load_state_dict(optimiser.state_dict() | {"state": moments})  # this device's kernels


if __name__ == "__main__":

    class Point(NamedTuple):
        x: torch.Tensor  # (N, 2)

    # A world with nothing to learn: actions move a point, the reward falls with its distance from 0.
    world = nn.Linear(2, 1, bias=False)
    world.initial_state = lambda batch_size, device=None: Point(torch.zeros(batch_size, 2))
    world.observe = lambda observation, present, action, state=None, first=None: observation["x"]
    world.state = lambda filtered: Point(filtered.flatten(0, 1))
    world.latent = lambda x: x
    world.imagine_step = lambda state, action: Point(state.x + 0.2 * action)
    world.reward = lambda latent: -latent.square().sum(-1)

    torch.manual_seed(0)
    objective = lambda model, filtered, batch: (model.weight.square().sum(), {})  # noqa: E731
    agent = Agent(world, objective, 2, units=32, horizon=8, initial_std=1.0, actor_lr=3e-3, critic_lr=3e-3)
    observation, present, first = {"x": torch.tensor([[0.8, -0.8]])}, torch.ones(1, 1), torch.ones(1).bool()
    for update in range(41):
        if update % 20 == 0:
            memory = agent.initial_memory(1)
            action, memory = agent.act(memory, observation, present, first, explore=False)
            print(f"update {update:2}, action {tuple(action.shape)} at (0.8, -0.8): {action.tolist()}; best: [[-1, 1]]")
        x = torch.rand(4, 4, 2) * 2 - 1
        metrics = agent.update({"observation": {"x": x}, "present": None, "action": None})
