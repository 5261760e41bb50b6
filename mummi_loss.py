"""The objectives of MuMMI and of its baselines: what the world model learns from.

Holds the density ratio of Eq. (14) in the form of Eq. (16), the InfoNCE bound of Eq. (15) on the
mutual information of Eq. (12), and the losses made of them, MuMMI's Eq. (17) and the ELBO of Eq. (10),
as pure functions of tensors; then the objectives of the five methods, which read a world model (`mssm.py`).

symbol     name here      meaning                                           size
mu^m(x)    expert_mean    mean of modality m's expert                       (N, D_f)
g(z)       g_z            mean predicted from the latent state              (N, D_f)
log f      log_f          log f[i, j] of latent i and observation j         (N, N)
lambda^m   weights        weight of modality m's bound                      float
           present        True where the modality was observed              (N,)
KL         kl             KL[q(s^c | s^f, h) || p(s^c | h)] of each step    (N,)

Shapes: N = T * B, every step of every sequence of the batch. Nats, in float32 whatever the autocast
type. Losses are to be minimised: minus the bounds of the paper.

    log_f = log_density_ratio(g_z, expert_mean)                        # (N, N)
    bound = info_nce(log_f, present)                                   # (N,)
    kl = gaussian_kl(mean, std, prior_mean, prior_std)                 # (N,)
    loss = mummi_loss({"rgb": bound}, {"rgb": present}, {"rgb": 1.0}, log_reward, kl)
    loss, metrics = mummi(model, filtered, batch)                      # all of it, of an MSSM
"""

import math
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

# ---- 1. Terms that every objective shares --------------------------------------------------------


def gaussian_log_prob(x, mean, event_dims=0):
    """Log density of a Gaussian with unit variance, summed over the last `event_dims` axes.

    x, mean  (..., *event)
    returns  (...)  nats.  log p(r | z) of Eq. (8), log p(x^m | z) of Eq. (7)
    """
    log_prob = -0.5 * (x.float() - mean.float()).square() - 0.5 * math.log(2 * math.pi)
    return log_prob.flatten(-event_dims).sum(-1) if event_dims else log_prob


def gaussian_kl(mean_q, std_q, mean_p, std_p):
    """KL[q || p] of diagonal Gaussians in closed form, all (..., D) -> (...) nats."""
    ratio = (std_q / std_p).square()
    return 0.5 * (ratio + ((mean_q - mean_p) / std_p).square() - 1 - ratio.log()).sum(-1)


def mean_over(x, present):
    """Mean of x over the rows where present; 0 if there are none. (N,), (N,) -> ()"""
    return torch.where(present, x, 0.0).sum() / present.sum().clamp(min=1)


# ---- 2. Mutual information, Eq. (12), (14)-(16) --------------------------------------------------


def log_density_ratio(g_z, expert_mean):
    """Eq. (16): log f[i, j] = -|| mu^m(x_j) - g(z_i) ||^2, the density ratio of Eq. (14): Fig. 3.

    g_z          (N, D_f)  g(z_i) of latent i, a row
    expert_mean  (N, D_f)  mu^m(x_j) of observation j, a column; the fused mean gives f_b (MuMMI-b)
    returns      (N, N)    float32: bfloat16 would round a distance of hundreds
    """
    with torch.autocast(g_z.device.type, enabled=False):
        g_z, expert_mean = g_z.float(), expert_mean.float()
        squares = g_z.square().sum(-1, keepdim=True) + expert_mean.square().sum(-1)  # (N, N)
        return 2 * g_z @ expert_mean.T - squares


def log_inner_product(projected_z, projected_x):
    """[CVRL] log f[i, j] = z_i . x_j of projected latents and observations, (N, D) -> (N, N)."""
    with torch.autocast(projected_z.device.type, enabled=False):
        return projected_z.float() @ projected_x.float().T


def info_nce(log_f, present, absent_logit=-math.inf):
    """Eq. (15): log f(x+, z) - log sum over x of f(x, z), for each observed step; the sum has x+ in it.

    log_f    (N, N)  log f[i, j] of latent i and observation j; the positive of row i is column i
    present  (N,)    True where this modality was observed
    returns  (N,)    nats, at most 0; 0 where absent.  Dev. D4: absent columns are -inf,
                     [code] has absent_logit = -100
    """
    log_f = log_f.float().masked_fill(~present & present.any(), absent_logit)  # columns, unless all are absent
    positive = torch.arange(len(log_f), device=log_f.device)  # of row i: column i
    return torch.where(present, -F.cross_entropy(log_f, positive, reduction="none"), 0.0)


