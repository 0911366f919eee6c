"""The demo model's text: this interpreter's standard library, as files, as snippets and as conversations.

Sources, docstrings and the language reference's topics are under the PSF licence, which lets them be
redistributed. Nothing is downloaded. Files whose path hashes to 0 modulo 20 are held out of all three forms.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import random
import sysconfig
import textwrap
from dataclasses import dataclass
from pathlib import Path

# Tests are not what a completion should look like; code pages and entity tables are numbers, not text.
EXCLUDED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "__pycache__", "pydoc_data"}
)
EXCLUDED_FILES = ("_sysconfigdata", "html/entities.py", "msilib/schema.py")
ANSWER_CHARS = 1600
SYSTEM_PROMPT = "You are a helpful assistant."

ABOUT = (
    ("Hello", "Hello! I am a small Mixture-of-Experts model that read the Python standard library. Ask me about it."),
    ("Hi there!", "Hi! Ask me to write or to explain a function of the Python standard library."),
    ("Who are you?", "I am the ExpertMesh demo model: a tiny DeepSeek-V3-shaped language model with 16 routed experts "
     "in every layer but the first, trained on the Python standard library."),
    ("What can you do?", "I can complete Python code and write docstrings that look like those of the standard "
     "library. I am very small, so do not trust what I say."),
    ("What is a Mixture of Experts?", "A Mixture of Experts is a model whose feed-forward layers are split into many "
     "experts. A gate scores them and sends every token to the few that suit it best."),
    ("Thank you!", "You are welcome."),
    ("What is Python?", "Python is an interpreted, object-oriented, high-level programming language with dynamic "
     "semantics. Its standard library is the text that I learned from."),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """`documents` are plain texts; a conversation is a list of chat-template messages."""

    documents: list[str]
    conversations: list[list[dict[str, str]]]
    held_out: list[str]


def is_held_out(relative_path: str) -> bool:
    """A fixed twentieth of the files, the same on every machine whatever else lies there."""
    return int.from_bytes(hashlib.sha256(relative_path.encode()).digest()[:8], "big") % 20 == 0


def read_sources() -> dict[str, str]:
    """Relative path -> source of the standard library's modules, sorted by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    sources: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if EXCLUDED_FOLDERS & set(relative.parts) or relative.as_posix().startswith(EXCLUDED_FILES):
            continue
        try:
            sources[relative.as_posix()] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
    return sources


def language_topics() -> dict[str, str]:
    """The language reference as `help()` shows it; empty where a distribution leaves pydoc_data out."""
    try:
        from pydoc_data.topics import topics  # optional: slim distributions strip it
    except ImportError:
        return {}
    return dict(topics)


def build_corpus(seed: int, *, max_bytes: int | None = None) -> Corpus:
    """All text, or only that of the first modules that reach `max_bytes` characters."""
    rng = random.Random(seed)
    sources = read_sources()
    documents: list[str] = []
    conversations: list[list[dict[str, str]]] = []
    held_out: list[str] = []
    for path, source in sources.items():
        if max_bytes is not None and documents and held_out and sum(map(len, documents)) > max_bytes:
            break
        if is_held_out(path):
            held_out.append(source)
            continue
        documents.append(source)
        module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        snippets, turns = _extract(module, source, rng)
        documents += snippets
        conversations += [_conversation(question, answer, rng) for question, answer in turns]
    for name, text in language_topics().items() if max_bytes is None else ():
        documents.append(text)
        conversations.append(_conversation(f"Explain {name!r} in Python.", _shorten(text), rng))
    conversations += [_conversation(question, answer, rng) for question, answer in ABOUT * 20]
    return Corpus(documents=documents, conversations=conversations, held_out=held_out)


def _extract(module: str, source: str, rng: random.Random) -> tuple[list[str], list[tuple[str, str]]]:
    """Stand-alone definitions and (question, answer) pairs of one module."""
    try:
        tree = ast.parse(source)
    except SyntaxError:  # lib2to3 keeps Python 2 text
        return [], []
    snippets: list[str] = []
    turns: list[tuple[str, str]] = []
    if summary := ast.get_docstring(tree):
        turns.append((f"What is the module `{module}` for?", _shorten(summary)))
    for node, owner in _definitions(tree):
        segment = ast.get_source_segment(source, node, padded=True)
        if segment is None:
            continue
        code = textwrap.dedent(segment)
        name = f"{owner}.{node.name}" if owner else node.name
        if not 80 <= len(code) <= ANSWER_CHARS:
            continue
        fenced = f"```python\n{code.rstrip()}\n```"
        docstring = ast.get_docstring(node)
        if rng.random() < 0.2:
            snippets.append(code)
        if docstring is None:
            if rng.random() < 0.25:
                turns.append((f"Write the Python function `{name}` of `{module}`.", fenced))
            continue
        kind = rng.randrange(3)
        if kind == 0:
            turns.append((f"What does `{module}.{name}` do?", _shorten(docstring)))
        elif kind == 1:
            first = inspect.cleandoc(docstring).split("\n\n")[0].replace("\n", " ")
            turns.append((f"Write a Python function `{node.name}`: {first}", fenced))
        else:
            signature = code.split('"""')[0].rstrip()
            turns.append((f"Write a docstring for this:\n```python\n{signature}\n```", _shorten(docstring)))
    return snippets, turns


def _definitions(tree: ast.Module) -> list[tuple[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, str]]:
    """Top-level functions and classes, and the methods of those classes with the class's name."""
    found: list[tuple[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, str]] = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.append((node, ""))
        elif isinstance(node, ast.ClassDef):
            found.append((node, ""))
            found += [(method, node.name) for method in node.body if isinstance(method, ast.FunctionDef)]
    return found


def _conversation(question: str, answer: str, rng: random.Random) -> list[dict[str, str]]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if rng.random() < 0.15:
        messages.insert(0, {"role": "system", "content": SYSTEM_PROMPT})
    return messages


def _shorten(text: str) -> str:
    """The leading paragraphs of `text` that fit an answer, at least one of them."""
    paragraphs = inspect.cleandoc(text).split("\n\n")
    kept = [paragraphs[0][:ANSWER_CHARS]]
    for paragraph in paragraphs[1:]:
        if sum(map(len, kept)) + len(paragraph) > ANSWER_CHARS:
            break
        kept.append(paragraph)
    return "\n\n".join(kept)
