import base64
import re
from html.parser import HTMLParser

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rwkvir_data import page, report, score
from rwkvir_data.select import Criteria, select

LENIENT = Criteria(min_side=90, blur=(0, 1e9), max_flat=1, val=0, test=0)


pytestmark = pytest.mark.usefixtures("threads")


@pytest.fixture
def scores(tmp_path):
    """A score table of 12 pictures of two sources, plain and busy, a copy, a small one and an unreadable one."""
    rng = np.random.default_rng(0)
    rows = []
    for source, kind in (("photos", "real"), ("<drawn> & co", "synthetic")):
        (tmp_path / source).mkdir()
        for i in range(6):
            coarse = rng.integers(0, 256, (5, 5, 3) if i % 2 == 0 else (40, 50, 3), dtype=np.uint8)
            picture = cv2.resize(coarse, (128, 96), interpolation=cv2.INTER_LINEAR)
            cv2.imwrite(str(tmp_path / source / f"{i}.png"), picture)
        cv2.imwrite(str(tmp_path / source / "copy.jpg"), picture[:, :-1])
        cv2.imwrite(str(tmp_path / source / "small.png"), picture[:60])
        for file in sorted((tmp_path / source).iterdir()):
            place = {"source": source, "root": str(tmp_path / source), "name": file.name, "kind": kind}
            rows.append({**place, **score.measure(file.read_bytes()), "dropped": None})
        rows.append({**place, "name": "broken.png", "dropped": "unreadable: the file is empty"})
    pq.write_table(pa.Table.from_pylist(rows, score.SCHEMA), tmp_path / "scores.parquet")
    return tmp_path / "scores.parquet"


class Page(HTMLParser):
    """Addresses of a page's images, and its text."""

    def __init__(self, text):
        super().__init__()
        self.images, self.addresses, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.addresses += [attrs[name] for name in ("src", "href", "srcset", "data") if name in attrs]
        if tag == "img":
            self.images.append(attrs["src"])

    def handle_data(self, data):
        self.text += data


def make(table, out):
    assert report.main([str(table), "-o", str(out), "--workers", "2", "--title", "A <set>"]) == 0
    text = out.read_text()
    assert "url(" not in text and "@import" not in text
    page = Page(text)
    assert all(address.startswith("data:image/") for address in page.addresses)  # self-contained
    return page


def decode(uri):
    return cv2.imdecode(np.frombuffer(base64.b64decode(uri.split(",")[1]), np.uint8), cv2.IMREAD_COLOR)


@pytest.fixture
def selection(scores, tmp_path):
    table, _ = select(pq.read_table(scores), LENIENT)
    (tmp_path / "set").mkdir()
    pq.write_table(table, tmp_path / "set" / "selection.parquet")
    return tmp_path / "set"


def test_a_built_set(selection, tmp_path):
    page = make(selection, tmp_path / "out.html")
    for heading in (
        "Complexity, sorted",
        "What the filters dropped",
        "small: 2",
        "Duplicates",
        "What could not be read",
    ):
        assert heading in page.text
    assert "A <set>" in page.text
    assert "<drawn> & co/broken.png: unreadable: the file is empty" in page.text and "2 pictures." in page.text
    kept = sum(row["split"] is not None for row in pq.read_table(selection / "selection.parquet").to_pylist())
    assert f"{kept}selected" in re.sub(r"\s", "", page.text)
    # Two charts, three rows of contacts, maps, two small ones, two pairs.
    assert len(page.images) == 2 + 3 * min(kept, 6) + min(kept, 6) + 2 + 4
    assert all(decode(uri) is not None for uri in page.images)
    figures = {file.name: cv2.imread(str(file)) for file in (tmp_path / "out_figures").iterdir()}
    assert sorted(figures) == ["contacts.png", "histograms.png", "maps.png", "sorted.png"]
    assert figures["contacts.png"].shape[0] == 3 * report.SHEET_ROW


def test_scores_alone(scores, tmp_path):
    page = make(scores, tmp_path / "out.html")
    assert "The scored pictures" in page.text and "Duplicates" not in page.text and "selected" not in page.text


def test_pictures_that_are_gone(selection, tmp_path):
    for file in (tmp_path / "photos").iterdir():
        file.unlink()
    whole = make(selection, tmp_path / "out.html")
    assert all(decode(uri) is not None for uri in whole.images)
    assert "2.png" in whole.text


def test_a_table_without_scores(scores, tmp_path):
    rows = [row for row in pq.read_table(scores).to_pylist() if row["dropped"]]
    pq.write_table(pa.Table.from_pylist(rows, score.SCHEMA), scores)
    with pytest.raises(ValueError, match="no picture of the table could be scored; the column `dropped` says why"):
        report.main([str(scores), "-o", str(tmp_path / "out.html"), "--workers", "1"])


def test_another_set_to_compare_with(scores, selection, tmp_path, monkeypatch):
    drawn = []
    png = page.png
    monkeypatch.setattr(page, "png", lambda fig: drawn.append(fig) or png(fig))
    words = [str(selection), "-o", str(tmp_path / "out.html"), "--workers", "1", "--reference", str(scores)]
    assert report.main(words) == 0
    legend = drawn[1].axes[0].get_legend().get_texts()
    assert [text.get_text() for text in legend][2] == "scores: 16"
    bars = [sum(patch.get_height() for patch in group) for group in drawn[1].axes[0].containers[:2]]
    assert bars == pytest.approx([100, 100])


def test_what_is_left_out_of_a_long_list_is_said(selection, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MAX_UNREADABLE", 1)
    monkeypatch.setattr(report, "MAX_PAIRS", 1)
    page = make(selection, tmp_path / "out.html")
    assert "2 pictures, of which 1 are listed." in page.text and page.text.count("the file is empty") == 1
    assert "2 found by their perceptual hashes, of which 1 are shown." in page.text


def test_the_curve_crosses_zero_at_the_share_below_it():
    drawn = []

    class Axes:
        def step(self, x, y, **_):
            drawn.append((x, y))

        def fill_between(self, *_, **__):
            pass

    for scores in ([-3.0, -1.0, 2.0, 5.0, 1.0], np.linspace(-1, 3, 10_000)):
        report._curve(Axes(), scores, None, "")
        x, y = drawn[-1]
        assert x[np.argmax(y >= 0)] == pytest.approx(100 * np.mean(np.array(scores) < 0), abs=0.1)
        assert len(x) <= report.CURVE_POINTS + 1


def test_a_map_is_blue_where_a_picture_is_plain(tmp_path):
    picture = np.full((64, 64, 3), 100, np.uint8)
    picture[:, 32:] = np.random.default_rng(0).integers(0, 256, (64, 32, 3))
    cv2.imwrite(str(tmp_path / "a.png"), picture)
    both = cv2.imdecode(np.frombuffer(report.map_image((str(tmp_path), "a.png")), np.uint8), cv2.IMREAD_COLOR)
    assert both.shape == (64, 128, 3)
    plain, busy = both[8:-8, 72:88].mean((0, 1)), both[8:-8, 104:120].mean((0, 1))  # BGR
    assert plain[0] > plain[2] + 50 and busy[2] > busy[0] + 50
