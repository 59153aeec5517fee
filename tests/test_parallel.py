import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from rwkvir_data.parallel import AHEAD, available_cores, bounded_map, workers


def test_a_killed_worker():
    with pytest.raises(
        OSError, match="a worker was killed, perhaps for lack of memory; try again with fewer --workers"
    ):
        with workers(1) as pool:
            list(bounded_map(pool, os._exit, [1, 1]))


def test_the_map_is_in_order_and_takes_few_items_ahead():
    taken = []

    def items():
        for i in range(200):
            taken.append(i)
            yield i

    with ThreadPoolExecutor(2) as pool:
        for count, result in enumerate(bounded_map(pool, lambda i: -i, items())):
            assert result == -count
            assert len(taken) <= count + AHEAD * available_cores() + 1
    assert len(taken) == 200
