"""Downloads one file of a package from the registry that pip is set up for; run as a program.

``pip download`` would prepare a source archive's metadata, which runs the package's ``setup.py``.
pip has no public command that only downloads, so this uses its finder and its session, with all
of the user's settings (mirrors, proxies, certificates, credentials). pip's internals are not
meant to be imported by a program that does anything else, hence a process of its own; pip's
version is locked. It can go when pip gains such a command.

Usage: python -m edgebert_pipeline.registry_download NAME==VERSION FILE OUT
Prints ``bytes DONE TOTAL`` lines; on failure, the reason is the last line on stderr.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

_CHUNK_BYTES = 1024 * 1024


def main(requirement: str, file: str, out: Path) -> str | None:
    """Downloads ``file`` to ``out``; returns the reason if that cannot be done."""
    from pip._internal.commands.download import DownloadCommand
    from pip._internal.utils.misc import redact_auth_from_url

    command: Any = DownloadCommand("download", "")
    with command.main_context():
        options, _ = command.parse_args(["--quiet", "--quiet", "--no-input", "--retries", "2"])
        session = command.get_default_session(options)
        finder = command._build_package_finder(options=options, session=session)
        name = requirement.partition("==")[0]
        found = finder.find_all_candidates(name)
        links = [candidate.link for candidate in found if candidate.link.filename == file]
        if not links:
            if found:
                return f"the registry has {name}, but not this file"
            return f"the registry cannot be reached, or does not have {name}"
        link = links[0]
        if link.is_file:
            data = Path(link.file_path).read_bytes()
            out.write_bytes(data)
            return None
        try:
            response = session.get(link.url_without_fragment, stream=True)
            response.raise_for_status()
            total = int(response.headers.get("content-length", 0))
            done = 0
            with out.open("wb") as target:
                for chunk in response.iter_content(_CHUNK_BYTES):
                    target.write(chunk)
                    done += len(chunk)
                    sys.stdout.write(f"bytes {done} {max(total, done)}\n")
                    sys.stdout.flush()
        except Exception as exc:
            return f"{redact_auth_from_url(link.url_without_fragment)}: {exc}"
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], Path(sys.argv[3])))