def mutual_information(bound, present):
    """Eq. (12), bounded from below: E[InfoNCE] + log N, the nats that z shares with a modality.

    bound    (N,)  from `info_nce`
    present  (N,)
    returns  ()    at most log of the number of present steps
    """
    return mean_over(bound, present) + present.sum().clamp(min=1).log()


# ---- 3. Losses, Eq. (10), (17) -------------------------------------------------------------------


def mummi_loss(bounds, present, weights, log_reward, kl, free_nats=3.0, over_present=True):
    """Eq. (17): - (sum_m lambda^m InfoNCE^m + log p(r | z) - max(KL, free nats)).

    bounds        {name: (N,)}  Eq. (15) of each modality (for MuMMI-b: of the fused mean alone)
    present       {name: (N,)}  rows that count.  Dev. D5: the mean is over them; over_present=False
                                averages over all rows, [code]
    weights       {name: float}  lambda^m.  Dev. D8
    log_reward    (N,)  log p(r | z)
    kl            (N,)
    free_nats     nats of the mean KL that cost nothing, [Dreamer].  Dev. D19
    returns       ()
    """
    mean = {m: mean_over(bound, present[m]) if over_present else bound.mean() for m, bound in bounds.items()}
    information = sum(weights[m] * mean[m] for m in bounds)
    return -(information + log_reward.mean() - kl.mean().clamp(min=free_nats))


def elbo_loss(log_likelihoods, present, log_reward, kl, free_nats=3.0):
    """Eq. (10): - (sum_m log p(x^m | z) + log p(r | z) - max(KL, free nats)).

    log_likelihoods  {name: (N,)}  of each modality, summed over its pixels
    present          {name: (N,)}  an absent modality has no likelihood to add
    log_reward, kl   (N,)
    returns          ()
    """
    reconstruction = sum(torch.where(present[m], log_p, 0.0).mean() for m, log_p in log_likelihoods.items())
    return -(reconstruction + log_reward.mean() - kl.mean().clamp(min=free_nats))


# ---- 4. Objectives: from a model and a batch to its loss -----------------------------------------


@dataclass(frozen=True)
class Weights:
    """Weights of the objectives' terms, and how absent observations count."""

    modalities: dict = field(default_factory=dict)  # lambda^m by name; 1 for all others.  Dev. D8
    reward: float = 1.0  # of log p(r | z)
    free_nats: float = 3.0  # Dev. D19
    fused_kl: float = 0.0  # of KL[q(s^f | x) || p(s^f | s^c)].  Dev. D6
    absent_logit: float = -math.inf  # Dev. D4
    over_present: bool = True  # Dev. D5


def shared_terms(model, filtered, batch, weights):
    """The terms that objectives share, from a model (`mssm.MSSM`), its inference and a batch.

    returns  latent (N, D_z), log p(r | z) (N,) with its weight, KL (N,), {name: ()} to log
    """
    latent = model.latent(filtered.h, filtered.s_c).flatten(0, 1)
    predicted, reward = model.reward(latent), batch["reward"].flatten()
    log_reward = weights.reward * gaussian_log_prob(reward, predicted)
    if "continues" in batch:  # 0 where the episode ended, 1 elsewhere, (T, B).  Dev. D22
        log_odds, continues = model.continuation(latent), batch["continues"].flatten()
        log_reward = log_reward - F.binary_cross_entropy_with_logits(log_odds, continues, reduction="none")
    kl = gaussian_kl(filtered.mean, filtered.std, filtered.prior_mean, filtered.prior_std).flatten()
    error = (reward - predicted).square().mean()
    metrics = {"kl": kl.mean(), "reward_square_error": error, "reward_variance": reward.var(correction=0)}
    return latent, log_reward, kl, metrics


def contrastive_loss(log_f, present, log_reward, kl, weights):
    """Eq. (17) from density ratios {name: (N, N)} and masks {name: (N,)}, and each modality's bound in nats."""
    bounds = {name: info_nce(log_f[name], present[name], weights.absent_logit) for name in log_f}
    nats = {f"information_{name}": mutual_information(bounds[name], present[name]) for name in log_f}
    lambdas = {name: weights.modalities.get(name, 1.0) for name in log_f}
    return mummi_loss(bounds, present, lambdas, log_reward, kl, weights.free_nats, weights.over_present), nats


