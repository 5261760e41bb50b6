"""agent.py: returns and losses against Eq. (18), (19) written out; who learns from what; acting."""

import contextlib
import gc
import io
import itertools
import math
from typing import NamedTuple

import pytest
import torch
from conftest import D_C, D_H, A, B, T, close, observe, random_batch, take_the_mean, tiny_agent
from torch import nn
from torch.utils._pytree import tree_map

import agent as behaviour
from agent import Actor, Agent, Critic
from methods import METHODS
from mssm import MSSM

H, N = 6, 3


class Point(NamedTuple):
    x: torch.Tensor  # (N, 2)


class World(nn.Module):
    """A known world: actions move a point by a tenth, the reward is minus its squared distance from 0.

    The further to the left the point is, the likelier is the end of the episode.
    """

    def __init__(self):
        super().__init__()
        self.offset = nn.Parameter(torch.ones(2))

    def initial_state(self, batch_size, device=None):
        return Point(torch.zeros(batch_size, 2))

    def observe(self, observation, present, action, state=None, first=None):
        return observation["x"] + 0 * self.offset

    def state(self, filtered):
        return Point(filtered.flatten(0, 1).detach())

    def latent(self, x):
        return x

    def imagine_step(self, state, action):
        return Point(state.x + 0.1 * action)

    def reward(self, latent):
        return -latent.square().sum(-1)

    def continuation(self, latent):
        return latent[..., 0] + 1


def world_batch(x):
    return {"observation": {"x": x}, "present": None, "action": None}


def world_agent(**kwargs):
    objective = lambda model, filtered, batch: (model.offset.square().sum(), {})  # noqa: E731
    return Agent(World(), objective, 2, units=8, **dict(horizon=H) | kwargs)


def modules(agent):
    return {"model": agent.model, "actor": agent.actor, "critic": agent.critic}


def parameters(agent):
    """{module: [values]} as they are now."""
    return {name: [p.detach().clone() for p in module.parameters()] for name, module in modules(agent).items()}


def act_on(agent, batch, memory, t, first, explore=False):
    observation = {name: x[t] for name, x in batch["observation"].items()}
    return agent.act(memory, observation, batch["present"][t], first, explore=explore)


# ---- 1. Lambda-return, Eq. (19) ------------------------------------------------------------------


def n_step_return(reward, value, discount, t, n):
    """V_N^n of step t: n rewards, then the value of the state after them."""
    return sum(discount**k * reward[t + k] for k in range(n)) + discount**n * value[t + n]


def lambda_return_in_python(reward, value, discount, lambda_):
    """Eq. (19) for every step, lists of numbers; value has one number more than reward."""
    returns = []
    for t in range(len(reward)):
        steps = len(reward) - t  # the paper's H, seen from t
        total = sum(lambda_ ** (n - 1) * n_step_return(reward, value, discount, t, n) for n in range(1, steps))
        last = lambda_ ** (steps - 1) * n_step_return(reward, value, discount, t, steps)
        returns.append((1 - lambda_) * total + last)
    return returns


def some_returns(lambda_, discount=0.9):
    reward, value = torch.randn(H, dtype=torch.float64), torch.randn(H + 1, dtype=torch.float64)
    actual = behaviour.lambda_return(reward, value[:-1], torch.full_like(reward, discount), value[-1], lambda_)
    return actual, reward.tolist(), value.tolist()


@pytest.mark.eq(19)
def test_lambda_return_is_the_weighted_sum_of_n_step_returns():
    for lambda_ in (0.0, 0.3, 0.95, 1.0):
        actual, reward, value = some_returns(lambda_)
        close(actual, lambda_return_in_python(reward, value, 0.9, lambda_), 1e-12)


@pytest.mark.eq(19)
def test_lambda_return_at_0_is_one_step_and_at_1_all_rewards():
    actual, reward, value = some_returns(0.0)
    close(actual, [reward[t] + 0.9 * value[t + 1] for t in range(H)], 1e-12)
    actual, reward, value = some_returns(1.0)
    close(actual, [n_step_return(reward, value, 0.9, t, H - t) for t in range(H)], 1e-12)


