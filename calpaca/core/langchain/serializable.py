"""How our LangChain classes are written as JSON by `dumpd` and read back by `load`."""

from __future__ import annotations

from langchain_core.load.serializable import Serializable


class PublicSerializable(Serializable):
    """Written with its constructor arguments, under the public name `calpaca.<class>`.

    load(dumpd(llm), allowed_objects=[ChatCalpaca], valid_namespaces=["calpaca"])
    """

    @classmethod
    def is_lc_serializable(cls) -> bool:
        return True

    @classmethod
    def get_lc_namespace(cls) -> list[str]:
        """Where `load` imports the class from; a user's subclass stays where it is."""
        return ["calpaca"] if cls.__module__.startswith("calpaca.core.") else super().get_lc_namespace()
