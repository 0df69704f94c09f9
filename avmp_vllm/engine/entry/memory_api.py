"""``/v1/avmp/memory``: an elastic arena's memory and budget, where vLLM has its development mode.

Its path begins as those that vLLM's API key guards, so it asks for the key, too.
"""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse

from avmp_vllm.engine.entry.config import MEMORY_METHOD

router = APIRouter()
PATH = "/v1/avmp/memory"


async def _ask(raw_request: Request, budget: int | str | None = None) -> JSONResponse:
    client = raw_request.app.state.engine_client
    (answer,) = await client.collective_rpc(
        method=MEMORY_METHOD, kwargs={"budget": budget, "errors": "return"}
    )
    status = HTTPStatus.BAD_REQUEST if "error" in answer else HTTPStatus.OK
    return JSONResponse(content=answer, status_code=status.value)


@router.get(PATH)
async def show(raw_request: Request) -> JSONResponse:
    """What memory the arena has."""
    return await _ask(raw_request)


@router.post(PATH)
async def set_budget(raw_request: Request) -> JSONResponse:
    """Set the budget: ``{"budget": "2GiB"}``; answers with what memory the arena has then."""
    try:
        body = await raw_request.json()
    except ValueError:
        body = None
    budget = body.get("budget") if isinstance(body, dict) else None
    if not isinstance(budget, (int, str)):
        error = 'the body must be a JSON object with a budget in it, {"budget": "2GiB"}'
        return JSONResponse({"error": error}, HTTPStatus.BAD_REQUEST.value)
    return await _ask(raw_request, budget)


def register_dev_api_routers(stock: Callable[[FastAPI], None]) -> Callable[[FastAPI], None]:
    """Wrap ``register_vllm_dev_api_routers``: one endpoint more."""

    def wrapper(app: FastAPI, *args: Any, **kwargs: Any) -> None:
        stock(app, *args, **kwargs)
        app.include_router(router)

    return wrapper
