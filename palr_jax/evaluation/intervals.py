"""Means with their intervals, and what a test says, as cells of a page's table."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from palr_jax.evaluation import page, render, svg
from palr_jax.evaluation.page import Html

LEVEL = 0.05  # a corrected p above it is not significant


def scale_end(intervals: Iterable[Sequence[float] | None]) -> float:
    """The largest number, or 1 where there is none but 0."""
    return max((end for bounds in intervals for end in bounds or ()), default=0.0) or 1.0


def difference_scale(intervals: Iterable[Sequence[float] | None]) -> tuple[float, float]:
    """A scale with 0 in the middle."""
    furthest = scale_end([[abs(end) for end in bounds or ()] for bounds in intervals])
    return -furthest, furthest


def with_scale(name: str, scale: tuple[float, float], form: str) -> Html:
    """A column's heading with both ends of its scale."""
    low, high = (format(end, form) if end else '0' for end in scale)
    return Html(f'{page.escape(name)}<small>{low} … {high}</small>')


def interval(
    mean: float | None,
    bounds: Sequence[float] | None,
    scale: tuple[float, float],
    kind: str,
    mark: float | None,
) -> str:
    """Numbers and their picture; the scale of differences begins below 0.

    Args:
      mean: None where it is not known.
      bounds: of the interval.
      scale: both ends of it.
      kind: a key of `svg.SHAPES`.
      mark: where a dashed line stands.
    """
    if mean is None or bounds is None:
        return render.UNKNOWN
    form = render.SIGNED if scale[0] else '.4f'
    numbers = f'{render.number(mean, form)} <small>{render.interval(bounds, form)}</small>'
    return Html(f'{numbers}{svg.bar(mean, bounds, scale, kind, mark)}')


def verdict(found: Mapping[str, Any]) -> str:
    """What a test says, with what it could have found where it found nothing."""
    if found['p_adjusted'] is None:
        return render.UNKNOWN
    if found['difference'] == 0 and found.get('detectable') is None:
        return 'the same for every user'
    p = f'p {found["p_adjusted"]:.4f}'
    if found['p_adjusted'] <= LEVEL:
        return f'{"better" if found["difference"] > 0 else "worse"} ({p})'
    return with_detectable(f'not significant ({p})', found)


def with_detectable(told: str, found: Mapping[str, Any]) -> Html:
    """What is told of a test, and beneath it the difference that it could have found."""
    detectable = render.number(found.get('detectable'))
    return Html(f'{page.escape(told)}<small class="below">detectable: {detectable}</small>')
