"""The five methods: their objectives written out, what the configuration reaches, seeds, schedule, batches."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import D_F, D_H, D_X, MODALITIES, A, B, Config, T, close, observe, random_batch, tiny_agent, tiny_config  # fmt: skip
from test_mummi_loss import info_nce_in_python
from torch.distributions import Normal, kl_divergence

import checkpoint
import envs
import methods
import mummi_loss
import replay
from agent import Agent
from config import to_act
from fast import FastAgent, FastMSSM, choose_precision
from methods import METHODS
from mssm import MSSM

N = T * B
CPU = torch.device("cpu")


def world_model_loss(method="mummi", **kwargs):
    """The loss of a tiny model on a random batch, always with the same weights, batch and noise."""
    agent, batch = tiny_agent(method, **kwargs), random_batch()
    filtered = observe(agent.model, batch)
    loss, metrics = agent.objective(agent.model, filtered, batch)
    return agent.model, filtered, batch, loss, metrics


def reward_and_kl(model, filtered, batch, free_nats):
    """log p(r | z) - max(KL, free nats), from torch.distributions in float64."""
    reward = model.reward(torch.cat([filtered.s_c, filtered.h], -1)).double()
    log_reward = Normal(reward, 1.0).log_prob(batch["reward"].double()).mean()
    posterior = Normal(filtered.mean.double(), filtered.std.double())
    prior = Normal(filtered.prior_mean.double(), filtered.prior_std.double())
    return log_reward - max(kl_divergence(posterior, prior).sum(-1).mean(), torch.tensor(free_nats))


def mean_bound(log_f, present):
    """Mean over the present rows of Eq. (15), by a softmax over them, which has a gradient; its value in Python, too."""
    present = present.flatten()
    bound = log_f[present][:, present].log_softmax(-1).diagonal().mean()
    close(bound, info_nce_in_python(log_f, present).sum() / present.sum())
    return bound


def same(loss, expected, model):
    """In value and in gradient: a loss that holds a gradient back has the right value all the same."""
    close(loss, expected)
    parameters = dict(model.named_parameters())
    gradients = [torch.autograd.grad(x, [*parameters.values()], retain_graph=True, allow_unused=True) for x in (loss, expected)]
    for name, actual, right in zip(parameters, *gradients):
        assert (actual is None) == (right is None), name
        if right is not None:
            assert (actual - right).norm() <= 1e-4 * right.norm() + 1e-6, name


def minus_distances(g_z, x):
    return -torch.cdist(g_z.double(), x.flatten(0, 1).double()).square()


@pytest.mark.fig(3)
@pytest.mark.eq(15, 16, 17)
@pytest.mark.dev(5, 8)
def test_mummi_sums_a_bound_for_each_expert():
    model, filtered, batch, loss, _ = world_model_loss("mummi", free_nats=0.1)
    g_z = model.g(torch.cat([filtered.s_c, filtered.h], -1)).flatten(0, 1)
    total = reward_and_kl(model, filtered, batch, 0.1)
    for m, weight in enumerate([1.0, 1.0, 0.001]):  # rgb, depth, touch
        total += weight * mean_bound(minus_distances(g_z, filtered.fused.expert_mean[:, :, m]), batch["present"][..., m])
    same(loss, -total, model)


@pytest.mark.eq(17)
def test_mummi_b_has_one_bound_of_the_fused_mean():
    model, filtered, batch, loss, _ = world_model_loss("mummi_b", free_nats=0.1)
    g_z = model.g(torch.cat([filtered.s_c, filtered.h], -1)).flatten(0, 1)
    bound = mean_bound(minus_distances(g_z, filtered.fused.mean), batch["present"].any(-1))
    same(loss, -(bound + reward_and_kl(model, filtered, batch, 0.1)), model)


def test_cvrl_has_one_bound_of_projected_latents_and_features():
    model, filtered, batch, loss, _ = world_model_loss("cvrl", free_nats=0.1)
    z = model.project_z(torch.cat([filtered.s_c, filtered.h], -1)).flatten(0, 1).double()
    x = model.project_x(filtered.fused.s_f).flatten(0, 1).double()
    bound = mean_bound(torch.einsum("id,jd->ij", z, x), batch["present"].any(-1))
    same(loss, -(bound + reward_and_kl(model, filtered, batch, 0.1)), model)


@pytest.mark.eq(10)
@pytest.mark.parametrize("method", ["mssm_e", "dreamer"])
def test_elbo_reconstructs_every_modality_that_is_present(method):
    model, filtered, batch, loss, _ = world_model_loss(method, free_nats=0.1)
    decoded, total = model.decode(torch.cat([filtered.s_c, filtered.h], -1)), 0.0
    for m, name in enumerate(MODALITIES):
        x = model.scale(batch["observation"], batch["present"])[name].double()
        log_likelihood = Normal(decoded[name].double(), 1.0).log_prob(x).flatten(2).sum(-1)
        total += log_likelihood[batch["present"][..., m]].sum() / N
    same(loss, -(total + reward_and_kl(model, filtered, batch, 0.1)), model)


def test_five_methods_are_five_pairs_of_fusion_and_objective():
    assert METHODS == {
        "mummi": ("product", "g", mummi_loss.mummi),
        "mummi_b": ("product", "g", mummi_loss.mummi_b),
        "mssm_e": ("product", "decoders", mummi_loss.elbo),
        "cvrl": ("concatenate", "projections", mummi_loss.cvrl),
        "dreamer": ("concatenate", "decoders", mummi_loss.elbo),
    }


def test_every_size_of_the_configuration_lands_where_it_belongs():
    """make_agent passes many numbers by name."""
    sizes = dict(d_h=3, d_c=5, d_f=7, hidden=11, units=13, channels=1)
    behaviour = dict(horizon=17, discount=0.9, return_lambda=0.8, clip=19.0, mpc_rate=0.7, mpc_iterations=2, exploration=0.6)
    agent = tiny_agent(**sizes | behaviour)
    assert {name: getattr(agent, name) for name in behaviour} == behaviour
    model = agent.model
    assert (model.d_h, model.d_c, model.d_s_f, model.g[0].out_features) == (3, 5, 7, 7)
    assert model.prior_net[0].out_features == model.posterior_net[0].out_features == 11
    assert model.reward_net[0].out_features == agent.actor.net[0].out_features == agent.critic.net[0].out_features == 13
    assert model.encoders[0][0].out_channels == 1
    rates = tiny_agent(model_lr=1.0, actor_lr=2.0, critic_lr=3.0, initial_std=0.25)
    assert [optimiser.param_groups[0]["lr"] for optimiser in rates.optimisers.values()] == [1.0, 2.0, 3.0]
    assert rates.actor.initial_std == 0.25
    fields = {field.name for field in dataclasses.fields(Config)}
    assert {*methods.MODEL, *methods.BEHAVIOUR} <= fields


@pytest.mark.parametrize("field", [
    pytest.param(dict(expert_power=1), marks=pytest.mark.dev(1)),
    pytest.param(dict(sample_s_f=False), marks=pytest.mark.dev(2)),
    pytest.param(dict(prior_if_unobserved=False), marks=pytest.mark.dev(3)),
    pytest.param(dict(absent_logit=-10.0), marks=pytest.mark.dev(4)),
    pytest.param(dict(over_present=False), marks=pytest.mark.dev(5)),
    pytest.param(dict(weights=("touch=1.0",)), marks=pytest.mark.dev(8)),
    pytest.param(dict(free_nats=100.0), marks=pytest.mark.dev(19)),
    dict(reward_weight=2.0),
], ids=lambda field: next(iter(field)))  # fmt: skip
def test_the_field_of_a_deviation_reaches_the_loss(field):
    assert world_model_loss(**field)[-2] != world_model_loss()[-2]


@pytest.mark.eq(9, 17)
@pytest.mark.dev(6)
@pytest.mark.parametrize("method", ["mummi", "mummi_b", "mssm_e"])
def test_the_kl_of_the_fused_observation_has_its_weight(method):
    """Mean over the steps at which anything is present; at weight 0, the default, no such network exists."""
    assert Config().fused_kl_scale == 0
    agent, batch = tiny_agent(method, fused_kl_scale=10), random_batch()
    model, filtered = agent.model, observe(agent.model, batch)
    with_kl, _ = agent.objective(model, filtered, batch)
    lambdas = mummi_loss.Weights({"touch": 0.001}, free_nats=0.0)
    without, _ = METHODS[method][2](model, filtered, batch, lambdas)
    q = Normal(filtered.fused.mean.double(), filtered.fused.std.double())
    kl = kl_divergence(q, Normal(*(x.double() for x in model.fused_prior(filtered.s_c)))).sum(-1)
    close(with_kl - without, 10 * kl[batch["present"].any(-1)].mean(), 1e-4)
    same(mummi_loss.fused_kl(model, filtered, mummi_loss.Weights(fused_kl=10)), 10 * kl[batch["present"].any(-1)].mean(), model)


@pytest.mark.eq(12)
def test_logged_information_is_the_bound_plus_log_of_the_number_present():
    model, filtered, batch, _, metrics = world_model_loss("mummi")
    g_z = model.g(torch.cat([filtered.s_c, filtered.h], -1)).flatten(0, 1)
    for m, name in enumerate(MODALITIES):
        present = batch["present"][..., m]
        bound = mean_bound(minus_distances(g_z, filtered.fused.expert_mean[:, :, m]), present)
        close(metrics[f"information_{name}"], bound + present.sum().log())


def test_the_reward_error_is_logged_as_two_sums():
    """Its mean square and the rewards' variance, whose quotient is taken once over many updates."""
    model, filtered, batch, _, metrics = world_model_loss(reward_weight=3.0)
    error = model.reward(torch.cat([filtered.s_c, filtered.h], -1)) - batch["reward"]
    close(metrics["reward_square_error"], error.double().square().mean())
    close(metrics["reward_variance"], batch["reward"].double().var(correction=0))


