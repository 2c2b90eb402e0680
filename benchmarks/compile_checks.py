"""LLaMA-7B compiled for TPUs from 8 to 256 chips, without one: the table of docs/tpu.md.

    pip install libtpu
    python benchmarks/compile_checks.py --out=docs/results [--hardware=v5e-8,v5e-16]

Each line is a run of `python -m palr_jax.compile_check` with configs/ml1m_llama7b.py:HARDWARE, in a
process of its own; the same command again continues. The table is printed at the end.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from palr_jax import storage

SIZES = ('--config.finetune.length=512', '--config.prompts.length=1024')
INT8 = '--config.model.quantize=int8'
PARTS = '--config.finetune.accumulate=2'
# (what it is called, program, further flags)
EVERYWHERE = (
    ('LoRA', 'train', ()),
    ('LoRA, 2 parts', 'train', (PARTS,)),
    ('LoRA, int8', 'train', (INT8,)),
    ('ranking', 'rank', ()),
)
# A row a chip in 2 parts is half a row a chip at a time: two chips share a row's heads.
HALVED_256 = (PARTS, '--config.mesh.data=8', '--config.mesh.tensor=2')
HALVED_64 = (PARTS, '--config.mesh.data=2', '--config.mesh.tensor=2')
KEPT = ('--config.model.remat=none',)
FULL = ('--config.finetune.full=True',)
VARIANTS = {
    'v5e-8': (
        *EVERYWHERE,
        ('LoRA, projections kept', 'train', ('--config.model.remat=projections',)),
        ('LoRA, everything kept', 'train', KEPT),
        ('LoRA, everything kept, 64 rows', 'train', (*KEPT, '--config.finetune.batch_size=64')),
        ('ranking, int8', 'rank', (INT8,)),
    ),
    'v5e-16': (
        *EVERYWHERE,
        ('LoRA, projections kept', 'train', ('--config.model.remat=projections',)),
        ('all weights', 'train', FULL),
        ('LoRA, 2 slices', 'train', ('--config.mesh.slices=2', '--config.mesh.data=2')),
    ),
    'v4-32': EVERYWHERE,
    'v5p-128': (
        EVERYWHERE[0],
        ('LoRA, 2 parts', 'train', HALVED_64),
        *EVERYWHERE[2:],
        ('all weights', 'train', FULL),
    ),
    'v5e-256': (
        EVERYWHERE[0],
        ('LoRA, 2 parts', 'train', HALVED_256),
        *EVERYWHERE[2:],
        ('all weights', 'train', FULL),
    ),
}


def check(hardware: str, program: str, more: tuple[str, ...]) -> dict:
    """The result of one run; one that does not fit has a result too."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / 'check.json'
        command = [
            *(sys.executable, '-m', 'palr_jax.compile_check', f'--out={out}'),
            f'--config=configs/ml1m_llama7b.py:{hardware}',
            *(f'--programs={program}', *SIZES, *more),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not out.exists():
            raise SystemExit(done.stderr[-4000:])
        print(done.stdout, flush=True)
        return json.loads(out.read_text())


def table(folder: Path) -> str:
    """Markdown of all the results in `folder`."""
    lines = [
        '| hardware | chips | program | GiB a chip, of | TFLOP a chip | communicated, GB '
        '| compile: seconds, CPU seconds |',
        '| --- | ---: | --- | --- | ---: | ---: | ---: |',
    ]
    for hardware in VARIANTS:
        path = folder / f'compile_check_{hardware}.json'
        for name, result in storage.read_json(path).items() if path.exists() else ():
            (found,) = result['programs'].values()
            row = [hardware, result['chips'], name]
            if 'work' in found:
                sent = sum(x['bytes'] for x in found['collectives'].values())
                row += [f'{found["needed_gib"]:.2f} of {found["hbm_gib"]:.0f}']
                row += [f'{found["work"]["flops"] / 1e12:.1f}', f'{sent / 1e9:.1f}']
                row += [f'{found["compile_seconds"]:.0f}, {found["compile_cpu_seconds"]:.0f}']
            else:
                needed = f'{found["needed_gib"]:.2f} of {found["hbm_gib"]:.0f}'
                row += [f'{needed}: does not fit', '', '', '']
            lines.append(f'| {" | ".join(map(str, row))} |')
    return '\n'.join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', type=Path, required=True, help='folder of the JSON files')
    parser.add_argument('--hardware', default=','.join(VARIANTS))
    arguments = parser.parse_args()
    for hardware in filter(None, arguments.hardware.split(',')):
        path = arguments.out / f'compile_check_{hardware}.json'
        results = storage.read_json(path) if path.exists() else {}
        for name, program, more in VARIANTS[hardware]:
            if name not in results:
                results[name] = check(hardware, program, more)
                storage.write_json(path, results)
    print(table(arguments.out))


if __name__ == '__main__':
    main()
