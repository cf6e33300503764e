"""Text towers of every kind do what the tower promises, whatever transformers calls their parts."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules
from torch import Tensor, nn

from mmssl.config import TextConfig
from mmssl.errors import UserError
from mmssl.models.text import TextTower, length_groups
from mmssl.models.text_factory import build_text
from mmssl.models.vision import Encoded
from tests.helpers.tower_types import CAUSAL, TEXT, text_config

LENGTHS = (77, 20, 7)


def build(config: TextConfig) -> TextTower:
    torch.manual_seed(0)
    return build_text(config, vocab_size=300, pad_id=0).eval()


def captions() -> tuple[Tensor, Tensor]:
    """Captions of LENGTHS tokens with padding 0."""
    mask = torch.arange(77) < torch.tensor(LENGTHS).unsqueeze(1)
    tokens = torch.randint(5, 300, mask.shape, generator=torch.Generator().manual_seed(1))
    return tokens.masked_fill(~mask, 0), mask


@pytest.mark.parametrize(
    "kind",
    [
        "roberta",
        "xlm-roberta",
        "camembert",
        "xmod",
        "data2vec-text",
        "roberta-prelayernorm",
        "ibert",
        "mpnet",
        "luke",
        "t5",
        "mt5",
        "umt5",
        "bart",
        "mbart",
        "canine",
        "convbert",
        "fnet",
        "siglip_text_model",
        "siglip2_text_model",
        "chinese_clip_text_model",
        "metaclip_2_text_model",
        "flava_text_model",
        "altclip_text_model",
        "blip_text_model",
        "gpt2",
        "llama",
        "xlnet",
    ],
)
def test_a_caption_has_the_same_vector_in_every_batch(kind: str) -> None:
    """Up to the longest caption (77 tokens in a tower of 77 positions), each caption alone gives what it gives in a
    batch; and after saving and loading the weights."""
    for pooling in ("mean", "auto"):
        tower = build(text_config(kind, pooling))
        tokens, mask = captions()
        with torch.no_grad():
            together = tower(tokens, mask).pooled
            alone = torch.cat([tower(tokens[i : i + 1, :n], mask[i : i + 1, :n]).pooled for i, n in enumerate(LENGTHS)])
            torch.testing.assert_close(alone, together, atol=1e-5 * float(together.abs().max()), rtol=1e-4)
            assert together.shape == (3, tower.width)
            other = build(text_config(kind, pooling))
            for parameter in other.parameters():
                parameter.add_(0.1)
            other.load_state_dict({name: tensor.clone() for name, tensor in tower.state_dict().items()})
            assert torch.equal(other(tokens, mask).pooled, together)


@pytest.mark.parametrize("pooling", ["mean", "cls", "eos"])
@pytest.mark.parametrize("kind", ["bert", "roberta", "t5", "modernbert", "gpt2"])
def test_groups_of_like_length_change_nothing(kind: str, pooling: str) -> None:
    """A batch that is split by length gives the vectors and the gradients of the unsplit one."""
    tower = build(text_config(kind, pooling))
    lengths = torch.randint(2, 78, (64,), generator=torch.Generator().manual_seed(2))
    mask = torch.arange(77) < lengths.unsqueeze(1)
    tokens = torch.randint(5, 300, mask.shape, generator=torch.Generator().manual_seed(3)).masked_fill(~mask, 0)
    assert [len(rows) for rows, _ in length_groups(mask)] == [16, 16, 16, 16]
    cotangent = torch.randn(64, tower.width, generator=torch.Generator().manual_seed(4))
    found: list[tuple[Tensor, Tensor, list[Tensor]]] = []
    for encoded in (tower(tokens, mask), Encoded(*tower._encode(tokens, mask))):
        assert encoded.tokens is not None
        hidden = encoded.tokens * mask.unsqueeze(-1)
        tower.zero_grad()
        ((encoded.pooled * cotangent).sum() + hidden.square().sum()).backward()
        found.append((encoded.pooled, hidden, [p.grad for p in tower.parameters() if p.grad is not None]))
    torch.testing.assert_close(found[0][:2], found[1][:2], atol=1e-5, rtol=1e-4)
    scale = max(float(grad.abs().max()) for grad in found[1][2])
    torch.testing.assert_close(found[0][2], found[1][2], atol=1e-5 * scale, rtol=1e-3)


@given(st.lists(st.integers(0, 60), min_size=1, max_size=120))
def test_groups_hold_every_caption_whole(lengths: list[int]) -> None:
    """Each row is in one group, no caption is longer than its group, groups ascend, and at least a fifth is saved."""
    mask = torch.arange(60) < torch.tensor(lengths).unsqueeze(1)
    groups = length_groups(mask)
    if not groups:
        return
    assert sorted(row for rows, _ in groups for row in rows.tolist()) == list(range(len(lengths)))
    assert all(lengths[row] <= longest for rows, longest in groups for row in rows.tolist())
    assert [longest for _, longest in groups] == sorted(longest for _, longest in groups)
    assert sum(len(rows) * longest for rows, longest in groups) <= 0.8 * mask.numel()


def test_few_or_equal_captions_are_not_split() -> None:
    """Captions of one length, and fewer than 32, stay one batch."""
    assert length_groups(torch.ones(64, 20, dtype=torch.bool)) == []
    assert length_groups(torch.arange(20) < torch.tensor([[1]] * 30 + [[20]])) == []


@pytest.mark.parametrize("kind", sorted(CAUSAL))
def test_causal_models_pool_their_last_token(kind: str) -> None:
    """`auto` is `eos` exactly for the models whose first token sees nothing else, so that captions differ."""
    tower = build(text_config(kind))
    assert tower.pooling == "eos"
    tokens, mask = captions()
    tokens[:, 0] = 7
    with torch.no_grad():
        rows = torch.nn.functional.normalize(tower(tokens, mask).pooled, dim=-1)
    assert float((rows[0] - rows[1]).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "deberta-v2", "modernbert", "electra", "xlnet"])
def test_bidirectional_models_pool_their_first_token(kind: str) -> None:
    """`auto` stays `cls` for encoders whose tokens see each other."""
    assert build(text_config(kind)).pooling == "cls"


@pytest.mark.parametrize("kind", ["t5", "mt5", "umt5", "bart", "mbart"])
def test_encoder_decoders_give_their_encoder(kind: str, tmp_path: Path) -> None:
    """The tower holds the encoder only, each weight once, and equals transformers' own encoder to 1e-6, from a
    configuration and from a folder of the whole model."""
    config = text_config(kind, "mean")
    tower = build(config)
    assert not any("decoder" in name for name, _ in tower.named_parameters())
    pointers = [tensor.data_ptr() for tensor in tower.state_dict().values()]
    assert len(set(pointers)) == len(pointers)
    settings = dict(TEXT[kind])
    torch.manual_seed(3)
    whole: Any = transformers.AutoModel.from_config(
        transformers.AutoConfig.for_model(kind, vocab_size=512, pad_token_id=0, **settings)
    ).eval()
    whole.save_pretrained(tmp_path)
    loaded = build(TextConfig(name=str(tmp_path), pooling="mean"))
    tokens, mask = captions()
    with torch.no_grad():
        hidden = whole.get_encoder()(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        torch.testing.assert_close(loaded(tokens, mask).tokens, hidden, atol=1e-6, rtol=1e-5)
    again = build(loaded.to_config("train", 77))
    again.load_state_dict(loaded.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(again(tokens, mask).pooled, loaded(tokens, mask).pooled)


@pytest.mark.parametrize(
    ("whole", "part"),
    [
        ("SiglipModel", "siglip"),
        ("Siglip2Model", "siglip2"),
        ("CLIPModel", "clip"),
        ("ChineseCLIPModel", "chinese_clip"),
        ("MetaClip2Model", "metaclip_2"),
        ("FlavaModel", "flava"),
        ("AltCLIPModel", "altclip"),
        ("BlipModel", "blip"),
        ("GroupViTModel", "groupvit"),
    ],
)
def test_the_text_half_of_an_image_text_model(whole: str, part: str, tmp_path: Path) -> None:
    """A folder of the whole model gives its text half: the token vectors of transformers' own, to 1e-6."""
    kind: Any = getattr(transformers, whole)
    half = f"{part}_text_model"
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 300, "max_position_embeddings": 80, "project_dim": 32, "projection_size": 32}
    torch.manual_seed(3)
    config = kind.config_class(text_config=text, vision_config={**sizes, "image_size": 32, "patch_size": 16})
    theirs = kind(config).eval()
    theirs.save_pretrained(tmp_path)
    tower = build(TextConfig(name=str(tmp_path), pooling="mean", max_tokens=64))
    assert tower.encoder.config.model_type == half
    tokens, mask = captions()
    tokens, mask = tokens[:, :64], mask[:, :64]
    with torch.no_grad():
        hidden = theirs.text_model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        torch.testing.assert_close(tower(tokens, mask).tokens, hidden, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("kind", "whole"), [("siglip", "SiglipModel"), ("siglip2", "Siglip2Model")])
