"""What others made, under the name that callers know. By hand: see `uniemo.files`."""

from uniemo.files.emogen import load_emogen
from uniemo.files.uniemo import load_uniemo

__all__ = ["load_emogen", "load_uniemo"]
