"""The five methods of Tables I and II: a fusion and an objective each, and nothing else differs.

An objective is a function of the model, of what it inferred from a batch (`mssm.Filtered`) and of the
batch (`Agent.update`); it returns the loss of the world model and a dictionary of scalars to log. The
configuration gives its weights (`config.Config`, group *Objective*).

Shapes: T steps, B sequences, N = T * B, M modalities.
"""

from mssm import normalise
from mummi_loss import (elbo_loss, gaussian_kl, gaussian_log_prob, info_nce, log_density_ratio,
                        log_inner_product, mean_over, mummi_loss, mutual_information)  # fmt: skip

# ---- 1. What the objectives share ----------------------------------------------------------------


def shared_terms(model, filtered, batch, config):
    """What every objective has: latents (N, D_z), log p(r | z) (N,) with its weight, KL (N,) and metrics."""
    latent = model.latent(filtered.h, filtered.s_c).flatten(0, 1)
    predicted, reward = model.reward(latent), batch["reward"].flatten()
    log_reward = config.reward_weight * gaussian_log_prob(reward, predicted)
    kl = gaussian_kl(filtered.mean, filtered.std, filtered.prior_mean, filtered.prior_std).flatten()
    error = (reward - predicted).square().mean() / reward.var(correction=0).clamp(min=1e-6)
    return latent, log_reward, kl, {"kl": kl.mean(), "reward_error": error}


def information(log_f, present, config):
    """InfoNCE of every density ratio, Eq. (15), and the nats it shows, Eq. (12)."""
    bounds = {name: info_nce(log_f[name], present[name], config.absent_logit) for name in log_f}
    metrics = {f"information_{name}": mutual_information(bounds[name], present[name]) for name in log_f}
    return bounds, metrics


def fused_kl(model, filtered, config):
    """The KL of s^f in Eq. (10) and (17), which the released code leaves out.  Dev. D6"""
    if config.fused_kl_scale == 0 or filtered.fused.mean is None:
        return 0.0
    kl = gaussian_kl(filtered.fused.mean, filtered.fused.std, *model.fused_prior(filtered.s_c))
    return config.fused_kl_scale * mean_over(kl, filtered.present.any(0))


# ---- 2. Objectives -------------------------------------------------------------------------------


def mummi(model, filtered, batch, config):
    """Eq. (17): one density ratio a modality pulls every expert's mean to the shared code g(z)."""
    latent, log_reward, kl, metrics = shared_terms(model, filtered, batch, config)
    code = model.code(latent)  # (N, D_f)
    experts = dict(zip(model.modalities, filtered.fused.expert_mean.flatten(1, 2)))
    present = dict(zip(model.modalities, filtered.present.flatten(1)))
    log_f = {name: log_density_ratio(code, mean) for name, mean in experts.items()}
    bounds, nats = information(log_f, present, config)
    weights = {name: config.touch_weight if name == "touch" else 1.0 for name in bounds}
    loss = mummi_loss(bounds, present, weights, log_reward, kl, config.free_nats, config.over_present)
    return loss + fused_kl(model, filtered, config), metrics | nats


def mummi_b(model, filtered, batch, config):
    """Eq. (17) with f_b of section V: one density ratio, of the fused product's mean."""
    latent, log_reward, kl, metrics = shared_terms(model, filtered, batch, config)
    present = {"fused": filtered.present.any(0).flatten()}
    log_f = {"fused": log_density_ratio(model.code(latent), filtered.fused.mean.flatten(0, 1))}
    bounds, nats = information(log_f, present, config)
    loss = mummi_loss(bounds, present, {"fused": 1.0}, log_reward, kl, config.free_nats, config.over_present)
    return loss + fused_kl(model, filtered, config), metrics | nats


def cvrl(model, filtered, batch, config):
    """[CVRL]: one contrastive bound between the latent and all features, zeros where missing."""
    latent, log_reward, kl, metrics = shared_terms(model, filtered, batch, config)
    present = {"concatenated": filtered.present.any(0).flatten()}
    features = model.project_x(filtered.fused.s_f.flatten(0, 1))
    bounds, nats = information({"concatenated": log_inner_product(model.project_z(latent), features)}, present, config)
    loss = mummi_loss(bounds, present, {"concatenated": 1.0}, log_reward, kl, config.free_nats, config.over_present)
    return loss, metrics | nats


def elbo(model, filtered, batch, config):
    """Eq. (10): every modality that is present is reconstructed."""
    latent, log_reward, kl, metrics = shared_terms(model, filtered, batch, config)
    decoded = model.decode(latent.unflatten(0, filtered.h.shape[:2]))
    present = dict(zip(model.modalities, filtered.present.flatten(1)))
    log_likelihoods = {}
    for name, mean in decoded.items():
        x = normalise(batch["observation"][name])
        log_likelihoods[name] = gaussian_log_prob(x, mean, event_dims=x.ndim - 2).flatten()
        metrics[f"reconstruction_{name}"] = mean_over(log_likelihoods[name], present[name])
    loss = elbo_loss(log_likelihoods, present, log_reward, kl, config.free_nats)
    return loss + fused_kl(model, filtered, config), metrics


# ---- 3. Methods ----------------------------------------------------------------------------------

METHODS = {  # method: fusion, what its objective trains besides the reward, objective
    "mummi": ("product", "code", mummi),
    "mummi_b": ("product", "code", mummi_b),
    "mssm_e": ("product", "decoders", elbo),
    "cvrl": ("concatenate", "contrastive", cvrl),
    "dreamer": ("concatenate", "decoders", elbo),
}