def test_the_kl_is_logged_as_it_is_not_as_it_counts():
    _, filtered, _, _, metrics = world_model_loss(free_nats=100.0)
    posterior, prior = Normal(filtered.mean, filtered.std), Normal(filtered.prior_mean, filtered.prior_std)
    close(metrics["kl"], kl_divergence(posterior, prior).sum(-1).mean())
    assert metrics["kl"] < 100


@pytest.mark.dev(8)
def test_each_sensor_has_the_weight_that_its_name_is_given():
    """Named ones theirs, all others 1; several at once."""
    batch = random_batch()
    bounds = []
    for weights in ((), ("rgb=0",), ("depth=0",), ("touch=0",), ("rgb=2.5", "touch=1e-2")):
        agent = tiny_agent(weights=weights)
        torch.manual_seed(1)
        bounds.append(agent.objective(agent.model, observe(agent.model, batch), batch)[0].item())
    every, *parts, mixed = bounds
    rgb, depth, touch = (every - part for part in parts)
    assert all(abs(x) > 0.1 for x in (rgb, depth, touch))
    close(mixed - every, 1.5 * rgb - 0.99 * touch, 1e-4)


@pytest.mark.dev(22)
@pytest.mark.parametrize("method", METHODS)
def test_continuation_adds_the_log_likelihood_of_going_on(method):
    """log p(continues | z), a Bernoulli's; its weight is 1 whatever the reward's."""
    agent, batch = tiny_agent(method, continuation="on", reward_weight=7.0), random_batch()
    torch.nn.init.normal_(agent.model.continuation_net[-1].bias)
    filtered, continues = observe(agent.model, batch), (torch.rand(T, B) > 0.3).float()
    with_it, metrics = agent.objective(agent.model, filtered, batch | {"continues": continues})
    without, fewer = agent.objective(agent.model, filtered, batch)
    p = torch.sigmoid(agent.model.continuation(torch.cat([filtered.s_c, filtered.h], -1)).double())
    expected = -torch.where(continues.bool(), p, 1 - p).log().mean()
    close(with_it - without, expected, 5e-3 if METHODS[method][2] is mummi_loss.elbo else 1e-5)  # of some 20,000 nats
    assert all(torch.equal(metrics[name], x) for name, x in fewer.items())


