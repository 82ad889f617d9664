"""Flags that ask for what no engine offers."""


def test_a_flag_of_the_command_line_is_refused_the_same_way(calpaca) -> None:
    result = calpaca("plugins", "--num-beams", "4")
    assert result.code == 2
    assert "beam search (--num-beams)" in result.err
