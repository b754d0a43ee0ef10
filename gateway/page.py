"""Serves the static files of the web page."""

from __future__ import annotations

import os
import pathlib

from fastapi import FastAPI
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

FOLDER = pathlib.Path(__file__).with_name("web")
_HEADERS = {"Cache-Control": "no-cache"}
"""Browsers revalidate cached files, so that the page always matches the gateway that serves it."""


class _Files(StaticFiles):
    def file_response(
        self, full_path: str | os.PathLike[str], stat_result: os.stat_result, scope: Scope, status_code: int = 200
    ) -> Response:
        response = super().file_response(full_path, stat_result, scope, status_code)
        response.headers.update(_HEADERS)
        return response


def install(app: FastAPI) -> None:
    """Serve the page at / and its files below /static. They contain no data of jobs, so they need no key."""

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(FOLDER / "index.html", headers=_HEADERS)

    app.mount("/static", _Files(directory=FOLDER), name="static")
