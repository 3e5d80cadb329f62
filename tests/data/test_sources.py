"""Every way to name text, and every complaint about it."""

from __future__ import annotations

import gzip
import json
import re

import pytest

from lmx.core.errors import DataError, FolderError
from lmx.data import SOURCES, Document, read


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def lines(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def test_a_txt_file_is_one_document_and_a_jsonl_line_is_one(here):
    write(here / "book.txt", "one\n\ntwo\n")
    write(here / "news.jsonl.gz", lines("a\u2028b", "c\nd") + "\n" + lines("  "))
    assert read("book.txt") == [Document("one\n\ntwo\n", "book.txt", "book")]
    assert read("news.jsonl.gz") == [
        Document("a\u2028b", "news.jsonl.gz:1", "news"),
        Document("c\nd", "news.jsonl.gz:2", "news"),
    ]


def test_lines_end_at_newlines_only(here):
    write(here / "x.jsonl", '{"text": "a\u2028b\x85c"}\r\n{"text": "d"}')
    assert [document.text for document in read("x.jsonl")] == ["a\u2028b\x85c", "d"]


def test_a_byte_order_mark_is_not_text(here):
    write(here / "x.txt", "\ufeffhello")
    assert read("x.txt")[0].text == "hello"


def test_domains_of_folders_and_globs(here):
    for name in (
        "data/top.txt",
        "data/law/a.jsonl",
        "data/law/deep/b.jsonl",
        "data/med/c.txt.gz",
        "data/.git/d.txt",
    ):
        write(here / name, lines("text") if "jsonl" in name else "text")
    write(here / "data/readme.md", "not read")
    domains = [(document.origin.split(":")[0], document.domain) for document in read("data")]
    assert domains == [
        ("data/top.txt", "data"),
        ("data/law/a.jsonl", "law"),
        ("data/law/deep/b.jsonl", "law"),
        ("data/med/c.txt.gz", "med"),
    ]
    assert sorted(domains) == sorted(
        (d.origin.split(":")[0], d.domain) for d in read("data/**") if ".git" not in d.origin
    )
    assert {document.domain for document in read("data/*/*")} == {"law", "med"}
    assert [document.domain for document in read("data/**/deep")] == ["law"]
    assert {document.domain for document in read("data/*.txt")} == {"data"}


def test_commas_and_named_domains(here):
    write(here / "a.txt", "a")
    write(here / "b.txt", "b")
    write(here / "c,d=e.txt", "c")
    assert [(d.text, d.domain) for d in read("news=[a]*.txt, b.txt")] == [("a", "news"), ("b", "b")]
    assert [(d.text, d.domain) for d in read("c,d=e.txt")] == [("c", "c,d=e")]


def test_a_source_is_one_function_and_a_line(here, monkeypatch):
    monkeypatch.setitem(SOURCES, "shout", lambda argument: [Document(argument.upper(), argument, "shouts")])
    assert read("shout:hey") == [Document("HEY", "hey", "shouts")]
    assert read("loud=shout:hey")[0].domain == "loud"


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("dat/x.txt", FolderError, r"there is no file or folder 'dat/x.txt'; did you mean 'data'"),
        (
            "data/nwes.txt",
            FolderError,
            r"there is no file or folder 'data/nwes.txt'; did you mean 'news.txt'",
        ),
        ("locl", FolderError, r"there is no file or folder 'locl'; did you mean .*'local'"),
        ("data/qqqq", FolderError, r"'data' has nothing of a similar name"),
        (
            "empty",
            FolderError,
            r"the folder 'empty' gives no text files.*\.txt or \.jsonl or \.txt\.gz or \.jsonl\.gz",
        ),
        ("data/*.csv", FolderError, r"the pattern 'data/\*\.csv' gives no text files"),
        ("data/image.png", DataError, r"cannot tell what is in 'data/image.png'"),
        ("data/blank.txt", DataError, r"no text in 'data/blank.txt': 1 file\(s\) with nothing but blanks"),
        ("data/binary.txt", DataError, r"'data/binary.txt' is a binary file, not text: byte 3 is zero"),
        ("data/latin.txt", DataError, r"'data/latin.txt' is not UTF-8: byte 5 is 0xe9"),
        (
            "data/latin.txt.gz",
            DataError,
            r"'data/latin.txt.gz' is not UTF-8: byte 5 of the unpacked text is 0xe9",
        ),
        ("data/torn.txt.gz", DataError, r"'data/torn.txt.gz' is not a whole gzip file"),
        ("data/broken.jsonl", DataError, r"data/broken.jsonl, line 3: not valid JSON"),
        (
            "data/other.jsonl",
            DataError,
            r"data/other.jsonl, line 1: there is no key 'text' \(keys found: 'body', 'id'\)",
        ),
        ("data/list.jsonl", DataError, r"data/list.jsonl, line 1: expected a JSON object .* found list"),
        ("data/number.jsonl", DataError, r"line 1: the value of 'text' must be a string, found int"),
        ("data/surrogate.jsonl", DataError, r"line 1: half of a surrogate pair at character 1"),
        ("loca:x", DataError, r"unknown source 'loca:' in 'loca:x'; did you mean 'local'"),
        ("local:x", DataError, r"the source 'local' takes no argument"),
        ("https://x", DataError, r"unknown source .https:. in .https://x.*Known sources: hf, local, tfds, and paths"),
        (" , ", DataError, r"the source ' , ' holds no text"),
    ],
)
def test_bad_input(here, source, error, message):
    (here / "empty").mkdir()
    write(here / "empty/readme.md", "no text")
    write(here / "data/news.txt", "fine")
    write(here / "data/image.png", b"\x89PNG")
    write(here / "data/blank.txt", " \n")
    write(here / "data/binary.txt", b"abc\0def")
    write(here / "data/latin.txt", "na\u00efv\xe9".encode()[:4] + "v\xe9".encode("latin-1"))
    write(here / "data/latin.txt.gz", "na\u00efv\xe9".encode()[:4] + "v\xe9".encode("latin-1"))
    (here / "data/torn.txt.gz").write_bytes(gzip.compress(b"text" * 100)[:-12])
    write(here / "data/broken.jsonl", lines("a") + "\n" + '{"text": "b"')
    write(here / "data/other.jsonl", '{"body": "a", "id": 1}')
    write(here / "data/list.jsonl", '["text"]')
    write(here / "data/number.jsonl", '{"text": 1}')
    write(here / "data/surrogate.jsonl", r'{"text": "a\ud800"}')
    with pytest.raises(error) as caught:
        read(source)
    assert re.search(message, str(caught.value)), str(caught.value)


def test_real_text(real_data):
    documents = read(f"{real_data}/domain-news/*.jsonl.gz,plays={real_data}/tinyshakespeare/input.txt.gz")
    assert {document.domain for document in documents} == {"domain-news", "plays"}
    assert sum(document.domain == "domain-news" for document in documents) == 5937 + 322 + 341


def test_real_text_with_a_byte_that_is_not_utf8(real_data):
    with pytest.raises(DataError, match=r"train\.txt\.gz' is not UTF-8: byte \d+ of the unpacked text is 0x"):
        read(f"{real_data}/trec/train.txt.gz")
