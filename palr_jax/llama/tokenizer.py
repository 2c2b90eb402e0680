"""One tokenizer interface over Hugging Face folders and GGUF metadata.

Both end as a `tokenizers.Tokenizer`. A GGUF file holds only tokens, merges or scores, and the name
of its pre-tokenizer; the pipeline is rebuilt here as llama.cpp defines it for that name.
"""

import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from palr_jax import storage
from palr_jax.errors import InputError

# Token types of GGUF (gguf.TokenType), those that need care.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4

LLAMA3_NAMES = ('llama-bpe', 'llama3', 'llama-v3')

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)


class Tokenizer:
    """Text to ids and back.

    Attributes:
      backend: the tokenizer of the `tokenizers` library.
      bos_id: starts every text exactly once; None where the model was trained without it.
      eos_id: ends an answer.
      pad_id: fills rows; equals `eos_id` where the files name none, so mask by position, not by id.
      size: one more than the largest id.
      chat_template: what tokenizer_config.json or the GGUF file holds, in Jinja. It is only carried
        along: prompts follow `config.prompts.style`.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        bos_id: int | None,
        eos_id: int,
        pad_id: int | None = None,
        chat_template: str | None = None,
    ):
        # Some published files would cut or fill every text.
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.pad_id = eos_id if pad_id is None else pad_id
        self.size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.chat_template = chat_template

    def encode(self, text: str, allow_special: bool = True) -> list[int]:
        """Ids of `text`; neither BOS nor EOS is added.

        Args:
          text: any string.
          allow_special: strings of special tokens (`<|im_end|>`) become their one id. Pass False
            for data of users, such as titles: there they are ordinary text and steer nothing.
        """
        backend = self.backend if allow_special else self._literal
        return backend.encode(text, add_special_tokens=False).ids

    def piece(self, text: str, allow_special: bool = True) -> list[int]:
        """Ids that `text` has inside running text, where no string start adds a blank to it.

        SentencePiece tokenizers put a blank before each string; a candidate encoded by itself would
        begin with a token that it does not have behind a prompt. So `text` is encoded behind a line
        break, which no tokenizer merges with what follows, and the break's ids are taken off. Never
        empty for a text that is not.
        """
        lead = self.encode('\n')
        ids = self.encode('\n' + text, allow_special)
        rest = ids[len(lead) :]
        if ids[: len(lead)] == lead and (rest or not text):
            return rest
        return self.encode(text, allow_special)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens written out."""
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def id_of(self, token: str) -> int | None:
        """The id of one token as the vocabulary spells it; None where there is none."""
        return self.backend.token_to_id(token)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, which transformers reads too."""
        settings = {
            'tokenizer_class': 'PreTrainedTokenizerFast',
            'add_bos_token': self.bos_id is not None,
        }
        for role, i in (('bos', self.bos_id), ('eos', self.eos_id), ('pad', self.pad_id)):
            settings[f'{role}_token'] = None if i is None else self.backend.id_to_token(i)
        if self.chat_template is not None:
            settings['chat_template'] = self.chat_template
        storage.write_text(Path(folder) / 'tokenizer.json', self._with_bos().to_str())
        storage.write_json(Path(folder) / 'tokenizer_config.json', settings)

    def _with_bos(self) -> tokenizers.Tokenizer:
        """A copy that puts BOS before a text by itself, which is what transformers goes by."""
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        if self.bos_id is not None:
            # Under a name of ours: a token may hold what means something in a template.
            bos = {'id': 'bos', 'ids': [self.bos_id], 'tokens': [backend.id_to_token(self.bos_id)]}
            backend.post_processor = processors.TemplateProcessing(
                single='bos $A', pair='bos $A $B', special_tokens=[bos]
            )
        return backend

    @functools.cached_property
    def _literal(self) -> tokenizers.Tokenizer:
        """A copy that knows no special tokens; a switch on one shared backend would be a race.

        Chat markers that a file adds without calling them special count as such; runs of blanks,
        which some vocabularies hold as added tokens, do not.
        """
        state = json.loads(self.backend.to_str())
        for token in state['added_tokens']:
            token['special'] = token['special'] or bool(token['content'].strip())
        literal = tokenizers.Tokenizer.from_str(json.dumps(state))
        literal.encode_special_tokens = True
        return literal


def from_hf_folder(folder: str | os.PathLike) -> Tokenizer:
    """Reads `tokenizer.json`, or a SentencePiece `tokenizer.model` where there is no such file.

    The special tokens come from tokenizer_config.json, special_tokens_map.json and config.json, the
    first that names them.

    Raises:
      InputError: there is no tokenizer, it is damaged, or nothing says which token ends an answer.
    """
    folder = Path(folder)
    settings = _optional(folder / 'tokenizer_config.json')
    specials = _optional(folder / 'special_tokens_map.json')
    config = _optional(folder / 'config.json')
    if (folder / 'tokenizer.json').exists():
        backend = _read_backend(folder / 'tokenizer.json')
    elif (folder / 'tokenizer.model').exists():
        backend = _read_sentencepiece(folder)
        settings = {'add_bos_token': True} | settings
    else:
        raise InputError(f'{folder}: holds no tokenizer.json and no tokenizer.model.')

    def special(role: str) -> int | None:
        for source in (settings, specials):
            token = source.get(f'{role}_token')
            name = token.get('content') if isinstance(token, Mapping) else token
            if name is not None:
                found = backend.token_to_id(name) if isinstance(name, str) else None
                if found is None:
                    raise InputError(
                        f'{folder}: {role}_token is {name!r}; allowed: a token of the vocabulary.'
                    )
                return found
        number = config.get(f'{role}_token_id')
        number = number[0] if isinstance(number, list) and number else number
        return None if number == -1 else number  # as old conversions of LLaMA 1 write that

    bos_id = special('bos')
    add_bos = settings.get('add_bos_token')
    if add_bos is None:
        add_bos = backend.encode('a', add_special_tokens=True).ids[:1] == [bos_id]
    return _checked(
        backend,
        bos_id if add_bos else None,
        special('eos'),
        special('pad'),
        settings.get('chat_template'),
        folder,
    )


def from_gguf(metadata: Mapping[str, Any], where: str) -> Tokenizer:
    """Builds the tokenizer that the metadata of a GGUF file describes.

    Args:
      metadata: all keys of the file with their values.
      where: path of the file, for messages.

    Raises:
      InputError: the kind of tokenizer or pre-tokenizer is unknown, or a part is missing.
    """
    get = functools.partial(_ggml, metadata)
    kind = get('model')
    tokens = get('tokens')
    if not tokens:
        raise InputError(f'{where}: holds no tokenizer (tokenizer.ggml.tokens is missing).')
    types = get('token_type') or [NORMAL] * len(tokens)
    if kind == 'gpt2':
        name = get('pre')
        backend = _byte_level(tokens, get('merges'), name, where)
        add_bos = name in LLAMA3_NAMES
    elif kind == 'llama':
        scores = get('scores')
        if not scores or len(scores) != len(tokens):
            raise InputError(
                f'{where}: tokenizer.ggml.scores has {len(scores or [])} entries; allowed: '
                f'{len(tokens)}, one a token.'
            )
        backend = _sentencepiece(tokens, scores, types, bool(get('add_space_prefix', True)))
        add_bos = True
    else:
        raise InputError(f'{where}: tokenizer.ggml.model is {kind!r}; allowed: gpt2, llama.')

    added = {CONTROL: [], USER_DEFINED: []}
    for token, token_type in zip(tokens, types):
        if token_type in added:
            added[token_type].append(AddedToken(token, normalized=False))
    backend.add_special_tokens(added[CONTROL])
    backend.add_tokens(added[USER_DEFINED])
    if backend.get_vocab_size(with_added_tokens=True) != len(tokens):
        raise InputError(f'{where}: tokenizer.ggml.tokens names a token twice.')
    bos_id = get('bos_token_id') if get('add_bos_token', add_bos) else None
    template = metadata.get('tokenizer.chat_template')
    return _checked(backend, bos_id, get('eos_token_id'), get('padding_token_id'), template, where)


def _optional(path: Path) -> Mapping[str, Any]:
    content = storage.read_json(path) if path.exists() else {}
    if not isinstance(content, Mapping):
        raise InputError(f'{path}: holds {type(content).__name__}; allowed: a JSON object.')
    return content


def _ggml(metadata: Mapping[str, Any], key: str, default: Any = None) -> Any:
    return metadata.get(f'tokenizer.ggml.{key}', default)


def _checked(
    backend: tokenizers.Tokenizer,
    bos_id: int | None,
    eos_id: int | None,
    pad_id: int | None,
    chat_template: str | None,
    where: str | os.PathLike,
) -> Tokenizer:
    if eos_id is None:
        raise InputError(f'{where}: the tokenizer names no token that ends a text (eos_token).')
    for role, i in (('bos', bos_id), ('eos', eos_id), ('pad', pad_id)):
        if i is None:
            continue
        # The library takes 32 bits.
        if type(i) is not int or i not in range(2**32) or backend.id_to_token(i) is None:
            raise InputError(f'{where}: the {role} token is id {i!r}, which the vocabulary lacks.')
    return Tokenizer(backend, bos_id, eos_id, pad_id, chat_template)


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise InputError(f'{path}: is no tokenizer of the tokenizers library ({error}).') from error


def _read_sentencepiece(folder: Path) -> tokenizers.Tokenizer:
    path = folder / 'tokenizer.model'
    try:
        import sentencepiece  # noqa: F401  (transformers would look for another format without it)
        from transformers import AutoTokenizer
    except ImportError as error:
        raise InputError(
            f'{path}: reading a SentencePiece model needs the packages transformers, sentencepiece '
            f'and protobuf ({error}); a tokenizer.json beside it needs none.'
        ) from error
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True).backend_tokenizer
    except Exception as error:  # transformers raises many kinds
        raise InputError(f'{path}: transformers cannot read it ({error}).') from error


def _byte_level(
    tokens: Sequence[str], merges: Sequence[str] | None, name: str | None, where: str
) -> tokenizers.Tokenizer:
    """Byte-level BPE: GPT-2's scheme with the text split as `name` (tokenizer.ggml.pre) says."""
    gpt2 = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    llama3 = [
        pre_tokenizers.Split(Regex(LLAMA3_SPLIT), 'isolated'),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    splits = {
        'default': gpt2,
        'gpt-2': gpt2,
        'smollm': [pre_tokenizers.Digits(individual_digits=True), *gpt2],
    } | dict.fromkeys(LLAMA3_NAMES, llama3)
    if name not in splits:
        raise InputError(
            f'{where}: tokenizer.ggml.pre is {name!r}; allowed: {", ".join(sorted(splits))}.'
        )
    if merges is None:
        raise InputError(f'{where}: tokenizer.ggml.merges is missing.')
    pairs = [tuple(merge.split(' ')) for merge in merges]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    try:
        # Llama 3 takes a word that is a token whole, without asking the merges.
        model = models.BPE(vocabulary, pairs, ignore_merges=splits[name] is llama3)
    except Exception as error:  # the library raises bare Exception
        raise InputError(
            f'{where}: tokenizer.ggml.merges does not fit the tokens ({error}).'
        ) from error
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Sequence(splits[name])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(
    tokens: Sequence[str], scores: Sequence[float], types: Sequence[int], prefix: bool
) -> tokenizers.Tokenizer:
    """SentencePiece BPE with byte fallback, as LLaMA 1 and 2 have it."""
    vocabulary = {token: i for i, token in enumerate(tokens)}
    model = models.BPE(
        vocabulary,
        _merges(tokens, scores, types),
        unk_token=tokens[types.index(UNKNOWN)] if UNKNOWN in types else None,
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = tokenizers.Tokenizer(model)
    blanks = [normalizers.Prepend('▁')] * prefix + [normalizers.Replace(' ', '▁')]
    backend.normalizer = normalizers.Sequence(blanks)
    strip = [decoders.Strip(' ', 1, 0)] * prefix
    backend.decoder = decoders.Sequence(
        [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _merges(
    tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]
) -> list[tuple[str, str]]:
    """The merges of SentencePiece: the pair whose joined token has the best score goes first."""
    mergeable = {t: score for t, score, kind in zip(tokens, scores, types) if kind == NORMAL}
    merges = []
    for token in sorted(mergeable, key=mergeable.get, reverse=True):
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        merges += [cut for cut in cuts if cut[0] in mergeable and cut[1] in mergeable]
    return merges
