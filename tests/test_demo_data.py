import shutil

import numpy as np
import pytest

from rwkvir import demo
from rwkvir.demo import Photo, Score, Window
from rwkvir_data import ReSynPairedDataset, demo_data
from rwkvir_data.demo_data import TRAIN_PHOTOS, VAL_PHOTOS, bicubic, build_demo_data


@pytest.fixture(scope="module")
def small():
    """The recipe with few pictures."""
    patch = pytest.MonkeyPatch()
    patch.setattr(demo_data, "TRAIN_PHOTOS", ["coins.png"])
    patch.setattr(demo_data, "VAL_PHOTOS", ["chelsea.png"])
    yield
    patch.undo()


@pytest.fixture(scope="module")
def built(small, tmp_path_factory):
    return build_demo_data(tmp_path_factory.mktemp("demo") / "data", leaves=1)


def dataset(root, phase, scale):
    roots = {"dataroot_gt": f"{root}/{phase}_GT.lmdb", "dataroot_lq": f"{root}/{phase}_LQ_x{scale}.lmdb"}
    return ReSynPairedDataset({"phase": "val", "scale": scale, "io_backend": {"type": "lmdb"}} | roots)


def test_no_photograph_is_both_trained_on_and_validated_with():
    """The two views of one motorcycle count as one scene."""
    scenes = [{file.split(".")[0].split("_")[0] for file in files} for files in (TRAIN_PHOTOS, VAL_PHOTOS)]
    assert scenes[0].isdisjoint(scenes[1])
    assert {"motorcycle_left.png", "motorcycle_right.png"} <= set(TRAIN_PHOTOS)
    keys = [[(phase, key) for phase, key, _ in demo_data._draws(2, 0) if phase == side] for side in ("train", "val")]
    assert len(keys[0]) > len(keys[1]) == 4
    assert {key.split("_")[0] for _, key in keys[0]} == scenes[0] | {"leaves"}
    assert {key for _, key in keys[1]} == scenes[1]


def test_photographs_are_cut_into_small_tiles_that_cover_them():
    draws = {key: draw for phase, key, draw in demo_data._draws(0, 0) if phase == "train"}
    tiles = {key: draw() for key, draw in draws.items() if key.startswith("motorcycle_left")}
    assert [tile.shape for tile in tiles.values()] == [(250, 370, 3), (250, 371, 3)] * 2
    tiles = list(tiles.values())
    whole = np.vstack([np.hstack(tiles[:2]), np.hstack(tiles[2:])])
    assert np.array_equal(whole, demo_data._photo("motorcycle_left.png"))


@pytest.mark.parametrize("scale", [2, 4])
def test_pairs(built, scale):
    val, train = dataset(built, "val", scale), dataset(built, "train", scale)
    assert (val.keys, train.keys) == (["chelsea"], ["coins_00", "leaves_0000"])
    photo = demo_data._photo("chelsea.png")[:300, :448]
    item = val[0]
    assert np.array_equal(item["gt"].numpy().transpose(1, 2, 0) * 255, photo)
    assert np.array_equal(item["lq"].numpy().transpose(1, 2, 0) * 255, bicubic(photo, 1 / scale))
    assert train[1]["gt"].shape == (3, 480, 480)
    grey = train[0]["gt"]
    assert (grey[0] == grey[1]).all()


def test_bicubic_is_matlabs():
    """A step edge reduced to half. MATLAB's kernel, widened by 2, weighs pixels at the distances 0.5, 1.5, 2.5 and 3.5
    with 0.4336, 0.1133, -0.0352 and -0.0117; so the second value is 255 * (0.1133 - 0.0352 - 0.0117) = 17.
    """
    row = np.repeat(np.uint8([0, 0, 0, 0, 255, 255, 255, 255]), 3).reshape(1, 8, 3).repeat(8, axis=0)
    assert (bicubic(row, 0.5)[..., 0] == [0, 17, 238, 255]).all()


def test_a_complete_set_is_kept_and_an_incomplete_or_other_one_is_replaced(built, monkeypatch, tmp_path):
    root = shutil.copytree(built, tmp_path / "copy")
    pools = []
    monkeypatch.setattr(demo_data, "ProcessPoolExecutor", lambda *_: pools.append(1) or SerialPool())

    def builds(**arguments):
        before = len(pools)
        build_demo_data(root, **{"leaves": 1} | arguments)
        return len(pools) - before

    assert builds() == 0
    shutil.rmtree(root / "val_GT.lmdb")
    assert builds() == 1
    assert (root / "val_GT.lmdb" / "meta_info.txt").read_bytes() == (
        built / "val_GT.lmdb" / "meta_info.txt"
    ).read_bytes()
    assert builds() == 0
    (root / "recipe.json").unlink()  # as a crash leaves it
    assert builds() == 1
    assert builds(seed=1) == 1
    assert builds(seed=1) == 0


class SerialPool:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def map(self, *arguments):
        return map(*arguments)


