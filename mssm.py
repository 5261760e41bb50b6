"""Multi-modal latent state-space model (MSSM) of MuMMI: encoders, experts, fusion, dynamics, heads.

Holds Eq. (6)-(9), the generative model, and Eq. (11), the inference network, of Chen, Lee, Soh,
"Multi-Modal Mutual Information (MuMMI) Training" (ICRA 2021), with the layer sizes of Appendix B
(Fig. 7-11) and, for the baselines, of Appendix C (Fig. 14-18).

symbol  name here     meaning                                                       size
x^m_t   observation   modality m: uint8 image, float image (metres) or float vector
a_t-1   action        the action that led to x_t                                    A
h_t     h             deterministic state, GRU                                      D_h = 200
s^c_t   s_c           combined stochastic state                                     D_c = 30
s^f_t   s_f           fused code of the observations at t, product of experts       D_f = 1024
z_t     latent        [s_c, h], what every head reads, Eq. (7), (8)                  D_z = 230

Shapes: T steps, B sequences, M modalities, A action size, D_x features of one encoder. Time first.

    model = MSSM({"rgb": (64, 64, 3), "touch": (2,)}, action_size=4)
    filtered = model.observe({"rgb": rgb, "touch": touch}, present, action)   # present (T, B, M)
    latent = model.latent(filtered.h, filtered.s_c)                           # (T, B, D_z)
    reward = model.reward(latent)                                             # (T, B)
"""

from contextlib import contextmanager
from functools import cache, wraps
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
    """One code a step from M modalities. Concatenation has no experts and no product: None."""

    s_f: torch.Tensor  # (..., D_f), or (..., M * D_x) when concatenated
    observed: torch.Tensor  # (...)  False where the posterior has nothing to go on but the prior
    mean: torch.Tensor | None = None  # (..., D_f)  product of experts
    std: torch.Tensor | None = None  # (..., D_f)
    expert_mean: torch.Tensor | None = None  # (M, ..., D_f)  mu^m(x^m)
    expert_std: torch.Tensor | None = None  # (M, ..., D_f)


class Filtered(NamedTuple):
    """Everything `MSSM.observe` infers from a batch of sequences; the losses read it by name."""

    h: torch.Tensor  # (T, B, D_h)
    s_c: torch.Tensor  # (T, B, D_c)  sample of the posterior
    mean: torch.Tensor  # (T, B, D_c)  q(s^c | s^f, h)
    std: torch.Tensor  # (T, B, D_c)
    prior_mean: torch.Tensor  # (T, B, D_c)  p(s^c | h)
    prior_std: torch.Tensor  # (T, B, D_c)
    fused: Fused
    present: torch.Tensor  # (M, T, B)  bool


# ---- 1. Gaussians and small networks -------------------------------------------------------------


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


@one_kernel
def gaussian(parameters):
    """Mean and standard deviation from a network's output, in float32 whatever the autocast type.

    parameters  (..., 2 D)
    returns     mean (..., D), std (..., D) = softplus + 0.1
    """
    mean, raw_std = parameters.float().chunk(2, -1)
    return mean, F.softplus(raw_std) + MIN_STD


def sample(mean, std):
    """Reparameterised sample of N(mean, std^2), all (..., D)."""
    return mean + std * torch.randn_like(std)


def sample_from(parameters):
    """Sample of the Gaussian of `gaussian(parameters)`. (..., 2 D) -> (..., D)"""
    return shift(parameters, torch.randn_like(parameters.chunk(2, -1)[0], dtype=torch.float32))


@one_kernel
def shift(parameters, noise):
    """mean + std * noise of `gaussian(parameters)`. (..., 2 D), (..., D) -> (..., D)"""
    mean, std = gaussian(parameters)
    return mean + std * noise


@one_kernel
def elu_of_sum(a, b):
    """ELU of a layer whose input came in two halves, and each was multiplied for itself. (..., D) -> (..., D)"""
    return F.elu(a + b)


def mlp(sizes, activation, output_activation=False, linear=nn.Linear):
    """Linear layers of the given sizes with `activation` between them (and, if asked, at the end)."""
    layers = []
    for size_in, size_out in zip(sizes, sizes[1:]):
        layers += [linear(size_in, size_out), activation()]
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


# ---- 2. Layers inside a recurrence ----------------------------------------------------------------


