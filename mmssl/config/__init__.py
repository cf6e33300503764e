"""The configuration: one YAML file and `key=value` overrides become one frozen, typed `Config`.

Runtime values (device, rank, number of samples) never live here; they are passed where things are built.
"""

from mmssl.config.config import Config
from mmssl.config.data import CacheConfig, DataConfig, HoldOutConfig, SourceConfig, ViewConfig
from mmssl.config.evaluate import EvaluateConfig, SuiteConfig
from mmssl.config.load import (
    dump_config,
    known_keys,
    load_config,
    parse_config,
    parse_override,
    preset_names,
    preset_text,
    read_tree,
    set_key,
)
from mmssl.config.model import LoraConfig, ModelConfig, TextConfig, VisionConfig
from mmssl.config.train import (
    EarlyStoppingConfig,
    GuardConfig,
    Length,
    MixerConfig,
    ObjectiveConfig,
    OptimConfig,
    TrainConfig,
)

__all__ = [
    "CacheConfig",
    "Config",
    "DataConfig",
    "EarlyStoppingConfig",
    "EvaluateConfig",
    "GuardConfig",
    "HoldOutConfig",
    "Length",
    "LoraConfig",
    "MixerConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "SourceConfig",
    "SuiteConfig",
    "TextConfig",
    "TrainConfig",
    "ViewConfig",
    "VisionConfig",
    "dump_config",
    "known_keys",
    "load_config",
    "parse_config",
    "parse_override",
    "preset_names",
    "preset_text",
    "read_tree",
    "set_key",
]
