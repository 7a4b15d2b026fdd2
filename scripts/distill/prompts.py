"""Training prompts of four kinds: word problems, code, multiple choice, chat and open text.

Everything is a pure function of (seed, index). Word problems come from a file of training questions
(GSM8K's training split), code from this project's templates and the documented functions of
Python's standard library, the rest from the word lists in `topics.py`.
"""

from __future__ import annotations

import ast
import json
import random
import re
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.distill import topics

STEPS = "Let's think step by step."
CODE_MODULES = (
    "statistics", "textwrap", "string", "random", "fractions", "heapq", "bisect", "shutil",
    "calendar", "datetime", "functools", "difflib", "fnmatch", "glob", "os", "posixpath",
    "copy", "csv", "colorsys", "dataclasses", "inspect", "tempfile", "tokenize", "urllib/parse",
    "collections/__init__", "json/decoder", "json/encoder", "email/utils", "html/__init__",
    "ipaddress", "numbers",
)  # fmt: skip

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "config"}


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt; `chat` ones go through the chat template, `kind` names where they come from.

    `drawn` ones leave nearly all to the expert: greedy text would repeat itself.
    """

    kind: str
    text: str
    chat: bool = False
    drawn: bool = False


@dataclass(frozen=True, slots=True)
class Problem:
    """A word problem with its written-out solution."""

    question: str
    answer: str


def load_problems(path: Path, exclude: Sequence[Path] = ()) -> list[Problem]:
    """Training questions, less those whose text occurs in a prompt of an `exclude` file."""
    forbidden = "\n".join(
        json.loads(line)["prompt"]
        for file in exclude
        for line in file.read_text().split("\n")
        if line
    )
    rows = [json.loads(line) for line in path.read_text().split("\n") if line]
    return [
        Problem(row["question"], re.sub(r"<<[^>]*>>", "", row["answer"]))
        for row in rows
        if row["question"] not in forbidden
    ]


def load_functions() -> list[str]:
    """Signature and docstring of documented functions of the standard library."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    found: list[str] = []
    for module in dict.fromkeys(CODE_MODULES):
        source = (folder / f"{module}.py").read_text()
        for node in ast.walk(ast.parse(source)):
            if (
                isinstance(node, ast.FunctionDef)
                and ast.get_docstring(node)
                and not node.decorator_list
            ):
                found.append(_head(source, node))
    return sorted({text for text in found if len(text) < 900})


