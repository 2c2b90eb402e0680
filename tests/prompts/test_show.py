"""What `python -m palr_jax.prompts` prints, and with it the way from raw files to a prompt."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest

from palr_jax import llm_input, pipeline, storage
from palr_jax.config import default_config
from palr_jax.errors import InputError
from palr_jax.project import Project
from palr_jax.prompts.show import find_user, open_project, render, show_example, show_query
from palr_jax.ranking.users import Scores
from palr_jax.retrieval import Candidates, save_candidates
from palr_jax.stages import Ledger
from palr_jax.testing import write_amazon, write_ml100k
from palr_jax.testing.llama import random_params, tiny_config, tiny_tokenizer, write_hf_folder

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.fixture(scope='module')
def inputs(tmp_path_factory):
    """Made-up films, made-up products and a tiny model."""
    folder = tmp_path_factory.mktemp('inputs')
    write_ml100k(folder / 'ml-100k')
    write_amazon(folder / 'amazon')
    texts = (folder / 'ml-100k' / 'u.item').read_bytes().decode('latin-1')
    tokenizer = tiny_tokenizer([texts])
    tiny = tiny_config(vocab_size=tokenizer.size, max_positions=4096)
    write_hf_folder(folder / 'model', tiny, random_params(tiny, 0), tokenizer)
    return folder


def config_of(inputs, source='ml100k', **prompts):
    config = default_config()
    config.data.source = source
    config.data.path = str(inputs / {'ml100k': 'ml-100k'}.get(source, source))
    config.model.path = str(inputs / 'model')
    config.prompts.length = 4096
    config.finetune.length = 4096
    config.tasks.candidates = 12
    config.tasks.targets = 3
    for field, value in prompts.items():
        config.prompts[field] = value
    return config


def find(tokens, piece):
    return [i for i in range(len(tokens)) if np.array_equal(tokens[i : i + len(piece)], piece)]


def rows_of(text):
    """The counts of the table, by the part."""
    lines = text[text.index('\npart ') :].splitlines()[2:8]
    return {line.split()[0]: int(line.split()[1].replace(',', '')) for line in lines}


def with_retrieval(config, workdir, candidates):
    """A run whose retriever found `candidates` for everybody."""
    ledger = Ledger(config, workdir, overwrite=False)
    pipeline.prepare_data(Project(config, workdir))
    for stage in ('data', 'retrieval'):
        inputs = ledger.inputs(stage)
        if stage == 'retrieval':
            users = Project(config, workdir).dataset.split.users('test')
            for part in ('valid', 'test'):
                items = np.tile(np.array([*candidates, -1], np.int32), (len(users), 1))
                found = Candidates(users, items, np.zeros(items.shape, np.float32))
                save_candidates(workdir / 'retrieval', 'retriever', part, found)
        ledger.finish(stage, inputs, ledger.begin(stage, inputs))
    return open_project(config, workdir)


@pytest.mark.parametrize('profile', ['none', 'counts'])
def test_counts_add_up_and_the_text_is_what_the_model_reads(inputs, profile):
    project = open_project(config_of(inputs, history=5, profile=profile), None)
    for user in range(8):
        for part in ('valid', 'test'):
            shown = show_query(project, user, part, None)
            text = render(shown, project)
            rows = rows_of(text)
            assert rows['prompt'] == len(shown.prompt.tokens)
            assert rows['prompt'] == sum(
                rows[part] for part in ('wording', 'history', 'profile', 'candidates')
            )
            assert rows['answer'] == len(project.encoder.reply(shown.targets[0]))
            assert (rows['profile'] > 0) == (profile == 'counts')
            tokens = [*shown.prompt.tokens, *shown.answer]
            assert text.startswith(project.checkpoint.tokenizer.decode(tokens) + '\n\n---')
            n = len(project.dataset.split.history(user, part))
            assert f'the last 5 of {n} items: {n - 5} are beyond prompts.history, 0 were' in text


def test_what_was_cut_is_said(inputs):
    project = open_project(config_of(inputs), None)
    whole = show_query(project, 0, 'test', None)
    project = open_project(config_of(inputs, length=len(whole.prompt.tokens) - 1), None)
    shown = show_query(project, 0, 'test', None)
    assert shown.prompt.history_cut == 1
    assert '1 were cut to keep to the length' in render(shown, project)


@pytest.mark.parametrize('task', ['recommend', 'recommend_retrieval'])
def test_a_fine_tuning_example_is_the_one_that_is_learned(inputs, task):
    project = open_project(config_of(inputs), None)
    split = project.dataset.split
    examples = llm_input.training_examples(project, range(len(split.train_end)))
    example = next(e for e in examples if e.task == task)
    shown = show_example(project, example.user, task, 1)
    assert shown.targets == example.targets
    assert shown.answer.tolist() == project.encoder.answer(example.targets).tolist()
    tokens = llm_input.encode_examples(project, [example])
    assert any(
        np.array_equal(t.tokens, np.concatenate([shown.prompt.tokens, shown.answer]))
        for t in tokens
    )
    text = render(shown, project)
    for target in example.targets:
        place = [f'{i + 1} of 12' for i, c in enumerate(example.candidates) if c == target]
        line = next(x for x in text.splitlines() if f'item {raw(project, target)}: ' in x)
        assert line.endswith(f'{place[0]} candidates' if place else 'nowhere in the prompt')


def raw(project, item):
    return project.dataset.catalogue.raw_ids[item]


def test_the_candidates_of_a_run_are_those_that_were_retrieved(inputs, tmp_path):
    config = config_of(inputs)
    project = with_retrieval(config, tmp_path, [7, 3, 9])
    users = project.dataset.split.users('test')
    target = project.dataset.split.target(users[0], 'test')
    for task, listed in ((None, [3, 7, 9]), ('recommend', [])):
        shown = show_query(project, users[0], 'test', task)
        assert sorted(shown.candidates) == listed
        assert ('retrieved' in render(shown, project)) == bool(listed)
    of_run = llm_input.make_queries(project, 'test')[2][0].prompt
    assert of_run.tolist() == show_query(project, users[0], 'test', None).prompt.tokens.tolist()
    project = with_retrieval(config, tmp_path / 'found', [7, target, 9])
    shown = show_query(project, users[0], 'test', None)
    place = shown.candidates.index(target) + 1
    assert f'item {raw(project, target)}: {place} of 3 candidates' in render(shown, project)


def test_without_a_run_a_training_example_lends_what_the_user_has_not_had(inputs):
    project = open_project(config_of(inputs), None)
    for user in range(8):
        shown = show_query(project, user, 'test', None)
        assert shown.candidates
        assert not set(shown.candidates) & set(shown.history)
        assert 'of a training example, as nothing' in render(shown, project)


def test_training_lists_that_are_retrieved_are_shown_of_a_run_alone(inputs, tmp_path):
    config = config_of(inputs)
    config.tasks.update({'candidates_from': 'retriever', 'recommend_retrieval': 1.0})
    config.tasks.update({'candidates': 3, 'targets': 10})
    project = open_project(config, None)
    assert 'of a training example' in render(show_query(project, 0, 'test', None), project)
    project = open_project(config, tmp_path)
    examples = llm_input.drawn_examples(project, [0])
    for without in (open_project(config, None), project):
        with pytest.raises(
            InputError, match=r"from is 'retriever': fine-tuning .*: --workdir of a"
        ):
            show_example(without, 0, None, 1)
    cuts = np.array([len(example.past) for example in examples])
    coming = project.dataset.split.train(0)[cuts]
    items = np.stack([coming, np.full(len(cuts), -1)], axis=1)
    storage.write_arrays(
        tmp_path / 'finetune' / 'candidates.npz',
        users=np.zeros(len(cuts), int),
        cuts=cuts,
        items=items,
        scores=np.zeros(items.shape, np.float32),
    )
    shown = show_example(project, 0, None, 1)
    assert shown.candidates == shown.targets == (coming[0],)
    assert '1 item: retrieved without the user' in render(shown, project)
    raw_id = project.dataset.user_ids[30]
    assert raw_id != '30'
    with pytest.raises(InputError, match=f'the user {raw_id} is not in it'):
        show_example(project, 30, None, 1)


@pytest.mark.parametrize('answer', ['title', 'id_title'])
def test_k03_the_target_stands_in_the_candidates_alone(inputs, tmp_path, answer):
    """K03: by item id and segment, of every user; titles repeat among these products."""
    config = config_of(inputs, 'amazon', template='products', item='id_title', answer=answer)
    project = with_retrieval(config, tmp_path, range(1, 31))
    split, encoder = project.dataset.split, project.encoder
    found = 0
    for user in split.users('test'):
        shown = show_query(project, user, 'test', None)
        target = split.target(user, 'test')
        places = find(shown.prompt.tokens, encoder.item(target))
        start, end = shown.prompt.spans['candidates']
        assert len(places) == (1 <= target <= 30)
        assert all(start <= place < end for place in places)
        found += len(places)
    assert 5 < found < len(split.users('test'))


def test_d03_twins_stay_two_lines(inputs, tmp_path):
    """D03: two products with one title are told apart by their ids, wherever they stand."""
    config = config_of(inputs, 'amazon', template='products', item='id_title')
    project = open_project(config, None)
    titles = project.dataset.catalogue.titles
    twins = [i for i in range(1, len(titles)) if titles.count(titles[i]) > 1][:2]
    assert titles[twins[0]] == titles[twins[1]]
    project = with_retrieval(config, tmp_path, twins)
    shown = show_query(project, 0, 'test', None)
    listed = shown.prompt.tokens[slice(*shown.prompt.spans['candidates'])]
    lines = project.checkpoint.tokenizer.decode(listed).splitlines()
    assert sorted(lines) == sorted(project.encoder.item_text(item) for item in twins)
    assert len(set(lines)) == 2


@pytest.mark.parametrize('answer', ['title', 'id_title'])
def test_what_is_scored_is_the_answer_and_not_what_the_prompt_shows(inputs, tmp_path, answer):
    config = config_of(inputs, 'amazon', template='products', item='id_title', answer=answer)
    project = with_retrieval(config, tmp_path, [7, 3, 9])
    users, items, queries = llm_input.make_queries(project, 'test')
    scores = Scores.of_queries(items, queries, project.encoder, users=users)
    catalogue, decode = project.dataset.catalogue, project.checkpoint.tokenizer.decode
    for c, item in enumerate([7, 3, 9]):
        title = ' '.join(catalogue.titles[item].split()).replace('"', "'")
        text = f'"{title}"' if answer == 'title' else f'"{catalogue.raw_ids[item]} ({title})"'
        assert {decode(query.candidates[c]) for query in queries} == {text}
        assert set(scores.bytes[:, c]) == {len(text.encode())}


def test_another_config_than_the_runs_is_refused(inputs, tmp_path):
    with_retrieval(config_of(inputs), tmp_path, [7, 3, 9])
    config = config_of(inputs)
    config.data.k_core = 4
    with pytest.raises(InputError, match=r'stage data was run with another config\.data; allowed'):
        open_project(config, tmp_path)
    config = config_of(inputs, history=3)  # other prompts of the same run may be looked at
    assert show_query(open_project(config, tmp_path), 0, 'test', None).most == 3


def test_users_and_examples_that_do_not_exist_are_named(inputs):
    project = open_project(config_of(inputs), None)
    with pytest.raises(
        InputError, match=r'--user=4711 is not among the 40 users .* are 1, 2, 3, …'
    ):
        find_user(project.dataset.user_ids, '4711')
    with pytest.raises(InputError, match=r'--example=5: user 1 has \d fine-tuning examples, from'):
        show_example(project, 0, None, 5)


@pytest.mark.slow
def test_the_command(inputs, tmp_path):
    config = tmp_path / 'config.py'
    config.write_text(
        'from palr_jax.config import default_config\n\n\ndef get_config():\n'
        '    config = default_config()\n'
        f'    config.data.path = {str(inputs / "ml-100k")!r}\n'
        f'    config.model.path = {str(inputs / "model")!r}\n'
        '    config.prompts.length = 4096\n    config.finetune.length = 4096\n'
        '    return config\n'
    )

    def run(*arguments):
        return subprocess.run(
            [sys.executable, '-m', 'palr_jax.prompts', f'--config={config}', *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    done = run('--user=7', '--part=valid')
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('<|endoftext|><|im_start|>user\nRecommend 10 other movies')
    assert '\n--- user 7, valid, recommend_retrieval\n' in done.stdout
    done = run('--user=nobody')
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
    assert len(errors) == 1
    assert 'Traceback' not in done.stderr
