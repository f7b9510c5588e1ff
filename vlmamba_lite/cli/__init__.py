from .commands import app  # noqa: F401 - transition: the lead empties this file
