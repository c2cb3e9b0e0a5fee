"""Shell completion of the tools that use argparse: options by shtab, models and settings by a function made here.

`fgrun` has Hydra's own completion.
"""

import argparse
from shlex import quote

import shtab

from fastgen.cli.hydra_config import KEY_ALIASES, conf_dir

GROUPS = ("compile", "kv_cache", "lora", "offload", "parallel", "sampling", "schedule")  # folders of conf/
FUNCTION = "_fastgen_words"  # of the shell, completes a word that is no option


def completion_script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Returns the completion script of a tool for bash, zsh or fish."""
    for action in parser._get_positional_actions():
        action.complete = {shell: FUNCTION}  # type: ignore[attr-defined]  # read by shtab
    script = shtab.complete(parser, shell, preamble={shell: _words_function(shell)})  # type: ignore[arg-type]
    return script + _bash_without_space(parser.prog) if shell == "bash" else script


def _words_function(shell: str) -> str:
    """Returns the function that completes names in conf/, keys of settings, and paths of checkpoints."""
    names = sorted(f.stem for f in (conf_dir() / "model").glob("*.yaml"))
    names += [f"{group}={f.stem}" for group in GROUPS for f in sorted((conf_dir() / group).glob("*.yaml"))]
    keys = [f"{key}=" for key in KEY_ALIASES if "." not in key]
    if shell == "zsh":
        return f"{FUNCTION}() {{ compadd -S '' -- {' '.join(keys)}; compadd -- {' '.join(names)}; _files }}"
    if shell == "fish":
        words = " ".join(map(quote, names + keys))
        return f"function {FUNCTION}\n  printf '%s\\n' {words}\n  __fish_complete_path (commandline -ct)\nend"
    return f"""{FUNCTION}() {{
  compgen -W {quote(" ".join(names + keys))} -- "$1"
  compgen -d -S / -- "$1"
  compgen -f -- "$1" | grep -E '[.](gguf|safetensors|json)$'
}}"""


def _bash_without_space(tool: str) -> str:
    """Returns a function around shtab's, in which no space follows a key= or a folder/, since the word goes on."""
    return f"""
_fastgen_{tool}() {{
  _shtab_{tool} "$@"
  case "${{COMPREPLY[0]-}}" in *= | */) compopt -o nospace ;; esac
}}
complete -F _fastgen_{tool} {tool}"""
