"""The registry of samplers and ComplexitySampler: what is drawn, by which process, and after a resumption."""

import pickle
import re
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from conftest import PICTURES, Workspace, tiny_options
from torch.utils.data import DataLoader

from rwkvir import checks
from rwkvir_data.complexity_sampler import ComplexitySampler, dataset_keys
from rwkvir_data.samplers import SAMPLER_REGISTRY, Draw, Run, RunSampler

SCORES = np.linspace(-16, 10, 200) ** 3 / 100  # many near zero; most below
MODES = {
    "balanced": {},
    "uniform": {"bins": 4},
    "curriculum": {"iterations": 100},
    "weights": {"column": "likes"},
}


class Keys(torch.utils.data.Dataset):
    """A dataset of which only names and length are asked."""

    def __init__(self, count=200):
        self.keys = [f"p{i:03}" for i in range(count)]

    def __len__(self):
        return len(self.keys)

    def __getitem__(self, index):
        return index, *index.seed


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "train.parquet"
    rows = {"key": Keys().keys[::-1], "complexity": SCORES[::-1], "likes": np.arange(200)[::-1] % 5}
    pa.parquet.write_table(pa.table(rows), path)
    return str(path)


def sampler(table, mode="balanced", world=1, rank=0, ratio=1, run=Run(7, 10, 0, 0), **options):  # noqa: B008
    return ComplexitySampler(Keys(), world, rank, ratio, run, mode=mode, table=table, **{**MODES[mode], **options})


def epoch(drawn, number):
    drawn.set_epoch(number)
    return list(drawn)


def test_balanced_draws_half_from_each_side_of_zero_and_all_alike_within_a_side(table):
    below = int((SCORES < 0).sum())
    assert 100 < below
    drawn = Counter(epoch(sampler(table), 3))
    assert sum(drawn[i] for i in range(below)) == 100
    assert {drawn[i] for i in range(below)} == {0, 1}
    assert {drawn[i] for i in range(below, 200)} == {1, 2}


def test_uniform_draws_each_range_of_complexity_alike(table):
    edges = np.linspace(SCORES[0], SCORES[-1], 5)
    drawn = SCORES[epoch(sampler(table, "uniform"), 0)]
    assert np.histogram(drawn, edges)[0].tolist() == [50, 50, 50, 50]


def test_uniform_leaves_out_ranges_without_pictures(table):
    drawn = epoch(sampler(table, "uniform", bins=1000), 0)
    assert len(drawn) == 200


def test_a_curriculum_goes_from_low_to_high_and_then_draws_every_picture_once(table):
    drawn = sampler(table, "curriculum")  # of 100 iterations, 20 an epoch
    assert max(epoch(drawn, 0)[:10]) < 20
    for number in range(5):
        for position, index in enumerate(epoch(drawn, number)):
            iteration = number * 20 + position // 10
            assert index < np.ceil(200 * (0.1 + 0.9 * iteration / 100))
    assert max(epoch(drawn, 4)) > 180
    assert sorted(epoch(drawn, 5)) == list(range(200))


def test_weights_come_from_a_column(table):
    drawn = Counter(epoch(sampler(table, "weights", ratio=2), 0))
    for likes in range(5):
        assert {drawn[i] for i in range(likes, 200, 5)} == {likes}  # 400 draws over 200 pictures of weight 2 on average


