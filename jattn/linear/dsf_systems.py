"""The published mixers as dynamical systems, part by part (Sieber et al. 2024).

                            lam_t                          beta_t                      k_t         c_t       D
    softmax attention       eta_{t-1} / eta_t              1 / eta_t                   phi(k_t)    phi(q_t)  0
    linear attention        the same, eta = q . sum k      1 / eta_t                   elu(k) + 1  elu(q) + 1
    normalised attention    the same, eta = eta(x_t)       1 / eta_t                   k_t         q_t       0
    S6                      exp(Delta_t[p] A[p, n])        Delta_t[p]                  B_t         C_t       D
    S6 with a scalar A      exp(Delta_t[p] A)              Delta_t[p]                  B_t         C_t       D
    Mamba-2                 exp(Delta_t A)                 Delta_t                     B_t         C_t       D
    LRU                     exp(-exp(nu) + i exp(theta))   exp(gamma)                  1           1         0
    qLSTM                   sigmoid(f_t)                   sigmoid(i_t)                1           sigmoid(o_t)
    qLSTM, reversed         sigmoid(-f_t)^a                sigmoid(i_t)                1           sigmoid(o_t)
    RG-LRU                  exp(-8 sigmoid(r_t) softplus(d))   sqrt(1 - lam_t^2) sigmoid(i_t)   1  1         0

Transition and input scale come as a `Gating`, for this is what a mixer ties together: attention through eta, S6 through
Delta, RG-LRU through lam. `system._replace(**gating._asdict())` gives a system the gating of another.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Complex, Float, Int

from jattn import checks
from jattn.dot_product import dot_product_attention
from jattn.linear import arguments
from jattn.linear.dsf import DSFSystem
from jattn.linear.recurrence import linear_attention

NormalizeIn = Literal["state", "readout"]
Normalizer = Literal[
    "exp", "softplus", "sigmoid", "exp_of:exp", "exp_of:elu", "exp_of:softplus", "exp_of:sigmoid"
]  # fmt: skip

RGLRU_RATE = 8.0


class Gating(NamedTuple):
    """How a state decays, lam_t = exp(step_t * rate), and how strongly it is written: fields of `DSFSystem`."""

    step: Float[Array, "B T N n p"]
    rate: Array
    beta: Float[Array, "B T N n p"]


# Attention


def eta_gating(log_eta: Float[Array, "B T N"]) -> Gating:
    """lam_t = eta_{t-1} / eta_t, beta_t = 1 / eta_t: a sum divided by eta, as a state. lam of the first token is 1."""
    arguments.check_arrays(log_eta=log_eta)
    checks.bind_shapes(("log_eta", log_eta, "B T N"))
    checks.check_floating(log_eta=log_eta)
    # The product of lam is to be a quotient of betas, whatever log_eta itself is rounded to.
    log_eta = log_eta.astype(checks.accumulator_dtype(log_eta.dtype))
    step = jnp.concatenate([jnp.zeros_like(log_eta[:, :1]), log_eta[:, :-1] - log_eta[:, 1:]], axis=1)
    return Gating(step[..., None, None], jnp.ones((1, 1, 1), log_eta.dtype), jnp.exp(-log_eta)[..., None, None])


def log_normalizer(logits: Float[Array, "*shape"], normalizer: Normalizer = "exp") -> Float[Array, "*shape"]:
    """log eta of logits: eta is their exp, softplus or sigmoid or, with "exp_of:f", exp(f(logits))."""
    checks.check_choice("normalizer", normalizer, get_args(Normalizer))
    logs: dict[str, Callable[[Array], Array]] = {
        "exp": lambda x: x,
        # Far below 0 softplus(x) is exp(x), which is no number of float32 long before x is not.
        "softplus": lambda x: jnp.where(x < -40, x, jnp.log(jax.nn.softplus(jnp.maximum(x, -40)))),
        "sigmoid": jax.nn.log_sigmoid,
        "exp_of:exp": jnp.exp,
        "exp_of:elu": jax.nn.elu,
        "exp_of:softplus": jax.nn.softplus,
        "exp_of:sigmoid": jax.nn.sigmoid,
    }
    return logs[normalizer](logits)


def normalized_attention_dsf(
    query: Float[Array, "B T N n"],
    key: Float[Array, "B T N n"],
    value: Float[Array, "B T N p"],
    log_eta: Float[Array, "B T N"],
    *,
    normalize_in: NormalizeIn = "state",
) -> DSFSystem:
    """y_t = sum_{j <= t} (q_t . k_j) v_j / eta_t, a linear attention whose denominator is a function of its token.

    Args:
      log_eta: see `log_normalizer`.
      normalize_in: "state" keeps the state divided by eta, so that lam = eta_{t-1} / eta_t, which may exceed 1;
        "readout" keeps the plain sum, lam = 1, and divides c_t: the same outputs, and safe for any eta.

    Raises:
      TypeError, ValueError: a wrong dtype, shape or option.
    """
    arguments.check_arrays(query=query, key=key, value=value, log_eta=log_eta)
    shapes = (("query", query, "B T N n"), ("key", key, "B T N n"), ("value", value, "B T N p"))
    checks.bind_shapes(*shapes, ("log_eta", log_eta, "B T N"))
    checks.check_floating(query=query, key=key, value=value, log_eta=log_eta)
    checks.check_choice("normalize_in", normalize_in, get_args(NormalizeIn))
    if normalize_in == "state":
        gating = eta_gating(log_eta)
    else:
        one = jnp.ones((1, 1, 1, 1, 1), log_eta.dtype)
        gating = Gating(0 * one, one[0, 0], one)
        query = query * jnp.exp(-log_eta)[..., None].astype(query.dtype)
    return DSFSystem(*gating, key[..., None], value, query[..., None])


def elu_features(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """elu(x) + 1, which is positive (Katharopoulos et al. 2020, eq. 7)."""
    return jax.nn.elu(x) + 1


def linear_attention_dsf(
    query: Float[Array, "B T N n"],
    key: Float[Array, "B T N n"],
    value: Float[Array, "B T N p"],
    *,
    feature_map: Callable[[Array], Array] = elu_features,
    normalize_in: NormalizeIn = "state",
    segment_ids: Int[Array, "B T"] | None = None,
) -> DSFSystem:
    """y_t = sum_{j <= t} (phi(q_t) . phi(k_j)) v_j / eta_t with eta_t the sum of the weights, which is positive."""
    arguments.check_arrays(query=query, key=key)
    checks.bind_shapes(("query", query, "B T N n"), ("key", key, "B T N n"))
    checks.check_floating(query=query, key=key)
    query, key = feature_map(query), feature_map(key)
    q, k = (x.astype(checks.accumulator_dtype(x.dtype)) for x in (query, key))
    log_eta = jnp.log(linear_attention(q, k, jnp.ones_like(k[..., :1]), segment_ids=segment_ids)[..., 0])
    system = normalized_attention_dsf(query, key, value, log_eta, normalize_in=normalize_in)
    return system._replace(segment_ids=segment_ids)


def softmax_dsf(
    query: Float[Array, "B T N n"],
    key: Float[Array, "B T N n"],
    value: Float[Array, "B T N p"],
    *,
    order: int,
    scale: float | None = None,
    normalize_in: NormalizeIn = "state",
    segment_ids: Int[Array, "B T"] | None = None,
) -> DSFSystem:
    """Causal softmax attention, exp replaced by its Taylor polynomial: exact only for an infinite state.

    Args:
      order: of the polynomial; the state has 1 + n + .. + n^order rows. An odd one is negative for scores far below 0,
        and where a sum of such weights is, there is no log eta: outputs are NaN.
      scale: of the scores; `None` means `n ** -0.5`.
    """
    arguments.check_arrays(query=query)
    checks.bind_shapes(("query", query, "B T N n"))
    checks.check_floating(query=query)
    query = query * arguments.scale(scale, default=query.shape[-1] ** -0.5)

    def features(x: Array) -> Array:
        return taylor_features(x, order)

    options: dict[str, Any] = {"feature_map": features, "normalize_in": normalize_in, "segment_ids": segment_ids}
    return linear_attention_dsf(query, key, value, **options)


def taylor_features(x: Float[Array, "*lead n"], order: int) -> Float[Array, "*lead features"]:
    """[1, x, x (x) x / sqrt(2!), ..], so that features(x) . features(y) = sum_{i <= order} (x . y)^i / i!."""
    checks.check_count("order", order, minimum=0)
    power, parts = jnp.ones_like(x[..., :1]), []
    for i in range(order + 1):
        parts.append(power / math.sqrt(math.factorial(i)))
        power = (power[..., :, None] * x[..., None, :]).reshape(*x.shape[:-1], -1)
    return jnp.concatenate(parts, axis=-1)


def softmax_log_eta(
    query: Float[Array, "B T N n"], key: Float[Array, "B T N n"], *, scale: float | None = None
) -> Float[Array, "B T N"]:
    """log sum_{j <= t} exp(scale q_t . k_j): the normaliser of softmax itself, for the eigenvalues of its system."""
    return dot_product_attention(query, key, key, is_causal=True, scale=scale, return_lse=True)[1]


# State space models


def delta_gating(delta: Float[Array, "B T N p"], A: Float[Array, "N n p"]) -> Gating:
    """lam_t = exp(Delta_t A), beta_t = Delta_t: one time step both discretises A and scales the input.

    An axis of either may be 1.
    """
    arguments.check_arrays(delta=delta, A=A)
    checks.bind_shapes(("delta", delta, "B T N p"))
    checks.bind_shapes(("A", A, "N n p"))
    checks.check_floating(delta=delta, A=A)
    return Gating(delta[:, :, :, None], A, delta[:, :, :, None])


def s6_dsf(
    u: Float[Array, "B T p"],
    delta: Float[Array, "B T p"],
    A: Float[Array, "p n"] | Float[Array, ""],
    B: Float[Array, "B T n"],
    C: Float[Array, "B T n"],
    D: Float[Array, " p"] | None = None,
) -> DSFSystem:
    """The core of Mamba (Gu and Dao 2023, algorithm 2): every channel p has n states of its own.

    Args:
      u, delta: inputs and time steps, which are positive.
      A: negative; one number for all channels and states is what the paper calls SSD.
      B, C: keys and queries, the same for all channels.
    """
    arguments.check_arrays(u=u, delta=delta, A=A, B=B, C=C)
    letters = (("u", u, "B T p"), ("delta", delta, "B T p"), ("B", B, "B T n"), ("C", C, "B T n"), ("D", D, "p"))
    checks.bind_shapes(*letters, *([("A", A, "p n")] if A.ndim else []))
    checks.check_floating(u=u, delta=delta, A=A, B=B, C=C, D=D)
    A = A.T[None] if A.ndim else A.reshape(1, 1, 1)
    gating = delta_gating(delta[:, :, None], A)
    skip = None if D is None else D[None]
    return DSFSystem(*gating, B[:, :, None, :, None], u[:, :, None], C[:, :, None, :, None], skip)


def mamba2_dsf(
    x: Float[Array, "B T N p"],
    delta: Float[Array, "B T N"],
    A: Float[Array, " N"],
    B: Float[Array, "B T N n"],
    C: Float[Array, "B T N n"],
    D: Float[Array, " N"] | None = None,
) -> DSFSystem:
    """Mamba-2 (Dao and Gu 2024, eq. 16): a time step and a rate for each head. B and C may have one head for all."""
    arguments.check_arrays(x=x, delta=delta, A=A, B=B, C=C)
    letters = (("x", x, "B T N p"), ("delta", delta, "B T N"), ("A", A, "N"), ("D", D, "N"))
    sizes = checks.bind_shapes(*letters)
    checks.bind_shapes(("B", B, "B T G n"), ("C", C, "B T G n"), B=sizes["B"], T=sizes["T"])
    checks.check_floating(x=x, delta=delta, A=A, B=B, C=C, D=D)
    gating = delta_gating(delta[..., None], A[:, None, None])
    return DSFSystem(*gating, B[..., None], x, C[..., None], None if D is None else D[:, None])


def lru_gating(nu_log: Float[Array, " p"], theta_log: Float[Array, " p"], gamma_log: Float[Array, " p"]) -> Gating:
    """lam = exp(-exp(nu) + i exp(theta)), inside the unit circle and the same for all tokens; beta = exp(gamma)."""
    given = {"nu_log": nu_log, "theta_log": theta_log, "gamma_log": gamma_log}
    arguments.check_arrays(**given)
    checks.bind_shapes(*((name, x, "p") for name, x in given.items()))
    checks.check_floating(**given)
    wide = checks.accumulator_dtype(*(x.dtype for x in given.values()))  # complex numbers are of float32 or wider
    nu, theta, gamma = (jnp.exp(x.astype(wide)) for x in given.values())
    rate = jax.lax.complex(-nu, theta)[None, None]
    return Gating(jnp.ones((1, 1, 1, 1, 1), wide), rate, gamma[None, None, None, None])


def lru_dsf(
    Bu: Complex[Array, "B T p"],
    nu_log: Float[Array, " p"],
    theta_log: Float[Array, " p"],
    gamma_log: Float[Array, " p"],
) -> DSFSystem:
    """The linear recurrent unit (Orvieto et al. 2023, eq. 7): p complex states, each of one input of its own.

    Differs from the table in that the dense matrices stay outside: `Bu` is the input times B, and the layer's output is
    Re(C y) + D u.
    """
    arguments.check_arrays(Bu=Bu)
    checks.bind_shapes(("Bu", Bu, "B T p"), ("nu_log", nu_log, "p"))
    gating = lru_gating(nu_log, theta_log, gamma_log)
    return DSFSystem(*gating, _one(gating), Bu[:, :, None], _one(gating))


# Gated RNNs


def sigmoid_gating(
    forget: Float[Array, "B T p"], write: Float[Array, "B T p"], alpha: Float[Array, ""] | None = None
) -> Gating:
    """lam = sigmoid(forget) or, with an alpha, sigmoid(-forget)^relu(alpha); beta = sigmoid(write).

    The second, the reversed sigmoid, is S6's transition: exp(-alpha softplus(x)) = sigmoid(-x)^alpha.
    """
    arguments.check_arrays(forget=forget, write=write)
    checks.bind_shapes(("forget", forget, "B T p"), ("write", write, "B T p"), ("alpha", alpha, ""))
    checks.check_floating(forget=forget, write=write, alpha=alpha)
    if alpha is None:
        step, rate = jax.nn.log_sigmoid(forget), jnp.ones((1, 1, 1), forget.dtype)
    else:
        step, rate = jax.nn.softplus(forget), -jax.nn.relu(alpha).reshape(1, 1, 1)
    return Gating(step[:, :, None, None], rate, jax.nn.sigmoid(write)[:, :, None, None])


def qlstm_dsf(
    x: Float[Array, "B T p"],
    forget: Float[Array, "B T p"],
    write: Float[Array, "B T p"],
    read: Float[Array, "B T p"],
    alpha: Float[Array, ""] | None = None,
) -> DSFSystem:
    """The quasi LSTM: a cell of an LSTM whose gates see the input and not the state; n = 1.

    Args:
      x: inputs.
      forget, write, read: logits of the three gates.
      alpha: exponent of the reversed sigmoid; `None` for the plain one.
    """
    arguments.check_arrays(x=x, read=read)
    checks.bind_shapes(("x", x, "B T p"), ("forget", forget, "B T p"), ("read", read, "B T p"))
    gating = sigmoid_gating(forget, write, alpha)
    return DSFSystem(*gating, _one(gating), x[:, :, None], jax.nn.sigmoid(read)[:, :, None, None])


def rglru_gating(
    recurrence: Float[Array, "B T p"],
    write: Float[Array, "B T p"],
    decay: Float[Array, " p"],
    starts: Bool[Array, "B T"] | None = None,
) -> Gating:
    """lam = exp(-8 sigmoid(recurrence) softplus(decay)), beta = sqrt(1 - lam^2) sigmoid(write).

    Where a document starts nothing is kept, so that lam is 0 and the root 1.
    """
    arguments.check_arrays(recurrence=recurrence, write=write, decay=decay)
    checks.bind_shapes(
        ("recurrence", recurrence, "B T p"), ("write", write, "B T p"), ("decay", decay, "p"), ("starts", starts, "B T")
    )
    checks.check_floating(recurrence=recurrence, write=write, decay=decay)
    wide = checks.accumulator_dtype(recurrence.dtype, decay.dtype)
    log_lam = -RGLRU_RATE * jax.nn.sigmoid(recurrence.astype(wide)) * jax.nn.softplus(decay.astype(wide))
    rest = -jnp.expm1(2 * log_lam)
    is_open = rest > 0  # the root has no gradient at 0
    root = jnp.where(is_open, jnp.sqrt(jnp.where(is_open, rest, 1)), 0)
    if starts is not None:
        root = jnp.where(starts[..., None], 1, root)
        # exp of which is 0; unlike that of -inf its gradient is 0 too.
        log_lam = jnp.where(starts[..., None], arguments.MIN_LOG_DECAY, log_lam)
    beta = root * jax.nn.sigmoid(write)
    return Gating(log_lam[:, :, None, None], jnp.ones((1, 1, 1), wide), beta[:, :, None, None])


def rglru_dsf(
    x: Float[Array, "B T p"],
    recurrence: Float[Array, "B T p"],
    write: Float[Array, "B T p"],
    decay: Float[Array, " p"],
    starts: Bool[Array, "B T"] | None = None,
) -> DSFSystem:
    """The real-gated linear recurrent unit of Griffin (De et al. 2024, eq. 1 to 4); n = 1.

    Differs from the paper's a = sigmoid(decay) as the released code does: a = sigmoid(-decay) ^ 8.

    Args:
      x: inputs.
      recurrence, write: logits of the two gates.
      decay: what every channel's lam is made from.
      starts: where a document begins: its position is 0. What came before, an initial state too, is forgotten there.
    """
    arguments.check_arrays(x=x)
    checks.bind_shapes(("x", x, "B T p"), ("recurrence", recurrence, "B T p"))
    gating = rglru_gating(recurrence, write, decay, starts)
    return DSFSystem(*gating, _one(gating), x[:, :, None], _one(gating))


def _one(gating: Gating) -> Any:
    """A key or a query of n = 1 that is always 1."""
    return jnp.ones((1, 1, 1, 1, 1), gating.step.dtype)
