import pytest
import torch

from primer_fast.data.completions import Completions, encode_completions, stack

END = 0


def encode(text):
    return [ord(c) - 96 for c in text]


def test_rows_are_prompt_completion_end():
    batch = encode_completions([("ab", "c"), ("", "de"), ("a", "bcd")], encode, end=END, context=8)
    assert batch.tokens.tolist() == [[1, 2, 3, 0, 0], [0, 4, 5, 0, 0], [1, 2, 3, 4, 0]]
    assert batch.prompt_lengths.tolist() == [2, 1, 1] and batch.lengths.tolist() == [4, 4, 5]


def test_the_mask_is_of_the_completion_and_its_end():
    batch = encode_completions([("ab", "c"), ("", "de"), ("a", "bcd")], encode, end=END, context=8)
    following = torch.where(batch.mask(), batch.tokens[:, 1:], -1)
    assert following.tolist() == [[-1, 3, 0, -1], [4, 5, 0, -1], [2, 3, 4, 0]]


def test_rows_are_cut_to_the_longest_of_them():
    batch = encode_completions([("a", "b"), ("a", "bcdef")], encode, end=END, context=8)
    assert batch[torch.tensor([0])].tokens.tolist() == [[1, 2, 0]]
    assert batch[1:].tokens.shape == (1, 7) and len(batch[:0]) == 0


def test_pairs_are_stacked():
    first = encode_completions([("a", "b")], encode, end=END, context=8)
    second = encode_completions([("a", "bcd")], encode, end=END, context=8)
    both = stack(first, second)
    assert both.tokens.tolist() == [[1, 2, 0, 0, 0], [1, 2, 3, 4, 0]] and both.lengths.tolist() == [3, 5]


@pytest.mark.parametrize(
    ("texts", "end", "message"),
    [
        ([("a", "b"), ("a", "")], END, "completion 1 must not be empty; got '' after the prompt 'a'"),
        ([("", "b")], None, "prompt 0 must not be empty where there is no end token"),
        ([("aaaaaaa", "b")], END, "^prompt 0 must fit the context of 6 tokens; got 9, 7 of the prompt"),
        ([("aaa", "bbb")], END, "^prompt and completion 0 must fit the context of 6 tokens; got 7, 3 of the prompt"),
        ([], END, "at least one completion; got none"),
    ],
)
def test_what_cannot_be_encoded(texts, end, message):
    with pytest.raises(ValueError, match=message):
        encode_completions(texts, encode, end=end, context=6)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"tokens \(N, T\) and two lengths \(N,\); got \(2, 3\), \(2,\), \(1,\)"):
        Completions(torch.zeros(2, 3), torch.zeros(2), torch.zeros(1))
