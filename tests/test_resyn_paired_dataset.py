import pickle
import random
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from basicsr.data import build_dataloader, build_dataset
from basicsr.data.paired_image_dataset import PairedImageDataset

from rwkvir_data import ReSynPairedDataset, encode, write_lmdb
from rwkvir_data.degrade import degrade
from rwkvir_data.degraded_picture import DegradedPicture
from rwkvir_data.picture_store import open_store
from rwkvir_data.resyn_paired_dataset import whole_repeats
from rwkvir_data.samplers import Draw
from rwkvir_data.tiles import Tiles, cut, write_tiles


def picture(seed, height, width):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


GTS = {f"p{i}": picture(i, 32, 40 + 4 * i) for i in range(5)}
LQS = {key: np.ascontiguousarray(gt[::4, ::4]) for key, gt in GTS.items()}


def write_folder(path, pictures, suffix=".png"):
    path.mkdir()
    for key, content in pictures.items():
        cv2.imwrite(str(path / f"{key}{suffix}"), content[..., ::-1])


@pytest.fixture(params=["disk", "lmdb"])
def opt(request, tmp_path):
    """Options of a training set of GTS and LQS, once in folders and once in LMDBs."""
    suffix = ".lmdb" if request.param == "lmdb" else ""
    roots = {f"dataroot_{kind}": str(tmp_path / f"{kind}{suffix}") for kind in ("gt", "lq")}
    for root, pictures in zip(roots.values(), (GTS, LQS), strict=True):
        if request.param == "lmdb":
            write_lmdb(root, [encode(key, pictures[key]) for key in reversed(pictures)])
        else:
            write_folder(tmp_path / root, pictures)
    io_backend = {"type": request.param}
    augment = {"gt_size": 16, "use_hflip": True, "use_rot": True}
    return (
        {"name": "tiny", "type": "ReSynPairedDataset", "phase": "train", "scale": 4, "io_backend": io_backend}
        | roots
        | augment
    )


@pytest.fixture
def disk(tmp_path):
    """Options of a training set in folders."""
    write_folder(tmp_path / "gt", GTS)
    write_folder(tmp_path / "lq", LQS)
    roots = {"dataroot_gt": str(tmp_path / "gt"), "dataroot_lq": str(tmp_path / "lq")}
    return {"name": "tiny", "phase": "train", "scale": 4, "io_backend": {"type": "disk"}, "gt_size": 16} | roots


@pytest.fixture
def lmdbs(tmp_path):
    """Options of a training set in LMDBs."""
    roots = {"dataroot_gt": str(tmp_path / "gt.lmdb"), "dataroot_lq": str(tmp_path / "lq.lmdb")}
    for root, pictures in zip(roots.values(), (GTS, LQS), strict=True):
        write_lmdb(root, [encode(key, content) for key, content in pictures.items()])
    return {"name": "tiny", "phase": "train", "scale": 4, "io_backend": {"type": "lmdb"}, "gt_size": 16} | roots


def fails(opt, kind, message):
    with pytest.raises(kind, match=message):
        dataset = ReSynPairedDataset(opt)
        for i in range(len(dataset)):
            dataset[i]


def test_basicsr_builds_it(opt):
    assert isinstance(build_dataset(opt), ReSynPairedDataset)


def test_validation_gives_whole_pictures_in_the_order_of_their_names(opt):
    dataset = ReSynPairedDataset(opt | {"phase": "val"})
    assert len(dataset) == 5
    for i, key in enumerate(sorted(GTS)):
        item = dataset[i]
        assert key in item["gt_path"]
        assert key in item["lq_path"]
        assert item["gt"].dtype == item["lq"].dtype == torch.float32
        assert np.array_equal(item["gt"].numpy() * 255, GTS[key].transpose(2, 0, 1))
        assert np.array_equal(item["lq"].numpy() * 255, LQS[key].transpose(2, 0, 1))


