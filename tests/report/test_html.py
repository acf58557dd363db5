"""The HTML page stands alone, is complete, and is written whole or not at all."""

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from kerasmp.errors import OutputError
from kerasmp.report import check_folder, demo_html, write_demo

pytestmark = pytest.mark.unit

LOADS = {"src", "href", "xlink:href", "data", "action", "poster", "srcset"}
VOID = {"meta", "br", "img", "link", "hr", "input"}


class Page(HTMLParser):
    """Collects what a browser would load, ids, and tags that are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.ids, self.open, self.images, self.text = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        found = dict(attrs)
        self.loads += [value for name, value in attrs if name in LOADS]
        self.ids += [found["id"]] if "id" in found else []
        self.images += [found["aria-label"]] if found.get("role") == "img" else []
        assert tag not in {"script", "link", "iframe", "object", "embed", "base"}

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def text(result):
    """The page of all runs; its drawings take most of the time."""
    return demo_html(result)


def test_the_page_loads_nothing_from_elsewhere(text):
    page = Page(text)
    assert page.open == []
    assert [link for link in page.loads if not link.startswith("#")] == []
    assert not re.search(r"@import|url\((?!#)", text)
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.loads} <= set(page.ids)


def test_three_described_drawings_that_follow_the_colours_of_the_page(text):
    assert Page(text).images == [
        "Loss over the epochs, one line for each policy",
        "Loss scale over the steps, with skipped steps marked",
        "Histogram of gradient exponents against float16's range",
    ]
    assert "currentColor" in text
    assert "#010203" not in text


def test_the_page_has_settings_environment_and_results(result, text):
    text = " ".join("".join(Page(text).text).split())
    for run in result.runs:
        assert f"{run.recipe.name}: {run.recipe.summary}" in text
    for fact in (
        "stripes 1.0.0: 320 training and 40 test images of 8 by 8 by 1, 4 classes",
        "2 epochs of 10 steps, 32 images a step, Adam with learning rate 0.002, seed 0",
        "1 min 15 s in all",
        "kerasmp 9.8.7, keras 3.1.4",
        "A <fast> processor, 2 cores for this process, cpu:0, Linux x86_64",
        "float32. It is right on any.",
        "one image more or less is 2.50 points",
        "87.5%",
    ):
        assert fact in text
    # Of 32 bins from 2^-30 on, float16 loses five, makes eleven subnormal, and keeps sixteen.
    assert "activations1 (not scaled)" in text.replace(" activations ", "activations")
    assert "15.62% 34.38% 50.00% 0.00%" in re.sub(r"%\s*(?=\d)", "% ", text)


def test_runs_that_ended_in_nan_still_make_a_page(broken):
    text = demo_html(broken)
    assert "nan" in Page(text).text
    assert "All is &lt;lost&gt;." in text


def test_without_a_scaled_run_there_is_no_plot_of_scales(result):
    one = dataclasses.replace(result, runs=result.runs[:1])
    page = Page(demo_html(one))
    assert len(page.images) == 2
    assert "Loss scale" not in page.text


def test_both_files_are_written_and_replace_earlier_ones(result, tmp_path):
    folder = tmp_path / "new" / "folder"
    folder.mkdir(parents=True)
    for name in ("report.html", "results.json"):
        (folder / name).write_text("old")
    report, results = write_demo(dataclasses.replace(result, dataset="other 2.0.0"), folder)
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "results.json"]
    assert "other 2.0.0" in report.read_text(encoding="utf-8")
    assert json.loads(results.read_text(encoding="utf-8"))["dataset"] == "other 2.0.0"


def test_a_report_that_cannot_be_written_leaves_the_old_one(result, tmp_path, monkeypatch):
    names = ["report.html", "results.json"]
    for name in names:
        (tmp_path / name).write_text("old")

    def full(self, text, **_):
        self.write_bytes(text[:100].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OutputError, match="No space left on device"):
        write_demo(result, tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(
        names, "old"
    )


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_folder_that_cannot_be_written(tmp_path, place):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(OutputError, match=r"cannot be written.*--output") as caught:
        check_folder(tmp_path / place)
    assert isinstance(caught.value, OSError)
    assert (tmp_path / "file").read_text() == "precious"


def test_a_folder_that_can_be_written_is_not_there_before_a_report(tmp_path):
    (tmp_path / "kept").mkdir()
    assert check_folder(tmp_path / "kept" / "a" / "b") == tmp_path / "kept" / "a" / "b"
    check_folder(tmp_path / "kept")
    assert list(tmp_path.rglob("*")) == [tmp_path / "kept"]
