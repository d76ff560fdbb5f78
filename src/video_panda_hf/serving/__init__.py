"""An OpenAI-compatible server that may be reached by strangers. It needs the extra `serve`: fastapi and uvicorn.

`app` has the routes and who may call them, `requests` what a request may say, `media` and `network` what it may name,
`engine` decodes and generates in threads, `answers` turns tokens into text. `vllm` is a plugin for another server.
"""

from .app import create_app, run
from .settings import ServerSettings


__all__ = ["ServerSettings", "create_app", "run"]
