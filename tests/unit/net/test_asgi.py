"""`asgi.call`: requests to an application in this process."""

from __future__ import annotations

import asyncio

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from fedbpt.net import asgi


async def show(request: Request) -> Response:
    found = {
        "method": request.method,
        "name": request.path_params["name"],
        "query": dict(request.query_params),
        "accept": request.headers["accept"],
        "body": (await request.body()).decode(),
    }
    return JSONResponse(found, 202, {"X-Found": "yes"})


async def stream(_request: Request) -> Response:
    async def chunks():
        for chunk in (b"a", b"b", b"c"):
            yield chunk

    return StreamingResponse(chunks())


async def fail(_request: Request) -> Response:
    raise KeyError("fault")


APP = Starlette(
    routes=[
        Route("/stream", stream),
        Route("/fail", fail),
        Route("/things/{name}", show, methods=["POST"]),
    ]
)


def call(method: str, target: str, body: bytes = b"") -> asgi.AsgiResponse:
    return asyncio.run(asgi.call(APP, method, target, body, {"Accept": "text/x"}))


def test_path_query_headers_and_body_reach_the_route() -> None:
    response = call("POST", "/things/a%20b?wait=0.5&short=1", b"hello")
    assert response.status == 202
    assert response.headers["x-found"] == "yes"
    assert response.headers["content-type"] == "application/json"
    assert response.body == (
        b'{"method":"POST","name":"a b","query":{"wait":"0.5","short":"1"},"accept":"text/x","body":"hello"}'
    )


def test_a_streamed_body_is_joined() -> None:
    assert call("GET", "/stream").body == b"abc"


def test_an_unknown_path_is_not_found() -> None:
    assert call("GET", "/nothing").status == 404


def test_a_fault_of_the_application_is_raised() -> None:
    with pytest.raises(KeyError):
        call("GET", "/fail")
