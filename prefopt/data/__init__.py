"""Data: rows of any shape to token ids, cached, mixed and split."""

from prefopt.data.bundle import DataBundle, load_data
from prefopt.data.prompts import PromptSet, load_prompts
from prefopt.data.render import Renderer
from prefopt.data.tokens import TokenSet

__all__ = ["DataBundle", "PromptSet", "Renderer", "TokenSet", "load_data", "load_prompts"]
