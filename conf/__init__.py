"""The configuration files of `fgrun`, as a package: `hydra.initialize_config_module("fastgen.conf")`."""

from fastgen.cli import run as run  # registers the schema that config.yaml starts from
