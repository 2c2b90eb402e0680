"""How far the rankings of bfloat16, int8 and nf4 are from those of float32, for the base model.

    python -m palr_jax.main --config=configs/demo.py --workdir=runs/demo
    python benchmarks/quantization_fidelity.py --config=configs/demo.py --workdir=runs/demo \
        --scores=runs/quantization

The candidates are those that the run's retriever found. Scores are kept in `--scores`; the same
command again continues. What is compared, a mean over users each:

- KL: from the float32 model's distribution over a user's candidates (the softmax of their
  log-likelihoods) to the other's, in nats.
- Top-10 overlap: share of the ten best candidates that are among the other's ten best.
- Kendall's tau (b) between the two orders of all candidates.
- NDCG@10 minus that of float32, with a 95 % bootstrap interval.

The last three use the scores that rank: normalised as `ranking.normalize` says.
"""

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags
from scipy.special import log_softmax
from scipy.stats import kendalltau

from palr_jax import cli, storage
from palr_jax.config import validate
from palr_jax.evaluation import rank_targets
from palr_jax.evaluation.metrics import ndcg
from palr_jax.evaluation.statistics import paired_bootstrap_interval
from palr_jax.llm_input import make_queries
from palr_jax.project import Project
from palr_jax.ranking.score import make_scorer
from palr_jax.ranking.users import Scores, score_users
from palr_jax.stages import config_part

CONFIG = config_flags.DEFINE_config_file('config', None, 'The config file, configs/NAME.py.')
WORKDIR = flags.DEFINE_string('workdir', None, 'A run whose stages data and retrieval are done.')
SCORES = flags.DEFINE_string('scores', None, 'Folder that keeps the scores.')
OUT = flags.DEFINE_string('out', 'docs/results', 'Folder of the result.')
USERS = flags.DEFINE_integer('users', 100, 'Seeded sample of test users; 0 is all.', lower_bound=0)

# model.dtype and model.quantize; activations have the dtype.
SYSTEMS = {
    'float32': ('float32', 'none'),
    'bfloat16': ('bfloat16', 'none'),
    'int8': ('bfloat16', 'int8'),
    'nf4': ('bfloat16', 'nf4'),
}
REFERENCE = 'float32'
BEST = 10


def score(project: Project, name: str, queries) -> tuple[Scores, int]:
    """What one system says of every candidate, and the bytes of its parameters."""
    config, model = project.config, project.checkpoint
    users, items, prompts = queries
    shown = [prompt.prompt.tolist() for prompt in prompts]
    identity = [model.fingerprint, config_part(config, 'ranking'), items.tolist(), shown]
    scores = score_users(
        name,
        users,
        items,
        prompts,
        project.encoder,
        make_scorer(model.config, None, jnp.dtype(config.model.dtype)),
        project.base,
        config.ranking,
        max_positions=model.config.max_positions,
        path=epath.Path(SCORES.value) / f'{name}.npz',
        identity=hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
    )
    return scores, sum(leaf.nbytes for leaf in jax.tree.leaves(project.base))


def compare(
    scores: Scores, reference: Scores, targets: np.ndarray, config: ConfigDict
) -> dict[str, float | list[float]]:
    """The distances of a system from the reference, by name; targets [U'] are item ids."""
    filled = reference.items >= 0
    ours, theirs = (s.normalized(config.ranking.normalize) for s in (scores, reference))
    divergences, overlaps, taus = [], [], []
    for row, mask in enumerate(filled):
        of_system, of_reference = (
            log_softmax(s.sums[row, mask].astype(np.float64)) for s in (scores, reference)
        )
        divergences.append(np.exp(of_reference) @ (of_reference - of_system))
        best = [set(np.argsort(-s[row], kind='stable')[:BEST].tolist()) for s in (ours, theirs)]
        overlaps.append(len(best[0] & best[1]) / BEST)
        taus.append(kendalltau(ours[row, mask], theirs[row, mask]).statistic)
    gains = [ndcg(rank_targets(reference.items, s, targets), BEST) for s in (ours, theirs)]
    interval = paired_bootstrap_interval(
        *gains, resamples=config.evaluation.resamples, seed=config.seed
    )
    return {
        'kl': float(np.mean(divergences)),
        'top10_overlap': float(np.mean(overlaps)),
        'kendall_tau': float(np.mean(taus)),
        'ndcg10': float(gains[0].mean()),
        'ndcg10_difference': float(np.mean(gains[0] - gains[1])),
        'ndcg10_difference_95': [float(end) for end in interval],
    }


def markdown(systems: dict[str, dict]) -> str:
    """The distances as a table."""
    head = ['base', 'MB', 'KL, nats', 'top-10 overlap', "Kendall's tau", 'NDCG@10', 'difference']
    lines = [f'| {" | ".join(head)} |', '| --- ' + '| ---: ' * (len(head) - 1) + '|']
    for name, row in systems.items():
        low, high = row['ndcg10_difference_95']
        lines.append(
            f'| {name} | {row["parameter_bytes"] / 1e6:.0f} | {row["kl"]:.2g} '
            f'| {row["top10_overlap"]:.3f} | {row["kendall_tau"]:.3f} | {row["ndcg10"]:.4f} '
            f'| {row["ndcg10_difference"]:+.4f} ({low:+.4f} to {high:+.4f}) |'
        )
    return '\n'.join(lines)


def main(_: list[str]) -> None:
    config = CONFIG.value
    config.ranking.users = USERS.value
    found, sizes = {}, {}
    queries = targets = None
    for name, (dtype, quantize) in SYSTEMS.items():
        config.model.dtype, config.model.quantize = dtype, quantize
        validate(config)
        project = Project(config, WORKDIR.value)
        if queries is None:
            queries = make_queries(project, 'test')
            targets = project.dataset.split.targets('test')[queries[0]]
        with jax.default_matmul_precision(config.model.matmul_precision):
            found[name], sizes[name] = score(project, name, queries)
    systems = {
        name: {'parameter_bytes': sizes[name]} | compare(scores, found[REFERENCE], targets, config)
        for name, scores in found.items()
    }
    record = project.dataset.record
    storage.write_json(
        epath.Path(OUT.value) / 'quantization_fidelity.json',
        {
            'schema': 1,
            'dataset': record['name'],
            'model': config.model.path,
            'users': len(queries[0]),
            'candidates': config.ranking.candidates,
            'history': config.prompts.history,
            'normalize': config.ranking.normalize,
            'device': jax.devices()[0].device_kind,
            'jax': jax.__version__,
            'systems': systems,
        },
    )
    print(markdown(systems))


if __name__ == '__main__':
    flags.mark_flags_as_required(['config', 'workdir', 'scores'])
    cli.run(main)