@pytest.mark.eq(19)
def test_lambda_return_follows_its_recursion_under_a_discount_of_each_step():
    reward, value, discount = torch.rand(3, H, N, dtype=torch.float64)
    bootstrap = torch.rand(N, dtype=torch.float64)
    returns = behaviour.lambda_return(reward, value, discount, bootstrap, 0.8)
    for t in range(H):
        value_after, return_after = (value[t + 1], returns[t + 1]) if t + 1 < H else (bootstrap, bootstrap)
        close(returns[t], reward[t] + discount[t] * (0.2 * value_after + 0.8 * return_after), 1e-12)


# ---- 2. Objectives, Eq. (18) ---------------------------------------------------------------------


@pytest.mark.eq(18)
def test_actor_and_critic_loss_are_the_sums_written_out():
    returns, value, weight = torch.randn(3, H, N, dtype=torch.float64)
    actor = critic = 0.0
    for t, n in itertools.product(range(H), range(N)):
        actor -= (weight[t, n] * returns[t, n]).item()
        critic += (weight[t, n] * (value[t, n] - returns[t, n]) ** 2 / 2).item()
    close(behaviour.actor_loss(returns, weight), actor / (H * N), 1e-12)
    close(behaviour.critic_loss(value, returns, weight), critic / (H * N), 1e-12)


@pytest.mark.eq(18)
def test_critic_loss_treats_the_returns_as_targets():
    value, returns = torch.randn(2, H, N).unbind()
    value.requires_grad_(), returns.requires_grad_()
    behaviour.critic_loss(value, returns, torch.ones(H, 1)).backward()
    close(value.grad, (value - returns) / (H * N))
    assert returns.grad is None


@pytest.mark.eq(18, 19)
@pytest.mark.dev(20)
def test_update_minimises_both_objectives_of_the_imagined_states():
    """The losses of `update`, from the imagined states one number at a time."""
    agent, x = world_agent(discount=0.9, return_lambda=0.8), torch.randn(1, N, 2)
    torch.manual_seed(1)
    latent, _ = behaviour.imagine(agent.model, agent.actor.sample, Point(x[0]), H)
    actor = critic = total = 0.0
    for n in range(N):
        reward, value = agent.model.reward(latent[:, n]).tolist(), agent.critic(latent[:, n]).tolist()
        returns = lambda_return_in_python(reward[:-1], value, 0.9, 0.8)
        total += sum(returns)
        for t in range(H - 1):
            actor -= 0.9**t * returns[t] / (N * (H - 1))
            critic += 0.9**t * (value[t] - returns[t]) ** 2 / 2 / (N * (H - 1))
    torch.manual_seed(1)
    metrics = agent.update(world_batch(x))
    close(metrics["actor_loss"], actor)
    close(metrics["critic_loss"], critic)
    close(metrics["imagined_return"], total / (N * (H - 1)))  # as it is earned: without the weights


@pytest.mark.eq(19)
@pytest.mark.dev(22)
def test_where_an_episode_may_end_its_future_counts_less():
    """Two steps by hand: discounts 0.8 * 1 and 0.8 * 0.5, then R_1 = 2 + 0.4 * 10 and R_0 = 1 + 0.8 * (4 + 6) / 2."""
    agent = world_agent(horizon=3, discount=0.8, return_lambda=0.5, continuation=True)
    agent.model.reward = lambda latent: latent[..., 0]
    agent.critic = lambda latent: latent[..., 1]
    agent.model.continuation = lambda latent: torch.logit(latent[..., 2])
    latent = torch.tensor([[[1.0, 7.0, 1.0]], [[2.0, 4.0, 0.5]], [[100.0, 10.0, 0.0]]])  # reward, value, continuation
    returns, value, weight = agent.returns(latent)
    close(returns, [[5.0], [6.0]])
    close(value, [[7.0], [4.0]])
    close(weight, [[1.0], [0.8]])  # and not 0.4: step 1 is reached if the episode goes on after step 0
    agent.continuation = False
    returns, _, weight = agent.returns(latent)
    close(returns, [[1 + 0.8 * (4 + 10) / 2], [2 + 0.8 * 10]])
    close(weight, [[1.0], [0.8]])


