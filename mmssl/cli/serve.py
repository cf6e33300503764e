"""`mmssl serve`: a page and an API over a model."""

import ipaddress
from pathlib import Path
from typing import Annotated

import typer

from mmssl.cli.evaluate import Device, load_on
from mmssl.cli.search import ModelName
from mmssl.errors import UserError


def serve(
    model: ModelName,
    index: Annotated[
        Path | None, typer.Argument(help="Folder that mmssl embed wrote. Without it there is no search.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on. The default is reached from this machine only.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A name under which browsers reach the server, as behind a proxy; repeat. Addresses "
            "and localhost always work.",
        ),
    ] = None,
    max_upload: Annotated[int, typer.Option(metavar="MIB", min=1, max=1024, help="Largest upload.")] = 10,
    device: Device = None,
) -> None:
    """Serve a page and a JSON API: search by words or by an image, zero-shot labels, similarity maps.

    Example: mmssl serve runs/mine index
    """
    from mmssl.apps.search import Index

    try:
        from mmssl.apps.serve import ServerLimits, create_app, listen, make_server
    except ImportError as error:
        raise UserError(f"serving needs {error.name}: pip install 'mmssl[serve]'") from None

    stored = None if index is None else Index(index)
    with listen(host, port) as socket:
        names = tuple(name.lower() for name in [*(allow_host or []), host])
        limits = ServerLimits(upload_bytes=max_upload << 20, hosts=names)
        app = create_app(load_on(model, device), stored, limits)
        number = socket.getsockname()[1]
        print(f"http://{f'[{host}]' if ':' in host else host}:{number}  (API: /api/openapi.json; Ctrl-C ends it)")
        if not _is_loopback(host):
            print(
                f"warning: {host} can be reached from other machines, and there is no login: whoever reaches it can "
                f"search and see every image of the index"
            )
        make_server(app).run(sockets=[socket])


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