def test_siglips_own_vector_is_that_of_padded_captions(kind: str, whole: str, tmp_path: Path) -> None:
    """`auto` for SigLIP's text half equals transformers' text features of captions padded as in its training."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 300, "max_position_embeddings": 24, "projection_size": 32, "pad_token_id": 0}
    model: Any = getattr(transformers, whole)
    torch.manual_seed(3)
    theirs = model(model.config_class(text_config=text, vision_config={**sizes, "image_size": 32})).eval()
    theirs.save_pretrained(tmp_path)
    tower = build(TextConfig(name=str(tmp_path), max_tokens=24))
    tokens, mask = captions()
    tokens, mask = tokens[1:, :20], mask[1:, :20]
    with torch.no_grad():
        expected = theirs.text_model(input_ids=torch.nn.functional.pad(tokens, (0, 4))).pooler_output
        torch.testing.assert_close(tower(tokens, mask).pooled, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bert", "qwen3", "t5", "clip_text_model"])
def test_weights_stored_in_half_precision_are_read_as_float32(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Every weight is the stored one, in float32."""
    settings = transformers.AutoConfig.for_model(kind, vocab_size=300, pad_token_id=0, **TEXT[kind])
    stored: Any = transformers.AutoModel.from_config(settings).to(dtype)
    stored.save_pretrained(tmp_path)
    tower = build(TextConfig(name=str(tmp_path), pooling="mean"))
    assert {parameter.dtype for parameter in tower.parameters()} == {torch.float32}
    theirs = (stored.get_encoder() if kind == "t5" else stored).state_dict()
    ours = tower.encoder.state_dict()
    assert all(torch.equal(tensor, theirs[name].float()) for name, tensor in ours.items())


