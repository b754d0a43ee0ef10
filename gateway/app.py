"""The web application: routes, middleware, error documents."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI
from starlette.middleware import Middleware

from miles import __version__
from miles.gateway import openapi, page, problems
from miles.gateway.auth import Gatekeeper
from miles.gateway.body import BodyLimit
from miles.gateway.options import GatewayOptions
from miles.gateway.routes import checkpoints, events, health, jobs, logs, metrics, samples, status, versions, workers
from miles.gateway.security_headers import SecurityHeaders
from miles.gateway.state import GatewayState
from miles.gateway.telemetry import RequestLog, Telemetry


def create_app(options: GatewayOptions) -> FastAPI:
    """Build the application; it connects to the controller when it starts."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with GatewayState(options) as gateway:
            app.state.gateway = gateway
            yield

    telemetry = Telemetry()
    app = FastAPI(
        title="miles",
        version=__version__,
        description=openapi.DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # the usual page loads its scripts from other sites
        redoc_url=None,
        middleware=[
            Middleware(RequestLog, telemetry=telemetry),
            Middleware(SecurityHeaders),
            Middleware(BodyLimit, max_bytes=options.max_body_bytes),
        ],
    )
    app.state.gatekeeper = Gatekeeper(options)
    app.state.telemetry = telemetry
    routers = [
        part.router for part in (jobs, status, events, metrics, samples, checkpoints, versions, workers, logs, health)
    ]
    problems.install(app, routers)
    for router in routers:
        app.include_router(router)
    openapi.install(app)
    page.install(app)
    return app
