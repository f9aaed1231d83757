"""What is in the two distributions, and what each needs."""

from __future__ import annotations

import ast
import email
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent.parent
PACKAGES = {
    "edgebert_runtime": ROOT / "runtime",
    "edgebert_export": ROOT / "export",
    "edgebert_pipeline": ROOT / "pipeline",
}
HEAVY = {"torch", "transformers", "onnx", "optimum", "datasets", "accelerate", "sklearn", "scipy"}


def sources(package: str) -> dict[str, Path]:
    root = PACKAGES[package]
    return {str(path.relative_to(root)): path for path in (root / package).rglob("*.py")}


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both wheels, built by the declared backend from this tree."""
    out = tmp_path_factory.mktemp("wheels")
    for project in (ROOT / "runtime", ROOT):
        subprocess.run(
            [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, project],
            check=True,
            capture_output=True,
        )
    found = {path.name.partition("-")[0]: path for path in out.glob("*.whl")}
    assert found.keys() == {"edgebert", "edgebert_runtime"}
    return found


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def metadata_of(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def test_the_runtime_wheel_holds_the_runtime_and_nothing_else(wheels: dict[str, Path]) -> None:
    expected = {*sources("edgebert_runtime"), "edgebert_runtime/py.typed"}
    assert contents(wheels["edgebert_runtime"]) == expected


def test_the_full_wheel_holds_export_and_pipeline_and_not_the_runtime(
    wheels: dict[str, Path],
) -> None:
    expected = {*sources("edgebert_export"), *sources("edgebert_pipeline")}
    expected |= {"edgebert_export/py.typed", "edgebert_pipeline/py.typed"}
    templates = ("page.html.j2", "flips.html.j2", "page.css", "page.js")
    expected |= {f"edgebert_pipeline/templates/{name}" for name in templates}
    assert contents(wheels["edgebert"]) == expected


def test_the_runtime_needs_six_small_packages(wheels: dict[str, Path]) -> None:
    requirements = metadata_of(wheels["edgebert_runtime"]).get_all("Requires-Dist") or []
    plain = {re.split(r"[^\w.-]", r)[0] for r in requirements if "extra ==" not in r}
    assert plain == {"click", "filelock", "msgspec", "numpy", "platformdirs", "tokenizers"}


def test_the_full_distribution_pins_the_runtime_of_the_same_version(
    wheels: dict[str, Path],
) -> None:
    full, runtime = metadata_of(wheels["edgebert"]), metadata_of(wheels["edgebert_runtime"])
    assert full["Version"] == runtime["Version"]
    requirements = full.get_all("Requires-Dist") or []
    assert f"edgebert-runtime=={runtime['Version']}" in requirements
    for extra in ("cpu", "gpu", "rtx"):
        wanted = f"edgebert-runtime[{extra}]=={runtime['Version']}; extra == '{extra}'"
        assert wanted in [r.replace('"', "'") for r in requirements]


def test_the_runtime_installs_alone_and_says_which_extra_is_missing(
    wheels: dict[str, Path], tiny_bundles: dict[str, Path], tmp_path: Path
) -> None:
    """In an environment with the runtime's five requirements and without ONNX Runtime."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run(
        [
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--constraint",
            ROOT / "constraints.txt",
            wheels["edgebert_runtime"],
        ],
        check=True,
        capture_output=True,
    )
    command = [tmp_path / "venv" / "bin" / "edgebert-rt", "predict", tiny_bundles["single"], "hi"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        "error: ONNX Runtime is not installed. Install it with: pip install "
        "'edgebert-runtime[cpu]' (or [gpu] for CUDA)\n"
    )
    inspected = subprocess.run(
        [command[0], "inspect", tiny_bundles["single"]], capture_output=True, text=True, check=True
    )
    assert "every file checked" in inspected.stdout
    script = "import edgebert_runtime, sys; print(*sorted(sys.modules))"
    loaded = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True)
    assert not HEAVY & set(loaded.stdout.split())


def imported(path: Path) -> set[str]:
    """Names of all packages that a source file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("edgebert_runtime", {"edgebert_export", "edgebert_pipeline", *HEAVY}),
        ("edgebert_export", {"edgebert_pipeline"}),
    ],
)
def test_dependencies_point_from_pipeline_to_export_to_runtime(
    package: str, forbidden: set[str]
) -> None:
    for name, path in sources(package).items():
        assert not imported(path) & forbidden, name


def test_from_pretrained_is_called_nowhere() -> None:
    """Its loader follows what a checkpoint says; see checkpoint.py."""
    for package in PACKAGES:
        for name, path in sources(package).items():
            calls = [
                node.func.attr
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            ]
            assert "from_pretrained" not in calls, name


def test_looking_at_a_recipe_loads_nothing_heavy() -> None:
    script = (
        "import sys; from edgebert_pipeline.cli import main; "
        f"main(['recipe', '--check', {str(ROOT / 'examples' / 'movie-sentiment.toml')!r}], "
        "standalone_mode=False); print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert not {"torch", "transformers", "onnx", "onnxruntime", "datasets"} & set(
        done.stdout.split()
    )


def test_every_dependency_is_locked() -> None:
    locked = {
        re.split(r"[=; ]", line)[0].lower()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert line.startswith("#") or "==" in line.partition(";")[0], line
    for project in (ROOT, ROOT / "runtime"):
        config = tomllib.loads((project / "pyproject.toml").read_text())
        wanted = [
            *config["project"]["dependencies"],
            *config["project"]["optional-dependencies"]["cpu"],
            *config["project"]["optional-dependencies"]["rtx"],
            *config.get("dependency-groups", {}).get("dev", []),
        ]
        for requirement in wanted:
            name = re.split(r"[^A-Za-z0-9._-]", requirement)[0].lower()
            assert name in locked or name == "edgebert-runtime", requirement


def test_version_is_the_same_everywhere() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    text = (ROOT / "runtime" / "edgebert_runtime" / "__init__.py").read_text()
    assert f'__version__ = "{config["project"]["version"]}"' in text
    assert f"## {config['project']['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_calibration_data_is_what_its_readme_says() -> None:
    import hashlib

    readme = (ROOT / "calibration_data" / "README.md").read_text(encoding="utf-8")
    for name in ("sentences.jsonl", "pairs.jsonl"):
        data = (ROOT / "calibration_data" / name).read_bytes()
        row = f"| `{name}` | {len(data.splitlines())} | {len(data)} | "
        assert f"{row}`{hashlib.sha256(data).hexdigest()}` |" in readme


def test_the_environment_variable_that_hides_gpus_is_set_for_tests() -> None:
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")
def test_make_test_gpu_needs_the_runtime_alone_and_skips_with_the_reason(tmp_path: Path) -> None:
    for name in (*HEAVY, "hypothesis", "edgebert_export", "edgebert_pipeline"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('this is a small device')")
    given = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([str(tmp_path), *([given] if given else [])])
    done = subprocess.run(
        ["make", "test-gpu", f"GPU_PYTHON={sys.executable}", "BUNDLE=/a/bundle"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'EDGEBERT_GPU_BUNDLE="/a/bundle"' in done.stdout
    assert "skipped" in done.stdout and "tensorrt: " in done.stdout
