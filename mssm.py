"""Multi-modal latent state-space model (MSSM) of MuMMI: encoders, experts, fusion, dynamics, heads.

Holds Eq. (6)-(9), the generative model, and Eq. (11), the inference network, of Chen, Lee, Soh,
"Multi-Modal Mutual Information (MuMMI) Training" (ICRA 2021), with the layers of Appendix B (Fig. 7-11)
and, for the baselines, of Appendix C (Fig. 14-18), as wide as in [code], the authors' released code.

symbol  name here     meaning                                                       size
x^m_t   observation   modality m: colour image, depth image or vector
a_t-1   action        the action that led to x_t                                    A
h_t     h             deterministic state, GRU                                      D_h = 200
s^c_t   s_c           combined stochastic state                                     D_c = 30
s^f_t   s_f           fused observation at t, from the product of experts           D_f = 1024
z_t     latent        [s_c, h], what every head reads, Eq. (7), (8)                 D_z = 230

Shapes: T steps, B sequences, M modalities, A action size, D_x features of one encoder. Time first.

    model = MSSM({"rgb": (64, 64, 3), "touch": (2,)}, action_size=4)
    filtered = model.observe({"rgb": rgb, "touch": touch}, present, action)   # present (T, B, M)
    latent = model.latent(filtered.h, filtered.s_c)                           # (T, B, D_z)
    reward = model.reward(latent)                                             # (T, B)
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

MIN_STD = 0.1  # [code] added to every softplus standard deviation
MAX_DEPTH = 10.0  # metres; Dev. D9: depth is clipped there before it is scaled


class State(NamedTuple):
    """What the dynamics carry from one step to the next."""

    h: torch.Tensor  # (..., D_h)
    s_c: torch.Tensor  # (..., D_c)


class Fused(NamedTuple):
    """All modalities of a step as one; concatenation has neither experts nor product."""

    s_f: torch.Tensor  # (..., D_f), or (..., M * D_x) when concatenated
    observed: torch.Tensor  # (...)  False where the posterior is the prior
    mean: torch.Tensor | None = None  # (..., D_f)  product of experts
    std: torch.Tensor | None = None  # (..., D_f)
    expert_mean: torch.Tensor | None = None  # (..., M, D_f)  mu^m(x^m)
    expert_std: torch.Tensor | None = None  # (..., M, D_f)


class Filtered(NamedTuple):
    """Everything `MSSM.observe` infers from a batch of sequences; the losses read it by name."""

    h: torch.Tensor  # (T, B, D_h)
    s_c: torch.Tensor  # (T, B, D_c)  sample of the posterior
    mean: torch.Tensor  # (T, B, D_c)  q(s^c | s^f, h)
    std: torch.Tensor  # (T, B, D_c)
    prior_mean: torch.Tensor  # (T, B, D_c)  p(s^c | h)
    prior_std: torch.Tensor  # (T, B, D_c)
    fused: Fused
    present: torch.Tensor  # (T, B, M)  bool


# ---- 1. Gaussians and small networks -------------------------------------------------------------


def gaussian(parameters):
    """Mean, and std = softplus + 0.1, from a network's output, float32. (..., 2 D) -> mean (..., D), std (..., D)"""
    mean, raw_std = parameters.float().chunk(2, -1)
    return mean, F.softplus(raw_std.contiguous()) + MIN_STD


def sample(parameters, noise):
    """Reparameterised sample of `gaussian(parameters)` by standard normal noise. (..., 2 D), (..., D) -> (..., D)"""
    mean, std = gaussian(parameters)
    return mean + std * noise


def mlp(sizes, activation, output_activation=False):
    """Linear layers of the given sizes with `activation` between them (and, if asked, at the end)."""
    layers = []
    for size_in, size_out in zip(sizes, sizes[1:]):
        layers += [nn.Linear(size_in, size_out), activation()]
    return nn.Sequential(*(layers if output_activation else layers[:-1]))