@pytest.mark.eq(18, 19)
@pytest.mark.dev(20, 22)
def test_update_minimises_both_objectives_where_episodes_may_end():
    """As above, with a discount of each imagined state's own: 0.9 times the probability that the episode goes on.

    The second start state is the last of an episode: nothing is imagined from there.
    """
    agent, x = world_agent(discount=0.9, return_lambda=0.8, continuation=True), torch.randn(1, N, 2)
    torch.manual_seed(1)
    latent, _ = behaviour.imagine(agent.model, agent.actor.sample, Point(x[0]), H)
    actor = critic = imagined = 0.0
    for n in (0, 2):
        reward, value = agent.model.reward(latent[:, n]).tolist(), agent.critic(latent[:, n]).tolist()
        discount = [0.9 / (1 + math.exp(-left - 1)) for left in latent[:, n, 0].tolist()]
        for t in range(H - 1):
            total, steps = 0.0, H - 1 - t
            for k in range(1, steps + 1):  # k rewards, then the value of the state after them
                sums = sum(math.prod(discount[t : t + i]) * reward[t + i] for i in range(k))
                sums += math.prod(discount[t : t + k]) * value[t + k]
                total += sums * 0.8 ** (k - 1) * (0.2 if k < steps else 1)
            weight = math.prod(discount[:t])
            actor -= weight * total / (N * (H - 1))
            critic += weight * (value[t] - total) ** 2 / 2 / (N * (H - 1))
            imagined += total / (2 * (H - 1))
    torch.manual_seed(1)
    metrics = agent.update(world_batch(x) | {"continues": torch.tensor([[1.0, 0.0, 1.0]])})
    close(metrics["actor_loss"], actor)
    close(metrics["critic_loss"], critic)
    close(metrics["imagined_return"], imagined)


@pytest.mark.dev(22)
def test_an_action_is_blamed_for_the_end_it_leads_to_but_weights_are_no_way_to_learn():
    agent = world_agent(continuation=True)
    agent.model.reward = lambda latent: torch.ones(latent.shape[:-1])
    agent.critic = lambda latent: torch.ones(latent.shape[:-1])
    latent = torch.randn(H, N, 2, requires_grad=True)
    returns, _, weight = agent.returns(latent)
    assert not weight.requires_grad and (weight[1:] < 0.99).all()
    returns.sum().backward()
    assert (latent.grad[:-1, :, 0] > 0).all() and (latent.grad[-1] == 0).all() and (latent.grad[..., 1] == 0).all()


@pytest.mark.dev(22)
def test_without_continuation_the_head_is_not_asked(monkeypatch):
    """The same numbers as of a world that has none."""
    metrics, x = [], torch.randn(1, N, 2)
    for head in (World.continuation, None):
        monkeypatch.setattr(World, "continuation", head)
        torch.manual_seed(1)
        metrics.append(world_agent().update(world_batch(x)))
    assert all(torch.equal(value, metrics[1][name]) for name, value in metrics[0].items())


# ---- 3. Who learns from what ---------------------------------------------------------------------


def test_each_loss_reaches_the_parameters_of_its_own_module_alone(monkeypatch):
    """Neither a gradient nor a step anywhere else, and the model learns first, then critic and actor."""
    agent, order = tiny_agent(clip=1e9), []
    optimise = agent.optimise

    def watched(losses):
        own = {name: list(modules(agent)[name].parameters()) for name in losses}
        alone = {name: torch.autograd.grad(loss, own[name], retain_graph=True) for name, loss in losses.items()}
        for module in modules(agent).values():
            module.zero_grad(set_to_none=True)
        before = parameters(agent)
        metrics = optimise(losses)
        for other, values in parameters(agent).items():
            moved = any(not torch.equal(new, old) for new, old in zip(values, before[other]))
            has_gradient = any(p.grad is not None for p in modules(agent)[other].parameters())
            assert moved == has_gradient == (other in losses), f"a loss of {list(losses)} reaches the {other}"
        for name, gradients in alone.items():
            for parameter, gradient in zip(own[name], gradients):
                close(parameter.grad, gradient)  # and no other loss had a part in it
        order.extend(losses)
        return metrics

    monkeypatch.setattr(agent, "optimise", watched)
    agent.update(random_batch())
    assert order == ["model", "critic", "actor"]


