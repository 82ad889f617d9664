import pytest

from calpaca.core.encoding import decode
from calpaca.core.errors import DocumentError

SIMPLIFIED = "工坊周二至周日上午九点开门，下午六点关门。"


@pytest.mark.parametrize(
    "text", ["你好，世界", SIMPLIFIED, SIMPLIFIED * 200, "A mixed line: 李白 (701–762) 是诗人。\n"]
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gb18030", "gbk"])
def test_chinese_text_is_read_exactly(text: str, encoding: str) -> None:
    try:
        data = text.encode(encoding)
    except UnicodeEncodeError:
        pytest.skip(f"{encoding} lacks a character of this text")
    assert decode(data, "x.txt")[0] == text


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("這是一個繁體中文的測試文件，請確認編碼。", "big5"),
        ("これは日本語のテストです。", "shift_jis"),
        ("Le café est fermé à Noël, déjà vu.", "cp1252"),
        ("“Curly quotes” – and a dash.", "cp1252"),
    ],
)
def test_other_legacy_encodings_are_detected(text: str, encoding: str) -> None:
    assert decode(text.encode(encoding), "x.txt")[0] == text


def test_line_ends_are_kept() -> None:
    assert decode(b"a\r\nb\n", "x.txt")[0] == "a\r\nb\n"


@pytest.mark.parametrize(
    "data", [b"\x89PNG\r\n\x1a\n\x00\x00", bytes(range(1, 32)) * 40, b"%PDF-1.7\n\x01\x02\x03\x04" * 9]
)
def test_binary_data_is_refused(data: bytes) -> None:
    with pytest.raises(DocumentError, match=r"x\.bin is a binary file"):
        decode(data, "x.bin")


def test_a_truncated_utf_16_file_is_refused() -> None:
    with pytest.raises(DocumentError, match=r"encoding of x\.txt is unknown"):
        decode("text".encode("utf-16")[:-1], "x.txt")
