"""Which language a text is written in, as far as prompts of ours differ: Chinese, or any other."""

from __future__ import annotations

import re
from typing import Literal

Language = Literal["en", "zh"]

_CJK = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]")
_KANA_OR_HANGUL = re.compile(r"[\u3040-\u30ff\uac00-\ud7af]")
_LETTER = re.compile(r"[^\W\d_]")


def language_of(text: str) -> Language:
    """Chinese when a fifth of the letters is Chinese, since names often stay in Latin script; else `en`.

    Japanese, whose kana stand between the same characters, and Korean are no Chinese.
    """
    letters = len(_LETTER.findall(text))
    chinese = len(_CJK.findall(text)) - 2 * len(_KANA_OR_HANGUL.findall(text))
    return "zh" if letters and chinese / letters >= 0.2 else "en"