def test_the_actor_learns_through_the_dynamics():
    """Its gradient is that of the imagined returns."""
    agent, batch = world_agent(), world_batch(torch.randn(1, N, 2))
    losses = {}
    agent.optimise = lambda new: losses.update(new) or {}
    agent.update(batch)
    gradients = torch.autograd.grad(losses["actor"], list(agent.actor.parameters()))
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_an_imagined_action_is_credited_with_all_that_follows():
    """In the known world, with values 0: d/da_t of sum_k (discount lambda)^k r_k, in closed form."""
    agent, start, moves = world_agent(discount=0.9, return_lambda=0.8), torch.randn(N, 2), (torch.rand(H, N, 2) / 2).requires_grad_()
    agent.critic = lambda latent: torch.zeros(latent.shape[:-1])
    plan = iter(moves)
    latent, _ = agent.imagine(lambda _: next(plan), Point(start))
    gradient = torch.autograd.grad(agent.returns(latent)[0][0].sum(), moves)[0]
    x = start.double() + 0.1 * moves.detach().double().cumsum(0)
    for t in range(H):
        close(gradient[t], sum((0.72**k * -2 * x[k] * 0.1 for k in range(t, H - 1)), torch.zeros(N, 2)))


@pytest.mark.dev(25)
@pytest.mark.parametrize("fast", [True, False])
def test_the_world_model_can_learn_alone(fast):
    """As in a whole update, which comes to it first; actor and critic are left as they are."""
    batch, learnt = random_batch(), []
    for alone in (False, True):
        agent = tiny_agent(fast=fast)
        before = parameters(agent)
        torch.manual_seed(1)
        metrics = agent.update(batch, behaviour=not alone)
        learnt.append((parameters(agent)["model"], metrics))
        for name, module in modules(agent).items():
            moved = any(not torch.equal(new, old) for new, old in zip(parameters(agent)[name], before[name]))
            has_gradient = any(p.grad is not None for p in module.parameters())
            assert moved == has_gradient == (name == "model" or not alone)
            assert (f"{name}_loss" in metrics) == (f"{name}_grad_norm" in metrics) == (name == "model" or not alone)
        assert len(agent.optimisers["actor"].state) == 0 or not alone
    (expected, all_metrics), (actual, metrics) = learnt
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))
    assert metrics and all(torch.equal(all_metrics[name], value) for name, value in metrics.items())


@pytest.mark.parametrize("method", METHODS)
def test_every_parameter_moves_and_belongs_to_one_optimiser(method):
    agent = tiny_agent(method, fused_kl_scale=0.0 if method in ("cvrl", "dreamer") else 0.1, continuation="on")
    owned = [p for optimiser in agent.optimisers.values() for group in optimiser.param_groups for p in group["params"]]
    every = {p: f"{part}.{name}" for part, module in modules(agent).items() for name, p in module.named_parameters()}
    assert len(owned) == len(set(owned)) and set(owned) == set(every)
    before = {p: p.detach().clone() for p in every}
    for _ in range(3):
        metrics = agent.update(random_batch() | {"continues": (torch.rand(T, B) > 0.2).float()})
    assert [every[p] for p in every if torch.equal(p, before[p])] == []
    assert all(x.isfinite() and x.shape == () and not x.requires_grad for x in metrics.values())


def test_the_gradient_is_clipped_by_its_global_norm_and_reported_before():
    agent, batch = tiny_agent(clip=1e-3), random_batch()
    metrics = agent.update(batch)
    for name, module in modules(agent).items():
        squares = sum(p.grad.square().sum().item() for p in module.parameters() if p.grad is not None)
        assert metrics[f"{name}_grad_norm"] > 1e-3
        assert math.sqrt(squares) == pytest.approx(1e-3, rel=1e-2)


def test_each_optimiser_has_its_own_learning_rate():
    agent = tiny_agent(model_lr=1.0, actor_lr=2.0, critic_lr=3.0)
    groups = {name: optimiser.param_groups[0] for name, optimiser in agent.optimisers.items()}
    assert {name: group["lr"] for name, group in groups.items()} == {"model": 1.0, "actor": 2.0, "critic": 3.0}
    for name, module in modules(agent).items():
        assert set(groups[name]["params"]) == set(module.parameters()) and groups[name]["eps"] == 1e-7


