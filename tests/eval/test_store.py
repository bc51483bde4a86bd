"""Stores: what a kill leaves, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval.store import Store
from prefopt.errors import ConfigError, DataError


def test_records_come_back_in_the_order_they_were_added(tmp_path: Path) -> None:
    with Store(tmp_path / "a" / "s.jsonl", {"model": "m"}) as store:
        store.add([{"id": "x", "v": 1}, {"id": "y", "v": "ß\u2028"}])
        store.add([{"id": "x", "v": 9}, {"id": "z", "v": 3}])  # x is there: what is done stays done
    with Store(tmp_path / "a" / "s.jsonl", {"model": "m"}) as store:
        assert [record["v"] for record in store.values()] == [1, "ß\u2028", 3]
        assert "y" in store and len(store) == 3


def test_a_line_cut_off_at_any_byte_loses_that_record_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    with Store(path, {}) as store:
        store.add([{"id": "first", "v": "äö"}])
        kept = path.stat().st_size
        store.add([{"id": "second", "v": "äö"}])
    whole = path.read_bytes()
    for end in range(kept, len(whole)):
        path.write_bytes(whole[:end])
        with Store(path, {}) as store:
            assert [record["id"] for record in store.values()] == ["first"]
            store.add([{"id": "second", "v": "äö"}])
        assert path.read_bytes() == whole


def test_a_kill_inside_the_first_line_starts_afresh(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_bytes(b'{"basis": {"mod')
    with Store(path, {"model": "m"}) as store:
        store.add([{"id": "x"}])
    with Store(path, {"model": "m"}) as store:
        assert "x" in store


def test_another_basis_is_refused_with_every_difference(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    Store(path, {"model": "m", "seed": 0, "same": [1]}).close()
    with pytest.raises(ConfigError) as refused:
        Store(path, {"model": "n", "seed": 1, "same": (1,)})
    assert 'model was "m" and is now "n"' in str(refused.value)
    assert "seed was 0 and is now 1" in str(refused.value)
    assert "same" not in str(refused.value)


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    with Store(path, {}) as store:
        store.add([{"id": "x"}, {"id": "y"}])
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], '{"id": ', lines[2]]) + "\n")
    with pytest.raises(DataError, match=r"s\.jsonl:2: it is cut or edited .*Delete the file"):
        Store(path, {})