class StepLinear(nn.Linear):
    """nn.Linear for the inside of a loop over time: fewer products, as `unrolled` says."""

    shared = None  # inside `unrolled`: what computes this layer, and those that read the same

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) if self.shared is None else self.shared(x)[self]


@contextmanager
def unrolled(groups):
    """While it lasts, the `StepLinear`s of the groups belong to one loop over time.

    groups  lists of layers; those of one list read the same tensors: one product a step for all of them

    Plain autograd multiplies two small matrices a step and layer for the gradient of the weight, and adds
    up the results. Here a layer remembers what went in and, on the way back, what came back at each step;
    when the first step has been reached, one large product gives the same sum.
    """
    plain = torch.compiler.is_compiling() or not torch.is_grad_enabled()
    groups = () if plain else groups
    for layers in groups:
        steps = Steps(layers)
        for layer in layers:
            layer.shared = steps
    try:
        yield
    finally:
        for layers in groups:
            for layer in layers:
                layer.shared = None


class Steps:
    """The steps of layers that read the same tensors; see `unrolled`."""

    def __init__(self, layers):
        self.layers, self.sizes = layers, [layer.out_features for layer in layers]
        self.x, self.y, self.passed = None, {}, {}  # passed: {backward pass: [(x, gradient) of each step]}
        weight = torch.cat([layer.weight for layer in layers])
        bias = torch.cat([layer.bias for layer in layers])
        device = weight.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        self.weight, self.bias = Parameters.apply(weight, bias, self.passed, dtype)

    def __call__(self, x):
        """What each layer makes of x. (B, D) -> {layer: (B, D)}"""
        if x is not self.x:
            y = Step.apply(x, self.weight, self.bias, self.passed)
            self.x, self.y = x, dict(zip(self.layers, y.split(self.sizes, -1) if len(self.sizes) > 1 else [y]))
        return self.y


class Step(torch.autograd.Function):
    """One step's F.linear(x, weight, bias), which leaves the parameters' gradients to `Parameters`."""

    @staticmethod
    def forward(ctx, x, weight, bias, passed):
        x = x.to(weight.dtype)
        ctx.save_for_backward(x, weight)
        ctx.passed = passed
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        steps = ctx.passed.setdefault(torch._C._current_graph_task_id(), [])  # this backward pass's own
        steps.append((x.detach(), gradient))  # with its graph, x would keep this node, and itself, alive
        return gradient @ weight, None, None, None


class Parameters(torch.autograd.Function):
    """Weight and bias as all steps see them. Its backward pass comes after that of every step."""

    @staticmethod
    def forward(ctx, weight, bias, passed, dtype):
        ctx.set_materialize_grads(False)
        ctx.passed = passed
        return weight.to(dtype), bias.to(dtype)

    @staticmethod
    def backward(ctx, *_):
        steps = ctx.passed[torch._C._current_graph_task_id()]
        x, gradient = (torch.cat(side) for side in zip(*steps))  # (T * B, D)
        ctx.passed.clear()
        return gradient.T @ x, gradient.sum(0), None, None


@one_kernel
def gru(from_x, from_h, h):
    """The gated recurrent unit, from the projections of its input and of its state.

    from_x, from_h  (..., 3 D_h)  of the reset gate, the update gate and the candidate
    h, returns      (..., D_h)  in float32, whatever the autocast type
    """
    x_reset, x_update, x_candidate = from_x.to(h.dtype).chunk(3, -1)
    h_reset, h_update, h_candidate = from_h.to(h.dtype).chunk(3, -1)
    reset, update = torch.sigmoid(x_reset + h_reset), torch.sigmoid(x_update + h_update)
    candidate = torch.tanh(x_candidate + reset * h_candidate)
    return torch.lerp(candidate, h, update)


@one_kernel
def observed_or_prior(posterior, prior, observed, noise):
    """The posterior, which is the prior where nothing was observed (Dev. D3), and a sample of it.

    posterior, prior  (B, 2 D_c)  to be read by `gaussian`
    observed          (B,)
    noise             (B, D_c)  standard normal
    returns           mean (B, D_c), std (B, D_c), s_c (B, D_c)
    """
    observed = observed.unsqueeze(-1)
    mean, std = (torch.where(observed, q, p) for q, p in zip(gaussian(posterior), gaussian(prior)))
    return mean, std, mean + std * noise


