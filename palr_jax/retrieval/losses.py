"""Losses of next-item training: the full softmax, a sampled one, and the binary ones.

Each takes states [M, D] after M tokens, the item table [I, D] and target ids [M] (0 = none), and
gives the mean over the tokens that have a target; without any it is 0. Where negatives are drawn,
an item that happens to be the token's own target is no negative.

Axes: M tokens, D width, I items, n negatives.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from palr_jax.retrieval.sasrec import embed_items

CHUNK = 256  # tokens whose logits over the catalogue are held at once
MASKED = -1e30

LOSSES = ('full_ce', 'sampled_softmax', 'gbce', 'bce')


@dataclass(frozen=True)
class Loss:
    """One of `LOSSES` with its settings.

    Attributes:
      kind: its name.
      negatives: n that a step draws, shared by its tokens; `bce` draws one for each token.
      popular: share of the negatives of `sampled_softmax` that come by popularity, 0 to 1; the
        others are uniform.
      t: gBCE's calibration, 0 to 1.
    """

    kind: str = 'full_ce'
    negatives: int = 256
    popular: float = 0.5
    t: float = 0.75

    def __call__(
        self,
        states: jax.Array,
        table: jax.Array,
        targets: jax.Array,
        counts: jax.Array,
        key: jax.Array,
    ) -> jax.Array:
        """states [M, D], table [I, D], targets [M], training events of each item [I] -> scalar."""
        items, n = len(table), self.negatives
        if self.kind == 'full_ce':
            return full_ce(states, table, targets)
        if self.kind == 'sampled_softmax':
            popularity = counts / jnp.maximum(counts.sum(), 1)
            proposal = (1 - self.popular) / items + self.popular * popularity
            cumulative = jnp.cumsum(proposal)
            places = jax.random.uniform(key, (n,)) * cumulative[-1]
            rows = jnp.minimum(jnp.searchsorted(cumulative, places, side='right'), items - 1)
            return sampled_softmax(states, table, targets, rows + 1, jnp.log(proposal[rows]))
        if self.kind == 'gbce':
            negatives = jax.random.randint(key, (1, n), 1, items + 1)
            return binary_ce(states, table, targets, negatives, gbce_beta(n, items, self.t))
        negatives = jax.random.randint(key, (len(targets), 1), 1, items + 1)
        return binary_ce(states, table, targets, negatives)


@jax.custom_vjp
def full_ce(states: jax.Array, table: jax.Array, targets: jax.Array) -> jax.Array:
    """-log softmax(states @ table.T)[target]: every item of the catalogue competes.

    The logits [M, I] are by far the largest array of the training. A chunk of tokens at a time
    gives its loss and, while its exponentials are at hand, its gradient; nothing is kept.
    """
    return _full_ce_fwd(states, table, targets)[0]


def _full_ce_fwd(
    states: jax.Array, table: jax.Array, targets: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    def chunk(carry, inputs):
        total, d_table = carry
        x, target = inputs
        real, wanted = (target > 0)[:, None], embed_items(table, target)
        logits = x @ table.T
        top = logits.max(-1, keepdims=True)
        exp = jnp.exp(logits - top)
        partition = exp.sum(-1, keepdims=True)
        losses = jnp.log(partition) + top - (x * wanted).sum(-1, keepdims=True)
        scale = real / partition  # of small arrays: exp is not passed over once more
        carry = total + jnp.sum(losses * real), d_table + exp.T @ (x * scale)
        return carry, (exp @ table) * scale - wanted

    length = len(targets)
    pad = -length % CHUNK
    x = jnp.pad(states, ((0, pad), (0, 0))).reshape(-1, CHUNK, states.shape[1])
    target = jnp.pad(targets, (0, pad)).reshape(-1, CHUNK)
    (total, d_table), d_states = jax.lax.scan(chunk, (0.0, jnp.zeros_like(table)), (x, target))
    d_states = d_states.reshape(-1, states.shape[1])[:length]
    d_table = d_table.at[jnp.maximum(targets, 1) - 1].add(-states * (targets > 0)[:, None])
    count = jnp.maximum((targets > 0).sum(), 1)
    return total / count, (d_states / count, d_table / count)


def _full_ce_bwd(
    gradients: tuple[jax.Array, jax.Array], d_loss: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    return gradients[0] * d_loss, gradients[1] * d_loss, None


full_ce.defvjp(_full_ce_fwd, _full_ce_bwd)


def sampled_softmax(
    states: jax.Array,
    table: jax.Array,
    targets: jax.Array,
    negatives: jax.Array,
    log_proposal: jax.Array,
) -> jax.Array:
    """The softmax with its partition sum estimated from negatives that all tokens share.

    Args:
      negatives: [n] item ids, drawn independently from a proposal distribution q.
      log_proposal: [n] their log q. Subtracting it (and log n) from the logits, the logQ
        correction, makes the sum of exponentials an unbiased estimate of the full one
        (Bengio and Senécal, 2008; Yi et al., 2019).
    """
    positive = jnp.sum(states * embed_items(table, targets), -1)
    logits = states @ embed_items(table, negatives).T - log_proposal - np.log(len(negatives))
    logits = jnp.where(targets[:, None] == negatives, MASKED, logits)
    partition = jax.nn.logsumexp(jnp.concatenate([positive[:, None], logits], 1), -1)
    return _mean(partition - positive, targets)


def binary_ce(
    states: jax.Array,
    table: jax.Array,
    targets: jax.Array,
    negatives: jax.Array,
    beta: float = 1.0,
) -> jax.Array:
    """-(beta log sigmoid(target) + sum over n of log sigmoid(-negative)).

    With one negative a token and beta 1 it is SASRec's own loss; with many and the beta of
    `gbce_beta` it is gBCE. A sum, since that beta holds n already: with a mean n would count twice.
    The constant 1 / (n + 1) of gSASRec's code is left out: Adam's steps do not depend on it.

    Args:
      negatives: [M, n] item ids, or [1, n] that all tokens share.
      beta: exponent of the target's probability.
    """
    positive = jnp.sum(states * embed_items(table, targets), -1)
    if negatives.shape[0] == 1:
        logits = states @ embed_items(table, negatives[0]).T
    else:
        logits = jnp.einsum('md,mnd->mn', states, embed_items(table, negatives))
    against = jnp.where(targets[:, None] == negatives, 0, jax.nn.softplus(logits))
    return _mean(beta * jax.nn.softplus(-positive) + against.sum(-1), targets)


def gbce_beta(negatives: int, items: int, t: float) -> float:
    """gBCE's exponent 1 - t (1 - negatives / (items - 1)) (Petrov and Macdonald, 2023, eq. 12).

    t = 0 is the plain binary loss; t = 1 undoes the overconfidence that sampling brings.
    """
    return 1 - t * (1 - min(1.0, negatives / max(items - 1, 1)))


def _mean(losses: jax.Array, targets: jax.Array) -> jax.Array:
    real = targets > 0
    return jnp.sum(losses * real) / jnp.maximum(real.sum(), 1)
