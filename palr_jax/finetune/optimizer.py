"""The optimiser: AdamW for the adapter, nothing for the base, along one label tree.

In full fine-tuning there is no adapter, and AdamW has every leaf.

Everything that looks at more than one leaf (the gradient norm, the decay, the schedule's clock)
stands inside the adapter's branch of `optax.partition`. A clip outside of it would read, and so
keep alive, a gradient for every frozen leaf.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from palr_jax.llama import lora

Params = Any


def learning_rate(config) -> optax.Schedule:
    """Linear warm-up to the peak, then a cosine to a tenth of it at step `decay_steps`.

    Optax counts steps from 0 and gives step 0 a rate of zero; here the first of w warm-up steps has
    peak / w, so that no step is for nothing.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup,
        decay_steps=max(config.decay_steps, config.warmup + 1),
        end_value=0.1 * config.learning_rate,
    )
    return lambda count: schedule(count + 1)


def make_optimizer(config, full: bool = False) -> optax.GradientTransformation:
    """The transformation of the whole parameter tree; its state holds trained leaves only.

    Those are the adapter's, or all of them if `full`. AdamW's second moment forgets with b2 = 0.99,
    for runs of hundreds of steps. The decay acts
    after Adam's scaling, on the same leaves alone.
    """
    trained = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(learning_rate(config), b2=0.99, weight_decay=config.weight_decay),
    )
    if full:
        return trained
    return optax.partition({lora.ADAPTER: trained, lora.FROZEN: optax.set_to_zero()}, lora.labels)


def update(
    optimizer: optax.GradientTransformation,
    gradient: Params,
    state: optax.OptState,
    adapter: Params,
    frozen: Params,
) -> tuple[Params, optax.OptState]:
    """One step on the trained leaves. The frozen ones' zero gradients exist in the trace alone."""
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), frozen)
    updates, state = optimizer.update(lora.join(gradient, zeros), state, lora.join(adapter, frozen))
    flat = traverse_util.flatten_dict(updates)
    of_adapter = {path: flat[path] for path in traverse_util.flatten_dict(adapter)}
    return optax.apply_updates(adapter, traverse_util.unflatten_dict(of_adapter)), state
