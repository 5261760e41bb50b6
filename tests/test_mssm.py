"""mssm.py: fusion against integrated densities, dynamics against their formulas, and what may depend on what."""

import itertools
import math

import pytest
import torch
from conftest import (
    D_C,
    D_F,
    D_H,
    D_X,
    MODALITIES,
    TINY,
    A,
    B,
    M,
    T,
    close,
    observe,
    random_batch,
    random_present,
    take_the_mean,  # fmt: skip
    tiny_model,
)

import mssm
from mummi_loss import cvrl, elbo, gaussian_kl, mummi, mummi_b


def same(a, b, fields=("h", "s_c", "mean", "std", "prior_mean", "prior_std")):
    """Two `Filtered` agree in every bit of these fields."""
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in fields)


def observe_seeded(model, batch):
    torch.manual_seed(1)
    return observe(model, batch)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


# ---- 1. Fusion, Eq. (11) -------------------------------------------------------------------------


@pytest.mark.eq(11)
@pytest.mark.dev(1)
def test_product_of_experts_is_the_normalised_product_of_densities():
    """The product of the present experts' densities, integrated on a grid, for every subset of three."""
    mean = torch.randn(3, 4, dtype=torch.float64)
    std = torch.rand(3, 4, dtype=torch.float64) + 0.3
    grid = torch.linspace(-15, 15, 20_001, dtype=torch.float64).unsqueeze(-1)  # (G, 1)
    for present in list(itertools.product([True, False], repeat=3))[:-1]:
        density = 1.0
        for m in range(3):
            if present[m]:
                density = density * torch.distributions.Normal(mean[m], std[m]).log_prob(grid).exp()
        density = density / density.sum(0)
        expected_mean = (density * grid).sum(0)
        expected_std = (density * (grid - expected_mean).square()).sum(0).sqrt()
        actual = mssm.product_of_experts(mean, std, torch.tensor(present))  # one step: (M, D)
        close(actual[0], expected_mean, 1e-8)
        close(actual[1], expected_std, 1e-8)


@pytest.mark.dev(1)
def test_product_of_experts_with_power_1_weighs_by_1_over_std_as_released():
    mean, std = torch.tensor([[0.0], [3.0]]), torch.tensor([[1.0], [2.0]])
    fused = mssm.product_of_experts(mean, std, torch.ones(2).bool(), power=1)
    close(fused[0], [(0 / 1 + 3 / 2) / (1 + 1 / 2)])
    close(fused[1], [1 / (1 + 1 / 2)])


@pytest.mark.eq(11)
def test_product_of_experts_drops_the_absent():
    """An absent expert changes nothing; each step has its own experts; the empty product is N(0, 1)."""
    mean, std, present = torch.randn(T, B, M, 4), torch.rand(T, B, M, 4) + 0.1, random_present()
    fused = mssm.product_of_experts(mean, std, present)
    shouted = mssm.product_of_experts(mean + 1e3 * ~present.unsqueeze(-1), std, present)
    assert torch.equal(fused[0], shouted[0]) and torch.equal(fused[1], shouted[1])
    for t, b in itertools.product(range(T), range(B)):
        kept = present[t, b]
        alone = mssm.product_of_experts(mean[t, b, kept], std[t, b, kept], torch.ones(int(kept.sum())).bool())
        if kept.any():
            close(fused[0][t, b], alone[0])
            close(fused[1][t, b], alone[1])
        else:
            assert (fused[0][t, b] == 0).all() and (fused[1][t, b] == 1).all()


@pytest.mark.dev(2)
def test_the_fused_observation_is_sampled_from_the_product():
    model = tiny_model()
    features, present = torch.randn(M, 1, D_X).expand(M, 4000, D_X), torch.tensor([True, False, True]).expand(4000, M)
    fused = model.fuse(list(features), present)  # one step, drawn 4000 times
    error = 5 / math.sqrt(4000)
    assert ((fused.s_f.mean(0) - fused.mean[0]).abs() < error * fused.std[0]).all()
    assert ((fused.s_f.std(0) / fused.std[0] - 1).abs() < error).all()
    fused = tiny_model(sample_s_f=False).fuse(list(features), present)  # [code]
    assert torch.equal(fused.s_f, fused.mean)


@pytest.mark.dev(23)
def test_concatenation_has_zeros_where_missing():
    model, present = tiny_model("concatenate"), random_present()
    features = torch.randn(M, T, B, D_X)
    fused = model.fuse(list(features), present)
    for m, t, b in itertools.product(range(M), range(T), range(B)):
        part = fused.s_f[t, b, D_X * m : D_X * (m + 1)]
        assert torch.equal(part, features[m, t, b] if present[t, b, m] else torch.zeros(D_X))
    assert fused.observed.all() and fused.observed.shape == (T, B)  # zeros are read like features


