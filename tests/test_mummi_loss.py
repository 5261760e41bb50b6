"""mummi_loss.py against float64 oracles in another form: loops, distributions, known information."""

import math

import pytest
import torch
from conftest import close
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

import mummi_loss as ml

N, D = 7, 3


def absent_some():
    return torch.tensor([1, 0, 1, 1, 0, 1, 1]).bool()


def info_nce_in_python(log_f, present):
    """Eq. (15) as two loops in float64."""
    log_f, bounds = log_f.tolist(), []
    for i in range(len(log_f)):
        terms = [log_f[i][j] for j in range(len(log_f)) if present[j]]
        highest = max(terms, default=0.0)
        log_sum = highest + math.log(sum(math.exp(term - highest) for term in terms)) if terms else 0.0
        bounds.append(log_f[i][i] - log_sum if present[i] else 0.0)
    return torch.tensor(bounds, dtype=torch.float64)


def correlated(count, dimension, rho):
    """Pairs (z, x) of standard normals with correlation rho, and the log p(x_j | z_i) of all pairs."""
    z = torch.randn(count, dimension, dtype=torch.float64)
    x = rho * z + math.sqrt(1 - rho**2) * torch.randn_like(z)
    conditional = Normal(rho * z.unsqueeze(1), math.sqrt(1 - rho**2))
    return z, x, conditional.log_prob(x.unsqueeze(0)).sum(-1)


# ---- 1. Shared terms -----------------------------------------------------------------------------


@pytest.mark.eq(7)
@pytest.mark.eq(8)
def test_gaussian_log_prob_is_the_log_density_of_unit_variance():
    x, mean = torch.randn(2, N, 4, 5)
    expected = Independent(Normal(mean.double(), 1.0), 2).log_prob(x.double())
    close(ml.gaussian_log_prob(x, mean, event_dims=2), expected)
    close(ml.gaussian_log_prob(x, mean), Normal(mean.double(), 1.0).log_prob(x.double()))


@pytest.mark.eq(10, 17)
def test_gaussian_kl_of_the_posterior_from_the_prior():
    mean_q, mean_p = torch.randn(2, N, D, dtype=torch.float64)
    std_q, std_p = torch.rand(2, N, D, dtype=torch.float64) + 0.1
    q, p = Independent(Normal(mean_q, std_q), 1), Independent(Normal(mean_p, std_p), 1)
    close(ml.gaussian_kl(mean_q, std_q, mean_p, std_p), kl_divergence(q, p), 1e-12)


def test_gaussian_kl_of_equals_is_exactly_zero_with_a_zero_gradient():
    mean, std = torch.randn(N, D), torch.rand(N, D) + 0.1
    std.requires_grad_()
    kl = ml.gaussian_kl(mean, std, mean, std.detach())
    kl.sum().backward()
    assert torch.equal(kl, torch.zeros(N)) and std.grad.abs().max() < 1e-5


@pytest.mark.dev(5)
def test_mean_over_counts_present_rows_alone():
    x = torch.arange(7.0)
    assert ml.mean_over(x, absent_some()) == (0 + 2 + 3 + 5 + 6) / 5
    assert ml.mean_over(x, torch.zeros(7).bool()) == 0


# ---- 2. Mutual information -----------------------------------------------------------------------


@pytest.mark.eq(16)
def test_log_density_ratio_is_minus_the_squared_distance():
    g_z, expert_mean = torch.randn(N, 16), torch.randn(N, 16)
    expected = [[-sum((e - c) ** 2 for c, e in zip(z, x)) for x in expert_mean.tolist()] for z in g_z.tolist()]
    close(ml.log_density_ratio(g_z, expert_mean), expected)


@pytest.mark.dev(14)
def test_log_density_ratio_stays_in_float32_under_autocast():
    g_z, expert_mean = torch.randn(2, N, 64)
    distances = torch.cdist(g_z.double(), expert_mean.double()).square()
    with torch.autocast("cpu", torch.bfloat16):
        close(ml.log_density_ratio(g_z, expert_mean), -distances)
        close(ml.log_inner_product(g_z, expert_mean), g_z.double() @ expert_mean.double().T)
        for function in (ml.log_density_ratio, ml.log_inner_product):
            assert function(g_z.bfloat16(), expert_mean.bfloat16()).dtype == torch.float32