def test_a_missing_photograph(small, monkeypatch):
    monkeypatch.setattr(demo_data, "VAL_PHOTOS", ["nobody.png"])
    with pytest.raises(FileNotFoundError, match=r"comes without .*nobody\.png; install it again: pip install"):
        demo_data._photo("nobody.png")


def photo(name="a", better=True):
    """A photograph of one bright square, restored at its left half only; bicubic loses the square."""
    gt = np.zeros((80, 120, 3), np.uint8)
    gt[20:40, 60:80] = 255
    restored = gt.copy()
    restored[:, 70:] = 0
    nothing = np.zeros_like(gt)
    scores = Score(20, 0.5), Score(21, 0.625) if better else Score(19.5, 0.5)
    return Photo(name, nothing[::4, ::4], nothing, restored, gt, *scores)


def test_table():
    assert demo.table([photo(), photo("b", better=False)], "NET") == (
        "| photo | bicubic PSNR / SSIM | NET PSNR / SSIM | gain, dB |\n"
        "|---|---|---|---|\n"
        "| a | 20.00 / 0.5000 | 21.00 / 0.6250 | +1.00 |\n"
        "| b | 20.00 / 0.5000 | 19.50 / 0.5000 | -0.50 |\n"
        "| mean | 20.00 / 0.5000 | 20.25 / 0.5625 | +0.25 |\n"
    )


def test_the_window_lies_where_the_network_gains():
    window = demo.best_window(photo())
    assert (window.height, window.width) == (4, 6)
    assert window.cut(photo().restored, 4).any()
    assert window.cut(photo().gt, 4).shape == (16, 24, 3)
    assert window.cut(photo().lq, 1).shape == (4, 6, 3)
    assert 20 <= 4 * (window.top + window.height / 2) <= 40
    assert 60 <= 4 * (window.left + window.width / 2) <= 72


def test_a_window_at_the_border_stays_within_the_picture():
    corner = photo()
    corner.gt[:] = 0
    corner.gt[-4:, -4:] = 255
    window = demo.best_window(corner._replace(restored=corner.gt))
    assert window == Window(top=16, left=24, height=4, width=6)


def test_scores_are_basicsrs_of_the_y_channel():
    """Grey 100 against 110: Y differs by 10 * 219/255, so PSNR is 20 log10(255 / 8.588) = 29.45 dB."""
    a, b = np.full((32, 32, 3), 100, np.uint8), np.full((32, 32, 3), 110, np.uint8)
    a[:4], b[:4] = 0, 255  # the border is left out
    assert demo.score(a, b, scale=4).psnr == pytest.approx(29.45, abs=0.01)
    assert demo.score(b, b, scale=4).ssim == pytest.approx(1)


def test_a_run_is_finished_only_with_weights_of_the_same_options(tmp_path):
    run, option_file = tmp_path / "run", tmp_path / "tiny.yml"
    (run / "models").mkdir(parents=True)
    option_file.write_text("train: {total_iter: 2}")
    assert not demo.is_finished(run, str(option_file))
    (run / "tiny.yml").write_text("# as BasicSR copies it\ntrain: {total_iter: 2}")
    assert not demo.is_finished(run, str(option_file))
    (run / "models" / "net_g_latest.pth").touch()
    assert demo.is_finished(run, str(option_file))
    option_file.write_text("train: {total_iter: 3}")
    assert not demo.is_finished(run, str(option_file))


def test_the_demo_from_end_to_end_and_again(built, workspace, options):
    """Three iterations do not beat bicubic, and the demo says so; the second time there is nothing to train."""
    for phase in ("train", "val"):
        options["datasets"][phase] |= {
            "type": "ReSynPairedDataset",
            "dataroot_gt": str(built / f"{phase}_GT.lmdb"),
            "dataroot_lq": str(built / f"{phase}_LQ_x2.lmdb"),
            "io_backend": {"type": "lmdb"},
        }
    options["datasets"]["train"]["batch_size_per_gpu"] = 1
    options["train"]["total_iter"] = 3
    options["val"]["val_freq"] = 2
    options["logger"]["use_tb_logger"] = True
    option_file = workspace.write(options)
    without_data = (
        "import sys; from rwkvir import demo; demo.build_demo_data = print; sys.exit(demo.main(sys.argv[1:]))"
    )

    first = workspace.run("-opt", option_file, python=("-c", without_data))
    assert first.returncode == 1, first.stderr
    assert "chelsea: MSRResNet's" in first.stderr
    assert "iter:       3" in first.stderr
    results = workspace.root / "results" / "tiny"
    files = ["chelsea.png", "learning_curve.png", "overview.png", "table.md"]
    assert sorted(file.name for file in results.iterdir()) == files
    table = (results / "table.md").read_text()
    assert table in first.stdout

    again = workspace.run("-opt", option_file, "--output", "elsewhere", python=("-c", without_data))
    assert again.returncode == 1
    assert "iter:" not in again.stderr
    assert (workspace.root / "elsewhere" / "table.md").read_text() == table
