"""The command line that a report says it was made by."""

import shlex
from collections.abc import Sequence
from pathlib import Path

import typer


def words_given(context: typer.Context, command: Sequence[str], untold: Sequence[str]) -> str:
    """Return `command` with the options that were given, but for those of `untold`; of paths their last part."""
    words = list(command)
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        if source is None or source.name != "COMMANDLINE" or name in untold:
            continue
        value = context.params[name]
        for each in value if isinstance(value, list | tuple) else [value]:
            if isinstance(each, bool):
                words.append(parameter.opts[0] if each else parameter.secondary_opts[0])
            else:
                words += [parameter.opts[0], each.name if isinstance(each, Path) else str(each)]
    return shlex.join(words)
