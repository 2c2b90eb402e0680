"""What a compiled program does, read from its text: work with loops multiplied out, communication.

XLA's own cost analysis counts the body of a loop once, and a scan over 32 layers is a loop. Here
each body is analysed as a program of its own and counted as often as it runs.

An `Hlo` is a dict from the name of a computation to its lines.
"""

import collections
import functools
import math
import re
from typing import Any

import jax
from jaxlib import _hlo, _jax  # the only access that there is to XLA's cost analysis of a text

Hlo = dict[str, str]
KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
BITS = {'pred': 8, 'bf16': 16}  # the others end with their number of bits

_COMPUTATION = re.compile(r'^(?:ENTRY )?%?([\w.-]+) \([^\n]*\{\n(.*?)^\}', re.MULTILINE | re.DOTALL)
_WHILE = re.compile(r' while\([^\n]*condition=%?([\w.-]+), body=%?([\w.-]+)[^\n]*')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONSTANT = re.compile(r'%?([\w.-]+) = [su]32\[\][^ ]* constant\((\d+)\)')
_ENTRY = re.compile(r'get-tuple-element\([^\n]*\), index=(\d+)')
_CALLED = re.compile(r'(?:calls|to_apply|body|branch_computations)=\{?((?:%?[\w.-]+(?:, )?)+)')
_COLLECTIVE = re.compile(rf' = (\(?[^=]*?) ({"|".join(KINDS)})(?:-start)?\([^\n]*channel_id=(\d+)')
_ARRAY = re.compile(r'\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]')


def computations(text: str) -> Hlo:
    """The computations of a module by name."""
    return dict(_COMPUTATION.findall(text))


def entry(text: str) -> str:
    """The name of the computation that runs first."""
    return re.search(r'^ENTRY %?([\w.-]+)', text, re.MULTILINE)[1]


def loops(parts: Hlo, name: str) -> list[tuple[str, int]]:
    """(body, how often it runs) of the loops in a computation; 1 where that cannot be told.

    XLA notes the number, or the counter tells: the condition compares an entry of the loop's tuple
    with a constant, and the body adds a constant to it. It starts at 0.
    """
    found = []
    for match in _WHILE.finditer(parts[name]):
        condition, body = parts[match[1]], match[2]
        if noted := _TRIPS.search(match[0]):
            trips = int(noted[1])
        else:
            limits, entries = _CONSTANT.findall(condition), _ENTRY.findall(condition)
            known = len(limits) == 1 and len(entries) == 1
            step = _step(parts[body], int(entries[0])) if known else 1
            trips = -(-int(limits[0][1]) // step) if known else 1
        found.append((body, trips))
    return found


def _step(body: str, entry: int) -> int:
    """What a loop's body adds to an entry of its tuple; 1 where it is no such sum."""
    results = re.search(r'ROOT [^\n]* tuple\(([^\n]*?)\)', body)
    counter = re.findall(r'%([\w.-]+)', results[1])[entry] if results else ''
    added = re.search(rf'%{re.escape(counter)} = [^\n]*? add\(([^)]*)\)', body)
    constants = dict(_CONSTANT.findall(body))
    terms = re.findall(r'%([\w.-]+)', added[1]) if added else []
    steps = [constants[term] for term in terms if term in constants]
    return int(steps[0]) if len(steps) == 1 else 1


def work(text: str) -> dict[str, float]:
    """FLOPs and bytes of one run of a module on one device: {'flops', 'bytes'}.

    XLA sees no FLOPs in a kernel (a custom call).
    """
    parts, first = computations(text), entry(text)

    @functools.cache
    def once(name: str) -> tuple[float, float]:
        moved = text.replace('\nENTRY ', '\n').replace(f'\n%{name} (', f'\nENTRY %{name} (')
        module = _hlo.hlo_module_from_text(
            re.sub(r'^HloModule ([\w.-]+).*', r'HloModule \1', moved)
        )
        cost = _jax.hlo_module_cost_analysis(jax.devices('cpu')[0].client, module)
        return cost.get('flops', 0.0), cost.get('bytes accessed', 0.0)

    @functools.cache
    def total(name: str) -> tuple[float, float]:
        flops, size = once(name)
        for body, trips in loops(parts, name):
            flops += trips * total(body)[0] - once(body)[0]
            size += trips * total(body)[1] - once(body)[1]
        return flops, size

    flops, size = total(first)
    return {'flops': flops, 'bytes': size}


def runs(text: str) -> dict[str, int]:
    """How often each computation that the entry reaches is run."""
    parts = computations(text)
    times: collections.Counter[str] = collections.Counter()

    def visit(name: str, number: int) -> None:
        times[name] += number
        bodies = dict(loops(parts, name))
        for names in _CALLED.findall(parts[name]):
            for called in re.findall(r'[\w.-]+', names):
                if called in parts:
                    visit(called, number * bodies.get(called, 1))

    visit(entry(text), 1)
    return dict(times)


def collectives(text: str) -> dict[str, dict[str, float]]:
    """{kind: {'count', 'bytes'}} of one run, a device: the bytes are those of the results.

    Of a reduce-scatter they are what is left of the sum.
    """
    found: dict[str, dict[str, float]] = {}
    parts, seen = computations(text), set()
    for name, number in runs(text).items():
        for shape, kind, channel in _COLLECTIVE.findall(parts[name]):
            # Begun in one fusion and carried on in others, it stands in each of them.
            if channel in seen:
                continue
            seen.add(channel)
            sums = found.setdefault(kind, {'count': 0, 'bytes': 0})
            sums['count'] += number
            # A `-start` has the operand and the result: the result is the larger one.
            sums['bytes'] += number * max(map(array_bytes, _ARRAY.findall(shape)), default=0)
    return found


def array_bytes(shape: tuple[str, str]) -> int:
    """Of ('bf16', '32,512'): 32,768."""
    kind, sizes = shape
    bits = BITS.get(kind) or int(re.search(r'\d+', kind)[0])
    return math.prod(int(n) for n in sizes.split(',') if n) * bits // 8


def summary(text: str) -> dict[str, Any]:
    """Work and communication, in JSON's types."""
    return {'work': work(text), 'collectives': collectives(text)}
