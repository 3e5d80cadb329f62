"""The token cache: what is in it, when it is reused, and that no fault leaves half of one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from lmx.core.errors import DataError, FolderError
from lmx.data import Document, build_cache, byte_tokenizer, packing, train_bpe

DOCUMENTS = [Document("ab", "0", "x"), Document("é<|endoftext|>", "1", "y"), Document("c", "2", "x")]
EOS = 256


def test_the_stream_and_its_documents(tmp_path):
    cache = build_cache(DOCUMENTS, byte_tokenizer(), tmp_path)
    text = list("é<|endoftext|>".encode())
    assert cache.tokens.tolist() == [EOS, 97, 98, EOS, *text, EOS, 99, EOS]
    assert isinstance(cache.tokens, np.memmap) and cache.tokens.dtype == np.uint16
    assert cache.documents.tolist() == [0, 3, 3 + 1 + len(text)]
    assert cache.document_bytes.tolist() == [2, len(text), 1]
    assert cache.domains == ("x", "y") and cache.document_domains.tolist() == [0, 1, 0]
    assert cache.domain_bytes == {"x": 3, "y": len(text)}
    assert cache.num_tokens == len(cache.tokens) and cache.eos_id == EOS and cache.vocab_size == 257


def test_blocks_make_no_difference(tmp_path, monkeypatch):
    documents = [Document("word " * n, str(n), "d") for n in range(1, 60)]
    whole = build_cache(documents, byte_tokenizer(), tmp_path / "whole")
    monkeypatch.setattr(packing, "BLOCK_BYTES", 500)
    seen = []
    blocks = build_cache(
        documents, byte_tokenizer(), tmp_path / "blocks", progress=lambda *done: seen.append(done)
    )
    assert np.array_equal(whole.tokens, blocks.tokens) and np.array_equal(whole.documents, blocks.documents)
    total = sum(document.num_bytes for document in documents)
    assert len(seen) > 5 and seen[-1] == (total, total) and seen == sorted(seen)


def test_large_vocabularies_take_four_bytes(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.backend.add_tokens([f"<{i}>" for i in range(2**16)])
    cache = build_cache(DOCUMENTS, packing.Tokenizer(tokenizer.backend), tmp_path)
    assert cache.tokens.dtype == np.uint32 and cache.vocab_size == 257 + 2**16


def test_reuse_and_what_makes_another(tmp_path, monkeypatch):
    first = build_cache(DOCUMENTS, byte_tokenizer(), tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(packing, "_write", None)  # not called
        assert build_cache(DOCUMENTS, byte_tokenizer(), tmp_path).fingerprint == first.fingerprint
    others = [
        (DOCUMENTS[::-1], byte_tokenizer()),
        ([Document("ab", "0", "z"), *DOCUMENTS[1:]], byte_tokenizer()),
        ([Document("abé", "0", "x"), Document("<|endoftext|>", "1", "y"), DOCUMENTS[2]], byte_tokenizer()),
        (DOCUMENTS, train_bpe(["abc"], 300)),
    ]
    keys = {build_cache(documents, tokenizer, tmp_path).fingerprint for documents, tokenizer in others}
    assert len(keys) == 4 and first.fingerprint not in keys
    renamed = [Document("ab", "elsewhere", "x"), *DOCUMENTS[1:]]
    assert build_cache(renamed, byte_tokenizer(), tmp_path).fingerprint == first.fingerprint


@pytest.mark.parametrize("name", ["tokens.bin", "documents.npy", "meta.json"])
@pytest.mark.parametrize("fault", ["gone", "cut", "empty"])
def test_a_damaged_cache_is_built_anew(tmp_path, name, fault):
    cache = build_cache(DOCUMENTS, byte_tokenizer(), tmp_path)
    expected = cache.tokens.tolist()
    file = cache.folder / name
    content = file.read_bytes()
    del cache
    file.unlink() if fault == "gone" else file.write_bytes(content[:-3] if fault == "cut" else b"")
    again = build_cache(DOCUMENTS, byte_tokenizer(), tmp_path)
    assert again.tokens.tolist() == expected
    assert file.read_bytes() == content


def test_an_interrupted_build_leaves_nothing(tmp_path):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_cache(DOCUMENTS, byte_tokenizer(), tmp_path, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_build_is_cleared_away_by_the_next(tmp_path):
    program = f"""
        import os, signal
        from lmx.data import Document, build_cache, byte_tokenizer
        documents = [Document("ab", "0", "x")]
        kill = lambda *_: os.kill(os.getpid(), {signal.SIGKILL:d})
        build_cache(documents, byte_tokenizer(), {str(tmp_path)!r}, progress=kill)
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], timeout=300)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert ".building-" in left.name
    cache = build_cache([Document("ab", "0", "x")], byte_tokenizer(), tmp_path)
    assert list(tmp_path.iterdir()) == [cache.folder]


def test_a_build_that_runs_elsewhere_is_left_alone(tmp_path):
    home = build_cache(DOCUMENTS, byte_tokenizer(), tmp_path).folder
    os.rename(home, tmp_path / f"{home.name}.building-{packing.socket.gethostname()}-{os.getppid()}")
    build_cache(DOCUMENTS, byte_tokenizer(), tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_faster_process_wins(tmp_path):
    def build_meanwhile(done, total):
        inner = build_cache(DOCUMENTS, byte_tokenizer(), tmp_path / "elsewhere")
        os.rename(inner.folder, tmp_path / "shared" / inner.folder.name)

    cache = build_cache(DOCUMENTS, byte_tokenizer(), tmp_path / "shared", progress=build_meanwhile)
    assert list((tmp_path / "shared").iterdir()) == [cache.folder]


def test_bad_input(tmp_path):
    with pytest.raises(DataError, match="there are no documents to pack"):
        build_cache([], byte_tokenizer(), tmp_path)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        FolderError, match="cannot write the token cache .*file.*a folder that can be written"
    ):
        build_cache(DOCUMENTS, byte_tokenizer(), tmp_path / "file")
