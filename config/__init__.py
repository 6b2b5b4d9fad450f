"""Configuration: the YAML files, their schema, and the command line that every script shares.

Importing this package is fast: it imports neither torch nor numpy.
"""

from config.command_line import add_config_arguments, run_script
from config.errors import UserError
from config.schema import Config, check_overrides, config_from_dict, load_config

__all__ = ["Config", "UserError", "add_config_arguments", "check_overrides", "config_from_dict", "load_config",
           "run_script"]
