"""Training rows: the loss sees the answer and nothing else; the order is a function of the step."""

import numpy as np
import pytest

from palr_jax.data import Catalogue
from palr_jax.errors import InputError
from palr_jax.finetune.input import (
    GroupedRows,
    PackedRows,
    Rows,
    Tokens,
    answer_room,
    batches,
    encode_example,
    lay_out,
    pack_epoch,
    plan_steps,
    stack,
)
from palr_jax.prompts import Encoder, Example, load_template
from palr_jax.testing.llama import tiny_tokenizer

TITLES = ('Heat (1995)', 'Alien (1979)', 'Aliens (1986)', 'M (1931)', 'Misérables, Les (1995)')
KEYWORDS = (('Crime',), ('Horror',), ('Action',), ('Film-Noir',), ('Drama',))


@pytest.fixture(scope='module')
def tokenizer():
    return tiny_tokenizer(TITLES, vocab_size=300)


def make_encoder(tokenizer, template='movies', length=4096):
    catalogue = Catalogue(tuple('012345'), ('', *TITLES), (None,) * 6, ((), *KEYWORDS))
    return Encoder(catalogue, tokenizer, load_template(template), 'chatml', length)


@pytest.fixture(scope='module')
def encoder(tokenizer):
    return make_encoder(tokenizer)


def example(history, targets, candidates=(), past=None):
    task = 'recommend_retrieval' if candidates else 'recommend'
    past = history if past is None else past
    return Example(0, task, tuple(past), tuple(history), tuple(candidates), tuple(targets))


def made_up(n=40, seed=0):
    """Examples of 8 to 60 tokens, 2 to 8 of them answer; every token says whose it is and where."""
    rng = np.random.default_rng(seed)
    examples = []
    for i in range(n):
        length = int(rng.integers(8, 61))
        answer = length - int(rng.integers(2, 9))
        examples.append(Tokens(1000 * (i + 1) + np.arange(length, dtype=np.int32), answer))
    return examples


def sizes(examples):
    lengths = np.array([len(e.tokens) for e in examples])
    return lengths, lengths - np.array([e.answer for e in examples])


def equal(a, b):
    return all(np.array_equal(getattr(a, f), getattr(b, f)) for f in Rows.__dataclass_fields__)


# --- one example ----------------------------------------------------------------------------------


def test_p01_the_answer_and_the_candidates_are_never_cut(encoder, tokenizer):
    """P01: 100 titles in the history, room for a few: the oldest go, the rest is whole."""
    long = example([2, 3, 4, 5] * 25, [1, 4], [5, 4, 1, 2])
    whole = encode_example(long, encoder, ('Horror', 'Drama'), 4096)
    least = len(encode_example(example([], [1, 4], [5, 4, 1, 2]), encoder, (), 4096).tokens)
    cut = encode_example(long, encoder, ('Horror', 'Drama'), least + 250)
    assert len(cut.tokens) <= least + 250 < len(whole.tokens)
    text = tokenizer.decode(cut.tokens)
    assert text.endswith('assistant\n"Heat (1995)"\n"M (1931)"<|im_end|>')
    lines = '"Misérables, Les (1995)"\n"M (1931)"\n"Heat (1995)"\n"Alien (1979)"'
    assert f'The candidates are:\n{lines}\n\nAnswer' in text
    assert '"M (1931)"\n"Misérables, Les (1995)"\n\nThe user prefers' in text  # the newest stay
    assert np.array_equal(cut.tokens[cut.answer :], whole.tokens[whole.answer :])


def test_p01_the_trigger(tokenizer, tmp_path):
    """P01: at most 64 tokens, a history of 100 titles, the answer Heat (1995)."""
    for task in ('recommend', 'recommend_retrieval'):
        (tmp_path / f'{task}.txt').write_text('Next?\n\n{history}')
    encoder = make_encoder(tokenizer, str(tmp_path))
    made = encode_example(example([2] * 100, [1]), encoder, (), 64)
    assert len(made.tokens) <= 64
    text = tokenizer.decode(made.tokens)
    assert text.startswith('<|endoftext|><|im_start|>user\nNext?\n\n"Alien (1979)"\n')
    assert text.endswith('"Heat (1995)"<|im_end|>')


