"""Names the distribution and its extras: what `pip` installs is `fastgen-llm`, what Python imports is `fastgen`."""

DISTRIBUTION = "fastgen-llm"  # `fastgen` is another project's name on PyPI


def install_command(extra: str) -> str:
    """Returns the commands that install an extra of pyproject.toml: from an index, and in a checkout."""
    return f'pip install "{DISTRIBUTION}[{extra}]", or pip install ".[{extra}]" in a checkout of fastgen'