@pytest.mark.dev(14)
def test_update_in_bfloat16_keeps_losses_and_parameters_in_float32():
    agent, batch = tiny_agent(precision="bfloat16"), random_batch()
    torch.manual_seed(1)
    metrics = agent.update(batch)
    assert all(x.dtype == torch.float32 and x.isfinite() for x in metrics.values())
    assert all(p.dtype == torch.float32 for values in parameters(agent).values() for p in values)
    agent = tiny_agent(precision="float32")
    torch.manual_seed(1)
    exact = agent.update(batch)
    assert metrics["model_loss"] == pytest.approx(exact["model_loss"].item(), rel=0.05)


@pytest.mark.dev(26)
def test_imagination_runs_on_the_model_after_its_step(monkeypatch):
    agent, seen = tiny_agent(), []
    imagine, before = behaviour.imagine, parameters(agent)["model"]
    spy = lambda *arguments: seen.append(parameters(agent)["model"]) or imagine(*arguments)  # noqa: E731
    monkeypatch.setattr(behaviour, "imagine", spy)
    agent.update(random_batch())
    assert all(torch.equal(x, y) for x, y in zip(seen[0], parameters(agent)["model"]))
    assert not all(torch.equal(x, y) for x, y in zip(seen[0], before))


# ---- 4. Imagination ------------------------------------------------------------------------------


def test_imagined_states_are_what_the_actions_lead_to():
    start, moves = torch.randn(N, 2), torch.rand(H, N, 2)
    plan = iter(moves)
    latent, action = behaviour.imagine(World(), lambda _: next(plan), Point(start), H)
    close(latent, start + 0.1 * moves.cumsum(0))
    assert torch.equal(action, moves)


def test_saturated_actions_and_sign_changes_are_fractions_of_the_imagined_actions():
    """Of H steps, N states and two actions each, some chosen by hand."""
    agent, x = world_agent(), torch.randn(1, N, 2)
    moves = torch.full((H, N, 2), 0.5)
    moves[0] = -0.5  # every sign changes after the first step,
    moves[3, 1, 0], moves[2, 0, 0] = -0.98, -1.0  # and two of them to and fro
    moves[4, 2, 1], moves[5, 2, 1], moves[5, 0, 0] = 0.991, 1.0, 0.99
    plan = iter(moves)
    agent.actor.sample = lambda latent: next(plan)
    metrics = agent.update(world_batch(x))
    close(metrics["saturated_actions"], 3 / (H * N * 2))  # 0.99 itself is none
    close(metrics["action_sign_changes"], (N * 2 + 2 + 2) / ((H - 1) * N * 2))


def test_imagination_starts_detached_and_the_policy_sees_no_gradient(monkeypatch):
    agent, seen = tiny_agent(), []
    imagine = behaviour.imagine

    def spy(model, policy, state, horizon):
        watched = lambda latent: seen.append(latent) or policy(latent)  # noqa: E731
        assert all(x.shape[0] == T * B and not x.requires_grad for x in state)
        latent, action = imagine(model, watched, state, horizon)
        assert latent.requires_grad and action.requires_grad
        return latent, action

    monkeypatch.setattr(behaviour, "imagine", spy)
    agent.update(random_batch())
    assert len(seen) == agent.horizon and not any(latent.requires_grad for latent in seen)


# ---- 5. Actor and critic -------------------------------------------------------------------------


@pytest.mark.fig(12, 13)
def test_actor_and_critic_have_the_released_parameter_counts():
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    assert count(Actor(230, 2)) == 575_204 and count(Critic(230)) == 413_601
    for net, linear in ((Actor(230, 2).net, 5), (Critic(230).net, 4)):  # Fig. 12, 13
        assert [type(layer) for layer in net] == ([nn.Linear, nn.ELU] * linear)[:-1]


