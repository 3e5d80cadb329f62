"""What the data tests share: small documents and caches, and the folder of real text."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lmx.data import Document, build_cache, byte_tokenizer


@pytest.fixture
def make_cache(tmp_path):
    """A cache of the given texts, a byte a token; domains "even" and "odd" in turn."""

    def make(*texts, domains=("even", "odd")):
        documents = [Document(text, str(i), domains[i % len(domains)]) for i, text in enumerate(texts)]
        return build_cache(documents, byte_tokenizer(), tmp_path / "cache")

    return make


@pytest.fixture
def real_data() -> Path:
    folder = os.environ.get("LMX_TEST_DATA")
    if not folder:
        pytest.skip("needs real text: set LMX_TEST_DATA to a folder with domain-*/train.jsonl.gz")
    return Path(folder)
