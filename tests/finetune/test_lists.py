"""Training to rank: the loss against a naive one, its gradient, its batches and whole runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from palr_jax.data import Catalogue
from palr_jax.errors import InputError
from palr_jax.finetune.lists import Choice, ListBatches, encode_choice, lay_out, list_losses
from palr_jax.finetune.throughput import Work
from palr_jax.finetune.train import Program, choice_losses, loss_and_gradient, train
from palr_jax.llama import lora
from palr_jax.llama.lora import LoraSpec
from palr_jax.llama.model import apply_logits
from palr_jax.prompts.encode import Encoder
from palr_jax.prompts.tasks import Example
from palr_jax.prompts.template import load_template
from palr_jax.ranking.score import Query, plan_groups
from palr_jax.testing.llama import random_params, tiny_config, tiny_tokenizer

VOCABULARY = 37
MODEL = tiny_config(vocab_size=VOCABULARY)
SPEC = LoraSpec(4, 8.0, ('q', 'v'))
SETTINGS = {
    'steps': 8,
    'batch_size': 3,
    'length': 64,
    'max_shapes': 4,
    'learning_rate': 0.02,
    'warmup': 2,
    'decay_steps': 100,
    'weight_decay': 0.0,
    'clip_norm': 1.0,
    'checkpoint_every': 4,
    'profile_at': 0,
    'profile_steps': 3,
}


def draw_choices(number=7, seed=0):
    """Prompts of 5 to 20 tokens, 1 to 6 candidates of 1 to 5, one or two of them chosen."""
    rng = np.random.default_rng(seed)
    choices = []
    for i in range(number):
        count = 1 + i % 6
        query = Query(
            rng.integers(0, VOCABULARY, rng.integers(5, 21)).astype(np.int32),
            tuple(
                rng.integers(0, VOCABULARY, rng.integers(1, 6)).astype(np.int32)
                for _ in range(count)
            ),
        )
        targets = np.zeros(count, bool)
        targets[rng.permutation(count)[: 1 + (i % 2 and count > 2)]] = True
        choices.append(Choice(query, targets, rng.standard_normal(count).astype(np.float32)))
    return choices


@pytest.fixture(scope='module')
def base():
    return jax.tree.map(jnp.asarray, random_params(MODEL, seed=1))


@pytest.fixture(scope='module')
def adapter():
    rng = np.random.default_rng(3)
    fresh = lora.init_adapter(MODEL, SPEC, seed=0)
    return jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), fresh)


@functools.partial(jax.jit, static_argnames='length')
def all_logits(params, rows, length):
    return apply_logits(params, MODEL, rows[:, :length], lora=SPEC)


def naive_losses(params, choices, objective, temperature):
    """Every candidate behind its whole prompt in a row of its own, padded at the end."""
    pairs = [(choice.query.prompt, a) for choice in choices for a in choice.query.candidates]
    rows = np.zeros((len(pairs), 32), np.int32)
    for row, (prompt, answer) in zip(rows, pairs, strict=True):
        row[: len(prompt) + len(answer)] = [*prompt, *answer]
    each = jax.nn.log_softmax(all_logits(params, rows, 31))
    each = jnp.take_along_axis(each, rows[:, 1:, None], axis=2)[..., 0]
    scores = [
        jnp.sum(of_row[len(prompt) - 1 : len(prompt) + len(answer) - 1])
        for of_row, (prompt, answer) in zip(each, pairs, strict=True)
    ]
    losses = []
    for choice in choices:
        own = jnp.stack([scores.pop(0) for _ in choice.query.candidates])
        shares = choice.targets / choice.targets.sum()
        loss = -jnp.sum(shares * jax.nn.log_softmax(own / temperature + choice.offsets))
        if objective == 'both':
            lengths = np.array([len(answer) for answer in choice.query.candidates])
            loss -= jnp.sum(shares * own / lengths)
        losses.append(loss)
    return jnp.stack(losses)


def batch_of(choices, users=None):
    queries = [choice.query for choice in choices]
    ((_, shape),) = plan_groups(queries, users or len(choices), 16, 1, 512)
    return lay_out(choices, shape)


@pytest.mark.parametrize(('objective', 'temperature'), [('listwise', 1.0), ('both', 5.0)])
def test_losses_and_gradients_are_the_naive_ones(base, adapter, objective, temperature):
    """The gradient of the mean over lists, to 1e-5; two rows of the batch are padding."""
    choices = draw_choices(4)
    program = Program(MODEL, SPEC, jnp.float32, objective=objective, temperature=temperature)
    lists = batch_of(choices, users=6)
    assert lists.weights.tolist() == [1, 1, 1, 1, 0, 0]
    params = lora.join(adapter, base)
    naive = functools.partial(
        naive_losses, choices=choices, objective=objective, temperature=temperature
    )
    expected = np.asarray(naive(params))
    found = jax.jit(functools.partial(list_losses, program=program))(params, lists)
    np.testing.assert_allclose(found[:4], expected, rtol=1e-5, atol=1e-5)

    def mean(adapter):
        return naive(lora.join(adapter, base)).mean()

    loss, gradient = jax.jit(functools.partial(loss_and_gradient, program=program))(
        adapter, base, lists
    )
    assert loss == pytest.approx(np.mean(expected), rel=1e-5)
    for ours, theirs in zip(
        jax.tree.leaves(gradient), jax.tree.leaves(jax.jit(jax.grad(mean))(adapter)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_single_candidate_teaches_nothing_listwise(base, adapter):
    (choice,) = draw_choices(1)
    assert len(choice.targets) == 1
    program = Program(MODEL, SPEC, jnp.float32, objective='listwise')
    loss, gradient = loss_and_gradient(adapter, base, batch_of([choice]), program)
    assert loss == 0
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_parts_of_a_batch_have_the_gradient_of_the_whole(base, adapter):
    lists = batch_of(draw_choices(4))
    programs = [
        Program(MODEL, SPEC, jnp.float32, parts=parts, objective='listwise') for parts in (1, 2)
    ]
    whole, parted = (
        jax.jit(functools.partial(loss_and_gradient, program=program))(adapter, base, lists)
        for program in programs
    )
    for ours, theirs in zip(jax.tree.leaves(parted), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_an_epoch_holds_every_list_and_batches_are_a_function_of_seed_and_step():
    choices = draw_choices(12)
    longer, shorter = (ListBatches(choices, 3, steps, 0, 4, 512) for steps in (20, 6))
    for step in range(6):
        for a, b in zip(jax.tree.leaves(longer[step]), jax.tree.leaves(shorter[step]), strict=True):
            np.testing.assert_array_equal(a, b)
    prompts = {choice.query.prompt.tobytes() for choice in choices}
    seen = set()
    for step in range(len(ListBatches(choices, 3, 6, 0, 4, 512))):
        batch = longer[step].batch
        L = batch.prompt.shape[1]
        seen |= {row[:L][mask].tobytes() for row, mask in zip(batch.tokens, batch.prompt)}
    # Behind a prompt may stand what all its answers begin with.
    assert len(seen) == len(prompts)
    assert all(any(row.startswith(prompt) for row in seen) for prompt in prompts)
    other = ListBatches(choices, 3, 6, 1, 4, 512)
    assert any(
        longer[step].batch.tokens.tobytes() != other[step].batch.tokens.tobytes()
        for step in range(6)
    )


def test_no_list_is_refused():
    with pytest.raises(InputError, match='no list to learn from'):
        ListBatches([], 3, 6, 0, 4, 512)


def test_the_work_of_a_batch_by_hand():
    """Prompts of 3 and 2; answers of 3 and 1, and of 2: inputs 2 + 0, and 1; one is padding."""
    tokens = np.arange(9, dtype=np.int32)
    choices = [
        Choice(Query(tokens[:3], (tokens[:3], tokens[3:4])), np.array([True, False]), np.zeros(2)),
        Choice(Query(tokens[:2], (tokens[5:7],)), np.array([True]), np.zeros(1)),
    ]
    work = Work.of(batch_of(choices, users=3))
    assert work.tokens == 3 + 2 + 2 + 1
    assert work.scored == 3 + 2  # three answer inputs, and the last token of each prompt
    assert work.pairs == 6 + (4 + 5) + 3 + 3


def test_a_run_learns_the_choice_and_resumes_to_the_same_bits(base, tmp_path):
    """The chosen candidate always begins with token 1, which is there to be learned."""
    choices = []
    for choice in draw_choices(12, seed=4):
        if len(choice.targets) < 2:
            continue
        targets = np.arange(len(choice.targets)) == 1
        first = [1 if chosen else 2 for chosen in targets]
        answers = tuple(np.append(f, a) for f, a in zip(first, choice.query.candidates))
        answers = tuple(answer.astype(np.int32) for answer in answers)
        choices.append(Choice(Query(choice.query.prompt, answers), targets, choice.offsets))
    program = Program(MODEL, SPEC, jnp.float32, objective='listwise')
    config = ConfigDict(SETTINGS)
    fresh = lora.join(lora.init_adapter(MODEL, SPEC, 0), base)
    before = choice_losses(fresh, program, choices)
    trained = train(base, program, choices, config, seed=0, workdir=tmp_path / 'whole')
    after = choice_losses(lora.join(trained, base), program, choices)
    assert after.mean() < 0.75 * before.mean()
    alone = choice_losses(fresh, program, choices[2:3])
    np.testing.assert_allclose(alone, before[2:3], rtol=1e-5)

    config.steps = 4
    train(base, program, choices, config, seed=0, workdir=tmp_path / 'pieces')
    config.steps = 8
    again = train(base, program, choices, config, seed=0, workdir=tmp_path / 'pieces')
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(trained), strict=True):
        np.testing.assert_array_equal(a, b)


def test_c07_probabilities_are_normalised_once(monkeypatch):
    """C07: of (.05, .001) the first has .980, of (.6, .3) .667: their order is not turned round."""
    logs = jnp.log(jnp.array([[0.05, 0.001], [0.6, 0.3]]))
    monkeypatch.setattr('palr_jax.finetune.lists.one_pass_scores', lambda *_, **__: logs)
    lists = batch_of([draw_choices(2)[1]] * 2)
    assert lists.filled.all()
    nothing = np.zeros((2, 2), np.float32)
    lists = lists.replace(targets=np.array([[1.0, 0.0]] * 2, np.float32), offsets=nothing)
    losses = list_losses({}, lists, Program(MODEL, SPEC, jnp.float32, objective='listwise'))
    np.testing.assert_allclose(np.exp(-losses), [0.0500 / 0.051, 0.6 / 0.9], rtol=1e-6)


def test_offsets_are_the_standardised_scores_of_the_retriever():
    """Of scores 1, 2, 3: mean 2, standard deviation sqrt(2/3); in the order listed."""
    titles = ('', 'Heat (1995)', 'Alien (1979)', 'Fargo (1996)')
    tokenizer = tiny_tokenizer(titles)
    catalogue = Catalogue(('', *'abc'), titles, (None,) * 4, ((),) * 4)
    encoder = Encoder(catalogue, tokenizer, load_template('movies'), 'plain', 400)
    example = Example(7, 'recommend_retrieval', (1,), (1,), (3, 2, 1), (2,), (3.0, 1.0, 2.0))
    found = encode_choice(example, encoder, (), 400, retriever_weight=2.0)
    unit = 1.5**0.5
    np.testing.assert_allclose(found.offsets, [2 * unit, -2 * unit, 0], atol=1e-6)
    assert found.targets.tolist() == [False, True, False]
    assert found.query.name == 'A list of dense user 7'
    assert not encode_choice(example, encoder, (), 400).offsets.any()