def test_folders_and_lmdbs_have_one_order(tmp_path):
    """With extensions a-b.png would come before a.png."""
    names = ["a", "a-b", "a1", "B"]
    write_folder(tmp_path / "folder", dict.fromkeys(names, GTS["p0"]))
    write_lmdb(tmp_path / "some.lmdb", [encode(name, GTS["p0"]) for name in names])
    expected = ["B", "a", "a-b", "a1"]
    assert open_store(str(tmp_path / "folder"), "disk").keys() == expected
    assert open_store(str(tmp_path / "some.lmdb"), "lmdb").keys() == expected


def test_the_same_seed_gives_the_crops_of_the_stock_dataset(disk):
    augment = {"use_hflip": True, "use_rot": True}
    stock, ours = PairedImageDataset(disk | augment), ReSynPairedDataset(disk | augment)
    random.seed(0)
    expected = [stock[i] for _ in range(8) for i in range(5)]
    random.seed(0)
    for item in expected:
        got = ours[ours.keys.index(Path(item["gt_path"]).stem)]
        assert torch.equal(got["gt"], item["gt"])
        assert torch.equal(got["lq"], item["lq"])
        assert (got["gt_path"], got["lq_path"]) == (item["gt_path"], item["lq_path"])


def test_crops_are_aligned(opt):
    dataset = ReSynPairedDataset(opt | {"use_hflip": False, "use_rot": False})
    for i in range(5):
        item = dataset[i]
        assert item["gt"].shape == (3, 16, 16)
        assert torch.equal(item["gt"][:, ::4, ::4], item["lq"])


@pytest.mark.parametrize("opt", ["lmdb"], indirect=True)
@pytest.mark.parametrize(("method", "workers"), [("fork", 2), ("spawn", 1)])
def test_workers_read_an_lmdb_that_the_main_process_has_open(opt, method, workers):
    dataset = ReSynPairedDataset(opt | {"phase": "val"})
    whole = [dataset[i]["gt"] for i in range(5)]
    loader = torch.utils.data.DataLoader(
        dataset, num_workers=workers, multiprocessing_context=method, persistent_workers=True
    )
    for _ in range(2):
        assert all(torch.equal(item["gt"][0], gt) for item, gt in zip(loader, whole, strict=True))
    assert torch.equal(dataset[0]["gt"], whole[0])


def test_basicsrs_loader_takes_all_of_its_options(opt):
    loader_opt = {
        "batch_size_per_gpu": 2,
        "num_worker_per_gpu": 0,
        "dataset_enlarge_ratio": 2,
        "prefetch_mode": "cpu",
        "num_prefetch_queue": 1,
        "pin_memory": False,
        "persistent_workers": False,
        "use_shuffle": True,
    }
    loader = build_dataloader(build_dataset(opt | loader_opt), opt | loader_opt, num_gpu=0, seed=0)
    assert [batch["lq"].shape for batch in loader] == [(2, 3, 4, 4)] * 2


def test_it_can_be_pickled_after_reading(lmdbs):
    dataset = ReSynPairedDataset(lmdbs | {"phase": "val"})
    gt = dataset[0]["gt"]
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[0]["gt"], gt)


@pytest.mark.parametrize("color", ["y", "gray"])
def test_luma(disk, color):
    """White is 1 in gray, and 235/255 in BT.601's luma; black 0 and 16/255."""
    for folder, side in (("dataroot_gt", 8), ("dataroot_lq", 2)):
        for i, value in enumerate((0, 255)):
            cv2.imwrite(f"{disk[folder]}/a{i}.png", np.full((side, side, 3), value, np.uint8))
    dataset = ReSynPairedDataset(disk | {"phase": "val", "color": color})
    black, white = dataset[0]["gt"], dataset[1]["lq"]
    assert black.shape == (1, 8, 8)
    assert white.shape == (1, 2, 2)
    low, high = {"y": (16 / 255, 235 / 255), "gray": (0, 1)}[color]
    assert torch.allclose(black, torch.tensor(float(low)))
    assert torch.allclose(white, torch.tensor(float(high)))


