"""Two tasks made by rule: text-to-SQL, and orders in plain English to JSON.

Both have one right answer per question, so that a fine-tune can be scored by exact match.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Example:
    """One question and its one right answer."""

    question: str
    answer: str

    def messages(self) -> list[dict[str, str]]:
        """The conversation, in the form that chat templates and the OpenAI API take."""
        return [
            {"role": "user", "content": self.question},
            {"role": "assistant", "content": self.answer},
        ]


# table -> (columns of text, columns of numbers)
TABLES = {
    "planets": (["name", "star", "kind"], ["mass", "radius", "moons"]),
    "trains": (["line", "origin", "operator"], ["speed", "seats", "delay"]),
    "recipes": (["title", "cuisine", "author"], ["minutes", "servings", "calories"]),
    "films": (["title", "director", "genre"], ["year", "length", "rating"]),
    "rivers": (["name", "country", "sea"], ["length", "depth", "flow"]),
    "players": (["name", "club", "position"], ["age", "goals", "height"]),
}
COMPARISONS = {"above": ">", "below": "<", "of exactly": "="}
AGGREGATES = {"average": "AVG", "highest": "MAX", "lowest": "MIN", "total": "SUM"}

NAMES = ["Mira", "Tom", "Aiko", "Lena", "Omar", "Ruth", "Ivan", "Sofia", "Ben", "Nadia"]
CITIES = ["Oslo", "Lima", "Kyoto", "Turin", "Accra", "Quito", "Perth", "Lyon", "Izmir", "Cork"]
COLORS = ["red", "blue", "green", "black", "white", "yellow"]
ITEMS = ["lamp", "chair", "mug", "kettle", "rug", "clock", "shelf", "pillow", "basket", "vase"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"]
ORDERS = [
    "Hello, {name} here. Please bring {count} {color} {item}s to {city} by {day}.",
    "This is {name} in {city}: I need {count} {color} {item}s on {day}.",
    "{name} would like {count} {item}s, all {color}, delivered in {city} on {day}.",
    "By {day} please, {count} {color} {item}s for {name}. The shop is in {city}.",
]


def sql_example(rng: random.Random) -> Example:
    """A question about one table, and the SQL query that answers it."""
    table = rng.choice(sorted(TABLES))
    texts, numbers = TABLES[table]
    text, number = rng.choice(texts), rng.choice(numbers)
    kind = rng.randrange(4)
    if kind == 0:
        words, sign = rng.choice(sorted(COMPARISONS.items()))
        bound = rng.randrange(2, 5000)
        question = f"Show the {text} of all {table} with a {number} {words} {bound}."
        answer = f"SELECT {text} FROM {table} WHERE {number} {sign} {bound};"
    elif kind == 1:
        words, function = rng.choice(sorted(AGGREGATES.items()))
        question = f"What is the {words} {number} of the {table} per {text}?"
        answer = f"SELECT {text}, {function}({number}) FROM {table} GROUP BY {text};"
    elif kind == 2:
        count = rng.randrange(2, 30)
        question = f"Which {count} {table} have the highest {number}? Show {text} and {number}."
        answer = f"SELECT {text}, {number} FROM {table} ORDER BY {number} DESC LIMIT {count};"
    else:
        question = f"How many {table} are there per {text}?"
        answer = f"SELECT {text}, COUNT(*) FROM {table} GROUP BY {text};"
    columns = ", ".join([*texts, *numbers])
    return Example(f"Table {table}({columns}). {question}", answer)


def json_example(rng: random.Random) -> Example:
    """An order in plain English, and its fields as one line of JSON."""
    order: dict[str, str | int] = {
        "name": rng.choice(NAMES),
        "city": rng.choice(CITIES),
        "item": rng.choice(ITEMS),
        "color": rng.choice(COLORS),
        "count": rng.randrange(2, 100),
        "day": rng.choice(DAYS),
    }
    return Example("Order: " + rng.choice(ORDERS).format(**order), json.dumps(order))


TASKS: dict[str, Callable[[random.Random], Example]] = {"sql": sql_example, "json": json_example}


def make_examples(task: str, num_train: int, num_test: int) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples of a task, no question twice. The same at every call."""
    rng = random.Random(f"deltazip demo {task}")
    unique: dict[str, Example] = {}
    while len(unique) < num_train + num_test:
        example = TASKS[task](rng)
        unique[example.question] = example
    examples = list(unique.values())
    rng.shuffle(examples)
    return examples[:num_train], examples[num_train:]


def write_jsonl(path: Path, examples: list[Example]) -> None:
    """One conversation a line: what `deltazip compress` takes for calibration, too."""
    lines = [json.dumps({"messages": example.messages()}) for example in examples]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_jsonl(path: Path) -> list[Example]:
    """What write_jsonl wrote."""
    conversations = [json.loads(line)["messages"] for line in path.read_text("utf-8").splitlines()]
    return [Example(asked["content"], told["content"]) for asked, told in conversations]