@pytest.mark.dev(22)
def test_the_continuation_head_learns_where_episodes_end():
    """They end where the touch sensors are pressed."""
    agent, batch = tiny_agent("cvrl", continuation="on", model_lr=3e-3, reward_weight=0.1), random_batch()
    batch["present"][:] = True
    batch["observation"]["touch"] = (torch.rand(T, B, 1) > 0.5).float().expand(T, B, 2) * 3
    batch["continues"] = (batch["observation"]["touch"][..., 0] == 0).float()
    for _ in range(250):
        agent.update(batch, behaviour=False)
    filtered = observe(agent.model, batch)
    log_odds = agent.model.continuation(agent.model.latent(filtered.h, filtered.s_c))
    assert ((log_odds > 0) == batch["continues"].bool()).double().mean() > 0.9


@pytest.mark.dev(22)
def test_only_continuation_on_builds_the_head_and_shortens_the_returns():
    for setting, on in (("on", True), ("off", False)):
        agent = tiny_agent(continuation=setting)
        assert agent.continuation == on == hasattr(agent.model, "continuation_net")


def test_act_by_decides_how_evaluation_acts():
    assert [tiny_agent(act_by=by).sample_in_evaluation for by in ("mode", "sample")] == [False, True]


def test_fast_is_the_default_and_can_be_left_out():
    agents = tiny_agent(), tiny_agent(fast=False)
    assert [(type(agent), type(agent.model)) for agent in agents] == [(FastAgent, FastMSSM), (Agent, MSSM)]
    a, b = ([p for m in (x.model, x.actor, x.critic) for p in m.parameters()] for x in agents)
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))  # the seed's parameters do not depend on it