def test_names_of_lq_pictures_may_follow_a_template_and_end_otherwise(disk, tmp_path):
    write_folder(tmp_path / "x4", {f"{key}x4": lq for key, lq in LQS.items()}, ".jpg")
    dataset = ReSynPairedDataset(disk | {"dataroot_lq": str(tmp_path / "x4"), "filename_tmpl": "{}x4"})
    assert dataset[2]["lq_path"] == str(tmp_path / "x4" / "p2x4.jpg")


def test_a_meta_info_file_selects(opt, tmp_path):
    (tmp_path / "list.txt").write_text("p3.png (32,52,3)\np1.png (32,44,3)\n")
    dataset = ReSynPairedDataset(opt | {"meta_info_file": str(tmp_path / "list.txt")})
    assert dataset.keys == ["p1", "p3"]


def test_validation_drops_the_rows_and_columns_that_lq_does_not_account_for(disk):
    cv2.imwrite(f"{disk['dataroot_gt']}/p0.png", picture(0, 35, 41))
    assert ReSynPairedDataset(disk | {"phase": "val"})[0]["gt"].shape == (3, 32, 40)


def smooth(height, width):
    """A picture with soft and hard edges, BGR."""
    return cv2.resize(picture(3, height // 5, width // 5), (width, height), interpolation=cv2.INTER_CUBIC)


def bgr_to_rgb(content):
    return content[..., ::-1] if content.ndim == 3 else content


@pytest.mark.parametrize("gray", [False, True])
@pytest.mark.parametrize("name", ["x2", "x3", "x4", "jpeg10", "jpeg40"])
def test_a_part_that_is_degraded_is_that_part_of_the_degraded_whole(name, gray):
    gt = smooth(95, 121)[..., 0] if gray else smooth(95, 121)
    made = DegradedPicture(gt, name, "key", 0)
    height, width = made.shape[:2]
    scale = gt.shape[0] // height
    whole = bgr_to_rgb(degrade(bgr_to_rgb(gt[: height * scale, : width * scale]), name))
    assert made.shape == whole.shape
    assert np.array_equal(made[:, :], whole)
    for top in range(0, height - 8, 3):
        for left in range(0, width - 9, 5):
            part = np.s_[top : top + 8, left : left + 9]
            assert np.array_equal(made[part], whole[part])


def test_a_part_of_a_picture_in_tiles_is_degraded_alike(tmp_path):
    gt = smooth(96, 120)
    write_tiles(tmp_path / "x.tiles", [cut("p", gt)])
    tiled = Tiles(str(tmp_path / "x.tiles")).picture("p")
    for name in ("x4", "jpeg10"):
        whole, made = DegradedPicture(gt, name, "p", 0), DegradedPicture(tiled, name, "p", 0)
        assert np.array_equal(made[7:15, 11:19], whole[7:15, 11:19])


@pytest.mark.parametrize("color", ["rgb", "gray"])
@pytest.mark.parametrize("name", ["x4", "noise25", "jpeg10"])
def test_lq_can_be_made_when_it_is_needed(disk, name, color):
    del disk["dataroot_lq"]
    opt = disk | {"degradation": name, "color": color, "scale": 4 if name == "x4" else 1}
    whole = ReSynPairedDataset(opt | {"phase": "val"})[2]
    gt = GTS["p2"] if color == "rgb" else cv2.imread(whole["gt_path"], cv2.IMREAD_GRAYSCALE)
    assert np.array_equal(whole["gt"].numpy() * 255, gt.transpose(2, 0, 1) if color == "rgb" else gt[None])
    lq = degrade(gt, name, "p2", 0)
    assert np.array_equal(whole["lq"].numpy() * 255, lq.transpose(2, 0, 1) if color == "rgb" else lq[None])
    assert whole["lq_path"] == whole["gt_path"]
    item = ReSynPairedDataset(opt)[2]
    assert item["gt"].shape[1:] == (16, 16)
    assert item["lq"].shape[1:] == ((4, 4) if name == "x4" else (16, 16))


def test_noise_has_its_strength_and_is_drawn_anew_for_each_item(disk):
    cv2.imwrite(f"{disk['dataroot_gt']}/p0.png", np.full((64, 64, 3), 128, np.uint8))
    del disk["dataroot_lq"]
    dataset = ReSynPairedDataset(disk | {"degradation": ["noise10", "noise50"], "scale": 1, "gt_size": 64})
    noises = [(item["lq"] - item["gt"]) * 255 for item in (dataset[Draw(0, (0, 0, i))] for i in range(20))]
    assert {round(noise.std().item(), -1) for noise in noises} == {10, 50}
    assert len({noise.sum().item() for noise in noises}) == 20
    validation = ReSynPairedDataset(disk | {"degradation": "noise10", "scale": 1, "phase": "val"})
    assert torch.equal(validation[0]["lq"], validation[0]["lq"])


DRAWS = [Draw(i % 5, (seed, epoch, i)) for seed in (0, 1) for epoch in (0, 1) for i in range(6)]


@pytest.mark.parametrize(("method", "workers"), [("fork", 1), ("fork", 2), ("spawn", 1)])
def test_an_item_depends_on_seed_epoch_and_position_alone(disk, method, workers):
    del disk["dataroot_lq"]
    dataset = ReSynPairedDataset(disk | {"degradation": ["noise15", "jpeg30"], "scale": 1})
    random.seed(workers)
    expected = [dataset[draw] for draw in DRAWS]
    assert len({item["lq"].sum().item() for item in expected}) == len(DRAWS)
    loader = torch.utils.data.DataLoader(
        dataset, 4, sampler=DRAWS, num_workers=workers, multiprocessing_context=method, persistent_workers=True
    )
    for _ in range(2):
        for kind in ("lq", "gt"):
            got = torch.cat([batch[kind] for batch in loader])
            assert torch.equal(got, torch.stack([item[kind] for item in expected]))


def test_repeats_come_as_near_to_the_shares_as_promised():
    assert whole_repeats([9000, 3000], [9000, 3000]) == [1, 1]
    assert whole_repeats([10, 1000], [0.5, 0.5]) == [100, 1]
    for counts, shares in [((7, 11), (0.75, 0.25)), ((100, 30, 1), (5, 3, 2)), ((3, 1000), (0.001, 0.999))]:
        listed = np.multiply(whole_repeats(list(counts), list(shares)), counts)
        assert np.abs(listed / listed.sum() - np.array(shares) / sum(shares)).max() <= 0.005


@pytest.fixture
def two_sources(disk, tmp_path):
    """Options of 5 real and 2 synthetic pictures, to be seen equally often."""
    for kind, pictures in (("gt", GTS), ("lq", LQS)):
        write_folder(tmp_path / f"synthetic_{kind}", {"s0": pictures["p0"], "s1": pictures["p1"]})
    places = {key: disk.pop(key) for key in ("dataroot_gt", "dataroot_lq")}
    more = {f"dataroot_{kind}": str(tmp_path / f"synthetic_{kind}") for kind in ("gt", "lq")}
    return disk | {"sources": [{**places, "share": 1}, {**more, "share": 1, "kind": "synthetic"}]}


def test_sources_come_up_by_their_shares(two_sources):
    dataset = ReSynPairedDataset(two_sources)
    assert dataset.keys == [f"p{i}" for i in range(5)] * 2 + ["s0", "s1"] * 5
    items = [dataset[i] for i in range(len(dataset))]
    assert [item["kind"] for item in items] == ["real"] * 10 + ["synthetic"] * 10
    assert [Path(item["lq_path"]).stem for item in items] == dataset.keys
    for source in two_sources["sources"]:
        del source["share"]
    assert ReSynPairedDataset(two_sources).keys == ["p0", "p1", "p2", "p3", "p4", "s0", "s1"]


def test_faults_of_sources(two_sources):
    one, other = two_sources["sources"]

    def source_fails(change, message):
        fails(two_sources | {"sources": [one, {**other, **change}]}, ValueError, message)

    source_fails({"shares": 1}, "dataset 'tiny', source 2: unknown option 'shares'; did you mean 'share'")
    source_fails({"dataroot_lq": None}, "source 2: option 'dataroot_lq' is missing; add it")
    source_fails({"kind": "painted"}, "source 2: unknown kind 'painted'; write one of real, synthetic")
    source_fails({"share": 0}, "source 2: share 0 is not above 0; correct it or remove the source")
    source_fails(one, "2 sources have a picture 'p.'; rename the pictures of one")
    del other["share"]
    source_fails({}, "source 2: some sources have a 'share' and some have none; give it to all or to none")
    fails(two_sources | {"dataroot_gt": "x"}, ValueError, "'dataroot_gt' stands beside 'sources'; move it into each")
    fails(two_sources | {"sources": []}, ValueError, "'sources' is empty; list at least one with dataroot_gt and")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"degradation": "x3"}, "degradation 'x3' does not fit scale 4; write x4"),
        ({"degradation": ["noise0"], "scale": 1}, "'noise0' does not fit scale 1; write noise<sigma> or jpeg<quality>"),
        (
            {"degradation": ["x4", "x4"], "phase": "val"},
            "2 degradations; only training can draw from several, give one",
        ),
        ({"degradation": []}, "0 degradations; only"),
        ({"degradation": "x4", "dataroot_lq": "lq"}, "both dataroot_lq and degradation are given; remove one of them"),
    ],
)
def test_degradations_that_cannot_be(disk, change, message):
    del disk["dataroot_lq"]
    fails(disk | change, ValueError, message)


