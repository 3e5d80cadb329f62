"""Chat templates run: Jinja2's sandbox with the functions that Hugging Face's templates expect.

They may call raise_exception(message) and strftime_now(format), use `tojson`, break and continue, and mark with
{% generation %} ... {% endgeneration %} what the assistant says.
"""

from __future__ import annotations

import datetime
import functools
import json
import secrets
from typing import Any

from lmx.core.errors import ConfigError, DataError


def render_jinja(source: str, variables: dict[str, Any]) -> tuple[str, list[tuple[int, int]]]:
    """(the text, (begin, end) in characters of each {% generation %} block in it).

    Raises ConfigError where jinja2 is missing or old, DataError for what the template says or does wrong.
    """
    try:
        import jinja2
    except ImportError as error:
        raise ConfigError(
            "chat templates are written in Jinja2, which is not installed: pip install 'lmx[chat]'"
        ) from error
    if tuple(int(part) for part in jinja2.__version__.split(".")[:3] if part.isdigit()) < (3, 1, 6):
        raise ConfigError(
            f"jinja2 {jinja2.__version__} lets a template leave its sandbox: pip install 'jinja2>=3.1.6'"
        )
    open_mark, close_mark = (f"\ue000{secrets.token_hex(16)}{kind}\ue001" for kind in "<>")
    try:
        text = _compiled(source).render({**variables, "_generation_marks": (open_mark, close_mark)})
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"the chat template has an error in line {error.lineno}: {error.message}") from error
    except jinja2.TemplateError as error:
        raise DataError(f"the chat template refuses this chat: {error.message or type(error).__name__}") from error
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError) as error:
        raise DataError(f"the chat template fails on this chat: {type(error).__name__}: {error}") from error
    return _spans(text, open_mark, close_mark)


def _spans(text: str, open_mark: str, close_mark: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without the marks, and where they stood."""
    first, *pieces = text.split(open_mark)
    spans, clean = [], first
    for piece in pieces:
        inside, _, after = piece.partition(close_mark)
        spans.append((len(clean), len(clean) + len(inside)))
        clean += inside + after
    return clean, spans


@functools.cache
def _environment() -> Any:
    import jinja2
    from jinja2 import ext, nodes, sandbox, utils

    class Generation(ext.Extension):
        """The block {% generation %}: its text between the two marks of the call."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            marks = nodes.Name("_generation_marks", "load")
            return nodes.CallBlock(self.call_method("_mark", [marks]), [], [], body).set_lineno(line)

        def _mark(self, marks: tuple[str, str], caller: Any) -> str:
            return f"{marks[0]}{caller()}{marks[1]}"

    class Namespace(utils.Namespace):
        """Jinja's, without names that begin with an underscore: they reach into the interpreter."""

        def __setitem__(self, name: Any, value: Any) -> None:
            if str(name).startswith("_"):
                raise sandbox.SecurityError(f"a namespace cannot hold {name!r}: it begins with an underscore")
            super().__setitem__(name, value)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.datetime.now().strftime(form)

    def tojson(x: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        # Jinja's own escapes <, > and &, for web pages.
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    made.filters["tojson"] = tojson
    made.globals |= dict(raise_exception=raise_exception, strftime_now=strftime_now, namespace=Namespace)
    made.globals["dict"] = lambda *pairs, **values: dict(*pairs, **values)  # and not the class with its attributes
    return made


@functools.lru_cache(maxsize=32)
def _compiled(source: str) -> Any:
    return _environment().from_string(source)
