"""The configuration: one YAML file and `key=value` overrides become one frozen, typed `Config`.

Runtime values (device, rank, number of samples) never live here; they are passed where things are built.
"""

from mmssl.config.data import DataConfig, SourceConfig, ViewConfig
from mmssl.config.evaluate import EvaluateConfig, SuiteConfig, TaskName
from mmssl.config.model import LoraConfig, ModelConfig, TextConfig, VisionConfig
from mmssl.config.objectives import MixerConfig, ObjectiveConfig
from mmssl.config.read import (
    dump_config,
    known_keys,
    load_config,
    parse_config,
    parse_override,
    read_tree,
    set_key,
)
from mmssl.config.train import OptimConfig, TrainConfig
from mmssl.config.whole import Config

__all__ = [
    "Config",
    "DataConfig",
    "EvaluateConfig",
    "LoraConfig",
    "MixerConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "SourceConfig",
    "SuiteConfig",
    "TaskName",
    "TextConfig",
    "TrainConfig",
    "ViewConfig",
    "VisionConfig",
    "dump_config",
    "known_keys",
    "load_config",
    "parse_config",
    "parse_override",
    "read_tree",
    "set_key",
]