def test_experts_shares_are_their_precisions_and_sum_to_one():
    """Written out for every step, for both weightings of Dev. D1; where nothing is present there are none."""
    present = random_present()
    for power in (1, 2):
        model = tiny_model(expert_power=power)
        fused = model.fuse(list(3 * torch.randn(M, T, B, D_X)), present)
        shares = model.expert_shares(fused, present).detach()
        assert shares.shape == (T, B, M)
        for t, b in itertools.product(range(T), range(B)):
            precision = [(1 / fused.expert_std[t, b, m].double() ** power).mean().item() for m in range(M)]
            total = sum(x for x, there in zip(precision, present[t, b]) if there)
            close(shares[t, b], [x / total if there else 0.0 for x, there in zip(precision, present[t, b])])
        close(shares.sum(-1), present.any(-1))
        assert torch.equal(shares > 0, present) and shares[present.all(-1)].std(-1).min() > 0.01


def test_encoders_and_decoders_agree_on_rows_and_columns():
    """An image (64, 64, C) is read and predicted with its rows as rows."""
    model, batch = tiny_model(heads="decoders"), random_batch()
    observation, present = batch["observation"], batch["present"]
    x = model.scale(observation, present)["rgb"][1, 2].permute(2, 0, 1)  # (C, 64, 64)
    close(model.encode(observation, present)[0][1, 2], model.encoders[0](x.unsqueeze(0))[0])
    latent = torch.randn(T, B, D_C + D_H)
    close(model.decode(latent)["rgb"][1, 2].permute(2, 0, 1), model.decoders[0](latent[1, 2].unsqueeze(0))[0])


# ---- 2. Generative model, Eq. (6)-(9) ------------------------------------------------------------


@pytest.mark.eq(9)
def test_transition_is_a_gru_of_state_and_action():
    """Cho et al. (2014) with the reset gate after the product, as Keras and PyTorch have it; in float64."""
    model = tiny_model().double()
    h, s_c, action = (torch.randn(B, size, dtype=torch.float64) for size in (D_H, D_C, A))
    for layer in (model.transition_in, model.gru_x, model.gru_h):
        torch.nn.init.normal_(layer.bias)  # zero at first
    linear, gru_x, gru_h = ((layer.weight, layer.bias) for layer in (model.transition_in, model.gru_x, model.gru_h))
    x = torch.cat([s_c, action], -1) @ linear[0].T + linear[1]
    x = torch.where(x > 0, x, x.exp() - 1)
    gates_x = (x @ gru_x[0].T + gru_x[1]).split(D_H, -1)
    gates_h = (h @ gru_h[0].T + gru_h[1]).split(D_H, -1)
    reset, update = (1 / (1 + (-a - b).exp()) for a, b in zip(gates_x[:2], gates_h[:2]))
    candidate = torch.tanh(gates_x[2] + reset * gates_h[2])
    close(model.transition(mssm.State(h, s_c), action), update * h + (1 - update) * candidate, 1e-12)


@pytest.mark.eq(9)
def test_the_recurrent_unit_is_that_of_torch():
    cell, x, h = torch.nn.GRUCell(A, D_H), torch.randn(B, A), torch.randn(B, D_H)
    from_x = x @ cell.weight_ih.T + cell.bias_ih
    from_h = h @ cell.weight_hh.T + cell.bias_hh
    close(mssm.gru(from_x, from_h, h), cell(x, h), 1e-6)


@pytest.mark.eq(4)
@pytest.mark.eq(9)
def test_imagining_one_step_is_the_transition_and_a_sample_of_the_prior():
    model = tiny_model()
    state, action = mssm.State(torch.randn(B, D_H), torch.randn(B, D_C)), torch.rand(B, A)
    torch.manual_seed(1)
    following = model.imagine_step(state, action)
    torch.manual_seed(1)
    mean, std = mssm.gaussian(model.prior(following.h))
    assert torch.equal(following.h, model.transition(state, action))
    assert torch.equal(following.s_c, mean + std * torch.randn(B, D_C))


@pytest.mark.eq(9)
def test_prior_is_a_two_layer_gaussian():
    model, h = tiny_model(), torch.randn(B, D_H)
    first, _, second = model.prior_net
    out = second(torch.nn.functional.elu(first(h))).double()
    mean, std = mssm.gaussian(model.prior(h))
    close(mean, out[:, :D_C])
    close(std, (1 + out[:, D_C:].exp()).log() + 0.1)


@pytest.mark.eq(9)
@pytest.mark.dev(6)
def test_prior_of_the_fused_observation_is_built_on_request_alone():
    assert not hasattr(tiny_model(), "fused_prior_net")
    mean, std = tiny_model(fused_prior=True).fused_prior(torch.randn(T, B, D_C))
    assert mean.shape == std.shape == (T, B, D_F) and (std > 0.1).all()


