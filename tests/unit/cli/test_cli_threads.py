import pytest

from cli.threads import openmp_environment, threads_per_worker


@pytest.mark.parametrize(
    ("num_cores", "num_workers", "num_threads"),
    [(2, 1, 2), (2, 2, 2), (2, 3, 2), (2, 4, 1), (16, 4, 8), (1, 9, 1)],
)
def test_cores_are_shared_once_more_than_two_workers_want_them(num_cores, num_workers, num_threads):
    assert threads_per_worker(num_cores, num_workers) == num_threads


def test_threads_spin_briefly_only_where_others_need_the_core():
    crowded = openmp_environment(num_threads=2, is_crowded=True, environ={})
    assert crowded["OMP_NUM_THREADS"] == "2"
    assert 0 < int(crowded["GOMP_SPINCOUNT"]) <= 10_000
    alone = openmp_environment(num_threads=2, is_crowded=False, environ={})
    assert alone == {"OMP_NUM_THREADS": "2"}


def test_the_operator_has_the_last_word():
    environ = {"GOMP_SPINCOUNT": "0", "OMP_NUM_THREADS": "1"}
    assert openmp_environment(num_threads=2, is_crowded=True, environ=environ) == {}