# ---- 3. Observations: encoders (Fig. 8, 9, 14, 15) and decoders (Fig. 16-18) ---------------------


@one_kernel
def normalise(x):
    """What encoders read and decoders predict, as float32; the first axes are (T, B) or (N,).

    uint8 image  (..., 64, 64, C) -> [-0.5, 0.5]
    float image  (..., 64, 64, C) in metres -> clipped at 10 m, [-0.5, 0.5].  Dev. D9
    vector       (..., D) -> unchanged (touch arrives as log(1 + newtons), Dev. D10)
    """
    if x.dtype == torch.uint8:
        return x.float() / 255 - 0.5
    if x.ndim >= 4:
        return x.float().clamp(0, MAX_DEPTH) / MAX_DEPTH - 0.5
    return x.float()


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


# ---- 4. Fusion, Eq. (11) -------------------------------------------------------------------------


@one_kernel
def product_of_experts(mean, std, present, power=2):
    """Eq. (11): the product of the Gaussians q(s^f | x^m) of the modalities that are present.

    mean, std  (M, ..., D)  one expert a modality
    present    (M, ...)     bool; the expert of an absent modality is dropped
    power      2 weighs an expert by its precision 1/std^2; [code] by 1/std, and adds 0.01 to their sum.  Dev. D1
    returns    mean (..., D), std (..., D); mean 0, std 1 where the product is empty
    """
    precision = std.reciprocal() if power == 1 else std.reciprocal().square()
    precision = precision * present.unsqueeze(-1)  # (M, ..., D)
    total = precision.sum(0)  # (..., D)
    total = torch.where(present.any(0).unsqueeze(-1), total, 1.0)
    return (precision * mean).sum(0) / total, total.reciprocal() if power == 1 else total.rsqrt()


# ---- 5. The model --------------------------------------------------------------------------------


