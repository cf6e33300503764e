"""Train image-text dual encoders with contrastive and self-supervised objectives, and use them."""

from mmssl.model import MMSSL, load

__all__ = ["MMSSL", "load"]
