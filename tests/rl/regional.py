"""What the tests of region weights and of the curriculum share: the statistics of a batch."""

import jax.numpy as jnp
import numpy as np

from rest_jax.rl import weights

ENTROPY = jnp.array([0, 0.02, 0.1, 0.4, 0.6, 1.5, 0.9, 2.0], np.float32)
GINI = jnp.array([0, 0.01, 0.06, 0.2, 0.3, 0.6, 0.4, 0.8], np.float32)
COUNT = np.array([0, 30, 40, 10, 50, 200, 20, 5], np.float32)


def stats(entropy=ENTROPY, gini=GINI, count=COUNT):
    """Those of a batch in which every region occurs."""
    return weights.RegionStats(jnp.asarray(entropy), jnp.asarray(gini), jnp.asarray(count))
