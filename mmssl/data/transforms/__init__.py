"""From encoded bytes to tensors: decoding, views, augmentation, captions and tokenizers.

`Renderer` makes the inputs of training, `EvalView` those of evaluation and inference.
"""

from mmssl.data.transforms import captions, decoding, views
from mmssl.data.transforms.augment import finish_views
from mmssl.data.transforms.caps import DecodeError
from mmssl.data.transforms.decoding import Pixels
from mmssl.data.transforms.render import Rendered, Renderer
from mmssl.data.transforms.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from mmssl.data.transforms.views import EvalView

__all__ = [
    "DecodeError",
    "EvalView",
    "Pixels",
    "Rendered",
    "Renderer",
    "Tokenizer",
    "captions",
    "decoding",
    "finish_views",
    "load_tokenizer",
    "train_tokenizer",
    "views",
]
