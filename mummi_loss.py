"""The objectives of MuMMI and of its baselines, as pure functions of tensors.

Holds the density ratio of Eq. (14) in the form of Eq. (16), the InfoNCE bound of Eq. (15) on the
mutual information of Eq. (12), and the losses made of them: MuMMI's Eq. (17), the ELBO of Eq. (10)
and the contrastive loss of [CVRL] (Ma et al., arXiv 2008.02430).

symbol     name here      meaning                                           size
mu^m(x)    expert_mean    mean of modality m's expert                       (N, D_f)
g(z)       code           code predicted from the latent state              (N, D_f)
log f      log_f          log f[i, j] of latent i and observation j         (N, N)
lambda^m   weight         weight of modality m's bound                      float
           present        True where the modality was observed              (N,)
KL         kl             KL[q(s^c | s^f, h) || p(s^c | h)] of each step    (N,)

Shapes: N = T * B, every step of every sequence of the batch. Nats, in float32 whatever the autocast
type. Losses are to be minimised: minus the bounds of the paper.

    log_f = log_density_ratio(code, expert_mean)                       # (N, N)
    bound = info_nce(log_f, present)                                   # (N,)
    kl = gaussian_kl(mean, std, prior_mean, prior_std)                 # (N,)
    loss = mummi_loss({"rgb": bound}, {"rgb": present}, {"rgb": 1.0}, log_reward, kl)
"""

import math

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


def log_density_ratio(code, expert_mean):
    """Eq. (16): log f[i, j] = -|| mu^m(x_j) - g(z_i) ||^2, the density ratio of Eq. (14): Fig. 3.

    code         (N, D_f)  g(z_i) of latent i, a row
    expert_mean  (N, D_f)  mu^m(x_j) of observation j, a column; the fused mean gives f_b (MuMMI-b)
    returns      (N, N)    float32: a distance of hundreds has no digits to spare
    """
    with torch.autocast(code.device.type, enabled=False):
        code, expert_mean = code.float(), expert_mean.float()
        squares = code.square().sum(-1, keepdim=True) + expert_mean.square().sum(-1)  # (N, N)
        return 2 * code @ expert_mean.T - squares


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


# ---- 3. Objectives of the world model ------------------------------------------------------------


def mummi_loss(bounds, present, weights, log_reward, kl, free_nats=3.0, over_present=True):
    """Eq. (17): - (sum_m lambda^m InfoNCE^m + log p(r | z) - max(KL, free nats)).

    bounds        {name: (N,)}  Eq. (15) of each modality (of the fused code alone for MuMMI-b)
    present       {name: (N,)}  rows that count.  Dev. D5: the mean is over them; over_present=False
                                averages over all rows, [code]
    weights       {name: float}  lambda^m.  Dev. D8
    log_reward    (N,)  log p(r | z)
    kl            (N,)
    free_nats     nats of the mean KL that cost nothing, [Dreamer].  Dev. D19
    returns       ()
    """
    information = sum(
        weights[name] * (mean_over(bound, present[name]) if over_present else bound.mean())
        for name, bound in bounds.items()
    )
    return -(information + log_reward.mean() - kl.mean().clamp(min=free_nats))


def elbo_loss(log_likelihoods, present, log_reward, kl, free_nats=3.0):
    """Eq. (10): - (sum_m log p(x^m | z) + log p(r | z) - max(KL, free nats)).

    log_likelihoods  {name: (N,)}  of each modality, summed over its pixels
    present          {name: (N,)}  an absent modality has no likelihood to add
    log_reward, kl   (N,)
    returns          ()
    """
    reconstruction = sum(
        torch.where(present[name], log_likelihood, 0.0).mean()
        for name, log_likelihood in log_likelihoods.items()
    )
    return -(reconstruction + log_reward.mean() - kl.mean().clamp(min=free_nats))


if __name__ == "__main__":
    N, D_f = 50, 16
    code = torch.randn(N, D_f, requires_grad=True)
    expert_mean, present = code.detach() + 0.1 * torch.randn(N, D_f), torch.rand(N) > 0.375
    log_f = log_density_ratio(code, expert_mean)
    bound = info_nce(log_f, present)
    kl = gaussian_kl(*(torch.rand(4, N, D_f) + 0.5))
    log_reward = gaussian_log_prob(torch.rand(N), torch.rand(N))
    loss = mummi_loss({"rgb": bound}, {"rgb": present}, {"rgb": 1.0}, log_reward, kl)
    loss.backward()
    print(f"log f {tuple(log_f.shape)}  bound {tuple(bound.shape)}  kl {tuple(kl.shape)}")
    print(f"mutual information {mutual_information(bound, present):.2f} of at most "
          f"log N = {present.sum().log():.2f} nats, loss {loss:.2f}")  # fmt: skip
