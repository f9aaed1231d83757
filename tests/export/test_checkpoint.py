"""Loading checkpoints: what is refused, what is read, and that nothing in them ever runs."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from edgebert_export.checkpoint import (
    Checkpoint,
    checkpoint_encoder,
    load_model,
    load_tokenizer,
    open_checkpoint,
    save_checkpoint,
)
from edgebert_export.errors import CheckpointError
from edgebert_runtime.manifest import Task

Edit = Callable[..., Path]
TEXTS = ["Glasses made to the wrong prescription, twice.", "A great film!", "", "Où est l'été?"]


class _Touches:
    """An object whose unpickling creates a file, as a hostile pickle would."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """A file that hostile code would create; the test fails if it is there at its end."""
    path = tmp_path / "hostile-code-ran"
    yield path
    assert not path.exists()


def _logits(checkpoint: Checkpoint, task: Task, texts: list[str] = TEXTS) -> np.ndarray:
    encoder = checkpoint_encoder(checkpoint, max_length=128, text_pair=False)
    inputs = encoder.collate(encoder.encode(texts))
    model: Any = load_model(checkpoint, task)
    with torch.inference_mode():
        return model(**{k: torch.from_numpy(v) for k, v in inputs.items()}).logits.numpy()


# What is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_attn_implementation_internal", "evil/repo"),
        ("_attn_implementation_internal", {"": "evil/repo"}),
        ("_attn_implementation", "evil/kernels:fn"),
        ("_attn_implementation", {"text_config": "evil/repo"}),
        ("attn_implementation", "evil/repo"),
        ("attn_implementation", ["evil/repo"]),
        ("__attn_implementation", "evil/repo"),
        ("auto_map", {"AutoConfig": "configuration_evil.Evil"}),
        ("auto_map", {}),
        ("custom_pipelines", {"text-classification": {"impl": "evil.Pipeline"}}),
        ("quantization_config", {"quant_method": "gptq"}),
        ("is_decoder", True),
        ("add_cross_attention", True),
        ("model_type", "gpt2"),
        ("model_type", ...),
        ("model_type", ["bert"]),
        ("model_type", "BERT"),
        ("id2label", {"negative": 0, "positive": 1}),
        ("id2label", {"0": "negative", "2": "positive"}),
    ],
)
def test_a_configuration_that_names_code_or_another_model_is_refused_by_the_key(
    edited: Edit, key: str, value: Any
) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json.*\b{key}\b"):
        open_checkpoint(edited(config={key: value}))


def test_python_files_beside_a_checkpoint_never_run(
    edited: Edit, tasks: dict[str, Task], marker: Path
) -> None:
    path = edited()
    clean = open_checkpoint(path)
    for module in ("modeling_evil", "configuration_evil", "__init__", "tokenization_evil"):
        (path / f"{module}.py").write_text(
            f"from pathlib import Path\nPath({str(marker)!r}).touch()\nclass Evil: pass\n"
        )
    auto_map = {
        "AutoConfig": "configuration_evil.Evil",
        "AutoModelForSequenceClassification": "modeling_evil.Evil",
    }
    config = json.loads((path / "config.json").read_text()) | {"auto_map": auto_map}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="auto_map"):
        open_checkpoint(path)
    # Even a caller that opened it before the key was there loads weights only.
    load_model(clean, tasks["single"])


def test_a_tokenizer_configuration_that_names_code_is_ignored(
    edited: Edit, tasks: dict[str, Task], marker: Path
) -> None:
    path = edited()
    before = _logits(open_checkpoint(path), tasks["single"])
    (path / "tokenization_evil.py").write_text(
        f"from pathlib import Path\nPath({str(marker)!r}).touch()\nclass Evil: pass\n"
    )
    (path / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": [None, "tokenization_evil.Evil"]}})
    )
    np.testing.assert_array_equal(_logits(open_checkpoint(path), tasks["single"]), before)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_pickled_weights_are_refused_unread(edited: Edit, marker: Path, name: str) -> None:
    path = edited()
    (path / "model.safetensors").unlink()
    (path / name).write_bytes(pickle.dumps(_Touches(marker)))
    with pytest.raises(CheckpointError, match=rf"{name} refused: it is a pickle"):
        open_checkpoint(path)


def test_a_pickle_beside_safetensors_is_left_unread(
    edited: Edit, tasks: dict[str, Task], marker: Path
) -> None:
    path = edited()
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (path / name).write_bytes(pickle.dumps(_Touches(marker)))
    load_model(open_checkpoint(path), tasks["single"])


def test_a_pickle_renamed_to_safetensors_is_refused(edited: Edit, marker: Path) -> None:
    path = edited()
    (path / "model.safetensors").write_bytes(pickle.dumps(_Touches(marker)))
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a whole safetensors"):
        open_checkpoint(path)


def test_an_adapter_beside_a_checkpoint_is_ignored(edited: Edit, tasks: dict[str, Task]) -> None:
    path = edited()
    before = _logits(open_checkpoint(path), tasks["single"])
    (path / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "evil/repo", "peft_type": "LORA"})
    )
    np.testing.assert_array_equal(_logits(open_checkpoint(path), tasks["single"]), before)


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: there is no such directory"):
        open_checkpoint(tmp_path / "nowhere")


def test_sharded_weights_are_refused_with_what_to_do(edited: Edit) -> None:
    path = edited()
    (path / "model.safetensors").rename(path / "model-00001-of-00002.safetensors")
    (path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"shards; save them as one model\.safetensors"):
        open_checkpoint(path)


def test_a_checkpoint_without_weights_is_refused(edited: Edit) -> None:
    path = edited()
    (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(None, id="missing"),
        pytest.param(b"", id="empty"),
        pytest.param(b"model_type: bert", id="not JSON"),
        pytest.param(b'["bert"]', id="a list"),
        pytest.param(b'"bert"', id="a string"),
        pytest.param(b"[" * 100_000, id="deeply nested"),
        pytest.param(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, id="deeply nested objects"),
        pytest.param(b'{"model_type": "b\xffrt"}', id="not UTF-8"),
    ],
)
def test_an_unreadable_config_json_is_refused(edited: Edit, content: bytes | None) -> None:
    path = edited()
    if content is None:
        (path / "config.json").unlink()
    else:
        (path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "evil"),
        ("num_attention_heads", 0),
        ("num_attention_heads", 3),
        ("hidden_size", -4),
        ("hidden_size", "x"),
        ("vocab_size", [1]),
        ("pad_token_id", 10**6),
        ("pad_token_id", "x"),
        ("max_position_embeddings", "many"),
        ("initializer_range", "x"),
        ("hidden_dropout_prob", 7),
    ],
)
def test_a_nonsensical_configuration_value_is_an_error_of_the_user_not_a_traceback(
    edited: Edit, tasks: dict[str, Task], key: str, value: Any
) -> None:
    with pytest.raises(CheckpointError):
        _logits(open_checkpoint(edited(config={key: value})), tasks["single"])


@pytest.mark.parametrize("count", ["x", [], 0])
def test_a_number_of_labels_that_is_none_is_an_error_of_the_user(edited: Edit, count: Any) -> None:
    with pytest.raises(CheckpointError):
        open_checkpoint(edited(config={"id2label": ..., "num_labels": count}))


@pytest.mark.parametrize(
    "config",
    [
        {"return_dict": False},
        {"output_hidden_states": True, "output_attentions": True},
        {"torchscript": True},
        {"attribute_map": {"other": "_attn_implementation_internal"}, "other": "evil/repo"},
    ],
    ids=lambda config: next(iter(config)),
)
def test_a_configuration_cannot_change_how_the_model_is_called(
    edited: Edit, tasks: dict[str, Task], tiny_classifiers: dict[str, Checkpoint], config: Any
) -> None:
    """Only what describes the architecture counts; how outputs are returned is edgebert's."""
    checkpoint = open_checkpoint(edited(config=config))
    expected = _logits(tiny_classifiers["single"], tasks["single"])
    np.testing.assert_allclose(_logits(checkpoint, tasks["single"]), expected, atol=1e-4)
    model = load_model(checkpoint, tasks["single"])
    assert model.config._attn_implementation == "sdpa"


