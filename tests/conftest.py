"""Fixtures that several folders of tests share."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope='session')
def real_data() -> Path:
    """The folder with the real data sets (`ml-100k.zip`, `ml-1m.zip`, …)."""
    folder = os.environ.get('PALR_JAX_DATA')
    if not folder:
        pytest.skip('PALR_JAX_DATA does not name the folder with the real data sets.')
    if not Path(folder).is_dir():
        pytest.skip(f'PALR_JAX_DATA={folder} is not a folder.')
    return Path(folder)
