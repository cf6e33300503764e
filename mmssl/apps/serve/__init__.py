"""A web page and a JSON API (FastAPI) over a model and, optionally, an index of images."""

from mmssl.apps.serve.app import create_app
from mmssl.apps.serve.limits import ServerLimits
from mmssl.apps.serve.server import listen, make_server

__all__ = ["ServerLimits", "create_app", "listen", "make_server"]
