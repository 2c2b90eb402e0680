"""Prompts: history, profile and candidates as text and as tokens; the tasks of fine-tuning.

`templates/` holds the wording as plain text files, meant to be edited.
"""

from palr_jax.prompts.encode import Encoder, Prompt
from palr_jax.prompts.profile import count_profile
from palr_jax.prompts.tasks import Affinity, Example, affinity, make_examples, split_users
from palr_jax.prompts.template import STYLES, TASKS, Template, load_template

__all__ = [
    'STYLES',
    'TASKS',
    'Affinity',
    'Encoder',
    'Example',
    'Prompt',
    'Template',
    'affinity',
    'count_profile',
    'load_template',
    'make_examples',
    'split_users',
]
