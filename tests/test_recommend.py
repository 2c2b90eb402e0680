"""What `recommend` refuses before anything is computed, and how it finds the items of a history."""

import pytest

from palr_jax import recommend
from palr_jax.config import default_config
from palr_jax.data import Catalogue
from palr_jax.errors import InputError

CATALOGUE = Catalogue(
    raw_ids=('', '10', 'B2', 'B3', 'b3', 'B5'),
    titles=('', 'Heat (1995)', 'Kiss | Tell', 'Soap', 'Soap', '10'),
    years=(None, 1995, None, None, None, None),
    keywords=((),) * 6,
)


def test_items_are_found_by_title_and_by_raw_id():
    """The id also names a title that holds the separator, and the second item of a title."""
    names = ['heat  (1995) ', 'Kiss | Tell', 'B2', 'SOAP', ' b3', 'B3']
    assert recommend.find_items(names, CATALOGUE).tolist() == [1, 2, 2, 3, 4, 3]


def test_a_title_goes_before_a_raw_id():
    assert recommend.find_items(['10'], CATALOGUE).tolist() == [5]


def test_a_name_that_is_neither_is_refused():
    with pytest.raises(
        InputError,
        match=r'"Heat" is not in the catalogue; allowed are titles and raw ids; the nearest titles '
        r'are "Heat \(1995\)"',
    ):
        recommend.find_items(['Heat'], CATALOGUE)
    with pytest.raises(InputError, match='"" is not in the catalogue'):
        recommend.find_items([''], CATALOGUE)


def test_a_run_that_writes_freely_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    config = default_config()
    config.ranking.mode, config.prompts.candidates = 'generate', False
    monkeypatch.setattr(recommend, 'has_stage', lambda workdir, stage: True)
    monkeypatch.setattr(recommend.storage, 'read_json', lambda path: {})
    monkeypatch.setattr(recommend, 'restore', lambda stored: config)
    with pytest.raises(InputError, match='writes freely and ranks no candidates'):
        recommend.recommend(tmp_path, ['x'], 10)
