import logging
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # for editors and type checkers
    from .explore.page import demo as demo
    from .pipeline import UniEmoPipeline as UniEmoPipeline

__version__ = "0.1.0"


def _is_news(record):
    "Images are read by Pillow here: that torchvision is not installed is no news."
    return "requires torchvision (not installed)" not in record.getMessage()


logging.getLogger("transformers.utils.import_utils").addFilter(_is_news)
# without ipywidgets a bar in a notebook is text, which is in order
warnings.filterwarnings("ignore", message="IProgress not found")


def __getattr__(name):
    "`uniemo.UniEmoPipeline`, read when it is asked for: importing the package alone stays light."
    if name == "UniEmoPipeline":
        from .pipeline import UniEmoPipeline

        return UniEmoPipeline
    if name == "demo":
        from .explore.page import demo

        return demo
    raise AttributeError(f"module 'uniemo' has no attribute {name!r}")
