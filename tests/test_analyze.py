import csv
from pathlib import Path

import cv2
import numpy as np
import pytest
from basicsr.metrics import calculate_psnr, calculate_ssim

from rwkvir_data import analyze, sources
from rwkvir_data.analyze import Correlation, Quartile, Score
from rwkvir_data.complexity import complexity
from rwkvir_data.degrade import bicubic

pytestmark = pytest.mark.usefixtures("threads")


@pytest.fixture
def folders(tmp_path):
    """gt (49 x 64) and pred (48 x 64, noisier the more complex), eight pictures each, the first pair alike."""
    rng = np.random.default_rng(0)
    for name in ("gt", "pred"):
        (tmp_path / name).mkdir()
    for i in range(8):
        coarse = rng.integers(0, 256, (3 + 4 * i, 3 + 4 * i, 3), dtype=np.uint8)
        gt = cv2.resize(coarse, (64, 49), interpolation=cv2.INTER_LINEAR)
        pred = np.clip(gt[:48] + i * rng.standard_normal((48, 64, 3)), 0, 255).astype(np.uint8)
        cv2.imwrite(str(tmp_path / "gt" / f"{i}.png"), gt)
        cv2.imwrite(str(tmp_path / "pred" / f"{i}_x2.png"), pred)
    return tmp_path


def test_the_whole_command(folders, capsys):
    words = ["--pred", str(folders / "pred"), "--gt", str(folders / "gt"), "-o", str(folders / "out"), "--workers", "1"]
    assert analyze.main([*words, "--filename-tmpl", "{}_x2", "--crop-border", "2", "--y"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "8 pictures; PSNR and SSIM on Y, border of 2 pixels cropped"
    assert out[1] == "1 equal their GT; their PSNR is infinite, and they are left out of what follows"
    assert out[2].startswith("PSNR against complexity: Pearson -0.")
    with open(folders / "out" / "pictures.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [f"{i}.png" for i in range(8)]
    gt, pred = cv2.imread(str(folders / "gt" / "5.png")), cv2.imread(str(folders / "pred" / "5_x2.png"))
    how = {"crop_border": 2, "test_y_channel": True}
    assert float(rows[5]["psnr"]) == calculate_psnr(pred, gt[:48], **how)
    assert float(rows[5]["ssim"]) == calculate_ssim(pred, gt[:48], **how)
    assert float(rows[5]["complexity"]) == complexity(gt[..., ::-1]).score
    with open(folders / "out" / "quartiles.csv") as file:
        assert [int(row["pictures"]) for row in csv.DictReader(file)] == [2, 2, 2, 1]
    assert cv2.imread(str(folders / "out" / "scatter.png")).shape[1] == 960


def test_correlation():
    x, y = [1.0, 2.0, 3.0, 4.0, 10.0], [5.0, 4.0, 3.0, 2.0, 1.9]
    scores = [Score("", a, b, -b) for a, b in zip(x, y, strict=True)]
    pearson = np.corrcoef(x, y)[0, 1]
    assert analyze.correlate(scores, "psnr") == pytest.approx(Correlation(pearson, -1))
    assert analyze.correlate(scores, "ssim") == pytest.approx(Correlation(-pearson, 1))


def test_quartiles():
    scores = [Score("", float(i), 2.0 * i, i / 10) for i in (4, 1, 3, 2, 5)]
    assert analyze.quartiles(scores) == [
        Quartile(2, 1, 2, 3, pytest.approx(0.15)),
        Quartile(1, 3, 3, 6, 0.3),
        Quartile(1, 4, 4, 8, 0.4),
        Quartile(1, 5, 5, 10, 0.5),
    ]


def test_what_cannot_be_analyzed(folders, tmp_path):
    gt, pred = str(folders / "gt"), str(folders / "pred")
    with pytest.raises(FileNotFoundError, match=r"pred has no '0' \(8 of 8 missing\).* --filename-tmpl"):
        analyze.main(["--pred", pred, "--gt", gt])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty has no pictures; correct the path"):
        analyze.main(["--pred", pred, "--gt", str(tmp_path / "empty")])
    with pytest.raises(ValueError, match="share 0 pictures that differ; four are needed for quartiles"):
        analyze.main(["--pred", gt, "--gt", gt])
    cv2.imwrite(f"{pred}/3_x2.png", np.zeros((20, 64, 3), np.uint8))
    with pytest.raises(ValueError, match=r"3_x2\.png has 20x64 pixels, but its GT 49x64; give restored pictures"):
        analyze.main(["--pred", pred, "--gt", gt, "--filename-tmpl", "{}_x2"])
    Path(pred, "3_x2.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"3_x2\.png cannot be read: the file is empty; replace it"):
        analyze.main(["--pred", pred, "--gt", gt, "--filename-tmpl", "{}_x2"])


@pytest.mark.skipif(not Path("../shared/testsets/BSD100").is_dir(), reason="needs ../shared")
def test_bicubic_on_bsd100_correlates_as_published():
    scores = []
    for file in sorted(Path("../shared/testsets/BSD100/HR").iterdir()):
        gt = sources.decode(file.read_bytes())
        gt = gt[: gt.shape[0] // 2 * 2, : gt.shape[1] // 2 * 2]
        psnr = calculate_psnr(bicubic(bicubic(gt, 0.5), 2), gt, crop_border=0)
        scores.append(Score(file.name, complexity(np.ascontiguousarray(gt)).score, psnr, 0))
    assert analyze.correlate(scores, "psnr").pearson == pytest.approx(-0.86, abs=0.005)
