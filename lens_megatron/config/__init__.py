"""A YAML file and overrides become one validated, frozen `Config`. Every option is declared in options.py, once."""

from lens_megatron.config.files import ConfigError
from lens_megatron.config.loading import all_options, from_tree, load, sections
from lens_megatron.config.method_options import AlgorithmConfig, LensConfig, RewardConfig, SelectionConfig
from lens_megatron.config.options import (
    ClusterConfig,
    Config,
    DataConfig,
    DebugConfig,
    MegatronConfig,
    ModelConfig,
    OptimizerConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
    VllmConfig,
)
from lens_megatron.config.rules import check_world
from lens_megatron.config.section import Section

__all__ = [
    "AlgorithmConfig",
    "ClusterConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "DebugConfig",
    "LensConfig",
    "MegatronConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "Section",
    "SelectionConfig",
    "TrainConfig",
    "VllmConfig",
    "all_options",
    "check_world",
    "from_tree",
    "load",
    "sections",
]
