"""Shell completion of the tools that use argparse: options by shtab, models and settings by a function made here.

`fgrun` has Hydra's own completion.
"""

import argparse
from shlex import quote

import shtab

from fastgen.cli.hydra_config import KEY_ALIASES, conf_dir

GROUPS = ("compile", "kv_cache", "lora", "offload", "parallel", "sampling", "schedule")  # folders of conf/
REJECTED_GROUPS = {"fgserve": ("sampling",)}  # of a tool, whose requests bring these settings
EXTRA_KEYS = {"fgchat": ("chat_template=",), "fgserve": ("chat_template=",)}  # without a group


def completion_script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Returns the completion script of a tool for bash, zsh or fish."""
    function = f"_fastgen_words_{parser.prog}"  # of the shell, completes a word that is no option
    for action in parser._get_positional_actions():
        action.complete = {shell: function}  # type: ignore[attr-defined]  # read by shtab
    script = shtab.complete(parser, shell, preamble={shell: _words_function(shell, parser.prog, function)})  # type: ignore[arg-type]
    return script + _bash_function(parser.prog, function) if shell == "bash" else script


def _words_function(shell: str, tool: str, function: str) -> str:
    """Returns the function that completes names in conf/, keys of settings, and paths of checkpoints."""
    groups = [group for group in GROUPS if group not in REJECTED_GROUPS.get(tool, ())]
    names = sorted(f.stem for f in (conf_dir() / "model").glob("*.yaml"))
    names += [f"{group}={f.stem}" for group in groups for f in sorted((conf_dir() / group).glob("*.yaml"))]
    aliases = {key: full for key, full in KEY_ALIASES.items() if "." not in key}
    keys = [f"{key}=" for key, full in aliases.items() if full.partition(".")[0] in (*groups, "model")]
    keys += EXTRA_KEYS.get(tool, ())
    if shell == "zsh":
        return f"{function}() {{ compadd -S '' -- {' '.join(keys)}; compadd -- {' '.join(names)}; _files }}"
    if shell == "fish":
        words = " ".join(map(quote, names + keys))
        return f"function {function}\n  printf '%s\\n' {words}\n  __fish_complete_path (commandline -ct)\nend"
    return f"""{function}() {{
  compgen -W {quote(" ".join(names + keys))} -- "$1"
  compgen -d -S / -- "$1"
  compgen -f -- "$1" | grep -E '[.](gguf|safetensors|json)$'
}}"""


def _bash_function(tool: str, words_function: str) -> str:
    """Returns a function around shtab's, which completes the value of key=value, too, by a word or else a file.

    bash ends a word at "=", and only what follows is completed. No space follows a key= or a folder/.
    """
    return f"""
_fastgen_{tool}() {{
  local word=${{COMP_LINE:0:COMP_POINT}}
  word=${{word##*[[:space:]]}}
  if [[ $word == [!-]*=* && $COMP_WORDBREAKS == *=* ]]; then
    COMPREPLY=($({words_function} "$word"))
    COMPREPLY=("${{COMPREPLY[@]#"${{word%%=*}}="}}")
    [[ ${{COMPREPLY[0]-}} ]] || COMPREPLY=($(compgen -f -- "${{word#*=}}"))
  else
    _shtab_{tool} "$@"
  fi
  case "${{COMPREPLY[0]-}}" in *= | */) compopt -o nospace ;; esac
}}
complete -F _fastgen_{tool} {tool}"""
