"""What a process says of the code that it runs."""

import subprocess

import pytest

from palr_jax import __version__
from palr_jax.parallel import distributed


@pytest.fixture
def checkout(tmp_path):
    """A git repository with one commit."""
    git = ['git', '-C', str(tmp_path), '-c', 'user.name=n', '-c', 'user.email=e@example.org']
    subprocess.run([*git, 'init', '-q'], check=True)
    subprocess.run([*git, 'commit', '-q', '--allow-empty', '-m', 'x'], check=True)
    return tmp_path


def revision_in(folder, monkeypatch):
    """Of the code, as if its package lay in `folder`."""
    place = folder / 'palr_jax' / 'parallel' / 'distributed.py'
    place.parent.mkdir(parents=True)
    monkeypatch.setattr(distributed, '__file__', str(place))
    return distributed.revision()


def test_the_revision_is_that_of_the_checkout(checkout, monkeypatch):
    head = (checkout / '.git' / 'refs' / 'heads').iterdir()
    assert revision_in(checkout, monkeypatch) == next(head).read_text()[:12]


def test_an_installed_package_has_its_version_in_whatever_checkout(checkout, monkeypatch):
    folder = checkout / '.venv' / 'lib' / 'site-packages'
    assert revision_in(folder, monkeypatch) == __version__


def test_without_git_the_version_is_told(checkout, monkeypatch):
    monkeypatch.setenv('PATH', '')
    assert revision_in(checkout, monkeypatch) == __version__