@pytest.mark.fig(2)
@pytest.mark.eq(6)
def test_given_its_latent_each_modality_and_each_step_is_independent():
    """Eq. (6): a step's latent explains that step alone, and each modality has its own decoder."""
    model, latent = tiny_model(heads="decoders"), torch.randn(T, B, D_C + D_H)
    changed = latent.clone()
    changed[2] += 1
    with torch.no_grad():
        before, after = model.decode(latent), model.decode(changed)
        for name in MODALITIES:
            for t in range(T):
                assert torch.equal(before[name][t], after[name][t]) == (t != 2)
        for parameter in model.decoders[1].parameters():  # of depth
            parameter.add_(1)
        after = model.decode(latent)
    assert [torch.equal(before[name], after[name]) for name in MODALITIES] == [True, False, True]


@pytest.mark.eq(7)
@pytest.mark.eq(8)
def test_reward_and_decoders_read_s_c_and_h_alone():
    """The latent they are given is [s^c, h], and they read all of it."""
    model, h, s_c = tiny_model(heads="decoders"), torch.randn(T, B, D_H), torch.randn(T, B, D_C)
    latent = model.latent(h, s_c)
    assert torch.equal(latent, torch.cat([s_c, h], -1))
    for head in (model.reward, *(lambda z, k=k: model.decode(z)[k] for k in MODALITIES)):
        z = latent.clone().requires_grad_()
        head(z).square().sum().backward()
        assert (z.grad.flatten(0, 1).abs().sum(0) > 0).all()


@pytest.mark.eq(7)
def test_decoders_give_every_modality_its_shape_and_scale():
    model, batch = tiny_model(heads="decoders"), random_batch()
    decoded, scaled = model.decode(torch.randn(T, B, D_C + D_H)), model.scale(batch["observation"], batch["present"])
    assert list(decoded) == list(scaled) == list(MODALITIES)
    for name, shape in MODALITIES.items():
        assert decoded[name].shape == (T, B, *shape) == scaled[name].shape
        assert decoded[name].dtype == scaled[name].dtype == torch.float32


def scale(x, axes, mean=0.0, std=1.0):
    """`mssm.scale` where everything is present; the first `axes` axes of x are steps and sequences."""
    return mssm.scale(x, torch.ones(x.shape[:axes]).bool(), torch.tensor(mean), torch.tensor(std))


@pytest.mark.dev(9, 10)
@pytest.mark.parametrize("axes", [(7,), (5, 7)], ids=str)
def test_scale_knows_each_kind_of_observation(axes):
    image = torch.tensor([0, 51, 255], dtype=torch.uint8).expand(*axes, 64, 64, 3)
    close(scale(image, len(axes))[..., 3, 4, :], torch.tensor([-0.5, -0.3, 0.5]).expand(*axes, 3))
    depth = torch.tensor([-1.0, 0.0, 2.5, 10.0, 80.0, 1.0, 9.0]).view(7, 1, 1, 1).expand(*axes, 64, 64, 1)
    expected = torch.tensor([-0.5, -0.5, -0.25, 0.5, 0.5, -0.4, 0.4]).expand(axes)
    for kind in (depth, depth.double(), depth.half()):
        close(scale(kind, len(axes))[..., 7, 7, 0], expected, 1e-3 if kind.dtype == torch.half else 1e-6)  # clipped at 10 m
    touch = torch.tensor([0.0, 7.6]).expand(*axes, 2)
    assert torch.equal(scale(touch, len(axes)), touch)
    close(scale(touch, len(axes), (1.0, 2.0), (4.0, 0.5)), torch.tensor([-0.25, 11.2]).expand(*axes, 2))
    assert all(scale(x, len(axes)).dtype == torch.float32 for x in (image, depth.half(), touch.double()))


def test_a_vector_is_read_and_predicted_as_its_statistics_scale_it():
    """The buffers mean_m and std_m of modality m, saved with the model: for encoder, decoder and loss alike."""
    model, batch = tiny_model(heads="decoders"), random_batch()
    mean, std, there = torch.tensor([3.0, -1.0]), torch.tensor([0.5, 20.0]), batch["present"][..., 2]
    model.mean_2.copy_(mean)
    model.std_2.copy_(std)
    expected = ((batch["observation"]["touch"] - mean) / std)[there]
    close(model.scale(batch["observation"], batch["present"])["touch"][there], expected)
    close(model.encode(batch["observation"], batch["present"])[2][there], model.encoders[2](expected))
    for parameter in model.decoders[2].parameters():
        parameter.detach().zero_()  # it predicts 0
    _, metrics = elbo(model, observe(model, batch), batch)
    close(metrics["reconstruction_touch"], torch.distributions.Normal(0.0, 1.0).log_prob(expected).sum(-1).mean())
    other = tiny_model(heads="decoders")
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.mean_2, model.mean_2) and torch.equal(other.std_2, model.std_2)
    assert not {"mean_2", "std_2"} & {name for name, _ in model.named_parameters()}  # nothing to be learnt


