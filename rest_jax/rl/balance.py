"""The load-balance loss of models with experts, and the metrics of their routers.

    loss = sum over completions of c mean over layers of E sum_e f_e P_e
    f_e  = share of the completion's positions that went to expert e        P_e = their mean probability of e

(Switch Transformer, arXiv:2101.03961, eq. 4 to 6; it is k when all experts get equally many tokens.) c is the completion's
share of the response tokens of the mini-batch. The product of f and P is taken within a completion, as DeepSeek-V3
(arXiv:2412.19437, eq. 17 to 20) takes it within a sequence: over a global batch it is no sum over parts, so that micro-batches
would change it. Its positions are those that predict it; the prompt, which many completions share, is not among them. f carries
no gradient. `moe.record` makes the sums over positions.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from rest_jax.config import Config
from rest_jax.errors import UserError
from rest_jax.models.config import DecoderConfig
from rest_jax.models.moe import RouterRecord
from rest_jax.types import AnyArray


@struct.dataclass
class RouterSums:
    """What the metrics of the routers are made of; it adds up over micro-batches."""

    load: Float[AnyArray, "L E"]  # tokens that went to each expert
    tokens: Float[AnyArray, " L"]
    entropy: Float[AnyArray, " L"]  # nats
    agreement: Float[AnyArray, " L"]  # experts of the routers' own choice that were taken


def balance_loss(router: RouterRecord) -> Float[Array, ""]:
    """The loss of these rows."""
    return jnp.sum(jnp.mean(router.balance, axis=0))


def sum_router(router: RouterRecord) -> RouterSums:
    """Sums over the rows of a micro-batch."""
    sums = router.load, router.tokens, router.entropy, router.agreement
    return jax.lax.stop_gradient(RouterSums(*(jnp.sum(x, axis=1) for x in sums)))


def router_metrics(sums: RouterSums) -> dict[str, jax.Array]:
    """Means over layers; zeros when no group was computed."""
    tokens = jnp.maximum(sums.tokens, 1.0)
    assigned = jnp.maximum(jnp.sum(sums.load, axis=-1), 1.0)
    return {
        "router/load_max": jnp.mean(jnp.max(sums.load, -1) * sums.load.shape[-1] / assigned),
        "router/unused_experts": jnp.mean(sums.load == 0),
        "router/entropy": jnp.mean(sums.entropy / tokens),
        "router/agreement": jnp.mean(sums.agreement / assigned),
    }


def check_experts(config: Config, cfg: DecoderConfig) -> None:
    """UserError for an option that needs experts, on a model that has none."""
    options = {
        "rollout.replay_routing": config.rollout.replay_routing,
        "loss.load_balance_coefficient": config.loss.load_balance_coefficient,
    }
    for name, value in options.items():
        if value and not cfg.n_experts:
            raise UserError(f"{name} {value}: a {cfg.family} model has no experts; leave it out")
