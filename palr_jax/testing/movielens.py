"""Made-up MovieLens: the official layouts, invented films, histories with something to learn.

The files have the quirks of the real ones: latin-1 accents, postposed articles, a title without a
year, one with `(V)` behind it, one title under two ids, gaps in the ids of ML-1M, many events of a
user in the same second, and rows that are sorted neither by user nor by time.

Every genre is a ring of `histories.py`.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from palr_jax.testing import histories

_NOUNS = {
    'Action': 'Strike Convoy Detonator Pursuit',
    'Adventure': 'Expedition Compass Treasure Voyage',
    'Animation': 'Teapot Firefly Marionette Snowman',
    "Children's": 'Puppy Treehouse Kite Playground',
    'Comedy': 'Honeymoon Umbrella Landlord Picnic',
    'Crime': 'Alibi Syndicate Heist Informant',
    'Documentary': 'Glacier Orchestra Shipyard Census',
    'Drama': 'Inheritance Orchard Confession Winter',
    'Fantasy': 'Dragon Enchanter Mirror Unicorn',
    'Film-Noir': 'Shadow Cigarette Stranger Alley',
    'Horror': 'Cellar Scarecrow Possession Graveyard',
    'Musical': 'Serenade Chorus Ballroom Tango',
    'Mystery': 'Cipher Lighthouse Manuscript Locksmith',
    'Romance': 'Bouquet Letter Waltz Promise',
    'Sci-Fi': 'Starship Android Nebula Orbit',
    'Thriller': 'Witness Ransom Deadline Suspect',
    'War': 'Regiment Trench Armistice Battalion',
    'Western': 'Saddle Canyon Sheriff Stagecoach',
}
_ADJECTIVES = (
    'Silent Crimson Hidden Broken Golden Last Distant Burning Frozen Wandering Midnight Velvet '
    'Paper Iron Lonely Second Electric Hollow Restless Northern'
)
GENRES = ('unknown', *_NOUNS)  # in the order of u.genre


@dataclass(frozen=True)
class _Film:
    title: str  # as it stands in the official files
    genres: tuple[str, ...]  # in the order of GENRES

    @property
    def year(self) -> str:
        found = re.search(r'\((\d{4})\)', self.title)
        return found[1] if found else ''


def write_ml100k(
    folder: str | os.PathLike[str], *, users: int = 40, items: int = 60, seed: int = 0
) -> Path:
    """Writes `u.data`, `u.item` and `u.genre`; returns the folder.

    Args:
      folder: made if it is missing.
      users: number of users, each with 8 events or more (fewer where `items` is under 16).
      items: number of films, at least 8; not every one need be watched.
      seed: the same arguments give the same bytes.
    """
    folder = _made(folder)
    films = _films(items, seed)
    rows = histories.events(users, len(films), seed)
    lines = [f'{user}\t{item}\t{rating}\t{second}' for user, item, rating, second in rows]
    (folder / 'u.data').write_text('\n'.join(lines) + '\n')
    lines = []
    for item, film in enumerate(films, start=1):
        date = f'01-Jan-{film.year}' if film.year else ''
        flags = ['1' if genre in film.genres else '0' for genre in GENRES]
        lines.append('|'.join([str(item), film.title, date, '', '', *flags]))
    (folder / 'u.item').write_bytes(('\n'.join(lines) + '\n').encode('latin-1'))
    lines = [f'{genre}|{index}' for index, genre in enumerate(GENRES)]
    (folder / 'u.genre').write_text('\n'.join(lines) + '\n\n')
    return folder


def write_ml1m(
    folder: str | os.PathLike[str], *, users: int = 40, items: int = 60, seed: int = 0
) -> Path:
    """Writes `ratings.dat` and `movies.dat`; returns the folder. Arguments as `write_ml100k`.

    Events and films are those of `write_ml100k`, but every seventh id is left out, and every
    film has a year, as in the real ML-1M.
    """
    folder = _made(folder)
    films = [_as_in_ml1m(film) for film in _films(items, seed)]
    raw_ids = [item + (item - 1) // 6 for item in range(1, items + 1)]
    lines = [
        f'{user}::{raw_ids[item - 1]}::{rating}::{second}'
        for user, item, rating, second in histories.events(users, len(films), seed)
    ]
    (folder / 'ratings.dat').write_text('\n'.join(lines) + '\n')
    lines = [f'{id_}::{film.title}::{"|".join(film.genres)}' for id_, film in zip(raw_ids, films)]
    (folder / 'movies.dat').write_bytes(('\n'.join(lines) + '\n').encode('latin-1'))
    return folder


def write_recbole(
    folder: str | os.PathLike[str], *, users: int = 40, items: int = 60, seed: int = 0
) -> Path:
    """Writes the data of `write_ml100k` as RecBole does: `ml-100k.inter`, `ml-100k.item`.

    Like the files in RecBole's wheel they are UTF-8, the last parenthesis of a title has moved to
    `release_year`, and a title without one is spelt `unkonwn` there. The users stand in another
    order than in `u.data`.
    """
    folder = _made(folder)
    films = _films(items, seed)
    rows = sorted(histories.events(users, len(films), seed), key=lambda row: -row[0])
    lines = ['user_id:token\titem_id:token\trating:float\ttimestamp:float']
    lines += [f'{user}\t{item}\t{rating}\t{second}' for user, item, rating, second in rows]
    (folder / 'ml-100k.inter').write_text('\n'.join(lines) + '\n')
    lines = ['item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq']
    for item, film in enumerate(films, start=1):
        title, year = 'unkonwn', 'unkonwn'
        if '(' in film.title:
            title, year = film.title.strip()[:-1].rsplit(' (', 1)
        lines.append(f'{item}\t{title}\t{year}\t{" ".join(film.genres)}')
    (folder / 'ml-100k.item').write_text('\n'.join(lines) + '\n', encoding='utf-8')
    return folder


def _made(folder: str | os.PathLike[str]) -> Path:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _films(items: int, seed: int) -> list[_Film]:
    """Films by id - 1; the film of id i has that of ring `i - 1` as its first drawn genre."""
    if items < 8:
        raise ValueError(f'items={items}: at least 8 films are needed for the quirks.')
    rng = np.random.default_rng([seed, 1])
    genres = list(_NOUNS)
    taken = set()
    films = []
    for index in range(items):
        genre = genres[histories.ring(index, items)]
        while True:
            words = f'{rng.choice(_ADJECTIVES.split())} {rng.choice(_NOUNS[genre].split())}'
            article = rng.choice(['The', 'A', 'none'], p=[0.3, 0.1, 0.6])
            sequel = 2 + len(taken) // 500  # keeps large catalogues free of chance repeats
            words += f' {sequel}' if sequel > 2 or rng.random() < 0.1 else ''
            name = words if article == 'none' else f'{words}, {article}'
            title = f'{name} ({rng.integers(1935, 1999)})'
            if title not in taken:
                break
        taken.add(title)
        other = rng.choice(genres) if rng.random() < 0.3 else genre
        films.append(_Film(title, tuple(g for g in GENRES if g in (genre, other))))
    quirks = {
        0: 'Café Noël, Le (The Christmas Café) (1993)',
        1: '2001 Señoritas (1968)',
        2: 'Harbor Lights (1996)',
        3: 'Harbor Lights (1996)',
        4: 'Puppy Parade III: The Long Way Home (1995) (V)',
        5: 'Two Cousins (1986) ',
        6: 'unknown',
    }
    for index, title in quirks.items():
        genres_of = ('unknown',) if title == 'unknown' else films[index].genres
        films[index] = _Film(title, genres_of)
    return films


def _as_in_ml1m(film: _Film) -> _Film:
    if film.title == 'unknown':
        return _Film('Nameless Parade (1991)', ('Drama',))
    return _Film(film.title.replace(' (V)', '').strip(), film.genres)
