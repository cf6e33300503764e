"""Captions to token ids: a Hugging Face fast tokenizer, loaded or trained."""

import gzip
import importlib.util
import json
import re
import string
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from mmssl.data.transforms.captions import clean_caption
from mmssl.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
"""BERT's special tokens; a trained tokenizer gives them the ids 0 to 4."""
_CONTINUES = "##"
_CHUNK = 1000
_PUNCTUATION = f"[{re.escape(string.punctuation)}]"
_CLIP_MERGES = "bpe_simple_vocab_16e6.txt.gz"
_CLIP_WORDS = 49_152
_CLIP_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Tokenizer:
    """Cleans captions, truncates them to `max_tokens` (the end token stays) and pads a batch to its longest."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", max_tokens: int) -> None:
        """Raise UserError if the tokenizer has no padding token."""
        if tokenizer.pad_token_id is None:
            raise UserError(
                f"tokenizer {tokenizer.name_or_path!r} has no padding token; add pad_token to its tokenizer_config.json"
            )
        self.max_tokens = max_tokens
        self.vocab_size = len(tokenizer)
        """Number of token ids, including special tokens."""
        self.pad_id: int = tokenizer.pad_token_id
        self.cls_id: int | None = _first(tokenizer.cls_token_id, tokenizer.bos_token_id)
        """Token at the start of every caption, if any."""
        self.sep_id: int | None = _first(tokenizer.sep_token_id, tokenizer.eos_token_id)
        """Token at the end of every caption, if any."""
        self.mask_id: int | None = tokenizer.mask_token_id
        self.special_ids: list[int] = sorted(set(tokenizer.all_special_ids))
        self._hugging_face = tokenizer
        self._backend: tokenizers.Tokenizer = tokenizer.backend_tokenizer
        self._backend.enable_truncation(max_tokens)
        self._backend.enable_padding(pad_id=self.pad_id, pad_token=tokenizer.pad_token)

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids, int64 [B, L], and a mask, bool [B, L], that is False on padding."""
        if not texts:
            return torch.zeros(0, 0, dtype=torch.int64), torch.zeros(0, 0, dtype=torch.bool)
        rows = self._backend.encode_batch_fast([clean_caption(text) for text in texts])
        tokens = np.array([row.ids for row in rows], dtype=np.int64)
        mask = np.array([row.attention_mask for row in rows], dtype=np.bool_)
        return torch.from_numpy(tokens), torch.from_numpy(mask)

    def drop_punctuation(self) -> None:
        """Lower-case captions and drop their punctuation first: SigLIP's canonical form (big_vision).

        This lasts, and is saved with the tokenizer.
        """
        steps = [
            normalizers.Replace("_", " "),
            normalizers.Replace(tokenizers.Regex(_PUNCTUATION), ""),
            normalizers.Lowercase(),
            normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
        own = self._backend.normalizer
        self._backend.normalizer = normalizers.Sequence([*steps, *([] if own is None else [own])])

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Number of tokens of each caption without truncation, including its start and end tokens."""
        ends, found = self._backend.num_special_tokens_to_add(False), []
        for start in range(0, len(texts), _CHUNK):  # each encoding takes a few kilobytes
            rows = self._backend.encode_batch_fast([clean_caption(text) for text in texts[start : start + _CHUNK]])
            found += [
                sum(row.attention_mask) + sum(sum(rest.attention_mask) - ends for rest in row.overflowing)
                for row in rows
            ]
        return found

    @property
    def vocabulary(self) -> dict[str, int]:
        """Token -> id."""
        found: dict[str, int] = self._hugging_face.get_vocab()
        return found

    @property
    def continues_word(self) -> Tensor:
        """True for tokens that continue the word of the token before them, bool [vocab_size].

        Taken from the marks in the vocabulary: "##" on continuing tokens (WordPiece), or a mark on tokens that begin
        a word (byte-level BPE and SentencePiece). Without such marks, every token is a word.
        """
        vocabulary = self.vocabulary
        marks = Counter(token[:1] for token in vocabulary)
        begins = next((mark for mark in ("Ġ", "▁") if marks[mark] > len(vocabulary) // 20), None)
        special = set(self.special_ids)
        continues = torch.zeros(self.vocab_size, dtype=torch.bool)
        for token, index in vocabulary.items():
            if index in special:
                continue
            if begins is None:
                continues[index] = token.startswith(_CONTINUES) and len(token) > len(_CONTINUES)
            else:
                continues[index] = not token.startswith(begins)
        return continues

    def save(self, folder: Path) -> None:
        """Write Hugging Face's tokenizer files, for `load_tokenizer` and AutoTokenizer."""
        self._hugging_face.save_pretrained(str(folder))
        config = folder / "tokenizer_config.json"
        record = json.loads(config.read_text(encoding="utf-8"))
        if record.get("tokenizer_class") == "TokenizersBackend":  # unknown to transformers 4
            record["tokenizer_class"] = "PreTrainedTokenizerFast"
            config.write_text(json.dumps(record, indent=2, ensure_ascii=False), encoding="utf-8")


def load_tokenizer(name_or_folder: str, max_tokens: int) -> Tokenizer:
    """Load a fast tokenizer from a local folder or the hub, or OpenAI's for `clip`. The local cache is tried first.

    Raises:
        UserError: the tokenizer is missing, or has no fast form or no padding token.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if name_or_folder == "clip":
        return Tokenizer(_clip_tokenizer(max_tokens), max_tokens)
    folder = Path(name_or_folder)
    if folder.is_dir() and not any(folder.glob("*token*")) and not any(folder.glob("vocab*")):
        raise UserError(f"folder {folder} holds no tokenizer; it needs tokenizer.json and tokenizer_config.json")
    if not folder.is_dir() and (folder.is_absolute() or name_or_folder.startswith(".")):
        raise UserError(f"no tokenizer folder at {folder}; correct the path")
    try:
        try:
            loaded = AutoTokenizer.from_pretrained(name_or_folder, local_files_only=True)
        except OSError:
            if folder.is_dir():
                raise
            loaded = AutoTokenizer.from_pretrained(name_or_folder)
    except Exception as error:  # the library raises many kinds on missing, broken and remote-code tokenizers
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"no usable tokenizer at {name_or_folder!r}, neither in a folder nor on the hub: {reason}"
        ) from error
    if not isinstance(loaded, PreTrainedTokenizerFast):
        raise UserError(f"tokenizer {name_or_folder!r} has no fast form; save one as tokenizer.json")
    return Tokenizer(loaded, max_tokens)


def train_tokenizer(captions: Iterable[str], vocab_size: int, max_tokens: int) -> Tokenizer:
    """Train a lower-cased WordPiece tokenizer in BERT's form: "##" marks tokens that continue a word.

    Deterministic. The alphabet has at most `vocab_size // 4` characters; words with rarer characters become [UNK].

    Raises:
        UserError: the captions contain no words.
    """
    words = _count_words(captions)
    if not words:
        raise UserError("cannot train a tokenizer: the captions contain no words; check data.captions and the shards")
    letters = Counter[str]()
    for word, count in words.items():
        for letter in word:
            letters[letter] += count
    ranked = sorted(letters, key=lambda letter: (-letters[letter], letter))
    alphabet = set(ranked[: vocab_size // 4])
    # The trainer numbers continuing letters in the order of a hash map, which differs between runs. As special tokens
    # they get fixed ids, which also decide between equally frequent merges.
    fixed = [*SPECIAL_TOKENS.values(), *(_CONTINUES + letter for letter in sorted(alphabet))]
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token=SPECIAL_TOKENS["unk_token"]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=fixed, show_progress=False)
    backend.train_from_iterator(_repeat(words, alphabet), trainer)
    return Tokenizer(_bert_tokenizer(backend.get_vocab(), max_tokens), max_tokens)


def _clip_tokenizer(max_tokens: int) -> "PreTrainedTokenizerFast":
    """OpenAI's CLIP tokenizer (Radford et al. 2021), from the merges shipped with open_clip."""
    from transformers import PreTrainedTokenizerFast

    package = importlib.util.find_spec("open_clip")
    assert package is not None
    assert package.origin is not None
    lines = gzip.decompress(Path(package.origin).with_name(_CLIP_MERGES).read_bytes()).decode("utf-8").split("\n")
    merges = [(left, right) for left, right in (line.split() for line in lines[1 : _CLIP_WORDS - 256 - 2 + 1])]
    letters = _byte_letters()
    start, end = "<|startoftext|>", "<|endoftext|>"
    words = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges), start, end]
    vocabulary = {word: index for index, word in enumerate(words)}
    model = models.BPE(vocabulary, merges, unk_token=end, continuing_subword_prefix="", end_of_word_suffix="</w>")
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    split = pre_tokenizers.Split(tokenizers.Regex(_CLIP_SPLIT), behavior="removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    ends = [(start, vocabulary[start]), (end, vocabulary[end])]
    backend.post_processor = processors.TemplateProcessing(single=f"{start} $A {end}", special_tokens=ends)
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=max_tokens, **special)