def test_a_batch_of_64_by_64_vectors_is_no_depth_image():
    """T = B = 64 is a batch size like any other."""
    touch = 5 * torch.rand(64, 64, 2)
    assert torch.equal(scale(touch, 2), touch)


# ---- 3. Inference network, Eq. (11) --------------------------------------------------------------


@pytest.mark.eq(11)
def test_posterior_is_one_layer_of_s_f_and_h_together(monkeypatch):
    """Computed in two parts; Fig. 11 has [s^f, h] -> Linear, ELU -> Linear."""
    take_the_mean(monkeypatch)
    model, batch = tiny_model(), random_batch()
    for layer in model.posterior_net[::2]:
        torch.nn.init.normal_(layer.bias)  # zero at first
    filtered = observe(model, batch)
    first, _, second = model.posterior_net
    hidden = torch.cat([filtered.fused.s_f, filtered.h], -1) @ first.weight.T + first.bias
    out = torch.nn.functional.elu(hidden) @ second.weight.T + second.bias
    observed = batch["present"].any(-1)
    close(filtered.mean[observed], out[observed][:, :D_C])
    close(filtered.std[observed], (1 + out[observed][:, D_C:].double().exp()).log() + 0.1)
    assert torch.equal(filtered.s_c, filtered.mean)  # the noise is zero


@pytest.mark.eq(11)
def test_s_c_is_a_sample_of_the_posterior():
    model, batch = tiny_model(), random_batch(1)
    torch.nn.init.normal_(model.posterior_net[2].bias)
    parameters, observed = torch.randn(2, 4000, 2 * D_C), torch.rand(4000) > 0.5
    noise = torch.randn(4000, D_C)
    s_c, mean, std, prior_mean, prior_std = mssm.posterior_or_prior(*parameters, observed, noise)
    for row in range(0, 4000, 500):
        q = mssm.gaussian(parameters[0 if observed[row] else 1])
        assert torch.equal(mean[row], q[0][row]) and torch.equal(std[row], q[1][row])
    assert torch.equal(prior_mean, mssm.gaussian(parameters[1])[0])
    assert torch.equal(prior_std, mssm.gaussian(parameters[1])[1])
    close((s_c - mean) / std, noise)
    filtered = observe(model, batch)
    z = (torch.stack([observe(model, batch).s_c for _ in range(400)]) - filtered.mean) / filtered.std
    absent = ~batch["present"].any(-1)  # there, s^f has no part in the mean
    assert 0.9 < z[:, absent].std() < 1.1 and z[:, absent].mean().abs() < 0.1


@pytest.mark.eq(11)
@pytest.mark.dev(3)
def test_nothing_present_leaves_exactly_the_prior():
    model, batch = tiny_model(), random_batch()
    filtered = observe(model, batch)
    unobserved = ~batch["present"].any(-1)
    assert unobserved.any() and not unobserved.all()
    assert torch.equal(filtered.mean[unobserved], filtered.prior_mean[unobserved])
    assert torch.equal(filtered.std[unobserved], filtered.prior_std[unobserved])
    kl = gaussian_kl(filtered.mean, filtered.std, filtered.prior_mean, filtered.prior_std)
    assert torch.equal(kl == 0, unobserved)  # exactly 0 there, and nowhere else


@pytest.mark.dev(3)
def test_nothing_present_can_be_an_s_f_of_0_as_released():
    model = tiny_model(prior_if_unobserved=False)
    fused = model.fuse(list(torch.randn(M, T, B, D_X)), torch.zeros(T, B, M).bool())
    assert (fused.s_f == 0).all() and fused.observed.all()


@pytest.mark.eq(11)
@pytest.mark.parametrize("fusion", ["product", "concatenate"])
def test_an_absent_modality_changes_nothing(fusion):
    model, batch = tiny_model(fusion, "projections"), random_batch()
    filtered = observe_seeded(model, batch)
    for m, (name, x) in enumerate(batch["observation"].items()):
        absent = ~batch["present"][..., m].view(T, B, *[1] * (x.ndim - 2))
        changed = batch["observation"] | {name: torch.where(absent, torch.full_like(x, 9), x)}
        assert same(filtered, observe_seeded(model, batch | {"observation": changed}))
        changed = batch["observation"] | {name: torch.where(absent, x, torch.full_like(x, 9))}
        assert not same(filtered, observe_seeded(model, batch | {"observation": changed}))


