"""Whether a run's scores depend on what they must not depend on.

Some users of the run are scored again, each time with one thing changed: batch size, padding, order
of the users, batch-mates, order of the scored block under a fixed prompt. Rounding differs between
compiled shapes, so sums may by a tolerance; doing the same again, and the order of the block, may
not change one bit (`ranking.score` says so).

The order of the candidates in the prompt is not among these: an LLM reads it (`order.py`).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from palr_jax.errors import InputError
from palr_jax.llm_input import queries_of
from palr_jax.probes.finished import Finished
from palr_jax.ranking.score import Query, plan_batches

USERS = 8
# Of a sum of log-probabilities (natural logarithm) where products are made in float32.
TOLERANCE = 1e-4
# Of the mean over a title's tokens where they are rounded to bfloat16: a rounding of the last
# hidden state by 2^-9 moves a logit of 20 by 0.04.
TOLERANCE_BF16 = 5e-2
BITS = 0.0  # a tolerance that allows no bit to differ


@dataclass(frozen=True)
class Change:
    """What one change did to the sums.

    Attributes:
      name: what was changed.
      difference: the largest of any sum, or of any mean over a title's tokens.
      bit_equal: whether all sums are the same to the bit.
      tolerance: allowed difference; BITS demands equal bits.
      passed: whether that holds.
    """

    name: str
    difference: float
    bit_equal: bool
    tolerance: float
    passed: bool


def probe(run: Finished, number: int | None) -> dict[str, Any]:
    """Scores a sample of the run's test users under every change.

    Args:
      run: the finished run.
      number: of users; None is USERS, or all where there are fewer.

    Raises:
      InputError: the run scores nothing; or fewer than 2 users are asked for or there, or more than
        it has ranked.
    """
    users, items = run.sample(number, USERS)
    if len(users) < 2:
        raise InputError(f'--users={len(users)}; allowed for --what=invariance: 2 or more.')
    queries, _ = queries_of(run.project, 'test', users, items)
    unit, allowed = tolerance(run.project.config, jax.default_backend())
    changes = try_changes(run, queries, unit, allowed)
    return run.record | {
        'users': len(users),
        'candidates': max(len(query.candidates) for query in queries),
        'unit': unit,
        'changes': [asdict(change) for change in changes],
        'passed': all(change.passed for change in changes),
    }


def try_changes(run: Finished, queries: Sequence[Query], unit: str, allowed: float) -> list[Change]:
    """Compares every change with the base: one shape, batches of the run's size but at least 2.

    `unit` and `allowed` are as of `tolerance`.
    """
    ranking, most = run.project.config.ranking, run.project.checkpoint.config.max_positions
    settings = {'batch_size': max(2, ranking.batch_size), 'max_shapes': 1}
    plan = plan_batches(queries, row_length=ranking.row_length, max_positions=most, **settings)
    settings['row_length'] = plan[0][1].row_length  # longer than asked for where a title is
    base = run.score('base', queries, **settings)

    def score(name: str, members: np.ndarray, **changes: int) -> np.ndarray:
        """[Q', C] of queries, each at least once, in this order."""
        return run.score(name, [queries[i] for i in members], **settings | changes)

    sizes = np.ones(base.shape)
    if unit == 'token':
        for row, query in zip(sizes, queries):
            row[: len(query.candidates)] = [len(answer) for answer in query.candidates]
    everyone = np.arange(len(queries))
    rng = np.random.default_rng([run.project.config.seed, 7])
    changes = [compare('nothing: the same again', base, score('again', everyone), sizes, BITS)]

    shuffled = [rng.permutation(len(query.candidates)) for query in queries]
    block = run.score(
        'order of the block',
        [
            replace(query, candidates=tuple(query.candidates[c] for c in order))
            for query, order in zip(queries, shuffled)
        ],
        **settings,
    )
    back = block.copy()
    for row, found, order in zip(back, block, shuffled):
        row[order] = found[: len(order)]
    changes.append(compare('order of the scored block', base, back, sizes, BITS))

    order = rng.permutation(everyone)
    moved = np.empty_like(base)
    moved[order] = score('order of the users', order)
    changes.append(compare('order of the users', base, moved, sizes, allowed))

    # Every query twice, in the order in which the base batches them: the shapes stay, and each
    # query has another one, itself, beside it.
    twice = np.repeat(np.concatenate([members for members, _ in plan]), 2)
    beside = score('batch-mates', twice)
    changes.append(compare('batch-mates', base[twice], beside, sizes[twice], allowed))

    single = score('batch size: 1', everyone, batch_size=1)
    changes.append(compare('batch size: 1', base, single, sizes, allowed))
    # One query a batch: with others beside it, a shape of its own would seldom pay.
    shapes = max(4, ranking.max_shapes)
    name = f'padding: up to {shapes} shapes, not 1'
    fitted = score(name, everyone, batch_size=1, max_shapes=shapes)
    changes.append(compare(name, single, fitted, sizes, allowed))
    name = 'padding: rows twice as long'
    longer = score(name, everyone, row_length=2 * settings['row_length'])
    changes.append(compare(name, base, longer, sizes, allowed))
    return changes


def compare(
    name: str, base: np.ndarray, other: np.ndarray, sizes: np.ndarray, allowed: float
) -> Change:
    """What became of sums [Q, C]; -inf in unfilled slots of both. `sizes` [Q, C] divide them."""
    gaps = np.zeros(base.shape)
    np.subtract(base, other, out=gaps, where=base != other, dtype=np.float64)
    difference = float((np.abs(gaps) / sizes).max())
    bit_equal = base.tobytes() == other.tobytes()
    passed = bit_equal if allowed == BITS else difference <= allowed
    return Change(name, difference, bit_equal, allowed, passed)


def tolerance(config: ConfigDict, backend: str) -> tuple[str, float]:
    """('sum', TOLERANCE) where products are made in float32, else ('token', TOLERANCE_BF16).

    Below the precision 'highest' the factors of float32 products are rounded; on a CPU 'high' keeps
    enough of them, and 'default' rounds like bfloat16.
    """
    model = config.model
    exact = ('high', 'highest') if backend == 'cpu' else ('highest',)
    if model.dtype == 'float32' and model.matmul_precision in exact:
        return 'sum', TOLERANCE
    return 'token', TOLERANCE_BF16


def table(found: dict[str, Any]) -> str:
    """The result as text, at most 80 columns wide."""
    lines = [
        f'{found["system"]}, {found["dtype"]}: {found["users"]} users, '
        f'{found["candidates"]} candidates each',
        f'{"what is changed":<34}{"largest, of a " + found["unit"]:>19}  {"allowed":>9}  bits',
    ]
    for change in found['changes']:
        allowed = 'no bit' if change['tolerance'] == BITS else f'{change["tolerance"]:.0e}'
        lines.append(
            f'{change["name"]:<34}{change["difference"]:>19.1e}  {allowed:>9}  '
            f'{"equal" if change["bit_equal"] else "differ":<6}  '
            f'{"PASS" if change["passed"] else "FAIL"}'
        )
    return '\n'.join(lines)
