"""Captions to token ids: a Hugging Face fast tokenizer, loaded or trained."""

import itertools
import json
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers
import torch
from tokenizers import normalizers, pre_tokenizers
from torch import Tensor

from mmssl.data.transforms.byte_bpe import byte_letters, clip_bpe, train_byte_bpe
from mmssl.data.transforms.captions import clean_caption
from mmssl.errors import UserError, panics_as_user_errors

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
TRAINING_CAPTIONS = 1_000_000
"""Largest number of captions that a tokenizer is trained on."""
_CONTINUES = "##"
_CHUNK = 1000
_PUNCTUATION = f"[{re.escape(string.punctuation)}]"
_WITHOUT_SPACES = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")
"""First words of the Unicode names of letters whose scripts put no spaces between words."""


@dataclass(frozen=True)
class CaptionTokens:
    """What a tokenizer makes of N captions, without truncation."""

    lengths: list[int]
    """Tokens of each caption, with its start and end tokens."""
    unknown: list[int]
    """Unknown tokens of each caption."""
    ids: list[tuple[int, ...]]
    """Token ids of each caption, without start and end tokens."""


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
        self.loss_reported = False
        """Whether someone was told that captions are cut or hold unknown tokens. Set by the one who tells."""
        self._unknown_id: int | None = tokenizer.unk_token_id
        self._hugging_face = tokenizer
        self._backend: tokenizers.Tokenizer = tokenizer.backend_tokenizer
        _read_names_as_text(self._backend, tokenizer.unk_token)
        self._backend.enable_truncation(max_tokens)
        self._backend.enable_padding(pad_id=self.pad_id, pad_token=tokenizer.pad_token)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy; the library does not keep this setting."""
        self.__dict__.update(state)
        self._backend.encode_special_tokens = True

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids, int64 [B, L], and a mask, bool [B, L], that is False on padding."""
        return _tensors(self._encode(texts))

    def encode_and_measure(self, texts: Sequence[str]) -> tuple[Tensor, Tensor, CaptionTokens]:
        """As `encode`, with the captions' tokens before truncation."""
        rows = self._encode(texts)
        return *_tensors(rows), self._measure(rows)

    def measure(self, texts: Sequence[str]) -> CaptionTokens:
        """The tokens of captions before truncation."""
        found = CaptionTokens([], [], [])
        for start in range(0, len(texts), _CHUNK):  # each encoding takes a few kilobytes
            part = self._measure(self._encode(texts[start : start + _CHUNK]))
            found.lengths.extend(part.lengths)
            found.unknown.extend(part.unknown)
            found.ids.extend(part.ids)
        return found

    def unknown_parts(self, text: str) -> list[str]:
        """Parts of a caption that become unknown tokens."""
        clean = clean_caption(text)
        row = self._backend.encode(clean, add_special_tokens=False)
        pieces = [row, *row.overflowing]
        return [
            clean[start:stop].strip()
            for piece in pieces
            for token, (start, stop) in zip(piece.ids, piece.offsets, strict=True)
            if token == self._unknown_id and stop > start
        ]

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

    @property
    def vocabulary(self) -> dict[str, int]:
        """Token -> id."""
        found: dict[str, int] = self._hugging_face.get_vocab()
        return found

    @property
    def continues_word(self) -> Tensor:
        """True for tokens that continue the word of the token before them, bool [vocab_size].

        Taken from the marks in the vocabulary: "##" on continuing tokens (WordPiece), or a mark on tokens that begin
        a word (byte-level BPE and SentencePiece). With the latter, letters of scripts without spaces begin a word too.
        Without such marks, every token is a word.
        """
        vocabulary = self.vocabulary
        marks = Counter(token[:1] for token in vocabulary)
        begins = next((mark for mark in ("Ġ", "▁") if marks[mark] > len(vocabulary) // 20), None)
        special = set(self.special_ids)
        continues = torch.zeros(self.vocab_size, dtype=torch.bool)
        bytes_of = {letter: byte for byte, letter in enumerate(byte_letters())} if begins == "Ġ" else None
        for token, index in vocabulary.items():
            if index in special:
                continue
            if begins is None:
                continues[index] = token.startswith(_CONTINUES) and len(token) > len(_CONTINUES)
            else:
                continues[index] = not token.startswith(begins) and not _begins_without_space(token, bytes_of)
        return continues

    def save(self, folder: Path) -> None:
        """Write Hugging Face's tokenizer files, for `load_tokenizer` and AutoTokenizer."""
        self._hugging_face.save_pretrained(str(folder))
        config = folder / "tokenizer_config.json"
        record = json.loads(config.read_text(encoding="utf-8"))
        record["split_special_tokens"] = True
        if record.get("tokenizer_class") == "TokenizersBackend":  # unknown to transformers 4
            record["tokenizer_class"] = "PreTrainedTokenizerFast"
        config.write_text(json.dumps(record, indent=2, ensure_ascii=False), encoding="utf-8")

    def _encode(self, texts: Sequence[str]) -> list[tokenizers.Encoding]:
        with panics_as_user_errors("the tokenizer cannot encode these captions; its patterns may be too complex"):
            rows: list[tokenizers.Encoding] = self._backend.encode_batch_fast([clean_caption(text) for text in texts])
        return rows

    def _measure(self, rows: Sequence[tokenizers.Encoding]) -> CaptionTokens:
        ends = self._backend.num_special_tokens_to_add(False)
        ids = [
            tuple(
                token
                for part in (row, *row.overflowing)
                for token, added in zip(part.ids, part.special_tokens_mask, strict=True)
                if not added
            )
            for row in rows
        ]
        return CaptionTokens([len(row) + ends for row in ids], [row.count(self._unknown_id) for row in ids], ids)


def load_tokenizer(name_or_folder: str, max_tokens: int) -> Tokenizer:
    """Load a fast tokenizer from a local folder or the hub, or OpenAI's for `clip`. The local cache is tried first.

    Raises:
        UserError: the tokenizer is missing, or has no fast form or no padding token.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if name_or_folder == "clip":
        end = "<|endoftext|>"
        special = {"bos_token": "<|startoftext|>", "eos_token": end, "unk_token": end, "pad_token": end}
        clip = PreTrainedTokenizerFast(tokenizer_object=clip_bpe(), model_max_length=max_tokens, **special)
        return Tokenizer(clip, max_tokens)
    folder = Path(name_or_folder)
    if folder.is_dir() and not any(folder.glob("*token*")) and not any(folder.glob("vocab*")):
        raise UserError(f"folder {folder} holds no tokenizer; it needs tokenizer.json and tokenizer_config.json")
    if not folder.is_dir() and (folder.is_absolute() or name_or_folder.startswith(".")):
        raise UserError(f"no tokenizer folder at {folder}; correct the path")
    try:
        try:
            loaded = AutoTokenizer.from_pretrained(name_or_folder, local_files_only=True, trust_remote_code=False)
        except OSError:
            if folder.is_dir():
                raise
            loaded = AutoTokenizer.from_pretrained(name_or_folder, trust_remote_code=False)
    except Exception as error:  # the library raises many kinds on missing, broken and remote-code tokenizers
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"no usable tokenizer at {name_or_folder!r}, neither in a folder nor on the hub: {reason}"
        ) from error
    if not isinstance(loaded, PreTrainedTokenizerFast):
        raise UserError(f"tokenizer {name_or_folder!r} has no fast form; save one as tokenizer.json")
    return Tokenizer(loaded, max_tokens)


def train_tokenizer(captions: Iterable[str], vocab_size: int, max_tokens: int, *, lowercase: bool = True) -> Tokenizer:
    """Train a byte-level BPE tokenizer with BERT's special tokens. It keeps every letter and mark of every script.

    Deterministic. At most a million captions are read. Below 420 tokens, letters that are rare in them become unknown.

    Raises:
        UserError: the captions contain no words.
    """
    from transformers import PreTrainedTokenizerFast

    backend = train_byte_bpe(itertools.islice(captions, TRAINING_CAPTIONS), vocab_size, SPECIAL_TOKENS, lowercase)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=max_tokens,
        clean_up_tokenization_spaces=False,
        **SPECIAL_TOKENS,
    )
    return Tokenizer(wrapped, max_tokens)


def _tensors(rows: Sequence[tokenizers.Encoding]) -> tuple[Tensor, Tensor]:
    if not rows:
        return torch.zeros(0, 0, dtype=torch.int64), torch.zeros(0, 0, dtype=torch.bool)
    tokens = np.array([row.ids for row in rows], dtype=np.int64)
    mask = np.array([row.attention_mask for row in rows], dtype=np.bool_)
    return torch.from_numpy(tokens), torch.from_numpy(mask)


def _read_names_as_text(backend: tokenizers.Tokenizer, unknown: str | None) -> None:
    """Make the names of special tokens in captions, such as "[SEP]", ordinary text.

    Some vocabularies (Unigram) hold the names as pieces. There, each name is split after its first letter.
    """
    backend.encode_special_tokens = True
    backend.no_padding()
    names = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
    found = [backend.token_to_id(name) in backend.encode(name, add_special_tokens=False).ids for name in names]
    if not any(taken for name, taken in zip(names, found, strict=True) if name != unknown):
        return
    first = "|".join(f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in names if len(name) > 1)
    split, own = pre_tokenizers.Split(tokenizers.Regex(first), behavior="isolated"), backend.pre_tokenizer
    backend.pre_tokenizer = split if own is None else pre_tokenizers.Sequence([own, split])


def _begins_without_space(token: str, bytes_of: dict[str, int] | None) -> bool:
    """Whether a token begins with a letter of a script without spaces. `bytes_of`: byte of each byte-level letter."""
    if bytes_of is not None:
        content = bytes(bytes_of[letter] for letter in token if letter in bytes_of)
        # A token may end within a letter. Its first bytes tell the script, whatever follows.
        token = (content + b"\xa4\xa4\xa4").decode(errors="replace")
    return unicodedata.name(token[:1] or " ", "").startswith(_WITHOUT_SPACES)


def _first(*candidates: int | None) -> int | None:
    return next((candidate for candidate in candidates if candidate is not None), None)
