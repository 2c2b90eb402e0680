"""What the entry points share: bad input and Ctrl-C end in one sentence, not in a traceback."""

import errno
import functools
import logging as python_logging
import os
import re
import sys
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
    except (InputError, flags.Error, TypeError, ValueError, OSError) as error:
        # The last three are what ml_collections lets through of a wrong value.
        _fail(error)
    logging.set_verbosity(logging.INFO)
    return arguments


def _wrong_type(error: flags.IllegalFlagValueError, within: str) -> Exception:
    """The error in the words of `config.validate`, where the flag is a field of the config."""
    field, value = re.match(r'flag --(?:config\.)?([\w.]+)=(.*?)(?:: |$)', str(error)).groups()
    default = flatten(default_config()).get(field.removeprefix(within))
    if default is None:
        return error
    kind = type(default).__name__
    return InputError(f'config.{field}={value}; allowed: a value of type {kind}.')


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
