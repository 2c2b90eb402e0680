"""Installs palr_jax. Lower bounds are versions that the tests have passed with."""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r"__version__ = '(.+)'", (HERE / 'palr_jax/__init__.py').read_text()).group(1)

REQUIRED = [
    'absl-py>=2.5',
    'etils[epath]>=1.15',
    'flax>=0.12.8',
    'gguf>=0.19',
    'grain>=0.2.18',
    'huggingface_hub>=2.4',
    'importlib_resources>=7.1',  # tensorflow-datasets reads it where there is no TensorFlow
    'jax>=0.10.2',
    'matplotlib>=3.11',
    'ml-collections>=1.1',
    'ml_dtypes>=0.6',
    'numpy>=2.4',
    'optax>=0.2.8',
    'orbax-checkpoint>=0.12.8',
    'platformdirs>=4.14',
    'pyarrow>=25.0',  # tables of the user's own
    'safetensors>=0.8',
    # ScaNN has wheels for Linux on x86-64 alone; exact search serves elsewhere.
    'scann>=1.4.2; sys_platform == "linux" and platform_machine == "x86_64"',
    'scipy>=1.17',
    'tensorboardX>=2.6',
    'tensorflow-datasets>=4.9.10',
    'tokenizers>=0.23',
    'tqdm>=4.70',
    'transformers>=5.24',
]

EXTRAS = {
    'beam': ['apache-beam>=2.77'],  # logs larger than memory
    'tpu': ['jax[tpu]>=0.10.2'],
    'cuda': ['jax[cuda13]>=0.10.2'],
    'gcs': ['gcsfs'],  # gs:// paths without TensorFlow
    'sentencepiece': ['sentencepiece', 'protobuf'],  # folders with no tokenizer.json
    # pytrec-eval is trec_eval, the reference of the ranking metrics, as a wheel.
    'test': ['pytest>=9.2', 'pytest-xdist>=3.8', 'pytrec-eval-terrier>=0.5.11', 'ruff>=0.17'],
    'browser': ['playwright>=1.65'],  # opens report pages in a Chromium of the system
    'torch': ['torch==2.13.0', 'peft>=0.18'],  # the references of the parity tests, CPU build
    'tpu_backend': ['libtpu'],  # compiles for TPUs on a machine without one
}

setup(
    name='palr_jax',
    version=VERSION,
    description='PALR in JAX: retrieval guided by user history, ranking by an LLM',
    long_description=(HERE / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.11',
    packages=find_packages(include=['palr_jax', 'palr_jax.*']),
    package_data={'palr_jax.evaluation': ['*.css'], 'palr_jax.prompts': ['templates/*/*.txt']},
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    classifiers=[
        'Development Status :: 3 - Alpha',
        'Intended Audience :: Science/Research',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
)
