"""Byte-level BPE: learnt from captions, and OpenAI's for CLIP.

Tokens are strings of letters that each stand for one byte of UTF-8 (GPT-2), so every letter of every script has tokens.
"""

import gzip
import importlib.util
import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from mmssl.data.transforms.captions import clean_caption
from mmssl.errors import UserError

_log = logging.getLogger(__name__)

LONGEST_TOKEN = 32
"""Most bytes of a learnt token: scripts without spaces write a sentence in one run, and it must not be one token."""
_WORDS = r" ?[\p{L}\p{N}][\p{L}\p{M}\p{N}\u200c\u200d]*| ?[^\s\p{L}\p{N}][\p{M}\u200d]*|\s"
"""A run of letters, marks and digits, or one symbol with its marks; each with the space before it."""
_FINAL_SIGMA = r"(?<=\p{L})Σ(?!\p{L})"
_CLIP_MERGES = "bpe_simple_vocab_16e6.txt.gz"
_CLIP_WORDS = 49_152
_CLIP_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_CLIP_ENDS = ("<|startoftext|>", "<|endoftext|>")


def byte_letters() -> list[str]:
    """A letter for each byte, as in GPT-2's vocabulary: printing bytes stand for themselves."""
    printing = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = itertools.count(256)
    return [chr(byte if byte in printing else next(others)) for byte in range(256)]


def train_byte_bpe(
    captions: Iterable[str], vocab_size: int, special_tokens: dict[str, str], lowercase: bool
) -> tokenizers.Tokenizer:
    """Learn a vocabulary of at most `vocab_size` tokens. `special_tokens`, in BERT's roles, get the first ids.

    Deterministic. Decoding gives a caption back, in Unicode's form NFC, and in lower case with `lowercase`. Half of the
    vocabulary holds single bytes. If they do not fit, bytes that are rare in the captions become unknown.

    Raises:
        UserError: the captions contain no words.
    """
    cleaned = filter(None, map(clean_caption, captions))
    first = next(cleaned, None)
    if first is None:
        raise UserError("cannot train a tokenizer: the captions contain no words; check data.captions and the shards")
    unknown = special_tokens["unk_token"]
    backend = tokenizers.Tokenizer(models.BPE(unk_token=unknown, fuse_unk=True))
    backend.normalizer = _normalizer(lowercase)
    split = pre_tokenizers.Split(Regex(_WORDS), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    texts: Iterable[str] = itertools.chain([first], cleaned)
    alphabet = _usable_letters(lowercase)
    if len(alphabet) > vocab_size // 2:
        texts = list(texts)
        alphabet = _frequent_letters(alphabet, map(backend.normalizer.normalize_str, texts), vocab_size // 2)
        _log.warning(
            "a vocabulary of %d tokens cannot hold every letter: some letters that the captions lack are unknown; "
            "%d tokens or more keep every letter of every script",
            vocab_size,
            2 * len(_usable_letters(lowercase)),
        )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens.values()),
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        max_token_length=LONGEST_TOKEN,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    _add_ends(backend, special_tokens["cls_token"], special_tokens["sep_token"])
    return backend


def clip_bpe() -> tokenizers.Tokenizer:
    """OpenAI's CLIP tokenizer (Radford et al. 2021), from the merges shipped with open_clip."""
    package = importlib.util.find_spec("open_clip")
    assert package is not None
    assert package.origin is not None
    lines = gzip.decompress(Path(package.origin).with_name(_CLIP_MERGES).read_bytes()).decode("utf-8").split("\n")
    merges = [(left, right) for left, right in (line.split() for line in lines[1 : _CLIP_WORDS - 256 - 2 + 1])]
    letters = sorted(byte_letters())
    words = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges), *_CLIP_ENDS]
    vocabulary = {word: index for index, word in enumerate(words)}
    unknown = _CLIP_ENDS[1]
    model = models.BPE(vocabulary, merges, unk_token=unknown, continuing_subword_prefix="", end_of_word_suffix="</w>")
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    split = pre_tokenizers.Split(Regex(_CLIP_SPLIT), behavior="removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    _add_ends(backend, *_CLIP_ENDS)
    return backend


def _normalizer(lowercase: bool) -> normalizers.Normalizer:
    """Compose marks (NFC), collapse white space and control characters, and begin with a space."""
    steps = [normalizers.NFC(), normalizers.Replace(Regex(r"[\s\p{Cc}]+"), " "), normalizers.Strip()]
    if lowercase:  # of single letters: without the first step, a Greek word in capitals would end in another sigma
        steps += [normalizers.Replace(Regex(_FINAL_SIGMA), "ς"), normalizers.Lowercase()]
    return normalizers.Sequence([*steps, normalizers.Prepend(" ")])


def _usable_letters(lowercase: bool) -> list[str]:
    """Letters of the bytes that normalised text can hold: no control characters, no byte that UTF-8 never has."""
    letters = byte_letters()
    plain = [byte for byte in range(0x20, 0x7F) if not (lowercase and chr(byte).isupper())]
    return [letters[byte] for byte in (*plain, *range(0x80, 0xC0), *range(0xC2, 0xF5))]


def _frequent_letters(usable: Sequence[str], texts: Iterable[str], most: int) -> list[str]:
    letters, counts = byte_letters(), Counter[int]()
    for text in texts:
        counts.update(text.encode())
    found = {letters[byte]: count for byte, count in counts.items()}
    return sorted(usable, key=lambda letter: (-found.get(letter, 0), letter))[:most]


def _add_ends(backend: tokenizers.Tokenizer, start: str, end: str) -> None:
    ids = [(name, backend.token_to_id(name)) for name in (start, end)]
    backend.post_processor = processors.TemplateProcessing(single=f"{start} $A {end}", special_tokens=ids)
