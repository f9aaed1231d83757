"""The snippets of docs/ci.md: what can be checked of them without the services they are for."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from edgebert_pipeline.cli import main
from edgebert_runtime.cli import main as runtime

DOC = Path(__file__).parent.parent.parent / "docs" / "ci.md"
COMMANDS = {"edgebert": main, "edgebert-rt": runtime}


def snippets() -> tuple[dict[str, Any], dict[str, Any]]:
    github, gitlab = re.findall(r"```yaml\n(.*?)```", DOC.read_text(), re.DOTALL)
    return yaml.safe_load(github), yaml.safe_load(gitlab)


def scripts() -> Iterator[str]:
    github, gitlab = snippets()
    for step in github["jobs"]["export"]["steps"]:
        if "run" in step:
            yield re.sub(r"\$\{\{.*?\}\}", "1", step["run"])
    yield "\n".join(gitlab["export"]["script"])


@pytest.mark.parametrize("script", list(scripts()))
def test_scripts_are_bash(script: str) -> None:
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_option_is_one_that_the_command_has() -> None:
    text = DOC.read_text().replace("\\\n", " ")
    calls = re.findall(r"^ *(edgebert(?:-rt)?) ([a-z]+) (.*)$", text, re.MULTILINE)
    calls += re.findall(r"`(edgebert(?:-rt)?) ([a-z]+) ([^`]*)`", text)
    assert len(calls) > 10
    for program, name, rest in calls:
        command = COMMANDS[program].commands[name]
        known = {option for p in command.params if isinstance(p, click.Option) for option in p.opts}
        used = {word for word in shlex.split(rest.split("|")[0]) if word.startswith("--")}
        assert used <= known, (program, name)


def test_artifacts_are_what_the_next_run_looks_for() -> None:
    github, gitlab = snippets()
    steps = github["jobs"]["export"]["steps"]
    (left,) = [s["with"] for s in steps if s.get("with", {}).get("name") == "export"]
    assert left["path"].split() == [
        "build/ci/bundle",
        "build/ci/bundle.refused",
        "build/ci/report.*",
    ]
    (fetch,) = [s["run"] for s in steps if "download" in s.get("run", "")]
    assert "--name export --dir main" in fetch  # so it is main/bundle
    (listing,) = re.findall(r"gh run list(.*?)--json", fetch, re.DOTALL)
    assert "--branch main --event push " in listing  # not of a fork's branch main
    assert "build/ci/bundle" in gitlab["export"]["artifacts"]["paths"]
    assert "main/build/ci/bundle" in gitlab["export"]["script"][-1]  # GitLab keeps the path


@pytest.fixture
def compare_with_main(
    tmp_path: Path, tiny_bundles, write_recipe, made_report
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Returns a function that runs the step for a change whose report has other ``about``."""

    def compare(**about: Any) -> subprocess.CompletedProcess[str]:
        github, _ = snippets()
        (step,) = [
            s for s in github["jobs"]["export"]["steps"] if "edgebert compare" in s.get("run", "")
        ]
        for place, report in (("main", made_report()), ("build/ci", made_report(**about))):
            shutil.copytree(tiny_bundles["single"], tmp_path / place / "bundle")
            (tmp_path / place / "report.json").write_bytes(report)
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        return subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
            cwd=tmp_path,
            env={**os.environ, "PATH": path, "RECIPE": str(write_recipe())},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return compare


def test_a_change_of_the_test_data_is_refused(compare_with_main) -> None:
    done = compare_with_main(rows=tuple(f"other {number}" for number in range(40)))
    assert done.returncode == 2
    assert "main and ci were measured on different test rows" in done.stderr


def test_comparing_with_the_main_branch_works(tmp_path: Path, compare_with_main) -> None:
    done = compare_with_main()
    # How fast a tiny model answers is chance; what it answers is not.
    assert done.returncode in (0, 3), done.stderr
    comment = (tmp_path / "compare.md").read_text()
    assert "| change | fp32" in re.sub(" +", " ", comment)
    assert "no difference shown" in comment
    assert (tmp_path / "compare.html").stat().st_size > 100_000
    assert "testcase" in (tmp_path / "compare.xml").read_text()
