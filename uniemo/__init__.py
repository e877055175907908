"""Emotion in images: expert queries read it, a diffusion model paints it, each teaches the other."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .pipeline import UniEmoPipeline  # noqa: F401  (so that editors find its methods)

__version__ = "0.1.0"


def __getattr__(name):
    "`uniemo.UniEmoPipeline`, read when it is asked for: importing the package alone stays light."
    if name == "UniEmoPipeline":
        from .pipeline import UniEmoPipeline

        return UniEmoPipeline
    raise AttributeError(f"module 'uniemo' has no attribute {name!r}")
