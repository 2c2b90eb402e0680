"""What the entry points share: bad input and Ctrl-C end in one sentence, not in a traceback."""

import errno
import functools
import logging as python_logging
import os
import re
import sys
import traceback
from collections.abc import Callable

from absl import app, flags, logging

from palr_jax.config import check_name, default_config
from palr_jax.errors import BAD_INPUT, InputError
from palr_jax.stages import flatten

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk, quota, the largest file
INTERRUPTED = 128 + 2  # what shells expect after Ctrl-C, signal 2
_PACKAGE = os.path.dirname(os.path.abspath(__file__))


def run(main: Callable[[list[str]], None], within: str = '') -> None:
    """Parses the flags and runs `main`; exits with BAD_INPUT on what a user can mend.

    Args:
      main: what to run.
      within: what stands before the name of every field in --config.FIELD; see `check_name`.
    """
    logging.use_absl_handler()
    handler = logging.get_absl_handler()
    handler.setFormatter(None)  # log lines are for people: no source position
    handler.addFilter(_is_ours_or_a_warning)
    parser = functools.partial(_parse_flags, within=within)
    app.run(lambda argv: _guarded(main, argv), flags_parser=parser)


def _is_ours_or_a_warning(record: python_logging.LogRecord) -> bool:
    """Libraries tell at INFO what only their developers want to read."""
    return record.levelno >= python_logging.WARNING or record.pathname.startswith(_PACKAGE)


def _parse_flags(argv: list[str], within: str = '') -> list[str]:
    try:
        _check_config_flags(argv[1:], within)
        arguments = flags.FLAGS(argv)
    except flags.IllegalFlagValueError as error:
        _fail(_wrong_type(error, within))
    except (InputError, flags.Error) as error:
        _fail(error)
    except Exception as error:  # of a config file; or what ml_collections says of a wrong value
        _fail(_located(error))
    logging.set_verbosity(logging.INFO)
    return arguments


def _wrong_type(error: flags.IllegalFlagValueError, within: str) -> Exception:
    """The error in the words of `config.validate`, where the flag is a field of the config."""
    text = str(error).strip()
    found = re.match(r'flag --config\.([\w.]+)=(.*?)(?:: |$)', text, re.DOTALL)
    default = found and flatten(default_config()).get(found[1].removeprefix(within))
    if default is None:  # of a config file, what it raised stands last
        return InputError(re.sub('Traceback .*\n', '', text, flags=re.DOTALL))
    kind = 'tuple' if isinstance(default, list) else type(default).__name__
    return InputError(f'config.{found[1]}={found[2]}; allowed: a value of type {kind}.')


def _located(error: Exception) -> InputError:
    """The error with the line of the config file that it comes from, if it comes from one."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame for frame in frames if frame.name in ('get_config', '<module>')]
    if not lines:
        return InputError(str(error))
    where, told = f'{lines[-1].filename}, line {lines[-1].lineno}', error
    while isinstance(told, AttributeError | KeyError) and told.args:
        told = told.args[0]  # ml_collections has one in the other, and their texts are quoted
    return InputError(f'{where}: {type(error).__name__}: {told}')


def _check_config_flags(arguments: list[str], within: str) -> None:
    """Says what ml_collections would say in a traceback: no such field, no such config file."""
    for argument, following in zip(arguments, [*arguments[1:], '']):
        name, _, value = argument.lstrip('-').partition('=')
        if name.startswith('config.'):
            check_name(name.removeprefix('config.'), within)
        elif name == 'config':
            path = (value or following).split(':')[0]
            if not os.path.isfile(path):
                raise InputError(f'--config={path}: this file does not exist.')


def _guarded(main: Callable[[list[str]], None], argv: list[str]) -> None:
    try:
        if len(argv) > 1:
            raise InputError(f'Unknown argument {argv[1]!r}; flags begin with --, see --help.')
        main(argv)
    except InputError as error:
        _fail(error)
    except OSError as error:
        if error.errno not in FULL:
            raise
        _fail(error)
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        sys.exit(INTERRUPTED)


def _fail(error: Exception) -> None:
    told = error.args[0] if error.args and not isinstance(error, OSError) else error
    print(f'error: {" ".join(str(told).split())}', file=sys.stderr)
    sys.exit(BAD_INPUT)