def test_p01_what_cannot_fit_is_refused(encoder):
    whole = encode_example(example([], [1, 4], [5, 4, 1]), encoder, (), 4096)
    with pytest.raises(InputError, match=r'finetune\.length less the answer.* with 3 candidates'):
        encode_example(example([2], [1, 4], [5, 4, 1]), encoder, (), len(whole.tokens) - 1)


def test_the_prompt_keeps_to_the_length_of_prompts_too(tokenizer):
    """prompts.length binds in training as in ranking, also where the row has room for more."""
    short = make_encoder(tokenizer, length=200)
    made = encode_example(example([2, 3, 4, 5] * 25, [1]), short, (), 4096)
    assert 150 < made.answer <= 200


@pytest.mark.parametrize('targets', [[1], [5, 1, 3]])
def test_p03_p09_the_label_begins_at_the_first_answer_token_and_ends_with_eos(
    encoder, tokenizer, targets
):
    """P03, P09: every token of the answer is a label, however many it has."""
    made = encode_example(example([2, 3], targets), encoder, ('Action', 'Horror'), 4096)
    prompt = encoder.prompt('recommend', [2, 3], ('Action', 'Horror'))
    assert made.answer == len(prompt.tokens)
    assert np.array_equal(made.tokens[: made.answer], prompt.tokens)
    line_break = tokenizer.encode('\n')
    expected = encoder.item(targets[0]).tolist()
    for target in targets[1:]:
        expected += line_break + encoder.item(target).tolist()
    assert made.tokens[made.answer :].tolist() == [*expected, tokenizer.eos_id]
    row = lay_out([made], 256, 128)
    labels = row.weights > 0
    assert row.targets[labels].tolist() == [*expected, tokenizer.eos_id]
    assert row.before[labels].tolist() == list(range(made.answer - 1, len(made.tokens) - 1))


def test_p06_eos_is_learned_and_padding_is_not(encoder, tokenizer):
    """P06: padding is EOS in this tokenizer; the mask goes by position."""
    assert tokenizer.pad_id == tokenizer.eos_id
    made = encode_example(example([2], [1]), encoder, (), 4096)
    n = len(made.tokens)
    row = lay_out([made], n + 20, 64)
    m = n - made.answer
    assert row.targets[m - 1] == tokenizer.eos_id
    assert row.weights.tolist() == [1.0] * m + [0.0] * (64 - m)
    # <|im_end|> also ends the user's turn, which is not learned.
    assert np.count_nonzero(made.tokens == tokenizer.eos_id) == 2
    assert row.segments.tolist() == [1] * n + [0] * 20


def test_the_profile_stands_in_the_prompt_where_there_is_one(encoder, tokenizer):
    """Also where no history is shown: the keywords are of everything before the cut."""
    for shown in ([2], []):
        made = encode_example(example(shown, [1]), encoder, ('Drama', 'Horror'), 4096)
        assert '\n\nThe user prefers:\nDrama, Horror\n\n' in tokenizer.decode(made.tokens)
    made = encode_example(example([2], [1]), encoder, (), 4096)
    assert 'prefers' not in tokenizer.decode(made.tokens)


# --- packing --------------------------------------------------------------------------------------


@pytest.mark.parametrize('row_length', [60, 100, 256])
def test_rows_never_exceed_and_hold_every_example_once_an_epoch(row_length):
    lengths, answers = sizes(made_up(200))
    for epoch in range(3):
        rows = pack_epoch(lengths, answers, row_length, 20, seed=0, epoch=epoch)
        assert sorted(i for row in rows for i in row) == list(range(200))
        assert all(row and lengths[row].sum() <= row_length for row in rows)
        assert all(answers[row].sum() <= 20 for row in rows)


def test_packing_wastes_little():
    """Examples of 8 to 60 tokens in rows of 256 fill at least 95 % of them."""
    lengths, answers = sizes(made_up(500))
    rows = pack_epoch(lengths, answers, 256, answer_room(lengths, answers, 256), 0, 0)
    assert lengths.sum() / (256 * len(rows)) > 0.95


