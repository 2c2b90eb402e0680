"""Fixtures that several folders of tests share."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Eight simulated devices for the tests of sharding, set before anything starts JAX's backend; what
# does not ask for them runs on the first one alone.
os.environ['XLA_FLAGS'] = (
    f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count=8'.strip()
)

# Jobs that a shell starts in the background ignore Ctrl-C, and would hand that on to the programs
# that tests interrupt.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A file's tests share what they set up, so one worker runs them all. These take longest and begin
# first, so that the workers end at about the same time.
LONGEST = (
    *('test_pipeline.py', 'test_sharded.py', 'test_ablate.py', 'test_lists.py', 'test_train.py'),
    *('test_quantize.py', 'test_command.py', 'test_real_data.py', 'test_scale.py'),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope='session')
def real_data() -> Path:
    """The folder with the real data sets (`ml-100k.zip`, `ml-1m.zip`, …)."""
    folder = os.environ.get('PALR_JAX_DATA')
    if not folder:
        pytest.skip('PALR_JAX_DATA does not name the folder with the real data sets.')
    if not Path(folder).is_dir():
        pytest.skip(f'PALR_JAX_DATA={folder} is not a folder.')
    return Path(folder)


@pytest.fixture(scope='session')
def tpu_report() -> Callable[[str], Any]:
    """Runs a program that compiles for TPU chips in a process of its own; returns what it reports.

    The program finds the chips of a v5e:2x2 as `chips` and ends with `report(JSON-able)`.
    """
    if importlib.util.find_spec('libtpu') is None:
        pytest.skip('libtpu is not installed (pip install libtpu)')
    # Read when jax is imported; without them libtpu looks for a machine with a TPU.
    environment = {
        'JAX_PLATFORMS': 'cpu',
        'TPU_SKIP_MDS_QUERY': '1',
        'TPU_WORKER_HOSTNAMES': 'localhost',
        'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
        'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
        'XLA_FLAGS': '',
        'PYTHONPATH': os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), *sys.path))),
    }
    beginning = (
        'import json\n'
        'from jax.experimental import topologies\n'
        "chips = topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2').devices\n"
        "report = lambda found: print('REPORT', json.dumps(found))\n"
    )

    def run(program: str) -> Any:
        done = subprocess.run(
            [sys.executable, '-c', beginning + program],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.split('REPORT ')[1])

    return run
