"""A small chain to learn: the next item mostly follows from the last one."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from palr_jax.data.splits import Split

ITEMS = 40


def _split_of(histories: list[list[int]]) -> Split:
    """Leave-one-out by hand; histories of fewer than 3 events only train."""
    lengths = np.array([len(h) for h in histories])
    enough = lengths >= 3
    return Split(
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        items=np.concatenate(histories).astype(np.int32),
        train_end=np.where(enough, lengths - 2, lengths).astype(np.int32),
        valid_at=np.where(enough, lengths - 2, -1).astype(np.int32),
        test_at=np.where(enough, lengths - 1, -1).astype(np.int32),
    )


@pytest.fixture(scope='session')
def split_of():
    return _split_of


@pytest.fixture(scope='session')
def chain() -> Split:
    """150 users walk around a ring of 40 items; one step in ten jumps to any unseen item."""
    rng = np.random.default_rng(0)
    histories = []
    for _ in range(150):
        history = [int(rng.integers(ITEMS))]
        while len(history) < rng.integers(6, 16):
            step = (history[-1] + 1) % ITEMS
            if rng.random() < 0.1 or step in history:
                step = int(rng.choice(np.setdiff1d(np.arange(ITEMS), history)))
            history.append(step)
        histories.append([item + 1 for item in history])
    return _split_of(histories)


@pytest.fixture(scope='session')
def chain_settings() -> ConfigDict:
    """A `config.retrieval` that learns the chain in seconds."""
    return ConfigDict(
        {
            'systems': ('sequence',),
            'covisitation_width': 8,
            'profile_share': 0.1,
            'profile_decay': 0.8,
            'cold_items': False,
            'encoder': 'sasrec',
            'width': 16,
            'blocks': 1,
            'heads': 2,
            'length': 8,
            'dropout': 0.1,
            'loss': 'full_ce',
            'negatives': 16,
            'popular_negatives': 0.5,
            'gbce_t': 0.75,
            'learning_rate': 1e-2,
            'schedule': 'constant',
            'batch_size': 16,
            'epochs': 12,
            'evaluate_every': 2,
            'patience': 4,
            'exclude_history': True,
        }
    )


@pytest.fixture
def settings(chain_settings) -> ConfigDict:
    """A copy that a test may change."""
    return ConfigDict(chain_settings.to_dict())
