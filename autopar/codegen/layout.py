"""layout: statements with their scopes, sections and source lines, printed as the body of a function.
Must not know what the statements mean.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from textwrap import wrap

from autopar.ir.graph import Source

WIDTH = 140


@dataclass(frozen=True)
class Stmt:
    """One logical line. `section` is None where it belongs to whatever section it stands in."""

    text: str
    note: str = ""  # trailing comment
    src: Source | None = None
    section: str | None = None
    scopes: tuple[str, ...] = ()  # 'with ...' and 'if ...' around it, outermost first
    body: tuple[str, ...] = ()  # further lines of a compound statement, indented


def where(src: Source) -> str:
    """A short 'file.py:12' for a comment."""
    return f"{src.file.replace(chr(92), '/').rpartition('/')[2]}:{src.line}"


def long_where(src: Source) -> str:
    """'package/file.py:12': the part of the path that is the same on any machine, where there is one."""
    file = src.file.replace("\\", "/")
    for root in ("/site-packages/", "/dist-packages/"):
        file = file.rpartition(root)[2]
    return f"{file}:{src.line}"


def print_body(stmts: Iterable[Stmt], indent: int) -> list[str]:
    """The lines of a function body."""
    lines: list[str] = []
    open_scopes: tuple[str, ...] = ()
    section: str | None = None
    line: tuple[str, int] | None = None
    for s in stmts:
        common = 0
        while common < min(len(open_scopes), len(s.scopes)) and open_scopes[common] == s.scopes[common]:
            common += 1
        pad = " " * (indent + 4 * common)
        if s.section is not None and s.section != section:
            if lines:
                lines.append("")
            if section is not None or s.section:
                lines.append(f"{pad}# --- {s.section or 'self'}")
            section, line = s.section, None
        if s.src is not None and s.src.line and (s.src.file, s.src.line) != line:
            line = (s.src.file, s.src.line)
            lines.append(_clip(f"{pad}# {where(s.src)}  {' '.join(s.src.text.split())}"))
        for scope in s.scopes[common:]:
            lines.append(f"{pad}{scope}")
            pad += "    "
        open_scopes = s.scopes
        lines += _fit(pad, s.text, s.note)
        lines += [f"{pad}    {inner}" for inner in s.body]
    return lines


def _clip(comment: str) -> str:
    comment = comment.rstrip()
    return comment if len(comment) <= WIDTH else comment[: WIDTH - 4].rstrip() + " ..."


def _fit(pad: str, text: str, note: str) -> list[str]:
    """The statement with its comment, broken inside its last brackets where it is too wide; a comment is broken between words."""
    if text.startswith("#"):
        return wrap(text, WIDTH, initial_indent=pad, subsequent_indent=f"{pad}#   ", break_long_words=False, break_on_hyphens=False)
    whole = f"{pad}{text}  # {note}" if note else pad + text
    if len(whole) <= WIDTH:
        return [whole]
    lines = [pad + text] if len(pad + text) <= WIDTH else _break(pad, text)
    if note and len(lines) > 1 and len(f"{lines[-1]}  # {note}") <= WIDTH:
        return [*lines[:-1], f"{lines[-1]}  # {note}"]
    return [_clip(f"{pad}# {note}"), *lines] if note else lines


def _break(pad: str, text: str) -> list[str]:
    """`head(a, b, c)tail` with what is between its widest brackets packed on lines of their own."""
    opened, pieces, closed, comma = _outer(text)
    if not pieces:
        return [pad + text]
    inner, lines, row = pad + "    ", [pad + text[: opened + 1]], ""
    for i, piece in enumerate(pieces):
        piece += "," if comma or i < len(pieces) - 1 else ""
        if row and len(f"{inner}{row} {piece}") <= WIDTH:
            row = f"{row} {piece}"
            continue
        lines += [inner + row] if row else []
        row = piece
        if len(inner + row) > WIDTH:
            lines += _break(inner, row)
            row = ""
    return [*lines, *([inner + row] if row else []), pad + text[closed:]]


def _outer(text: str) -> tuple[int, list[str], int, bool]:
    """The widest brackets that may be broken: where they open, the pieces between commas, where they close, and whether a comma
    may follow the last piece. (-1, [], -1, False) if there are none.
    """
    best: tuple[int, list[str], int, bool] = (-1, [], -1, False)
    stack: list[tuple[int, list[int]]] = []
    quote, i = "", 0
    while i < len(text):
        ch = text[i]
        if quote:
            if ch == "\\":
                i += 1
            elif ch == quote:
                quote = ""
        elif ch in "\"'":
            quote = ch
        elif ch in "([{":
            stack.append((i, []))
        elif ch == "," and stack:
            stack[-1][1].append(i)
        elif ch in ")]}" and stack:
            start, commas = stack.pop()
            if i - start > best[2] - best[0] and text[start + 1 : i].strip():
                pieces = [text[a + 1 : b].strip() for a, b in zip([start, *commas], [*commas, i], strict=True)]
                called = start > 0 and (text[start - 1].isalnum() or text[start - 1] in "_])")
                # NB: a comma after the only piece would make a tuple of a subscript or of a group in parentheses.
                comma = bool(commas) or ch == "}" or (called if ch == ")" else not called)
                best = (start, [p for p in pieces if p], i, comma)
        i += 1
    return best
