"""RWKV-IR for BasicSR. Importing this package registers the network as `type: RWKVIR`."""

from rwkvir import compat

compat.apply()

from rwkvir_arch.bi_wkv import bi_wkv, bi_wkv_reference, cross_bi_wkv, cross_bi_wkv_reference  # noqa: E402
from rwkvir_arch.rwkvir_arch import RWKVIR  # noqa: E402

__all__ = ["RWKVIR", "bi_wkv", "bi_wkv_reference", "cross_bi_wkv", "cross_bi_wkv_reference"]
