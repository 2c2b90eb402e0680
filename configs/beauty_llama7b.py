"""Amazon Beauty (2014) with LLaMA-7B, the paper's model, on the hardware named after the colon.

Command: python -m palr_jax.main --config=configs/beauty_llama7b.py:v5e-16 --workdir=runs/beauty_7b

Hardware, weights and time: as of configs/ml1m_llama7b.py.

LLaMA-7B reads 2,048 tokens. Items are shown by their titles alone, and 20 candidates are ranked:
with ids as in configs/beauty.py, 50 of them have 1,797 tokens on average and up to 5,014.
"""

from ml_collections import ConfigDict

from configs.beauty import get_config as with_smollm
from configs.ml1m_llama7b import with_llama


def get_config(device: str = 'v5e-16') -> ConfigDict:
    config = with_llama(with_smollm(), device, 'beauty_llama7b')
    config.prompts.item = 'title'
    config.prompts.length = 1760  # and answers of up to 268 tokens
    config.ranking.candidates = 20
    config.tasks.candidates = 15
    config.finetune.length = 2048
    return config
