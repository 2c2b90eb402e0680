"""The wording of prompts: text files with slots, and the frame that a kind of model expects.

A template is a folder with one text file a task, and one that asks for a user's profile. A file is
a list of paragraphs, divided by blank lines, with the slots {history}, {profile} and {candidates},
each on a line of its own. A paragraph whose slot is empty or switched off is left out, so one file
serves every combination of prompt components.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

from etils import epath

from palr_jax.errors import InputError

TASKS = ('recommend', 'recommend_retrieval')
INDEX = 'recommend_index'  # recommend_retrieval, answered with the numbers of candidates
PROFILE = 'profile'  # asks the LLM for the profile; its only slot is {history}
SLOTS = ('history', 'profile', 'candidates')
FOLDER = epath.Path(__file__).parent / 'templates'


class Style(NamedTuple):
    """What stands around the instruction. It ends in a line break: an answer begins a line."""

    before: str
    after: str


STYLES = {
    # For base models: the answer follows a heading.
    'plain': Style('', '\n\nAnswer:\n'),
    # The headings of Stanford Alpaca (2023), which many tuned LLaMA models read.
    'alpaca': Style('### Instruction:\n', '\n\n### Response:\n'),
    # The chat format of SmolLM2-Instruct among others.
    'chatml': Style('<|im_start|>user\n', '<|im_end|>\n<|im_start|>assistant\n'),
}


class Part(NamedTuple):
    """A piece of wording, or the name of a slot."""

    text: str
    is_slot: bool


@dataclass(frozen=True)
class Template:
    """The paragraphs of each task, each a sequence of parts."""

    name: str
    paragraphs: dict[str, tuple[tuple[Part, ...], ...]]

    def parts(self, task: str, filled: frozenset[str]) -> list[Part]:
        """The task's text, without the paragraphs that have a slot outside `filled`.

        Raises:
          InputError: there is no place for a filled slot, so the model would never see it; or the
            template does not ask for profiles.
        """
        if task not in self.paragraphs:
            instead = {
                PROFILE: "prompts.profile to 'counts' or 'none'",
                INDEX: "prompts.answer to 'title'",
            }
            raise InputError(
                f'prompts.template is {self.name!r}, which has no {task}.txt; write one, or set '
                f'{instead[task]}.'
            )
        paragraphs = self.paragraphs[task]
        slots = {part.text for paragraph in paragraphs for part in paragraph if part.is_slot}
        if lacking := filled - slots:
            raise InputError(
                f'prompts.template: {task}.txt has no slot {_braced(lacking)}, but the prompt is '
                'to show it; add the slot or switch that component off.'
            )
        parts: list[Part] = []
        for paragraph in paragraphs:
            if all(part.text in filled for part in paragraph if part.is_slot):
                parts += [Part('\n\n', False), *paragraph]
        return parts[1:]


def load_template(name: str) -> Template:
    """Reads a template folder: a name under palr_jax/prompts/templates, or a path.

    Two files may be missing: profile.txt is needed where the LLM makes the profiles, and
    recommend_index.txt where candidates are numbered.

    Raises:
      InputError: the folder or a file is missing, or a file is empty, is not UTF-8, or has a slot
        that is unknown, repeated or not on a line of its own.
    """
    folder = FOLDER / name
    if not folder.is_dir():
        folder = epath.Path(name)
    paragraphs = {}
    for task in (*TASKS, INDEX, PROFILE):
        path = folder / f'{task}.txt'
        if not path.exists():
            if task not in TASKS:
                continue
            known = ', '.join(sorted(p.name for p in FOLDER.iterdir()))
            raise InputError(
                f'prompts.template is {name!r}, but {path} does not exist; '
                f'allowed: {known}, or a folder with {" and ".join(f"{t}.txt" for t in TASKS)}.'
            )
        paragraphs[task] = _parse(path, SLOTS[:1] if task == PROFILE else SLOTS)
    return Template(name, paragraphs)


def _parse(path: epath.Path, slots: tuple[str, ...]) -> tuple[tuple[Part, ...], ...]:
    try:
        lines = path.read_bytes().decode('utf-8-sig').splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f'{path}: this file is not UTF-8 ({error}).') from error
    seen: set[str] = set()
    for number, line in enumerate(lines, start=1):
        for slot in re.findall(r'\{([^{}]*)\}', line):
            if slot not in slots:
                fault = 'an unknown slot'
            elif slot in seen:
                fault = 'there twice'
            elif line.rstrip() != f'{{{slot}}}':
                # Items are tokenised by themselves, as they begin a line and end it.
                fault = 'not alone on its line'
            else:
                seen.add(slot)
                continue
            raise InputError(
                f'{path}: line {number}: {{{slot}}} is {fault}; allowed, once each and on a line '
                f'of its own: {_braced(slots)}.'
            )
    text = '\n'.join(line.rstrip() for line in lines).strip()
    if not text:
        raise InputError(f'{path}: this file is empty; it must hold the wording of the prompt.')
    return tuple(
        tuple(
            Part(piece, is_slot=i % 2 == 1)  # re.split puts the slots at the odd places
            for i, piece in enumerate(re.split(r'\{(\w+)\}', paragraph))
            if piece
        )
        for paragraph in re.split(r'\n{2,}', text)
    )


def _braced(slots: Collection[str]) -> str:
    return ' '.join(f'{{{slot}}}' for slot in sorted(slots, key=SLOTS.index))