@pytest.mark.dev(12, 24)
def test_actor_is_a_tanh_of_a_bounded_normal():
    actor, latent = Actor(17, 1, units=8), torch.randn(1, 17)
    raw_mean, raw_std = actor.net(latent).double()[0]
    mean, std = 5 * torch.tanh(raw_mean / 5), (1 + (raw_std + math.log(math.exp(5) - 1)).exp()).log() + 1e-4
    mean, std = mean.detach(), std.detach()
    close(actor(latent)[0], mean.view(1, 1))
    close(actor(latent)[1], std.view(1, 1))
    close(actor.mode(latent), mean.tanh().view(1, 1))  # not the best of 100 samples
    samples = actor.sample(latent.expand(20_000, -1))
    assert (samples.abs() <= 1).all()
    noise = torch.randn(9, 1)
    close(behaviour.squash(actor.net(latent).expand(9, 2), 5.0, noise), torch.tanh(mean + std * noise))
    inside = (samples > 0).double().mean().item()
    assert inside == pytest.approx(torch.distributions.Normal(-mean, std).cdf(torch.tensor(0.0)).item(), abs=0.02)


def test_a_horizon_of_one_is_refused():
    with pytest.raises(ValueError, match="horizon is 1; give 2 or more"):
        world_agent(horizon=1)


# ---- 6. Acting -----------------------------------------------------------------------------------


def test_acting_filters_as_training_does(monkeypatch):
    """The state that acting carries is what `observe` infers from the whole episode and its actions."""
    take_the_mean(monkeypatch)
    agent, batch = tiny_agent(), random_batch()
    memory, actions = agent.initial_memory(B), [torch.zeros(B, A)]
    for t in range(T):
        action, memory = act_on(agent, batch, memory, t, torch.full((B,), t == 0), explore=True)
        actions.append(action)
    filtered = observe(agent.model, batch | {"action": torch.stack(actions[:-1])})
    close(memory.state.h, filtered.h[-1])
    close(memory.state.s_c, filtered.s_c[-1])
    assert torch.equal(memory.action, action)


def test_acting_and_training_call_the_same_fusion_and_posterior(monkeypatch):
    agent, batch, calls = tiny_agent(), random_batch(), []
    for name in ("encode", "fuse", "posterior"):
        original = getattr(MSSM, name)
        spy = lambda *args, name=name, original=original: calls.append(name) or original(*args)  # noqa: E731
        monkeypatch.setattr(MSSM, name, spy)
    agent.update(batch)
    assert calls == ["encode", "fuse"] + T * ["posterior"]
    calls.clear()
    act_on(agent, batch, agent.initial_memory(B), 0, torch.ones(B).bool())
    assert calls == ["encode", "fuse", "posterior"]


def test_an_episodes_first_decision_forgets_the_memory(monkeypatch):
    take_the_mean(monkeypatch)
    agent, batch = tiny_agent(), random_batch()
    _, memory = act_on(agent, batch, agent.initial_memory(B), 0, torch.ones(B).bool())
    action, after = act_on(agent, batch, memory, 1, torch.tensor([True, False, True]))
    fresh_action, fresh = act_on(agent, batch, agent.initial_memory(B), 1, torch.ones(B).bool())
    for i, forgotten in enumerate([True, False, True]):
        assert torch.allclose(action[i], fresh_action[i], atol=1e-6) == forgotten
        assert torch.allclose(after.state.h[i], fresh.state.h[i], atol=1e-6) == forgotten


def test_exploration_noise_only_with_explore(monkeypatch):
    agent, batch = tiny_agent(), random_batch(1)
    batch = {"observation": {k: x.repeat_interleave(200, 1) for k, x in batch["observation"].items()},
             "present": batch["present"].repeat_interleave(200, 1)}  # fmt: skip
    policies = []
    monkeypatch.setattr(agent, "plan", lambda state, policy: policies.append(policy) or torch.zeros(len(state.h), A))
    memory, first = agent.initial_memory(200 * B), torch.ones(200 * B).bool()
    action, after = act_on(agent, batch, memory, 0, first, explore=False)
    assert (action == 0).all() and policies[-1] == agent.actor.mode
    action, after = act_on(agent, batch, memory, 0, first, explore=True)
    assert action.std().item() == pytest.approx(0.3, rel=0.1) and policies[-1] == agent.actor.sample
    assert torch.equal(after.action, action)
    agent.sample_in_evaluation = True  # sampled actions, but no noise on them
    action, after = act_on(agent, batch, memory, 0, first, explore=False)
    assert (action == 0).all() and policies[-1] == agent.actor.sample


