"""From raw logs to train, validation and test histories: parsers, k-core, splits, fetching.

`load` and `make_split` prepare a data set, `save` and `read` are the stage's output.
"""

from palr_jax.data.fetch import fetch_download, fetch_wheel, resolve
from palr_jax.data.interactions import Catalogue, Interactions, Source
from palr_jax.data.load import Dataset, load, read, save
from palr_jax.data.splits import Split, leave_one_out, make_split, temporal, validation_halves
from palr_jax.data.summary import counts_table

__all__ = [
    'Catalogue',
    'Dataset',
    'Interactions',
    'Source',
    'Split',
    'counts_table',
    'fetch_download',
    'fetch_wheel',
    'leave_one_out',
    'load',
    'make_split',
    'read',
    'resolve',
    'save',
    'temporal',
    'validation_halves',
]