@pytest.mark.eq(14)
def test_the_density_ratio_is_the_best_critic():
    """Eq. (14): among critics, p(x | z) / p(x) attains the highest bound; a factor of z alone is free."""
    _, x, log_p_x_given_z = correlated(500, 2, 0.8)
    log_p_x = Normal(0.0, 1.0).log_prob(x).sum(-1)
    present = torch.ones(500).bool()
    bound = lambda log_f: ml.info_nce(log_f, present).mean()  # noqa: E731
    best = bound(log_p_x_given_z - log_p_x)
    for worse in (0.5, 0.8, 1.25, 2.0):
        assert bound(worse * (log_p_x_given_z - log_p_x)) < best
    assert bound(log_p_x_given_z) < best
    close(bound(log_p_x_given_z - log_p_x + torch.randn(500, 1)), best)


@pytest.mark.eq(15)
@pytest.mark.dev(4)
def test_info_nce_equals_the_double_loop_when_some_are_absent():
    for scale in (1.0, 1000.0):  # true distances are in the hundreds: an absent one must not be nearest
        log_f = -scale * torch.rand(N, N)
        for present in (absent_some(), torch.ones(N).bool()):
            close(ml.info_nce(log_f, present), info_nce_in_python(log_f, present))


@pytest.mark.dev(4)
def test_what_is_absent_changes_no_bound():
    log_f, present = torch.randn(N, N), absent_some()
    changed = torch.where(present & present.unsqueeze(1), log_f, 1e4 * torch.rand(N, N))
    assert torch.equal(ml.info_nce(log_f, present), ml.info_nce(changed, present))


def test_nothing_present_is_zero_with_finite_gradients():
    g_z, expert_mean = torch.randn(2, N, D, requires_grad=True).unbind()
    g_z.retain_grad()
    present = torch.zeros(N).bool()
    bound = ml.info_nce(ml.log_density_ratio(g_z, expert_mean), present)
    loss = ml.mummi_loss({"rgb": bound}, {"rgb": present}, {"rgb": 1.0}, torch.zeros(N), torch.zeros(N), 0.0)
    loss.backward()
    assert torch.equal(bound, torch.zeros(N)) and loss == 0
    assert torch.equal(g_z.grad, torch.zeros(N, D))
    assert ml.mutual_information(bound, present) == 0


def test_absent_observations_get_no_gradient():
    g_z, expert_mean, present = torch.randn(N, D), torch.randn(N, D, requires_grad=True), absent_some()
    ml.info_nce(ml.log_density_ratio(g_z, expert_mean), present).sum().backward()
    assert expert_mean.grad.isfinite().all()
    assert torch.equal(expert_mean.grad.abs().sum(-1) > 0, present)


@pytest.mark.eq(12, 15)
def test_mutual_information_bounds_that_of_correlated_gaussians_from_below():
    """The true I(z; x) = -D/2 log(1 - rho^2) nats; the optimal critic comes within 0.1 of it."""
    rho, present = 0.8, torch.ones(300).bool()
    pair = MultivariateNormal(torch.zeros(2), torch.tensor([[1, rho], [rho, 1]]))
    true = D * (2 * Normal(0.0, 1.0).entropy() - pair.entropy()).item()
    assert true == pytest.approx(-D / 2 * math.log(1 - rho**2), abs=1e-6)
    estimates = []
    for _ in range(20):
        _, x, log_p = correlated(300, D, rho)
        log_f = log_p - Normal(0.0, 1.0).log_prob(x).sum(-1)
        estimates.append(ml.mutual_information(ml.info_nce(log_f, present), present))
    mean, error = torch.stack(estimates).mean().item(), torch.stack(estimates).std().item() / 20**0.5
    assert true - 0.1 < mean < true + 2 * error


@pytest.mark.eq(12, 15)
def test_mutual_information_is_at_most_log_of_the_number_present():
    present = absent_some()
    for scale in (1.0, 100.0, 1e4):
        bound = ml.info_nce(scale * torch.eye(N), present)
        assert (bound <= 0).all()
        assert ml.mutual_information(bound, present) <= math.log(5) + 1e-6
    close(ml.mutual_information(bound, present), math.log(5))  # reached by a perfect critic
    close(ml.mutual_information(ml.info_nce(torch.zeros(N, N), present), present), 0)  # a blind one


def test_log_inner_product_of_all_pairs():
    z, x = torch.randn(2, N, D)
    close(ml.log_inner_product(z, x), [[sum(a * b for a, b in zip(i, j)) for j in x.tolist()] for i in z.tolist()])