def initialise(module):
    """Keras' defaults, [code]: Glorot uniform kernels, zero biases, orthogonal recurrent kernel."""
    for name, parameter in module.named_parameters():
        if parameter.ndim < 2:
            nn.init.zeros_(parameter)
        elif "gru_h" in name:
            nn.init.orthogonal_(parameter)
        else:
            nn.init.xavier_uniform_(parameter)


# ---- 2. Observations: encoders (Fig. 8, 9, 14, 15) and decoders (Fig. 16-18) ---------------------


def scale(x, present, mean, std):
    """Scale one modality for encoders and decoders; absent values of a float x are not read.

    x        uint8 (..., 64, 64, C): a colour image, to [-0.5, 0.5]
             float (..., 64, 64, 1): metres, clipped at 10, NaN is 10, and scaled to [-0.5, 0.5].  Dev. D9
             float (..., D): a vector, to (x - mean) / std (touch arrives as log(1 + newtons), Dev. D10)
    present  (...)  bool
    returns  float32, in the shape of x
    """
    if x.dtype == torch.uint8:
        return x.float().div_(255).sub_(0.5)
    axes = x.ndim - present.ndim
    x = torch.where(present[(...,) + (None,) * axes], x.float(), 0)  # absent values may be NaN
    return x.nan_to_num_(MAX_DEPTH).clamp_(0, MAX_DEPTH).div_(MAX_DEPTH).sub_(0.5) if axes == 3 else (x - mean) / std


def image_encoder(shape, channels):
    """Fig. 8: four 4x4 stride-2 convolutions, 64x64 pixels -> 32 * channels features (1024)."""
    sizes = [shape[-1], channels, 2 * channels, 4 * channels, 8 * channels]
    layers = []
    for size_in, size_out in zip(sizes, sizes[1:]):
        layers += [nn.Conv2d(size_in, size_out, kernel_size=4, stride=2), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Flatten())


def vector_encoder(shape, channels):
    """Fig. 9: four ReLU layers, hidden size 4 * channels (128) -> 32 * channels features (1024)."""
    hidden = 4 * channels
    return mlp([shape[0], hidden, hidden, hidden, 32 * channels], nn.ReLU, output_activation=True)


def image_decoder(shape, channels, d_z):
    """Fig. 16, 17: Linear to 1024, then transposed convolutions 5, 5, 6, 6 with stride 2."""
    return nn.Sequential(
        nn.Linear(d_z, 32 * channels),
        nn.Unflatten(-1, (32 * channels, 1, 1)),
        nn.ConvTranspose2d(32 * channels, 4 * channels, kernel_size=5, stride=2), nn.ReLU(),
        nn.ConvTranspose2d(4 * channels, 2 * channels, kernel_size=5, stride=2), nn.ReLU(),
        nn.ConvTranspose2d(2 * channels, channels, kernel_size=6, stride=2), nn.ReLU(),
        nn.ConvTranspose2d(channels, shape[-1], kernel_size=6, stride=2),
    )  # fmt: skip


def vector_decoder(shape, channels, d_z):
    """Fig. 18: three-layer MLP."""
    return mlp([d_z, 4 * channels, 4 * channels, shape[0]], nn.ReLU)


# ---- 3. Fusion, Eq. (11) -------------------------------------------------------------------------


def product_of_experts(mean, std, present, power=2):
    """Eq. (11): the product of the Gaussians q(s^f | x^m) of the modalities that are present.

    mean, std  (..., M, D)  one expert a modality
    present    (..., M)     bool; the expert of an absent modality is dropped
    power      2: weights are precisions 1/std^2; 1: 1/std as in [code], which adds 0.01 to the sum.  Dev. D1
    returns    mean (..., D), std (..., D); mean 0, std 1 where the product is empty
    """
    precision = (std.reciprocal() if power == 1 else std.reciprocal().square()) * present.unsqueeze(-1)  # (..., M, D)
    total = torch.where(present.any(-1, keepdim=True), precision.sum(-2), 1.0)  # (..., D)
    return (precision * mean).sum(-2) / total, total.reciprocal() if power == 1 else total.rsqrt()


