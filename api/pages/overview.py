"""GET /: where to begin."""

from fastapi import APIRouter
from starlette.responses import RedirectResponse

router = APIRouter(include_in_schema=False)


@router.get("/")
def overview() -> RedirectResponse:
    return RedirectResponse("/problems", 307)
