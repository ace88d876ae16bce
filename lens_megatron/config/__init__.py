"""A YAML file and overrides become one validated, frozen `Config`: every option stands in options.py, once."""

from lens_megatron.config.files import ConfigError
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
    all_options,
    from_tree,
    load,
)

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
    "from_tree",
    "load",
]
