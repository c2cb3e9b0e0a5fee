"""The configuration files of `fgrun`, as a package: `hydra.initialize_config_module("fastgen.conf")`."""

import fastgen.cli.hydra_config  # noqa: F401 (registers the schema that config.yaml starts from)