def test_devices_that_are_not_here_are_refused():
    assert methods.choose_device("cpu").type == "cpu"
    assert methods.choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("cuda:99", "tpu", "") + (() if torch.cuda.is_available() else ("cuda", "cuda:0")):
        with pytest.raises(ValueError, match=f"--device {name} is not here: give auto or one of cpu"):
            methods.choose_device(name)


@pytest.mark.dev(15)
def test_the_seed_decides_every_parameter():
    weights = lambda seed: torch.cat([p.flatten() for p in tiny_agent(seed=seed).model.parameters()])  # noqa: E731
    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))
    assert envs.seeds(1, 5, count=3) == envs.seeds(1, 5, count=3)
    assert len({*envs.seeds(1, 5, count=3), *envs.seeds(2, 5, count=3), *envs.seeds(1, 6, count=3)}) == 9


@pytest.mark.dev(16)
def test_two_million_steps_are_environment_steps():
    """5,000 random steps, 100 updates, then 100 updates per 1,000 environment steps."""
    import train

    config = Config()
    assert config.steps == 2_000_000
    assert [train.updates_due(config, steps) for steps in (0, 4_999, 5_000, 6_000, 2_000_000)] == [0, 0, 100, 200, 199_600]


def test_actor_and_critic_start_as_keras():
    """Zero biases, Glorot uniform kernels."""
    agent = tiny_agent(units=64)
    for net in (agent.actor.net, agent.critic.net):
        for layer in net[::2]:
            assert (layer.bias == 0).all()
            assert layer.weight.abs().max().item() == pytest.approx((6 / sum(layer.weight.shape)) ** 0.5, rel=0.05)


@pytest.mark.dev(14)
@pytest.mark.parametrize("has", [False, True])
def test_bfloat16_is_for_gpus_and_small_runs_on_a_processor_that_has_it_unless_asked_for(has, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has)
    assert not tiny_agent(precision="auto").bfloat16 and tiny_agent(precision="bfloat16").bfloat16
    small = dict(task="finger_spin", preset="small")
    assert tiny_agent(precision="auto", **small).bfloat16 == has and not tiny_agent(precision="float32", **small).bfloat16
    assert type(tiny_agent(precision="auto", fast=False, **small)) is Agent
    assert not tiny_agent(precision="auto", **small | dict(task="toy")).bfloat16
    trained = tiny_config(precision="bfloat16", **small)  # to act, it takes what this machine is fast in
    assert choose_precision(to_act(trained, "cpu"), CPU) == ("bfloat16" if has else "float32")
    assert choose_precision(to_act(tiny_config(precision="float32", **small), "cpu"), CPU) == "float32"


def small_replay(folder, rows=20):
    """A space, and a replay of one episode whose reward counts the rows."""
    from gymnasium import spaces

    space = {"touch": spaces.Box(0, 1, (2,), np.float32), "present": spaces.MultiBinary(1)}
    fields = replay.replay_fields(space, 2)
    memory = replay.Replay(folder, fields, 50)
    memory.add({key: np.ones((rows, *shape), dtype) for key, (shape, dtype) in fields.items()} | {"reward": np.arange(rows)})
    return memory


def test_a_training_batch_is_what_update_reads(tmp_path):
    config = tiny_config(batch_size=3, batch_length=7)
    batch = replay.Batches(small_replay(tmp_path), config, np.random.default_rng(0), torch.device("cpu")).next()
    assert batch["observation"]["touch"].shape == (7, 3, 2) and list(batch["observation"]) == ["touch"]
    assert batch["present"].shape == (7, 3, 1)
    assert batch["action"].shape == (7, 3, 2) and batch["reward"].shape == (7, 3)
    assert (batch["reward"].diff(dim=0) == 1).all()