# ---- 4. One step of the recurrence, Eq. (9), (11) ------------------------------------------------


def gru(from_x, from_h, h):
    """The gated recurrent unit, from the projections of its input and of its state.

    from_x, from_h  (..., 3 D_h)  of the reset gate, the update gate and the candidate
    h, returns      (..., D_h)  float32
    """
    x_reset, x_update, x_candidate = from_x.to(h.dtype).chunk(3, -1)
    h_reset, h_update, h_candidate = from_h.to(h.dtype).chunk(3, -1)
    reset, update = torch.sigmoid(x_reset + h_reset), torch.sigmoid(x_update + h_update)
    candidate = torch.tanh(x_candidate + reset * h_candidate)
    return torch.lerp(candidate, h, update)


def add_elu(a, b):
    """ELU of a layer, from the projections of its two inputs. (..., D), (..., D) -> (..., D)"""
    return F.elu(a + b)


def posterior_or_prior(posterior, prior, observed, noise):
    """Sample the posterior, replaced by the prior where nothing was observed (Dev. D3).

    posterior, prior  (B, 2 D_c)  outputs of their networks
    observed          (B,)
    noise             (B, D_c)  standard normal
    returns           s_c (B, D_c), mean (B, D_c), std (B, D_c), prior_mean (B, D_c), prior_std (B, D_c)
    """
    prior_mean, prior_std = gaussian(prior)
    mean, std = gaussian(posterior)
    observed = observed.unsqueeze(-1)
    mean, std = torch.where(observed, mean, prior_mean), torch.where(observed, std, prior_std)
    return mean + std * noise, mean, std, prior_mean, prior_std


# ---- 5. The model --------------------------------------------------------------------------------


