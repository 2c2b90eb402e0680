"""A user's exact prompt and answer, as the model reads them, with the tokens of each part.

    python -m palr_jax.prompts --config=configs/demo.py --user=196

prints the prompt of the test target. Of a run (--workdir) its retrieved candidates are listed;
without one a training example's stand in.
"""

from absl import flags
from ml_collections import config_flags

from palr_jax import cli
from palr_jax.config import validate
from palr_jax.prompts.show import (
    PARTS,
    find_user,
    open_project,
    render,
    show_example,
    show_query,
)
from palr_jax.prompts.template import TASKS

CONFIG = config_flags.DEFINE_config_file('config', None, 'The config file, configs/NAME.py.')
USER = flags.DEFINE_string('user', None, 'Of the data set, as its files name the user.')
WORKDIR = flags.DEFINE_string('workdir', None, 'Of a run with this config.')
PART = flags.DEFINE_enum('part', 'test', PARTS, 'Test or validation target, or fine-tuning.')
TASK = flags.DEFINE_enum('task', None, TASKS, 'Instead of what the config says.')
EXAMPLE = flags.DEFINE_integer('example', 1, 'Which fine-tuning example.', lower_bound=1)


def main(_: list[str]) -> None:
    validate(CONFIG.value)
    project = open_project(CONFIG.value, WORKDIR.value)
    user = find_user(project.dataset.user_ids, USER.value)
    if PART.value == 'train':
        shown = show_example(project, user, TASK.value, EXAMPLE.value)
    else:
        shown = show_query(project, user, PART.value, TASK.value)
    print(render(shown, project))


if __name__ == '__main__':
    flags.mark_flags_as_required(['config', 'user'])
    cli.run(main)
