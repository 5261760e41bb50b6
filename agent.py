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

The world model is passed in and needs `observe`, `state`, `imagine_step`, `latent`, `reward` and
`initial_state` (see `mssm.py`), its states being NamedTuples; so is the objective,
`objective(model, filtered, batch)`, that returns the loss of the world model and a dictionary of
scalars to log.

    agent = Agent(model, objective, action_size=4)
    metrics = agent.update(batch)                       # one gradient step of all three
    memory = agent.initial_memory(num_envs)
    action, memory = agent.act(memory, observation, present, first, explore=True)
"""

import math
from collections import Counter
from contextlib import nullcontext
from functools import cache, partial, wraps
from typing import NamedTuple
from weakref import WeakMethod

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

MEAN_SCALE = 5.0  # [code] keeps the mean before tanh within (-5, 5)


class Memory(NamedTuple):
    """What acting carries from one decision to the next."""

    state: tuple  # the world model's state, each (B, D)
    action: torch.Tensor  # (B, A)  the last action executed


def one_kernel(function):
    """The function itself; on a GPU, compiled: its elementwise steps run as one kernel."""

    @cache  # when it is first asked for
    def compiled():
        torch._dynamo.config.recompile_limit = 256  # a variant for each shape, type and gradient mode
        return torch.compile(function, dynamic=False)

    @wraps(function)
    def call(*inputs, **options):
        on_gpu = any(torch.is_tensor(x) and x.is_cuda for x in (*inputs, *options.values()))
        return (compiled() if on_gpu and not torch.compiler.is_compiling() else function)(*inputs, **options)

    return call


def mlp(sizes, activation, linear=nn.Linear):
    """Linear layers of the given sizes with `activation` between them."""
    layers = []
    for size_in, size_out in zip(sizes, sizes[1:]):
        layers += [linear(size_in, size_out), activation()]
    return nn.Sequential(*layers[:-1])


def initialise(module):
    """Keras' defaults, [code]: Glorot uniform kernels, zero biases."""
    for parameter in module.parameters():
        nn.init.xavier_uniform_(parameter) if parameter.ndim > 1 else nn.init.zeros_(parameter)


# ---- 1. Actor (Fig. 12) and critic (Fig. 13) -----------------------------------------------------


@one_kernel
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


@one_kernel
def squash(parameters, initial_std, noise):
    """The tanh of a sample of `tanh_normal`.

    parameters   (..., 2 A)
    initial_std  of the untrained actor
    noise        (..., A)  standard normal
    returns      (..., A)
    """
    mean, std = tanh_normal(parameters, initial_std)
    return torch.tanh(mean + std * noise)


class Actor(nn.Module):
    """pi(a | z), Fig. 12: four ELU layers, then a Gaussian squashed by tanh."""

    def __init__(self, latent_size, action_size, units=400, initial_std=5.0, linear=nn.Linear):
        super().__init__()
        self.initial_std = initial_std  # before tanh, of the untrained actor
        self.net = mlp([latent_size, units, units, units, units, 2 * action_size], nn.ELU, linear)
        initialise(self)

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

    def entropy(self, latent):
        """One-sample estimate of the entropy of pi(a | z). (..., D_z) -> (...) nats"""
        mean, std = self(latent)
        noise = torch.randn_like(std)
        u = mean + std * noise
        log_normal = -0.5 * noise.square() - std.log() - 0.5 * math.log(2 * math.pi)
        log_slope = 2 * (math.log(2) - u - F.softplus(-2 * u))  # log of d tanh(u) / du
        return (log_slope - log_normal).sum(-1)


class Critic(nn.Module):
    """v_psi(z), Fig. 13: three ELU layers."""

    def __init__(self, latent_size, units=400):
        super().__init__()
        self.net = mlp([latent_size, units, units, units, 1], nn.ELU)
        initialise(self)

    def forward(self, latent):
        """(..., D_z) -> (...)"""
        return self.net(latent).squeeze(-1).float()


# ---- 2. Latent imagination and the lambda-return, Eq. (19) ---------------------------------------