def test_an_unknown_option(disk):
    fails(
        disk | {"use_hflips": True},
        ValueError,
        "dataset 'tiny': unknown option 'use_hflips'; did you mean 'use_hflip'?",
    )
    fails(disk | {"zzz": 1}, ValueError, "unknown option 'zzz'; Known are batch_size_per_gpu, .*color, ")


@pytest.mark.parametrize("option", ["phase", "scale", "dataroot_gt", "dataroot_lq", "io_backend", "gt_size"])
def test_a_missing_option(disk, option):
    del disk[option]
    fails(disk, ValueError, f"dataset 'tiny': option '{option}' is missing; add it")


def test_a_gt_size_that_the_scale_does_not_divide(disk):
    fails(disk | {"gt_size": 18}, ValueError, "gt_size 18 is not a multiple of scale 4; make it 16")


def test_an_unknown_color(disk):
    fails(disk | {"color": "grey"}, ValueError, "unknown color 'grey'; write one of rgb, y, gray")


def test_an_unknown_backend(disk):
    fails(disk | {"io_backend": {"type": "zip"}}, ValueError, "io_backend type 'zip' is unknown; write 'disk'")


def test_a_missing_folder(disk):
    fails(disk | {"dataroot_lq": "/nowhere"}, FileNotFoundError, "there is no folder '/nowhere'; correct the path")


