"""Fixtures that several folders of tests share."""

import os
from pathlib import Path

import pytest

# Eight simulated devices for the tests of sharding, set before anything starts JAX's backend; what
# does not ask for them runs on the first one alone.
os.environ['XLA_FLAGS'] = (
    f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count=8'.strip()
)


@pytest.fixture(scope='session')
def real_data() -> Path:
    """The folder with the real data sets (`ml-100k.zip`, `ml-1m.zip`, …)."""
    folder = os.environ.get('PALR_JAX_DATA')
    if not folder:
        pytest.skip('PALR_JAX_DATA does not name the folder with the real data sets.')
    if not Path(folder).is_dir():
        pytest.skip(f'PALR_JAX_DATA={folder} is not a folder.')
    return Path(folder)