def test_a_checkpoint_without_a_tokenizer_is_refused(edited: Edit) -> None:
    path = edited()
    (path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"neither tokenizer\.json nor vocab\.txt"):
        open_checkpoint(path)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b'{"model": {"type": "BPE"}}'])
def test_an_unreadable_tokenizer_is_refused(edited: Edit, content: bytes) -> None:
    path = edited()
    (path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="the tokenizer cannot be read"):
        load_tokenizer(open_checkpoint(path))


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(edited: Edit) -> None:
    path = edited()
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    size = tokenizer.get_vocab_size()
    tokenizer.add_tokens(["zyzzyva"])
    tokenizer.save(str(path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=rf"ids up to {size} and the model embeds {size}"):
        load_tokenizer(open_checkpoint(path))


def test_a_tokenizer_whose_ids_lie_beyond_the_embeddings_is_refused(edited: Edit) -> None:
    """As many tokens as embeddings, but one of them has an id that no embedding has."""
    path = edited()
    values = json.loads((path / "tokenizer.json").read_text())
    vocabulary = values["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = 100_000
    (path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="do not belong together"):
        load_tokenizer(open_checkpoint(path))


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_safetensors_file_is_refused(edited: Edit, keep: int) -> None:
    path = edited()
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a whole safetensors"):
        open_checkpoint(path)


@pytest.mark.parametrize("content", [b"\xff" * 64, b"garbage" * 100])
def test_garbage_weights_are_refused(edited: Edit, content: bytes) -> None:
    path = edited()
    (path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a whole safetensors"):
        open_checkpoint(path)


QUERY = "bert.encoder.layer.1.attention.self.query.weight"


def _with(name: str, change: Callable[[torch.Tensor], Any]) -> Callable[[Any], Any]:
    def apply(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        changed = change(weights.pop(name)) if name in weights else change(torch.zeros(3))
        return weights if changed is None else weights | {name: changed}

    return apply


def _one(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[5] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(_with(QUERY, _one(float("nan"))), f"{QUERY} holds NaN", id="NaN"),
        pytest.param(_with(QUERY, _one(float("inf"))), f"{QUERY} holds NaN", id="infinity"),
        pytest.param(_with(QUERY, lambda _: None), f"lacks {QUERY}", id="missing"),
        pytest.param(
            _with("classifier.bias", lambda _: None), "lacks classifier.bias", id="half a head"
        ),
        pytest.param(
            _with("bert.encoder.evil", lambda t: t),
            "unknown weight bert.encoder.evil",
            id="unknown",
        ),
        pytest.param(
            _with(QUERY, lambda t: t[:, :-1]),
            rf"{QUERY} has shape \[32, 31\], config.json says \[32, 32\]",
            id="another shape",
        ),
        pytest.param(
            _with("classifier.weight", lambda t: torch.cat([t, t])),
            r"classifier.weight has shape \[4, 32\]",
            id="a head of another size",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(
    edited: Edit, tasks: dict[str, Task], change: Any, message: str
) -> None:
    checkpoint = open_checkpoint(edited(weights=change))
    with pytest.raises(CheckpointError, match=message):
        load_model(checkpoint, tasks["single"])


@pytest.mark.parametrize("layers", [1, 3, 10**7])
def test_other_layers_than_there_are_weights_for_are_refused(edited: Edit, layers: int) -> None:
    with pytest.raises(CheckpointError, match=f"says {layers} layers, model.safetensors has 2"):
        open_checkpoint(edited(config={"num_hidden_layers": layers}))


def test_sizes_beyond_the_weights_are_refused_before_they_take_memory(
    edited: Edit, tasks: dict[str, Task]
) -> None:
    # Built as asked, the layers alone would take 4 TB.
    checkpoint = open_checkpoint(edited(config={"hidden_size": 2**19, "intermediate_size": 2**20}))
    with pytest.raises(CheckpointError, match=r"has shape \[.*\], config\.json says \["):
        load_model(checkpoint, tasks["single"])


def test_a_max_length_beyond_the_positions_is_refused(
    tiny_classifiers: dict[str, Checkpoint],
) -> None:
    checkpoint_encoder(tiny_classifiers["single"], max_length=128, text_pair=False)
    with pytest.raises(CheckpointError, match=r"max_length is 129 .* positions for 128"):
        checkpoint_encoder(tiny_classifiers["single"], max_length=129, text_pair=False)


# Checkpoints as they are found ------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {"_name_or_path": "bert-base-uncased"},
        {"_attn_implementation_autoset": True},
        {"_attn_implementation": "sdpa"},
        {"_attn_implementation_internal": None},
        {"is_decoder": False, "add_cross_attention": False},
        {"_commit_hash": "abc", "transformers_version": "4.9.0", "torch_dtype": "float16"},
        {"architectures": ["SomethingElse"]},
    ],
    ids=lambda config: next(iter(config)),
)
def test_harmless_keys_of_real_checkpoints_change_nothing(
    edited: Edit, tasks: dict[str, Task], tiny_classifiers: dict[str, Checkpoint], config: Any
) -> None:
    checkpoint = open_checkpoint(edited(config=config))
    assert checkpoint.architecture == tiny_classifiers["single"].architecture
    expected = _logits(tiny_classifiers["single"], tasks["single"])
    np.testing.assert_array_equal(_logits(checkpoint, tasks["single"]), expected)


def _old_norms(weights: dict[str, Any]) -> dict[str, Any]:
    return {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in weights.items()
    }


def _extra_heads(weights: dict[str, Any]) -> dict[str, Any]:
    return weights | {
        "bert.embeddings.position_ids": torch.arange(128)[None],
        "cls.predictions.bias": torch.zeros(9),
        "cls.predictions.transform.LayerNorm.gamma": torch.zeros(9),
        "cls.seq_relationship.weight": torch.zeros(2, 32),
    }


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(_old_norms, id="LayerNorm.gamma and beta"),
        pytest.param(lambda w: {k.removeprefix("bert."): v for k, v in w.items()}, id="no prefix"),
        pytest.param(_extra_heads, id="pre-training head and position_ids"),
        pytest.param(lambda w: {k: v.double() for k, v in w.items()}, id="float64"),
    ],
)
def test_legacy_weight_names_give_the_same_outputs(
    edited: Edit, tasks: dict[str, Task], tiny_classifiers: dict[str, Checkpoint], change: Any
) -> None:
    checkpoint = open_checkpoint(edited(weights=change))
    expected = _logits(tiny_classifiers["single"], tasks["single"])
    np.testing.assert_array_equal(_logits(checkpoint, tasks["single"]), expected)


def test_a_bare_encoder_takes_a_new_head_and_keeps_its_own_weights(
    tiny_encoder: Path, tasks: dict[str, Task]
) -> None:
    checkpoint = open_checkpoint(tiny_encoder)
    assert checkpoint.labels is None
    with pytest.raises(CheckpointError, match="no classification head"):
        load_model(checkpoint, tasks["single"])
    model = load_model(checkpoint, tasks["multi"], new_head=True)
    stored = load_file(tiny_encoder / "model.safetensors")
    loaded = model.state_dict()
    for name, tensor in stored.items():
        assert torch.equal(loaded[f"bert.{name}"], tensor), name
    assert loaded["classifier.weight"].shape == (3, 32)


def test_a_new_head_takes_nothing_from_the_old_one(
    tiny_classifiers: dict[str, Checkpoint], tasks: dict[str, Task]
) -> None:
    checkpoint = tiny_classifiers["single"]
    other = tasks["multi"]
    model = load_model(checkpoint, other, new_head=True)
    assert model.state_dict()["classifier.weight"].shape == (3, 32)
    same_size = Task(kind="single_label", labels=("up", "down"), text_pair=False)
    fresh = load_model(checkpoint, same_size, new_head=True).state_dict()["classifier.weight"]
    old = load_file(checkpoint.path / "model.safetensors")["classifier.weight"]
    assert not torch.equal(fresh, old)


@pytest.mark.parametrize("lowercase", [True, False])
def test_a_vocab_txt_tokenises_like_the_tokenizer_json(
    edited: Edit, texts_for: dict[str, list[Any]], lowercase: bool
) -> None:
    path = edited()
    values = json.loads((path / "tokenizer.json").read_text())
    values["normalizer"]["lowercase"] = lowercase
    (path / "tokenizer.json").write_text(json.dumps(values))
    modern = load_tokenizer(open_checkpoint(path))
    vocabulary = modern.get_vocab()
    (path / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.get)) + "\n")
    (path / "tokenizer.json").unlink()
    (path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lowercase}))
    legacy = load_tokenizer(open_checkpoint(path))
    texts = [*texts_for["single"], *TEXTS, "UPPER lower", "中文 ÀÉ", "a [MASK] b [SEP] c"]
    for text in texts:
        assert legacy.encode(text).ids == modern.encode(text).ids, text
        pair = modern.encode(text, "Second one")
        assert legacy.encode(text, "Second one").ids == pair.ids
        assert legacy.encode(text, "Second one").type_ids == pair.type_ids
    upper = legacy.encode("THE FILM").ids
    assert (upper == legacy.encode("the film").ids) is lowercase


