"""Stages: what is finished, what a changed config means, what is refused."""

import pytest

from palr_jax import stages, storage
from palr_jax.config import default_config
from palr_jax.errors import InputError
from palr_jax.stages import (
    DEPENDS,
    LAYOUT,
    STAGES,
    Ledger,
    config_part,
    flatten,
    has_stage,
    stage_folders,
    training_retrieval,
)


def finish(workdir, config, stages, overwrite=False, weights='w'):
    """Runs empty stages, and returns those that were not finished before."""
    ledger = Ledger(config, workdir, overwrite)
    done = []
    for stage in stages:
        inputs = ledger.inputs(stage, weights if stage in ('finetune', 'ranking') else None)
        if not ledger.complete(stage, inputs):
            ledger.finish(stage, inputs, ledger.begin(stage, inputs))
            done.append(stage)
    return done


def test_every_field_belongs_to_a_stage_or_to_none_that_matters():
    fields = [field for stage in STAGES for field in config_part(default_config(), stage)]
    every = set(flatten(default_config()))
    mesh = {field for field in every if field.startswith('mesh.')}
    assert every - set(fields) == {'stages'} | mesh | LAYOUT


def test_lists_of_co_visitation_do_not_depend_on_which_retriever_there_is():
    config = default_config()
    config.tasks.candidates_from = 'covisitation'
    before = config_part(config, 'finetune')
    config.retrieval.systems = ('covisitation', 'profile')
    assert config_part(config, 'finetune') == before
    config.tasks.candidates_from = 'retriever'
    assert config_part(config, 'finetune') != before


def test_retrievers_of_training_lists_have_a_length_of_their_own():
    config = default_config()
    config.tasks.candidates_from = 'retriever'
    assert training_retrieval(config).epochs == config.retrieval.epochs
    config.tasks.retriever_epochs = 7
    assert training_retrieval(config).epochs == 7
    assert config.retrieval.epochs != 7


def test_a_retriever_that_reads_texts_does_not_depend_on_how_the_ranking_asks():
    config = default_config()
    config.retrieval.systems = ('profile',)
    before = config_part(config, 'retrieval')
    config.prompts.history, config.prompts.candidate_order = 3, 'retriever'
    assert config_part(config, 'retrieval') == before
    config.prompts.profile = 'llm'
    assert config_part(config, 'retrieval') != before


@pytest.mark.parametrize('stages', [STAGES, ('data', 'retrieval', 'ranking', 'report')])
def test_other_prompts_are_refused_whether_or_not_anything_was_tuned(tmp_path, stages):
    finish(tmp_path, default_config(), stages)
    config = default_config()
    config.prompts.history = 5
    first = stages[2]  # finetune, or ranking where there is none
    with pytest.raises(InputError, match=f'prompts.history was 20 .* affects the stage {first} fi'):
        Ledger(config, tmp_path, overwrite=False)


@pytest.mark.parametrize('stage', ['retrieval', 'finetune'])
def test_another_seed_is_refused_wherever_a_stage_has_drawn_from_it(tmp_path, stage):
    finish(tmp_path, default_config(), ['data', stage])
    config = default_config()
    config.seed = 1
    with pytest.raises(InputError, match=f'seed was 0 there .* affects the stage {stage} first'):
        Ledger(config, tmp_path, overwrite=False)


def test_a_stage_that_wrote_nothing_binds_nothing(tmp_path):
    config = default_config()
    ledger = Ledger(config, tmp_path, overwrite=False)
    ledger.begin('data', {})
    ledger.abandon('data')
    assert not list(tmp_path.iterdir())
    ledger.begin('data', {})
    (tmp_path / 'data' / 'half').write_text('')
    ledger.abandon('data')
    assert sorted(p.name for p in (tmp_path / 'data').iterdir()) == ['half', 'started.json']


def test_a_process_that_only_reads_leaves_the_notes_to_the_one_that_writes(tmp_path, monkeypatch):
    writes, reads = (Ledger(default_config(), tmp_path, overwrite=False) for _ in range(2))
    began = writes.begin('data', {})
    with monkeypatch.context() as patch:
        patch.setattr(storage, '_reads_only', True)
        reads.finish('data', {}, began)
        reads.abandon('data')
        assert [path.name for path in (tmp_path / 'data').iterdir()] == ['started.json']
    writes.finish('data', {}, began)
    with monkeypatch.context() as patch:
        patch.setattr(storage, '_reads_only', True)
        reads.begin('data', {})
        assert [path.name for path in (tmp_path / 'data').iterdir()] == ['stage.json']
    writes.begin('data', {})
    writes.abandon('data')
    monkeypatch.setattr(storage, '_reads_only', True)
    reads.abandon('data')