@pytest.mark.eq(11)
def test_the_mask_has_one_column_a_modality_in_their_order():
    """Where only modality m is present, the product is expert m, at that step and sequence."""
    model, batch = tiny_model(), random_batch()
    which = torch.randint(M, (T, B))
    filtered = observe(model, batch | {"present": torch.nn.functional.one_hot(which, M)})
    for t, b in itertools.product(range(T), range(B)):
        close(filtered.fused.mean[t, b], filtered.fused.expert_mean[t, b, which[t, b]])
        close(filtered.fused.std[t, b], filtered.fused.expert_std[t, b, which[t, b]])
    features = model.encode(batch["observation"], torch.ones(T, B, M).bool())
    for m, expert in enumerate(model.experts):
        there = which == m
        close(filtered.fused.expert_mean[there][:, m], expert(features[m])[there][:, :D_F])


METHODS = {  # fusion, heads, objective
    "mummi": ("product", "g", mummi), "mummi_b": ("product", "g", mummi_b), "mssm_e": ("product", "decoders", elbo),
    "cvrl": ("concatenate", "projections", cvrl), "dreamer": ("concatenate", "decoders", elbo),
}  # fmt: skip


def test_a_pixel_of_depth_that_reads_nothing_is_far():
    present, depth = torch.ones(1, 1).bool(), torch.full((1, 1, 64, 64, 1), 3.0)
    scaled = []
    for nothing in (mssm.MAX_DEPTH, math.nan, math.inf, 1e6):
        depth[..., :9, :9, :] = nothing
        scaled.append(mssm.scale(depth, present, None, None))
    assert all(torch.equal(x, scaled[0]) for x in scaled) and depth.isnan().sum() == 0 and scaled[0].max() == 0.5


@pytest.mark.eq(10, 11)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("nonsense", [math.nan, math.inf, -math.inf, 1e30])
def test_absent_values_never_reach_the_arithmetic(method, nonsense):
    """NaN or infinity in an absent sensor of floats: the same bits in all outputs, the loss, the metrics and the gradients."""
    fusion, heads, objective = METHODS[method]
    model, batch = tiny_model(fusion, heads), random_batch()

    def everything(observation):
        torch.manual_seed(1)
        filtered = observe(model, batch | {"observation": observation})
        loss, metrics = objective(model, filtered, batch | {"observation": observation})
        return [*filtered[:6], *(x for x in filtered.fused if x is not None), loss, *metrics.values(),
                *torch.autograd.grad(loss, list(model.parameters()))]  # fmt: skip

    spoilt = dict(batch["observation"])
    for m, name in ((1, "depth"), (2, "touch")):
        absent = ~batch["present"][..., m]
        assert absent.any() and not absent.all()
        spoilt[name] = torch.where(absent.view(T, B, *[1] * (spoilt[name].ndim - 2)), nonsense, spoilt[name])
    for expected, actual in zip(everything(batch["observation"]), everything(spoilt), strict=True):
        assert torch.equal(expected, actual) and actual.isfinite().all()


@pytest.mark.eq(11)
@pytest.mark.parametrize("fusion", ["product", "concatenate"])
def test_filtering_step_by_step_equals_filtering_the_sequence(monkeypatch, fusion):
    """What acting does, one step and a carried state, is what training does."""
    take_the_mean(monkeypatch)
    model, batch = tiny_model(fusion), random_batch()
    filtered, state = observe(model, batch), model.initial_state(B)
    for t in range(T):
        at_t = {name: x[t : t + 1] for name, x in batch["observation"].items()}
        step = model.observe(at_t, batch["present"][t : t + 1], batch["action"][t : t + 1], state)
        state = model.state(step)
        close(state.h, filtered.h[t])
        close(state.s_c, filtered.s_c[t])


@pytest.mark.eq(11)
@pytest.mark.parametrize("fusion", ["product", "concatenate"])
def test_another_episode_begins_in_a_state_of_zeros(monkeypatch, fusion):
    """Two episodes in one sequence are what each is alone, and no gradient passes from one to the other."""
    take_the_mean(monkeypatch)
    model, batch, t = tiny_model(fusion), random_batch(), 2
    first = torch.zeros(T, B, dtype=torch.bool)
    first[t, 0] = True  # in one of the sequences
    whole = observe(model, batch | {"first": first})
    rest = {name: x[t:] for name, x in batch["observation"].items()}
    alone = model.observe(rest, batch["present"][t:], batch["action"][t:])
    joined = observe(model, batch)
    for name in ("h", "s_c", "prior_mean", "prior_std"):
        x = getattr(whole, name)
        close(x[t:, 0], getattr(alone, name)[:, 0])
        close(x[:t, 0], getattr(joined, name)[:t, 0])
        close(x[:, 1:], getattr(joined, name)[:, 1:])
        assert not torch.allclose(x[t:, 0], getattr(joined, name)[t:, 0])
    batch["action"].requires_grad_()
    observe(model, batch | {"first": first}).h[-1].sum().backward()
    moved = batch["action"].grad.abs().sum(-1) > 0
    assert not moved[:t, 0].any() and moved[t:, 0].all() and moved[:, 1:].all()


