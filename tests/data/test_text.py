import pytest
import torch

from primer_fast.data import text
from primer_fast.data.tokenizers import ByteTokenizer, CharacterTokenizer


def test_a_file_is_read_as_utf_8_with_line_ends_made_one(tmp_path):
    file = tmp_path / "a.anything"
    file.write_bytes(b"\xef\xbb\xbfGr\xc3\xbc\xc3\x9fe\r\nund\rmehr\n")
    assert text.load_text(file) == text.load_text(str(file)) == "Grüße\nund\nmehr\n"


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path):
    (tmp_path / "b").mkdir()
    for name, content in (("c.txt", "3"), ("a.MD", "1"), ("b/z.rst", "2"), ("d.py", "no text")):
        (tmp_path / name).write_text(content)
    assert text.load_text(tmp_path) == "1\n\n2\n\n3"


def test_the_built_in_text_is_english_and_the_same_every_time():
    first = text.load_text("builtin")
    assert first == text.load_text("builtin") and len(first) > 300_000
    assert "statement" in first and first.split().count("the") > 1000


def test_the_last_tenth_is_held_out():
    train, validation = text.split("abcdefghij" * 10)
    assert train == "abcdefghij" * 9 and validation == "abcdefghij"


def test_tokens_are_small_integers():
    letters = "abcdefghij" * 30
    tokens = text.tokenize(letters, CharacterTokenizer(letters), context=20)
    assert tokens.train.dtype == torch.uint16 and tokens.train[:3].tolist() == [0, 1, 2]
    assert len(tokens.train) == 270 and len(tokens.validation) == 30

    class Many(ByteTokenizer):
        vocab_size = 70_000

    assert text.tokenize(letters, Many(), context=20).train.dtype == torch.int32


def test_windows():
    tokens = torch.arange(100).to(torch.uint16)
    got = text.windows(tokens, torch.tensor([0, 7, 95]), 5)
    assert got.dtype == torch.int64
    assert got.tolist() == [[0, 1, 2, 3, 4], [7, 8, 9, 10, 11], [95, 96, 97, 98, 99]]


def test_in_consecutive_windows_each_token_but_the_first_is_a_target_once():
    tokens = torch.arange(31).to(torch.uint16)
    batches = list(text.consecutive_windows(tokens, 6, batch=4))
    assert [len(b) for b in batches] == [4, 2]
    assert torch.cat([b[:, 1:].flatten() for b in batches]).tolist() == list(range(1, 31))
    shorter = list(text.consecutive_windows(tokens[:30], 6, batch=4))  # its last window would lack a token
    assert torch.cat([b[:, 1:].flatten() for b in shorter]).tolist() == list(range(1, 26))


def test_some_of_the_windows_are_spread_over_all():
    tokens = torch.arange(1001).to(torch.int32)
    (batch,) = text.consecutive_windows(tokens, 11, batch=8, most=5)
    assert batch[:, 0].tolist() == [0, 240, 490, 740, 990]


WRONG = {
    "nothing there": (None, "no such file or folder"),
    "empty": (b"", "empty: the file has 0 bytes"),
    "not UTF-8": (b"abc\xff\xfe", "not UTF-8: invalid start byte at byte 3"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("inside", [False, True], ids=["file", "in a folder"])
def test_a_file_that_is_no_text_is_named(name, inside, tmp_path):
    content, message = WRONG[name]
    file = tmp_path / "a.txt"
    if content is not None:
        file.write_bytes(content)
    elif inside:
        pytest.skip("a folder names the files it holds")
    with pytest.raises(ValueError, match=message) as error:
        text.load_text(tmp_path if inside else file)
    assert str(error.value).startswith(f"{file}: ")


def test_a_folder_without_text_is_named(tmp_path):
    (tmp_path / "a.py").write_text("x")
    with pytest.raises(ValueError, match=r"no text in this folder: no file that ends in \.md, .*, \.txt"):
        text.load_text(tmp_path)


@pytest.mark.parametrize("length, part", [(50, "to train on"), (100, "to validate on")])
def test_a_text_shorter_than_a_window(length, part):
    with pytest.raises(ValueError, match=rf"the part {part} must have more than the context's 50 tokens; got \d+ of"):
        text.tokenize("a" * length, ByteTokenizer(), context=50)
    text.tokenize("a" * 510, ByteTokenizer(), context=50)
