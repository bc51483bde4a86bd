"""The reference store: what is read is bit for bit what was written, or it is not there."""

from __future__ import annotations

import base64
import logging
import multiprocessing
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from prefopt.errors import TrainingError
from prefopt.reference import store as reference
from prefopt.reference.store import ReferenceStore, response_key
from prefopt.types import Group, Response

WEIGHTS = "a" * 64


def make_group(seed: int, num_responses: int = 2) -> Group:
    rng = np.random.default_rng(seed)

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.integers(0, 50_000, rng.integers(low, high)).tolist())

    responses = tuple(Response(ids(1, 9)) for _ in range(num_responses))
    return Group(f"row{seed}", ids(0, 7), responses, ((0, 1),) if num_responses > 1 else ())


def values(group: Group) -> list[np.ndarray]:
    """Log-probs any process can recompute from the group alone; mantissas use every fp32 bit."""
    rng = np.random.default_rng(len(group.prompt_ids) * 1000 + sum(group.responses[0].ids))
    return [-rng.exponential(3.0, len(r.ids)).astype(np.float32) for r in group.responses]


def assert_bits(found: list[np.ndarray] | None, expected: list[np.ndarray]) -> None:
    assert found is not None
    assert [a.dtype for a in found] == [np.float32] * len(expected)
    assert [a.tobytes() for a in found] == [a.tobytes() for a in expected]


def filled(root: Path, groups: list[Group], **kwargs: str) -> tuple[ReferenceStore, Path]:
    store = ReferenceStore(root, WEIGHTS, **kwargs)
    store.add((group, values(group)) for group in groups)
    path = store.flush()
    assert path is not None
    return store, path


def test_values_survive_bit_for_bit_including_extremes(tmp_path: Path):
    group = Group("g", (1,), (Response((1, 2, 3, 4, 5)),))
    extreme = np.array([-0.0, -1.1754944e-38, -1e-45, -3.4028235e38, -612.9], np.float32)
    store = ReferenceStore(tmp_path, WEIGHTS)
    store.add([(group, [extreme])])
    assert_bits(store.get(group), [extreme])  # before the flush
    store.flush()
    assert_bits(store.get(group), [extreme])
    assert_bits(ReferenceStore(tmp_path, WEIGHTS).get(group), [extreme])


def test_values_added_are_copied_so_reused_buffers_do_no_harm(tmp_path: Path):
    group = make_group(0)
    buffers = values(group)
    store = ReferenceStore(tmp_path, WEIGHTS)
    store.add([(group, buffers)])
    for buffer in buffers:
        buffer[:] = 7
    assert_bits(store.get(group), values(group))
    found = store.get(group)
    assert found is not None
    found[0][:] = 7
    assert_bits(store.get(group), values(group))


def test_another_process_sees_what_was_flushed(tmp_path: Path):
    groups = [make_group(i, num_responses=1 + i % 4) for i in range(20)]
    filled(tmp_path, groups)
    code = (
        "import sys; sys.path.insert(0, sys.argv[2]);"
        "from test_reference_store import *;"
        "groups = [make_group(i, num_responses=1 + i % 4) for i in range(21)];"
        "store = ReferenceStore(sys.argv[1], WEIGHTS);"
        "[assert_bits(store.get(g), values(g)) for g in groups[:20]];"
        "assert store.get(groups[20]) is None"
    )
    here = str(Path(__file__).parent)
    subprocess.run([sys.executable, "-c", code, str(tmp_path), here], check=True)


def test_a_group_is_not_there_until_every_response_is_there(tmp_path: Path):
    two = make_group(3)
    one = Group("other-id", two.prompt_ids, two.responses[:1])
    store, _ = filled(tmp_path, [one])
    assert store.get(two) is None
    assert_bits(store.get(one), values(two)[:1])


def test_entries_do_not_depend_on_group_id_scores_or_pairs(tmp_path: Path):
    """Content addressing: the same tokens in another data set are the same entry."""
    group = make_group(4)
    store, _ = filled(tmp_path, [group])
    renamed = Group(
        "elsewhere",
        group.prompt_ids,
        tuple(Response(r.ids, score=1.0) for r in reversed(group.responses)),
        ((1, 0),),
    )
    assert_bits(store.get(renamed), values(group)[::-1])


def test_the_key_changes_with_prompt_response_and_the_boundary_between_them():
    base = response_key((1, 2), Response((3, 4)))
    others = [
        response_key((1, 9), Response((3, 4))),
        response_key((1, 2), Response((3, 9))),
        response_key((1, 2, 3), Response((4,))),  # the same tokens, cut elsewhere
        response_key((1,), Response((2, 3, 4))),
        response_key((), Response((1, 2, 3, 4))),
    ]
    assert len({base, *others}) == 6
    assert response_key([1, 2], Response((3, 4), score=0.5)) == base


