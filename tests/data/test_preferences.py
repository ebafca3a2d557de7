import json

import pytest

from primer_fast.data.preferences import (
    Preference,
    RatedText,
    load_lexicon,
    pair_texts,
    read_preferences,
    read_ratings,
    split_pairs,
    split_texts,
    write_preferences,
)

GOOD = {"prompt": "How was it?", "chosen": "fine", "rejected": "bad"}


def test_round_trip(tmp_path):
    pairs = [Preference("", "größer", "klein\nlines"), Preference("p", "a", "b", 1.5)]
    write_preferences(tmp_path / "pairs.jsonl", pairs)
    assert read_preferences(tmp_path / "pairs.jsonl") == pairs
    assert [p.name for p in tmp_path.iterdir()] == ["pairs.jsonl"]


WRONG_LINES = [
    ("{", "line 3: must be a JSON object"),
    ("[1]", "line 3: must be a JSON object; got list"),
    (json.dumps({"prompt": "p", "chosen": "a"}), "line 3: rejected is missing; got prompt, chosen"),
    (json.dumps(GOOD | {"chosen": 3}), "line 3: chosen must be a string; got int"),
    (json.dumps(GOOD | {"rejected": ""}), "line 3: rejected must not be empty"),
    (json.dumps(GOOD | {"chosen": "bad"}), "line 3: chosen and rejected must differ; got 'bad' twice"),
    (json.dumps(GOOD | {"margin": "1"}), "line 3: margin must be a finite number that is not negative, .*; got '1'"),
    (json.dumps(GOOD | {"margin": -1}), "line 3: margin must be"),
    (json.dumps(GOOD | {"margin": float("nan")}), "line 3: margin must be"),
    (json.dumps(GOOD | {"margin": True}), "line 3: margin must be"),
    (json.dumps(GOOD | {"margin": 10**400}), "line 3: margin must be .*; got 10000.*000$"),
    (json.dumps(GOOD | {"margin": 10**4299}), "line 3: margin must be"),
    (json.dumps(GOOD | {"margin": 1e39}), r"line 3: margin must be .*; got 1e\+39$"),
    (json.dumps(GOOD | {"margin": [1]}), r"line 3: margin must be .*; got \[1\]$"),
    (json.dumps(GOOD)[:-1] + ', "margin": 1e400}', "line 3: margin must be .*; got inf$"),
    (json.dumps(GOOD)[:-1] + ', "margin": -1e400}', "line 3: margin must be .*; got -inf$"),
    (json.dumps(GOOD)[:-1] + f', "margin": 1{"0" * 5000}}}', "line 3: "),
]


@pytest.mark.parametrize(("line", "message"), WRONG_LINES, ids=[message for _, message in WRONG_LINES])
def test_a_wrong_line_is_named(tmp_path, line, message):
    path = tmp_path / "pairs.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{line}\n")
    with pytest.raises(ValueError, match=f"pairs.jsonl, {message}"):
        read_preferences(path)


@pytest.mark.parametrize("read", [read_preferences, read_ratings])
def test_files_that_cannot_be_read(tmp_path, read):
    with pytest.raises(FileNotFoundError, match="nowhere: no such file"):
        read(tmp_path / "nowhere")
    (tmp_path / "latin").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(ValueError, match="latin: must be UTF-8 text; byte 12 is not"):
        read(tmp_path / "latin")
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="empty"):
        read(tmp_path / "empty")


def test_ratings(tmp_path):
    path = tmp_path / "rated.tsv"
    path.write_text("id\tmean_rating\ttext\n1\t2.5\tan \"open quote\n2\t-1\tit's bad\n")
    assert read_ratings(path) == [RatedText('an "open quote', 2.5), RatedText("it's bad", -1.0)]
    for body, message in (
        ("id\ttext\n1\ta\n", "line 1: the columns must include mean_rating; got id, text"),
        ("mean_rating\ttext\n1\n", "line 2: must have 2 columns; got 1"),
        ("mean_rating\ttext\n1\ta\nhigh\tb\n", "line 3: mean_rating must be a finite number, .*; got 'high'"),
        ("mean_rating\ttext\nnan\tb\n", "line 2: mean_rating must be a finite number, .*; got 'nan'"),
        ("mean_rating\ttext\n1_0\tb\n", "line 2: mean_rating must be a finite number, at most 1e.38; got '1_0'"),
        (f"mean_rating\ttext\n{10**400}\tb\n", "line 2: mean_rating must be"),
        ("mean_rating\ttext\n1\t \n", "line 2: text must not be empty"),
        ("mean_rating\ttext\n", "must hold at least one rated text"),
    ):
        path.write_text(body)
        with pytest.raises(ValueError, match=f"rated.tsv.*{message}"):
            read_ratings(path)


