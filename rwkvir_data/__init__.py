"""Data for BasicSR: datasets, samplers, LMDBs, synthetic pictures. Importing it registers the datasets and samplers."""

from rwkvir import compat

compat.apply()  # before BasicSR is imported

from rwkvir_data.complexity_sampler import ComplexitySampler  # noqa: E402  needs compat first
from rwkvir_data.dead_leaves import dead_leaves  # noqa: E402
from rwkvir_data.enlarged_sampler import EnlargedSampler  # noqa: E402, F401 - registers it
from rwkvir_data.lmdb_pack import encode, write_lmdb  # noqa: E402
from rwkvir_data.resyn_paired_dataset import ReSynPairedDataset  # noqa: E402
from rwkvir_data.samplers import SAMPLER_REGISTRY  # noqa: E402

__all__ = ["SAMPLER_REGISTRY", "ComplexitySampler", "ReSynPairedDataset", "dead_leaves", "encode", "write_lmdb"]
