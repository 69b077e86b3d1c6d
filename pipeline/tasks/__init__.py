"""Tasks: how text becomes rows, what they ask of a model, and how it is scored. One file a task, chosen by name."""

from typing import Any

from pipeline.tasks.chat import Chat
from pipeline.tasks.language_modeling import LanguageModeling
from pipeline.tasks.next_utterance import NextUtterance
from pipeline.tasks.summarization import Summarization
from pipeline.tasks.task import Task

TASKS: dict[str, type[Task]] = {
    "chat": Chat,
    "language_modeling": LanguageModeling,
    "next_utterance": NextUtterance,
    "summarization": Summarization,
}


def task_of(recipe: dict[str, Any]) -> Task:
    """Return the task that the recipe of a tokenize step describes."""
    return TASKS[recipe["task"]["name"]].of(recipe)
