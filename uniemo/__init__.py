__version__ = "0.1.0"


def __getattr__(name):
    "`uniemo.UniEmoPipeline`, read when it is asked for: importing the package alone stays light."
    if name == "UniEmoPipeline":
        from .pipeline import UniEmoPipeline

        return UniEmoPipeline
    raise AttributeError(f"module 'uniemo' has no attribute {name!r}")
