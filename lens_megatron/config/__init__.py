"""A YAML file and overrides become one validated, frozen `Config`. Every option is declared in options.py, once."""

from lens_megatron.config.files import ConfigError
from lens_megatron.config.loading import all_options, from_tree, load, sections
from lens_megatron.config.options import (
    AlgorithmConfig,
    ClusterConfig,
    Config,
    DataConfig,
    DebugConfig,
    LensConfig,
    MegatronConfig,
    ModelConfig,
    OptimizerConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
    VllmConfig,
)
from lens_megatron.config.rules import check_world

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
    "TrainConfig",
    "VllmConfig",
    "all_options",
    "check_world",
    "from_tree",
    "load",
    "sections",
]
