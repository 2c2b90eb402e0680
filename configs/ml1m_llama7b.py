"""MovieLens-1M with LLaMA-7B, the paper's model, on the hardware named after the colon.

Command: python -m palr_jax.main --config=configs/ml1m_llama7b.py:v5e-16 --workdir=runs/ml1m_llama7b

Hardware: gpu-80gb (unverified: it has not run on one), v5e-8, v5e-16, v4-32, v5p-128 or v5e-256;
palr_jax/parallel/devices.py has their chips, memory and mesh. Whether a change still fits is told
without the hardware: python -m palr_jax.compile_check --config=configs/ml1m_llama7b.py:v5e-16
Weights: from the Hub; a copy on disk with --config.model.path=FOLDER.
Time: not measured; docs/tpu.md has the memory, work and communication of both programs.
"""

from ml_collections import ConfigDict

from configs.ml1m import get_config as with_smollm
from palr_jax.config import one_of
from palr_jax.parallel.devices import HARDWARE


def get_config(device: str = 'v5e-16') -> ConfigDict:
    return with_llama(with_smollm(), device, 'ml1m_llama7b')


def with_llama(config: ConfigDict, device: str, name: str) -> ConfigDict:
    """`config` with LLaMA-7B for its model, laid out on `device`; `name` is the config's file."""
    hardware = one_of(HARDWARE, device, name)
    data, fsdp, tensor = hardware.mesh
    config.mesh.update({'data': data, 'fsdp': fsdp, 'tensor': tensor, 'hardware': device})

    config.model.path = 'hf:huggyllama/llama-7b'
    config.model.dtype = 'bfloat16'
    config.model.matmul_precision = 'default'
    config.model.remat = 'full'
    config.prompts.style = 'alpaca'  # a base model, without chat markers

    config.finetune.batch_size = max(32, hardware.chips)
    config.finetune.accumulate = 4 if hardware.chips == 1 else 1
    config.ranking.batch_size = max(4, data * fsdp)
    return config
