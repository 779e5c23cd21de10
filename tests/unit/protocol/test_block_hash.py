"""Block hashes: golden vectors that every process, language and release must reproduce."""

import subprocess
import sys
from hashlib import blake2b

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.block_hash import hash_block, hash_blocks, root_hash

ROOT = root_hash("model-a")
tokens = st.lists(st.integers(0, 2**32 - 1), max_size=80)


def test_golden_vectors() -> None:
    assert ROOT.hex() == "d9f77ffacc8fa44e71d36bdecdf226c0"
    assert (
        root_hash("model-a", adapter="sql", cache_salt="tenant").hex()
        == "e698af94b18b7618e8c284401133e680"
    )
    assert [h.hex() for h in hash_blocks(range(8), 4, root=ROOT)] == [
        "a0257ad8dc2688af3f62fec7d658c666",
        "48f63115bf3251a42fd65da48fbc5b40",
    ]


def test_a_block_is_blake2b_of_parent_and_little_endian_words() -> None:
    data = ROOT + bytes([1, 0, 0, 0, 0, 1, 0, 0])
    assert hash_block(ROOT, [1, 256]) == blake2b(data, digest_size=16).digest()


def test_equal_in_another_process_with_another_hash_seed() -> None:
    code = (
        "from protocol.block_hash import *;"
        "print(hash_blocks(range(8), 4, root=root_hash('model-a'))[-1].hex())"
    )
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == hash_blocks(range(8), 4, root=ROOT)[-1].hex()


@given(tokens, st.integers(1, 17))
def test_only_full_blocks_are_named_and_known_ones_are_kept(ids: list[int], size: int) -> None:
    hashes = hash_blocks(ids, size, root=ROOT)
    assert len(hashes) == len(ids) // size
    for known in range(len(hashes) + 1):
        assert hash_blocks(ids, size, root=ROOT, known=hashes[:known]) == hashes


@given(tokens.filter(lambda ids: len(ids) >= 4), st.data())
def test_a_changed_token_changes_its_block_and_all_after_it(
    ids: list[int], data: st.DataObject
) -> None:
    place = data.draw(st.integers(0, len(ids) // 4 * 4 - 1))
    changed = [*ids[:place], (ids[place] + 1) % 2**32, *ids[place + 1 :]]
    before, after = (hash_blocks(x, 4, root=ROOT) for x in (ids, changed))
    assert before[: place // 4] == after[: place // 4]
    assert all(a != b for a, b in zip(before[place // 4 :], after[place // 4 :], strict=True))


@pytest.mark.parametrize(
    "other",
    [
        root_hash("model-b"),
        root_hash("model-a", adapter=""),
        root_hash("model-a", cache_salt=""),
        root_hash("model-a", adapter="x"),
        root_hash("model-a", cache_salt="x"),
        root_hash("model-ax"),
    ],
)
def test_no_model_adapter_or_salt_shares_a_root(other: bytes) -> None:
    assert other != ROOT


@given(st.text(max_size=4), st.text(max_size=4), st.text(max_size=4), st.text(max_size=4))
def test_a_salt_cannot_imitate_an_adapter(a: str, b: str, c: str, d: str) -> None:
    same = root_hash("m", adapter=a, cache_salt=b) == root_hash("m", adapter=c, cache_salt=d)
    assert same == ((a, b) == (c, d))
