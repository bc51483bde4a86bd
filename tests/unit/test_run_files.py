"""Files of a run that are torn, edited or of another shape: one sentence each, with the file and what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prefopt.errors import DataError, ModelError, TrainingError
from prefopt.model.source import resolve_source
from prefopt.storage.checksums import damaged, file_names, file_sum, shares, sums_of
from prefopt.storage.model_files import (
    read_adapter_config,
    read_base_record,
    read_model_config,
    shard_names,
)
from prefopt.storage.reading import log_rows, mend_end, sealed, unsealed
from prefopt.storage.run_files import complete_checkpoints, read_metrics, read_run
from prefopt.training.integrity import read_state

ODD = {
    b"": "it is empty",
    b" \n": "it is empty",
    b"\0\0\0": "it holds NUL bytes",
    b'{"recipe": {"mod': "it is cut or edited",
    b"[1]": "it holds a list, not an object",
    b"null": "it holds null, not an object",
    b"\xff\xfe{}": "its byte 0 is no UTF-8",
    b"{}": "it has no ",
    b"[" * 100_000: "nested more than 100 deep",
    b'{"step": ' + b"9" * 5000 + b"}": "a number of 5,000 digits",
}


@pytest.mark.parametrize("data", ODD, ids=range(len(ODD)))
def test_a_file_that_is_not_what_it_should_be_is_named(tmp_path: Path, data: bytes) -> None:
    for name, reader, error in (
        ("run.json", read_run, DataError),
        ("prefopt.json", read_state, TrainingError),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(error) as refused:
            reader(tmp_path)
        said = str(refused.value)
        assert said.startswith(f"{tmp_path / name}: is not the ") and ODD[data] in said
        assert ". Restore it" in said


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        ([], "its 'recipe' is a list"),
        ({}, "it has no 'recipe.model'"),
        ({"model": {"path": 1}}, "its 'recipe.model.path' is a number"),
        ({"model": {"path": "m"}, "data": []}, "its 'recipe.data' is a list"),
        ({"model": {"path": "m", "trust_remote_code": "yes"}}, "trust_remote_code' is a text"),
    ],
)
def test_a_record_of_another_shape_says_which_key(tmp_path: Path, recipe: object, why: str) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"recipe": recipe}))
    with pytest.raises(DataError, match=why):
        read_run(tmp_path)


def test_a_log_that_a_kill_or_a_power_cut_tore_keeps_its_whole_lines(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = b'{"step": 1, "a": "\xe2\x80\xa8"}\n{"step": 2}\n'  # U+2028 is no line break here
    for torn in (b"", b'{"st', b"\0" * 9, b'{"step": 3\0\0\0\0', b'{"step\0\0": 3}\n'):
        path.write_bytes(whole + torn)
        assert [row["step"] for row in read_metrics(path)] == [1, 2]
        mend_end(path, "it is written again")
        assert path.read_bytes() == whole
    assert f"{path}: its last 9 bytes were cut off by a kill or a power cut" in caplog.text
    path.write_bytes(b'{"step": 1')  # nothing whole at all
    assert read_metrics(path) == []
    mend_end(path, "it is written again")
    assert path.read_bytes() == b""


@pytest.mark.parametrize("line", [b"", b"[1]", b'{"step": true}', b'{"step": "1"}', b'{"a": 1}'])
def test_a_line_that_is_no_row_is_named_with_its_number(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: it .*Restore it|:2: its 'step' is"):
        read_metrics(path)
    with pytest.raises(DataError, match=r"cannot be read: .*Do it again"):
        list(log_rows(tmp_path / "absent", {}, "Do it again"))


def test_only_whole_checkpoints_with_our_names_count(tmp_path: Path) -> None:
    for name in ("step-12", "step-12.bak", "step-12~", "step-3", "tmp-step-4", "damaged-step-5",
                 "step-x", "step-1 (copy)", "step-012"):  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "prefopt.json").write_text("{}")
    (tmp_path / "step-99").mkdir()
    (tmp_path / "step-7").write_text("a file")
    assert complete_checkpoints(tmp_path) == {3: tmp_path / "step-3", 12: tmp_path / "step-12"}
    assert complete_checkpoints(tmp_path / "absent") == {}


def test_a_seal_notices_every_flipped_bit() -> None:
    record = {"step": 3, "b": [1.5, None, {"ü": True}], "a": {2: 1}}
    text = json.dumps(sealed(record)).encode()
    assert unsealed(json.loads(text)) == json.loads(json.dumps(record))
    noticed = 0
    for place in range(len(text)):
        changed = bytearray(text)
        changed[place] ^= 1
        try:
            value = unsealed(json.loads(changed))
        except ValueError:
            noticed += 1
        else:
            assert value == json.loads(json.dumps(record))  # white space
    assert noticed > len(text) - 20


def test_checksums_name_what_changed_is_shorter_or_gone(tmp_path: Path) -> None:
    """XXH3 of 128 bits; the empty hash is the published one."""
    (tmp_path / "a").write_bytes(b"")
    assert file_sum(tmp_path / "a") == "0-99aa06d3014798d86001c324468d497f"
    (tmp_path / "deep").mkdir()
    for name in ("deep/b", "c", "d"):
        (tmp_path / name).write_bytes(name.encode() * 1000)
    sums = sums_of(tmp_path, file_names(tmp_path))
    assert sorted(sums) == ["a", "c", "d", "deep/b"] and damaged(tmp_path, sums) == []
    data = bytearray((tmp_path / "deep/b").read_bytes())
    data[77] ^= 4
    (tmp_path / "deep/b").write_bytes(data)
    (tmp_path / "c").write_bytes(b"c" * 10)
    (tmp_path / "d").unlink()
    assert damaged(tmp_path, sums) == [
        "c is not what was written: it has 10 bytes instead of 1000",
        "d cannot be read: No such file or directory",
        "deep/b is not what was written: its bytes changed",
    ]
    assert damaged(tmp_path, sums, ["a"]) == []


def test_processes_share_the_hashing_each_by_what_it_reads() -> None:
    """The files of DDP, DeepSpeed ZeRO-3 and sharded FSDP on two processes."""
    ddp = {"model.safetensors": 90, "optimizer.bin": 180, "random_states_0.pkl": 1,
           "random_states_1.pkl": 1, "reference-1.safetensors": 50}  # fmt: skip
    assert shares(ddp, 2) == [
        ["random_states_0.pkl", "optimizer.bin"],
        ["reference-1.safetensors", "random_states_1.pkl", "model.safetensors"],
    ]
    zero = {f"pytorch_model/zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt": 100
            for rank in range(2) for kind in ("model", "bf16_zero_optim")}  # fmt: skip
    fsdp = {f"{kind}_0/__{rank}_0.distcp": 9 for rank in range(2) for kind in ("m", "optimizer")}
    for files, mark in ((zero, "pp_rank_{}_"), (fsdp, "__{}_0")):
        for rank, share in enumerate(shares(files, 2)):
            assert len(share) == 2 and all(mark.format(rank) in name for name in share)
    # On fewer processes than wrote it, nobody's files are left out.
    (alone,) = shares(zero, 1)
    assert sorted(alone) == sorted(zero)


def test_what_lies_beside_weights_is_read_or_named(tmp_path: Path) -> None:
    readers = {
        "adapter_config.json": read_adapter_config,
        "config.json": read_model_config,
        "prefopt_base.json": read_base_record,
        "model.safetensors.index.json": lambda directory: shard_names(
            directory / "model.safetensors.index.json"
        ),
    }
    for name, reader in readers.items():
        for data, why in ODD.items():
            if data == b"{}" and name.endswith("config.json"):
                continue  # what settings lack has a default
            (tmp_path / name).write_bytes(data)
            with pytest.raises(ModelError) as refused:
                reader(tmp_path)
            assert str(refused.value).startswith(f"{tmp_path / name}: is not ")
            assert why in str(refused.value)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": 3}')
    with pytest.raises(ModelError, match="its 'base_model_name_or_path' is a number"):
        resolve_source(str(tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": ["b"]}}')
    with pytest.raises(ModelError, match="names a file that is no text"):
        shard_names(tmp_path / "model.safetensors.index.json")
