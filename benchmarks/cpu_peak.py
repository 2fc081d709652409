"""What this machine's CPU can do: the FLOP/s of the fastest of a few float32 matmuls, beside which a case's rate is shown."""

import functools
import time

_MATMULS = ((1024, 1024, 1024), (2048, 512, 2048), (512, 2048, 2048))  # rows, inner, columns


@functools.cache
def measured_cpu_peak(seconds: float = 0.2) -> float:
    """FLOP/s of the fastest of a few float32 matmuls on this process's CPU: best of the runs `seconds` allow.

    Every shape is compiled and run once beforehand, outside the time, and timed at least once. XLA spreads one matmul
    over all cores the process has, so this is the rate of the machine, not of a core.
    """
    import jax
    import jax.numpy as jnp

    device = jax.local_devices(backend="cpu")[0]
    multiply = jax.jit(functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST))
    best = 0.0
    auto = (jax.sharding.AxisType.Auto,)
    alone = jax.make_mesh((1,), ("one",), axis_types=auto, devices=[device])
    with jax.set_mesh(alone):  # a mesh the caller may be in has other devices
        for rows, inner, columns in _MATMULS:
            shapes = ((rows, inner), (inner, columns))
            a, b = (jnp.ones(shape, jnp.float32, device=device) for shape in shapes)
            jax.block_until_ready(multiply(a, b))
            end = time.perf_counter()
            deadline = end + seconds / len(_MATMULS)
            while True:
                start = time.perf_counter()
                jax.block_until_ready(multiply(a, b))
                end = time.perf_counter()
                best = max(best, 2 * rows * inner * columns / (end - start))
                if end >= deadline:
                    break
    return best