@pytest.mark.parametrize("change", ["weights", "weights_tail", "precision", "version"])
def test_other_weights_precision_or_maths_never_share_entries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
):
    group = make_group(5)
    _, part = filled(tmp_path, [group])
    if change == "weights":
        other = ReferenceStore(tmp_path, "b" * 64)
    elif change == "weights_tail":  # same directory prefix: the part itself must be refused
        other = ReferenceStore(tmp_path, "a" * 16 + "b" * 48)
        assert other.directory == part.parent
    elif change == "precision":
        other = ReferenceStore(tmp_path, WEIGHTS, precision="bf16")
    else:
        monkeypatch.setattr(reference, "MATHS_VERSION", reference.MATHS_VERSION + 1)
        other = ReferenceStore(tmp_path, WEIGHTS)
    assert other.get(group) is None


EARLIER_PART = (
    "8cef61f15877a11ea9ac5718575c38a11ab7f5eb.safetensors",
    "c-o6#WB`L|rTF;V)RM%M#FE7LcqOZ9rOcGnypqh4N+m0$L<)g!nW1i4fw7TNt&UQDT3T^xNioQVl#<GVRG{&mW+qBHO2rw8"
    "AYQa_td0`c6>yc&20BJ2u|T~!`RN5HI^BR~;?-$nqGN0Z(wbb9jG{9XMW+#_PGd726R@S(sg<ZYEs!<p7@A?~H8IgK2ijVz"
    "prF721x!$ynE?*=&$5&}!obk5?~uW7&O0~d%&NBqt**ED-||q_@pJCIznW}6Yrps2a$;;)aOP{1;)`Pdey@rn",
)
"""Name and zlib + base85 bytes of a part written by version 1 of the maths."""


def test_a_part_that_an_earlier_run_wrote_is_read(tmp_path: Path):
    group = Group("g", (1, 2), (Response((3, 4)), Response((5,))))
    directory = tmp_path / "reference" / "aaaaaaaaaaaaaaaa-v1-fp32"
    directory.mkdir(parents=True)
    name, text = EARLIER_PART
    (directory / name).write_bytes(zlib.decompress(base64.b85decode(text)))
    found = ReferenceStore(tmp_path, WEIGHTS).get(group)
    assert_bits(found, [np.array(a, np.float32) for a in ([-0.5, -612.9], [-0.25])])


def test_the_key_covers_the_maths_version(monkeypatch: pytest.MonkeyPatch):
    before = response_key((1,), Response((2,)))
    monkeypatch.setattr(reference, "MATHS_VERSION", reference.MATHS_VERSION + 1)
    assert response_key((1,), Response((2,))) != before


def test_any_flipped_byte_gives_the_right_value_or_none(tmp_path: Path):
    """Every byte of a small part in turn: header length, JSON, keys, offsets, checksums, values."""
    groups = [make_group(i) for i in range(3)]
    _, part = filled(tmp_path, groups)
    good = part.read_bytes()
    lost = 0
    for position in range(len(good)):
        for old in part.parent.iterdir():
            old.unlink()
        bad = bytearray(good)
        bad[position] ^= 0x11
        part.write_bytes(bad)
        store = ReferenceStore(tmp_path, WEIGHTS)
        for group in groups:
            found = store.get(group)
            if found is None:
                lost += 1
            else:
                assert_bits(found, values(group))
    assert lost > len(good)  # most flips cost entries; those in unused metadata need not


@pytest.mark.parametrize("damage", ["flip_value", "truncate", "empty", "garbage", "delete"])
@pytest.mark.parametrize("when", ["before_open", "while_open"])
def test_a_damaged_part_costs_only_its_own_entries_and_is_recomputed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str, when: str
):
    hurt, safe = [make_group(i) for i in range(3)], [make_group(i) for i in range(3, 6)]
    store, part = filled(tmp_path, hurt)
    store.add((group, values(group)) for group in safe)
    store.flush()
    if damage == "delete":
        part.unlink()
    else:
        raw = bytearray(part.read_bytes())
        at = raw.index(values(hurt[-1])[-1].tobytes())  # in the last value: found late in the scan
        raw[at] ^= 1
        part.write_bytes(
            {"truncate": raw[:at], "empty": b"", "garbage": b"x" * 99}.get(damage, raw)
        )
    if when == "before_open":
        store = ReferenceStore(tmp_path, WEIGHTS)

    with caplog.at_level(logging.WARNING):
        missing = [group for group in hurt + safe if store.get(group) is None]
    assert missing and all(group in hurt for group in missing)
    if (damage, when) != ("delete", "before_open"):
        assert part.name in caplog.text
        assert not part.exists()  # moved aside (or deleted), out of the way of later runs
    store.add((group, values(group)) for group in hurt)
    store.flush()
    for again in (store, ReferenceStore(tmp_path, WEIGHTS)):
        for group in hurt + safe:
            assert_bits(again.get(group), values(group))