def test_the_same_command_again_does_nothing(tmp_path):
    assert finish(tmp_path, default_config(), STAGES) == list(STAGES)
    assert finish(tmp_path, default_config(), STAGES) == []


def test_a_changed_field_is_refused_with_the_first_stage_and_what_would_be_redone(tmp_path):
    finish(tmp_path, default_config(), STAGES)
    config = default_config()
    config.retrieval.width = 128
    with pytest.raises(InputError) as error:
        Ledger(config, tmp_path, overwrite=False)
    assert str(error.value) == (
        f'{tmp_path}: config.retrieval.width was 64 there and is 128 now; this affects the stage '
        'retrieval first, and --overwrite would redo retrieval, finetune, ranking, report.'
    )
    assert all((tmp_path / stage / 'stage.json').exists() for stage in STAGES)


def test_overwrite_redoes_that_stage_and_the_later_ones_only(tmp_path):
    finish(tmp_path, default_config(), STAGES)
    (tmp_path / 'ranking' / 'scores').write_text('old')
    (tmp_path / 'data' / 'kept').write_text('old')
    config = default_config()
    config.finetune.learning_rate = 1.0
    assert finish(tmp_path, config, STAGES, overwrite=True) == ['finetune', 'ranking', 'report']
    assert not (tmp_path / 'ranking' / 'scores').exists()
    assert (tmp_path / 'data' / 'kept').exists()


@pytest.mark.parametrize('older', [True, False])
def test_how_the_work_is_laid_out_may_change(tmp_path, monkeypatch, older):
    """Also where an older version noted how it was."""
    with monkeypatch.context() as patch:
        if older:
            patch.setattr(stages, 'LAYOUT', {'model.remat', 'finetune.accumulate'})
        assert finish(tmp_path, default_config(), STAGES) == list(STAGES)
    config = default_config()
    config.ranking.update({'batch_size': 8, 'row_length': 32, 'max_shapes': 1})
    config.finetune.update({'checkpoint_every': 9, 'accumulate': 2})
    assert finish(tmp_path, config, STAGES) == []


def test_parts_of_a_batch_count_where_each_draws_a_dropout_of_its_own(tmp_path):
    config = default_config()
    config.lora.dropout = 0.1
    finish(tmp_path, config, STAGES)
    config.finetune.accumulate = 2
    with pytest.raises(InputError, match=r'finetune\.accumulate was 1 there and is 2 now'):
        Ledger(config, tmp_path, overwrite=False)


def test_overwrite_without_a_change_removes_nothing(tmp_path):
    finish(tmp_path, default_config(), STAGES)
    assert finish(tmp_path, default_config(), STAGES, overwrite=True) == []


def test_an_interrupted_stage_is_not_continued_under_another_config(tmp_path):
    ledger = Ledger(default_config(), tmp_path, overwrite=False)
    ledger.begin('data', {})
    config = default_config()
    config.data.k_core = 3
    with pytest.raises(InputError, match=r'data\.k_core was 5 there and is 3 now'):
        Ledger(config, tmp_path, overwrite=False)
    assert not Ledger(default_config(), tmp_path, overwrite=False).complete('data', {})


def test_more_steps_continue_and_redo_only_what_reads_the_adapter(tmp_path):
    finish(tmp_path, default_config(), STAGES)
    config = default_config()
    config.finetune.steps += 1
    assert finish(tmp_path, config, STAGES) == ['finetune', 'ranking', 'report']
    with pytest.raises(InputError, match=r'finetune\.steps was 201 there and is 200 now'):
        Ledger(default_config(), tmp_path, overwrite=False)


def test_stages_asked_for_do_not_matter(tmp_path):
    config = default_config()
    config.stages = ('data',)
    assert finish(tmp_path, config, ['data']) == ['data']
    assert finish(tmp_path, default_config(), ['data', 'retrieval']) == ['retrieval']