def test_a_folder_without_pictures(disk, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".hidden").write_text("")
    fails(
        disk | {"dataroot_gt": str(tmp_path / "empty")},
        FileNotFoundError,
        "empty' has no pictures .*; correct the path",
    )


def test_two_pictures_of_one_name(disk):
    cv2.imwrite(f"{disk['dataroot_gt']}/p1.jpg", GTS["p1"])
    fails(disk, ValueError, r"p1\.jpg and p1\.png in .* share a name; rename one")


def test_a_gt_picture_without_lq(opt, tmp_path):
    few = {key: LQS[key] for key in ("p0", "p1", "p2")}
    root = str(tmp_path / f"few{'.lmdb' if opt['io_backend']['type'] == 'lmdb' else ''}")
    if root.endswith(".lmdb"):
        write_lmdb(root, [encode(key, lq) for key, lq in few.items()])
    else:
        write_folder(tmp_path / "few", few)
    fails(
        opt | {"dataroot_lq": root},
        ValueError,
        f"'{root}' has no 'p3' \\(2 of 5 missing\\), which .*; make the missing",
    )


def test_a_meta_info_file_that_is_missing(disk):
    fails(
        disk | {"meta_info_file": "/none.txt"}, FileNotFoundError, "meta_info_file '/none.txt' does not exist; correct"
    )


