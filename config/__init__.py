"""The configuration room: the YAML files, their schema, and the command line that every script shares.

Importing this package is cheap: it never imports torch.
"""

from config.cli import UserError, add_config_arguments, run_script
from config.schema import Config, check_overrides, config_from_dict, load_config

__all__ = ["Config", "UserError", "add_config_arguments", "check_overrides", "config_from_dict", "load_config",
           "run_script"]