@pytest.mark.eq(11)
def test_the_posterior_does_not_see_the_future():
    model, batch = tiny_model(), random_batch()
    batch["present"][2] = True
    before = observe_seeded(model, batch)
    rgb = batch["observation"]["rgb"].clone()
    rgb[2] = 255 - rgb[2]
    after = observe_seeded(model, batch | {"observation": batch["observation"] | {"rgb": rgb}})
    for t in range(T):
        assert torch.equal(before.mean[t], after.mean[t]) == (t < 2)
        assert torch.equal(before.h[t], after.h[t]) == (t <= 2)  # x_t reaches h_t+1 first


@pytest.mark.eq(9)
def test_h_depends_on_the_action_that_led_to_it():
    """action[t] is a_t-1 of Eq. (9): it changes h_t and what follows, and nothing before."""
    model, batch = tiny_model(), random_batch()
    before = observe_seeded(model, batch)
    action = batch["action"].clone()
    action[2] += 0.5
    after = observe_seeded(model, batch | {"action": action})
    for t in range(T):
        assert torch.equal(before.h[t], after.h[t]) == (t < 2)


def test_where_imagination_starts_carries_no_gradient():
    model = tiny_model()
    filtered = observe(model, random_batch())
    state = model.state(filtered)
    assert filtered.h.requires_grad and not state.h.requires_grad and not state.s_c.requires_grad
    assert torch.equal(state.h, filtered.h.flatten(0, 1)) and torch.equal(state.s_c, filtered.s_c.flatten(0, 1))


# ---- 4. Sizes, errors, compilation ---------------------------------------------------------------


def test_the_paper_size_model_has_the_released_parameter_counts():
    model = mssm.MSSM(MODALITIES, action_size=2)
    assert [count(net) for net in model.encoders] == [690_144, 689_120, 165_504]
    assert [count(net) for net in model.experts] == [3_148_800] * 3
    rssm = (model.transition_in, model.gru_x, model.gru_h, model.prior_net, model.posterior_net)
    assert sum(count(net) for net in rssm) == 557_120
    assert (count(model.g), count(model.reward_net)) == (236_544, 253_201)
    parts = [*model.encoders, *model.experts, *rssm, model.g, model.reward_net]
    assert count(model) == sum(count(net) for net in parts)  # and nothing else is built


def layers(net):
    """A network in words: each linear layer's outputs, each convolution's outputs and kernel, activations."""
    words = []
    for layer in net:
        if isinstance(layer, torch.nn.Linear):
            words.append(f"{layer.out_features}")
        elif isinstance(layer, (torch.nn.Conv2d, torch.nn.ConvTranspose2d)):
            assert layer.stride == (2, 2) and layer.padding == (0, 0)
            words.append(f"{layer.out_channels}x{layer.kernel_size[0]}")
        elif not isinstance(layer, (torch.nn.Flatten, torch.nn.Unflatten)):
            words.append(type(layer).__name__)
    return " ".join(words)


@pytest.mark.fig(7, 8, 9, 10, 11, 14, 15, 16, 17, 18)
def test_the_layers_are_those_of_the_figures():
    model = mssm.MSSM(MODALITIES, A, heads="decoders")
    assert layers(model.prior_net) == "200 ELU 60"  # Fig. 7
    assert layers(model.encoders[0]) == "32x4 ReLU 64x4 ReLU 128x4 ReLU 256x4 ReLU"  # Fig. 8
    assert layers(model.encoders[2]) == "128 ReLU 128 ReLU 128 ReLU 1024 ReLU"  # Fig. 9
    assert layers(model.experts[1]) == "1024 ReLU 2048"  # Fig. 10
    assert layers(model.posterior_net) == "200 ELU 60"  # Fig. 11
    assert model.posterior_net[0].in_features == 1024 + 200
    assert layers(model.decoders[0]) == "1024 128x5 ReLU 64x5 ReLU 32x6 ReLU 3x6"  # Fig. 16
    assert layers(model.decoders[1]) == "1024 128x5 ReLU 64x5 ReLU 32x6 ReLU 1x6"  # Fig. 17
    assert layers(model.decoders[2]) == "128 ReLU 128 ReLU 2"  # Fig. 18
    assert layers(model.reward_net) == "400 ELU 400 ELU 1"
    assert layers(tiny_model().g) == f"{D_F} ReLU"
    baseline = mssm.MSSM(MODALITIES, A, "concatenate", "projections")
    for m in range(M):  # Fig. 14, 15: the same features, concatenated
        assert layers(baseline.encoders[m]) == layers(model.encoders[m])
    assert baseline.posterior_net[0].in_features == 3 * 1024 + 200
    assert layers(baseline.project_x) == "400 ELU 200 ELU" and baseline.project_x[0].in_features == 3072
    assert layers(baseline.project_z) == "200 ELU 200 ELU" and baseline.project_z[0].in_features == 230


