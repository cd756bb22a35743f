"""Shell completion: a script for each shell, which calls the hidden verb `headway complete LINE` for the candidates.

The candidates are computed in one place, so a change of verbs needs no new script. The output has one line
`WORD<tab>DESCRIPTION` per candidate, or one of the lines `:yaml` and `:file`: the shell then completes file names.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path

from headway.launcher.cli.keys import keys_of
from headway.launcher.cli.parser import Parser

YAML, FILE = ":yaml", ":file"


def complete(line: str, parser: Parser) -> list[str]:
    """Output lines for the last word of `line`, the command line up to the cursor. `parser`: parser of the verbs."""
    *before, current = _split(line)
    place = _Place(parser)
    for word in before:
        place.pass_by(word)
    found = list(place.candidates(current))
    return [row for row in found if row.startswith((current, ":"))]


class _Place:
    """Position of a word on the command line: the verbs, options and positional arguments before it."""

    def __init__(self, parser: Parser) -> None:
        self.parser = parser
        self.option: argparse.Action | None = None  # option whose value comes next
        self.lost = False  # after an unknown verb
        self.positionals = 0
        self.given: set[str] = set()

    def pass_by(self, word: str) -> None:
        children = _children(self.parser)
        if self.option is not None:
            self.option = None
        elif word.startswith("-"):
            self.given.add(word.partition("=")[0])
            action = self._options().get(word)
            self.option = action if action is not None and action.nargs != 0 else None
        elif word in children:
            self.parser = children[word]
        elif children:
            self.lost = True
        else:
            self.given.add(word.partition("=")[0])
            self.positionals += 1

    def candidates(self, current: str) -> Iterator[str]:
        if self.lost:
            return
        if self.option is not None:
            yield from _values(self.option)
        elif current.startswith("-"):
            yield from self._option_words(current)
        elif children := _children(self.parser):
            yield from (f"{name}\t{child.about}" for name, child in children.items() if name in self.parser.words)
        elif (action := self._positional()) is not None:
            if action.dest == "overrides":
                yield from _keys(self.parser.get_default("keys_of"), current, self.given)
            else:
                yield from _values(action)

    def _options(self) -> dict[str, argparse.Action]:
        return {option: action for action in self.parser._actions for option in action.option_strings}

    def _option_words(self, current: str) -> Iterator[str]:
        name, equals, _ = current.partition("=")
        options = self._options()
        if equals and name in options:
            choices = (row for row in _values(options[name]) if not row.startswith(":"))
            yield from (f"{name}={row}" for row in choices)
            return
        for option, action in options.items():
            repeats = isinstance(action, argparse._AppendAction)
            if option.startswith("--") and (repeats or not self.given & set(action.option_strings)):
                yield f"{option}\t{action.help or ''}"

    def _positional(self) -> argparse.Action | None:
        actions = [action for action in self.parser._actions if not action.option_strings]
        if self.positionals < len(actions):
            return actions[self.positionals]
        return actions[-1] if actions and actions[-1].nargs in ("*", "+") else None


def _split(line: str) -> list[str]:
    """Words after the name of the command. The last one, which may be empty, is the word to complete."""
    try:
        words = shlex.split(line)
    except ValueError:  # a quote that is not closed yet
        words = line.split()
    if not words or line[-1:].isspace():
        words.append("")
    start = next((i for i, word in enumerate(words) if Path(word).name == "headway"), 0)
    return words[start + 1 :] or [""]


def _children(parser: Parser) -> dict[str, Parser]:
    found = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(found[0].choices) if found else {}


def _values(action: argparse.Action) -> Iterable[str]:
    if action.choices:
        return [str(choice) for choice in action.choices]
    if action.dest == "spec":
        return [YAML]
    return [FILE] if action.type is Path else []


def _keys(kind: str, current: str, given: set[str]) -> Iterator[str]:
    """`key=` for each key that can be set. After the sign: `key=value` if the values can be listed."""
    key, equals, _ = current.partition("=")
    for name, values in keys_of(kind).items():
        if equals:
            yield from (f"{name}={value}" for value in values if name == key)
        elif name not in given:
            yield f"{name}="


_BASH = r"""# completion of headway in bash: source this file, or put it where bash-completion looks for `headway`
_headway() {
    local line="${COMP_LINE:0:COMP_POINT}" row
    local current="${line##*[[:space:]]}" rows=()
    COMPREPLY=()
    mapfile -t rows < <("$1" complete "$line" 2>/dev/null)
    case "${rows[0]-}" in
        :yaml)
            mapfile -t COMPREPLY < <(compgen -f -X '!*.y*ml' -- "$current"; compgen -d -- "$current")
            compopt -o filenames 2>/dev/null
            return ;;
        :file)
            mapfile -t COMPREPLY < <(compgen -f -- "$current")
            compopt -o filenames 2>/dev/null
            return ;;
    esac
    # bash replaces only what stands behind a `=`
    local prefix=""
    [[ $current == *=* && $COMP_WORDBREAKS == *=* ]] && prefix="${current%=*}="
    for row in "${rows[@]}"; do
        row="${row%%$'\t'*}"
        [[ -n $row ]] && COMPREPLY+=("${row#"$prefix"}")
    done
    [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *= ]] && compopt -o nospace 2>/dev/null
    return 0
}
complete -F _headway headway"""

_ZSH = r"""#compdef headway
# completion of headway in zsh: source this file behind compinit, or save it as _headway in a folder of $fpath
_headway() {
    local -a rows plain open
    local row word
    rows=("${(@f)$("$words[1]" complete "${(j: :)words[1,CURRENT-1]} $PREFIX" 2>/dev/null)}")
    case $rows[1] in
        :yaml) _files -g '*.(yaml|yml)'; return ;;
        :file) _files; return ;;
    esac
    for row in $rows; do
        word=${row%%$'\t'*}
        [[ -z $word ]] && continue
        if [[ $word == *= ]]; then open+=("$word"); else plain+=("${word//:/\\:}:${row#*$'\t'}"); fi
    done
    (( $#open )) && compadd -S '' -a open
    (( $#plain )) && _describe -V headway plain
    return 0
}
if [[ $funcstack[1] == _headway ]]; then
    _headway "$@"
else
    (( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
    compdef _headway headway
fi"""

_FISH = r"""# completion of headway in fish: save it as headway.fish in ~/.config/fish/completions
function __headway_complete
    set -l line (commandline -cp)
    set -l rows (eval (commandline -opc)[1] complete (string escape -- "$line") 2>/dev/null)
    switch "$rows[1]"
        case :yaml
            __fish_complete_path (commandline -ct) | string match -r -- '^.*(?:/|\.ya?ml)(?:\t.*)?$'
        case :file
            __fish_complete_path (commandline -ct)
        case '*'
            printf '%s\n' $rows
    end
end
complete -c headway -e
complete -c headway -f -a '(__headway_complete)'"""

SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}