def test_the_answer_room_holds_the_longest_answer_and_a_quarter_over_the_average():
    # 100 answer tokens of 400: 256 on average in rows of 1,024, 320 with a quarter more.
    assert answer_room(np.array([300, 100]), np.array([50, 50]), 1024) == 320
    # One long answer: 150, rounded up to a multiple of 32.
    assert answer_room(np.array([900, 900]), np.array([150, 1]), 1000) == 160


def test_epochs_and_seeds_have_orders_of_their_own():
    lengths, answers = sizes(made_up(50))
    plans = [pack_epoch(lengths, answers, 100, 20, *key) for key in ((0, 0), (0, 1), (1, 0))]
    orders = [[i for row in plan for i in row] for plan in plans]
    assert orders[0] != orders[1]
    assert orders[0] != orders[2]
    assert orders[1] != orders[2]
    assert plans[0] == pack_epoch(lengths, answers, 100, 20, 0, 0)


def test_an_epoch_after_the_other():
    """Each example comes as often as epochs have passed, before any comes once more."""
    examples = made_up(30)
    lengths, answers = sizes(examples)
    room = answer_room(lengths, answers, 128)
    first = len(pack_epoch(lengths, answers, 128, room, 0, 0))
    second = len(pack_epoch(lengths, answers, 128, room, 0, 1))
    rows = PackedRows(examples, 128, first + second + 2, seed=0)
    assert len(rows) == first + second + 2

    def seen(start, stop):
        tokens = np.concatenate([rows[i].tokens for i in range(start, stop)])
        return sorted((tokens[tokens > 0] // 1000).tolist())

    once = sorted(i + 1 for i, n in enumerate(lengths) for _ in range(n))
    assert seen(0, first) == once
    assert seen(first, first + second) == once


# --- rows -----------------------------------------------------------------------------------------


def test_rows_by_brute_force():
    """P08, C01: every array of every row, token by token."""
    examples = made_up()
    rows = PackedRows(examples, 150, 25, seed=3)
    for i in range(25):
        row = rows[i]
        assert row.tokens.shape == row.positions.shape == row.segments.shape == (150,)
        used = np.count_nonzero(row.segments)
        assert not row.segments[used:].any()
        assert not row.tokens[used:].any()
        expected = []
        segment = position = 0
        for at in range(used):
            owner, index = divmod(int(row.tokens[at]), 1000)
            if index == 0:
                segment, position = segment + 1, 0
            assert row.segments[at] == segment
            assert row.positions[at] == position == index
            position += 1
            if index >= examples[owner - 1].answer:
                expected.append((at - 1, row.tokens[at]))
        labels = row.weights == 1.0
        assert list(zip(row.before[labels], row.targets[labels])) == expected
        assert np.count_nonzero(row.weights) == len(expected)
        # The hidden state that predicts a token is one place before it, in the same example.
        assert (row.tokens[row.before[labels]] + 1 == row.targets[labels]).all()
        # P08: a position is the number of the example's tokens before it.
        for segment in range(1, row.segments.max() + 1):
            mask = row.segments == segment
            assert np.array_equal(row.positions[mask], (np.cumsum(mask) - 1)[mask])


def test_types_of_the_arrays():
    row = PackedRows(made_up(), 150, 1, seed=0)[0]
    kinds = {f: getattr(row, f).dtype for f in Rows.__dataclass_fields__}
    assert kinds.pop('weights') == np.float32
    assert set(kinds.values()) == {np.dtype(np.int32)}


def test_a_longer_run_begins_with_the_rows_of_the_shorter_one():
    """Same rows in the same shapes, also past the end of an epoch."""
    examples = made_up()
    short, long = (PackedRows(examples, 128, n, seed=0) for n in (5, 60))
    assert all(equal(short[i], long[i]) for i in range(5))
    assert {long[i].targets.shape for i in range(60)} == {short[0].targets.shape}


def test_o05_step_s_reads_the_same_batch_whatever_was_read_before():
    """O05: a run that resumes reads what the uninterrupted one would have read."""
    examples = made_up()
    through = batches(PackedRows(examples, 128, 40, seed=0), 4)
    assert len(through) == 10
    in_order = [through[s] for s in range(10)]
    resumed = batches(PackedRows(examples, 128, 40, seed=0), 4)
    for s in (7, 9, 2, 7):
        assert equal(resumed[s], in_order[s])
    longer = batches(PackedRows(examples, 128, 80, seed=0), 4)
    assert all(equal(longer[s], in_order[s]) for s in range(10))
    assert not equal(in_order[0], in_order[1])


def test_a_batch_is_its_rows_in_order():
    rows = PackedRows(made_up(), 128, 12, seed=0)
    batch = batches(rows, 3)[2]
    assert batch.tokens.shape == (3, 128)
    assert equal(batch, stack([rows[6], rows[7], rows[8]]))
    for b in range(3):
        assert np.array_equal(batch.targets[b], rows[6 + b].targets)


def test_grouped_rows_hold_one_example_and_keep_to_the_tokens_of_a_step():
    """Whole batches of one of few shapes, and little padding."""
    examples = made_up(200)
    grouped = GroupedRows(examples, 60, 2, 300, seed=0, max_shapes=4)
    shapes = set()
    for batch in (grouped[i] for i in range(300)):
        B, T = batch.tokens.shape
        assert B % 2 == 0
        assert B * T <= 2 * 60 < (B + 2) * T
        assert batch.segments.max(axis=1).tolist() == [1] * B
        shapes.add((B, T, batch.targets.shape[1]))
        for row in range(B):
            owner = examples[batch.tokens[row, 0] // 1000 - 1]
            assert equal(
                Rows(**{f: getattr(batch, f)[row] for f in Rows.__dataclass_fields__}),
                lay_out([owner], T, batch.targets.shape[1]),
            )
    assert 1 < len(shapes) <= 4
    assert max(T for _, T, _ in shapes) == 60
    owners = np.concatenate([grouped[i].tokens[:, 0] // 1000 for i in range(300)])
    assert set(owners.tolist()) == set(range(1, 201))
    padded = sum(np.count_nonzero(grouped[i].segments == 0) for i in range(300))
    assert padded < 0.2 * sum(grouped[i].tokens.size for i in range(300))


def test_o05_grouped_batches_are_a_function_of_the_step():
    """O05: and a longer run reads the same batches first."""
    short, long = (GroupedRows(made_up(), 60, 2, n, seed=0, max_shapes=4) for n in (9, 40))
    assert len(short) == 9
    assert all(equal(short[i], long[i]) for i in (8, 0, 3))
    other = GroupedRows(made_up(), 60, 2, 9, seed=1, max_shapes=4)
    assert not all(np.array_equal(short[i].tokens, other[i].tokens) for i in range(9))


def test_an_epoch_of_batches_by_hand():
    """Groups of three and two members in batches of two and one: two and two batches an epoch."""
    groups = [np.array([0, 1, 2]), np.array([3, 4])]
    plan = plan_steps(groups, [2, 1], 8, seed=0)
    for epoch in (plan[:4], plan[4:]):
        assert sorted(group for group, _ in epoch) == [0, 0, 1, 1]
        first = np.concatenate([members for group, members in epoch if group == 0])
        assert len(first) == 4
        assert set(first.tolist()) == {0, 1, 2}
        assert sorted(int(members[0]) for group, members in epoch if group == 1) == [3, 4]


def test_no_example_and_a_too_long_one_are_refused():
    with pytest.raises(InputError, match=r'no fine-tuning example: tasks\.users'):
        PackedRows([], 128, 4, seed=0)
    with pytest.raises(InputError, match=r'has 90 tokens; .*finetune\.length, which is 64'):
        PackedRows([Tokens(np.arange(90, dtype=np.int32), 80)], 64, 4, seed=0)
    with pytest.raises(InputError, match=r'has 90 tokens; .*finetune\.length, which is 64'):
        GroupedRows([Tokens(np.arange(90, dtype=np.int32), 80)], 64, 4, 1, seed=0, max_shapes=4)
