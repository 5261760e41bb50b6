"""The five methods: their objectives written out, what its configuration reaches, seeds, schedule."""

import numpy as np
import pytest
import torch
from conftest import MODALITIES, B, T, close, observe, random_batch, tiny_agent, tiny_config
from test_mummi_loss import info_nce_in_python
from torch.distributions import Normal, kl_divergence

import mssm
import train
from config import Config
from methods import METHODS

N = T * B


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
    """Mean over the present rows of Eq. (15), in Python."""
    present = present.flatten()
    return info_nce_in_python(log_f, present).sum() / present.sum()


def minus_distances(code, x):
    return -torch.cdist(code.double(), x.flatten(0, 1).double()).square()


@pytest.mark.fig(3)
@pytest.mark.eq(15, 16, 17)
@pytest.mark.dev(5, 8)
def test_mummi_sums_a_bound_for_each_expert():
    model, filtered, batch, loss, _ = world_model_loss("mummi", free_nats=0.1)
    code = model.code(torch.cat([filtered.s_c, filtered.h], -1)).flatten(0, 1)
    total = reward_and_kl(model, filtered, batch, 0.1)
    for m, weight in enumerate([1.0, 1.0, 0.001]):  # rgb, depth, touch
        total += weight * mean_bound(minus_distances(code, filtered.fused.expert_mean[m]), batch["present"][..., m])
    close(loss, -total)


@pytest.mark.eq(17)
def test_mummi_b_has_one_bound_of_the_fused_mean():
    model, filtered, batch, loss, _ = world_model_loss("mummi_b", free_nats=0.1)
    code = model.code(torch.cat([filtered.s_c, filtered.h], -1)).flatten(0, 1)
    bound = mean_bound(minus_distances(code, filtered.fused.mean), batch["present"].any(-1))
    close(loss, -(bound + reward_and_kl(model, filtered, batch, 0.1)))


def test_cvrl_has_one_bound_of_projected_latents_and_features():
    model, filtered, batch, loss, _ = world_model_loss("cvrl", free_nats=0.1)
    z = model.project_z(torch.cat([filtered.s_c, filtered.h], -1)).flatten(0, 1).double()
    x = model.project_x(filtered.fused.s_f).flatten(0, 1).double()
    bound = mean_bound(torch.einsum("id,jd->ij", z, x), batch["present"].any(-1))
    close(loss, -(bound + reward_and_kl(model, filtered, batch, 0.1)))


@pytest.mark.eq(10)
@pytest.mark.parametrize("method", ["mssm_e", "dreamer"])
def test_elbo_reconstructs_every_modality_that_is_present(method):
    model, filtered, batch, loss, _ = world_model_loss(method, free_nats=0.1)
    decoded, total = model.decode(torch.cat([filtered.s_c, filtered.h], -1)), 0.0
    for m, name in enumerate(MODALITIES):
        x = mssm.normalise(batch["observation"][name]).double()
        log_likelihood = Normal(decoded[name].double(), 1.0).log_prob(x).flatten(2).sum(-1)
        total += log_likelihood[batch["present"][..., m]].sum() / N
    close(loss, -(total + reward_and_kl(model, filtered, batch, 0.1)))


def test_five_methods_are_five_pairs_of_fusion_and_objective():
    pairs = {name: (fusion, objective.__name__) for name, (fusion, _, objective) in METHODS.items()}
    assert pairs == {
        "mummi": ("product", "mummi"),
        "mummi_b": ("product", "mummi_b"),
        "mssm_e": ("product", "elbo"),
        "cvrl": ("concatenate", "cvrl"),
        "dreamer": ("concatenate", "elbo"),
    }


def test_every_size_of_the_configuration_lands_where_it_belongs():
    """make_agent passes many numbers by position."""
    sizes = dict(d_h=3, d_c=5, d_f=7, hidden=11, units=13, channels=1)
    behaviour = dict(horizon=17, discount=0.9, return_lambda=0.8, clip=19.0, mpc_rate=0.7, mpc_iterations=2, exploration=0.6)
    agent = tiny_agent(**sizes | behaviour)
    assert {name: getattr(agent, name) for name in behaviour} == behaviour
    model = agent.model
    assert (model.d_h, model.d_c, model.d_f, model.code[0].out_features) == (3, 5, 7, 7)
    assert model.prior_net[0].out_features == model.posterior_h.out_features == 11
    assert model.reward_net[0].out_features == agent.actor.net[0].out_features == agent.critic.net[0].out_features == 13
    assert model.encoders["rgb"][0].out_channels == 1


@pytest.mark.parametrize("field", [
    pytest.param(dict(expert_power=1), marks=pytest.mark.dev(1)),
    pytest.param(dict(sample_s_f=False), marks=pytest.mark.dev(2)),
    pytest.param(dict(prior_if_unobserved=False), marks=pytest.mark.dev(3)),
    pytest.param(dict(absent_logit=-10.0), marks=pytest.mark.dev(4)),
    pytest.param(dict(over_present=False), marks=pytest.mark.dev(5)),
    pytest.param(dict(touch_weight=1.0), marks=pytest.mark.dev(8)),
    dict(reward_weight=2.0),
], ids=lambda field: next(iter(field)))  # fmt: skip
def test_the_field_of_a_deviation_reaches_the_loss(field):
    assert world_model_loss(**field)[-2] != world_model_loss()[-2]