def test_batches_drawn_ahead_are_those_that_the_replay_would_draw(tmp_path):
    memory, config = small_replay(tmp_path), tiny_config(batch_size=3, batch_length=7)
    batches, rng = replay.Batches(memory, config, np.random.default_rng(0), torch.device("cpu")), np.random.default_rng(0)
    for _ in range(3):
        np.testing.assert_array_equal(batches.next()["reward"], memory.sample(3, 7, rng)["reward"])
    batches.drop()  # a checkpoint: the run goes on, or is resumed, with the generator as it is then
    memory.sample(3, 7, rng)
    assert batches.rng.bit_generator.state == rng.bit_generator.state
    np.testing.assert_array_equal(batches.next()["reward"], memory.sample(3, 7, rng)["reward"])


def test_rows_are_overwritten_only_after_they_were_read(tmp_path):
    """The loop settles before it adds an episode: the batch drawn before holds the old rows."""
    memory = small_replay(tmp_path, rows=50)
    batches = replay.Batches(memory, tiny_config(batch_size=30, batch_length=7), np.random.default_rng(0), torch.device("cpu"))
    batches.next()
    batches.wait()
    memory.add({key: np.zeros((50, *c.shape), c.dtype) for key, c in memory.columns.items()})
    assert (batches.next()["reward"].diff(dim=0) == 1).all() and (batches.next()["reward"] == 0).all()


def top_level_shapes(method):
    """{module: shapes of its parameters} of the world model, actor and critic."""
    agent, shapes = tiny_agent(method), {}
    for owner in ("model", "actor", "critic"):
        for name, parameter in getattr(agent, owner).named_parameters():
            shapes.setdefault(f"{owner}.{name.split('.')[0]}", []).append(tuple(parameter.shape))
    return shapes


def test_methods_differ_in_fusion_and_heads_and_in_nothing_else():
    shapes = {method: top_level_shapes(method) for method in METHODS}
    own = {
        "mummi": {"model.experts", "model.g"},
        "mummi_b": {"model.experts", "model.g"},
        "mssm_e": {"model.experts", "model.decoders"},
        "cvrl": {"model.project_x", "model.project_z"},
        "dreamer": {"model.decoders"},
    }
    shared = set.intersection(*(set(modules) for modules in shapes.values()))
    for method, modules in shapes.items():
        assert set(modules) - shared == own[method]
        for name in shared - {"model.posterior_net"}:
            assert modules[name] == shapes["mummi"][name], (method, name)
    for method in ("cvrl", "dreamer"):  # the posterior reads s^f, or all features side by side, and h
        (weight, *rest), (fused_weight, *fused_rest) = (shapes[m]["model.posterior_net"] for m in (method, "mummi"))
        assert rest == fused_rest and weight[0] == fused_weight[0]
        assert (weight[1], fused_weight[1]) == (len(MODALITIES) * D_X + D_H, D_F + D_H)
    assert shapes["mummi"] == shapes["mummi_b"]
    assert shapes["mssm_e"]["model.decoders"] == shapes["dreamer"]["model.decoders"]


@pytest.mark.parametrize("method", METHODS)
def test_each_method_reduces_its_own_loss(method):
    agent, batch = tiny_agent(method, model_lr=3e-3), random_batch()
    losses = [float(agent.update(batch)["model_loss"]) for _ in range(40)]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.1


