"""Trains a tiny model in a process of its own (see test_kill.py).

    training.py WORKDIR [STEPS [STOP]]

After step STOP it does nothing more but wait for the end. Each step takes at least a twentieth of a
second, so that there is a middle to be killed in.
"""

import hashlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from palr_jax.finetune.input import Tokens
from palr_jax.finetune.train import Program, train
from palr_jax.llama.lora import LoraSpec
from palr_jax.metric_writer import MetricWriter
from palr_jax.testing.llama import random_params, tiny_config

MODEL = tiny_config(vocab_size=41)
LENGTHS = (20, 18, 17, 19, 21, 18)  # a row each: an epoch is three steps
SETTINGS = {
    'steps': 30,
    'batch_size': 2,
    'length': 32,
    'learning_rate': 0.02,
    'warmup': 2,
    'decay_steps': 100,
    'weight_decay': 0.1,
    'clip_norm': 1.0,
    'checkpoint_every': 5,
    'profile_at': 0,
    'profile_steps': 3,
    'pack': True,
    'max_shapes': 4,
}


def main(workdir, steps=SETTINGS['steps'], stop=None):
    rng = np.random.default_rng(0)
    examples = [Tokens(rng.integers(0, 41, n).astype(np.int32), n - 4) for n in LENGTHS]
    base = jax.tree.map(jnp.asarray, random_params(MODEL, seed=1))
    program = Program(MODEL, LoraSpec(4, 8.0, ('q', 'v')), jnp.float32)
    write = MetricWriter.write

    def slowly(self, step, stage, **scalars):
        write(self, step, stage, **scalars)
        time.sleep(3600 if str(step) == stop else 0.05)

    MetricWriter.write = slowly
    settings = ConfigDict(SETTINGS | {'steps': int(steps)})
    adapter = train(base, program, examples, settings, seed=0, workdir=workdir)
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(adapter):
        digest.update(np.asarray(leaf).tobytes())
    print('adapter', digest.hexdigest())


if __name__ == '__main__':
    main(*sys.argv[1:])