class MSSM(nn.Module):
    """The generative model of Eq. (6) and its inference network, Eq. (11): Fig. 2.

    modalities    {name: shape}; (64, 64, C) is an image, (D,) a vector. Their order is that of
                  `present` everywhere.
    action_size   A
    fusion        "product" (product of experts) or "concatenate" (the baselines, Appendix C)
    heads         the objective's heads besides the reward's; no others are built:
                  "g" (of Eq. (16)), "decoders" (Eq. (10)) or "projections" (CVRL)
    fused_prior   also build p(s^f | s^c) of Eq. (9).  Dev. D6
    continuation  also build the probability that the episode goes on, [Dreamer].  Dev. D22
    Raises ValueError on an image that is not 64x64, an unknown fusion, unknown heads.
    """

    def __init__(self, modalities, action_size, fusion="product", heads="g", d_h=200, d_c=30,
                 d_f=1024, hidden=200, units=400, channels=32, fused_prior=False, continuation=False,
                 sample_s_f=True, prior_if_unobserved=True, expert_power=2):  # fmt: skip
        super().__init__()
        check_modalities(modalities)
        if fusion not in ("product", "concatenate") or heads not in ("g", "decoders", "projections"):
            raise ValueError(f"fusion {fusion!r}, heads {heads!r}: choose 'product' or 'concatenate', and 'g', "
                             "'decoders' or 'projections'")  # fmt: skip
        self.modalities, self.fusion, self.d_h, self.d_c = dict(modalities), fusion, d_h, d_c
        self.sample_s_f, self.prior_if_unobserved, self.expert_power = sample_s_f, prior_if_unobserved, expert_power
        shapes, d_x, d_z = list(modalities.values()), 32 * channels, d_c + d_h
        self.d_s_f = d_f if fusion == "product" else d_x * len(shapes)  # size of s_f

        # Inference network, Eq. (11); lists are in the order of the modalities
        for m, shape in enumerate(shapes):  # for vectors, see `scale`
            self.register_buffer(f"mean_{m}", torch.zeros(shape[-1]))
            self.register_buffer(f"std_{m}", torch.ones(shape[-1]))
        encoder, decoder = {1: vector_encoder, 3: image_encoder}, {1: vector_decoder, 3: image_decoder}
        self.encoders = nn.ModuleList(encoder[len(shape)](shape, channels) for shape in shapes)
        if fusion == "product":  # Fig. 10
            self.experts = nn.ModuleList(mlp([d_x, d_x, 2 * d_f], nn.ReLU) for _ in shapes)
        self.posterior_net = mlp([self.d_s_f + d_h, hidden, 2 * d_c], nn.ELU)  # Fig. 11

        # Transition, Eq. (9), and reward, Eq. (8)
        self.transition_in = nn.Linear(d_c + action_size, hidden)
        self.gru_x, self.gru_h = nn.Linear(hidden, 3 * d_h), nn.Linear(d_h, 3 * d_h)
        self.prior_net = mlp([d_h, hidden, 2 * d_c], nn.ELU)  # Fig. 7
        self.reward_net = mlp([d_z, units, units, 1], nn.ELU)
        if fused_prior:
            self.fused_prior_net = mlp([d_c, hidden, 2 * d_f], nn.ELU)
        if continuation:
            self.continuation_net = mlp([d_z, units, units, 1], nn.ELU)

        if heads == "g":  # Eq. (16)
            self.g = mlp([d_z, d_f], nn.ReLU, output_activation=True)
        elif heads == "decoders":  # Eq. (7)
            self.decoders = nn.ModuleList(decoder[len(shape)](shape, channels, d_z) for shape in shapes)
        else:  # [CVRL]: features and latents meet in an inner product
            self.project_x = mlp([self.d_s_f, units, hidden], nn.ELU, output_activation=True)
            self.project_z = mlp([d_z, hidden, hidden], nn.ELU, output_activation=True)

        initialise(self)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # images arrive as (N, 64, 64, C)

    # -- generative model --

    def transition(self, state, action):
        """Eq. (9): h_t = g(h_t-1, s^c_t-1, a_t-1). State of (N, D), action (N, A) -> (N, D_h)."""
        x = F.elu(self.transition_in(torch.cat([state.s_c, action], -1)))
        return gru(self.gru_x(x), self.gru_h(state.h), state.h)

    def prior(self, h):
        """Eq. (9): p(s^c | h). (..., D_h) -> (..., 2 D_c), to be read by `gaussian`."""
        return self.prior_net(h)

    def fused_prior(self, s_c):
        """Eq. (9): p(s^f | s^c). (..., D_c) -> mean, std (..., D_f).  Dev. D6"""
        return gaussian(self.fused_prior_net(s_c))

    def imagine_step(self, state, action):
        """Eq. (4): one step of the dynamics without an observation. (N, D), (N, A) -> State."""
        h = self.transition(state, action)
        return State(h, sample(self.prior(h), torch.randn_like(state.s_c)))

    def latent(self, h, s_c):
        """Join [s_c, h], the input of the heads, Eq. (7), (8): (..., D_h), (..., D_c) -> (..., D_z)."""
        return torch.cat([s_c, h], -1)

    def reward(self, latent):
        """Eq. (8): mean of p(r | s^c, h), unit variance. (..., D_z) -> (...)"""
        return self.reward_net(latent).squeeze(-1).float()

    def continuation(self, latent):
        """Log odds that the episode goes on, [Dreamer].  Dev. D22. (..., D_z) -> (...)"""
        return self.continuation_net(latent).squeeze(-1).float()

    def decode(self, latent):
        """Eq. (7): {name: mean of p(x^m | s^c, h)}, unit variance, as `scale` scales. (..., D_z) -> {name: (..., *)}"""
        means = {name: decoder(latent.flatten(0, -2)) for name, decoder in zip(self.modalities, self.decoders)}
        means = {k: x.permute(0, 2, 3, 1) if x.ndim == 4 else x for k, x in means.items()}
        return {k: x.unflatten(0, latent.shape[:-1]).float() for k, x in means.items()}

    # -- inference network --

    def state(self, filtered):
        """The posterior states of all steps, (N, D), detached: where imagination starts."""
        return State(filtered.h.flatten(0, 1).detach(), filtered.s_c.flatten(0, 1).detach())

    def initial_state(self, batch_size, device=None):
        """Zeros: how every sequence and every episode starts."""
        return State(*(torch.zeros(batch_size, size, device=device) for size in (self.d_h, self.d_c)))

    def scale(self, observation, present):
        """Scale every modality, see `scale`. Each (T, B, ...); present (T, B, M)"""
        TB, present = present.shape[:2], present.flatten(0, 1)
        scales = [(getattr(self, f"mean_{m}"), getattr(self, f"std_{m}")) for m in range(len(self.modalities))]
        return {
            name: scale(observation[name].flatten(0, 1), present[:, m], *scales[m]).unflatten(0, TB)
            for m, name in enumerate(self.modalities)
        }

    def encode(self, observation, present):
        """Features of every modality. {name: (T, B, ...)}, (T, B, M) -> M of (T, B, D_x)"""
        features = []
        for x, encoder in zip(self.scale(observation, present).values(), self.encoders):
            x = x.flatten(0, 1)  # images (N, 64, 64, C) are seen as (N, C, 64, 64): no copy, channels stay last
            x = x.permute(0, 3, 1, 2) if x.ndim == 4 else x
            features.append(encoder(x).unflatten(0, present.shape[:2]))
        return features

    def fuse(self, features, present):
        """Eq. (11): s^f from the modalities that are present. M features (..., D_x), present (..., M) -> Fused"""
        if self.fusion == "concatenate":  # Appendix C; zeros where missing, section V.  Dev. D23
            s_f = torch.cat([x * present[..., m, None] for m, x in enumerate(features)], -1).float()
            return Fused(s_f, torch.ones_like(present[..., 0]))
        experts = torch.stack([net(x) for net, x in zip(self.experts, features)], -2)
        expert_mean, expert_std = gaussian(experts)  # (..., M, D_f)
        mean, std = product_of_experts(expert_mean, expert_std, present, self.expert_power)
        s_f = mean + std * torch.randn_like(std) if self.sample_s_f else mean  # Dev. D2
        observed = present.any(-1)
        if not self.prior_if_unobserved:  # Dev. D3, [code]: s^f = 0 instead of the prior
            s_f, observed = s_f * observed.unsqueeze(-1), torch.ones_like(observed)
        return Fused(s_f, observed, mean, std, expert_mean, expert_std)

    def expert_shares(self, fused, present):
        """Each expert's part of the product's precision, 0 where absent. Fused, present (..., M) -> (..., M)"""
        precision = fused.expert_std.pow(-self.expert_power).mean(-1) * present
        return precision / precision.sum(-1, keepdim=True).clamp(min=1e-9)

    def posterior(self, from_s_f, h):
        """Eq. (11), Fig. 11: q(s^c | s^f, h), from projected s^f. (..., hidden), (..., D_h) -> (..., 2 D_c)"""
        return self.posterior_net[2](add_elu(from_s_f, self.posterior_from_h(h)))

    def posterior_from_h(self, h):
        """The columns of Fig. 11's first layer that read h. (..., D_h) -> (..., hidden)"""
        layer = self.posterior_net[0]
        return F.linear(h, layer.weight[:, self.d_s_f :], layer.bias)

    def observe(self, observation, present, action, state=None, first=None):
        """Eq. (11): filter sequences of observations into posteriors over s^c.

        observation  {name: (T, B, ...)}  of the types in `scale`; no effect where absent
        present      (T, B, M)  bool or 0/1, in the order of the modalities
        action       (T, B, A)  action[t] led to observation[t]
        state        State before the first step, (B, D); zeros if None
        first        (T, B)  bool, True where another episode begins, in a state of zeros; nowhere if None
        returns      Filtered
        Raises ValueError where a modality or `present` has another shape or type.
        """
        check_observation(observation, present, action, self.modalities)
        present = present.bool()  # everything before the recurrence is computed for all T at once
        fused = self.fuse(self.encode(observation, present), present)
        # Fig. 11's first layer reads [s^f, h]; only h depends on the recurrence.
        from_s_f = F.linear(fused.s_f, self.posterior_net[0].weight[:, : self.d_s_f])  # (T, B, hidden)
        noise = torch.randn(*action.shape[:2], self.d_c, device=action.device)

        state, steps = state or self.initial_state(action.shape[1], action.device), []
        for t, (action_t, from_s_f_t, observed_t, noise_t) in enumerate(zip(action, from_s_f, fused.observed, noise)):
            if first is not None:
                state = State(*(x.masked_fill(first[t].unsqueeze(-1), 0) for x in state))
            h = self.transition(state, action_t)
            inferred = posterior_or_prior(self.posterior(from_s_f_t, h), self.prior(h), observed_t, noise_t)
            state = State(h, inferred[0])
            steps.append((h, *inferred))
        return Filtered(*(torch.stack(x) for x in zip(*steps)), fused, present)  # type: ignore