def load_library() -> list[str]:
    """Whole documented functions and methods of the standard library, docstrings and bodies."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    found: set[str] = set()
    for path in sorted(folder.rglob("*.py")):
        if LEFT_OUT & set(path.relative_to(folder).parts):
            continue
        source = path.read_text(errors="replace")
        lines = source.splitlines()
        found.update(
            "\n".join(line[node.col_offset :] for line in lines[node.lineno - 1 : node.end_lineno])
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node)
        )
    return sorted(text for text in found if len(text) < 2000)


def _head(source: str, node: ast.FunctionDef) -> str:
    lines = source.splitlines()[node.lineno - 1 : node.body[0].end_lineno]
    return "\n".join(line[node.col_offset :] for line in lines) + "\n"


class PromptSource:
    """Draws prompt number i, the same one each time: the first mix of kinds."""

    def __init__(self, problems: Sequence[Problem], functions: Sequence[str], seed: int) -> None:
        self._problems = problems
        self._functions = functions
        self._seed = seed
        self._kinds: tuple[tuple[float, Callable[[random.Random], Prompt]], ...] = (
            (0.33, self._word_problem),
            (0.27, self._code),
            (0.25, self._multiple_choice),
            (0.10, self._chat),
            (0.05, self._open_text),
        )

    def __getitem__(self, index: int) -> Prompt:
        rng = random.Random(f"{self._seed}/{index}")
        weights = [weight for weight, _ in self._kinds]
        (draw,) = rng.choices([draw for _, draw in self._kinds], weights)
        return draw(rng)

    def _word_problem(self, rng: random.Random) -> Prompt:
        *shots, last = rng.sample(self._problems, 1 + rng.choice((0, 0, 0, 1, 1, 1, 2, 4)))
        if rng.random() < 0.2:
            return Prompt("math", last.question, chat=True)
        solved = (f"Question: {p.question}\nAnswer: {STEPS}\n{p.answer}\n\n" for p in shots)
        return Prompt("math", "".join(solved) + f"Question: {last.question}\nAnswer: {STEPS}\n")

    def _code(self, rng: random.Random) -> Prompt:
        if rng.random() < 0.5:
            signature, task = rng.choice(topics.FUNCTION_TASKS)
            text = f'def {signature}:\n    """ {task}\n    """\n'
        else:
            text = rng.choice(self._functions)
        style = rng.random()
        if style < 0.15:
            return Prompt("code", f"Write a Python function.\n\n{text}", chat=True)
        head = "from typing import List\n\n\n" if style < 0.5 else rng.choice(("", "\n\n"))
        return Prompt("code", head + text)

    def _multiple_choice(self, rng: random.Random) -> Prompt:
        kind = rng.choice(list(topics.CATEGORIES))
        others = [i for k, items in topics.CATEGORIES.items() if k != kind for i in items]
        item, other = rng.choice(topics.CATEGORIES[kind]), rng.choice(others)
        stem = rng.choice(topics.QUESTION_STEMS)
        if "{item}" in stem:
            options = rng.sample(topics.STATEMENTS, 4)
        else:
            options = [item, *rng.sample(others, 3)]
            rng.shuffle(options)
        words = {"kind": kind, "item": item, "other": other}
        listed = (f"({c}) {o.format(**words)}" for c, o in zip("ABCD", options, strict=True))
        text = "\n".join((f"Q: {stem.format(**words)}", *listed, f"A: {STEPS}"))
        return Prompt("choice", text, chat=rng.random() < 0.1)

    def _chat(self, rng: random.Random) -> Prompt:
        topic, other = rng.sample(topics.CHAT_TOPICS, 2)
        return Prompt(
            "chat", rng.choice(topics.CHAT_REQUESTS).format(topic=topic, other=other), chat=True
        )

    def _open_text(self, rng: random.Random) -> Prompt:
        opening = rng.choice(topics.RAW_OPENINGS).format(topic=rng.choice(topics.CHAT_TOPICS))
        return Prompt("text", opening[0].upper() + opening[1:])


class WidePromptSource(PromptSource):
    """A second mix, in which the expert writes most prompts too.

    It is given the start of a function's name, of an examination or of an article, and what it
    makes of that is as varied as its own text is. Code comes with its body up to some line.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        functions: Sequence[str],
        library: Sequence[str],
        seed: int,
    ) -> None:
        super().__init__(problems, functions, seed)
        self._library = library
        self._kinds = (
            (0.22, self._word_problem),
            (0.17, self._library_code),
            (0.17, self._invented_code),
            (0.04, self._code),
            (0.20, self._invented_question),
            (0.05, self._multiple_choice),
            (0.08, self._field_chat),
            (0.02, self._chat),
            (0.05, self._article),
        )

    def _library_code(self, rng: random.Random) -> Prompt:
        lines = rng.choice(self._library).split("\n")
        shown = rng.randint(min(len(lines), 4), len(lines))
        return Prompt("code", "\n".join(lines[:shown]) + "\n")

    def _invented_code(self, rng: random.Random) -> Prompt:
        head = "from typing import List\n\n\n" if rng.random() < 0.4 else rng.choice(("", "\n\n"))
        name = rng.choice(topics.FUNCTION_VERBS)
        return Prompt("code", f"{head}def {name}" + rng.choice(("_", "_", "(")), drawn=True)

    def _invented_question(self, rng: random.Random) -> Prompt:
        text = rng.choice(topics.INVENTED_QUESTIONS).format(field=rng.choice(topics.FIELDS))
        return Prompt("choice", text, drawn=True)

    def _field_chat(self, rng: random.Random) -> Prompt:
        field, other = rng.sample(topics.FIELDS, 2)
        return Prompt(
            "chat", rng.choice(topics.CHAT_REQUESTS).format(topic=field, other=other), chat=True
        )

    def _article(self, rng: random.Random) -> Prompt:
        text = rng.choice(topics.ARTICLES).format(field=rng.choice(topics.FIELDS))
        return Prompt("text", text[0].upper() + text[1:], drawn=True)
