"""`python -m lmx.data.prepare_tfds NAME [FOLDER]`: download a dataset of tfds and write it as array_record.

A program of its own, so that TensorFlow, which some builders import, stays out of the caller's process. A failure is
one JSON object on stdout: its kind ("network", "package" or "other") and a message.
"""

from __future__ import annotations

import json
import sys
from typing import Any

SECONDS = 10  # for a server to answer, and between two pieces of its answer
RETRIES = 2  # tfds would try ten times, for minutes


def main(name: str, folder: str | None = None) -> int:
    """Prepare a dataset; 0 if it is there now."""
    try:
        import requests
        import tensorflow_datasets as tfds

        _bound(requests)
        tfds.builder(name, data_dir=folder, file_format="array_record").download_and_prepare()
    except Exception as error:
        print(json.dumps({"kind": _kind(error), "message": _said(error)}))
        return 1
    return 0


def _bound(requests: Any) -> None:
    """Let no download wait for ever: neither tfds nor requests sets a limit of its own."""
    from tensorflow_datasets.core.download import downloader

    downloader.MAX_RETRIES = RETRIES
    send = requests.adapters.HTTPAdapter.send

    def bounded(self: Any, request: Any, stream: bool = False, timeout: Any = None, **more: Any) -> Any:
        return send(self, request, stream=stream, timeout=timeout or SECONDS, **more)

    requests.adapters.HTTPAdapter.send = bounded


def _kind(error: BaseException | None) -> str:
    while error is not None:
        if isinstance(error, ImportError):
            return "package"
        if isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.startswith(
            ("requests.", "urllib3.", "urllib.")
        ):
            return "network"
        error = error.__cause__ or error.__context__
    return "other"


def _said(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
