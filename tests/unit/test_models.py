"""Loading, naming, saving and merging of policies, on small models made in place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers.modeling_utils
from peft.tuners.tuners_utils import BaseTuner
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from prefopt.errors import ConfigError, ModelError, TrainingError
from prefopt.model import hashing
from prefopt.model.adapters import save_adapter, save_final
from prefopt.model.load import (
    check_vocabulary,
    disable_dropout,
    enable_gradient_checkpointing,
    load_policy,
    load_tokenizer,
)
from prefopt.model.merge import merge_adapter
from prefopt.recipe.schema import ModelSection, PeftSection
from tests.unit.tiny_models import ARCHITECTURES, tiny_model

VOCABULARY = 97
IDS = torch.randint(3, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))
LORA = PeftSection(type="lora", r=4)


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path_factory.mktemp("cache")))


def make_tokenizer(size: int = VOCABULARY) -> PreTrainedTokenizerFast:
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, size)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def save_base(directory: Path, arch: str = "llama", *, seed: int = 0, **settings: Any) -> Path:
    tiny_model(arch, VOCABULARY, seed=seed, **settings).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base")


def load(path: Path | str, section: PeftSection | None = None, *, seed: int = 0, **keys: Any):
    trainable = keys.pop("trainable", True)
    return load_policy(
        ModelSection(path=str(path), **keys), section, seed=seed, trainable=trainable
    )


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def nudge(model: nn.Module, seed: int = 7) -> nn.Module:
    """Stands in for training: moves every trainable tensor."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise.to(parameter.dtype), alpha=0.05)
    return model


def trained_adapter(
    base: Path, directory: Path, section: PeftSection = LORA, seed: int = 7
) -> Path:
    policy = load(base, section)
    save_final(nudge(policy.model, seed), make_tokenizer(), directory)
    return directory


# --- loading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_loads_as_it_was_saved(tmp_path: Path, arch: str):
    path = save_base(tmp_path / arch, arch)
    want = logits(tiny_model(arch, VOCABULARY))
    policy = load(path)
    assert torch.equal(logits(policy.model), want)
    assert not policy.is_peft
    assert all(p.requires_grad for p in policy.model.parameters())
    assert policy.model.config.use_cache is False


def test_softcapped_attention_is_not_lost_to_sdpa(tmp_path: Path):
    """transformers' SDPA ignores Gemma 2's attention softcap; its eager attention applies it."""
    path = save_base(tmp_path / "gemma2", "gemma2")
    policy = load(path)
    assert torch.equal(logits(policy.model), logits(tiny_model("gemma2", VOCABULARY)))
    sdpa = AutoModelForCausalLM.from_pretrained(path, attn_implementation="sdpa")
    assert (logits(policy.model) - logits(sdpa)).abs().max() > 0.1


def test_auto_is_the_dtype_saved_and_a_named_dtype_wins(tmp_path: Path):
    path = tmp_path / "half"
    tiny_model("llama").to(torch.bfloat16).save_pretrained(path)
    assert load(path).model.dtype == torch.bfloat16
    assert load(path, dtype="float32").model.dtype == torch.float32


def test_an_untrainable_policy_has_nothing_to_train(base: Path):
    for section in (None, LORA):
        policy = load(base, section, trainable=False)
        assert not any(p.requires_grad for p in policy.model.parameters())
        assert not policy.model.training


