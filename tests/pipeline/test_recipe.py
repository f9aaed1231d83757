"""Recipes: what is accepted, and how what is wrong is named."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from edgebert_pipeline import recipe
from edgebert_pipeline.cli import main
from edgebert_pipeline.errors import RecipeError
from edgebert_pipeline.recipe import load_recipe
from edgebert_pipeline.recipe_reference import render_reference

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.toml")), ids=lambda p: p.name)
def test_every_example_is_valid(path: Path) -> None:
    assert load_recipe(path).name == path.stem


def test_the_reference_in_docs_is_what_the_types_say() -> None:
    assert (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8") == render_reference(), (
        "run `make docs`"
    )


def test_the_reference_describes_every_key_of_the_default_recipe() -> None:
    reference = render_reference()
    for line in (ROOT / "examples" / "movie-sentiment.toml").read_text().splitlines():
        if match := re.match(r"(\w+) = ", line):
            assert f"| `{match[1]}` |" in reference


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "tiny-single"', 'nmae = "x"', "unknown key 'nmae'; did you mean 'name'?"),
        ("epochs", "epoch", "unknown key 'finetune.epoch'; did you mean 'epochs'?"),
        ("path =", "pth =", "unknown key 'model.pth'; did you mean 'path'?"),
        ("[data.train]", "[data.trian]", "unknown key 'data.trian'; did you mean 'train'?"),
        ("epochs = 2", 'epochs = "2"', "finetune.epochs: Expected 'int', got 'str'"),
        ("epochs = 2", "epochs = 0", "finetune.epochs: Expected 'int' >= 1"),
        ("test_share = 0.3", "test_share = 0.95", "leave nothing to train on"),
        ('labels = ["negative", "positive"]', 'labels = ["one"]', "at least 2 labels"),
        ('labels = ["negative", "positive"]', 'labels = ["a", "a"]', "must be distinct"),
        ('labels = ["negative", "positive"]', "", "data: missing key 'labels'"),
        ('name = "tiny-single"', 'name = "../x"', "name: must be up to 64 letters, digits, dots"),
        ('label = "sentiment"', 'task = "multilabel"', "data.task"),
        ("[model]", '[model]\nhub = "a/b"', "exactly one of path, package and hub"),
        ("[model]", '[model]\nmember = ["x"]', "member belongs to package"),
        ("max_length = 64", "opset = 17", "export.opset"),
        ("[export]", "[export", "is not TOML"),
        (
            'label = "sentiment"',
            "label_ranges = { negative = [0.0, 1.0] }",
            "one range for each of labels",
        ),
        ('label = "sentiment"', 'label_values = ["0"]', "one value for each of labels"),
        ('label = "sentiment"', 'label_values = ["1", 1]', "label_values must be distinct"),
        (
            'label = "sentiment"',
            "label_ranges = { negative = [-4.0, 0.0], positive = [0.0, 4.0] }",
            "label_ranges overlap",
        ),
        ("epochs = 2", "seed = 4294967296", "finetune.seed"),
        ("epochs = 2", f"epochs = {10**22}", "finetune.epochs"),
        ("[evaluate]", "[[evaluate]]", "evaluate: Expected a table, got a list"),
        ("[model]", "x = " + "[" * 5000 + "\n[model]", "is not TOML"),
        ("[evaluate]", '[bundle]\nthresholds = "validation"\n[evaluate]', "for multi_label tasks"),
    ],
)
def test_what_is_wrong_is_named(write_recipe, old: str, new: str, message: str) -> None:
    path = write_recipe()
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(RecipeError, match=re.escape(message)) as raised:
        load_recipe(path)
    assert str(raised.value).startswith(str(path))
    assert "\n" not in str(raised.value)


def test_a_hub_id_needs_a_commit_not_a_branch(write_recipe) -> None:
    path = write_recipe()
    text = re.sub(r'path = "[^"]*encoder[^"]*"', 'hub = "a/b"\nrevision = "main"', path.read_text())
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"model\.revision: must be a commit"):
        load_recipe(path)


def test_a_missing_recipe_and_one_that_is_not_utf8(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no such recipe"):
        load_recipe(tmp_path / "none.toml")
    bad = tmp_path / "latin.toml"
    bad.write_bytes('name = "é"'.encode("latin-1"))
    with pytest.raises(RecipeError, match="is not UTF-8"):
        load_recipe(bad)
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path)


def test_check_validates_and_ends_with_2_on_a_bad_recipe(write_recipe) -> None:
    path = write_recipe()
    good = CliRunner().invoke(main, ["recipe", "--check", str(path)])
    assert (good.exit_code, good.output) == (
        0,
        f"{path}: tiny-single, single_label, 2 labels: ok\n",
    )
    text = path.read_text()
    path.write_text(text.replace("sentences.jsonl", "sentence.jsonl"))
    gone = CliRunner().invoke(main, ["recipe", "--check", str(path)])
    assert gone.exit_code == 2
    assert "data.train.path: there is no file" in gone.output
    path.write_text("x = 1")
    bad = CliRunner().invoke(main, ["recipe", "--check", str(path)])
    assert bad.exit_code == 2
    assert bad.output.count("\n") == 1


def test_every_limit_on_the_form_of_a_key_is_told_in_words() -> None:
    limits = re.findall(r"Meta\(pattern=(r\"[^\"]*\")", Path(recipe.__file__).read_text())
    limits += re.findall(r"\bpattern=(r\"[^\"]*\")", Path(recipe.__file__).read_text())
    assert {ast.literal_eval(limit) for limit in limits} == set(recipe._PATTERN_IN_WORDS)


def test_the_hash_covers_what_shapes_the_bundle_and_not_the_layout(write_recipe) -> None:
    path = write_recipe()
    before = load_recipe(path).sha256()
    path.write_text("# a comment\n" + path.read_text() + "\n[gate]\nmax_p99_ms = 5.0\n")
    assert load_recipe(path).sha256() == before
    path.write_text(path.read_text().replace("epochs = 2", "epochs = 3"))
    assert load_recipe(path).sha256() != before