def imagine(model, policy, state, horizon):
    """Appendix A: roll the policy out in the world model, without observations.

    policy   latent (N, D_z) -> action (N, A)
    state    the model's state before the first action, each (N, D)
    returns  latents (H, N, D_z) of the states that the actions lead to

    The policy sees its latents detached, [code]: the gradient reaches an action through what it
    causes, not through what caused it.
    """
    latents = [model.latent(*state)]
    for _ in range(horizon):
        state = model.imagine_step(state, policy(latents[-1].detach()))
        latents.append(model.latent(*state))
    return torch.stack(latents[1:])


@one_kernel
def lambda_return(reward, value, discount, bootstrap, lambda_):
    """Eq. (19): R[t] = reward[t] + discount[t] ((1 - lambda) value[t+1] + lambda R[t+1]).

    reward, value, discount  (H, ...)  value[t] belongs to step t; value[0] is not read
    bootstrap                (...)     takes the place of value and R after the last step
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
    weight   (H - 1, 1)  weight[t] = discount^t, [code].  Dev. D20
    returns  ()
    """
    return -(weight * returns).mean()


def critic_loss(value, returns, weight):
    """Eq. (18): min over psi of E[sum of 1/2 || v(z) - V_lambda(z) ||^2], as a mean.

    value    (H - 1, N)
    returns  (H - 1, N)  targets: no gradient flows into them
    weight   (H - 1, 1)
    returns  ()
    """
    return (weight * 0.5 * (value - returns.detach()).square()).mean()


# ---- 4. Thousands of kernels, one launch ---------------------------------------------------------


class Recorded:
    """A method, of tensors on a GPU, that is recorded as a CUDA graph and then replayed.

    Replayed, its kernels follow each other without waiting for Python. For each shape of the arguments
    the first three calls run as they are, while libraries choose their kernels and Adam makes its state;
    the fourth is recorded. What the method computes may depend on the values of tensors only, not on
    anything that Python decides; random numbers differ from call to call.

        update = Recorded(agent.update)
        metrics = update(batch)          # nested tensors; returns copies that later calls leave alone

    It does not keep the method's object alive.
    """

    WARM_UP = 3  # calls

    def __init__(self, method):
        self.method = WeakMethod(method)  # or the agent and its graphs would keep each other, and their memory, alive
        self.inputs, self.graphs, self.calls = {}, {}, Counter()
        self.stream = torch.cuda.Stream()

    def __call__(self, *arguments, **options):
        leaves, structure = tree_flatten(arguments)
        signature = structure, tuple((x.shape, x.dtype) for x in leaves), tuple(options.items())
        if signature not in self.inputs:
            self.inputs[signature] = [x.clone() for x in leaves]
        for x, new in zip(self.inputs[signature], leaves):
            x.copy_(new)
        inputs = tree_unflatten(self.inputs[signature], structure)
        call = partial(self.method(), *inputs, **options)  # type: ignore[misc, arg-type]
        if self.calls[signature] < self.WARM_UP:
            self.calls[signature] += 1
            result = self.warm_up(call)
        else:
            if signature not in self.graphs:
                self.graphs[signature] = self.record(call)
            graph, result = self.graphs[signature]
            graph.replay()
        return tree_map(torch.clone, result)

    def warm_up(self, call):
        """One call as it is, on the stream that will be recorded."""
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            result = call()
        torch.cuda.synchronize()
        return result

    def record(self, call):
        """Returns the graph, and the tensors that it writes at each replay."""
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile: batches are sent there.
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            result = call()
        return graph, result


# ---- 5. The agent --------------------------------------------------------------------------------