@pytest.mark.eq(9, 17)
@pytest.mark.dev(6)
@pytest.mark.parametrize("method", ["mummi", "mummi_b", "mssm_e"])
def test_the_kl_of_the_fused_code_has_its_weight(method):
    """Mean over the steps at which anything is present; at weight 0, the default, no such network exists."""
    assert Config().fused_kl_scale == 0
    agent, batch = tiny_agent(method, fused_kl_scale=10), random_batch()
    model, filtered = agent.model, observe(agent.model, batch)
    with_kl, _ = agent.objective(model, filtered, batch)
    without, _ = METHODS[method][2](model, filtered, batch, tiny_config(method))
    q = Normal(filtered.fused.mean.double(), filtered.fused.std.double())
    kl = kl_divergence(q, Normal(*(x.double() for x in model.fused_prior(filtered.s_c)))).sum(-1)
    close(with_kl - without, 10 * kl[batch["present"].any(-1)].mean(), 1e-4)


@pytest.mark.eq(12)
def test_logged_information_is_the_bound_plus_log_of_the_number_present():
    model, filtered, batch, _, metrics = world_model_loss("mummi")
    code = model.code(torch.cat([filtered.s_c, filtered.h], -1)).flatten(0, 1)
    for m, name in enumerate(MODALITIES):
        present = batch["present"][..., m]
        bound = mean_bound(minus_distances(code, filtered.fused.expert_mean[m]), present)
        close(metrics[f"information_{name}"], bound + present.sum().log())


@pytest.mark.dev(15)
def test_the_seed_decides_every_parameter():
    weights = lambda seed: torch.cat([p.flatten() for p in tiny_agent(seed=seed).model.parameters()])  # noqa: E731
    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))
    assert train.seeds(1, 5, count=3) == train.seeds(1, 5, count=3)
    assert len({*train.seeds(1, 5, count=3), *train.seeds(2, 5, count=3), *train.seeds(1, 6, count=3)}) == 9


@pytest.mark.dev(16)
def test_two_million_steps_are_environment_steps():
    """5,000 random steps, 100 updates, then 100 updates per 1,000 environment steps."""
    config = Config()
    assert config.steps == 2_000_000
    assert [train.updates_due(config, steps) for steps in (0, 4_999, 5_000, 6_000, 2_000_000)] == [0, 0, 100, 200, 199_600]


@pytest.mark.dev(14)
def test_bfloat16_is_for_gpus_unless_asked_for():
    assert not tiny_agent(precision="auto").bfloat16 and tiny_agent(precision="bfloat16").bfloat16


def small_replay(folder, rows=20):
    """A space, and a replay of one episode whose reward counts the rows."""
    from gymnasium import spaces

    import replay

    space = {"touch": spaces.Box(0, 1, (2,), np.float32), "present": spaces.MultiBinary(1)}
    fields = train.replay_fields(space, 2)
    memory = replay.Replay(folder, fields, 50)
    memory.add({key: np.ones((rows, *shape), dtype) for key, (shape, dtype) in fields.items()} | {"reward": np.arange(rows)})
    return memory


def test_a_training_batch_is_what_update_reads(tmp_path):
    config = tiny_config(batch_size=3, batch_length=7)
    batch = train.Batches(small_replay(tmp_path), config, np.random.default_rng(0), torch.device("cpu")).next()
    assert batch["observation"]["touch"].shape == (7, 3, 2) and list(batch["observation"]) == ["touch"]
    assert batch["present"].shape == (7, 3, 1)
    assert batch["action"].shape == (7, 3, 2) and batch["reward"].shape == (7, 3)
    assert (batch["reward"].diff(dim=0) == 1).all()


def test_batches_drawn_ahead_are_those_that_the_replay_would_draw(tmp_path):
    memory, config = small_replay(tmp_path), tiny_config(batch_size=3, batch_length=7)
    batches, rng = train.Batches(memory, config, np.random.default_rng(0), torch.device("cpu")), np.random.default_rng(0)
    for _ in range(3):
        np.testing.assert_array_equal(batches.next()["reward"], memory.sample(3, 7, rng)["reward"])
    batches.drop()  # a checkpoint: the run goes on, or is resumed, with the generator as it is then
    memory.sample(3, 7, rng)
    assert batches.rng.bit_generator.state == rng.bit_generator.state
    np.testing.assert_array_equal(batches.next()["reward"], memory.sample(3, 7, rng)["reward"])


def test_rows_are_overwritten_only_after_they_were_read(tmp_path):
    """The loop settles before it adds an episode: the batch drawn before holds the old rows."""
    memory = small_replay(tmp_path, rows=50)
    batches = train.Batches(memory, tiny_config(batch_size=30, batch_length=7), np.random.default_rng(0), torch.device("cpu"))
    batches.next()
    batches.settle()
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
        "mummi": {"model.experts", "model.code"},
        "mummi_b": {"model.experts", "model.code"},
        "mssm_e": {"model.experts", "model.decoders"},
        "cvrl": {"model.project_x", "model.project_z"},
        "dreamer": {"model.decoders"},
    }
    shared = set.intersection(*(set(modules) for modules in shapes.values()))
    for method, modules in shapes.items():
        assert set(modules) - shared == own[method]
        for name in shared - {"model.posterior_s_f"}:
            assert modules[name] == shapes["mummi"][name], (method, name)
    for method in ("cvrl", "dreamer"):  # the posterior reads one code, or all features side by side
        (weight,), (fused_weight,) = (shapes[m]["model.posterior_s_f"] for m in (method, "mummi"))
        assert weight[0] == fused_weight[0] and weight[1] == len(MODALITIES) * 64
    assert shapes["mummi"] == shapes["mummi_b"]
    assert shapes["mssm_e"]["model.decoders"] == shapes["dreamer"]["model.decoders"]


@pytest.mark.parametrize("method", METHODS)
def test_each_method_reduces_its_own_loss(method):
    agent, batch = tiny_agent(method, model_lr=3e-3), random_batch()
    losses = [float(agent.update(batch)["model_loss"]) for _ in range(40)]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.1
