"""The built-in corpus: three domains, the same each time, without what must stay out."""

from __future__ import annotations

import pytest

from lmx.core.errors import DataError
from lmx.data import local


def test_bounded_corpus_has_three_domains_and_repeats(monkeypatch):
    monkeypatch.setattr(local, "CODE_BYTES", 200_000)
    monkeypatch.setattr(local, "DOCS_BYTES", 100_000)
    corpus = local.collect()
    assert corpus == local.collect()
    sizes = {name: sum(d.num_bytes for d in corpus.documents if d.domain == name) for name in local.DOMAINS}
    assert sizes["reference"] > 100_000
    assert 0 < sizes["code"] <= 200_000 and 0 < sizes["docs"] <= 100_000
    code = [document.origin for document in corpus.documents if document.domain == "code"]
    assert not any("pydoc_data" in origin or "test/" in origin or "tests/" in origin for origin in code)


def test_docs_are_docstrings_under_their_qualified_names(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "pack"
    (package / "tests").mkdir(parents=True)
    (package / "__init__.py").write_text('"""The pack."""\nx = "not a docstring"\n')
    (package / "part.py").write_text(
        'class A:\n    """An A."""\n'
        '    def f(self):\n        """Do f.\n\n        Twice.\n        """\n        raise 1\n'
    )
    (package / "broken.py").write_text('"""unparsable"""\nprint "2"\n')
    (package / "latin.py").write_bytes(b'"""\xe9"""\n')
    (package / "surrogate.py").write_text('"""\\ud800"""\n')
    (package / "tests" / "a.py").write_text('"""a test"""\n')
    monkeypatch.setattr(local, "_package_folders", lambda: [tmp_path / "site-packages"])
    corpus = local.collect()
    docs = {document.origin: document.text for document in corpus.documents if document.domain == "docs"}
    assert docs == {
        "pack/__init__.py": "pack\n\nThe pack.",
        "pack/part.py": "pack.part.A\n\nAn A.\n\npack.part.A.f\n\nDo f.\n\nTwice.",
    }
    assert corpus.skipped["docs"] == 3


@pytest.mark.parametrize("domain", ["docs", "reference"])
def test_an_empty_domain_is_named(domain, monkeypatch):
    monkeypatch.setattr(local, "CODE_BYTES", 100_000)
    monkeypatch.setattr(local, "DOCS_BYTES", 100_000)
    if domain == "docs":
        monkeypatch.setattr(local, "_package_folders", list)
    else:
        monkeypatch.setitem(__import__("sys").modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match=rf"no text for its domain '{domain}'.*text of your own"):
        local.collect()