@pytest.mark.parametrize("mode", MODES)
def test_an_epoch_has_its_own_order_and_drawing_it_changes_nothing(table, mode):
    one, other = sampler(table, mode), sampler(table, mode)
    iter(one)  # as BasicSR's prefetcher does
    first, second = epoch(one, 6), epoch(one, 7)
    assert first != second
    assert epoch(other, 7) == second and epoch(other, 6) == first
    assert epoch(sampler(table, mode, run=Run(8, 10, 0, 0)), 6) != first
    assert len({draw.seed for draw in first + second}) == 400


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_draws_of_one_without_overlap(table, mode, world):
    shares = [sampler(table, mode, world, rank, ratio=1.5) for rank in range(world)]
    assert {len(share) for share in shares} == {-(-300 // world)}
    drawn = [epoch(share, 2) for share in shares]
    assert {len(draws) for draws in drawn} == {-(-300 // world)}
    merged = [draw for draws in zip(*drawn, strict=True) for draw in draws]
    assert [draw.seed for draw in merged] == [(7, 2, position) for position in range(300)]
    if mode != "curriculum":  # in which a batch of several processes is a larger one
        assert merged == epoch(sampler(table, mode, ratio=1.5), 2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("world", [1, 2])
def test_a_resumed_run_goes_on_with_the_next_draw(table, mode, world):
    whole = sampler(table, mode, world, world - 1)
    length = whole.epoch_iterations
    resumed = sampler(table, mode, world, world - 1, run=Run(7, 10, 2, 2 * length + 3))
    assert epoch(resumed, 2) == epoch(whole, 2)[30:]
    assert [draw.seed for draw in resumed] == [draw.seed for draw in whole][30:]
    assert epoch(resumed, 3) == epoch(whole, 3)
    assert len(resumed) == len(whole)


def test_a_run_resumed_at_the_end_of_an_epoch_has_nothing_left_of_it(table):
    resumed = sampler(table, run=Run(7, 10, 2, 60))
    assert epoch(resumed, 2) == []
    assert len(epoch(resumed, 3)) == 200


def test_a_run_resumed_with_another_batch_begins_the_epoch_anew_and_says_so(table, caplog):
    resumed = sampler(table, "curriculum", run=Run(7, 40, 2, 60))
    assert "Iteration 60 is not in epoch 2 of 5 iterations each: batch size, " in caplog.text
    assert len(epoch(resumed, 2)) == 200
    assert epoch(resumed, 3)[0].seed == (7, 3, 0)
    assert resumed.iterations()[[0, 39, 40]].tolist() == [65, 65, 66]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_draw_reaches_the_dataset_with_its_seed(table, workers):
    drawn = sampler(table)
    loader = DataLoader(drawn_from := Keys(), sampler=drawn, batch_size=10, num_workers=workers)
    rows = torch.cat([torch.stack(batch, 1) for batch in loader]).tolist()
    assert rows == [[int(draw), *draw.seed] for draw in drawn]
    assert len(drawn_from) == 200


def test_a_draw_is_an_index():
    draw = pickle.loads(pickle.dumps(Draw(np.int64(2), (1, 2, 3))))
    assert ["a", "b", "c"][draw] == "c"
    assert draw.seed == (1, 2, 3)


def test_names_of_basicsrs_datasets():
    stock = Keys()
    del stock.keys
    stock.opt, stock.paths = {"io_backend": {"type": "disk"}}, [{"gt_path": "/x.y/a b.png"}, {"gt_path": "/x.y/c.jpg"}]
    assert dataset_keys(stock) == ["a b", "c"]
    stock.opt, stock.paths = {"io_backend": {"type": "lmdb"}}, ["sub/a", "sub/b"]
    assert dataset_keys(stock) == ["sub/a", "sub/b"]


@pytest.mark.parametrize(
    ("mode", "options", "message"),
    [
        ("balance", {}, "mode 'balance' is unknown; write one of balanced, uniform, curriculum, weights"),
        ("uniform", {"bins": None}, "mode uniform needs 'bins'; add it"),
        ("balanced", {"bins": 3}, "option 'bins' means nothing with mode balanced; remove it"),
        ("curriculum", {"iterations": 0}, "'iterations' must be a whole number above 0, not 0; correct it"),
        ("weights", {"column": "dislikes"}, "has no column 'dislikes', but key, complexity, likes; give one"),
        ("weights", {"column": "complexity"}, "'complexity' of '.*' holds negative weights or zeros alone; correct it"),
    ],
)
def test_options_that_cannot_be(table, mode, options, message):
    with pytest.raises(ValueError, match=message):
        ComplexitySampler(
            Keys(), 1, 0, 1, Run(7, 10, 0, 0), mode=mode, table=table, **{**MODES.get(mode, {}), **options}
        )


def test_tables_that_do_not_fit(tmp_path):
    path = tmp_path / "t.parquet"
    with pytest.raises(FileNotFoundError, match=r"table '.*t.parquet' does not exist; correct the path or run"):
        sampler(str(path))
    path.write_bytes(b"no table")
    with pytest.raises(ValueError, match=r"table '.*t.parquet' cannot be read \(.*\); make it again"):
        sampler(str(path))
    pa.parquet.write_table(pa.table({"name": ["p000"]}), path)
    with pytest.raises(ValueError, match="has no column 'key', but name; give one that `resyn build` wrote"):
        sampler(str(path))
    scores = [None, float("nan"), *SCORES[2:190]]
    pa.parquet.write_table(pa.table({"key": Keys().keys[:190], "complexity": scores}), path)
    with pytest.raises(
        ValueError, match=r"has no complexity for 'p000' \(12 of 200 pictures lack one\); give the table"
    ):
        sampler(str(path))
    pa.parquet.write_table(pa.table({"key": Keys().keys, "complexity": SCORES - 200}), path)
    with pytest.raises(ValueError, match=r"all pictures lie on one side of zero .*; choose another mode"):
        sampler(str(path))


# In BasicSR's loop

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "rwkvir")


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    """A table for the pictures of the `pictures` fixture."""
    path = tmp_path_factory.mktemp("scores") / "train.parquet"
    keys = [f"picture{i}" for i in range(PICTURES)]
    pa.parquet.write_table(pa.table({"key": keys, "complexity": np.arange(PICTURES) - 3.5}), path)
    return str(path)


def with_sampler(options, scores):
    """Option of a run of 8 iterations, 2 an epoch, that are all saved."""
    del options["val"], options["datasets"]["val"]
    options["datasets"]["train"]["type"] = "ReSynPairedDataset"
    options["datasets"]["train"]["sampler"] = {"type": "ComplexitySampler", "mode": "balanced", "table": scores}
    options["train"]["total_iter"], options["logger"]["save_checkpoint_freq"] = 8, 1
    return options


@pytest.fixture
def sampled(options, scores):
    return with_sampler(options, scores)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, pictures, scores):
    """A finished run, and its options."""
    workspace, options = Workspace(tmp_path_factory.mktemp("sampled")), with_sampler(tiny_options(pictures), scores)
    result = workspace.train(options)
    assert result.returncode == 0, result.stderr
    return workspace, options


def iterations(log):
    """The iterations that a log of print_freq 1 shows."""
    return [int(number) for number in re.findall(r"iter: *(\d+), lr", log)]


def weights(workspace, iteration):
    return torch.load(workspace.root / f"experiments/tiny/models/net_g_{iteration}.pth")["params"]


def equal(some, others):
    return all(torch.equal(some[key], others[key]) for key in some)


def test_the_stock_loop_reads_it(uninterrupted):
    assert iterations(uninterrupted[0].log()) == list(range(1, 9))


def check_resumed_at_3(finished, workspace, resume):
    """Resume a run in `workspace` from what `finished` had saved amid its second epoch; it ends in the same weights."""
    for file in ("training_states/3.state", "models/net_g_3.pth"):
        target = workspace.root / "experiments/tiny" / file
        target.parent.mkdir(parents=True)
        target.write_bytes((finished.root / "experiments/tiny" / file).read_bytes())
    result = resume()
    assert result.returncode == 0, result.stderr
    assert iterations(workspace.log()) == [4, 5, 6, 7, 8]
    assert not equal(weights(finished, 3), weights(finished, 8))
    assert equal(weights(workspace, 8), weights(finished, 8))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_resumed_amid_an_epoch_gives_the_same_weights_bit_by_bit(uninterrupted, workspace, workers):
    finished, options = uninterrupted
    options["datasets"]["train"]["num_worker_per_gpu"] = workers
    check_resumed_at_3(finished, workspace, lambda: workspace.train(options, "--auto_resume"))


def test_two_processes_draw_from_it(workspace, sampled):
    sampled["datasets"]["train"].update(batch_size_per_gpu=2, num_worker_per_gpu=1)
    result = workspace.run("train", "-opt", workspace.write(sampled), "--launcher", "pytorch", python=TORCHRUN)
    assert result.returncode == 0, result.stderr
    assert iterations(workspace.log()) == list(range(1, 9))


@pytest.mark.slow
def test_two_processes_resumed_amid_an_epoch_give_the_same_weights_bit_by_bit(tmp_path, sampled):
    sampled["datasets"]["train"].update(batch_size_per_gpu=2, num_worker_per_gpu=2)
    workspaces = [Workspace(tmp_path / name) for name in ("finished", "resumed")]

    def train(workspace, *words):
        workspace.root.mkdir(exist_ok=True)
        option_file = workspace.write(sampled)
        return workspace.run("train", "-opt", option_file, "--launcher", "pytorch", *words, python=TORCHRUN)

    result = train(workspaces[0])
    assert result.returncode == 0, result.stderr
    check_resumed_at_3(*workspaces, lambda: train(workspaces[1], "--auto_resume"))


def test_a_fault_of_the_sampler_is_one_sentence(workspace, sampled, one_sentence):
    sampled["datasets"]["train"]["sampler"]["mode"] = "best"
    sentence = one_sentence(workspace.train(sampled))
    assert sentence.endswith("mode 'best' is unknown; write one of balanced, uniform, curriculum, weights.")


def test_faults_in_the_option_file_are_found_before_anything_is_built(sampled):
    def found():
        return [str(finding) for finding in checks.check_sampler(sampled, True, False)]

    sampler = sampled["datasets"]["train"]["sampler"]
    assert found() == []
    sampler["moed"] = sampler.pop("mode")
    assert found() == [
        "datasets:train:sampler:moed is not an option of ComplexitySampler; did you mean mode?",
        "datasets:train:sampler:mode is missing, and ComplexitySampler has no default for it; add it",
    ]
    sampler["type"], sampled["manual_seed"] = "ComplexitySample", None
    assert found() == [
        "datasets:train:sampler:type is 'ComplexitySample', which is not a registered sampler; "
        "did you mean ComplexitySampler?",
        "manual_seed is missing, from which the sampler of datasets:train draws; add a number",
    ]
    del sampled["datasets"]["train"]["sampler"], sampled["manual_seed"]
    assert found() == []


def test_plugins_can_register_their_own():
    @SAMPLER_REGISTRY.register()
    class Backwards(RunSampler):
        def draw(self, generator):
            return np.arange(self.total_size)[::-1]

    try:
        built = SAMPLER_REGISTRY.get("Backwards")(Keys(), 2, 1, 1, Run(0, 4, 0, 0))
        assert list(built)[:3] == [198, 196, 194]
    finally:
        del SAMPLER_REGISTRY._obj_map["Backwards"]