def test_a_meta_info_file_that_names_another_picture(disk, tmp_path):
    (tmp_path / "list.txt").write_text("q9.png\n")
    message = "'q9' of .*list.txt' is not in .*gt' \\(1 missing in all\\); correct"
    fails(disk | {"meta_info_file": str(tmp_path / "list.txt")}, ValueError, message)


def test_an_lq_picture_of_another_size(disk):
    cv2.imwrite(f"{disk['dataroot_lq']}/p1.png", picture(0, 8, 10))
    message = "GT '.*p1.png' has 32x44 pixels, but LQ has 8x10, which at scale 4 wants 32x40; correct `scale`"
    fails(disk, ValueError, message)
    fails(disk | {"phase": "val"}, ValueError, message)


def test_a_picture_smaller_than_the_crop(disk):
    fails(
        disk | {"gt_size": 36},
        ValueError,
        "GT '.*p0.png' has 32x40 pixels, fewer than gt_size 36; lower gt_size or remove",
    )


@pytest.mark.parametrize("share", [0, 0.5])
def test_a_truncated_picture(disk, tmp_path, share):
    file = tmp_path / "lq" / "p2.png"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    fails(disk, ValueError, "lq/p2.png' .* cannot be decoded: truncated or not a picture; replace or remove it")


def test_a_name_that_is_no_lmdb(lmdbs, tmp_path):
    fails(
        lmdbs | {"dataroot_gt": str(tmp_path)},
        ValueError,
        "does not end in .lmdb; correct the path, or write 'type: disk'",
    )


@pytest.mark.parametrize("part", ["data.mdb", "meta_info.txt"])
def test_an_lmdb_that_lacks_a_part(lmdbs, tmp_path, part):
    (tmp_path / "lq.lmdb" / part).unlink()
    fails(lmdbs, FileNotFoundError, f"lq.lmdb' has no {part}; correct the path or make the LMDB again")


def test_an_lmdb_of_other_bytes(lmdbs, tmp_path):
    (tmp_path / "gt.lmdb" / "data.mdb").write_bytes(b"junk" * 5000)
    fails(lmdbs, ValueError, "LMDB '.*gt.lmdb' cannot be read .*; make it again")


def test_a_truncated_lmdb(lmdbs, tmp_path):
    file = tmp_path / "gt.lmdb" / "data.mdb"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    fails(lmdbs, ValueError, r"LMDB '.*gt.lmdb' cannot be read \(data.mdb is truncated: .* bytes\); make it again")


def test_an_lmdb_that_lacks_a_key(lmdbs, tmp_path):
    for root in ("gt.lmdb", "lq.lmdb"):
        with (tmp_path / root / "meta_info.txt").open("a") as meta:
            meta.write("p9.png (32,40,3) 1\n")
    fails(lmdbs, ValueError, "gt.lmdb' lacks 'p9', which its meta_info.txt names; make it again")


def test_an_lmdb_entry_that_is_no_picture(lmdbs, tmp_path):
    whole = encode("p0", GTS["p0"])
    write_lmdb(tmp_path / "cut.lmdb", [whole._replace(key=key, png=whole.png[:99]) for key in GTS])
    fails(lmdbs | {"dataroot_gt": str(tmp_path / "cut.lmdb")}, ValueError, "'p0' in '.*cut.lmdb' cannot be decoded")
