"""What ranks of tests import sooner or later, also lazily. Nothing here computes: threads do not survive a fork."""

import accelerate
import open_clip
import timm
import torch._dynamo
import torch.distributed.fsdp
import torch.nn.parallel
import transformers.models.bert.modeling_bert

import mmssl.train.trainer

__all__ = ["accelerate", "mmssl", "open_clip", "timm", "torch", "transformers"]