def test_initial_parameters_are_keras():
    """Zero biases, Glorot uniform kernels, an orthogonal recurrent kernel."""
    model = tiny_model()
    assert all((p == 0).all() for p in model.parameters() if p.ndim == 1)
    recurrent = model.gru_h.weight
    close((recurrent.T @ recurrent).detach(), torch.eye(D_H))
    linear = model.experts[0][0].weight
    assert linear.abs().max().item() == pytest.approx(math.sqrt(6 / sum(linear.shape)), rel=0.01)
    linear = model.posterior_net[0].weight  # Fig. 11: one layer of [s^f, h]
    assert linear.abs().max().item() == pytest.approx(math.sqrt(6 / sum(linear.shape)), rel=0.02)


@pytest.mark.parametrize("heads", ["g", "decoders", "projections"])
def test_only_what_the_objective_trains_is_built(heads):
    built = {name for name, _ in tiny_model(heads=heads).named_children()}
    own = {"g": {"g"}, "decoders": {"decoders"}, "projections": {"project_x", "project_z"}}
    assert built & set.union(*own.values()) == own[heads]


@pytest.mark.dev(22)
def test_the_continuation_head_is_built_on_request_alone():
    """Two ELU layers, as for the reward; log odds in float32."""
    assert not hasattr(tiny_model(), "continuation_net")
    model, latent = tiny_model(continuation=True), torch.randn(T, B, D_C + D_H)
    assert layers(model.continuation_net) == "16 ELU 16 ELU 1"
    first, _, second, _, third = model.continuation_net
    x = torch.nn.functional.elu(second(torch.nn.functional.elu(first(latent))))
    close(model.continuation(latent), (x @ third.weight.T)[..., 0])
    with torch.autocast("cpu", torch.bfloat16):
        assert model.continuation(latent).dtype == torch.float32


@pytest.mark.parametrize("arguments, message", [
    (dict(modalities={}), "'none' has shape"),
    (dict(modalities={"rgb": (32, 32, 3)}), "'rgb' has shape"),
    (dict(modalities={"touch": (2, 2)}), "'touch' has shape"),
    (dict(fusion="sum"), "fusion 'sum'"),
    (dict(heads="none"), "heads 'none'"),
])  # fmt: skip
def test_what_cannot_be_built_is_refused_with_advice(arguments, message):
    with pytest.raises(ValueError, match=message):
        mssm.MSSM(**{"modalities": MODALITIES, "action_size": A} | arguments)


def uint8(*shape):
    return torch.randint(0, 256, (T, B, *shape), dtype=torch.uint8)


@pytest.mark.parametrize("change, message", [
    (dict(touch=uint8(2)), r"'touch' is torch.uint8 \(4, 3, 2\): give float \(4, 3, 2\)"),
    (dict(touch=uint8(2).int()), "'touch' is torch.int32"),
    (dict(touch=torch.rand(T, B, 3)), r"'touch' is torch.float32 \(4, 3, 3\)"),
    (dict(touch=torch.rand(T, B)), "'touch' is"),
    (dict(touch=torch.rand(T, 1, 2)), "'touch' is"),  # would be broadcast over the sequences
    (dict(rgb=torch.rand(T, B, 64, 64, 3)), "'rgb' is torch.float32 .*: give uint8"),
    (dict(rgb=uint8(64, 64, 3).int()), "'rgb' is torch.int32"),
    (dict(rgb=uint8(3, 64, 64)), "'rgb' is torch.uint8"),
    (dict(depth=uint8(64, 64, 1)), "'depth' is torch.uint8 .*: give float, in metres .* repeat a grey picture to three"),
    (dict(depth=uint8(64, 64, 1).to(torch.uint16)), "'depth' is torch.uint16"),  # millimetres
    (dict(depth=uint8(64, 64, 1).int()), "'depth' is torch.int32"),
    (dict(depth=torch.rand(T, B, 64, 64)), "'depth' is"),
    (dict(present=torch.ones(T, B, 1)), r"present \(4, 3, 1\).*: give present \(T, B, 3\)"),  # would be broadcast
    (dict(present=torch.ones(T, B, 4)), r"present \(4, 3, 4\)"),
    (dict(present=torch.ones(M, T, B)), r"present \(3, 4, 3\)|'rgb' is"),  # another layout
    (dict(rgb=None), "depth, touch were given: give .* rgb, depth, touch"),  # a missing key
])  # fmt: skip
@pytest.mark.parametrize("fusion", ["product", "concatenate"])
def test_nothing_is_taken_for_something_else(fusion, change, message):
    """One line that says what was given and what to give."""
    batch = random_batch()
    change = dict(change)
    present = change.pop("present", batch["present"])
    observation = {name: x for name, x in (batch["observation"] | change).items() if x is not None}
    with pytest.raises(ValueError, match=message) as error:
        observe(tiny_model(fusion), {"observation": observation, "present": present, "action": batch["action"]})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [(T - 1, B, A), (T + 1, B, A), (T, B + 1, A), (B, T, A)], ids=str)