@pytest.mark.dev(12)
def test_evaluation_can_sample_the_actor(monkeypatch):
    """Sampled, an untrained actor's actions differ from call to call; its modes do not."""
    take_the_mean(monkeypatch)  # of the states, not of the actions
    batch, first = random_batch(), torch.ones(B).bool()
    for act_by, differ in (("sample", True), ("mode", False)):
        agent = tiny_agent(act_by=act_by)
        actions = [act_on(agent, batch, agent.initial_memory(B), 0, first)[0] for _ in range(2)]
        assert torch.equal(*actions) != differ and all((x.abs() <= 1).all() for x in actions)


def test_actions_stay_within_their_bounds():
    agent, batch = tiny_agent(exploration=5.0, mpc_rate=100.0), random_batch()
    for explore in (True, False):
        action, _ = act_on(agent, batch, agent.initial_memory(B), 0, torch.ones(B).bool(), explore)
        assert action.shape == (B, A) and (action.abs() <= 1).all() and not action.requires_grad


# ---- 7. Latent-guided MPC ------------------------------------------------------------------------


@pytest.mark.dev(13)
def test_mpc_follows_the_gradient_of_each_environments_own_return():
    """In the known world, with values 0: d/da_0 of sum_k (discount lambda)^k r_k, in closed form."""
    agent, start, moves = world_agent(discount=0.9, return_lambda=0.8, mpc_rate=0.5), torch.randn(N, 2), torch.rand(H, N, 2) / 2
    agent.critic = lambda latent: torch.zeros(latent.shape[:-1])
    plan = iter(moves)
    action = agent.plan(Point(start), lambda _: next(plan))
    x = start.double() + 0.1 * moves.double().cumsum(0)
    gradient = sum(0.72**k * -2 * x[k] * 0.1 for k in range(H - 1))
    close(action, (moves[0] + 0.5 * gradient).clamp(-1, 1))


@pytest.mark.dev(22)
def test_mpc_avoids_the_end_of_the_episode():
    """The gradient of sum_k (product of the discounts before k) lambda^k r_k, each discount depending on its state."""
    agent = world_agent(discount=0.9, return_lambda=0.8, mpc_rate=0.5, continuation=True)
    agent.critic = lambda latent: torch.zeros(latent.shape[:-1])
    start, moves = torch.randn(N, 2), torch.rand(H, N, 2) / 2
    plan = iter(moves)
    action = agent.plan(Point(start), lambda _: next(plan))
    first = moves[0].double().requires_grad_()
    x = start.double() + 0.1 * torch.cat([first.unsqueeze(0), moves[1:].double()]).cumsum(0)
    total, left = 0.0, torch.ones(N, dtype=torch.float64)
    for k in range(H - 1):
        total = total - left * x[k].square().sum(-1)
        left = left * 0.8 * 0.9 / (1 + (-x[k, :, 0] - 1).exp())
    close(action, (first + 0.5 * torch.autograd.grad(total.sum(), first)[0]).clamp(-1, 1))


@pytest.mark.dev(13)
def test_an_environments_action_depends_on_its_own_observation_alone():
    agent, batch = tiny_agent(mpc_rate=1.0), random_batch()
    batch["present"][0] = True
    act = lambda: act_on(agent, batch, agent.initial_memory(B), 0, torch.ones(B).bool())[0]  # noqa: E731
    torch.manual_seed(1)
    before = act()
    batch["observation"]["rgb"][0, 1] = 255 - batch["observation"]["rgb"][0, 1]
    torch.manual_seed(1)
    after = act()
    assert [torch.allclose(before[i], after[i], atol=1e-6) for i in range(B)] == [True, False, True]


def test_the_way_back_through_a_compiled_objective_has_the_types_of_a_plain_one():
    """The losses' products are in float32 there, too, though networks run under autocast."""
    batch, gradients = random_batch(), []
    for compiled in (False, True):
        agent = tiny_agent(precision="bfloat16", seed=1)
        if compiled:
            agent.objective = torch.compile(agent.objective, backend="aot_eager")
        agent.update(batch)
        gradients.append([p.grad for p in agent.model.parameters()])
    for actual, expected in zip(*gradients):
        close(actual / expected.abs().max(), expected / expected.abs().max(), 1e-4)


