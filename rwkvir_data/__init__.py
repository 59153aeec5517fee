"""Data for BasicSR: datasets, LMDBs, synthetic pictures. Importing it registers ReSynPairedDataset."""

from rwkvir import compat

compat.apply()  # before BasicSR is imported

from rwkvir_data.dead_leaves import dead_leaves  # noqa: E402  needs compat first
from rwkvir_data.lmdb_pack import encode, write_lmdb  # noqa: E402
from rwkvir_data.resyn_paired_dataset import ReSynPairedDataset  # noqa: E402

__all__ = ["ReSynPairedDataset", "dead_leaves", "encode", "write_lmdb"]