class Agent:
    """The world model's, the actor's and the critic's parameters with their three optimisers.

    model, objective   see the module's docstring
    action_size        A
    horizon            H imagined steps, 2 or more
    discount           of Eq. (19)
    return_lambda      lambda of Eq. (19)
    initial_std        of the untrained actor, before tanh
    mpc_rate           step along the gradient of the return; mpc_iterations 0 switches MPC off
    exploration        standard deviation of the noise added to training actions
    bfloat16           run the networks under bfloat16 autocast; losses stay in float32
    cuda_graphs        record `update` and `act` as one CUDA graph each (see `Recorded`)
    linear, unrolled   layers of the actor whose gradient is computed for all imagined steps at once, if
                       `StepLinear` and `unrolled` of mssm.py are given
    Raises ValueError on a horizon of less than 2.
    """

    def __init__(self, model, objective, action_size, units=400, horizon=15, discount=0.99,
                 return_lambda=0.95, initial_std=5.0, model_lr=6e-4, actor_lr=8e-5, critic_lr=8e-5, clip=30.0,
                 mpc_rate=0.003, mpc_iterations=1, exploration=0.3, device="cpu", bfloat16=False,
                 cuda_graphs=False, linear=nn.Linear, unrolled=nullcontext):  # fmt: skip
        if horizon < 2:
            raise ValueError(f"horizon is {horizon}; give 2 or more, as the last imagined state only ends the return")
        self.device, self.bfloat16 = torch.device(device), bfloat16
        self.action_size, self.horizon = action_size, horizon
        self.discount, self.return_lambda = discount, return_lambda
        self.mpc_rate, self.mpc_iterations, self.exploration = mpc_rate, mpc_iterations, exploration
        self.clip, self.unrolled = clip, unrolled

        self.model = model.to(self.device)
        # Autocast begins inside: the way back through a compiled function takes its types from what is around it,
        # and the products of the losses are to stay in float32 there, too.
        objective = self.autocast()(objective)
        self.objective = torch.compile(objective, dynamic=False) if self.device.type == "cuda" else objective
        latent_size = model.latent(*model.initial_state(1, self.device)).shape[-1]
        self.actor = Actor(latent_size, action_size, units, initial_std, linear).to(self.device)
        self.critic = Critic(latent_size, units).to(self.device)
        self.optimisers = {
            "model": self.adam(self.model, model_lr),
            "actor": self.adam(self.actor, actor_lr),
            "critic": self.adam(self.critic, critic_lr),
        }
        self.recorded = [Recorded(self.update), Recorded(self.act)] if cuda_graphs else []
        if cuda_graphs:
            self.update, self.act = self.recorded

    def adam(self, module, learning_rate):
        """Adam with Keras' epsilon [code]; on a GPU one fused kernel, which reads its rate from the GPU."""
        cuda = self.device.type == "cuda"
        if cuda:
            learning_rate = torch.tensor(learning_rate, device=self.device)
        return torch.optim.Adam(module.parameters(), learning_rate, eps=1e-7, fused=cuda, capturable=cuda)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)

    # -- learning --

    def update(self, batch):
        """Appendix A: learn the world model from a batch, then the behaviour in its imagination.

        batch    observation {name: (T, B, ...)}, present (T, B, M), action (T, B, A),
                 reward (T, B); action[t] led to observation[t], which came with reward[t]
        returns  {name: ()} on the device, detached
        """
        # World model: Eq. (17), or another objective
        with self.autocast():
            filtered = self.model.observe(batch["observation"], batch["present"], batch["action"])
        loss, metrics = self.objective(self.model, filtered, batch)
        metrics |= self.optimise({"model": loss})

        # Latent imagination from every posterior state
        start = self.model.state(filtered)  # each (N, D), detached
        layers = [[layer] for layer in self.actor.net if isinstance(layer, nn.Linear)]
        with self.autocast(), self.unrolled(layers):
            latent = imagine(self.model, self.actor.sample, start, self.horizon)
        returns, value = self.returns(latent)  # (H - 1, N)
        steps = torch.arange(len(returns), device=self.device).unsqueeze(-1)
        weight = self.discount**steps  # (H - 1, 1)

        # Actor and critic: Eq. (18)
        losses = {"critic": critic_loss(value, returns, weight), "actor": actor_loss(returns, weight)}
        metrics |= self.optimise(losses)

        with torch.no_grad(), self.autocast():
            metrics["actor_entropy"] = self.actor.entropy(self.model.latent(*start)).mean()
        metrics["imagined_return"] = returns.mean()
        return {name: value.detach() for name, value in metrics.items()}

    def returns(self, latent):
        """Eq. (19) of imagined states, by the predicted rewards and the critic's values.

        latent   (H, N, D_z)
        returns  returns, value (H - 1, N)  the last state is worth what the critic says
        """
        with self.autocast():
            reward, value = self.model.reward(latent[:-1]), self.critic(latent)  # (H - 1, N), (H, N)
        discount = torch.full_like(reward, self.discount)
        return lambda_return(reward, value[:-1], discount, value[-1], self.return_lambda), value[:-1]

    def optimise(self, losses):
        """One Adam step of each module, by its own loss {module: ()} alone.

        Each backward pass is asked for its module's gradients only, so that none of the three losses
        reaches the parameters of another. All of them come before the first step, as losses share a graph.

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
        explore      True in training: sampled actions plus noise; False: the mode, no noise
        returns      action (B, A) in [-1, 1], Memory
        """
        with torch.no_grad(), self.autocast():
            memory = self.forget(memory, first)
            observation = {name: x.unsqueeze(0) for name, x in observation.items()}
            filtered = self.model.observe(
                observation, present.unsqueeze(0), memory.action.unsqueeze(0), memory.state
            )
            state = self.model.state(filtered)
        action = self.plan(state, self.actor.sample if explore else self.actor.mode)
        if explore:
            action = action + self.exploration * torch.randn_like(action)
        action = action.clamp(-1, 1)
        return action, Memory(state, action)

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
        plan = []  # H actions (B, A)

        def follow(latent):
            """The planned action; the policy's own on the first iteration. A leaf of this iteration's graph."""
            with torch.no_grad():
                action = plan[len(leaves)] if plan else policy(latent)
            leaves.append(action.requires_grad_())
            return action

        for _ in range(self.mpc_iterations):
            leaves = []
            with self.autocast():
                latent = imagine(self.model, follow, state, self.horizon)
            returns, _ = self.returns(latent)
            gradients = torch.autograd.grad(returns[0].sum(), leaves)
            plan = [(a + self.mpc_rate * g).detach().clamp(-1, 1) for a, g in zip(leaves, gradients)]
        with torch.no_grad(), self.autocast():
            return plan[0] if plan else policy(self.model.latent(*state))

    # -- checkpoints --

    def state_dict(self):
        """Parameters and optimisers, as tensors and numbers only."""
        return {
            "model": self.model.state_dict(), "actor": self.actor.state_dict(), "critic": self.critic.state_dict(),
            **{f"{name}_optimiser": optimiser.state_dict() for name, optimiser in self.optimisers.items()},
        }  # fmt: skip

    def load_state_dict(self, state):
        """Take over what `state_dict` gave, from any device. Raises RuntimeError where shapes differ."""
        for name, optimiser in self.optimisers.items():
            getattr(self, name).load_state_dict(state[name])
            groups = optimiser.state_dict()["param_groups"]  # this device's kernel; the rates are those given
            optimiser.load_state_dict({"state": state[f"{name}_optimiser"]["state"], "param_groups": groups})
        for function in self.recorded:
            function.graphs.clear()  # they know where Adam's state was