# Heads and tasks --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "labels"),
    [
        pytest.param("single_label", ("negative", "neutral", "positive"), id="number"),
        pytest.param("single_label", ("bad", "good"), id="names"),
        pytest.param("single_label", ("positive", "negative"), id="order"),
        pytest.param("multi_label", ("negative", "positive"), id="kind"),
    ],
)
def test_a_head_that_answers_another_task_is_refused_and_both_are_named(
    tiny_classifiers: dict[str, Checkpoint], kind: Any, labels: tuple[str, ...]
) -> None:
    thresholds = (0.5,) * len(labels) if kind == "multi_label" else None
    task = Task(kind=kind, labels=labels, text_pair=False, thresholds=thresholds)
    checkpoint = tiny_classifiers["single"]
    assert not checkpoint.matches(task)
    with pytest.raises(CheckpointError) as caught:
        load_model(checkpoint, task)
    message = str(caught.value)
    assert "single_label" in message
    assert "(negative, positive)" in message
    assert f"{kind} with {len(labels)} labels ({', '.join(labels)})" in message


@pytest.mark.parametrize(
    "id2label", [{"0": "LABEL_0", "1": "LABEL_1"}, ...], ids=["LABEL_0", "no names"]
)
def test_generic_label_names_match_by_their_number(edited: Edit, id2label: Any) -> None:
    checkpoint = open_checkpoint(
        edited(config={"id2label": id2label, "label2id": ..., "problem_type": ...})
    )
    assert checkpoint.labels == ("LABEL_0", "LABEL_1")
    two = Task(kind="single_label", labels=("bad", "good"), text_pair=False)
    model = load_model(checkpoint, two)
    assert model.config.id2label == {0: "bad", 1: "good"}
    three = Task(kind="single_label", labels=("bad", "fair", "good"), text_pair=False)
    with pytest.raises(CheckpointError, match="bad, fair, good"):
        load_model(checkpoint, three)


