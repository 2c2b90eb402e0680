"""How many tokens each part of a prompt has, for a data set and a tokenizer.

    python benchmarks/prompt_tokens.py --name=ml1m --config=configs/base.py \
        --config.data.source=ml1m --config.data.path=ml-1m.zip

Nothing is cut here; the last column says how many prompts with their answers are longer than
`prompts.length`. Ranking prompts list the most popular items that the user has not had, as no
retriever is trained; the answer is one of these. Profiles are counted ones.
"""

import numpy as np
from absl import flags
from etils import epath
from ml_collections import config_flags

from palr_jax import cli, storage
from palr_jax.config import validate
from palr_jax.finetune.input import example_prompt
from palr_jax.llm_input import training_examples
from palr_jax.project import Project, order_seed, sample_users
from palr_jax.prompts import count_profile, split_users
from palr_jax.prompts.llm_profile import ask
from palr_jax.prompts.show import open_project
from palr_jax.ranking.users import ranking_prompt
from palr_jax.retrieval import fit_popularity

CONFIG = config_flags.DEFINE_config_file('config', None, 'The config file, configs/NAME.py.')
NAME = flags.DEFINE_string('name', None, 'Of the result, prompt_tokens_NAME.json.')
OUT = flags.DEFINE_string('out', 'docs/results', 'Folder of the result.')
USERS = flags.DEFINE_integer('users', 1000, 'Seeded sample; 0 is all.', lower_bound=0)

PARTS = ('wording', 'history', 'profile', 'candidates', 'answer')
UNCUT = 2**20  # tokens

Counts = dict[str, int]


def counts(prompt, answer: float) -> Counts:
    """Tokens of each part."""
    spans = {name: end - start for name, (start, end) in prompt.spans.items()}
    wording = len(prompt.tokens) - sum(spans.values())
    return {part: spans.get(part, 0) for part in PARTS} | {'wording': wording, 'answer': answer}


def training(project: Project, users: np.ndarray) -> dict[str, list[Counts]]:
    """Of the fine-tuning examples, by their task."""
    found: dict[str, list[Counts]] = {'recommend': [], 'recommend_retrieval': []}
    keywords = project.dataset.catalogue.keywords
    for example in training_examples(project, users):
        profile = count_profile(example.past, keywords)
        prompt, answer = example_prompt(example, project.encoder, profile, UNCUT)
        found[example.task].append(counts(prompt, len(answer)))
    return {f'{task}, fine-tuning': rows for task, rows in found.items()}


def ranking(project: Project, users: np.ndarray) -> dict[str, list[Counts]]:
    """Of the test prompts, and of the questions for their profiles."""
    config, split, encoder = project.config, project.dataset.split, project.encoder
    catalogue = project.dataset.catalogue
    popular = np.argsort(-fit_popularity(split, catalogue.items).counts, kind='stable') + 1
    ranked, asked = [], []
    for user in users:
        history = split.history(user, 'test')
        items = popular[~np.isin(popular, history)][: config.ranking.candidates]
        profile = count_profile(history.tolist(), catalogue.keywords)
        seed = order_seed(config, user)
        prompt, listed = ranking_prompt(encoder, config.prompts, history, profile, items, seed)
        replies = encoder.replies(items.tolist(), listed)
        ranked.append(counts(prompt, np.mean(list(map(len, replies)))))
        shown = history[-config.prompts.profile_history :].tolist()
        answer = sum(len(encoder.keyword(keyword, last=False)) for keyword in profile)
        if ask(shown, encoder, len(shown)).keywords:
            asked.append(counts(encoder.prompt('profile', shown), answer))
    return {'recommend_retrieval, ranking': ranked, 'profile by the LLM': asked}


def summary(rows: list[Counts], limit: int) -> dict[str, float]:
    """Means of the parts and of the whole, the longest whole, the share over the limit."""
    table = np.array([[row[part] for part in PARTS] for row in rows], float)
    whole = table.sum(axis=1)
    means = {part: round(float(mean), 1) for part, mean in zip(PARTS, table.mean(axis=0))}
    return means | {
        'all': round(float(whole.mean()), 1),
        'longest': int(whole.max()),
        'over_limit': round(float((whole > limit).mean()), 4),
        'prompts': len(rows),
    }


def markdown(found: dict[str, dict[str, float]], limit: int) -> str:
    """The means as a table."""
    head = ['prompt', *PARTS, 'all', 'longest', f'over {limit:,}']
    lines = [f'| {" | ".join(head)} |', '| --- ' + '| ---: ' * (len(head) - 1) + '|']
    for name, row in found.items():
        cells = [f'{row[part]:,.0f}' for part in (*PARTS, 'all', 'longest')]
        lines.append(f'| {name} | {" | ".join(cells)} | {row["over_limit"]:.1%} |')
    return '\n'.join(lines)


def main(_: list[str]) -> None:
    config = CONFIG.value
    validate(config)
    limit, config.prompts.length = config.prompts.length, UNCUT
    project = open_project(config, None)
    split, record = project.dataset.split, project.dataset.record
    ours = sample_users(split_users(split, config.tasks.users, config.seed)[0], USERS.value, 0)
    users = sample_users(split.users('test'), USERS.value, 0)
    rows = training(project, ours) | ranking(project, users)
    found = {name: summary(of_kind, limit) for name, of_kind in rows.items() if of_kind}
    prompts = config.prompts
    storage.write_json(
        epath.Path(OUT.value) / f'prompt_tokens_{NAME.value}.json',
        {
            'schema': 1,
            'dataset': {key: record[key] for key in ('name', 'users', 'items', 'interactions')},
            'model': config.model.path,
            'prompts': {
                key: prompts[key] for key in ('template', 'style', 'history', 'item', 'answer')
            },
            'limit': limit,
            'users': {'fine-tuning': len(ours), 'ranking': len(users)},
            'mean_tokens': found,
        },
    )
    print(markdown(found, limit))


if __name__ == '__main__':
    flags.mark_flags_as_required(['config', 'name'])
    cli.run(main)