class MSSM(nn.Module):
    """The generative model of Eq. (6) and its inference network, Eq. (11): Fig. 2.

    modalities   {name: shape}; (64, 64, C) is an image, (D,) a vector. Their order is that of
                 `present` everywhere.
    action_size  A
    fusion       "product" (product of experts) or "concatenate" (the baselines, Appendix C)
    heads        what the objective trains besides the reward, and nothing else is built:
                 "code" (g of Eq. (16)), "decoders" (Eq. (10)) or "contrastive" (CVRL)
    fused_prior  also build p(s^f | s^c) of Eq. (9).  Dev. D6
    Raises ValueError on an image that is not 64x64, an unknown fusion, unknown heads.
    """

    def __init__(self, modalities, action_size, fusion="product", heads="code", d_h=200, d_c=30,
                 d_f=1024, hidden=200, units=400, channels=32, fused_prior=False,
                 sample_s_f=True, prior_if_unobserved=True, expert_power=2):  # fmt: skip
        super().__init__()
        check_modalities(modalities)
        if fusion not in ("product", "concatenate"):
            raise ValueError(f"fusion {fusion!r} is unknown: choose 'product' or 'concatenate'")
        if heads not in ("code", "decoders", "contrastive"):
            raise ValueError(f"heads {heads!r} are unknown: choose 'code', 'decoders' or 'contrastive'")
        self.modalities, self.fusion = dict(modalities), fusion
        self.d_h, self.d_c, self.d_f = d_h, d_c, d_f
        self.sample_s_f, self.expert_power = sample_s_f, expert_power
        self.prior_if_unobserved = prior_if_unobserved
        d_x, d_z = 32 * channels, d_c + d_h
        d_code = d_f if fusion == "product" else d_x * len(modalities)  # size of s_f

        # Inference network, Eq. (11)
        self.encoders = nn.ModuleDict({
            name: (image_encoder if len(shape) == 3 else vector_encoder)(shape, channels)
            for name, shape in modalities.items()
        })  # fmt: skip
        if fusion == "product":  # Fig. 10
            self.experts = nn.ModuleDict({name: mlp([d_x, d_x, 2 * d_f], nn.ReLU) for name in modalities})
        self.posterior_s_f = nn.Linear(d_code, hidden, bias=False)  # Fig. 11: [s^f, h] -> 200, in two halves,
        self.posterior_h = StepLinear(d_h, hidden)  # as only h waits for the recurrence
        self.posterior_out = StepLinear(hidden, 2 * d_c)

        # Transition, Eq. (9), and reward, Eq. (8)
        self.transition_in = StepLinear(d_c + action_size, hidden)
        self.gru_x, self.gru_h = StepLinear(hidden, 3 * d_h), StepLinear(d_h, 3 * d_h)
        self.prior_net = mlp([d_h, hidden, 2 * d_c], nn.ELU, linear=StepLinear)  # Fig. 7
        self.reward_net = mlp([d_z, units, units, 1], nn.ELU)
        if fused_prior:
            self.fused_prior_net = mlp([d_c, hidden, 2 * d_f], nn.ELU)

        # What only one objective trains
        if heads == "code":  # g of Eq. (16)
            self.code = mlp([d_z, d_f], nn.ReLU, output_activation=True)
        elif heads == "decoders":  # Eq. (7)
            self.decoders = nn.ModuleDict({
                name: (image_decoder if len(shape) == 3 else vector_decoder)(shape, channels, d_z)
                for name, shape in modalities.items()
            })  # fmt: skip
        else:  # [CVRL] features and latents meet in an inner product
            self.project_x = mlp([d_code, units, hidden], nn.ELU, output_activation=True)
            self.project_z = mlp([d_z, hidden, hidden], nn.ELU, output_activation=True)

        initialise(self)
        glorot = (6 / (d_code + d_h + hidden)) ** 0.5  # of the posterior's whole first layer, not of its halves
        for half in (self.posterior_s_f, self.posterior_h):
            nn.init.uniform_(half.weight, -glorot, glorot)
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
        return State(h, sample_from(self.prior(h)))

    def latent(self, h, s_c):
        """What every head reads, Eq. (7), (8): (..., D_h), (..., D_c) -> (..., D_z)."""
        return torch.cat([s_c, h], -1)

    def reward(self, latent):
        """Eq. (8): mean of p(r | s^c, h), unit variance. (..., D_z) -> (...)"""
        return self.reward_net(latent).squeeze(-1).float()

    @torch.compiler.disable  # Inductor takes the gradient of a kernel over 1x1 pixels for channels-last, and fails
    def decode(self, latent):
        """Eq. (7): {name: mean of p(x^m | s^c, h)}, unit variance, in the scale of `normalise`.

        latent  (T, B, D_z) -> (T, B, 64, 64, C) or (T, B, D)
        """
        flat = latent.flatten(0, 1)
        means = {name: decoder(flat) for name, decoder in self.decoders.items()}
        means = {k: x.permute(0, 2, 3, 1) if x.ndim == 4 else x for k, x in means.items()}
        return {k: x.unflatten(0, latent.shape[:2]).float() for k, x in means.items()}

    # -- inference network --

    def state(self, filtered):
        """The posterior states of all steps, (N, D), detached: where imagination starts."""
        return State(filtered.h.flatten(0, 1).detach(), filtered.s_c.flatten(0, 1).detach())

    def initial_state(self, batch_size, device=None):
        """Zeros: how every sequence and every episode starts."""
        return State(
            torch.zeros(batch_size, self.d_h, device=device),
            torch.zeros(batch_size, self.d_c, device=device),
        )

    def encode(self, observation):
        """Features of every modality. {name: (T, B, ...)} -> (M, T, B, D_x)"""
        features = []
        for name, encoder in self.encoders.items():
            T, B = observation[name].shape[:2]
            x = normalise(observation[name].flatten(0, 1))  # (N, ...)
            if x.ndim == 4:  # (N, 64, 64, C) seen as (N, C, 64, 64): no copy, channels stay last
                x = x.permute(0, 3, 1, 2)
            features.append(encoder(x).unflatten(0, (T, B)))
        return torch.stack(features)

    def fuse(self, features, present):
        """Eq. (11): one code from the modalities that are present; the baselines' from all.

        features  (M, ..., D_x)
        present   (M, ...)  bool
        """
        if self.fusion == "concatenate":  # Appendix C: zeros where missing
            s_f = torch.cat(list(features * present.unsqueeze(-1)), -1)
            return Fused(s_f, torch.ones_like(present[0]))
        experts = torch.stack([net(x) for net, x in zip(self.experts.values(), features)])
        expert_mean, expert_std = gaussian(experts)  # (M, ..., D_f)
        mean, std = product_of_experts(expert_mean, expert_std, present, self.expert_power)
        s_f = sample(mean, std) if self.sample_s_f else mean  # Dev. D2
        observed = present.any(0)
        if not self.prior_if_unobserved:  # Dev. D3, [code]: the code 0 instead of the prior
            s_f, observed = s_f * observed.unsqueeze(-1), torch.ones_like(observed)
        return Fused(s_f, observed, mean, std, expert_mean, expert_std)

    def posterior(self, from_s_f, observed, h, noise):
        """Eq. (11): q(s^c | s^f, h) at one step, a sample of it, and the prior that it starts from.

        from_s_f  (B, hidden)  the half of the first layer that reads s^f
        observed  (B,)  False: the product is empty, and the posterior *is* the prior
        h         (B, D_h)
        noise     (B, D_c)  standard normal
        returns   mean (B, D_c), std (B, D_c), s_c (B, D_c), and the prior (B, 2 D_c), to be read by `gaussian`
        """
        prior = self.prior(h)
        posterior = self.posterior_out(elu_of_sum(from_s_f, self.posterior_h(h)))
        return *observed_or_prior(posterior, prior, observed, noise), prior

    def observe(self, observation, present, action, state=None):
        """Eq. (11): filter sequences of observations into posteriors over s^c.

        observation  {name: (T, B, ...)}  zero-filled where absent
        present      (T, B, M)  bool or 0/1, in the order of the modalities
        action       (T, B, A)  action[t] led to observation[t]
        state        State before the first step, (B, D); zeros if None
        returns      Filtered

        Everything that does not depend on the recurrence is computed for all T at once.
        """
        present = present.movedim(-1, 0).bool()  # (M, T, B)
        fused = self.fuse(self.encode(observation), present)
        from_s_f = self.posterior_s_f(fused.s_f)  # (T, B, hidden)
        noise = torch.randn(*action.shape[:2], self.d_c, device=action.device)

        if state is None:
            state = self.initial_state(action.shape[1], action.device)
        steps = []
        with unrolled([[self.gru_h, self.prior_net[0], self.posterior_h], [self.transition_in], [self.gru_x],
                       [self.prior_net[2]], [self.posterior_out]]):  # fmt: skip
            for action_t, from_s_f_t, observed_t, noise_t in zip(action, from_s_f, fused.observed, noise):
                h = self.transition(state, action_t)
                mean, std, s_c, prior = self.posterior(from_s_f_t, observed_t, h, noise_t)
                state = State(h, s_c)
                steps.append((h, s_c, mean, std, prior))
        h, s_c, mean, std, prior = (torch.stack(x) for x in zip(*steps))
        return Filtered(h, s_c, mean, std, *gaussian(prior), fused, present)  # type: ignore[call-arg]