def test_actions_of_other_steps_or_sequences_are_refused(shape):
    """One short would leave out the last observation without a word."""
    with pytest.raises(ValueError, match="action"):
        observe(tiny_model(), random_batch() | {"action": torch.rand(shape)})


def test_what_can_be_meant_is_taken():
    """Depth and vectors of any floating point type, `present` as numbers, sensors that the model does not know."""
    model, batch = tiny_model(), random_batch()
    expected = observe_seeded(model, batch)
    assert same(expected, observe_seeded(model, batch | {"present": batch["present"].float()}))
    assert same(expected, observe_seeded(model, batch | {"observation": batch["observation"] | {"sound": uint8(7)}}))
    reverse = dict(reversed(batch["observation"].items()))  # the model's order counts, not the dictionary's
    assert same(expected, observe_seeded(model, batch | {"observation": reverse}))
    for kind in (torch.float64, torch.float16):
        converted = {name: x.to(kind) if x.is_floating_point() else x for name, x in batch["observation"].items()}
        close(observe_seeded(model, batch | {"observation": converted}).mean, expected.mean, 1e-2)


@pytest.mark.parametrize("fusion", ["product", "concatenate"])
def test_a_sensor_may_have_any_name(fusion):
    """Names that a module cannot have: with dots, as of LeRobot's data, and of attributes."""
    names = ["observation.images.top", "keys", "a.b"]
    model = mssm.MSSM(dict(zip(names, MODALITIES.values())), A, fusion, "decoders", **TINY)
    plain, batch = tiny_model(fusion, "decoders"), random_batch()
    plain.load_state_dict(model.state_dict())  # the same names of parameters
    renamed = batch | {"observation": dict(zip(names, batch["observation"].values()))}
    filtered = observe_seeded(model, renamed)
    assert same(filtered, observe_seeded(plain, batch))
    loss, metrics = elbo(model, filtered, renamed)
    assert list(model.decode(model.latent(filtered.h, filtered.s_c))) == names
    assert {f"reconstruction_{name}" for name in names} <= set(metrics)
    close(loss, elbo(plain, filtered, batch)[0])


@pytest.mark.parametrize("fusion, heads", [("product", "g"), ("product", "decoders"), ("concatenate", "projections")])
def test_observe_and_imagine_compile_into_one_graph(monkeypatch, fusion, heads):
    take_the_mean(monkeypatch)
    model, batch = tiny_model(fusion, heads), random_batch(2)

    def run(observation, present, action):
        filtered = model.observe(observation, present, action)
        state = model.imagine_step(model.state(filtered), action.flatten(0, 1))
        return filtered.mean, filtered.h, model.reward(model.latent(*state))

    arguments = batch["observation"], batch["present"], batch["action"]
    compiled = torch.compile(run, fullgraph=True, backend="eager")(*arguments)
    for actual, expected in zip(compiled, run(*arguments)):
        close(actual, expected)


@pytest.mark.parametrize("function, sizes", [
    (mssm.gru, (3 * D_H, 3 * D_H, D_H)), (mssm.sample, (2 * D_H, D_H)), (mssm.add_elu, (D_H, D_H)),
])  # fmt: skip
def test_what_a_gpu_compiles_is_one_graph_for_every_batch(function, sizes):
    """Forwards and backwards, as a GPU would have it but for the kernels; a third batch size compiles nothing new."""
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for rows in (B, 4 * B, 9 * B):
        arguments = [torch.randn(rows, size, requires_grad=True) for size in sizes]
        result, expected = compiled(*arguments), function(*arguments)
        close(result, expected)
        for x, y in zip(torch.autograd.grad(result.sum(), arguments), torch.autograd.grad(expected.sum(), arguments)):
            close(x, y)
        if rows == 4 * B:
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.dev(14)
def test_gaussians_are_in_float32_under_autocast():
    model, batch = tiny_model(), random_batch()
    with torch.autocast("cpu", torch.bfloat16):
        filtered = observe(model, batch)
        fields = [filtered.h, filtered.mean, filtered.std, filtered.s_c, filtered.prior_mean, filtered.fused.s_f,
                  filtered.fused.expert_std, model.reward(model.latent(filtered.h, filtered.s_c))]  # fmt: skip
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in fields)
