"""Nothing that a model learns from or reads depends on what comes after it, through every stage.

The log after the k-core gets other items where a part of it must not be known. Everything that the
stages make of it is compared: the trained retriever, popularity, candidates, profiles, fine-tuning
examples with their negatives, ranking prompts. All of it must be the same to the bit.
"""

import dataclasses

import numpy as np
import pytest

from palr_jax import llm_input, pipeline, retrieval
from palr_jax.config import default_config
from palr_jax.data import Dataset, load, make_split
from palr_jax.project import Project
from palr_jax.prompts.tasks import split_users
from palr_jax.testing import write_ml100k
from palr_jax.testing.llama import random_params, tiny_config, tiny_tokenizer, write_hf_folder

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def inputs(tmp_path_factory):
    """(config, source): made-up ratings whose users come and go at different times."""
    folder = tmp_path_factory.mktemp('inputs')
    write_ml100k(folder / 'ml-100k', users=40, items=60, seed=0)
    tokenizer = tiny_tokenizer([(folder / 'ml-100k' / 'u.item').read_text('latin-1')])
    model = tiny_config(vocab_size=tokenizer.size, max_positions=1024)
    write_hf_folder(folder / 'model', model, random_params(model, 0), tokenizer)
    config = default_config()
    config.data.path, config.model.path = str(folder / 'ml-100k'), str(folder / 'model')
    config.data.valid_share = config.data.test_share = 0.15
    config.retrieval.width = 8
    # One validation: with more of them the best one decides, which is what validation is for.
    config.retrieval.epochs = config.retrieval.evaluate_every = 2
    config.retrieval.index = 'exact'
    config.retrieval.candidates = config.ranking.candidates = 12
    config.ranking.valid_users = 0
    config.tasks.users = 0.5
    config.tasks.candidates, config.tasks.targets = 8, 3
    source = load(config.data)
    events = source.interactions
    first = np.searchsorted(events.users, np.arange(len(events.user_ids)))
    starts = np.random.default_rng(1).integers(40, size=len(first))
    times = starts[events.users] + np.arange(len(events.users)) - first[events.users]
    events = dataclasses.replace(events, times=times)
    return config, dataclasses.replace(source, interactions=events)


@pytest.fixture(autouse=True)
def made_up_scores(monkeypatch):
    """The LLM's sums hang on every token of prompt and answer: whatever a prompt sees, shows."""

    def scores(_, queries):
        for i, query in enumerate(queries):
            seeds = [[*query.prompt.tolist(), *answer.tolist()] for answer in query.candidates]
            sums = [-np.random.default_rng(seed).random() for seed in seeds]
            yield np.array([i]), np.array([sums])

    monkeypatch.setattr(Project, 'base_scores', scores)


def made(config, source, split, folder, parts):
    """Everything that the stages make of a split, up to the prompts of `parts`."""
    project = Project(config, folder)
    project.dataset = Dataset(source.catalogue, split, source.interactions.user_ids, {})
    pipeline.retrieve_candidates(project)
    ours, _ = split_users(split, config.tasks.users, config.seed)
    examples = llm_input.training_examples(project, ours)
    tokens = llm_input.encode_examples(project, examples)
    found = {
        'item vectors': retrieval.load_mix(folder / 'retrieval').item_vectors.tolist(),
        'popularity': retrieval.fit_popularity(split, source.catalogue.items).counts.tolist(),
        'examples': examples,
        'profiles of examples': llm_input.example_profiles(project, examples),
        'fine-tuning': [(e.user, t.answer, t.tokens.tolist()) for e, t in zip(examples, tokens)],
    }
    for part in parts:
        for system in ('popularity', 'retriever'):
            candidates = retrieval.read_candidates(folder / 'retrieval', system, part)
            found[f'{system}, {part}'] = candidates.users.tolist(), candidates.items.tolist()
        users, items, queries = llm_input.make_queries(project, part)
        prompts = [query.prompt.tolist() for query in queries]
        found[f'ranking, {part}'] = users.tolist(), items.tolist(), prompts
    return found


@pytest.mark.parametrize('profile', ['counts', 'llm'])
@pytest.mark.parametrize('kind', ['leave_one_out', 'temporal'])
@pytest.mark.parametrize('unknown', ['test', 'valid'])
def test_k_what_comes_later_changes_nothing(inputs, tmp_path, kind, profile, unknown):
    """K01, K03: other items from the test target on, and from the validation target on."""
    config, source = inputs
    config = config.copy_and_resolve_references()
    config.prompts.profile = profile
    events = source.interactions
    split = make_split(events, kind, config.data.valid_share, config.data.test_share)
    if kind == 'temporal':
        late = events.times >= split.cuts[('valid', 'test').index(unknown)]
        assert (split.train_end == 0).any()  # users who came after the cut
    else:
        at = split.test_at if unknown == 'test' else split.valid_at
        position = np.arange(len(events.users)) - split.offsets[events.users]
        late = position >= at[events.users]
    assert late.sum() >= 40
    items = events.items.copy()
    items[late] = np.random.default_rng(2).integers(1, source.catalogue.items + 1, late.sum())
    assert (items != events.items)[late].mean() > 0.9
    other = dataclasses.replace(split, items=items)
    parts = ('valid', 'test') if unknown == 'test' else ('valid',)
    expected = made(config, source, split, tmp_path / 'a', parts)
    found = made(config, source, other, tmp_path / 'b', parts)
    assert len(expected['examples']) > 20
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name] == expected[name], name