def _byte_letters() -> list[str]:
    """A letter for each byte, as in GPT-2's vocabulary: printing bytes come first and stand for themselves."""
    printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printing]
    return [chr(byte) for byte in printing] + [chr(256 + place) for place in range(len(others))]


def _first(*candidates: int | None) -> int | None:
    return next((candidate for candidate in candidates if candidate is not None), None)


def _count_words(captions: Iterable[str]) -> Counter[str]:
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    words = Counter[str]()
    for caption in captions:
        normal = normalizer.normalize_str(clean_caption(caption))
        words.update(word for word, _ in splitter.pre_tokenize_str(normal))
    return words


def _repeat(words: Counter[str], alphabet: set[str]) -> Iterator[str]:
    """Every word as often as it was counted, in lines of up to 1,000 words."""
    for word, count in words.items():
        if alphabet.issuperset(word):
            for start in range(0, count, _CHUNK):
                yield " ".join([word] * min(_CHUNK, count - start))


def _bert_tokenizer(vocabulary: dict[str, int], max_tokens: int) -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    special = SPECIAL_TOKENS
    model = models.WordPiece(vocabulary, unk_token=special["unk_token"], continuing_subword_prefix=_CONTINUES)
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix=_CONTINUES)
    ends = [(special[name], vocabulary[special[name]]) for name in ("cls_token", "sep_token")]
    backend.post_processor = processors.TemplateProcessing(single=f"{ends[0][0]} $A {ends[1][0]}", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=max_tokens, **special)
