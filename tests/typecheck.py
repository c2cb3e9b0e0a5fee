"""What checks types in the tests (see pyproject.toml): beartype, with PEP 484's int for a float."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
