"""Made-up Amazon reviews of 2014: the official layout, invented products.

The files have the quirks of the real ones: metadata as Python dicts, HTML entities, products
without title, brand or metadata, an ASIN that is a number, several category paths, days instead of
seconds (so events of a user tie), and rows that are sorted neither by user nor by time. Every kind
of product is a ring of `histories.py`.
"""

import gzip
import json
import os
from pathlib import Path

import numpy as np

from palr_jax.testing import histories

_KINDS = (
    'Makeup>Nails>Nail Polish',
    'Makeup>Lips>Lipstick',
    'Makeup>Eyes>Mascara',
    'Skin Care>Face>Creams & Moisturizers',
    'Skin Care>Body>Cleansers',
    'Skin Care>Hands & Nails>Hand Creams',
    'Hair Care>Shampoos',
    'Hair Care>Styling Tools>Brushes',
    "Fragrance>Women's>Eau de Parfum",
    "Fragrance>Men's>Cologne",
    'Bath & Body>Bath>Bath Salts',
    'Tools & Accessories>Mirrors',
)
_BRANDS = ('Aurelle', "Betty's Best", 'Noir & Blanc', 'Kitanova', 'Søren', 'Plain')
_WORDS = 'Shimmer Velvet Classic Gentle Midnight Coral Intense Daily Citrus'
_DAY = 86_400  # seconds
_FIRST_DAY = 15_000  # of the reviews, in the year 2011


def write_amazon(
    folder: str | os.PathLike[str],
    *,
    users: int = 40,
    items: int = 60,
    seed: int = 0,
    category: str = 'Beauty',
    packed: bool = True,
) -> Path:
    """Writes `reviews_CATEGORY_5.json` and `meta_CATEGORY.json`; returns the folder.

    Args:
      folder: made if it is missing.
      users: number of users, each with 8 events or more (fewer where `items` is under 16).
      items: number of products, at least 8; not every one need be reviewed.
      seed: the same arguments give the same bytes.
      category: part of the file names, and the root of the category paths.
      packed: as `.json.gz`.
    """
    if items < 8:
        raise ValueError(f'items={items}: at least 8 products are needed for the quirks.')
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    asins = [f'B{index:09d}' for index in range(items)]
    asins[1] = '7806397051'
    events = histories.events(users, items, seed)
    days: dict[tuple[int, int], int] = {}  # a user's n-th second becomes his n-th day
    for user, second in sorted({(user, second) for user, _, _, second in events}):
        days[user, second] = days.get((user, -1), user % 500)
        days[user, -1] = days[user, second] + 1
    lines = []
    for user, item, rating, second in events:
        record = {
            'reviewerID': f'A{user:04d}',
            'asin': asins[item - 1],
            'overall': float(rating),
            'unixReviewTime': (_FIRST_DAY + days[user, second]) * _DAY,
        }
        lines.append(json.dumps(record))
    _write(folder / f'reviews_{category}_5.json', lines, packed)
    products = _products(asins, category, seed)
    _write(folder / f'meta_{category}.json', [repr(product) for product in products], packed)
    return folder


def _products(asins: list[str], category: str, seed: int) -> list[dict[str, object]]:
    rng = np.random.default_rng([seed, 3])
    products = []
    for index, asin in enumerate(asins):
        path = [category, *_KINDS[histories.ring(index, len(asins)) % len(_KINDS)].split('>')]
        brand = str(rng.choice(_BRANDS))
        title = f'{brand} {rng.choice(_WORDS.split())} {path[-1]}, {rng.integers(1, 40)} Ounce'
        product: dict[str, object] = {'asin': asin, 'title': title.replace('&', '&amp;')}
        if rng.random() < 0.7:
            product['brand'] = brand
        product['categories'] = [path]
        products.append(product)
    del products[2]['title']
    products[2]['brand'] = 'Kitanova'
    products[3]['title'] = ''
    products[3].pop('brand', None)
    products[4]['categories'] = [*products[4]['categories'], [category, 'Gift Sets'], ['Gifts']]
    products[5]['title'] = 'Nameless &quot;No. 5&quot;\n Soap'
    products[6]['title'] = products[7]['title'] = 'Twin Set with Betty\'s "Best"'
    return products[:-1]


def _write(path: Path, lines: list[str], packed: bool) -> None:
    data = ('\n'.join(lines) + '\n').encode()
    if packed:
        path, data = path.with_name(f'{path.name}.gz'), gzip.compress(data, mtime=0)
    path.write_bytes(data)
