"""Reads Markdown pages: their text, code, commands, links and anchors."""

import dataclasses
import functools
import re
import shlex
from collections.abc import Iterator

from tests import command

ROOT = command.ROOT
FENCE = re.compile(r"^(\s*)(```+|~~~+)\s*(\{?[\w-]*\}?)(.*)$")
LINK = re.compile(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)|<img[^>]*\ssrc=\"([^\"]+)\"")
INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=.*", re.DOTALL)
SHELL_WORDS = {"for", "do", "done", "wait", "then", "fi", "if", "[", "cd", "export", "exit", "echo"}
PROGRAMS = re.compile(r"(\.venv/bin/)?(python|make|pip|tensorboard|curl|git|\.) ")


@functools.cache
def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class Block:
    """Lines of code, in the language that its fence names; '' for an indented one."""

    language: str
    lines: tuple[str, ...]


@functools.cache
def split(page: str) -> tuple[tuple[Block, ...], tuple[str, ...]]:
    """Returns a page's blocks of code, and its lines outside of them, each with an empty one."""
    blocks: list[Block] = []
    prose: list[str] = []
    fence, language, code = "", "", list[str]()
    in_list = False
    for line in [*text_of(page).splitlines(), ""]:
        match = FENCE.match(line)
        if fence:
            if match and match[2].startswith(fence) and not match[3]:
                blocks.append(Block(language, tuple(code)))
                fence = ""
            else:
                code.append(line)
            prose.append("")
        elif match:
            fence, language, code = match[2], match[3], []
            prose.append("")
        elif line.startswith("    ") and not in_list and (code or not prose or not prose[-1]):
            if not code:
                language = ""
            code.append(line[4:])
            prose.append("")
            continue
        else:
            if code and not language and line.strip():
                blocks.append(Block("", tuple(code)))
            if line.strip():
                in_list = bool(re.match(r"\s*([-*+]|\d+\.) ", line)) or (in_list and line[0] == " ")
            prose.append(line)
        if not fence and line.strip():
            code = []
    if code and not language and not fence:
        blocks.append(Block("", tuple(code)))
    return tuple(blocks), tuple(prose)


def names_in(page: str) -> Iterator[str]:
    """Yields the inline code of a page's text."""
    yield from INLINE.findall("\n".join(split(page)[1]))


def shell_lines(block: Block) -> Iterator[str]:
    """Yields the lines that a block has a user type, continuation lines joined."""
    is_console = block.language == "console"
    if not is_console and block.language not in ("", "bash", "sh", "shell"):
        return
    lines = iter(block.lines)
    for line in lines:
        if is_console and not line.startswith("$ "):
            continue
        line = line.removeprefix("$ ").strip()
        while line.endswith("\\") or line.count('"') % 2 or line.count("'") % 2:
            if (more := next(lines, None)) is None:
                break
            line = " ".join([line.removesuffix("\\"), more.strip()])
        if re.match(r"\w+=\(", line) or (not block.language and not PROGRAMS.match(line)):
            continue
        yield line


def commands_in(line: str) -> Iterator[tuple[str, ...]]:
    """Yields the simple commands of a line, as words, without variables and redirections."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split, lexer.commenters = True, "#"
    words: list[str] = []
    for word in [*lexer, ";"]:
        if set(word) <= set("|&;<>"):
            if words and words[-1] == "2" and word.startswith(">"):
                words.pop()
            while words and (words[0] in ("do", "then") or ASSIGNMENT.fullmatch(words[0])):
                _, is_substitution, program = words.pop(0).partition("=$(")
                if is_substitution:
                    words.insert(0, program)
            if words and words[0] not in SHELL_WORDS and words[0] not in ("tee", "1"):
                words[0] = re.sub(r"^\.venv/bin/(?=\w)", "", words[0])
                yield tuple(words)
            words = []
        else:
            words.append(word)


def python_blocks(page: str) -> list[str]:
    return ["\n".join(block.lines) for block in split(page)[0] if block.language == "python"]


def links_in(page: str) -> Iterator[str]:
    """Yields the target of each link and image in a page's text."""
    prose = INLINE.sub("", "\n".join(split(page)[1]))
    yield from (first or second for first, second in LINK.findall(prose))


def slug(heading: str) -> str:
    """Returns the anchor that GitHub gives a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
    return re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")


@functools.cache
def anchors(page: str) -> frozenset[str]:
    if page.endswith(".ipynb"):
        return frozenset()
    counts: dict[str, int] = {}
    names = set(re.findall(r"(?:id|name)=\"([^\"]+)\"", text_of(page)))
    for line in split(page)[1]:
        if heading := re.match(r"#+ (.*)", line):
            name = slug(heading[1])
            number = counts.get(name, 0)
            counts[name] = number + 1
            names.add(f"{name}-{number}" if number else name)
    return frozenset(names)