# ---- A trained agent, one observation at a time ----


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a small run."""
    import killer
    from test_train import run

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("trained"))
        killer.without_pictures(patch.setattr)
        run("--steps", "200", "--name", "x")
        yield Path.cwd() / "runs" / "x"


@pytest.mark.parametrize("sample", [False, True])
def test_a_trained_agent_acts_as_in_evaluation(trained, sample):
    """The same actions as `evaluate.act` on a vector of one environment; an absent key, NaN and present 0 are one."""
    import evaluate

    player, agent = methods.load_agent(trained), methods.load_agent(trained).agent
    player.agent.sample_in_evaluation = agent.sample_in_evaluation = sample  # --act-by
    assert player.sensors == {"position": (2,), "camera": (64, 64, 3)}
    memory, camera = agent.initial_memory(1), np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    steps = [({"position": [0.2, 0.7], "camera": camera}, (1, 1)), ({"position": [1, 0]}, (1, 0)),
             ({"position": [np.nan, 0.5], "camera": camera}, (0, 1)), ({}, (0, 0))]  # fmt: skip
    for t, (observation, present) in enumerate(steps):
        filled = {"position": np.nan_to_num(np.float32(observation.get("position", (0, 0)))) * present[0],
                  "camera": observation.get("camera", 0 * camera)}  # fmt: skip
        batch = {name: x[None] for name, x in filled.items()} | {"present": np.array([present])}
        torch.manual_seed(t)
        expected, memory = evaluate.act(agent, memory, batch, np.array([t == 0]), explore=False)
        torch.manual_seed(t)
        action = player.act(observation)
        assert action.shape == (2,) and np.array_equal(action, expected[0])


def test_what_is_not_finite_or_none_is_missing_and_does_no_harm(trained):
    player, good = methods.load_agent(trained), {"position": [0.2, 0.7]}
    for worse in ({"position": [np.inf, 0.7]}, {"position": [np.nan, 0.7]}, {"position": None, "camera": None}, {}):
        player.reset()
        torch.manual_seed(0)
        actions = [player.act(x) for x in (good, worse, good)]
        player.reset()
        torch.manual_seed(0)
        assert np.isfinite(actions).all() and np.array_equal(actions, [player.act(x) for x in (good, {}, good)])


def test_a_vector_may_have_any_range_and_a_picture_any_memory_layout():
    player, latents = methods.Player(tiny_agent("mummi")), []
    picture = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    mirrored = np.ascontiguousarray(picture[..., ::-1])
    for observation in ({"touch": [10, 0]}, {"touch": [500, 0]}, {"rgb": picture[..., ::-1]}, {"rgb": mirrored}):
        player.reset()
        torch.manual_seed(0)
        latents.append(player.filter(observation)[0])
    assert not np.array_equal(latents[0], latents[1]) and np.array_equal(latents[2], latents[3])


def test_a_sensor_that_is_not_believed_has_no_agreement_and_a_refused_reading_leaves_no_trace():
    calls = []
    trust = lambda memory, tensors, present, first: calls.append(1) or present & torch.tensor([True, True, False])  # noqa: E731
    player = methods.Player(tiny_agent("mummi"), trust)
    rgb = np.zeros((64, 64, 3), np.uint8)
    assert list(player.filter({"rgb": rgb, "touch": [3, 0]})[1]) == ["rgb"] and len(calls) == 1
    millimetres = np.full((64, 64, 1), 300)  # of whatever integers: none is metres
    for wrong in ({"rgb": rgb[:32]}, {"rgb": rgb.astype(float)}, {"depth": np.zeros((64, 64), np.float32)},
                  *({"depth": millimetres.astype(kind)} for kind in ("uint16", "int16", "int32", "bool", "uint8"))):  # fmt: skip
        with pytest.raises(ValueError, match=r"give (uint8|float|\(64, 64, [13]\))"):
            player.filter(wrong)
    assert len(calls) == 1


def test_depth_that_reads_nothing_is_far_as_in_training():
    """A pixel without a return is NaN or infinite; the camera is not missing for it."""
    player = methods.Player(tiny_agent("mummi"))
    depth, latents = np.full((64, 64, 1), 3.0, np.float32), []
    for nothing in (envs.MAX_DEPTH, np.nan, np.inf, 1e6):
        depth[:9, :9] = nothing
        player.reset()
        torch.manual_seed(0)
        latents.append(player.filter({"depth": depth})[0])
    assert all(np.array_equal(latents[0], x) for x in latents[1:])
    torch.manual_seed(0)
    player.reset()
    assert not np.array_equal(latents[0], player.filter({})[0])


def test_a_file_of_weights_is_evaluated_and_acts_as_its_run(trained, tmp_path, monkeypatch):
    """Nearly: its matrices are float16. It has no optimisers; its table is written into the present folder. A
    picture that a glob finds beside it is left out."""
    import evaluate

    monkeypatch.chdir(tmp_path)
    checkpoint.save_weights(trained, "toy.pt")
    assert Path("toy.pt").stat().st_size < (trained / "checkpoint.pt").stat().st_size / 4
    actions = []
    for path in ("toy.pt", trained):
        torch.manual_seed(0)
        actions.append(methods.load_agent(path, trust=True).act({"position": [0.2, 0.7]}))
    close(*actions, 2e-3)
    options = dict(episodes=1, rates=("Medium",), references=False)
    Path("curves.png").write_bytes(b"a picture")
    evaluate.main(evaluate.Options(runs=("toy.pt", "curves.png"), trust=True, **options))
    evaluate.main(evaluate.Options(runs=(str(trained),), output="run.json", trust=True, **options))
    returns = [[r["returns"] for r in json.loads(Path(name).read_text())["records"]] for name in ("toy-evaluation.json", "run.json")]
    assert len(returns[0]) == 2 and np.allclose(*returns, atol=0.5) and Path("toy-evaluation.md").exists()


@pytest.mark.parametrize("path", sorted((Path(__file__).parent.parent / "pretrained").glob("*.pt")), ids=lambda path: path.stem)
def test_a_pretrained_agent_is_small_and_acts_without_its_sensors(path):
    assert path.stat().st_size <= 3e6
    player = methods.load_agent(path, trust=True)
    seen = {name: np.zeros(shape, np.uint8 if shape[-1:] == (3,) else np.float32) for name, shape in player.sensors.items()}
    for observation in (seen, {}, dict(list(seen.items())[:1])):
        assert (np.abs(player.act(observation)) <= 1).all()


def test_a_trained_agent_filters_and_tells_how_sensors_agree(trained):
    player = methods.load_agent(trained)
    latent, agreement = player.filter({"position": [0.2, 0.7]})
    assert latent.shape == (player.agent.model.d_h + player.agent.model.d_c,) and list(agreement) == ["position"]
    camera = np.zeros((64, 64, 3), np.uint8)
    both = player.filter({"position": [0.2, 0.7], "camera": camera})
    torch.manual_seed(0)
    latent, agreement = player.filter({"position": [0.9, 0.1], "camera": camera})
    model = player.agent.model
    readings = {"position": torch.tensor([[[0.9, 0.1]]]), "camera": torch.as_tensor(camera)[None, None]}
    means = model.fuse(model.encode(readings, torch.ones(1, 1, 2).bool()), torch.ones(1, 1, 2).bool()).expert_mean[0, 0]
    for name, mean in zip(player.sensors, means):
        close(agreement[name], -(model.g(torch.as_tensor(latent)) - mean).square().sum(), 1e-4)
    assert list(both[1]) == ["position", "camera"]
    player.reset()
    assert player.memory.state.h.abs().sum() == 0


def test_a_filter_is_told_which_action_was_executed():
    """As if the agent had acted so: also where another controller drives, or a safety layer changes what `act` gave."""
    actions, latents = np.random.default_rng(0).uniform(-1, 1, (3, A)).astype(np.float32), {}
    for way in ("act", "filter", "told", "nothing"):
        player = methods.Player(tiny_agent("mummi"))
        torch.manual_seed(0)
        player.filter({"touch": [1, 0]})
        for action in actions:
            if way == "act":  # what it returned is what was executed
                player.memory = player.memory._replace(action=torch.tensor(action)[None])
            if way == "told":
                player.memory = player.memory._replace(action=torch.full((1, A), 0.9))
            latents[way] = player.filter({}, action if way in ("filter", "told") else None)[0]
    assert np.array_equal(latents["act"], latents["filter"]) and np.array_equal(latents["act"], latents["told"])
    assert not np.array_equal(latents["act"], latents["nothing"])
    with pytest.raises(ValueError, match="shape"):
        player.act({}, [0.1] * (A + 1))
    for wrong in ([0.1] * (A - 1) + [np.nan], [-2.0] * A, [np.inf] * A):
        memory = player.memory
        with pytest.raises(ValueError, match=r"the action is \[.*\]: give the one that was executed, in \[-1, 1\]"):
            player.act({}, wrong)
        assert player.memory is memory


@pytest.mark.parametrize("observation, said", [
    ({"lidar": [1.0]}, "'lidar' is unknown"), ({"position": [1.0]}, r"'position' has shape \(1,\): give \(2,\)"),
    ({"camera": np.zeros((64, 64, 3))}, "'camera' is torch.float64"),
])  # fmt: skip
def test_a_trained_agent_refuses_what_it_does_not_know(trained, observation, said):
    with pytest.raises(ValueError, match=said):
        methods.load_agent(trained).act(observation)