def test_an_unreadable_part_is_skipped_but_left_where_it_is(tmp_path: Path, monkeypatch):
    """An I/O error (too many open files, a network disk) says nothing about the bytes."""
    group = make_group(6)
    _, part = filled(tmp_path, [group])

    def fail(*_: object) -> bytes:
        raise OSError(24, "Too many open files")

    store = ReferenceStore(tmp_path, WEIGHTS)
    with monkeypatch.context() as patch:
        patch.setattr(reference, "_read_at", fail)
        assert store.get(group) is None
    assert part.exists()
    store.refresh()
    assert_bits(store.get(group), values(group))


def test_refresh_brings_in_other_writers_parts_once(tmp_path: Path):
    mine, theirs = make_group(7), make_group(8)
    store = ReferenceStore(tmp_path, WEIGHTS)
    store.add([(mine, values(mine))])
    store.flush()
    filled(tmp_path, [theirs])
    assert store.get(theirs) is None
    assert store.refresh() == 2
    assert store.refresh() == 0
    assert_bits(store.get(theirs), values(theirs))
    assert_bits(store.get(mine), values(mine))


def _write_many(root: Path, first: int, barrier) -> None:
    barrier.wait()
    for start in range(first, first + 60, 10):
        store = ReferenceStore(root, WEIGHTS)
        store.add((group, values(group)) for group in map(make_group, range(start, start + 10)))
        store.flush()


def test_two_writers_at_once_lose_nothing_even_where_they_overlap(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    writers = [context.Process(target=_write_many, args=(tmp_path, f, barrier)) for f in (0, 30)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0]
    store = ReferenceStore(tmp_path, WEIGHTS)
    for group in map(make_group, range(90)):
        assert_bits(store.get(group), values(group))
    assert not list(tmp_path.rglob("*.corrupt")) and not list(tmp_path.rglob(".tmp-*"))


def test_what_is_already_stored_is_not_written_again(tmp_path: Path):
    group = make_group(9)
    store, _ = filled(tmp_path, [group])
    store.add([(group, values(group))])
    assert store.flush() is None
    assert len(store) == 2


def test_a_disk_that_cannot_be_written_keeps_entries_in_memory(tmp_path: Path, monkeypatch, caplog):
    group = make_group(10)
    store = ReferenceStore(tmp_path, WEIGHTS)
    store.add([(group, values(group))])

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(reference, "save_file", full)
        assert store.flush() is None
    assert "No space left" in caplog.text
    assert_bits(store.get(group), values(group))
    assert store.flush() is not None
    assert_bits(ReferenceStore(tmp_path, WEIGHTS).get(group), values(group))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([np.zeros(2, np.float32)], "1 arrays for 2 responses"),
        ([np.zeros(2, np.float32), np.zeros(2, np.float32)], r"expected float32 of shape \(3,\)"),
        ([np.zeros(2, np.float32), np.zeros(3, np.float64)], "float64"),
        ([np.array([0, np.nan], np.float32), np.zeros(3, np.float32)], "not finite"),
        ([np.array([0, -np.inf], np.float32), np.zeros(3, np.float32)], "not finite"),
    ],
)
def test_values_that_cannot_be_log_probs_are_refused(tmp_path: Path, bad, message: str):
    group = Group("row7", (1,), (Response((1, 2)), Response((3, 4, 5))), ((0, 1),))
    store = ReferenceStore(tmp_path, WEIGHTS)
    with pytest.raises(TrainingError, match=message) as error:
        store.add([(group, bad)])
    assert "row7" in str(error.value)
    assert len(store) == 0


def test_keys_that_share_their_first_half_are_told_apart(tmp_path: Path, monkeypatch):
    """The index is searched by the first 8 bytes; the other 8 must decide."""
    groups = [make_group(i, num_responses=1) for i in range(30)]
    real = response_key

    def colliding(prompt_ids, response):
        return b"\x80" * 8 + real(prompt_ids, response)[8:]

    monkeypatch.setattr(reference, "response_key", colliding)
    store, _ = filled(tmp_path, groups[:29])
    for group in groups[:29]:
        assert_bits(store.get(group), values(group))
    assert store.get(groups[29]) is None
