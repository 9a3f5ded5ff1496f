"""The HTTP app: routes, doors and their description."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware

from vipllava import __version__
from vipllava.inference.protocol import GenerationEngine
from vipllava.serve import description as described
from vipllava.serve import metrics
from vipllava.serve.chat_api import answer_chat
from vipllava.serve.errors import ApiError, answer_errors, json_response
from vipllava.serve.preview_api import answer_preview
from vipllava.serve.request_log import RequestLog
from vipllava.serve.serving import ServedModel, Serving
from vipllava.serve.settings import ServerSettings


def build_app(models: Mapping[str, GenerationEngine], settings: ServerSettings) -> FastAPI:
    """Return the app that serves models.

    What its routes share is ``app.state.serving``; the engines are closed when the app ends.

    Args:
        models: engines by the name that a request's ``model`` says; the first one is the default
            of pages.
        settings: limits and doors.

    Raises:
        ConfigError: there is no model, or a name cannot be one.
    """
    serving = Serving(models, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        try:
            yield
        finally:
            await serving.close()

    app = FastAPI(
        title="ViP-LLaVA",
        description="OpenAI's chat completions, with regions drawn on the image.",
        version=__version__,
        docs_url=None,  # their scripts would come from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.state.serving = serving
    _add_api(app, serving)
    _add_probes(app, serving)
    answer_errors(app)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-ID", "Retry-After"],
        )
    app.add_middleware(RequestLog, settings=settings, metrics=serving.metrics)
    described.describe(app, needs_key=settings.api_key is not None)
    return app


def has_key(request: Request, settings: ServerSettings) -> bool:
    """Tell whether a request has the server's key, or needs none."""
    if settings.api_key is None:
        return True
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    same = hmac.compare_digest(given.strip().encode(), settings.api_key.encode())
    return same and kind.lower() == "bearer"


def _add_api(app: FastAPI, serving: Serving) -> None:
    async def check_key(request: Request) -> None:
        if not has_key(request, serving.settings):
            raise ApiError(
                401, "the key is missing or wrong: send Authorization: Bearer KEY",
                code="invalid_api_key", close=request.method == "POST",
            )  # fmt: skip

    guarded: list[Any] = [Depends(check_key)]

    @app.get("/v1/models", dependencies=guarded, responses=described.MODELS)
    async def list_models() -> Response:
        """List the models."""
        found = [_model_fields(model) for model in serving.models.values()]
        return json_response({"object": "list", "data": found})

    @app.get("/v1/models/{model_id:path}", dependencies=guarded, responses=described.MODEL)
    async def get_model(model_id: str) -> Response:
        """Tell about one model."""
        return json_response(_model_fields(serving.model(model_id)))

    @app.post(
        "/v1/chat/completions", dependencies=guarded, responses=described.CHAT,
        openapi_extra=described.CHAT_BODY,
    )  # fmt: skip
    async def create_chat_completion(request: Request) -> Response:
        """Answer a conversation about an image with marks on it."""
        return await answer_chat(request, serving)

    @app.post(
        "/v1/regions/preview", dependencies=guarded, responses=described.PREVIEW,
        openapi_extra=described.PREVIEW_BODY,
    )  # fmt: skip
    async def preview_regions(request: Request) -> Response:
        """Draw marks on an image, as a model would see it."""
        return await answer_preview(request, serving)

    @app.get("/metrics", dependencies=guarded, responses=described.METRICS)
    async def get_metrics() -> Response:
        """Tell Prometheus about requests, queues, times and tokens."""
        return Response(serving.metrics.text(), media_type=metrics.CONTENT_TYPE)


def _add_probes(app: FastAPI, serving: Serving) -> None:
    @app.get("/health", responses=described.HEALTH)
    async def get_health() -> Response:
        """Tell that the process lives."""
        return json_response({"status": "ok"})

    @app.get("/ready", responses=described.READY)
    async def get_ready(request: Request) -> Response:
        """Tell whether all models answer; which, to those who may ask them."""
        if serving.lifecycle.ending:
            return json_response({"status": "ending"}, 503)
        served = list(serving.models.values())
        faults = await asyncio.gather(*(model.check() for model in served))
        status, code = ("ready", 200) if not any(faults) else ("not ready", 503)
        found: dict[str, Any] = {"status": status}
        if has_key(request, serving.settings):
            found["models"] = {
                model.name: fault or "ready" for model, fault in zip(served, faults, strict=True)
            }
        return json_response(found, code)


def _model_fields(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "vipllava",
        "max_model_len": model.engine.max_positions,
    }