def test_the_width_is_that_of_the_vectors() -> None:
    """OPT-350m's encoder ends in a projection to half of its hidden size."""
    tower = build(text_config("opt (projects inside)", "mean"))
    assert tower.width == 32 != tower.encoder.config.hidden_size


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"pooling_mode": "lasttoken"}, "eos"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": "cls"}, "cls"),
        ({"pooling_mode": ["mean"]}, "mean"),
        ({"pooling_mode_cls_token": False, "pooling_mode_lasttoken": True}, "eos"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode": "max"}, None),
        ({"pooling_mode_max_tokens": True}, None),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, None),
    ],
)
@pytest.mark.parametrize("place", ["1_Pooling", "pooling"])
def test_a_sentence_transformers_folder_is_pooled_as_it_declares(
    record: dict[str, Any], expected: str | None, place: str, tmp_path: Path
) -> None:
    """Both forms of the declaration, in the folder that modules.json names; other poolings are refused by name."""
    settings = transformers.AutoConfig.for_model("bert", vocab_size=300, **TEXT["bert"])
    transformers.AutoModel.from_config(settings).save_pretrained(tmp_path)
    (tmp_path / place).mkdir()
    (tmp_path / place / "config.json").write_text(json.dumps(record))
    modules = [{"path": "", "type": "sentence_transformers.models.Transformer"}]
    modules += [{"path": place, "type": "sentence_transformers.models.Pooling"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    if expected is None:
        with pytest.raises(UserError, match="declares the pooling"):
            build(TextConfig(name=str(tmp_path)))
    else:
        assert build(TextConfig(name=str(tmp_path))).pooling == expected


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "apple", "on", "the", "table"]
LINES = ["a red apple", "the table", "a apple on the red table"]


def sentence_model(folder: Path, *more: nn.Module) -> SentenceTransformer:
    """A tiny random model of sentence-transformers: BERT, the mean over tokens, and more modules; saved as `whole`."""
    plain = folder / "plain"
    torch.manual_seed(0)
    settings = transformers.AutoConfig.for_model("bert", **{**TEXT["bert"], "vocab_size": len(WORDS)})
    transformers.AutoModel.from_config(settings).save_pretrained(plain)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.TemplateProcessing(
        "[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(plain)
    parts = [modules.Transformer(str(plain)), modules.Pooling(64, pooling_mode="mean"), *more]
    model = SentenceTransformer(modules=parts, device="cpu")
    model.save(str(folder / "whole"), create_model_card=False)
    return model


def encoded(folder: Path, **options: Any) -> Tensor:
    """Unit vectors of LINES by the tower of the folder."""
    found = transformers.AutoTokenizer.from_pretrained(folder)(LINES, padding=True, return_tensors="pt")
    tower = build_text(TextConfig(name=str(folder), **options), vocab_size=len(WORDS), pad_id=0).eval()
    with torch.no_grad():
        pooled = tower(found["input_ids"], found["attention_mask"].bool()).pooled
    return torch.nn.functional.normalize(pooled, dim=-1)


def test_a_sentence_transformers_model_gives_its_own_vectors(tmp_path: Path) -> None:
    """With its normalisation, to 1e-5. Its dropout is off."""
    model = sentence_model(tmp_path, modules.Dropout(0.5), modules.Normalize())
    expected = torch.from_numpy(model.encode(LINES))
    torch.testing.assert_close(encoded(tmp_path / "whole"), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layer", ["Dense", "LayerNorm"])
def test_layers_after_the_pooling_are_refused_and_not_left_out_in_silence(layer: str, tmp_path: Path) -> None:
    """One line names them and the setting that uses the model without them; then it gives the vectors without them."""
    own = modules.Dense(64, 16) if layer == "Dense" else modules.LayerNorm(64)
    model = sentence_model(tmp_path, own, modules.Normalize())
    with pytest.raises(UserError, match=rf"\({layer}\), .* set model.text.pooling=mean") as error:
        encoded(tmp_path / "whole")
    assert "\n" not in str(error.value)
    expected = torch.from_numpy(SentenceTransformer(modules=[model[0], model[1]], device="cpu").encode(LINES))
    without = encoded(tmp_path / "whole", pooling="mean")
    torch.testing.assert_close(without, torch.nn.functional.normalize(expected, dim=-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["albert", "mpnet", "squeezebert", "xlm", "openai-gpt"])
def test_checkpointing_is_refused_by_towers_without_it(kind: str) -> None:
    """One line that names the setting, not an error of the library."""
    with pytest.raises(UserError, match="train.activation_checkpointing: a .* does not support it"):
        build(text_config(kind, "mean")).checkpoint_activations()


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5", "bart", "albert", "xlm", "llama", "canine", "clip_text_model"])
@pytest.mark.parametrize("count", [1, 2, 99])
def test_the_last_layers_are_unlocked(kind: str, count: int) -> None:
    """With more layers than there are all weights are free, embeddings too; with fewer the embeddings stay, and the
    last block and the norm behind it are free."""
    config = text_config(kind, "mean").model_copy(update={"lock": True, "unlocked_layers": count})
    tower = build(config)
    free = {name for name, parameter in tower.named_parameters() if parameter.requires_grad}
    if count == 99:
        assert free == {name for name, _ in tower.named_parameters()}
        return
    embedding = tower.encoder.get_input_embeddings
    assert free
    if kind not in ("albert", "canine"):  # all layers are one; hashes in place of a vocabulary
        assert not embedding().weight.requires_grad
        assert any(f".{2 - count}." in name for name in free)
    ends = {"gpt2": "ln_f", "llama": "encoder.norm", "t5": "final_layer_norm", "clip_text_model": "final_layer_norm"}
    assert kind not in ends or any(ends[kind] in name for name in free)


def test_an_own_pooled_vector_that_is_missing_is_named() -> None:
    """`pooler` for an encoder without one."""
    with pytest.raises(UserError, match="pooling=pooler: a 'gpt2' has no pooled vector"):
        build(text_config("gpt2", "pooler"))