# Round trips ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["single", "multi", "pairs"])
def test_saving_and_loading_gives_the_same_weights(
    tiny_classifiers: dict[str, Checkpoint], tasks: dict[str, Task], tmp_path: Path, name: str
) -> None:
    model = load_model(tiny_classifiers[name], tasks[name])
    saved = save_checkpoint(model, load_tokenizer(tiny_classifiers[name]), tmp_path / "saved")
    assert saved.labels == tasks[name].labels
    assert saved.matches(tasks[name])
    again = load_model(open_checkpoint(tmp_path / "saved"), tasks[name]).state_dict()
    for key, tensor in model.state_dict().items():
        assert torch.equal(again[key], tensor), key


@pytest.mark.parametrize("model_type", ["bert", "distilbert"])
def test_transformers_loads_a_saved_checkpoint_and_agrees(
    tiny_classifiers: dict[str, Checkpoint],
    tasks: dict[str, Task],
    texts_for: dict[str, list[Any]],
    tmp_path: Path,
    model_type: str,
) -> None:
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DistilBertConfig,
        DistilBertForSequenceClassification,
    )

    source = tiny_classifiers["single"]
    tokenizer = load_tokenizer(source)
    model: Any = load_model(source, tasks["single"])
    if model_type == "distilbert":
        config = DistilBertConfig(
            vocab_size=tokenizer.get_vocab_size(),
            dim=32,
            n_layers=2,
            n_heads=4,
            hidden_dim=64,
            id2label=dict(enumerate(tasks["single"].labels)),
            label2id={label: i for i, label in enumerate(tasks["single"].labels)},
        )
        model = DistilBertForSequenceClassification(config).eval()
    path = tmp_path / "saved"
    save_checkpoint(model, tokenizer, path)
    texts = texts_for["single"][:32]
    theirs = AutoModelForSequenceClassification.from_pretrained(path).eval()
    their_tokenizer = AutoTokenizer.from_pretrained(path)
    inputs = their_tokenizer(
        texts, padding=True, truncation=True, max_length=128, return_tensors="pt"
    )
    encoder = checkpoint_encoder(open_checkpoint(path), max_length=128, text_pair=False)
    for row, ids, mask in zip(
        encoder.encode(texts), inputs["input_ids"], inputs["attention_mask"], strict=True
    ):
        assert list(row.ids) == ids[mask.bool()].tolist()
    with torch.inference_mode():
        logits = theirs(**inputs).logits.numpy()
    expected = _logits(open_checkpoint(path), tasks["single"], texts)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    assert theirs.config.id2label == {0: "negative", 1: "positive"}


def test_the_hash_covers_every_file_that_is_read_and_no_other(edited: Edit) -> None:
    path = edited()
    (path / "vocab.txt").write_text("[PAD]\n")
    first = open_checkpoint(path).sha256
    assert open_checkpoint(path).sha256 == first
    (path / "README.md").write_text("unrelated")
    (path / "pytorch_model.bin").write_bytes(b"unrelated")
    assert open_checkpoint(path).sha256 == first
    seen = {first}
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (path / name).write_bytes((path / name).read_bytes() + b"\n")
        seen.add(open_checkpoint(path).sha256)
    weights = load_file(path / "model.safetensors")
    save_file(
        weights | {"classifier.bias": weights["classifier.bias"] + 1e-3}, path / "model.safetensors"
    )
    seen.add(open_checkpoint(path).sha256)
    (path / "vocab.txt").unlink()
    seen.add(open_checkpoint(path).sha256)
    assert len(seen) == 7  # every one of these is another checkpoint