# ---- 6. Input checks -----------------------------------------------------------------------------


def check_modalities(modalities):
    """Raise ValueError, naming the modality, for a shape without an encoder."""
    for name, shape in (modalities or {"none": ()}).items():
        if len(shape) != 1 and (len(shape) != 3 or tuple(shape[:2]) != (64, 64)):
            raise ValueError(f"modality {name!r} has shape {tuple(shape)}: give (64, 64, C) or (D,)")


def check_observation(observation, present, action, modalities):
    """Raise ValueError where a shape or type is not one that `scale` lists."""
    T, B = action.shape[:2]
    if present.shape != (T, B, len(modalities)) or not set(modalities) <= set(observation):
        raise ValueError(f"present {tuple(present.shape)}, action {tuple(action.shape)}, {', '.join(observation)} were "
                         f"given: give present (T, B, {len(modalities)}) and {', '.join(modalities)}")  # fmt: skip
    for name, shape in modalities.items():
        x, colour = observation[name], len(shape) == 3 and shape[-1] > 1
        if x.shape != (T, B, *shape) or (x.dtype != torch.uint8 if colour else not x.is_floating_point()):
            wanted = "uint8" if colour else "float, in metres" if len(shape) == 3 else "float"
            raise ValueError(f"modality {name!r} is {x.dtype} {tuple(x.shape)}: give {wanted} {(T, B, *shape)}; an "
                             "image of one channel is depth, so repeat a grey picture to three")  # fmt: skip


if __name__ == "__main__":
    T, B = 5, 3
    model = MSSM({"rgb": (64, 64, 3), "touch": (2,)}, action_size=4, d_f=64, channels=4)
    rgb, touch = torch.randint(256, (T, B, 64, 64, 3), dtype=torch.uint8), torch.rand(T, B, 2)
    present = torch.rand(T, B, 2) > 0.4
    filtered = model.observe({"rgb": rgb, "touch": touch}, present, torch.rand(T, B, 4) * 2 - 1)
    unobserved = ~present.any(-1)
    assert torch.equal(filtered.mean[unobserved], filtered.prior_mean[unobserved]), "the posterior is the prior there"
    latent = model.latent(filtered.h, filtered.s_c)
    shown = {**filtered.fused._asdict(), **filtered._asdict(), "latent": latent, "reward": model.reward(latent)}
    for name in ("h", "s_c", "s_f", "expert_mean", "latent", "reward"):
        print(f"{name:12} {tuple(shown[name].shape)}")