def test_without_mpc_the_policy_runs_as_with_it():
    agent, seen = tiny_agent(mpc_iterations=0, precision="bfloat16"), []
    agent.actor.net[0].register_forward_hook(lambda layer, x, y: seen.append(y))
    action = agent.plan(agent.model.initial_state(N), agent.actor.sample)
    assert action.shape == (N, A)
    assert [(x.dtype, x.requires_grad) for x in seen] == [(torch.bfloat16, False)]


def test_mpc_raises_the_planned_return():
    agent, start = world_agent(mpc_rate=0.1), torch.randn(N, 2)
    policy = lambda latent: torch.full((len(latent), 2), 0.1)  # noqa: E731

    def planned_return(first):
        plan = iter([first] + [policy(start)] * (H - 1))
        return agent.returns(behaviour.imagine(agent.model, lambda _: next(plan), Point(start), H)[0])[0][0]

    without, one = policy(start), agent.plan(Point(start), policy)
    assert (planned_return(one) > planned_return(without)).all()
    agent.mpc_iterations = 4
    assert (planned_return(agent.plan(Point(start), policy)) > planned_return(one)).all()
    agent.mpc_iterations = 0
    assert torch.equal(agent.plan(Point(start), policy), without)


def test_planning_leaves_no_gradient_behind():
    agent, batch = tiny_agent(), random_batch()
    act_on(agent, batch, agent.initial_memory(B), 0, torch.ones(B).bool(), explore=True)
    assert all(p.grad is None for module in modules(agent).values() for p in module.parameters())


# ---- 8. Checkpoints and compilation --------------------------------------------------------------


def test_a_checkpoint_goes_on_exactly():
    """Through torch.save and torch.load(weights_only=True) into an agent of another seed."""
    agent, batch, file = tiny_agent(), random_batch(), io.BytesIO()
    agent.update(batch)
    torch.save(agent.state_dict(), file)
    file.seek(0)
    other = tiny_agent(seed=2)
    other.load_state_dict(torch.load(file, weights_only=True))
    metrics = []
    for continued in (agent, other):
        torch.manual_seed(1)
        metrics.append(continued.update(batch))
    assert all(torch.equal(value, metrics[1][name]) for name, value in metrics[0].items())
    after, others = parameters(agent), parameters(other)
    assert all(torch.equal(a, b) for name in after for a, b in zip(after[name], others[name]))


def test_imagination_and_returns_compile_into_one_graph(monkeypatch):
    take_the_mean(monkeypatch)
    agent = tiny_agent(fast=False)
    state = agent.model.initial_state(N)._replace(h=torch.randn(N, D_H), s_c=torch.randn(N, D_C))

    def run(state):
        latent, action = behaviour.imagine(agent.model, agent.actor.mode, state, 3)
        returns, value, weight = agent.returns(latent)
        return latent, action, behaviour.actor_loss(returns, weight), behaviour.critic_loss(value, returns, weight)

    for actual, expected in zip(torch.compile(run, fullgraph=True, backend="eager")(state), run(state)):
        close(actual, expected)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_an_update_and_a_decision_never_wait_for_a_value(monkeypatch, method):
    """A CUDA graph knows no values. Tensors of the meta device have none: asking for one would raise."""
    agent = tiny_agent(method)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # which meta does not know
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    for name in agent.optimisers:
        agent.optimisers[name] = behaviour.Agent.adam(agent, getattr(agent, name).to("meta"), 1e-3)
    agent.device = torch.device("meta")
    batch = tree_map(lambda x: x.to("meta"), random_batch())
    metrics = agent.update(batch)
    assert {x.device.type for x in metrics.values()} == {"meta"} and {x.shape for x in metrics.values()} == {()}
    memory, observation = agent.initial_memory(B), {name: x[0] for name, x in batch["observation"].items()}
    first = torch.ones(B, dtype=torch.bool, device="meta")
    action, _ = agent.act(memory, observation, batch["present"][0], first, explore=True)
    assert action.shape == (B, A)


def test_an_update_leaves_nothing_behind():
    """The gradients of `StepLinear`s pass through a list; a reference too many would keep every graph alive."""
    agent, batch = tiny_agent(), random_batch()

    def tensors():
        gc.collect()
        return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())

    agent.update(batch)
    agent.update(batch)
    before = tensors()
    agent.update(batch)
    assert tensors() == before