def test_no_text_is_on_both_sides():
    texts = [RatedText(f"text {i % 50}", float(i % 7)) for i in range(100)]
    train, held_out = split_texts(texts, 0.2, seed=1)
    assert len(train) == 40 and len(held_out) == 10
    assert not {t.text for t in train} & {t.text for t in held_out}
    assert (train, held_out) == split_texts(texts, 0.2, seed=1) != split_texts(texts, 0.2, seed=2)
    with pytest.raises(ValueError, match="held_out must be between 0 and 1; got 1"):
        split_texts(texts, 1)
    with pytest.raises(ValueError, match="both parts need a text; got 2 texts"):
        split_texts(texts[:2], 0.1)


def test_pairs_are_all_that_are_far_enough_apart():
    ratings = {"a": 0.3, "b": 1.3, "c": 1.2, "d": 3.0, "e": 0.3}
    texts = [RatedText(*item) for item in ratings.items()]
    want = {(w, l) for w in ratings for l in ratings if ratings[w] - ratings[l] > 1 - 1e-6}
    pairs = pair_texts(texts, 1000, prompt="p", with_margin=True)
    assert {(p.chosen, p.rejected) for p in pairs} == want and len(pairs) == len(want)
    assert all(p.margin == pytest.approx(ratings[p.chosen] - ratings[p.rejected]) and p.prompt == "p" for p in pairs)


def test_pairs_are_drawn_evenly_without_repeats():
    texts = [RatedText(f"{i}", float(i)) for i in range(40)]
    pairs = pair_texts(texts, 300, minimum_gap=1, seed=3)
    assert len({(p.chosen, p.rejected) for p in pairs}) == 300
    assert all(int(p.chosen) > int(p.rejected) and p.margin == 0 for p in pairs)
    assert pairs == pair_texts(texts, 300, minimum_gap=1, seed=3) != pair_texts(texts, 300, minimum_gap=1, seed=4)
    winners = [int(p.chosen) for p in pairs]
    assert 22 < sum(winners) / 300 < 30  # evenly over all 780 pairs the mean is 26


def test_pairs_that_cannot_be():
    texts = [RatedText("a", 1.0), RatedText("b", 1.5)]
    with pytest.raises(ValueError, match="two ratings must be at least 1 apart; got 2 texts"):
        pair_texts(texts, 5)
    with pytest.raises(ValueError, match="count and minimum_gap must be positive; got count 0"):
        pair_texts(texts, 0)
    with pytest.raises(ValueError, match="got 0 texts"):
        pair_texts([], 5)


def test_the_lexicon():
    pytest.importorskip("vaderSentiment")
    words = {text.text: text.rating for text in load_lexicon()}
    assert len(words) > 6000 and all(word.isalpha() and word.isascii() for word in words)
    assert words["great"] > 2 and words["awful"] < -1.5 and all(-4 <= rating <= 4 for rating in words.values())


def sides(pairs):
    return {(p.prompt, text) for p in pairs for text in (p.chosen, p.rejected)}


def test_pairs_that_share_nothing_are_divided_whole():
    pairs = [Preference("x", f"good {i}", f"bad {i}") for i in range(50)]
    train, test = split_pairs(pairs, 0.2)
    assert len(test) == 10 and sorted(map(str, train + test)) == sorted(map(str, pairs))


def test_no_completion_is_in_both_parts_where_pairs_share_them():
    chains = [Preference(str(c), f"{i}", f"{i + 1}") for c in range(20) for i in range(4)]
    words = [Preference("", f"good {i}", f"bad {j}") for i in range(20) for j in range(20)]
    for pairs in (chains, words):
        train, test = split_pairs(pairs, 0.2, seed=3)
        assert train and test and not sides(train) & sides(test)
    assert len(split_pairs(chains, 0.2)[0]) + len(split_pairs(chains, 0.2)[1]) == len(chains)


def test_pairs_that_cannot_be_divided():
    with pytest.raises(ValueError, match="both parts need a pair; got 1 pairs"):
        split_pairs([Preference("", "a", "b")], 0.5)
    with pytest.raises(ValueError, match="held_out must be between 0 and 1"):
        split_pairs([], 1.0)