# ---- 3. Objectives -------------------------------------------------------------------------------


def random_terms():
    """Two modalities' terms, their masks, log p(r | z) and KL, with a mean KL well above 3."""
    terms, log_reward = {"rgb": -torch.rand(N), "touch": -torch.rand(N)}, -torch.rand(N)
    return terms, {"rgb": absent_some(), "touch": ~absent_some()}, log_reward, 4 + 3 * torch.rand(N)


@pytest.mark.eq(17)
@pytest.mark.dev(5, 8)
def test_mummi_loss_is_the_sum_written_out():
    bounds, present, log_reward, kl = random_terms()
    weights, total = {"rgb": 2.0, "touch": 0.001}, 0.0
    for name in bounds:
        rows = [bound for bound, observed in zip(bounds[name].tolist(), present[name]) if observed]
        total += weights[name] * sum(rows) / len(rows)
    total += sum(log_reward.tolist()) / N - max(sum(kl.tolist()) / N, 3)
    close(ml.mummi_loss(bounds, present, weights, log_reward, kl), -total)


@pytest.mark.dev(5)
def test_mummi_loss_can_average_over_all_rows_as_released():
    bounds, present, _, _ = random_terms()
    bounds = {name: bound * present[name] for name, bound in bounds.items()}  # as `info_nce` gives them
    loss = ml.mummi_loss(bounds, present, {"rgb": 1.0, "touch": 1.0}, torch.zeros(N), torch.zeros(N), 0.0, False)
    close(loss, -sum(sum(bound.tolist()) for bound in bounds.values()) / N)


@pytest.mark.eq(10)
def test_elbo_loss_is_the_sum_written_out():
    log_likelihoods, present, log_reward, kl = random_terms()
    total = 0.0
    for t in range(N):
        total += log_reward[t].item() - kl[t].item()
        total += sum(log_likelihoods[name][t].item() for name in present if present[name][t])
    close(ml.elbo_loss(log_likelihoods, present, log_reward, kl), -total / N)


@pytest.mark.eq(10, 17)
@pytest.mark.dev(19)
def test_free_nats_apply_to_the_mean_kl_not_to_each_step():
    kl = torch.tensor([0.0, 0.0, 5.0, 8.0])  # mean 3.25; clamped step by step it would be 4.75
    zero, present = torch.zeros(4), torch.ones(4).bool()
    for loss in (
        ml.mummi_loss({"rgb": zero}, {"rgb": present}, {"rgb": 1.0}, zero, kl),
        ml.elbo_loss({"rgb": zero}, {"rgb": present}, zero, kl),
    ):
        assert loss == 3.25
    assert ml.elbo_loss({"rgb": zero}, {"rgb": present}, zero, kl / 10) == 3


@pytest.mark.eq(10)
def test_an_absent_modality_adds_no_likelihood():
    log_likelihoods, present, log_reward, kl = random_terms()
    changed = {name: torch.where(present[name], x, -1e6) for name, x in log_likelihoods.items()}
    losses = [ml.elbo_loss(x, present, log_reward, kl) for x in (log_likelihoods, changed)]
    assert torch.equal(*losses)


def test_every_loss_compiles_into_one_graph():
    """fullgraph=True: nothing branches on data or moves a value to the host."""
    terms, present, log_reward, kl = random_terms()
    g_z, expert_mean = torch.randn(2, N, D)

    def losses(g_z, expert_mean, present, log_reward, kl):
        bounds = {k: ml.info_nce(ml.log_density_ratio(g_z, expert_mean), present[k]) for k in present}
        nats = ml.mutual_information(bounds["rgb"], present["rgb"]) + ml.log_inner_product(g_z, g_z).mean()
        weights = {"rgb": 1.0, "touch": 0.001}
        kl = kl + ml.gaussian_kl(g_z, g_z.exp(), expert_mean, expert_mean.exp())
        log_reward = log_reward + ml.gaussian_log_prob(g_z, expert_mean, 1)
        return ml.mummi_loss(bounds, present, weights, log_reward, kl), ml.elbo_loss(bounds, present, log_reward, kl), nats

    arguments = (g_z, expert_mean, present, log_reward, kl)
    compiled = torch.compile(losses, fullgraph=True, backend="eager")(*arguments)
    for actual, expected in zip(compiled, losses(*arguments)):
        close(actual, expected)
