"""Write the pages of docs/ that follow from the code: cli.md, hooks.md and settings.md.

python docs/generate.py            write them
python docs/generate.py --check    exit with 1 when one is not fresh
"""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import click
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from calpaca.plugins.catalogue import known_plugins

FOLDER = Path(__file__).parent
WIDTH = 100


def main() -> int:
    stale = []
    for name, text in pages().items():
        path = FOLDER / name
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8")
    if stale and "--check" in sys.argv:
        print(f"Not fresh: {', '.join(stale)}. Run: make docs", file=sys.stderr)
        return 1
    return 0


def pages() -> dict[str, str]:
    """File name and text of every generated page."""
    # Only first-party plugins and no settings, whatever else is on this machine.
    os.environ["CALPACA_CONFIG"] = str(FOLDER)
    os.environ["CALPACA_PLUGINS"] = ",".join(plugin.name for plugin in known_plugins())
    return {"cli.md": cli_page(), "hooks.md": hooks_page(), "settings.md": settings_page()}


def cli_page() -> str:
    from calpaca.cli.main import program

    intro = """\
        # Command line

        The answer goes to stdout, everything else to stderr. An error is one line of what happened and one of what to
        do. `CALPACA_DEBUG=1` shows tracebacks.

        | exit code | meaning |
        | --- | --- |
        | 0 | done |
        | 1 | failed |
        | 2 | wrong use or settings |
        | 3 | model: not found, not fetched, damaged, or unable to do what was asked |
        | 4 | plugin: broken, incompatible or clashing |
        | 130 | interrupted |
        """
    sections = [f"\n## {path}\n\n```text\n{text.rstrip()}\n```\n" for path, text in helps(program, None, "calpaca")]
    return dedent(intro) + "".join(sections)


def helps(command: click.Command, parent: click.Context | None, name: str) -> Iterator[tuple[str, str]]:
    """Path and help text of a command and all below it."""
    context = click.Context(command, parent=parent, info_name=name, terminal_width=WIDTH)
    yield context.command_path, command.get_help(context)
    if isinstance(command, click.Group):
        for each in command.list_commands(context):
            nested = command.get_command(context, each)
            assert nested is not None
            yield from helps(nested, context, each)


def hooks_page() -> str:
    from calpaca.plugins import hookspecs

    version = ".".join(map(str, hookspecs.API_VERSION))
    sections = []
    for name, hook in inspect.getmembers(hookspecs, inspect.isfunction):
        if hasattr(hook, f"{hookspecs.PROJECT}_spec"):
            sections.append(f"\n## {name}\n\n```python\ndef {name}{_signature(hook)}\n```\n\n{inspect.getdoc(hook)}\n")
    return f"# Hooks\n\nVersion {version} of the plugin API. {inspect.getdoc(hookspecs)}\n" + "".join(sections)


def _signature(hook: Any) -> str:
    return str(inspect.signature(hook)).replace("'", "")  # annotations are kept as text there


def settings_page() -> str:
    from calpaca.core import settings

    rows = [f"| `{name}` | {default} | {text} |" for name, default, text in fields(settings.Settings)]
    head = "| setting | default | |\n| --- | --- | --- |\n"
    variables = "\n".join(f"| `{name}` | {text} |" for name, text in settings.VARIABLES.items())
    environment = ENVIRONMENT.format(variables=variables)
    return f"# Settings\n\n{inspect.getdoc(settings)}\n\n{head}" + "\n".join(rows) + f"\n{environment}"


ENVIRONMENT = """
## Environment

| variable | |
| --- | --- |
| `CALPACA_…` | Any setting above in capitals, sections with two underscores: `CALPACA_SAMPLING__TOP_K=40`. |
{variables}
| `HF_ENDPOINT` | Mirror of the Hugging Face hub. |

## Example

```toml
model = "alpaca"

[models.alpaca]
model = "/models/llama-7b"
adapters = ["/models/chinese-alpaca-lora", "/models/my-lora@0.5"]
chat_template = "alpaca"

[apps.handbook]
app = "retrieval_qa"
files = ["handbook.md"]
```

`calpaca run handbook --question "…"` then asks the handbook. `[apps.retrieval_qa]` sets defaults for the app itself.
"""


def fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Dotted name, default and description of each setting."""
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from fields(info.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _default(info.default), (info.description or "").replace("|", "\\|")


def _default(value: Any) -> str:
    return "" if value is None or value is PydanticUndefined else f"`{json.dumps(value)}`"


if __name__ == "__main__":
    sys.exit(main())
