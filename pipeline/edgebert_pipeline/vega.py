"""The script that draws charts: Vega, Vega-Lite and Vega-Embed in one, kept once it is made."""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from importlib import metadata

import platformdirs

from edgebert_runtime.cache import write_whole

__all__ = ["vega_script"]


@cache
def vega_script() -> str:
    """Returns the script, which has no ``</script`` in it.

    vl-convert holds the libraries' sources and takes seconds to make one script of them, so it is
    kept, by vl-convert's version; where that cannot be written, it is made anew. Pages run it
    unseen, so it is kept in the user's own cache directory and not in ``EDGEBERT_CACHE_DIR``,
    which CI jobs share.
    """
    place = platformdirs.user_cache_path("edgebert-charts")
    path = place / f"vega-{metadata.version('vl-convert-python')}.js"
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        script = _make()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, script.encode())
    return script


def _make() -> str:
    import vl_convert

    script = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return script.replace("</script", "<\\/script")