def test_a_stage_without_its_input_is_refused(tmp_path):
    ledger = Ledger(default_config(), tmp_path, overwrite=False)
    with pytest.raises(InputError, match='ranking needs the stage data, which is not finished'):
        ledger.inputs('ranking', 'w')


def test_ranking_is_redone_once_there_is_an_adapter(tmp_path):
    config = default_config()
    finish(tmp_path, config, ['data', 'retrieval', 'ranking', 'report'])
    assert finish(tmp_path, config, STAGES) == ['finetune', 'ranking', 'report']


@pytest.mark.parametrize('stage', ['finetune', 'ranking'])
def test_what_an_unfinished_stage_has_left_is_not_read(tmp_path, stage):
    """Interrupted in a longer run, and then left out: its folder holds what it made before."""
    config = default_config()
    finish(tmp_path, config, STAGES)
    config.finetune.steps += 1
    stages = STAGES[: STAGES.index(stage)]
    finish(tmp_path, config, stages)
    ledger = Ledger(config, tmp_path, overwrite=False)
    ledger.begin(stage, ledger.inputs(stage, 'w'))
    later = STAGES[STAGES.index(stage) + 1 :]
    with pytest.raises(InputError) as error:
        finish(tmp_path, config, later)
    assert str(error.value) == (
        f'{tmp_path}: the stage {stage} was begun and is not finished; add it to config.stages.'
    )
    assert finish(tmp_path, config, STAGES) == list(STAGES[len(stages) :])


def test_other_weights_under_the_same_path_are_refused(tmp_path):
    finish(tmp_path, default_config(), STAGES)
    with pytest.raises(InputError, match=r'config\.model\.path: these are not the weights'):
        Ledger(default_config(), tmp_path, overwrite=False).inputs('finetune', 'others')


def shared_ledger(workdir, config):
    """Runs the empty stages of a variant of the study in `workdir`: (its ledger, those done)."""
    ledger, done = Ledger(config, workdir, overwrite=False, shared=True), []
    for stage in STAGES:
        inputs = ledger.inputs(stage, 'w' if stage in ('finetune', 'ranking') else None)
        if not ledger.complete(stage, inputs):
            ledger.finish(stage, inputs, ledger.begin(stage, inputs))
            done.append(stage)
    ledger.record()
    return ledger, done


def test_variants_of_a_study_share_what_does_not_tell_them_apart(tmp_path):
    a, b = (tmp_path / 'variants' / name for name in 'ab')
    first, done = shared_ledger(a, default_config())
    assert done == list(STAGES)
    config = default_config()
    config.finetune.learning_rate = 1.0
    second, done = shared_ledger(b, config)
    assert done == ['finetune', 'ranking', 'report']
    shared = {name for name in first.folders if first.folders[name] == second.folders[name]}
    assert shared == {'data', 'retrieval', 'untuned'}
    assert first.folders['data'].parent == tmp_path / 'stages'
    assert stage_folders(a) == first.folders
    assert has_stage(b, 'ranking')
    assert not has_stage(tmp_path, 'ranking')
    with pytest.raises(InputError, match=r'is a variant of a study, which palr_jax\.ablate runs'):
        Ledger(config, b, overwrite=False)


def test_a_shared_folder_is_that_of_the_identity_of_its_stage(tmp_path):
    workdir = tmp_path / 'variants' / 'a'
    ledger, _ = shared_ledger(workdir, default_config())
    told = ledger.inputs('ranking', 'w')
    assert ledger.folders['data'].name == f'data-{told["data"][:16]}'
    assert ledger.folders['finetune'].name == f'finetune-{told["finetune"][:16]}'
    other, _ = shared_ledger(tmp_path / 'variants' / 'b', default_config())
    other.inputs('finetune', 'other weights')
    assert other.folders['finetune'] != ledger.folders['finetune']


def test_a_newer_format_is_refused(tmp_path):
    finish(tmp_path, default_config(), ['data'])
    path = tmp_path / 'data' / 'stage.json'
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(InputError, match='format is 2; this version reads 1'):
        Ledger(default_config(), tmp_path, overwrite=False)


def test_the_dependencies_name_stages_in_order():
    assert tuple(DEPENDS) == ('data', 'retrieval', 'finetune', 'ranking', 'report')
