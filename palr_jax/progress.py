"""Progress of long work: a bar with rate and time left on a terminal, log lines elsewhere."""

import sys
import time

from absl import logging
from tqdm import tqdm

LOG_SECONDS = 15.0  # between two log lines where there is no terminal


class Progress:
    """Counts finished units of work and shows them.

    >>> with Progress('ranking', total=100, unit='users') as progress:
    ...     progress.update(4, note='loss 2.31')
    """

    def __init__(self, name: str, total: int, unit: str, done: int = 0):
        """`done` units were finished before (a resumed run); they do not count in the rate."""
        self.name, self.total, self.unit = name, total, unit
        self.done = self._initial = done
        self._start = self._last = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=done, desc=name, unit=f' {unit}', leave=True)

    def update(self, n: int = 1, note: str = '') -> None:
        """Adds `n` finished units; `note` is shown beside them (the loss, for instance)."""
        self.done += n
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(n)
            return
        now = time.monotonic()
        if now - self._last >= LOG_SECONDS or self.done == self.total:
            self._last = now
            logging.info('%s', self._line(now, note))

    def _line(self, now: float, note: str) -> str:
        seconds = now - self._start
        rate = (self.done - self._initial) / max(seconds, 1e-9)
        speed = f'{rate:.1f} {self.unit}/s' if rate >= 1 else f'{60 * rate:.1f} {self.unit}/min'
        left = tqdm.format_interval((self.total - self.done) / max(rate, 1e-9))
        return (
            f'{self.name}: {self.done} of {self.total} {self.unit}, {speed}, {left} left; {note}'
        ).rstrip('; ')

    def __enter__(self) -> 'Progress':
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()