def test_lora_covers_all_linear_layers_by_default_and_trains_nothing_else(base: Path):
    policy = load(base, LORA)
    assert policy.is_peft
    trained = {name for name, p in policy.model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert len(trained) == 2 * 7 * 2  # A and B of q, k, v, o, gate, up, down in two layers
    narrow = load(base, PeftSection(type="lora", r=4, target_modules=["q_proj"]))
    assert sum(p.requires_grad for p in narrow.model.parameters()) == 2 * 2


def test_adapter_values_follow_the_seed_and_leave_the_global_generator_alone(base: Path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (
        {n: p for n, p in load(base, LORA, seed=s).model.named_parameters() if "lora_A" in n}
        for s in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not any(torch.equal(first[n], other[n]) for n in first)


def test_disable_dropout_silences_modules_attributes_and_adapters(tmp_path: Path):
    """In train mode two forwards agree; with dropout kept they differ, so the test can fail."""
    path = save_base(
        tmp_path / "phi", "phi", attention_dropout=0.5, resid_pdrop=0.5, embd_pdrop=0.5
    )
    section = PeftSection(type="lora", r=4, lora_dropout=0.5)
    for disabled in (True, False):
        model = nudge(load(path, section, disable_dropout=disabled).model).train()
        same = torch.equal(model(input_ids=IDS).logits, model(input_ids=IDS).logits)
        assert same is disabled


def test_disable_dropout_reaches_attention_probabilities(tmp_path: Path):
    model = tiny_model("llama", attention_dropout=0.5).train()
    disable_dropout(model)
    assert torch.equal(model(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert model.config.attention_dropout == 0.0


@pytest.mark.parametrize("section", [None, LORA])
def test_gradient_checkpointing_gives_the_same_gradients(base: Path, section: PeftSection | None):
    gradients = []
    for checkpointing in (False, True):
        model = nudge(load(base, section).model).train()
        if checkpointing:
            enable_gradient_checkpointing(model)
            inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
            assert inner.is_gradient_checkpointing
        model(input_ids=IDS).logits.square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    plain, checkpointed = gradients
    assert plain and all(g is not None and g.abs().max() > 0 for g in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-6, atol=1e-8)


# --- bad models ----------------------------------------------------------------------------------


def test_a_missing_directory_is_named(tmp_path: Path):
    with pytest.raises(ModelError, match="nowhere"):
        load(tmp_path / "nowhere")


def test_a_directory_that_is_no_model_is_named(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="neither a model"):
        load(tmp_path / "empty")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("damage", ["cut", "garbage", "gone"])
def test_damaged_model_files_are_a_model_error(base: Path, file: str, damage: str):
    path = base / file
    if damage == "gone":
        path.unlink()
    else:
        raw = path.read_bytes()
        path.write_bytes(raw[: len(raw) // 2] if damage == "cut" else b"\x01garbage" * 20)
    with pytest.raises(ModelError, match=str(base)):
        load(base)


def test_a_checkpoint_that_lacks_a_parameter_is_refused(base: Path):
    """transformers only warns, and trains the parameter from random values."""
    file = base / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 parameters.*layers\.1\.mlp\.up_proj"):
        load(base)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without CUDA")
@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_quantisation_without_cuda_is_refused(base: Path, kind: str):
    with pytest.raises(ModelError, match=f"model.quantization = {kind}: needs a CUDA GPU"):
        load(base, LORA, quantization=kind)


def test_quantisation_without_an_adapter_is_refused(base: Path):
    with pytest.raises(ModelError, match="quantised weights are frozen"):
        load(base, quantization="4bit")


def test_a_tokenizer_with_more_ids_than_embedding_rows_is_refused(base: Path):
    model = load(base, LORA).model
    check_vocabulary(model, make_tokenizer(VOCABULARY))
    with pytest.raises(ModelError, match=r"'w97' has id 97, the model has 97 embedding rows"):
        check_vocabulary(model, make_tokenizer(VOCABULARY + 1))


# --- peft sections -------------------------------------------------------------------------------


def test_an_unknown_peft_type_names_the_nearest(base: Path):
    with pytest.raises(ConfigError, match=r"peft.type = 'lroa': unknown; did you mean 'lora'"):
        load(base, PeftSection(type="lroa"))


def test_every_unknown_peft_key_is_named_at_once_with_its_nearest(base: Path):
    with pytest.raises(ConfigError) as error:
        load(base, PeftSection(type="lora", lora_alhpa=8, rnak_pattern={}))
    assert len(error.value.problems) == 2
    assert "did you mean 'lora_alpha'" in str(error.value)
    assert "did you mean 'rank_pattern'" in str(error.value)


def test_a_module_that_does_not_exist_is_a_config_error(base: Path):
    with pytest.raises(ConfigError, match="c_attn"):
        load(base, PeftSection(type="lora", target_modules=["c_attn"]))


@pytest.mark.parametrize("kind", ["prompt_tuning", "prefix_tuning", "p_tuning"])
def test_types_that_add_virtual_tokens_are_refused(base: Path, kind: str):
    with pytest.raises(ConfigError, match="virtual tokens"):
        load(base, PeftSection(type=kind, num_virtual_tokens=3))


def test_a_random_split_of_the_base_that_reloading_cannot_repeat_is_refused(base: Path):
    with pytest.raises(ConfigError, match="pissa_niter"):
        load(base, PeftSection(type="lora", init_lora_weights="pissa_niter_4"))


# --- starting from adapters ----------------------------------------------------------------------


def test_an_adapter_directory_as_model_path_goes_on_from_that_adapter(base: Path, tmp_path: Path):
    adapter = trained_adapter(base, tmp_path / "adapter")
    want = logits(nudge(load(base, LORA).model))
    for policy in (load(adapter), load(base, PeftSection(adapter=str(adapter)))):
        assert policy.is_peft
        assert torch.equal(logits(policy.model), want)
        assert any(p.requires_grad for p in policy.model.parameters())
        assert str(adapter) in policy.description
    assert load(adapter).weights_hash == load(base, PeftSection(adapter=str(adapter))).weights_hash
    assert load(adapter).weights_hash != load(base).weights_hash


def test_a_new_adapter_over_an_adapter_merges_the_old_one_first(base: Path, tmp_path: Path):
    adapter = trained_adapter(base, tmp_path / "adapter")
    policy = load(adapter, LORA)
    assert "merged" in policy.description and str(adapter) in policy.description
    torch.testing.assert_close(logits(policy.model), logits(load(adapter).model), rtol=0, atol=1e-4)
    assert policy.weights_hash not in {load(adapter).weights_hash, load(base).weights_hash}

    second = tmp_path / "second"
    save_final(nudge(policy.model, 8), make_tokenizer(), second)
    again = load(second)  # follows second -> adapter -> base
    assert torch.equal(logits(again.model), logits(policy.model))
    assert str(adapter) in again.description and str(second) in again.description


@pytest.mark.parametrize("recorded", [True, False])
def test_an_adapter_for_another_base_is_refused(base: Path, tmp_path: Path, recorded: bool):
    """Same architecture and shapes, so only the base's name or content can tell."""
    adapter = trained_adapter(base, tmp_path / "adapter")
    if not recorded:
        (adapter / "prefopt_base.json").unlink()
    other = save_base(tmp_path / "other", seed=1)
    with pytest.raises(ModelError, match="an adapter for another base") as error:
        load(other, PeftSection(adapter=str(adapter)))
    assert str(base) in str(error.value) and str(other) in str(error.value)


def test_an_adapter_whose_base_has_changed_in_place_is_refused(base: Path, tmp_path: Path):
    adapter = trained_adapter(base, tmp_path / "adapter")
    save_base(base, seed=1)
    for arguments in ((adapter,), (base, PeftSection(adapter=str(adapter)))):
        with pytest.raises(ModelError, match="not those the adapter was trained on"):
            load(*arguments)


@pytest.mark.parametrize("original", ["kept", "moved"])
def test_an_adapter_knows_its_base_by_content_after_a_move(
    base: Path, tmp_path: Path, original: str
):
    adapter = trained_adapter(base, tmp_path / "adapter")
    want = logits(load(adapter).model)
    moved = tmp_path / "elsewhere"
    shutil.copytree(base, moved)
    if original == "moved":
        shutil.rmtree(base)
    else:
        (adapter / "prefopt_base.json").unlink()  # as peft saves it: both directories are compared
    assert torch.equal(logits(load(moved, PeftSection(adapter=str(adapter))).model), want)


def test_an_adapter_with_other_shapes_is_refused(base: Path, tmp_path: Path):
    adapter = trained_adapter(save_base(tmp_path / "wide", hidden_size=64), tmp_path / "adapter")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(base)
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    (adapter / "prefopt_base.json").unlink()
    with pytest.raises(ModelError, match="an adapter for another base"):
        load(adapter)


def test_an_adapter_that_lacks_a_tensor_is_refused(base: Path, tmp_path: Path):
    """peft warns and leaves the tensor at its random start."""
    adapter = trained_adapter(base, tmp_path / "adapter")
    (adapter / "prefopt_files.json").unlink()  # as other tools save it
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="1 tensors have no counterpart"):
        load(adapter)


def test_an_adapter_in_the_old_pickle_format_is_loaded_and_checked(base: Path, tmp_path: Path):
    adapter = trained_adapter(base, tmp_path / "adapter")
    (adapter / "prefopt_files.json").unlink()  # as other tools save it
    want = logits(load(adapter).model)
    tensors = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(tensors, adapter / "adapter_model.bin")
    assert torch.equal(logits(load(adapter).model), want)
    tensors.pop(sorted(tensors)[0])
    torch.save(tensors, adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match="no counterpart"):
        load(adapter)


def test_a_saved_adapter_takes_no_other_settings(base: Path, tmp_path: Path):
    adapter = trained_adapter(base, tmp_path / "adapter")
    with pytest.raises(ConfigError, match="remove lora_alpha, r"):
        load(base, PeftSection(adapter=str(adapter), r=8, lora_alpha=2))


def test_a_directory_without_adapter_is_no_adapter(base: Path):
    with pytest.raises(ModelError, match=r"no adapter_config\.json"):
        load(base, PeftSection(adapter=str(base)))


# --- the name of the weights ---------------------------------------------------------------------


def test_a_fresh_plain_lora_shares_the_bases_name_whatever_its_seed_rank_or_scaling(base: Path):
    want = load(base).weights_hash
    reference = logits(load(base).model)
    for seed, options in enumerate(
        [
            {"r": 4},
            {"r": 8, "lora_alpha": 64},
            {"r": 4, "use_rslora": True, "lora_dropout": 0.1},
            {"r": 4, "init_lora_weights": "gaussian"},
            {"r": 2, "target_modules": ["embed_tokens", "q_proj"]},
            {"r": 4, "rank_pattern": {"q_proj": 2}, "lora_bias": False},
        ]
    ):
        policy = load(base, PeftSection(type="lora", **options), seed=seed)
        assert policy.weights_hash == want, options
        assert torch.equal(logits(policy.model), reference), options  # the claim behind the name


@pytest.mark.parametrize(
    "options",
    [
        {"type": "lora", "use_dora": True},
        {"type": "lora", "init_lora_weights": "pissa"},
        {"type": "lora", "init_lora_weights": "olora"},
        {"type": "lora", "init_lora_weights": "orthogonal"},
        {"type": "lora", "init_lora_weights": False},
        {"type": "lora", "modules_to_save": ["lm_head"]},
        {"type": "ia3", "feedforward_modules": []},
        {"type": "loha"},
        {"type": "vera"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_an_adapter_not_provably_neutral_gets_a_name_of_its_own(
    base: Path, options: dict[str, Any]
):
    policy = load(base, PeftSection(**options))
    assert policy.weights_hash != load(base).weights_hash
    assert policy.weights_hash == load(base, PeftSection(**options)).weights_hash


def test_a_lora_that_is_not_zero_is_not_taken_for_the_base(base: Path):
    model = load(base, LORA).model
    assert hashing.fresh_adapter_hash(model) is None
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n)[0, 0] = 1e-30
    assert hashing.fresh_adapter_hash(model) is not None


def test_an_adapter_hash_covers_its_scaling(base: Path):
    hashes = {
        load(base, PeftSection(type="lora", use_dora=True, lora_alpha=alpha)).weights_hash
        for alpha in (8, 16)
    }
    assert len(hashes) == 2


def test_the_name_follows_content_not_place_or_format(base: Path, tmp_path: Path):
    want = load(base).weights_hash
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    config = json.loads((copy / "config.json").read_text())
    config |= {"transformers_version": "0.0.1", "use_cache": False, "_name_or_path": "x"}
    (copy / "config.json").write_text(json.dumps(config, indent=7))
    (copy / "README.md").write_text("about")
    assert load(copy).weights_hash == want


@pytest.mark.parametrize("change", ["weight", "config", "dtype"])
def test_the_name_changes_with_weights_configuration_and_dtype(base: Path, change: str):
    before = load(base).weights_hash
    if change == "weight":
        tensors = load_file(base / "model.safetensors")
        tensors["model.norm.weight"][3] += 1e-3
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    elif change == "config":
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-4}))
    dtype = "bfloat16" if change == "dtype" else "auto"
    assert load(base, dtype=dtype).weights_hash != before


def test_sharded_weights_are_hashed_shard_by_shard(tmp_path: Path):
    path = tmp_path / "sharded"
    tiny_model("llama").save_pretrained(path, max_shard_size="20KB")
    shards = sorted(path.glob("model-*.safetensors"))
    assert len(shards) > 2
    before = hashing.model_hash(path)
    tensors = load_file(shards[-1])
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + 1
    save_file(tensors, shards[-1], metadata={"format": "pt"})
    assert hashing.model_hash(path) != before


def test_two_saved_adapters_have_two_names(base: Path, tmp_path: Path):
    one = trained_adapter(base, tmp_path / "one", seed=1)
    two = trained_adapter(base, tmp_path / "two", seed=2)
    assert load(one).weights_hash != load(two).weights_hash
    before = load(one).weights_hash
    settings = json.loads((one / "adapter_config.json").read_text())
    settings["target_modules"] = settings["target_modules"][
        ::-1
    ]  # a set: peft saves it in any order
    (one / "adapter_config.json").write_text(json.dumps(settings))
    assert load(one).weights_hash == before
    settings["lora_alpha"] *= 2
    (one / "adapter_config.json").write_text(json.dumps(settings))
    assert load(one).weights_hash != before


def test_a_file_hash_is_remembered_until_the_file_changes(tmp_path: Path, monkeypatch):
    import hashlib
    import os

    path = tmp_path / "weights.bin"
    path.write_bytes(b"one")
    monkeypatch.setattr(hashing.time, "time_ns", lambda: path.stat().st_ctime_ns + 10**10)
    want = hashlib.sha256(b"one").hexdigest()
    assert hashing.file_hash(path) == want
    with monkeypatch.context() as patch:
        patch.setattr(hashing.hashlib, "file_digest", None)  # reading it again would raise
        assert hashing.file_hash(path) == want
    stat = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size, mtime set back
    assert hashing.file_hash(path) == hashlib.sha256(b"two").hexdigest()


def test_a_file_written_this_instant_is_not_remembered(tmp_path: Path):
    path = tmp_path / "weights.bin"
    path.write_bytes(b"one")
    hashing.file_hash(path)
    assert not list(Path(hashing.cache_root()).rglob("file-hashes/*"))


def test_a_blob_of_the_hub_cache_is_its_own_hash(tmp_path: Path):
    name = "ab" * 32
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "blobs" / name).write_bytes(b"anything: it is not read")
    link = tmp_path / "snapshots" / "model.safetensors"
    link.symlink_to(tmp_path / "blobs" / name)
    assert hashing.file_hash(link) == name


def test_state_hash_sees_bits_names_shapes_and_dtypes():
    a = torch.tensor([1.0, 2.0])
    hashes = [
        hashing.state_hash(state)
        for state in (
            {"a": a},
            {"b": a},
            {"a": a.reshape(2, 1)},
            {"a": a.bfloat16()},
            {"a": torch.tensor([1.0, -2.0])},
            {"a": torch.tensor([0.0])},
            {"a": torch.tensor([-0.0])},
            {"a": torch.tensor(0.0)},
        )
    ]
    assert len(set(hashes)) == len(hashes)
    assert hashing.state_hash({"a": a, "b": a}) == hashing.state_hash({"b": a, "a": a.clone()})


_HUB_SCRIPT = """
import sys
from pathlib import Path
from tests.unit.test_models import *

local, adapter = sys.argv[1:]
policy = load("org/tiny")
assert torch.equal(logits(policy.model), logits(load(local).model))
assert policy.weights_hash == load(local).weights_hash
save_final(nudge(load("org/tiny", LORA).model), load_tokenizer(ModelSection(path="org/tiny")), adapter)
assert json.loads((Path(adapter) / "adapter_config.json").read_text())[
    "base_model_name_or_path"] == "org/tiny"
want = logits(load(adapter).model)
assert torch.equal(logits(load("org/tiny", PeftSection(adapter=adapter)).model), want)
assert torch.equal(logits(load(local, PeftSection(adapter=adapter)).model), want)  # same content
try:
    load("org/absent")
except ModelError as error:
    assert "org/absent" in str(error)
else:
    raise AssertionError("loaded a model that is nowhere")
"""


def test_a_hub_model_in_the_cache_has_the_name_of_its_local_copy(base: Path, tmp_path: Path):
    """A hub cache made by hand, used offline; large files are links to blobs named by SHA-256."""
    import hashlib
    import os
    import subprocess
    import sys

    hub, commit = tmp_path / "hub", "c" * 40
    repository = hub / "models--org--tiny"
    for folder in ("refs", "blobs", f"snapshots/{commit}"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for file in base.iterdir():
        algorithm = hashlib.sha256 if file.suffix == ".safetensors" else hashlib.sha1
        blob = repository / "blobs" / algorithm(file.read_bytes()).hexdigest()
        blob.write_bytes(file.read_bytes())
        (repository / "snapshots" / commit / file.name).symlink_to(blob)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(hub)}
    arguments = [sys.executable, "-c", _HUB_SCRIPT, str(base), str(tmp_path / "adapter")]
    root = Path(__file__).parents[2]
    done = subprocess.run(arguments, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- saving --------------------------------------------------------------------------------------

VARIANTS = [
    {"type": "lora"},
    {"type": "lora", "use_dora": True},
    {"type": "lora", "use_rslora": True, "r": 4},
    {"type": "lora", "init_lora_weights": "pissa"},
    {"type": "lora", "init_lora_weights": "olora"},
    {"type": "lora", "modules_to_save": ["lm_head"]},
    {"type": "lora", "target_modules": ["embed_tokens", "q_proj"]},
    {"type": "ia3", "feedforward_modules": []},
    {"type": "loha"},
    {"type": "vera"},
]


@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("gathered", [False, True])
def test_a_saved_adapter_is_the_policy_that_was_trained(
    base: Path, tmp_path: Path, options: dict[str, Any], gathered: bool
):
    """``gathered``: only trainable tensors are handed over, as ZeRO-3 gives them."""
    policy = load(base, PeftSection(**options))
    nudge(policy.model)
    want = logits(policy.model)
    state = {n: p.detach().clone() for n, p in policy.model.named_parameters() if p.requires_grad}
    if gathered:
        with torch.no_grad():
            for parameter in policy.model.parameters():
                if parameter.requires_grad:
                    parameter.zero_()  # what is in the module must not be what is saved
    final = tmp_path / "final"
    save_final(policy.model, make_tokenizer(), final, state_dict=state if gathered else None)
    assert torch.equal(logits(load(final).model), want)
    assert load_tokenizer(ModelSection(path=str(final))).get_vocab() == make_tokenizer().get_vocab()


@pytest.mark.parametrize("arch", ["llama", "llama_tied", "gemma2", "phi", "mamba"])
def test_a_saved_full_model_is_the_policy_that_was_trained(tmp_path: Path, arch: str):
    policy = load(save_base(tmp_path / "base", arch))
    nudge(policy.model)
    final = tmp_path / "final"
    state = {name: p.detach() for name, p in policy.model.named_parameters()}
    save_final(policy.model, make_tokenizer(), final, state_dict=state)
    reloaded = AutoModelForCausalLM.from_pretrained(final)
    assert torch.equal(logits(load(final).model), logits(policy.model))
    assert reloaded.config.use_cache and not policy.model.config.use_cache


def test_empty_shards_are_refused_and_what_was_saved_before_survives(base: Path, tmp_path: Path):
    policy = load(base, LORA)
    final = tmp_path / "final"
    save_final(policy.model, make_tokenizer(), final)
    before = (final / "adapter_model.safetensors").read_bytes()
    state = {n: p[:0] for n, p in policy.model.named_parameters() if p.requires_grad}
    with pytest.raises(TrainingError, match="were not gathered"):
        save_final(policy.model, make_tokenizer(), final, state_dict=state)
    assert (final / "adapter_model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir() if "tmp" in p.name] == []


def test_a_full_disk_while_saving_keeps_what_was_there(base: Path, tmp_path: Path, monkeypatch):
    policy = load(base, LORA)
    final = tmp_path / "final"
    save_final(policy.model, make_tokenizer(), final)
    before = (final / "adapter_model.safetensors").read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(peft.peft_model, "safe_save_file", full)
    with pytest.raises(TrainingError, match="No space left"):
        save_final(nudge(policy.model), make_tokenizer(), final)
    assert (final / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize("kind", ["adapter", "full"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("bits", "on disk are not those in memory"),
        ("value", r"q_proj.* on disk are not those in memory"),
        ("shape", "q_proj"),  # what an ungathered ZeRO-3 shard looks like
        ("missing", "q_proj"),
        ("cut", "cannot be read back"),
    ],
)
def test_a_disk_that_does_not_return_what_was_written_fails_the_save(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    damage: str,
    message: str,
):
    policy = load(base, LORA if kind == "adapter" else None)

    def lossy(tensors: dict[str, torch.Tensor], path: Any, **keys: Any) -> None:
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        name = next(n for n in sorted(tensors) if "q_proj" in n)
        if damage == "bits":
            tensors = {n: t.bfloat16().to(t.dtype) for n, t in tensors.items()}
        elif damage == "value":
            tensors[name].view(-1)[0] += 1e-3
        elif damage == "shape":
            tensors[name] = tensors[name][:0]
        elif damage == "missing":
            del tensors[name]
        save_file({n: t.contiguous() for n, t in tensors.items()}, path, **keys)
        if damage == "cut":
            Path(path).write_bytes(Path(path).read_bytes()[:-100])

    monkeypatch.setattr(peft.peft_model, "safe_save_file", lossy)
    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", lossy)
    with pytest.raises(TrainingError, match=message):
        save_final(nudge(policy.model), make_tokenizer(), tmp_path / "final")
    assert not (tmp_path / "final").exists()


def test_a_saved_adapter_names_its_base_by_absolute_path(base: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    policy = load("base", LORA)
    save_adapter(policy.model, tmp_path / "adapter")
    monkeypatch.chdir("/")
    assert torch.equal(logits(load(tmp_path / "adapter").model), logits(load(base).model))


# --- merging -------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "llama_tied", "gemma2"])
def test_a_merged_model_gives_the_adapters_logits(tmp_path: Path, arch: str):
    base = save_base(tmp_path / "base", arch)
    run = tmp_path / "run"
    trained_adapter(base, run / "final")
    merge_adapter(run, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    attention = "eager" if arch == "gemma2" else "sdpa"
    merged.set_attn_implementation(attention)
    torch.testing.assert_close(logits(merged), logits(load(run / "final").model), rtol=0, atol=1e-4)
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    tokenizer = load_tokenizer(ModelSection(path=str(tmp_path / "merged")))
    assert tokenizer.get_vocab() == make_tokenizer().get_vocab()


def test_merging_keeps_the_bases_dtype_and_rounds_once(tmp_path: Path):
    """W + BA in fp32, then one rounding: each merged weight is within half a bfloat16 step of it."""
    base = tmp_path / "base"
    tiny_model("llama").to(torch.bfloat16).save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    adapter = trained_adapter(base, tmp_path / "adapter")
    merge_adapter(adapter, tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    exact = load(adapter, dtype="float32").model.merge_and_unload().state_dict()
    for name, tensor in merged.items():
        assert torch.equal(tensor, exact[name].bfloat16()), name


def test_a_merge_that_changes_the_model_is_not_written(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    adapter = trained_adapter(base, tmp_path / "adapter")
    exact = BaseTuner.merge_and_unload

    def inexact(self: BaseTuner, **keys: Any) -> Any:
        merged = exact(self, **keys)
        with torch.no_grad():
            merged.lm_head.weight.mul_(1.001)
        return merged

    monkeypatch.setattr(BaseTuner, "merge_and_unload", inexact)
    with pytest.raises(ModelError, match=r"changes the model: logits differ by 0\.001"):
        merge_adapter(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_merging_refuses_a_full_model_nothing_and_a_taken_output(base: Path, tmp_path: Path):
    with pytest.raises(ModelError, match="full model already"):
        merge_adapter(base, tmp_path / "merged")
    with pytest.raises(ModelError, match="no adapter here"):
        merge_adapter(tmp_path, tmp_path / "merged")
    adapter = trained_adapter(base, tmp_path / "adapter")
    with pytest.raises(ModelError, match="not empty"):
        merge_adapter(adapter, base)


# --- tokenizers ----------------------------------------------------------------------------------


def test_a_missing_pad_token_becomes_eos_without_new_rows(base: Path):
    tokenizer = load_tokenizer(ModelSection(path=str(base)))
    assert tokenizer.pad_token == "</s>"
    assert len(tokenizer) == VOCABULARY


def test_a_template_file_replaces_the_tokenizers_own(base: Path, tmp_path: Path):
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}w{{ m.content }} {% endfor %}", encoding="utf-8")
    tokenizer = load_tokenizer(ModelSection(path=str(base), chat_template=str(template)))
    text = tokenizer.apply_chat_template([{"role": "user", "content": "9"}], tokenize=False)
    assert text == "w9 "
    with pytest.raises(ModelError, match=r"gone\.jinja"):
        load_tokenizer(ModelSection(path=str(base), chat_template=str(tmp_path / "gone.jinja")))


def test_an_adapter_without_tokenizer_takes_its_bases(base: Path, tmp_path: Path):
    save_adapter(load(base, LORA).model, tmp_path / "adapter")
    tokenizer = load_tokenizer(ModelSection(path=str(tmp_path / "adapter")))
    assert tokenizer.get_vocab() == make_tokenizer().get_vocab()


def test_a_directory_without_tokenizer_is_a_model_error(base: Path):
    for file in base.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match=r"model\.tokenizer"):
        load_tokenizer(ModelSection(path=str(base)))


def test_another_tokenizer_can_be_named(base: Path, tmp_path: Path):
    make_tokenizer(50).save_pretrained(tmp_path / "tokenizer")
    section = ModelSection(path=str(base), tokenizer=str(tmp_path / "tokenizer"))
    assert len(load_tokenizer(section)) == 50