def check_modalities(modalities):
    """Raises ValueError, saying which modality has a shape that no encoder is made for."""
    if not modalities:
        raise ValueError("no modality was given: give at least one {name: shape}")
    for name, shape in modalities.items():
        if not (len(shape) == 1 or (len(shape) == 3 and tuple(shape[:2]) == (64, 64))):
            raise ValueError(f"modality {name!r} has shape {tuple(shape)}: give (64, 64, C) or (D,)")


if __name__ == "__main__":
    modalities = {"rgb": (64, 64, 3), "depth": (64, 64, 1), "touch": (2,)}
    T, B, A = 5, 3, 4
    model = MSSM(modalities, A, d_f=64, channels=4)
    observation = {
        "rgb": torch.randint(0, 256, (T, B, 64, 64, 3), dtype=torch.uint8),
        "depth": 10 * torch.rand(T, B, 64, 64, 1),
        "touch": torch.rand(T, B, 2),
    }
    present = torch.rand(T, B, len(modalities)) > 0.4
    filtered = model.observe(observation, present, torch.rand(T, B, A) * 2 - 1)
    latent = model.latent(filtered.h, filtered.s_c)
    kept = ~filtered.present.any(0).unsqueeze(-1)  # nothing observed: the posterior is the prior
    assert torch.equal(filtered.mean * kept, filtered.prior_mean * kept)
    for name, x in [("h", filtered.h), ("s_c", filtered.s_c), ("s_f", filtered.fused.s_f),
                    ("experts", filtered.fused.expert_mean), ("latent", latent),
                    ("reward", model.reward(latent)), ("code g(z)", model.code(latent))]:  # fmt: skip
        print(f"{name:10} {tuple(x.shape)}")
