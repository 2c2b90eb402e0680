"""Kinds of hardware by the name that a config takes: `--config=configs/ml1m_llama7b.py:v5e-16`.

Memory and peak are as published (bf16, dense), for one device as JAX counts them: a chip.
"""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Hardware:
    """A slice of TPUs, or a GPU.

    Attributes:
      topology: the name that `jax.experimental.topologies` knows it by; '' is no TPU.
      chips: JAX devices.
      memory: bytes of a chip.
      peak: bf16 FLOP/s of a chip.
      mesh: (data, fsdp, tensor).
      megacore: the two cores of a chip are one device; newer chips are so by themselves.
      verified: whether it ran on, or was compiled for, this hardware.
    """

    topology: str
    chips: int
    memory: int
    peak: float
    mesh: tuple[int, int, int]
    megacore: bool = False
    verified: bool = True


# The number in a name is that of Google's: chips of a v5e, cores (two a chip) of a v4 and a v5p.
HARDWARE = {
    'gpu-80gb': Hardware('', 1, 80 * 10**9, 989e12, (1, 1, 1), verified=False),
    'v5e-8': Hardware('v5e:2x4', 8, 16 * GIB, 197e12, (1, 8, 1)),
    'v5e-16': Hardware('v5e:4x4', 16, 16 * GIB, 197e12, (1, 16, 1)),
    'v4-32': Hardware('v4:2x2x4', 16, 32 * GIB, 275e12, (1, 16, 1), megacore=True),
    'v5p-128': Hardware('v5p:4x4x4', 64, 95 * GIB, 459e12, (4, 16, 1)),
    'v5e-256': Hardware('v5e:16x16', 256, 16 * GIB, 197e12, (16, 16, 1)),
}

# bf16 FLOP/s by how JAX's `device_kind` begins.
PEAKS = {
    'TPU v4': 275e12,
    'TPU v5 lite': 197e12,
    'TPU v5': 459e12,
    'TPU v6 lite': 918e12,
    'NVIDIA A100': 312e12,
    'NVIDIA H100': 989e12,
    'NVIDIA H200': 989e12,
}


def peak_flops(kind: str) -> float | None:
    """bf16 FLOP/s of a device of this kind; None where it is not known, as of a CPU."""
    found = [name for name in PEAKS if kind.startswith(name)]
    return PEAKS[max(found, key=len)] if found else None
