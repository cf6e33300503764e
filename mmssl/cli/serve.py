"""`mmssl serve`."""

import ipaddress
from pathlib import Path
from typing import Annotated

import typer

from mmssl.cli.common import Device, Dim, ModelName, Precision, load_model, verb
from mmssl.errors import UserError


@verb(70)
def serve(
    model: ModelName,
    index: Annotated[
        Path | None, typer.Argument(help="Folder that mmssl embed wrote. Without it the page offers no search.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on. The default accepts this machine only.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: any free one.")] = 8000,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Host name under which browsers reach the server, as behind a proxy; repeat. Addresses "
            "and localhost always work.",
        ),
    ] = None,
    max_upload: Annotated[int, typer.Option(metavar="MIB", min=1, max=1024, help="Largest upload in MiB.")] = 10,
    dim: Dim = None,
    device: Device = None,
    precision: Precision = "auto",
) -> None:
    """Serve a web page and a JSON API: search by text or image, zero-shot labels, similarity maps.

    Example: mmssl serve runs/mine index
    """
    from mmssl.apps.search import Index

    try:
        from mmssl.apps.serve import ServerLimits, create_app, listen, make_server
    except ImportError as error:
        raise UserError(f"serving needs {error.name}: pip install 'mmssl[serve]'") from None

    if index is None and dim is not None:
        raise UserError("--dim shortens the embeddings of an index; give INDEX too")
    stored = None if index is None else Index(index, dim)
    with listen(host, port) as socket:
        names = tuple(name.lower() for name in [*(allow_host or []), host])
        limits = ServerLimits(upload_bytes=max_upload << 20, hosts=names)
        app = create_app(load_model(model, device, precision), stored, limits)
        number = socket.getsockname()[1]
        print(f"http://{f'[{host}]' if ':' in host else host}:{number}  (API: /api/openapi.json; Ctrl-C stops it)")
        if not _is_loopback(host):
            print(
                f"warning: {host} can be reached from other machines, and there is no login: everybody who reaches it "
                f"can search and see every image of the index"
            )
        make_server(app).run(sockets=[socket])


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
