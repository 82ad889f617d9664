"""The installed apps as tools."""

from __future__ import annotations

from collections.abc import Sequence

from langchain_core.tools import BaseTool

from calpaca.core.errors import CalpacaError
from calpaca.core.runtime import Runtime
from calpaca.plugins.exposure import answers_and_reads
from calpaca.plugins.instances import Instance, find_instance, instances
from calpaca.plugins.options import read_options


def chosen_instances(names: Sequence[str], runtime: Runtime) -> list[Instance]:
    """The instances of these names, or all whose app answers, only reads and can be run as it is configured.

    Raises UsageError for a name that there is not.
    """
    if names:
        return [find_instance(name, runtime) for name in names]
    found = (instance for _, instance in sorted(instances(runtime).items()))
    return [each for each in found if answers_and_reads(each.app) and _can_run(each, runtime)]


def app_tools(names: Sequence[str], runtime: Runtime) -> list[BaseTool]:
    """The chosen apps as tools that take their input alone, which small models fill in best."""
    return [
        instance.app.as_tool(runtime, presets=instance.presets, name=instance.name, options=())
        for instance in chosen_instances(names, runtime)
    ]


def _can_run(instance: Instance, runtime: Runtime) -> bool:
    """Whether the app can be built from its presets: one that needs documents and has none is no tool."""
    try:
        instance.app.build(read_options(instance.app.load_options(), instance.presets, instance.name), runtime)
    except CalpacaError:
        return False
    return True