if __name__ == "__main__":

    class Point(NamedTuple):
        x: torch.Tensor  # (N, 2)

    class World(nn.Module):
        """A world that needs no learning: actions move a point, reward falls with its distance from 0."""

        def __init__(self):
            super().__init__()
            self.offset = nn.Parameter(torch.zeros(2))

        def initial_state(self, batch_size, device=None):
            return Point(torch.zeros(batch_size, 2))

        def observe(self, observation, present, action, state=None):
            return observation["x"] + self.offset

        def state(self, filtered):
            return Point(filtered.flatten(0, 1).detach())

        def latent(self, x):
            return x

        def imagine_step(self, state, action):
            return Point(state.x + 0.2 * action)

        def reward(self, latent):
            return -latent.square().sum(-1)

    torch.manual_seed(0)
    objective = lambda model, filtered, batch: (model.offset.square().sum(), {})  # noqa: E731
    agent = Agent(World(), objective, 2, units=32, horizon=8, actor_lr=1e-2, critic_lr=1e-2)
    observation, present, first = {"x": torch.tensor([[0.8, -0.8]])}, torch.ones(1, 1), torch.ones(1).bool()
    for update in range(21):
        if update % 10 == 0:
            memory = agent.initial_memory(1)
            action, memory = agent.act(memory, observation, present, first, explore=False)
            print(f"after {update:2} updates the action {tuple(action.shape)} at (0.8, -0.8) is {action.tolist()}")
        x = torch.rand(4, 4, 2) * 2 - 1
        metrics = agent.update({"observation": {"x": x}, "present": None, "action": None})
