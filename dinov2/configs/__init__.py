"""Typed configuration: schema, files, overrides."""

from dinov2.configs.errors import ConfigError
from dinov2.configs.loader import config_keys, default_yaml, find_config, load_and_merge_config_3d, read_yaml
from dinov2.configs.schema import Config

__all__ = ["Config", "ConfigError", "config_keys", "default_yaml", "find_config", "load_and_merge_config_3d", "read_yaml"]