def fused_kl(model, filtered, weights):
    """The KL of s^f in Eq. (10) and (17), which the released code leaves out.  Dev. D6"""
    if weights.fused_kl == 0 or filtered.fused.mean is None:
        return 0.0
    kl = gaussian_kl(filtered.fused.mean, filtered.fused.std, *model.fused_prior(filtered.s_c))
    return weights.fused_kl * mean_over(kl, filtered.present.any(-1))


def mummi(model, filtered, batch, weights=Weights()):
    """Eq. (17): one density ratio a modality pulls every expert's mean to the shared g(z)."""
    latent, log_reward, kl, metrics = shared_terms(model, filtered, batch, weights)
    g_z = model.g(latent)  # (N, D_f)
    experts = dict(zip(model.modalities, filtered.fused.expert_mean.flatten(0, 1).unbind(1)))  # {name: (N, D_f)}
    present = dict(zip(model.modalities, filtered.present.flatten(0, 1).unbind(1)))  # {name: (N,)}
    log_f = {name: log_density_ratio(g_z, mean) for name, mean in experts.items()}
    loss, nats = contrastive_loss(log_f, present, log_reward, kl, weights)
    return loss + fused_kl(model, filtered, weights), metrics | nats


def mummi_b(model, filtered, batch, weights=Weights()):
    """Eq. (17) with f_b of section V: one density ratio, of the fused product's mean."""
    latent, log_reward, kl, metrics = shared_terms(model, filtered, batch, weights)
    log_f = {"fused": log_density_ratio(model.g(latent), filtered.fused.mean.flatten(0, 1))}
    present = {"fused": filtered.present.any(-1).flatten()}
    loss, nats = contrastive_loss(log_f, present, log_reward, kl, weights)
    return loss + fused_kl(model, filtered, weights), metrics | nats


def cvrl(model, filtered, batch, weights=Weights()):
    """[CVRL] (Ma et al., arXiv 2008.02430): one bound between the latent and all features, zeros where missing."""
    latent, log_reward, kl, metrics = shared_terms(model, filtered, batch, weights)
    features = model.project_x(filtered.fused.s_f.flatten(0, 1))
    log_f = {"concatenated": log_inner_product(model.project_z(latent), features)}
    present = {"concatenated": filtered.present.any(-1).flatten()}
    loss, nats = contrastive_loss(log_f, present, log_reward, kl, weights)
    return loss, metrics | nats


def elbo(model, filtered, batch, weights=Weights()):
    """Eq. (10): every modality that is present is reconstructed."""
    latent, log_reward, kl, metrics = shared_terms(model, filtered, batch, weights)
    decoded = model.decode(latent.unflatten(0, filtered.h.shape[:2]))
    present = dict(zip(model.modalities, filtered.present.flatten(0, 1).unbind(1)))
    log_likelihoods = {}
    for name, x in model.scale(batch["observation"], filtered.present).items():
        log_likelihoods[name] = gaussian_log_prob(x, decoded[name], event_dims=x.ndim - 2).flatten()
        metrics[f"reconstruction_{name}"] = mean_over(log_likelihoods[name], present[name])
    loss = elbo_loss(log_likelihoods, present, log_reward, kl, weights.free_nats)
    return loss + fused_kl(model, filtered, weights), metrics


if __name__ == "__main__":
    N, D_f = 50, 16
    g_z = torch.randn(N, D_f, requires_grad=True)
    expert_mean, present = g_z.detach() + 0.1 * torch.randn(N, D_f), torch.rand(N) > 0.375
    log_f = log_density_ratio(g_z, expert_mean)
    bound = info_nce(log_f, present)
    kl, log_reward = gaussian_kl(*(torch.rand(4, N, D_f) + 0.5)), gaussian_log_prob(torch.rand(N), torch.rand(N))
    loss = mummi_loss({"rgb": bound}, {"rgb": present}, {"rgb": 1.0}, log_reward, kl)
    loss.backward()
    print(f"log f {tuple(log_f.shape)}  bound {tuple(bound.shape)}  kl {tuple(kl.shape)}  loss {loss:.2f}")
    print(f"mutual information {mutual_information(bound, present):.2f} of at most {present.sum().log():.2f} nats")
